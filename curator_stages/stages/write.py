"""Write: webdataset shards by resolution, aspect ratio and length, previews, and the manifest."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path

from nemo_curator.stages.base import ProcessingStage
from nemo_curator.stages.resources import Resources

from curator_stages.buckets import bucket_of
from curator_stages.config import CurationConfig
from curator_stages.manifest import MANIFEST, write_manifest
from curator_stages.stages.semantic_dedup import write_embeddings
from curator_stages.tasks import ClipSetTask, StoredClip
from nemo_cosmos.contracts import Split
from nemo_cosmos.energon_metadata import ENERGON_FOLDER, write_energon_metadata, write_tar_index
from nemo_cosmos.files import written_aside

_SHARD_FOLDERS = "resolution_*"
_PREVIEWS = "previews"
_EMBEDDINGS = "embeddings"


@dataclass
class WriteStage(ProcessingStage[ClipSetTask, ClipSetTask]):
    """Writes kept clips into tars, their previews into `previews/`, embeddings into `embeddings/`, a row of each clip.

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
            for shard, clips in sorted(_by_shard(task.data).items()):
                _write_shard(aside / shard, clips)
                num_clips[clips[0].record.split][shard] = len(clips)
            write_energon_metadata(aside, num_clips)
            _write_previews(aside / _PREVIEWS, task.data)
            write_embeddings(aside / _EMBEDDINGS, task.data)
            write_manifest(aside / MANIFEST, [c.record for c in task.data])
        _replace_set(fresh, output)
        return task


def _with_shards(clips: list[StoredClip], clips_per_shard: int) -> list[StoredClip]:
    """Sorts clips by source, start and id and gives kept ones their shard, which is of one bucket and split."""
    ordered = sorted(clips, key=lambda c: (c.record.source_video, c.record.start_frame, c.record.clip_id))
    filled: dict[str, int] = {}
    result = []
    for clip in ordered:
        if clip.record.rejected_by is None:
            kind = f"{bucket_of(clip.record).folder}/{clip.record.split}"
            number = filled.get(kind, 0)
            filled[kind] = number + 1
            shard = f"{kind}-{number // clips_per_shard:06d}.tar"
            clip = replace(clip, record=replace(clip.record, shard=shard))
        result.append(clip)
    return result


def _by_shard(clips: list[StoredClip]) -> dict[str, list[StoredClip]]:
    grouped: dict[str, list[StoredClip]] = {}
    for clip in clips:
        if clip.record.shard:
            grouped.setdefault(clip.record.shard, []).append(clip)
    return grouped


def _write_shard(path: Path, clips: list[StoredClip]) -> None:
    """Writes `<clip_id>.mp4`, `.json` (`ClipRecord.to_dict`) and, where there is one, `.safetensors` of each clip.

    The same clips give the same bytes.
    """
    import webdataset

    path.parent.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(path), encoder=False, mtime=0) as tar:
        for clip in clips:
            described = json.dumps(clip.record.to_dict(), sort_keys=True).encode()
            members = {"mp4": clip.file(".mp4").read_bytes(), "json": described}
            if (states := clip.file(".safetensors")).is_file():
                members["safetensors"] = states.read_bytes()
            tar.write({"__key__": clip.record.clip_id, **members})
    write_tar_index(path)


def _write_previews(folder: Path, clips: list[StoredClip]) -> None:
    """Lays the previews of kept clips together, where there are any."""
    previews = [c.file(".webp") for c in clips if c.record.shard and c.file(".webp").is_file()]
    if previews:
        folder.mkdir()
    for preview in previews:
        shutil.copyfile(preview, folder / preview.name)


def _replace_set(fresh: Path, output: Path) -> None:
    """Puts the new set in the old one's place; the manifest goes first and comes last, and vouches for the shards."""
    (output / MANIFEST).unlink(missing_ok=True)
    folders = (_SHARD_FOLDERS, _PREVIEWS, _EMBEDDINGS, ENERGON_FOLDER)
    for old in [folder for name in reversed(folders) for folder in output.glob(name)]:
        shutil.rmtree(old)
    for new in [folder for name in folders for folder in fresh.glob(name)]:
        new.rename(output / new.name)
    (fresh / MANIFEST).rename(output / MANIFEST)
    fresh.rmdir()
