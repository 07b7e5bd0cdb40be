"""Choosing the held-out windows that measurements are made on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nemo_cosmos.contracts import ClipRecord
from nemo_cosmos.data.curated import SINGLE_VIEW, CuratedClips, caption_at, windows_of
from nemo_cosmos.errors import UserError


@dataclass(frozen=True, kw_only=True)
class HeldOutWindow:
    """One held-out video, at the model's size."""

    frames: np.ndarray
    """uint8 [T, H, W, 3]."""
    caption: str
    source: str
    fps: float
    actions: np.ndarray | None
    """float32 [T-1, ACTION_DIM]."""


def held_out_windows(
    curated: str | Path,
    *,
    num_windows: int,
    num_frames: int,
    height: int,
    width: int,
    with_actions: bool,
    sources: tuple[str, ...] | None = None,
) -> list[HeldOutWindow]:
    """Takes windows that do not overlap from held-out clips, spread evenly over all of them.

    Args:
        curated: Folder that `nemo-cosmos curate` wrote.
        num_windows: At most this many.
        num_frames: Frames per window.
        height: Pixels.
        width: Pixels.
        with_actions: Only from clips with actions.
        sources: Only from these domains; None for all.

    Returns:
        The windows, in an order that depends on the clips alone.

    Raises:
        UserError: No held-out clip is long enough.
    """
    clips = CuratedClips(curated, split="heldout", sources=sources, views=SINGLE_VIEW)
    places = [
        (index, start)
        for index, record in enumerate(clips.records)
        if record.conditions.actions is not None or not with_actions
        for start in windows_of(record, num_frames=num_frames, stride=num_frames)
    ]
    if not places:
        wanted = "with actions " if with_actions else ""
        raise UserError(
            f"{curated}: no held-out clip {wanted}has {num_frames} frames. Collect held-out rollouts and curate them."
        )
    chosen = np.unique(np.linspace(0, len(places) - 1, min(num_windows, len(places))).round().astype(int))
    return [_window(clips, *places[i], num_frames=num_frames, height=height, width=width) for i in chosen]


def _window(clips: CuratedClips, index: int, start: int, *, num_frames: int, height: int, width: int) -> HeldOutWindow:
    record: ClipRecord = clips.records[index]
    actions = record.conditions.actions
    return HeldOutWindow(
        frames=np.array(clips.frames(index, height=height, width=width, cache=True)[start : start + num_frames]),
        caption=caption_at(record, start, num_frames),
        source=record.source,
        fps=record.fps,
        actions=None if actions is None else np.array(actions[start : start + num_frames - 1], dtype=np.float32),
    )
