import pytest
import torch

from nemo_cosmos.tokenizer.quantizer import FSQuantizer

LEVELS = (8, 8, 8, 5, 5, 5)


def noise(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return 2 * torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


def test_every_index_has_its_code_and_back() -> None:
    quantizer, indices = FSQuantizer(LEVELS), torch.arange(64_000).reshape(1, 40, 40, 40)
    codes = quantizer.indices_to_codes(indices)
    assert codes.shape == (1, 6, 40, 40, 40)
    assert len(codes.flatten(2)[0].T.unique(dim=0)) == 64_000
    # What the networks would have to give for these codes: the middle of each level's cell.
    half_width = torch.tensor(LEVELS)[:, None, None, None] // 2
    z = unbounded(codes * half_width)
    back, again = quantizer(z)
    assert back.dtype == torch.int32
    assert torch.equal(back, indices.int())
    assert torch.equal(again, codes)


def unbounded(digits: torch.Tensor) -> torch.Tensor:
    """The z that is bounded to these digits, by the paper's formula read backwards."""
    levels = torch.tensor(LEVELS, dtype=torch.float64)[:, None, None, None]
    half_range = (levels - 1) * 1.001 / 2
    offset = torch.where(levels % 2 == 0, 0.5, 0.0)
    return (((digits + offset) / half_range).atanh() - (offset / half_range).atanh()).float()


def test_indices_count_the_first_dimension_fastest() -> None:
    quantizer = FSQuantizer(LEVELS)
    assert quantizer._basis.tolist() == [1, 8, 64, 512, 2560, 12800]
    first, second, last = quantizer.indices_to_codes(torch.tensor([[0, 1, 63_999]]))[0].T.tolist()
    assert first == [-1.0] * 6
    assert second == [-0.75] + [-1.0] * 5
    # Eight levels have no middle: they go from -4 / 4 to 3 / 4, five from -2 / 2 to 2 / 2.
    assert last == [0.75] * 3 + [1.0] * 3


def test_zero_stays_zero_and_extremes_stay_inside() -> None:
    z = torch.tensor([[0.0], [-1e4], [1e4]]).expand(3, 6)[:, :, None, None]
    indices, codes = FSQuantizer(LEVELS)(z)
    assert codes[0].abs().max() == 0
    assert indices[1:].flatten().tolist() == [0, 63_999]


def test_rounding_to_the_nearest_level() -> None:
    quantizer = FSQuantizer((3,))
    # tanh(z) x 1.001 rounds to 1 from 0.5 on.
    edge = torch.tensor(0.5 / 1.001).atanh().item()
    _, codes = quantizer(torch.tensor([edge - 1e-3, edge + 1e-3, -edge + 1e-3, -edge - 1e-3])[None, None])
    assert codes.flatten().tolist() == [0, 1, 0, -1]


def test_the_gradient_is_that_of_the_bound() -> None:
    z = noise(2, 6, 3, 4, dtype=torch.float64).requires_grad_()
    FSQuantizer(LEVELS)(z)[1].sum().backward()
    levels = torch.tensor(LEVELS, dtype=torch.float64)[:, None, None]
    half_range = (levels - 1) * 1.001 / 2
    shift = (torch.where(levels % 2 == 0, 0.5, 0.0) / half_range).atanh()
    expected = (1 - (z.detach() + shift).tanh() ** 2) * half_range / (levels // 2)
    # The levels' own arithmetic is in float32.
    assert (z.grad - expected).abs().max() <= 1e-6
    assert z.grad.abs().min() > 0


@pytest.mark.parametrize("shape", [(2, 6, 3, 4), (2, 6, 2, 3, 4), (2, 6, 5)])
def test_any_grid(shape: tuple[int, ...]) -> None:
    quantizer, z = FSQuantizer(LEVELS), noise(*shape)
    indices, codes = quantizer(z)
    assert indices.shape == (shape[0], *shape[2:]) and codes.shape == shape
    assert torch.equal(quantizer.indices_to_codes(indices), codes)


def test_bf16_is_bounded_in_float32() -> None:
    quantizer, z = FSQuantizer(LEVELS).bfloat16(), noise(2, 6, 8, 8).bfloat16()
    indices, codes = quantizer(z)
    assert codes.dtype == torch.bfloat16
    assert torch.equal(indices, FSQuantizer(LEVELS)(z.float())[0])
    assert torch.equal(quantizer.indices_to_codes(indices), codes.float())
