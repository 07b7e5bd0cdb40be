"""The work folder: one finished result per span of a source video, so that a killed run goes on where it was."""

from __future__ import annotations

import contextlib
import fcntl
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from curator_stages.tasks import Clip, StoredClip
from nemo_cosmos.contracts import ClipRecord
from nemo_cosmos.errors import UserError
from nemo_cosmos.files import read_json, write_json, written_aside

_FAILED = "failed"
"""Empty file beside a result."""


class WorkFolder:
    """`<output>/.work`: results by key, and the mark of a finished run."""

    def __init__(self, path: str | Path) -> None:
        """Names the folder; nothing is written yet."""
        self.path = Path(path)
        self._spans = self.path / "spans"
        self._finished = self.path / "finished.json"

    def has(self, key: str) -> bool:
        """Says whether the result of a span is there."""
        return (self._spans / key / "result.json").is_file()

    def is_settled(self, key: str) -> bool:
        """Says whether the result of a span is there and holds no clip that failed, which the next run tries anew."""
        return self.has(key) and not (self._spans / key / _FAILED).is_file()

    def write(self, key: str, clips: list[Clip], seconds: dict[str, float]) -> None:
        """Stores the clips of a span: all of them or, when killed on the way, none.

        Raises:
            UserError: The disk is full or the folder is read-only.
        """
        with written_aside(self._spans / key) as folder:
            folder.mkdir()
            for clip in clips:
                files = {
                    ".mp4": clip.mp4,
                    ".jpg": clip.thumbnail,
                    ".safetensors": clip.text_states,
                    ".webp": clip.preview,
                }
                for suffix, data in files.items():
                    if data is not None:
                        (folder / f"{clip.record.clip_id}{suffix}").write_bytes(data)
                for suffix, array in ((".npy", clip.embedding), (".hash.npy", clip.perceptual_hashes)):
                    if array is not None:
                        np.save(folder / f"{clip.record.clip_id}{suffix}", array)
            if any(clip.failed for clip in clips):
                (folder / _FAILED).touch()
            write_json(folder / "result.json", {"clips": [c.record.to_dict() for c in clips], "seconds": seconds})

    def read(self, key: str) -> tuple[list[StoredClip], dict[str, float]]:
        """Returns the clips of a span and the seconds that each stage took."""
        folder = self._spans / key
        result = read_json(folder / "result.json")
        clips = [StoredClip(record=ClipRecord.from_dict(values), folder=str(folder)) for values in result["clips"]]
        return clips, result["seconds"]

    def prune(self, keys: set[str]) -> None:
        """Removes results that belong to no span of this run, and what a killed run left half-written."""
        stale = [folder for folder in self._spans.glob("*") if folder.name not in keys]
        for folder in [*stale, *self.path.glob(".set.*.part")]:
            _remove(folder)
        for name in (".report.*.part.*", ".statistics.*.part.*"):
            for file in self.path.parent.glob(name):
                file.unlink()

    def mark_finished(self, run_key: str) -> None:
        """Notes that the outputs of this run all stand."""
        write_json(self._finished, {"run": run_key})

    def is_finished(self, run_key: str) -> bool:
        """Says whether this very run has ended well before."""
        return self._finished.is_file() and read_json(self._finished) == {"run": run_key}

    def mark_unfinished(self) -> None:
        """Forgets the mark, before outputs are changed."""
        self._finished.unlink(missing_ok=True)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other runs out of the folder; a killed run's lock goes with its process.

        Raises:
            UserError: Another run is at work here, or the folder cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = open(self.path / "lock", "w")  # noqa: SIM115 - held until the block ends
        except OSError as error:
            raise UserError(
                f"{self.path.parent}: cannot write here ({error.strerror}). Choose another output folder."
            ) from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(
                    f"{self.path.parent}: another curation run is writing here. Wait for it or choose another folder."
                ) from error
            yield


def _remove(folder: Path) -> None:
    (folder / "result.json").unlink(missing_ok=True)  # which says that all else is there: killed on the way, it is not
    shutil.rmtree(folder)
