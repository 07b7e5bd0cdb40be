"""What the causal layers see of the past, beyond the frames that they are given.

A layer that looks back takes a `Past` with its input and asks it for the frames before. A whole video has none, and
its first frame stands in for them (`WHOLE_VIDEO`); a video that comes chunk by chunk keeps them (`CausalCache`); where
ranks share a video, the ranks before have them (`split.PreviousRanks`). Layers know of none of this.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from nemo_cosmos.errors import user_error


class Past(Protocol):
    """The past of what the layers of one encoder or decoder are given."""

    @property
    def at_start(self) -> bool:
        """Whether the given frames begin with the video's first one, which has rules of its own."""

    @property
    def max_attended_frames(self) -> int | None:
        """Latent frames that temporal attention sees, the present one included; None for all."""

    def before(self, layer: nn.Module, x_BCTHW: Tensor, num_frames: int) -> Tensor:
        """Puts the `num_frames` frames before in front of a layer's input; the first frame repeated at the start."""

    def frames(self, layer: nn.Module, x_BCTHW: Tensor, num_frames: int) -> list[Tensor]:
        """As `before`, but as frames [B, C, H, W] that share memory with the input where they can."""

    def keys_before(self, layer: nn.Module, k_BCTHW: Tensor, v_BCTHW: Tensor) -> tuple[Tensor, Tensor]:
        """Puts the keys and values of the frames before in front of a layer's own, as many as are seen."""

    def end_chunk(self) -> None:
        """Says that every layer has seen the frames; what follows continues them."""


class WholeVideo:
    """Past of a video that comes in one piece: there is none."""

    at_start = True
    max_attended_frames = None

    def before(self, layer: nn.Module, x_BCTHW: Tensor, num_frames: int) -> Tensor:
        """See `Past`."""
        return repeat_first_frame(x_BCTHW, num_frames)

    def frames(self, layer: nn.Module, x_BCTHW: Tensor, num_frames: int) -> list[Tensor]:
        """See `Past`."""
        return [x_BCTHW[:, :, 0]] * num_frames + list(x_BCTHW.unbind(2))

    def keys_before(self, layer: nn.Module, k_BCTHW: Tensor, v_BCTHW: Tensor) -> tuple[Tensor, Tensor]:
        """See `Past`."""
        return k_BCTHW, v_BCTHW

    def end_chunk(self) -> None:
        """See `Past`."""


WHOLE_VIDEO = WholeVideo()


class CausalCache:
    """Past of one video that comes chunk by chunk: per layer the last inputs that later frames still depend on.

    A convolution over time keeps the one or two frames that its kernel reaches back. Temporal attention sees all
    frames before, hence keeps the key and the value of each: 2 x channels numbers per pixel and latent frame, the one
    part that grows with the video.

    Args:
        max_attended_frames: Latent frames that temporal attention sees, the present one included. None for all, which
            is what the models are trained with; a number bounds the memory and is no longer exact.

    Raises:
        UserError: The number is below one.
    """

    def __init__(self, *, max_attended_frames: int | None = None) -> None:
        if max_attended_frames is not None and max_attended_frames < 1:
            raise user_error("max_attended_frames", max_attended_frames, "at least 1, or None for all", "Raise it.")
        self.max_attended_frames = max_attended_frames
        self.at_start = True
        self._past: dict[nn.Module, tuple[Tensor, ...]] = {}

    def before(self, layer: nn.Module, x_BCTHW: Tensor, num_frames: int) -> Tensor:
        """See `Past`."""
        return torch.stack(self.frames(layer, x_BCTHW, num_frames), dim=2)

    def frames(self, layer: nn.Module, x_BCTHW: Tensor, num_frames: int) -> list[Tensor]:
        """See `Past`."""
        before = [x_BCTHW[:, :, 0]] * num_frames if self.at_start else self._past[layer]
        frames = [*before, *x_BCTHW.unbind(2)]
        # Copied, because a slice would keep the whole chunk in memory.
        self._past[layer] = tuple(frame.clone() for frame in frames[len(frames) - num_frames :])
        return frames

    def keys_before(self, layer: nn.Module, k_BCTHW: Tensor, v_BCTHW: Tensor) -> tuple[Tensor, Tensor]:
        """See `Past`."""
        if not self.at_start:
            past_k_BCTHW, past_v_BCTHW = self._past[layer]
            k_BCTHW, v_BCTHW = (torch.cat(x, dim=2) for x in ((past_k_BCTHW, k_BCTHW), (past_v_BCTHW, v_BCTHW)))
        if self.max_attended_frames is None:
            self._past[layer] = (k_BCTHW, v_BCTHW)
        else:
            oldest = max(0, k_BCTHW.shape[2] - self.max_attended_frames + 1)
            self._past[layer] = (k_BCTHW[:, :, oldest:].clone(), v_BCTHW[:, :, oldest:].clone())
        return k_BCTHW, v_BCTHW

    def end_chunk(self) -> None:
        """See `Past`."""
        self.at_start = False


def repeat_first_frame(x_BCTHW: Tensor, num_frames: int) -> Tensor:
    """Puts the first frame in front of a video `num_frames` more times."""
    return torch.cat([x_BCTHW[:, :, :1]] * num_frames + [x_BCTHW], dim=2)
