import pytest
import torch

from nemo_cosmos.tokenizer.patching import ImagePatcher, ImageUnpatcher, Patcher, Unpatcher, haar_signs


def video(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=dtype) * 2 - 1


@pytest.mark.parametrize("method", ["haar", "rearrange"])
@pytest.mark.parametrize(("patch_size", "num_frames"), [(1, 3), (2, 1), (2, 5), (4, 1), (4, 9), (8, 9)])
def test_round_trip(method: str, patch_size: int, num_frames: int) -> None:
    x = video(2, 3, num_frames, 16, 24)
    y = Patcher(patch_size, method)(x)
    k = (num_frames - 1) // patch_size
    assert y.shape == (2, 3 * patch_size**3, 1 + k, 16 // patch_size, 24 // patch_size)
    # Sums of 512 terms (patch 8) round a little more than sums of 64.
    assert (Unpatcher(patch_size, method)(y) - x).abs().max() <= (1e-6 if patch_size < 8 else 3e-6)


@pytest.mark.parametrize("method", ["haar", "rearrange"])
@pytest.mark.parametrize("patch_size", [2, 4])
def test_equals_diffusers(method: str, patch_size: int) -> None:
    from diffusers.models.autoencoders.autoencoder_kl_cosmos import CosmosPatchEmbed3d, CosmosUnpatcher3d

    x = video(2, 3, 9, 8, 16)
    ours, theirs = Patcher(patch_size, method)(x), CosmosPatchEmbed3d(patch_size, method)(x)
    assert (ours - theirs).abs().max() <= 1e-6
    noise = video(*ours.shape)
    difference = Unpatcher(patch_size, method)(noise) - CosmosUnpatcher3d(patch_size, method)(noise)
    assert difference.abs().max() <= 1e-5  # values reach 64


def test_a_constant_video_has_only_the_low_band() -> None:
    y = Patcher(4, "haar")(torch.full((1, 3, 5, 8, 8), 0.7))
    assert (y[:, :3] - 0.7).abs().max() <= 1e-6
    assert y[:, 3:].abs().max() <= 1e-6


def test_bands_are_in_time_height_width_order() -> None:
    x = torch.zeros(1, 1, 3, 2, 2)
    x[:, :, 2] = 1.0  # differs along time only: bands lll and hll
    assert Patcher(2, "haar")(x)[0, :, 1, 0, 0].tolist() == [0.5, 0, 0, 0, -0.5, 0, 0, 0]
    x = torch.zeros(1, 1, 1, 2, 2)
    x[..., 1] = 1.0  # differs along width only: bands lll and llh
    assert Patcher(2, "haar")(x)[0, :, 0, 0, 0].tolist() == [0.5, -0.5, 0, 0, 0, 0, 0, 0]


def test_sign_matrix_is_orthogonal() -> None:
    signs = haar_signs(4)
    assert torch.equal(signs @ signs.T, 64 * torch.eye(64, dtype=torch.float64))


@pytest.mark.parametrize("module", [Patcher(2, "haar"), Unpatcher(2, "haar")])
def test_gradient_is_the_numerical_one(module: torch.nn.Module) -> None:
    channels = 2 if isinstance(module, Patcher) else 16
    x = video(1, channels, 3, 2, 4, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(module.double(), (x,))


def test_first_frame_carries_the_gradient_of_its_copies() -> None:
    x = video(1, 1, 5, 4, 4).requires_grad_()
    Patcher(4, "haar")(x)[:, 0].sum().backward()  # the low band is the mean of 64 samples
    assert torch.allclose(x.grad[0, 0, 0], torch.full((4, 4), 4 / 64))
    assert torch.allclose(x.grad[0, 0, 1:], torch.full((4, 4, 4), 1 / 64))


def test_autocast_does_not_round_the_pixels() -> None:
    x = video(1, 3, 5, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        back = Unpatcher(4, "haar")(Patcher(4, "haar")(x))
    assert back.dtype == torch.float32
    assert (back - x).abs().max() <= 1e-6


@pytest.mark.parametrize("method", ["haar", "rearrange"])
@pytest.mark.parametrize("patch_size", [1, 2, 4, 8])
def test_image_round_trip(method: str, patch_size: int) -> None:
    x = video(2, 3, 16, 24)
    y = ImagePatcher(patch_size, method)(x)
    assert y.shape == (2, 3 * patch_size**2, 16 // patch_size, 24 // patch_size)
    assert (ImageUnpatcher(patch_size, method)(y) - x).abs().max() <= 1e-6


def test_image_bands_are_in_width_height_order() -> None:
    patcher = ImagePatcher(2, "haar")
    x = torch.tensor([[0.0, 1.0], [0.0, 1.0]])[None, None]  # differs along width
    assert patcher(x).flatten().tolist() == [0.5, 0, -0.5, 0]
    assert patcher(x.mT).flatten().tolist() == [0.5, -0.5, 0, 0]


def test_image_steps_are_cascaded_over_all_bands() -> None:
    x, step = video(2, 3, 16, 24), ImagePatcher(2, "haar")
    assert (ImagePatcher(4, "haar")(x) - step(step(x))).abs().max() <= 1e-6


def test_image_samples_are_in_height_width_order() -> None:
    x = torch.arange(4.0).reshape(1, 1, 2, 2)
    assert ImagePatcher(2, "rearrange")(x).flatten().tolist() == [0, 1, 2, 3]
