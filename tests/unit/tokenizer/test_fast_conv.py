from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TypeVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from nemo_cosmos.tokenizer import fast_conv, pages
from nemo_cosmos.tokenizer.config import TokenizerConfig
from nemo_cosmos.tokenizer.layers import FactorisedConv, HybridUpsample, ResnetBlock
from nemo_cosmos.tokenizer.model import CausalVideoTokenizer
from tests.unit.tokenizer.conftest import random_tokenizer
from tests.unit.tokenizer.live_memory import LiveMemory

T = TypeVar("T")

WIDE = TokenizerConfig(channels=64, num_res_blocks=1)
"""Every 3x3 convolution but those beside the latent has channels enough."""

TOLERANCE = 4e-6
"""For results of spread 1; other sums are off by 1e-6, and the constants of 4x4 tiles enlarge it."""


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def picture(*shape: int) -> Tensor:
    return randn(*shape).to(memory_format=torch.channels_last)


def kernel(out_channels: int, in_channels: int, *size: int) -> Tensor:
    weight = randn(out_channels, in_channels, *size, seed=1)
    return weight / weight[0].numel() ** 0.5


def num_products(call: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops() // 2


@pytest.fixture(params=[False, True], ids=["at once", "in pieces"])
def pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cuts even these small tensors."""
    if request.param:
        monkeypatch.setattr(fast_conv, "_TILES_AT_ONCE", 5)
        monkeypatch.setattr(fast_conv, "_PIXELS_AT_ONCE", 7)


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("padding", [(1, 1), (0, 1), (0, 0), (2, 1)])
@pytest.mark.parametrize("size", [(8, 8), (3, 3), (4, 9), (13, 6), (17, 21)])
def test_conv2d_equals_the_direct_sum(size: tuple[int, int], padding: tuple[int, int]) -> None:
    x, weight, bias = picture(3, 6, *size), kernel(5, 6, 3, 3), randn(5)
    for b in (bias, None):
        y = fast_conv.conv2d(x, weight, b, padding)
        expected = F.conv2d(x.double(), weight.double(), None if b is None else b.double(), padding=padding)
        assert y.shape == expected.shape
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert (y - expected).abs().max() <= TOLERANCE


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("size", [(8, 12), (13, 6)])
def test_conv2d_after_a_function_of_frames_in_the_memory_of_its_input(size: tuple[int, int]) -> None:
    x, weight = picture(3, 6, *size), kernel(6, 6, 3, 3)
    expected = F.conv2d(F.silu(x.double()), weight.double(), padding=1)
    y = fast_conv.conv2d(x, weight, None, (1, 1), prologue=F.silu, overwrite=True)
    assert (y - expected).abs().max() <= TOLERANCE
    assert (y.data_ptr() == x.data_ptr()) == (size == (8, 12))  # whole tiles alone fit


@pytest.mark.parametrize("size", [(1, 1), (4, 4), (5, 3)])
def test_conv2d_of_doubled_pixels(size: tuple[int, int]) -> None:
    x, weight, bias = picture(2, 6, *size), kernel(5, 6, 3, 3), randn(5)
    doubled = x.double().repeat_interleave(2, 2).repeat_interleave(2, 3)
    for b in (bias, None):
        y = fast_conv.conv2d_of_doubled(x, weight, b)
        expected = F.conv2d(doubled, weight.double(), None if b is None else b.double(), padding=1)
        assert y.shape == expected.shape
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert (y - expected).abs().max() <= TOLERANCE


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize(("stride", "num_equal"), [(1, 1), (1, 2), (1, 3), (2, 1), (2, 2)])
@pytest.mark.parametrize("num_frames", range(3, 9))
def test_conv_over_time_equals_the_direct_sum(num_frames: int, stride: int, num_equal: int) -> None:
    x, weight, bias = randn(2, 6, num_frames, 4, 5), kernel(5, 6, 3), randn(5)
    x[:, :, :num_equal] = x[:, :, :1]
    for b in (bias, None):
        y = fast_conv.conv_over_time(x.unbind(2), weight, b, stride=stride, num_equal=num_equal)
        b64 = None if b is None else b.double()
        expected = F.conv3d(x.double(), weight[..., None, None].double(), b64, stride=(stride, 1, 1))
        assert y.shape == expected.shape
        assert y.is_contiguous(memory_format=torch.channels_last_3d)
        assert (y - expected).abs().max() <= TOLERANCE


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("num_frames", range(1, 7))
@pytest.mark.parametrize("at_start", [True, False])
def test_conv_over_time_in_the_memory_of_its_input(num_frames: int, at_start: bool) -> None:
    x, before = randn(2, 6, num_frames, 4, 5).to(memory_format=torch.channels_last_3d), randn(2, 6, 2, 4, 5, seed=2)
    weight, bias = kernel(6, 6, 3), randn(6)
    frames = [*([x[:, :, 0]] * 2 if at_start else before.unbind(2)), *x.unbind(2)]
    expected = F.conv3d(torch.stack(frames, 2).double(), weight[..., None, None].double(), bias.double())
    y = fast_conv.conv_over_time(frames, weight, bias, stride=1, num_equal=3 if at_start else 1, out=x)
    assert y.data_ptr() == x.data_ptr()
    assert (y - expected).abs().max() <= TOLERANCE


@pytest.mark.parametrize(("stride", "num_equal"), [(1, 1), (1, 3), (2, 2)])
@pytest.mark.parametrize("num_frames", [3, 4, 7])
def test_bf16_over_time_is_rounded_as_the_direct_sum_is(num_frames: int, stride: int, num_equal: int) -> None:
    x, weight, bias = (t.bfloat16() for t in (randn(2, 64, num_frames, 4, 5), kernel(48, 64, 3), randn(48)))
    x = x.to(memory_format=torch.channels_last_3d)
    x[:, :, :num_equal] = x[:, :, :1]
    y = fast_conv.conv_over_time(x.unbind(2), weight, bias, stride=stride, num_equal=num_equal)
    expected = F.conv3d(x.double(), weight[..., None, None].double(), bias.double(), stride=(stride, 1, 1))
    assert y.dtype == torch.bfloat16 and y.shape == expected.shape
    assert y.is_contiguous(memory_format=torch.channels_last_3d)
    # Outputs have spread 1.4 and 8 bits: rounded once they are off by 2e-3, and by the rounding of summed weights.
    assert (y - expected).square().mean().sqrt() <= 4e-3


def test_bf16_of_doubled_pixels_is_rounded_as_the_direct_sum_is() -> None:
    x, weight, bias = picture(2, 64, 5, 6).bfloat16(), kernel(48, 64, 3, 3).bfloat16(), randn(48).bfloat16()
    y = fast_conv.conv2d_of_doubled(x, weight, bias)
    doubled = x.double().repeat_interleave(2, 2).repeat_interleave(2, 3)
    expected = F.conv2d(doubled, weight.double(), bias.double(), padding=1)
    assert y.dtype == torch.bfloat16 and y.shape == expected.shape
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert (y - expected).square().mean().sqrt() <= 5e-3


def test_numbers_of_multiplications() -> None:
    weight, pair = kernel(8, 8, 3, 3), 8 * 8
    mix = 36 * 9 * pair  # of the kernel, once for all pixels
    x = picture(1, 8, 16, 16)
    assert num_products(lambda: fast_conv.conv2d(x, weight, None, (1, 1))) == 36 * 16 * pair + mix
    assert num_products(lambda: fast_conv.conv2d_of_doubled(x, weight, None)) == 9 * 256 * pair + 9 * 9 * pair


@pytest.mark.parametrize(
    ("num_frames", "num_equal", "products"),
    [(5, 3, 5), (7, 3, 9), (4, 3, 3), (6, 3, 7), (4, 1, 4), (5, 1, 7)],
)
def test_numbers_of_multiplications_over_time(num_frames: int, num_equal: int, products: int) -> None:
    """One for the first frame, four for each two later ones; two or three for one that remains."""
    frames, weight = list(randn(num_frames, 1, 8, 4, 4)), kernel(8, 8, 3)
    call = lambda: fast_conv.conv_over_time(frames, weight, None, stride=1, num_equal=num_equal)  # noqa: E731
    assert num_products(call) == products * 16 * 8 * 8


def direct(monkeypatch: pytest.MonkeyPatch, call: Callable[[], T]) -> T:
    """Runs `call` as on a machine where nothing here applies."""
    with monkeypatch.context() as patch:
        patch.setattr(fast_conv, "applies", lambda x: False)
        return call()


@pytest.fixture(scope="module")
def wide() -> CausalVideoTokenizer:
    tokenizer = random_tokenizer(WIDE)
    for parameter in tokenizer.decoder.conv_out[1].parameters():
        parameter.data.mul_(0.02)  # pixels in the range of a trained model's
    return tokenizer


@torch.no_grad()
def test_the_tokenizer_gives_the_same_with_fewer_multiplications(
    wide: CausalVideoTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    video = torch.rand(1, 3, 17, 128, 112, generator=torch.Generator().manual_seed(0)) * 2 - 1
    given = video.clone()
    latent = direct(monkeypatch, lambda: wide.encode(video))
    given_latent = latent.clone()
    rebuilt = direct(monkeypatch, lambda: wide.decode(latent))
    assert latent.std() > 0.1 and rebuilt.std() > 0.1
    assert (wide.encode(video) - latent).abs().max() <= 1e-5
    assert (wide.decode(latent) - rebuilt).abs().max() <= 1e-5
    assert torch.equal(video, given) and torch.equal(latent, given_latent)
    for call in (lambda: wide.encode(video), lambda: wide.decode(latent)):
        assert num_products(call) < 0.6 * direct(monkeypatch, lambda call=call: num_products(call))


@torch.no_grad()
def test_a_block_holds_its_input_and_its_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "empty", Tensor.new_empty)  # as the watch sees no others
    block, x = ResnetBlock(64, 64), randn(1, 64, 9, 64, 64).to(memory_format=torch.channels_last_3d)
    with LiveMemory() as watch:
        block(x)
    # Beside the result there are two of the nine frames, weights and tiles: no other tensor of that size.
    assert watch.peak_bytes <= 1.5 * x.nbytes


@torch.no_grad()
def test_a_level_frees_what_its_blocks_have_seen(wide: CausalVideoTokenizer) -> None:
    seen: list[weakref.ref] = []
    blocks = wide.decoder.up[0].block
    hooks = [
        blocks[0].register_forward_pre_hook(lambda _, args: seen.append(weakref.ref(args[0]))),
        blocks[1].register_forward_pre_hook(lambda _, args: seen.append(seen[0]())),
    ]
    wide.decode(randn(1, 16, 1, 4, 4))
    for hook in hooks:
        hook.remove()
    assert seen[1] is None


def test_training_computes_directly(monkeypatch: pytest.MonkeyPatch) -> None:
    block, x = ResnetBlock(64, 96), randn(1, 64, 3, 16, 16).requires_grad_()

    def gradients() -> list[Tensor]:
        return list(torch.autograd.grad(block(x).square().mean(), [x, *block.parameters()]))

    for got, expected in zip(gradients(), direct(monkeypatch, gradients), strict=True):
        assert torch.equal(got, expected)


@torch.no_grad()
def test_changed_weights_count_at_once() -> None:
    layer, x = FactorisedConv(64, 64), randn(1, 64, 3, 16, 16)
    before = layer(x)
    for parameter in layer.parameters():
        parameter.neg_()
    with torch.enable_grad():
        expected = layer(x)
    assert (layer(x) - expected).abs().max() <= TOLERANCE
    assert (layer(x) - before).abs().max() > 0.1


@torch.no_grad()
@pytest.mark.parametrize("module", [ResnetBlock(64, 64), HybridUpsample(64, space=True, time=True)])
def test_programs_hold_for_other_sizes(module: nn.Module) -> None:
    x, other = randn(1, 64, 2, 8, 8), randn(2, 64, 3, 12, 10)
    program = torch.jit.trace(module, x, check_trace=False)
    expected = module(other)
    assert (program(other) - expected).abs().max() <= TOLERANCE * max(1.0, expected.abs().max().item())


@torch.no_grad()
def test_what_takes_part_in_a_layer_still_does() -> None:
    module, x = HybridUpsample(64, space=True, time=False), randn(1, 64, 1, 24, 24)
    module.conv2.register_forward_hook(lambda _module, _args, output: 0 * output)
    with torch.enable_grad():
        expected = module(x)
    assert (module(x) - expected).abs().max() <= TOLERANCE
