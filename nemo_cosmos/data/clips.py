"""Pixel windows of curated clips, for training a tokenizer."""

from __future__ import annotations

from pathlib import Path

import torch

from nemo_cosmos.contracts import Split
from nemo_cosmos.data.curated import CuratedClips, windows_of
from nemo_cosmos.errors import UserError
from nemo_cosmos.video_io import to_model


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

    Raises:
        UserError: No clip is long enough.
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
    ) -> None:
        self._clips = CuratedClips(root, split=split, views=views)
        self._size = {"height": height, "width": width}
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
        """One window: `video`, float32 [3, T, H, W] in [-1, 1]."""
        clip, start = self.windows[index]
        frames = self._clips.frames(clip, **self._size, cache=True)
        return {"video": to_model(frames[start : start + self._num_frames])}
