import math

import pytest
import torch

from nemo_cosmos.errors import UserError
from nemo_cosmos.evaluation.metrics import ssim
from nemo_cosmos.tokenizer.losses import (
    LossConfig,
    WeightSchedule,
    check_measures,
    cut_windows,
    join_windows,
    psnr_db,
    reconstruction_loss,
    weight_at,
    window_disagreement,
)
from nemo_cosmos.tokenizer.perceptual import SparsePerceptual

SHAPE = (1, 3, 1, 4, 4)


def test_l1_and_clamped_mse() -> None:
    video, reconstruction = torch.zeros(SHAPE), torch.full(SHAPE, 3.0, requires_grad=True)
    loss = reconstruction_loss(reconstruction, video, config=LossConfig(l1_weight=0.5))
    assert (loss.total.item(), loss.parts["l1"].item(), loss.parts["mse"].item()) == (1.5, 3.0, 1.0)
    loss.total.backward()
    assert torch.allclose(reconstruction.grad, torch.full(SHAPE, 0.5 / 48))
    assert not any(part.requires_grad for part in loss.parts.values())


def test_perceptual_term_is_added() -> None:
    video, reconstruction = torch.zeros(SHAPE), torch.ones(SHAPE)
    loss = reconstruction_loss(
        reconstruction,
        video,
        config=LossConfig(perceptual_weight=0.1),
        perceptual=lambda ours, theirs: (ours - theirs).sum(),
    )
    assert loss.total.item() == pytest.approx(1 + 4.8)


def test_ssim_term_is_that_of_the_measure() -> None:
    truth = torch.randint(0, 256, (2, 16, 24, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    near = torch.where(torch.arange(24).view(1, 1, 24, 1) % 3 == 0, truth // 2, truth)
    video, reconstruction = (frames.float().permute(3, 0, 1, 2)[None] / 127.5 - 1 for frames in (truth, near))
    loss = reconstruction_loss(reconstruction, video, config=LossConfig(l1_weight=0, ssim_weight=2.0))
    # torchmetrics' windows also lie half outside the picture, where it is mirrored; hence not equal.
    assert loss.parts["ssim"].item() == pytest.approx(1 - ssim(truth.numpy(), near.numpy()).mean(), abs=0.01)
    assert loss.total.item() == pytest.approx(2 * loss.parts["ssim"].item())


def test_wanted_but_missing_distance_is_refused() -> None:
    with pytest.raises(UserError, match="perceptual_weight: got 0.1"):
        reconstruction_loss(torch.ones(SHAPE), torch.ones(SHAPE), config=LossConfig(perceptual_weight=0.1))


@pytest.mark.parametrize("values", [{"l1_weight": -1.0}, {"l1_weight": 0.0}])
def test_bad_weights_are_refused(values: dict) -> None:
    with pytest.raises(UserError, match="loss weights"):
        LossConfig(**values)


def test_bf16_reconstructions_are_compared_in_float32() -> None:
    video = torch.full(SHAPE, 1 / 3)
    loss = reconstruction_loss(video.bfloat16(), video, config=LossConfig())
    assert loss.parts["l1"].dtype == torch.float32
    assert loss.parts["l1"].item() == pytest.approx(abs(video.bfloat16().float() - video).mean().item())


def test_psnr() -> None:
    assert psnr_db(torch.tensor(4.0)).item() == 0.0
    assert psnr_db(torch.tensor(0.04)).item() == pytest.approx(20.0)
    assert math.isfinite(psnr_db(torch.tensor(0.0)).item())


class SquaredDistance(torch.nn.Module):
    """Remembers the pictures that it was shown."""

    def forward(self, x_NCHW: torch.Tensor, y_NCHW: torch.Tensor) -> torch.Tensor:
        self.seen = y_NCHW
        return (x_NCHW - y_NCHW).square().mean(dim=(1, 2, 3))


def numbered_frames(batch: int, frames: int) -> torch.Tensor:
    """Videos whose every pixel is its frame's number."""
    return torch.arange(frames).float().view(1, 1, -1, 1, 1).expand(batch, 3, frames, 4, 4)


def frames_looked_at(seed: int, *, batch: int = 1, drawn_before: int = 0, num_frames: int = 2) -> list[float]:
    distance, video = SquaredDistance(), numbered_frames(batch, 9)
    torch.manual_seed(seed)
    torch.rand(drawn_before)
    SparsePerceptual(distance, num_frames=num_frames)(video, video)
    assert distance.seen.shape == (batch * num_frames, 3, 4, 4)
    return distance.seen[:num_frames, 0, 0, 0].tolist()


def test_frames_are_those_of_the_seed_whatever_the_rank_and_micro_batch() -> None:
    frames = frames_looked_at(5)
    assert len(set(frames)) == 2
    assert frames_looked_at(5, batch=3, drawn_before=7) == frames
    assert len({tuple(frames_looked_at(seed)) for seed in range(20)}) > 10


def test_videos_shorter_than_the_number_of_frames_are_looked_at_whole() -> None:
    distance, video = SquaredDistance(), numbered_frames(1, 2)
    SparsePerceptual(distance, num_frames=5)(video, video)
    assert sorted(distance.seen[:, 0, 0, 0].tolist()) == [0, 1]


def test_gradient_reaches_the_frames_looked_at_and_no_other() -> None:
    distance, video = SquaredDistance(), numbered_frames(2, 9)
    reconstruction = (video + 0.5).requires_grad_()
    value = SparsePerceptual(distance, num_frames=3)(reconstruction, video)
    assert value.item() == pytest.approx(0.25)
    value.backward()
    moved = reconstruction.grad.abs().amax(dim=(0, 1, 3, 4)).nonzero().flatten().tolist()
    assert moved == sorted(distance.seen[:3, 0, 0, 0].int().tolist())


def test_a_weight_changes_in_the_step_of_its_boundary() -> None:
    schedule = WeightSchedule(values=(0.1, 0.073, 0.5), boundaries=(500_000, 600_000))
    steps = (0, 499_999, 500_000, 599_999, 600_000, 10**7)
    assert [weight_at(schedule, step) for step in steps] == [0.1, 0.1, 0.073, 0.073, 0.5, 0.5]
    assert weight_at(0.3, 10**7) == 0.3


@pytest.mark.parametrize(
    "values",
    [
        {"values": (1.0,), "boundaries": (5,)},
        {"values": (1.0, 2.0, 3.0), "boundaries": (5, 5)},
        {"values": (1.0, -2.0), "boundaries": (5,)},
    ],
)
def test_schedules_that_do_not_fit_are_refused(values: dict) -> None:
    with pytest.raises(UserError, match="weight schedule"):
        WeightSchedule(**values)


def test_terms_are_weighted_as_in_this_step() -> None:
    later = WeightSchedule(values=(0.0, 2.0), boundaries=(10,))
    config = LossConfig(l1_weight=1.0, flow_weight=later, flow_scale=1)
    video, reconstruction = torch.zeros(1, 3, 2, 4, 4), torch.ones(1, 3, 2, 4, 4)
    flow = lambda first, second: first[:, :2]  # noqa: E731 - the brightness itself
    before = reconstruction_loss(reconstruction, video, config=config, step=9, flow=flow)
    after = reconstruction_loss(reconstruction, video, config=config, step=10, flow=flow)
    assert (before.total.item(), after.total.item()) == (1.0, 3.0)
    assert sorted(after.parts) == ["flow", "l1", "mse"]
    picture = reconstruction_loss(reconstruction[:, :, :1], video[:, :, :1], config=config, step=10, flow=flow)
    assert picture.total.item() == 1.0


@pytest.mark.parametrize("term", ["gram", "flow"])
def test_a_term_without_what_measures_it_is_refused(term: str) -> None:
    config = LossConfig(**{f"{term}_weight": 0.1})
    with pytest.raises(UserError, match=f"{term}_weight: got 0.1"):
        reconstruction_loss(torch.ones(SHAPE), torch.ones(SHAPE), config=config, perceptual=lambda x, y: x.mean())


def test_windows_of_a_video_join_to_the_video() -> None:
    video = torch.rand(2, 3, 12, 4, 4)
    windows = cut_windows(video, num_frames=9, stride=1)
    assert windows.shape == (2, 4, 3, 9, 4, 4)
    assert torch.equal(windows[:, 2], video[:, :, 2:11])
    # The mean of up to 4 equal float32 values.
    torch.testing.assert_close(join_windows(windows, stride=1), video, rtol=1e-6, atol=0)
    assert join_windows(cut_windows(video, num_frames=9, stride=2), stride=2).shape[2] == 11


def test_windows_disagree_by_their_difference_where_they_overlap() -> None:
    video = torch.rand(1, 3, 12, 4, 4)
    windows = cut_windows(video, num_frames=9, stride=1).clone()
    assert window_disagreement(windows, stride=1) == 0
    windows[:, 1] += 0.3
    # Two of three neighbouring pairs differ.
    assert window_disagreement(windows, stride=1).item() == pytest.approx(0.2, rel=1e-5)
    config = LossConfig(consistency_weight=2.0)
    joined = join_windows(windows, stride=1)
    loss = reconstruction_loss(joined, video, config=config, windows_BNCTHW=windows)
    assert loss.total.item() == pytest.approx(loss.parts["l1"].item() + 0.4, rel=1e-5)
    assert config.codes_windows(video, step=0)
    assert not config.codes_windows(video[:, :, :9], step=0)
    assert not LossConfig().codes_windows(video, step=0)


def test_a_weight_of_a_later_step_is_refused_now_where_nothing_measures_it() -> None:
    later = WeightSchedule(values=(0.0, 0.062), boundaries=(500_000,))
    with pytest.raises(UserError, match="gram_weight.*0 without a VggPerceptual"):
        check_measures(LossConfig(gram_weight=later), None, None)
    with pytest.raises(UserError, match="flow_weight.*0 without a flow estimator"):
        check_measures(LossConfig(flow_weight=later), None, None)
    check_measures(LossConfig(), None, None)
