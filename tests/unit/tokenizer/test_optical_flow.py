import importlib.machinery
import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from nemo_cosmos.errors import UserError
from nemo_cosmos.tokenizer import optical_flow as flows
from nemo_cosmos.tokenizer.losses import flow_difference
from nemo_cosmos.tokenizer.optical_flow import LucasKanadeFlow, optical_flow, warp


def texture(seed: int = 0) -> torch.Tensor:
    """[1, 3, 192, 192], smooth on the scale of some pixels."""
    coarse = torch.rand(1, 3, 24, 24, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return F.interpolate(coarse, (192, 192), mode="bicubic")


def moved(x: float, y: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Two frames of 128x128, between which everything moves by (x, y) pixels."""
    first = texture()
    motion = torch.tensor([x, y]).view(1, 2, 1, 1).expand(1, 2, 192, 192)
    second = warp(first, -motion)
    return first[:, :, 32:-32, 32:-32], second[:, :, 32:-32, 32:-32]


@pytest.mark.parametrize(("x", "y"), [(1.0, 0.0), (0.0, -2.0), (4.0, 3.0), (0.5, 0.25), (0.0, 0.0)])
def test_lucas_kanade_finds_how_a_texture_moved(x: float, y: float) -> None:
    flow = LucasKanadeFlow()(*moved(x, y))[:, :, 16:-16, 16:-16]
    error = (flow - torch.tensor([x, y]).view(1, 2, 1, 1)).abs()
    # Away from the border, where new texture comes in; half pixels are found on a frame that interpolation blurred.
    assert error.mean() < 0.04


def test_where_nothing_is_to_be_seen_nothing_moves() -> None:
    assert torch.equal(
        LucasKanadeFlow()(torch.zeros(1, 3, 32, 32), torch.zeros(1, 3, 32, 32)), torch.zeros(1, 2, 32, 32)
    )


def test_warp_looks_up_where_the_flow_points() -> None:
    frames = texture()[:, :, :8, :8]
    shifted = warp(frames, torch.tensor([2.0, 1.0]).view(1, 2, 1, 1).expand(1, 2, 8, 8))
    # grid_sample's coordinates go through [-1, 1] and back in float32.
    torch.testing.assert_close(shifted[:, :, :-1, :-2], frames[:, :, 1:, 2:], rtol=0, atol=1e-5)


def video(x: float, frames: int = 3) -> torch.Tensor:
    """[1, 3, frames, 128, 128], moving by x pixels a frame."""
    whole = texture()
    motion = torch.tensor([x, 0.0]).view(1, 2, 1, 1).expand(1, 2, 192, 192)
    return torch.stack([warp(whole, -t * motion)[:, :, 32:-32, 32:-32] for t in range(frames)], dim=2)


def test_the_loss_is_the_difference_of_motion_in_pixels_and_zero_for_equal_videos() -> None:
    estimate = LucasKanadeFlow()
    assert flow_difference(video(2.0), video(2.0), estimate, scale=2) == 0
    # x differs by one pixel, y does not: half a pixel in the mean. Borders see texture come in, and stray.
    assert flow_difference(video(3.0), video(2.0), estimate, scale=2).item() == pytest.approx(0.5, abs=0.05)


def test_the_loss_takes_flicker_away() -> None:
    """A descent on it alone brings the motion of a reconstruction nearer to the video's."""
    wanted, estimate = video(1.0), LucasKanadeFlow()
    noise = 0.2 * torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1))
    reconstruction = (wanted + noise).requires_grad_()
    before = flow_difference(reconstruction, wanted, estimate, scale=2)
    before.backward()
    assert torch.isfinite(reconstruction.grad).all()
    after = flow_difference(
        reconstruction - 5 * reconstruction.grad / reconstruction.grad.std() * 1e-3, wanted, estimate, scale=2
    )
    assert after < 0.97 * before


def test_without_raft_lucas_kanade_stands_in_unless_raft_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    warnings: list[str] = []
    monkeypatch.setattr(flows.logging, "warning", warnings.append)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    assert optical_flow("auto").name == "Lucas-Kanade flow"
    assert "torchvision cannot be imported" in warnings[0]
    with pytest.raises(UserError, match="torchvision cannot be imported"):
        optical_flow("raft")
    with pytest.raises(UserError, match="optical flow: got 'farneback'"):
        optical_flow("farneback")


class _Raft(torch.nn.Module):
    """Shaped like torchvision's: gives every iteration's flow, the best one last."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = torch.nn.Parameter(torch.zeros(2))

    def forward(self, first: torch.Tensor, second: torch.Tensor) -> list[torch.Tensor]:
        flow = self.bias.view(1, 2, 1, 1) + (second - first)[:, :2]
        return [0 * flow, flow]


def test_raft_is_torchvisions_last_iteration_with_the_published_weights(monkeypatch, tmp_path) -> None:
    made: list[object] = []
    module = ModuleType("torchvision.models.optical_flow")
    module.raft_large = lambda weights: made.append(weights) or _Raft()
    for name in ("torchvision", "torchvision.models"):
        package = ModuleType(name)
        package.__spec__ = importlib.machinery.ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, package)
    monkeypatch.setitem(sys.modules, "torchvision.models.optical_flow", module)
    torch.save({"bias": torch.tensor([3.0, -1.0])}, tmp_path / "raft.pth")
    monkeypatch.setattr(flows, "public_weights", lambda url: tmp_path / "raft.pth")
    estimate = optical_flow("auto")
    assert estimate.name.startswith("RAFT")
    assert made == [None]
    second = torch.zeros(1, 3, 128, 136, requires_grad=True)
    flow = estimate(torch.zeros(1, 3, 128, 136), second)
    assert torch.equal(flow, torch.tensor([3.0, -1.0]).view(1, 2, 1, 1).expand(1, 2, 128, 136))
    flow.sum().backward()
    assert second.grad.abs().sum() > 0
    with pytest.raises(UserError, match="frames that RAFT compares: got \\(64, 64\\)"):
        estimate(torch.zeros(1, 3, 64, 64), torch.zeros(1, 3, 64, 64))
