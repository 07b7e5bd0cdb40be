"""Every setting of a curation run."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from nemo_cosmos.errors import UserError, user_error

ShotDetector = Literal["content", "transnetv2", "none"]

SHOT_DETECTORS: tuple[str, ...] = ("content", "transnetv2", "none")
STAGES_VERSION = 2
"""Raised when a stage starts to give other results for the same settings, so that cached results are made anew."""

_SET_FIELDS = (
    "dedup_hash_distance",
    "dedup_similarity",
    "dedup_similarity_simulated",
    "dedup_clusters",
    "clips_per_shard",
)
_NEUTRAL_FIELDS = ("device",)


@dataclass(frozen=True, kw_only=True)
class CurationConfig:
    """Settings of `curate`; each is checked when the object is made."""

    captioner: str
    """Who captions clips that have no caption in a sidecar: `none` (nobody, such clips stay without), `simulator`
    (all captions come from sidecars; a video without one is an error), or `module:Class` of a captioner of your own."""
    height: int = 256
    """Height of stored clips in pixels, even."""
    width: int = 256
    """Width of stored clips in pixels, even."""
    min_s: float = 1.0
    """Shortest clip in seconds; what is shorter is rejected."""
    max_s: float = 10.0
    """Longest clip in seconds; longer shots are cut into windows of this length."""
    stride_s: float | None = None
    """Seconds from one window's start to the next one's; None means `max_s`, windows side by side."""
    span_s: float = 30.0
    """Seconds of a video that one task decodes; bounds memory and lets a long video be worked on in parallel."""
    max_clips_per_video: int | None = None
    """Most clips to take from one video, spread evenly over its length; None takes all."""
    heldout_percent: float = 10.0
    """Share of the videos without sidecar that is held out, in percent, by a hash of the file name."""
    shot_detector: ShotDetector = "content"
    """`content` (PySceneDetect), `transnetv2` (about 100 times slower on a CPU) or `none` (a video is one shot)."""
    content_threshold: float = 27.0
    """Mean HSV change between frames, in [0, 255], from which on `content` sees a cut."""
    transnetv2_threshold: float = 0.5
    """Probability in (0, 1) from which on `transnetv2` sees a cut."""
    crf: int = 16
    """x264 constant rate factor in [0, 51]; 16 is visually lossless."""
    gop: int = 8
    """Most frames between two key frames: short, so that loading a window deep in a clip decodes little."""
    motion_pairs: int = 8
    """Pairs of neighbouring frames per clip that optical flow is measured on."""
    motion_patch: int = 256
    """Side in pixels of the patches of which the stillest is scored."""
    motion_min_global_mean: float = 2e-4
    """Least mean displacement per frame, as a share of height + width; clips below are rejected as still."""
    motion_min_per_patch: float = 1e-6
    """The same for the stillest patch."""
    embed_frames: int = 4
    """Frames per clip that the embedding is the mean of."""
    dedup_hash_distance: int = 20
    """Bits of 256 of the perceptual hash up to which two clips look the same."""
    dedup_similarity: float = 0.95
    """Cosine similarity in (0, 1] from which on two clips are near-duplicates."""
    dedup_similarity_simulated: float = 0.99
    """The same between two simulated clips, whose scenes look alike while their motion differs."""
    dedup_clusters: int | None = None
    """Number of k-means clusters inside which clips are compared; None is the square root of the number of clips."""
    clips_per_shard: int = 256
    """Most clips in one tar."""
    device: str = "cpu"
    """Torch device of the stages that run a network: `cpu`, `cuda` or `cuda:N`."""

    def __post_init__(self) -> None:
        """Checks every field.

        Raises:
            UserError: A field is out of its range.
        """
        if not self.captioner:
            raise user_error("captioner", self.captioner, "`none`, `simulator` or `module:Class`", "Choose one.")
        if self.shot_detector not in SHOT_DETECTORS:
            raise user_error("shot_detector", self.shot_detector, f"one of {SHOT_DETECTORS}", "Choose one of these.")
        for name in ("height", "width"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 16 or value % 2:
                raise user_error(name, value, "an even number of pixels, 16 or more", "H.264 needs even sizes.")
        if not 0 < self.min_s <= self.max_s <= self.span_s:
            raise user_error(
                "min_s, max_s, span_s",
                (self.min_s, self.max_s, self.span_s),
                "0 < min_s <= max_s <= span_s",
                "Reorder.",
            )
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise user_error(name, value, f"a number in [{low}, {high}]", "Give one inside the range.")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Builds the config from plain values, such as a YAML file's.

        Raises:
            UserError: A name is unknown, `captioner` is missing, or a value is out of range.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown or "captioner" not in values:
            raise UserError(
                f"curation config: got unknown settings {unknown}, expected some of {', '.join(sorted(known))}, "
                "`captioner` always. Correct the names."
            )
        return cls(**values)

    def span_fingerprint(self) -> str:
        """Returns a hash of the settings that what is measured on one video depends on."""
        return self._hash([f.name for f in dataclasses.fields(self) if f.name not in _SET_FIELDS + _NEUTRAL_FIELDS])

    def set_fingerprint(self) -> str:
        """Returns a hash of the settings that only what is done to the whole set depends on."""
        return self._hash(_SET_FIELDS)

    def _hash(self, names: list[str] | tuple[str, ...]) -> str:
        values = {name: getattr(self, name) for name in names} | {"version": STAGES_VERSION}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


_RANGES: dict[str, tuple[float, float]] = {
    "stride_s": (0.04, 3600),
    "max_clips_per_video": (1, 10**9),
    "heldout_percent": (0, 100),
    "content_threshold": (0.1, 255),
    "transnetv2_threshold": (0.001, 0.999),
    "crf": (0, 51),
    "gop": (1, 600),
    "motion_pairs": (1, 10**4),
    "motion_patch": (8, 4096),
    "motion_min_global_mean": (0, 1),
    "motion_min_per_patch": (0, 1),
    "embed_frames": (1, 1000),
    "dedup_hash_distance": (0, 31),
    "dedup_similarity": (0.01, 1.0),
    "dedup_similarity_simulated": (0.01, 1.0),
    "dedup_clusters": (1, 10**6),
    "clips_per_shard": (1, 10**6),
}


def load_config(path: str | Path, **overrides: Any) -> CurationConfig:  # noqa: ANN401 - any setting
    """Reads a YAML file of settings; keyword arguments win over the file.

    Raises:
        UserError: The file is missing, is not YAML, or a setting is wrong.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        values = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (OSError, YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{path}: cannot be read as YAML ({error}). Give a file such as conf/curation.yaml.") from error
    if not isinstance(values, dict):
        raise user_error(str(path), type(values).__name__, "a mapping of settings", "See conf/curation.yaml.")
    return CurationConfig.from_dict({str(k): v for k, v in values.items()} | overrides)
