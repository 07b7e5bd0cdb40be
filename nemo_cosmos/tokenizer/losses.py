"""What a reconstruction is measured by in training.

Shape letters: B batch, C colours, T frames, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor

from nemo_cosmos.errors import user_error
from nemo_cosmos.tokenizer.config import TokenizerConfig
from nemo_cosmos.tokenizer.perceptual import PerceptualDistance, VggPerceptual, drawn_frames

FlowEstimator = Callable[[Tensor, Tensor], Tensor]
"""(frames, next frames), both [N, C, H, W] in [-1, 1] -> motion in pixels [N, 2, H, W], x before y; differentiable."""

_PIXEL_RANGE = 2.0
_SSIM_FRAMES = 2


@dataclass(frozen=True, kw_only=True)
class WeightSchedule:
    """A weight that changes in steps over the training."""

    values: tuple[float, ...]
    """One more than boundaries."""
    boundaries: tuple[int, ...] = ()
    """Optimizer steps, rising; at boundary i the weight goes from value i to value i + 1."""

    def __post_init__(self) -> None:
        """Checks both fields.

        Raises:
            UserError: They do not fit each other, or a weight is negative.
        """
        if len(self.values) != len(self.boundaries) + 1 or list(self.boundaries) != sorted(set(self.boundaries)):
            expected = "rising boundaries and one value more than these"
            raise user_error("weight schedule", self, expected, "Correct the loss config.")
        if min(self.values) < 0:
            raise user_error("weight schedule", self.values, "no negative weight", "Correct the loss config.")

    def at(self, step: int) -> float:
        """The weight in optimizer step `step`, which counts from 0."""
        return self.values[sum(step >= boundary for boundary in self.boundaries)]


Weight = float | WeightSchedule
"""A number holds for the whole training."""


def weight_at(weight: Weight, step: int) -> float:
    """The weight in optimizer step `step`, which counts from 0."""
    return weight.at(step) if isinstance(weight, WeightSchedule) else weight


def _values(weight: Weight) -> tuple[float, ...]:
    return weight.values if isinstance(weight, WeightSchedule) else (weight,)


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights of the terms. The published values are those of cosmos-predict1, `tokenizer/training`."""

    l1_weight: Weight = 1.0
    """Of the mean absolute error of the pixels."""
    perceptual_weight: Weight = 0.0
    """Of the perceptual distance that the model was given; published: 0.1, from step 500,000 on 0.073."""
    gram_weight: Weight = 0.0
    """Of the difference of the perceptual features' Gram matrices; published: 0.062 from step 500,000 on."""
    flow_weight: Weight = 0.0
    """Of the difference of optical flow, in pixels; published: 0.01 from step 250,000 on."""
    ssim_weight: Weight = 0.0
    """Of 1 - SSIM; not in the published losses. It holds the structure of pictures that hardly move, which L1 blurs."""
    consistency_weight: Weight = 0.0
    """Of the disagreement of overlapping windows; published: 0.01 from step 250,000 on, but off. While it is positive
    videos are coded in windows that know nothing of each other, and their mean is the reconstruction."""
    flow_scale: int = 2
    """Height and width are divided by this before the flow is estimated."""
    consistency_frames: int = 9
    """Frames of a window, 1 + k times the tokenizer's temporal compression."""
    consistency_stride: int = 1
    """Frames from window to window."""

    def __post_init__(self) -> None:
        """Checks the weights.

        Raises:
            UserError: A weight is negative, or all are zero.
        """
        weights = [getattr(self, field.name) for field in fields(self) if field.name.endswith("_weight")]
        values = [value for weight in weights for value in _values(weight)]
        if min(values) < 0 or max(values) == 0:
            raise user_error("loss weights", self, "none negative and one positive", "Correct the loss config.")
        if self.flow_scale < 1:
            raise user_error("flow_scale", self.flow_scale, "at least 1", "Raise it.")
        if not 1 <= self.consistency_stride < self.consistency_frames:
            raise user_error(
                "consistency_stride", self.consistency_stride, f"1 to {self.consistency_frames - 1}", "Lower it."
            )

    def codes_windows(self, video_BCTHW: Tensor, step: int) -> bool:
        """Whether a batch is coded in windows, for the consistency term: a video of more than one window."""
        return weight_at(self.consistency_weight, step) > 0 and video_BCTHW.shape[2] > self.consistency_frames

    def will_code_windows(self, num_frames: int) -> bool:
        """Whether videos of so many frames are ever coded in windows."""
        return max(_values(self.consistency_weight)) > 0 and num_frames > self.consistency_frames


@dataclass(frozen=True, kw_only=True)
class ReconstructionLoss:
    """The loss and its parts, each a scalar over the batch."""

    total: Tensor
    """What is minimised."""
    parts: dict[str, Tensor]
    """Detached and not weighted: `l1` and `mse` (of the reconstruction clamped to [-1, 1]) always, and of
    `perceptual`, `gram`, `flow`, `ssim` and `consistency` those that have weight in this step."""


def check_measures(config: LossConfig, perceptual: PerceptualDistance | None, flow: FlowEstimator | None) -> None:
    """Refuses weights, also those of a later step, of terms that nothing measures.

    Args:
        config: The terms' weights.
        perceptual: Needed where its weight is ever positive; a `VggPerceptual` where that of the Gram matrices is.
        flow: Needed where its weight is ever positive.

    Raises:
        UserError: A term has weight, but what measures it was not given.
    """
    needed = (
        ("gram_weight", isinstance(perceptual, VggPerceptual), "a VggPerceptual", "perceptual"),
        ("perceptual_weight", perceptual is not None, "a distance", "perceptual"),
        ("flow_weight", flow is not None, "a flow estimator", "flow"),
    )
    for name, given, measure, argument in needed:
        weight = getattr(config, name)
        if max(_values(weight)) > 0 and not given:
            raise user_error(name, weight, f"0 without {measure}", f"Give it as `{argument}`.")


def check_terms(config: LossConfig, architecture: TokenizerConfig) -> None:
    """Refuses weights, also those of a later step, of terms that a tokenizer cannot have.

    Args:
        config: The terms' weights.
        architecture: The tokenizer's.

    Raises:
        UserError: A term over time has weight for images, or windows do not fit the temporal compression.
    """
    if architecture.modality == "image":
        for name in ("flow_weight", "consistency_weight"):
            if max(_values(getattr(config, name))) > 0:
                raise user_error(name, getattr(config, name), "0 for images, which have one frame", "Leave it out.")
    step, frames = architecture.temporal_compression, config.consistency_frames
    if max(_values(config.consistency_weight)) > 0 and (frames - 1) % step:
        nearest = 1 + max(1, round((frames - 1) / step)) * step
        raise user_error("consistency_frames", frames, f"1 + a multiple of {step}", f"The nearest is {nearest}.")


def reconstruction_loss(
    reconstruction_BCTHW: Tensor,
    video_BCTHW: Tensor,
    *,
    config: LossConfig,
    step: int = 0,
    perceptual: PerceptualDistance | None = None,
    flow: FlowEstimator | None = None,
    windows_BNCTHW: Tensor | None = None,
) -> ReconstructionLoss:
    """Loss of the tokenizer's first two stages.

    Args:
        reconstruction_BCTHW: What the tokenizer made, float [B, C, T, H, W].
        video_BCTHW: What it should be, the same shape, in [-1, 1].
        config: The terms' weights.
        step: Optimizer steps made, by which the weights change.
        perceptual: Needed where its weight is positive; a `VggPerceptual` where that of the Gram matrices is.
        flow: Needed where its weight is positive; has no part in pictures (T = 1).
        windows_BNCTHW: Reconstructions of the video's windows, where they are compared with each other.

    Raises:
        UserError: See `check_measures`.

    Source: arXiv 2501.03575 section 4.2.
    """
    check_measures(config, perceptual, flow)
    # In float32 whatever the model's precision, since means of bf16 differences lose most of their digits.
    error_BCTHW = reconstruction_BCTHW.float() - video_BCTHW.float()
    terms = {"l1": error_BCTHW.abs().mean()}
    weights = {
        name: weight_at(getattr(config, f"{name}_weight"), step)
        for name in ("l1", "perceptual", "gram", "flow", "ssim")
    }
    if weights["gram"] > 0:
        assert isinstance(perceptual, VggPerceptual)
        terms["perceptual"], terms["gram"] = perceptual.with_gram(reconstruction_BCTHW, video_BCTHW)
    elif weights["perceptual"] > 0:
        assert perceptual is not None
        terms["perceptual"] = perceptual(reconstruction_BCTHW, video_BCTHW)
    if weights["flow"] > 0 and video_BCTHW.shape[2] > 1:
        assert flow is not None
        terms["flow"] = flow_difference(reconstruction_BCTHW, video_BCTHW, flow, scale=config.flow_scale)
    if weights["ssim"] > 0:
        terms["ssim"] = structural_difference(reconstruction_BCTHW, video_BCTHW)
    if windows_BNCTHW is not None:
        weights["consistency"] = weight_at(config.consistency_weight, step)
        terms["consistency"] = window_disagreement(windows_BNCTHW, stride=config.consistency_stride)
    total = torch.stack([weights[name] * term for name, term in terms.items()]).sum()
    with torch.no_grad():
        terms["mse"] = (reconstruction_BCTHW.float().clamp(-1, 1) - video_BCTHW.float()).square().mean()
    return ReconstructionLoss(total=total, parts={name: term.detach() for name, term in terms.items()})


def structural_difference(reconstruction_BCTHW: Tensor, video_BCTHW: Tensor) -> Tensor:
    """1 - SSIM, with Gaussian windows of sigma 1.5, of a few frames that are drawn anew in each step.

    Args:
        reconstruction_BCTHW: Float [B, C, T, H, W] in [-1, 1], H and W at least 11.
        video_BCTHW: The same shape, in [-1, 1].

    Source: Wang et al. 2004, "Image quality assessment", section III-B.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    drawn = drawn_frames(video_BCTHW.shape[2], _SSIM_FRAMES).to(video_BCTHW.device)
    # In [0, 1], for SSIM also compares the means of windows, which must not be negative.
    pictures = (
        rearrange(video[:, :, drawn].float() / _PIXEL_RANGE + 0.5, "B C T H W -> (B T) C H W")
        for video in (reconstruction_BCTHW, video_BCTHW)
    )
    return 1 - structural_similarity_index_measure(*pictures, data_range=1.0)


def flow_difference(
    reconstruction_BCTHW: Tensor, video_BCTHW: Tensor, estimate: FlowEstimator, *, scale: int
) -> Tensor:
    """Mean absolute difference of the two videos' optical flow, forwards and backwards, in pixels of the video.

    Args:
        reconstruction_BCTHW: Float [B, C, T, H, W], T at least 2.
        video_BCTHW: The same shape, in [-1, 1].
        estimate: Estimates the motion between two frames.
        scale: Height and width are divided by this first.

    Source: cosmos-predict1, `FlowLoss`, which enlarges the flow to the video's size before it is compared.
    """
    with torch.no_grad():
        wanted_NCHW = _flow_both_ways(video_BCTHW.float(), estimate, scale)
    return (_flow_both_ways(reconstruction_BCTHW.float(), estimate, scale) - wanted_NCHW).abs().mean() * scale


def _flow_both_ways(video_BCTHW: Tensor, estimate: FlowEstimator, scale: int) -> Tensor:
    frames, later = (
        F.avg_pool2d(rearrange(frames, "B C T H W -> (B T) C H W"), scale)
        for frames in (video_BCTHW[:, :, :-1], video_BCTHW[:, :, 1:])
    )
    return estimate(torch.cat([frames, later]), torch.cat([later, frames]))


def cut_windows(video_BCTHW: Tensor, *, num_frames: int, stride: int) -> Tensor:
    """All windows of a video, [B, N, C, num_frames, H, W]; frames after the last whole window are in none."""
    return rearrange(video_BCTHW.unfold(2, num_frames, stride), "B C N H W T -> B N C T H W")


def join_windows(windows_BNCTHW: Tensor, *, stride: int) -> Tensor:
    """The mean of overlapping windows, [B, C, (N-1) stride + T, H, W]."""
    num_frames = windows_BNCTHW.shape[3]
    length = (windows_BNCTHW.shape[1] - 1) * stride + num_frames
    total_BCTHW = windows_BNCTHW.new_zeros(*windows_BNCTHW[:, 0, :, :1].shape).repeat_interleave(length, dim=2)
    count_T = torch.zeros(length, device=total_BCTHW.device, dtype=total_BCTHW.dtype)
    for index, window_BCTHW in enumerate(windows_BNCTHW.unbind(1)):
        span = slice(index * stride, index * stride + num_frames)
        total_BCTHW[:, :, span] += window_BCTHW
        count_T[span] += 1
    return total_BCTHW / count_T.view(-1, 1, 1)


def window_disagreement(windows_BNCTHW: Tensor, *, stride: int) -> Tensor:
    """Mean absolute difference of neighbouring windows where they overlap.

    Args:
        windows_BNCTHW: Reconstructions of a video's windows.
        stride: Frames from window to window.

    Source: cosmos-predict1, `VideoConsistencyLoss`. Its comparison of latents is left out: it divides the stride by
    the temporal compression, and at the published stride of 1 compares nothing.
    """
    earlier, later = windows_BNCTHW[:, :-1, :, stride:].float(), windows_BNCTHW[:, 1:, :, :-stride].float()
    return reduce((earlier - later).abs(), "B N C T H W -> ", "mean")


def psnr_db(mse: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of a mean squared error between pixels in [-1, 1]."""
    return 10 * torch.log10(_PIXEL_RANGE**2 / mse.clamp_min(1e-10))
