"""Cutting a long video into overlapping windows of as many latent frames as a network was trained on."""

from __future__ import annotations

from collections.abc import Callable

import torch

from nemo_cosmos.errors import user_error


def window_starts(num_frames: int, *, window: int, overlap: int) -> list[int]:
    """First frames of windows that cover a video; the last one ends with it, and so may overlap more.

    Args:
        num_frames: Of the video, at least `window`.
        window: Frames of a window.
        overlap: Frames that two windows share at least.

    Raises:
        UserError: Windows would not move on.
    """
    if not 1 <= overlap < window:
        raise user_error("overlap, window", (overlap, window), "1 <= overlap < window", "Correct the two.")
    starts = list(range(0, max(num_frames - window, 0), window - overlap))
    return [*starts, max(num_frames - window, 0)]


def blend_windows(
    estimate: Callable[[slice], torch.Tensor], num_frames: int, *, window: int, overlap: int
) -> torch.Tensor:
    """Joins what is estimated of each window; over what two of them share, one fades into the next.

    A window's first frame has no weight where it overlaps: the network takes it for the first of a video, which is a
    picture by itself.

    Args:
        estimate: Gives B C T H W of some frames.
        num_frames: Of the video, at least `window`.
        window: As for `window_starts`.
        overlap: As for `window_starts`.

    Returns:
        B C T H W of the whole video.
    """
    first, *others = window_starts(num_frames, window=window, overlap=overlap)
    whole = estimate(slice(first, first + window))
    for start in others:
        shared = whole.shape[2] - start
        new = estimate(slice(start, start + window))
        share = torch.linspace(0, 1, shared, device=new.device, dtype=new.dtype).view(-1, 1, 1)
        faded = torch.lerp(whole[:, :, start:], new[:, :, :shared], share)
        whole = torch.cat([whole[:, :, :start], faded, new[:, :, shared:]], dim=2)
    return whole


def reflected(num_frames: int, wanted: int) -> list[int]:
    """Places of a video's frames, run to and fro until there are as many as wanted; all of them where there are more.

    The published inference fills a short window so.
    """
    if num_frames >= wanted:
        return list(range(num_frames))
    period = max(2 * num_frames - 2, 1)
    return [min(place % period, period - place % period) for place in range(wanted)]
