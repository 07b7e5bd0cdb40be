"""Write: webdataset shards by resolution, aspect ratio and length, and the manifest."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path

from nemo_curator.stages.base import ProcessingStage
from nemo_curator.stages.resources import Resources

from curator_stages.config import CurationConfig
from curator_stages.manifest import MANIFEST, write_manifest
from curator_stages.tasks import ClipSetTask, StoredClip
from nemo_cosmos.contracts import ClipRecord, Split
from nemo_cosmos.energon_metadata import ENERGON_FOLDER, write_energon_metadata, write_tar_index
from nemo_cosmos.files import written_aside

_ASPECT_RATIOS = ((16, 9), (4, 3), (1, 1), (3, 4), (9, 16))
_SHARD_FOLDERS = "resolution_*"


@dataclass
class WriteStage(ProcessingStage[ClipSetTask, ClipSetTask]):
    """Writes kept clips into tars and all clips into `manifest.parquet`.

    The new set is made in full in the work folder; only then does it take the place of what stood there before.
    """

    output_dir: str
    config: CurationConfig
    name: str = "write"
    resources: Resources = field(default_factory=Resources)
    batch_size: int = 1
    is_resumable: bool = False

    def inputs(self) -> tuple[list[str], list[str]]:
        """All clips of a run."""
        return ["data"], []

    def outputs(self) -> tuple[list[str], list[str]]:
        """All clips, kept ones with their shard."""
        return ["data"], []

    def process(self, task: ClipSetTask) -> ClipSetTask:
        """Writes the whole set.

        Raises:
            UserError: The disk is full or the folder is read-only.
        """
        output = Path(self.output_dir)
        task.data = _with_shards(task.data, self.config.clips_per_shard)
        fresh = output / ".work" / "set"
        with written_aside(fresh) as aside:
            aside.mkdir()
            num_clips: dict[Split, dict[str, int]] = {"train": {}, "heldout": {}}
            for shard in sorted({c.record.shard for c in task.data if c.record.shard}):
                clips = [c for c in task.data if c.record.shard == shard]
                _write_shard(aside / shard, clips)
                num_clips[clips[0].record.split][shard] = len(clips)
            write_energon_metadata(aside, num_clips)
            write_manifest(aside / MANIFEST, [c.record for c in task.data])
        _replace_set(fresh, output)
        return task


def bucket_of(record: ClipRecord) -> str:
    """Returns a clip's folder, e.g. `resolution_256/aspect_ratio_1_1/frames_17_32`.

    Resolution is the shorter side in pixels; the aspect ratio (width, height) is the nearest usual one; lengths are
    grouped between powers of two.
    """
    shape = math.log(record.width / record.height)
    wide, high = min(_ASPECT_RATIOS, key=lambda ratio: abs(shape - math.log(ratio[0] / ratio[1])))
    upper = 1 << (record.num_frames - 1).bit_length()
    resolution = min(record.height, record.width)
    return f"resolution_{resolution}/aspect_ratio_{wide}_{high}/frames_{upper // 2 + 1}_{upper}"


def _with_shards(clips: list[StoredClip], clips_per_shard: int) -> list[StoredClip]:
    """Sorts clips by source, start and id and gives kept ones their shard, which is of one bucket and split."""
    ordered = sorted(clips, key=lambda c: (c.record.source_video, c.record.start_frame, c.record.clip_id))
    filled: dict[str, int] = {}
    result = []
    for clip in ordered:
        if clip.record.rejected_by is None:
            kind = f"{bucket_of(clip.record)}/{clip.record.split}"
            number = filled.get(kind, 0)
            filled[kind] = number + 1
            shard = f"{kind}-{number // clips_per_shard:06d}.tar"
            clip = replace(clip, record=replace(clip.record, shard=shard))
        result.append(clip)
    return result


def _write_shard(path: Path, clips: list[StoredClip]) -> None:
    """Writes `<clip_id>.mp4` and `<clip_id>.json` (`ClipRecord.to_dict`) of each clip; same clips, same bytes."""
    import webdataset

    path.parent.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(path), encoder=False, mtime=0) as tar:
        for clip in clips:
            described = json.dumps(clip.record.to_dict(), sort_keys=True).encode()
            tar.write({"__key__": clip.record.clip_id, "mp4": clip.file(".mp4").read_bytes(), "json": described})
    write_tar_index(path)


def _replace_set(fresh: Path, output: Path) -> None:
    """Puts the new set in the old one's place; the manifest goes first and comes last, and vouches for the shards."""
    (output / MANIFEST).unlink(missing_ok=True)
    for old in (*output.glob(ENERGON_FOLDER), *output.glob(_SHARD_FOLDERS)):
        shutil.rmtree(old)
    for new in (*fresh.glob(_SHARD_FOLDERS), fresh / ENERGON_FOLDER):
        new.rename(output / new.name)
    (fresh / MANIFEST).rename(output / MANIFEST)
    fresh.rmdir()
