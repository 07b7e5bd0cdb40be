"""Exact dedup: of clips with the same pictures, one is kept."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field

from nemo_curator.stages.base import ProcessingStage
from nemo_curator.stages.resources import Resources

from curator_stages.dedup.clips import Duplicate, mark_duplicates, ranks_of
from curator_stages.tasks import ClipSetTask, StoredClip
from nemo_cosmos.files import sha256_of


@dataclass
class ExactDedupStage(ProcessingStage[ClipSetTask, ClipSetTask]):
    """Compares stored clips by their bytes: the same pictures are encoded to the same bytes.

    Clips with different actions or poses are different ones, whatever they show.
    """

    name: str = "exact_dedup"
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
        places = [i for i, clip in enumerate(task.data) if clip.record.rejected_by is None]
        ranks = ranks_of([task.data[i].record for i in places])
        first: dict[tuple[str, str], int] = {}
        found: dict[int, Duplicate] = {}
        for position in sorted(range(len(places)), key=lambda i: ranks[i]):
            best = first.setdefault(_content(task.data[places[position]]), position)
            if best != position:
                found[position] = Duplicate(best, "the same pictures as {}", {})
        task.data = mark_duplicates(task.data, places, found, self.name)
        return task


def _content(clip: StoredClip) -> tuple[str, str]:
    conditions = json.dumps(clip.record.to_dict()["conditions"], sort_keys=True)
    return sha256_of(clip.file(".mp4")), hashlib.sha256(conditions.encode()).hexdigest()
