"""Perceptual dedup: of clips that look the same, such as one encoded anew, one is kept."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from nemo_curator.stages.base import ProcessingStage
from nemo_curator.stages.resources import Resources

from curator_stages.config import CurationConfig
from curator_stages.dedup.clips import Duplicate, LookAlikeRules, mark_duplicates, ranks_of
from curator_stages.dedup.perceptual import BITS, close_pairs, perceptual_hashes
from curator_stages.faults import failing_alone
from curator_stages.tasks import ClipSetTask, ClipsTask
from nemo_cosmos.contracts import ClipRecord

_NONE = np.iinfo(np.int64).max


@dataclass
class PerceptualHashStage(ProcessingStage[ClipsTask, ClipsTask]):
    """Gives each clip its perceptual hashes."""

    name: str = "perceptual_hash"
    resources: Resources = field(default_factory=Resources)
    batch_size: int = 1

    def inputs(self) -> tuple[list[str], list[str]]:
        """Clips with frames."""
        return ["data", "span"], []

    def outputs(self) -> tuple[list[str], list[str]]:
        """The same clips, hashed."""
        return ["data", "span"], []

    def process(self, task: ClipsTask) -> ClipsTask:
        """Hashes the kept clips of one span."""
        for clip in task.kept():
            with failing_alone(clip, self.name):
                clip.perceptual_hashes = perceptual_hashes(clip.pixels)
        return task


@dataclass
class PerceptualDedupStage(ProcessingStage[ClipSetTask, ClipSetTask]):
    """Rejects clips whose hash is close to a better one's, or one of whose middle is to the whole of the other.

    Clips of one video are not compared, since a still camera sees almost the same all the time; nor are simulated
    ones, whose scenes look alike, unless they show the same part of one rollout.
    """

    config: CurationConfig
    name: str = "perceptual_dedup"
    resources: Resources = field(default_factory=Resources)
    batch_size: int = 1
    is_resumable: bool = False

    def inputs(self) -> tuple[list[str], list[str]]:
        """All clips of a run."""
        return ["data"], []

    def outputs(self) -> tuple[list[str], list[str]]:
        """All clips, duplicates marked."""
        return ["data"], []

    def process(self, task: ClipSetTask) -> ClipSetTask:
        """Compares the kept clips of the whole set."""
        hashed = [c.record.rejected_by is None and c.file(".hash.npy").is_file() for c in task.data]
        places = np.flatnonzero(hashed).tolist()
        if len(places) < 2:
            return task
        records = [task.data[i].record for i in places]
        hashes = np.stack([np.load(task.data[i].file(".hash.npy")) for i in places])
        found = find_look_alikes(records, hashes, self.config.dedup_hash_distance)
        task.data = mark_duplicates(task.data, places, found, self.name)
        return task


def find_look_alikes(records: list[ClipRecord], hashes: np.ndarray, most_apart: int) -> dict[int, Duplicate]:
    """Finds clips that look like a better one.

    Args:
        records: Clips, N.
        hashes: uint8 [N, K, 32], as of `perceptual_hashes`.
        most_apart: Largest distance in bits.

    Returns:
        Duplicates by position.
    """
    ranks = ranks_of(records)
    by_rank = np.argsort(ranks)
    rules = LookAlikeRules(records)
    # The nearest one's distance and, among equally near ones, the best rank, as one number that is the smaller for it.
    nearest = np.full(len(records), _NONE)
    for ones, others, distances in close_pairs(hashes, most_apart):
        better = np.where(ranks[ones] < ranks[others], ones, others)
        keys = distances * len(records) + ranks[better]
        comparable = rules.comparable(ones, others)
        np.minimum.at(nearest, (ones + others - better)[comparable], keys[comparable])
    found = {}
    for worse in np.flatnonzero(nearest != _NONE).tolist():
        distance, rank = divmod(int(nearest[worse]), len(records))
        told = f"looks like {{}} ({distance} of {BITS} bits differ)"
        found[worse] = Duplicate(int(by_rank[rank]), told, {"dedup_hash_distance": distance})
    return found
