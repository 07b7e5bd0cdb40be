"""Every setting of a curation run."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, get_args

from curator_stages.buckets import stored_size
from curator_stages.dedup.config import Backend
from curator_stages.source_frames import MAX_FPS, MAX_PIXELS
from curator_stages.video_types import VIDEO_TYPES
from nemo_cosmos.errors import UserError, user_error

ShotDetector = Literal["content", "transnetv2", "fixed_stride"]
MotionMethod = Literal["optical_flow", "motion_vectors"]
Encoder = Literal["libx264", "h264_nvenc", "auto"]

SHOT_DETECTORS: tuple[str, ...] = ("content", "transnetv2", "fixed_stride")
MOTION_METHODS: tuple[str, ...] = ("optical_flow", "motion_vectors")
ENCODERS: tuple[str, ...] = ("libx264", "h264_nvenc", "auto")
X264_PRESETS: tuple[str, ...] = ("ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower")
EFFICIENTNET = "efficientnet-lite0"
STAGES_VERSION = 5
"""Raised when a stage starts to give other results for the same settings, so that cached results are made anew."""

_SET_FIELDS = (
    "dedup_hash_distance",
    "dedup_similarity",
    "dedup_similarity_simulated",
    "dedup_clusters",
    "dedup_backend",
    "clips_per_shard",
)
_NEUTRAL_FIELDS = (
    "device",
    "caption_endpoint",
    "caption_batch",
    "caption_spans",
    "caption_retries",
    "caption_timeout_s",
    "dedup_memory_gb",
)


@dataclass(frozen=True, kw_only=True)
class CurationConfig:
    """Settings of `curate`; each is checked when the object is made."""

    captioner: str
    """Who captions clips that have no caption in a sidecar: `none` (nobody, such clips stay without), `simulator`
    (all captions come from sidecars; a video without one is an error), `transformers:MODEL` (Qwen-VL class) or
    `vllm:MODEL` (a folder, or a name on the Hugging Face hub), `openai:MODEL` (at `caption_endpoint`), or
    `module:Class` of a captioner of your own."""
    caption_endpoint: str | None = None
    """Address of a server with OpenAI's interface, e.g. http://localhost:8000/v1."""
    caption_prompt: str = "default"
    """A variant of `captioning.prompts.PROMPTS`, or a prompt."""
    caption_refine: bool = False
    """Ask a second time, with the first caption and the same frames."""
    caption_window: int = 256
    """Frames that one caption speaks of."""
    caption_frames: int = 8
    """Frames of a window that are shown to the captioner."""
    caption_max_tokens: int = 512
    """Longest caption in the model's tokens."""
    caption_batch: int = 8
    """Windows that are captioned at once."""
    caption_spans: int = 4
    """Spans of video whose windows are handed together to a captioner with a model in the process, which batches them;
    memory holds the frames of that many."""
    caption_retries: int = 2
    """Further tries for a window that got no caption, before its clip is rejected."""
    caption_timeout_s: float = 120.0
    """Longest wait for one answer of `caption_endpoint`."""
    height: int = 256
    """Height of stored clips in pixels, even."""
    width: int = 256
    """Width of stored clips in pixels, even."""
    sizes: tuple[tuple[int, int], ...] = ()
    """Height and width each, in place of `height` and `width`: every video is stored at the one that fits its shape and
    size, as of `buckets.stored_size`, and shards are of one resolution and aspect ratio each."""
    min_s: float = 1.0
    """Shortest clip in seconds; what is shorter is rejected."""
    max_s: float = 10.0
    """Longest clip in seconds; longer shots are cut into windows of this length."""
    stride_s: float | None = None
    """Seconds from one window's start to the next one's; None means `max_s`, windows side by side."""
    span_s: float = 30.0
    """Seconds of a video that one task decodes; bounds memory and lets a long video be worked on in parallel."""
    max_clips_per_video: int | None = None
    """Most clips to take from one video, spread evenly over its length; None takes all. Each part that it leaves out is
    a rejected row with its length."""
    heldout_percent: float = 10.0
    """Share of the videos without sidecar that is held out, in percent, by a hash of the file name."""
    shot_detector: ShotDetector = "content"
    """`content` (PySceneDetect), `transnetv2` (about 100 times slower on a CPU) or `fixed_stride` (looks for no shots:
    a window every `stride_s`)."""
    content_threshold: float = 27.0
    """Mean HSV change between frames, in [0, 255], from which on `content` sees a cut."""
    transnetv2_threshold: float = 0.5
    """Probability in (0, 1) from which on `transnetv2` sees a cut."""
    encoder: Encoder = "libx264"
    """`libx264`; `h264_nvenc`, on a GPU that has NVENC (an H100 has none); or `auto`: NVENC where it is there."""
    crf: int = 16
    """x264 constant rate factor in [0, 51], or NVENC's `cq`; 16 is visually lossless."""
    x264_preset: str = "veryfast"
    """One of `X264_PRESETS`. `superfast` takes half the time, for the same quality in a fifth to a third more bytes."""
    gop: int = 8
    """Most frames between two key frames: short, so that loading a window deep in a clip decodes little."""
    max_source_pixels: int = MAX_PIXELS
    """Largest height x width of a source's frames; larger ones are rejected, since memory follows it."""
    max_source_fps: float = MAX_FPS
    """Most frames per second of a source; videos of more are rejected, since memory follows it: up to twice `span_s` of
    frames at the stored size."""
    decode_timeout_s: float = 600.0
    """Longest time that decoding one span may take, and that opening and probing a file may; a single read or call of
    the decoder that does not return is given up after twice that."""
    motion_method: MotionMethod = "optical_flow"
    """`optical_flow` on stored frames, or `motion_vectors` that come with the source's codec (H.264, MPEG-1, 2 and 4);
    clips without any are measured by optical flow, as their tag tells."""
    motion_pairs: int = 8
    """Pairs of neighbouring frames per clip that optical flow is measured on, two in a row at each place."""
    motion_patch: int = 256
    """Side in pixels of the patches of which the stillest is scored."""
    motion_min_global_mean: float = 2e-4
    """Least mean displacement per frame, as a share of height + width; clips below are rejected as still."""
    motion_min_per_patch: float = 1e-6
    """The same for the stillest patch."""
    motion_max_jitter: float | None = None
    """Most change of the camera's shift from one frame to the next, as a share of height + width; clips above are
    rejected as shaken, None rejects none."""
    quality: bool = True
    """Measure sharpness, exposure, contrast and blockiness; this alone rejects nothing."""
    min_sharpness: float | None = None
    """Least variance of the Laplacian; clips below are rejected as blurred, None rejects none."""
    max_clipped: float | None = None
    """Largest share of black or white pixels; clips above are rejected as badly exposed, None rejects none."""
    overlay_text_max_area: float | None = None
    """Largest share of the picture that is text which stays; None looks for no text, 1 measures only."""
    clip_model: str = "openai/clip-vit-large-patch14"
    """CLIP of `aesthetic_min` and `video_types`: a folder, or a name on the Hugging Face hub."""
    aesthetic_model: str = "ttj/sac-logos-ava1-l14-linearMSE"
    """Aesthetic predictor on that CLIP: a folder, or a name on the Hugging Face hub."""
    aesthetic_min: float | None = None
    """Least aesthetic score, about 1 to 10 (3.5 in the technical report); None leaves the score out."""
    video_types: bool = False
    """Tell the type of each clip."""
    video_types_rejected: tuple[str, ...] = ()
    """Types of `video_types.VIDEO_TYPES` whose clips are rejected."""
    text_encoder: str | None = None
    """Encoder of captions whose states are stored beside each clip: a name of `nemo_cosmos.text.TEXT_ENCODERS`, or a
    folder with `text_encoder` and `tokenizer`; None stores none."""
    preview_fps: float | None = None
    """Pictures per second of an animated preview of each clip; None makes none."""
    preview_height: int = 240
    """Height of previews in pixels."""
    embedding_model: str = EFFICIENTNET
    """What clips are compared by: `efficientnet-lite0`, or Cosmos-Embed1, a folder or a name on the Hugging Face hub
    such as `nvidia/Cosmos-Embed1-224p`, whose own code is run."""
    embed_frames: int = 4
    """Frames per clip that `efficientnet-lite0` looks at; Cosmos-Embed1 takes as many as it was made for."""
    dedup_hash_distance: int = 31
    """Bits of 256 of the perceptual hash up to which two clips look the same; distinct ones differ in 62 and more."""
    dedup_similarity: float = 0.95
    """Cosine similarity in (0, 1] from which on two clips are near-duplicates."""
    dedup_similarity_simulated: float = 0.99
    """The same between two simulated clips, whose scenes look alike while their motion differs."""
    dedup_clusters: int | None = None
    """Number of k-means clusters inside which clips are compared; None is the square root of the number of clips."""
    dedup_backend: Backend = "cpu"
    """`cpu`, or `gpu`: NeMo-Curator's workflow on cuML, which knows no simulated clips and compares those of a cluster
    only."""
    dedup_memory_gb: float = 1.5
    """Most memory for comparing embeddings on a CPU, in GB; 1.5 is enough for 3.5 million clips, 8 for 40 million."""
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
            raise user_error("captioner", self.captioner, "`none`, `simulator` or a captioner", "Choose one.")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise user_error(name, getattr(self, name), f"one of {choices}", "Choose one of these.")
        if unknown := sorted(set(self.video_types_rejected) - set(VIDEO_TYPES)):
            raise user_error("video_types_rejected", unknown, f"some of {tuple(VIDEO_TYPES)}", "Correct the names.")
        self._check_sizes()
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

    def _check_sizes(self) -> None:
        if self.encoder != "libx264" and self.crf == 0:
            raise user_error("crf", 0, "1 or more with NVENC, to which 0 means its own choice", "Give 1.")
        if not isinstance(self.sizes, (list, tuple)) or any(
            not isinstance(size, (list, tuple)) or len(size) != 2 for size in self.sizes
        ):
            raise user_error("sizes", self.sizes, "pairs of height and width", "Write [[704, 1280], [960, 960]].")
        sides = [("height", self.height), ("width", self.width), *(("sizes", v) for size in self.sizes for v in size)]
        for name, value in sides:
            if not isinstance(value, int) or value < 16 or value % 2:
                raise user_error(name, value, "an even number of pixels, 16 or more", "H.264 needs even sizes.")

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

    def stored_size(self, height: int, width: int) -> tuple[int, int]:
        """Returns the height and width that a source of these is stored at."""
        return stored_size(height, width, self.sizes or ((self.height, self.width),))

    @property
    def wants_samples(self) -> bool:
        """Whether any stage looks at pictures of the source's own size."""
        limits = (self.overlay_text_max_area, self.aesthetic_min)
        return self.quality or self.video_types or any(limit is not None for limit in limits)

    def span_fingerprint(self) -> str:
        """Returns a hash of the settings that what is measured on one video depends on."""
        return self._hash([f.name for f in dataclasses.fields(self) if f.name not in _SET_FIELDS + _NEUTRAL_FIELDS])

    def set_fingerprint(self) -> str:
        """Returns a hash of the settings that only what is done to the whole set depends on."""
        return self._hash(_SET_FIELDS)

    def _hash(self, names: list[str] | tuple[str, ...]) -> str:
        values = {name: getattr(self, name) for name in names} | {"version": STAGES_VERSION}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


_CHOICES = {
    "shot_detector": SHOT_DETECTORS,
    "motion_method": MOTION_METHODS,
    "encoder": ENCODERS,
    "x264_preset": X264_PRESETS,
    "dedup_backend": get_args(Backend),
}

_RANGES: dict[str, tuple[float, float]] = {
    "stride_s": (0.04, 3600),
    "max_clips_per_video": (1, 10**9),
    "heldout_percent": (0, 100),
    "content_threshold": (0.1, 255),
    "transnetv2_threshold": (0.001, 0.999),
    "crf": (0, 51),
    "gop": (1, 600),
    "max_source_pixels": (256, 2**40),
    "max_source_fps": (1, 10**5),
    "decode_timeout_s": (0.001, 10**6),
    "motion_pairs": (1, 10**4),
    "motion_patch": (8, 4096),
    "motion_min_global_mean": (0, 1),
    "motion_min_per_patch": (0, 1),
    "motion_max_jitter": (0, 1),
    "min_sharpness": (0, 10**6),
    "max_clipped": (0, 1),
    "overlay_text_max_area": (0, 1),
    "aesthetic_min": (-100, 100),
    "preview_fps": (0.01, 1000),
    "preview_height": (16, 4096),
    "embed_frames": (1, 1000),
    "caption_window": (1, 10**6),
    "caption_frames": (1, 1000),
    "caption_max_tokens": (1, 10**5),
    "caption_batch": (1, 10**4),
    "caption_spans": (1, 1000),
    "caption_retries": (0, 100),
    "caption_timeout_s": (0.1, 10**5),
    "dedup_hash_distance": (0, 31),
    "dedup_similarity": (0.01, 1.0),
    "dedup_similarity_simulated": (0.01, 1.0),
    "dedup_clusters": (1, 10**6),
    "dedup_memory_gb": (0.001, 10**5),
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
