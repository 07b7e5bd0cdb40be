"""What travels between stages: NeMo-Curator tasks that hold spans of videos and clips."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from nemo_curator.tasks import Task

from nemo_cosmos.contracts import ClipRecord, RawVideo


@dataclass(frozen=True, kw_only=True)
class VideoSpan:
    """A piece of a source video that one task decodes; short videos are one span."""

    path: str
    """Absolute path of the video."""
    source_video: str
    """Path relative to the input folder, with forward slashes."""
    key: str
    """Hash of the file's state, its sidecar, the span and the settings: names the cached result."""
    video: RawVideo
    """The sidecar, or a stand-in made from the path."""
    simulated: bool
    """Whether the sidecar tells what the simulator did; such a video is one shot."""
    start_frame: int = 0
    end_frame: int | None = None
    """One past the last frame; None reads to the end of the file."""
    max_clips: int | None = None
    """Most clips to take from this span; with 0 it is not decoded, and one row tells what is left out."""
    error: str | None = None
    """Why the video cannot be used, found before decoding."""


class StageOrderError(RuntimeError):
    """A stage stands behind one that drops what it needs: a fault of the pipeline and of no clip."""


@dataclass(kw_only=True)
class Clip:
    """A clip on its way through the stages; arrays are dropped as soon as no later stage needs them."""

    record: ClipRecord
    frames: np.ndarray | None = None
    """uint8 RGB [T, H, W, 3] at the stored size."""
    samples: list[np.ndarray] = field(default_factory=list)
    """uint8 RGB pictures [h, w, 3] of the whole source frame now and then, for what scaling down would hide."""
    codec_motion: dict[int, np.ndarray] = field(default_factory=dict)
    """Motion by frame of the clip, as of `motion_fields.codec_field`."""
    mp4: bytes | None = None
    thumbnail: bytes | None = None
    """JPEG of the middle frame."""
    perceptual_hashes: np.ndarray | None = None
    """uint8 [5, 32], as of `dedup.perceptual`."""
    embedding: np.ndarray | None = None
    """float32 [D], L2 norm 1."""
    text_states: bytes | None = None
    """States of the captions' tokens, a file as of `nemo_cosmos.text.pack_text_states`."""
    preview: bytes | None = None
    """Animated webp."""
    failed: bool = False
    """Rejected by a fault that may pass, not by a rule: the next run tries the whole span anew."""

    @property
    def kept(self) -> bool:
        """Whether no stage has rejected the clip."""
        return self.record.rejected_by is None

    @property
    def pixels(self) -> np.ndarray:
        """The clip's frames, for stages that cannot do without.

        Raises:
            StageOrderError: The frames have been dropped.
        """
        if self.frames is None:
            raise StageOrderError(f"clip {self.record.clip_id}: its frames were dropped before a stage that needs them")
        return self.frames

    def some_samples(self, most: int) -> list[np.ndarray]:
        """Returns up to `most` of the samples, evenly spread.

        Raises:
            StageOrderError: None were taken, or they have been dropped.
        """
        if not self.samples:
            raise StageOrderError(f"clip {self.record.clip_id}: has no samples for a stage that needs them")
        places = np.linspace(0, len(self.samples) - 1, min(most, len(self.samples))).round().astype(int)
        return [self.samples[place] for place in places]

    def reject(self, stage: str, reason: str) -> None:
        """Marks the clip as rejected; it still becomes a row of the manifest, and its mp4 may be seen in the report."""
        self.record = replace(self.record, rejected_by=stage, rejected_reason=reason)
        self.embedding = None
        self.drop_pictures()

    def fail(self, stage: str, reason: str) -> None:
        """Rejects the clip for a fault that may pass."""
        self.reject(stage, reason)
        self.failed = True

    def drop_pictures(self) -> None:
        """Frees the memory of all that was decoded."""
        self.frames, self.samples, self.codec_motion = None, [], {}


@dataclass(frozen=True, kw_only=True)
class StoredClip:
    """A clip whose files stand in the work folder."""

    record: ClipRecord
    folder: str
    """Holds the clip's files by its id, as far as they were made: `.mp4`, `.jpg`, `.npy` (the embedding), `.hash.npy`,
    `.safetensors` (states of the captions) and `.webp` (the preview)."""

    def file(self, suffix: str) -> Path:
        """Returns the path of the clip's file with this suffix, e.g. `.mp4`."""
        return Path(self.folder) / f"{self.record.clip_id}{suffix}"


@dataclass
class SpanTask(Task[VideoSpan]):
    """One span of one video."""

    @property
    def num_items(self) -> int:
        """One span."""
        return 1

    def validate(self) -> bool:
        """Says whether the data are of the right type."""
        return isinstance(self.data, VideoSpan)

    def get_deterministic_id(self) -> str:
        """Returns the span's key, which stays the same from run to run."""
        return self.data.key


@dataclass
class ClipsTask(Task[list[Clip]]):
    """The clips of one span."""

    span: VideoSpan = field(kw_only=True)

    @property
    def num_items(self) -> int:
        """Number of clips."""
        return len(self.data)

    def validate(self) -> bool:
        """Says whether the span is of the right type."""
        return isinstance(self.span, VideoSpan)

    def kept(self) -> list[Clip]:
        """Returns the clips that no stage has rejected so far."""
        return [clip for clip in self.data if clip.kept]


@dataclass
class ClipSetTask(Task[list[StoredClip]]):
    """All clips of a run."""

    @property
    def num_items(self) -> int:
        """Number of clips."""
        return len(self.data)

    def validate(self) -> bool:
        """Says whether there is any clip."""
        return bool(self.data)


def clip_id_of(source_video: str, start_frame: int, end_frame: int) -> str:
    """Returns the stable name of a clip: 16 hex digits of a hash of its file's relative path, start and end."""
    return hashlib.sha256(f"{source_video}\0{start_frame}\0{end_frame}".encode()).hexdigest()[:16]


def empty_clip(
    span: VideoSpan, stage: str, reason: str, *, start_frame: int | None = None, failed: bool = False
) -> Clip:
    """Makes the rejected row of a span, or of the rest of a span, that gave no clips."""
    start = span.start_frame if start_frame is None else start_frame
    record = ClipRecord(
        clip_id=clip_id_of(span.source_video, start, start),
        source_video=span.source_video,
        source=span.video.source,
        rollout=span.video.rollout,
        split=span.video.split,
        start_frame=start,
        num_frames=0,
        fps=span.video.fps,
        height=0,
        width=0,
        rejected_by=stage,
        rejected_reason=reason,
    )
    return Clip(record=record, failed=failed)
