"""Pixel windows of curated clips, for training a tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from nemo_cosmos.contracts import Split
from nemo_cosmos.data.curated import CuratedClips, windows_of
from nemo_cosmos.errors import UserError, user_error
from nemo_cosmos.video_io import resize_frames, to_model


class ClipDataset(torch.utils.data.Dataset):
    """All windows of the clips of one split.

    Args:
        root: Folder that `nemo-cosmos curate` wrote.
        split: Which split.
        num_frames: Frames per window.
        height: Pixels.
        width: Pixels.
        stride: Frames between the starts of two windows of a clip.
        views: Only these cameras, where a clip has a camera's name; None for all.
        crop_from: Bring a clip to this height first, keeping its aspect, and cut the window out of it; None resizes
            the whole frame to height x width.

    Raises:
        UserError: No clip is long enough, or `crop_from` is lower than the window.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        split: Split,
        num_frames: int = 17,
        height: int = 128,
        width: int = 128,
        stride: int = 8,
        views: tuple[str, ...] | None = None,
        crop_from: int | None = None,
    ) -> None:
        if crop_from is not None and crop_from < height:
            raise user_error("crop_from", crop_from, f"at least the window's height {height}", "Raise it.")
        self._clips = CuratedClips(root, split=split, views=views)
        self._height, self._width, self._crop_from = height, width, crop_from
        self._num_frames = num_frames
        self.windows = [
            (index, start)
            for index, record in enumerate(self._clips.records)
            for start in windows_of(record, num_frames=num_frames, stride=stride)
        ]
        if not self.windows:
            raise UserError(
                f"{root}: no {split} clip has {num_frames} frames. Curate longer clips, or lower num_frames."
            )

    def __len__(self) -> int:
        """Number of windows."""
        return len(self.windows)

    def source(self, index: int) -> str:
        """Domain of a window's clip."""
        return self._clips.records[self.windows[index][0]].source

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """One window: `video`, float32 [3, T, H, W] in [-1, 1]; where it is cut out, the middle of the frame."""
        return self._window(index, lambda room: room // 2)

    def drawn(self, index: int, generator: np.random.Generator) -> dict[str, torch.Tensor]:
        """The same; where it is cut out, a part of the frame that is drawn."""
        return self._window(index, lambda room: int(generator.integers(room + 1)))

    def _window(self, index: int, place: Callable[[int], int]) -> dict[str, torch.Tensor]:
        clip, start = self.windows[index]
        if self._crop_from is None:
            frames = self._clips.frames(clip, height=self._height, width=self._width, cache=True)
            return {"video": to_model(frames[start : start + self._num_frames])}
        frames = self._clips.span(clip, start, self._num_frames)
        _, height, width, _ = frames.shape
        frames = resize_frames(frames, self._crop_from, max(self._width, round(width * self._crop_from / height)))
        top, left = place(frames.shape[1] - self._height), place(frames.shape[2] - self._width)
        return {"video": to_model(frames[:, top : top + self._height, left : left + self._width])}
