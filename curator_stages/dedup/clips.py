"""What deduplication knows of clips: which one is kept, which may be compared, and how a duplicate is marked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from curator_stages.dedup.neighbours import PairRules
from curator_stages.tasks import StoredClip
from nemo_cosmos.contracts import ClipRecord

DUPLICATE_TAG = "duplicate_of:"
"""Prefix of the tag that names the kept clip."""


@dataclass(frozen=True)
class Duplicate:
    """Why a clip is not needed."""

    of: int
    """Position of the better clip that it is nearest to."""
    likeness: str
    """In words."""
    scores: Mapping[str, float]
    """What was measured, for the manifest."""


def ranks_of(records: Sequence[ClipRecord]) -> np.ndarray:
    """Ranks clips: 0 has the source with the most pixels, among equal ones is the longest, then first by its id.

    Returns:
        int64 [N], a permutation.
    """
    order = sorted(range(len(records)), key=lambda i: _quality(records[i]))
    ranks = np.empty(len(records), np.int64)
    ranks[order] = np.arange(len(records))
    return ranks


def _quality(record: ClipRecord) -> tuple[float, float, str]:
    pixels = record.scores["source_height"] * record.scores["source_width"]
    return -pixels, -record.num_frames / record.fps, record.clip_id


class ClipRules(PairRules):
    """Windows and views of one simulator rollout look alike and teach different motion: only copies are compared.

    Clips of different rollouts must be nearer to each other than real ones to count as duplicates.
    """

    def __init__(self, records: Sequence[ClipRecord], penalty: float) -> None:
        """Takes the clips in the order of their numbers, and the distance added between simulated ones."""
        self._penalty = penalty
        self._simulated = np.array([is_simulated(record) for record in records])
        self._rollouts = _numbered([(record.source, record.rollout) for record in records])
        self._parts = _numbered([_shown(record) for record in records])

    def penalties(self, rows: np.ndarray, others: np.ndarray) -> np.ndarray | None:
        """Returns distances to add, infinite between different parts of one rollout."""
        both = self._simulated[rows][:, None] & self._simulated[others]
        if not both.any():
            return None
        siblings = both & (self._rollouts[rows][:, None] == self._rollouts[others])
        differ = self._parts[rows][:, None] != self._parts[others]
        return np.where(siblings & differ, np.inf, np.where(both, self._penalty, 0)).astype(np.float32)

    def penalty(self, row: int, other: int) -> float:
        """Returns what was added to the distance of one pair that may be compared."""
        return self._penalty if self._simulated[row] and self._simulated[other] else 0.0


class LookAlikeRules:
    """Clips of two videos may look alike; of simulated ones only those that show the same part of one rollout."""

    def __init__(self, records: Sequence[ClipRecord]) -> None:
        """Takes the clips in the order of their numbers."""
        self._simulated = np.array([is_simulated(record) for record in records])
        self._videos = _numbered([(record.source_video,) for record in records])
        self._shown = _numbered([(record.source, record.rollout, *_shown(record)) for record in records])

    def comparable(self, ones: np.ndarray, others: np.ndarray) -> np.ndarray:
        """Says of pairs, int64 [P] each, which may be held against each other: bool [P]."""
        both = self._simulated[ones] & self._simulated[others]
        copies = self._shown[ones] == self._shown[others]
        return np.where(both, copies, self._videos[ones] != self._videos[others])


def is_simulated(record: ClipRecord) -> bool:
    """Says whether a clip comes with what a simulator did."""
    return record.conditions.actions is not None


def _shown(record: ClipRecord) -> tuple[str | None, int, int]:
    return record.conditions.view, record.start_frame, record.num_frames


def _numbered(values: Sequence[tuple]) -> np.ndarray:
    numbers: dict[tuple, int] = {}
    return np.array([numbers.setdefault(value, len(numbers)) for value in values])


def mark_duplicates(
    clips: list[StoredClip], places: Sequence[int], found: Mapping[int, Duplicate], stage: str
) -> list[StoredClip]:
    """Rejects duplicates.

    Args:
        clips: All clips.
        places: Which of them were compared.
        found: Duplicates by position in `places`, as is `Duplicate.of`.
        stage: Who found them.

    Returns:
        All clips; a duplicate's tag names the clip that is kept for it, its reason the one that it is nearest to.
    """
    marked, roots = list(clips), _kept_ones(found)
    for position, duplicate in found.items():
        record = clips[places[position]].record
        nearest, kept = (clips[places[i]].record.clip_id for i in (duplicate.of, roots[position]))
        record = replace(
            record,
            rejected_by=stage,
            rejected_reason=f"{duplicate.likeness.format(nearest)}",
            tags=(*record.tags, f"{DUPLICATE_TAG}{kept}"),
            scores=record.scores | dict(duplicate.scores),
        )
        marked[places[position]] = replace(clips[places[position]], record=record)
    return marked


def _kept_ones(found: Mapping[int, Duplicate]) -> dict[int, int]:
    """Returns where the chain of better ones of each duplicate ends; every link is followed once."""
    ends: dict[int, int] = {}
    for position in found:
        chain, link = [], position
        while link in found and link not in ends:
            chain.append(link)
            link = found[link].of
        ends |= dict.fromkeys(chain, ends.get(link, link))
    return ends
