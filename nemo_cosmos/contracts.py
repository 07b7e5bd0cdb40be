"""The records that cross from one stage to the next.

Stages hand over files described by these, never live objects. Every record is a frozen dataclass that goes to JSON
and back without loss; large arrays stand in files beside it.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from dataclasses import dataclass, field
from typing import Any, Literal, Self

Split = Literal["train", "heldout"]

ACTION_DIM = 7
"""Width of an action: relative motion x, y, z, roll, pitch, yaw in the previous body frame, then gripper opening."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """Base of all records: JSON in and out, unknown fields refused."""

    def to_dict(self) -> dict[str, Any]:
        """Returns the record as plain dicts, lists and scalars."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Builds the record from what `to_dict` gave.

        Raises:
            ValueError: A field is missing or unknown.
        """
        hints = typing.get_type_hints(cls)
        unknown = sorted(set(values) - set(hints))
        required = {f.name for f in dataclasses.fields(cls) if _has_no_default(f)}
        missing = sorted(required - set(values))
        if unknown or missing:
            raise ValueError(f"{cls.__name__}: missing fields {missing}, unknown fields {unknown}")
        return cls(**{name: _restore(hints[name], value) for name, value in values.items()})


def _has_no_default(f: dataclasses.Field) -> bool:
    return f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING


def _restore(hint: Any, value: Any) -> Any:  # noqa: ANN401 - typing hints and JSON values
    """Turns JSON back into nested records and tuples, as the field's type hint says."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if value is None:
        return None
    if origin in (typing.Union, types.UnionType):
        inner = [a for a in args if a is not type(None)]
        return _restore(inner[0], value) if len(inner) == 1 else value
    if isinstance(hint, type) and issubclass(hint, Record):
        return hint.from_dict(value)
    if origin is tuple:
        return tuple(_restore(args[0], v) for v in value)
    return value


@dataclass(frozen=True, kw_only=True)
class CaptionWindow(Record):
    """A caption and the frames it speaks of."""

    start_frame: int
    """First frame, counted from the clip's start."""
    end_frame: int
    """One past the last frame."""
    text: str
    captioner: str
    """Who wrote it: a model's name, or `simulator` for captions told from simulator state."""


@dataclass(frozen=True, kw_only=True)
class Conditions(Record):
    """What is known of a video besides its pixels. T is the number of frames."""

    actions: list[list[float]] | None = None
    """[T-1, ACTION_DIM]; entry t is what happened between frame t and t+1 (metres, radians, opening in [0, 1])."""
    controls: list[list[float]] | None = None
    """[T-1, any]; the simulator's own commands (speed m/s and steering rad, or the arm policy's output)."""
    camera_poses: list[list[list[float]]] | None = None
    """[T, 4, 4]; camera-to-world, OpenCV axes (x right, y down, z forward), metres."""
    intrinsics: list[list[float]] | None = None
    """[3, 3]; pinhole matrix in pixels of the stored video."""
    view: str | None = None
    """Camera name of a multi-camera rollout."""


@dataclass(frozen=True, kw_only=True)
class RawVideo(Record):
    """Sidecar `<name>.json` beside a collected `<name>.mp4`; videos of the user's own need none."""

    source: str
    """Domain: `street`, `arm`, `packaged` or the user's own word."""
    rollout: str
    """Name shared by all cameras of one rollout; equals the file's stem for single videos."""
    fps: float
    num_frames: int
    split: Split
    """`heldout` videos are curated but never trained on."""
    captions: tuple[CaptionWindow, ...] = ()
    conditions: Conditions = field(default_factory=Conditions)
    seed: int | None = None
    licence: str | None = None


@dataclass(frozen=True, kw_only=True)
class ClipRecord(Record):
    """One clip of a curated set, kept or rejected: a row of the manifest and the JSON beside the mp4 in a shard."""

    clip_id: str
    """Stable hash of source file, start and end."""
    source_video: str
    """Path relative to the input folder."""
    source: str
    rollout: str
    split: Split
    start_frame: int
    """First frame in the source video."""
    num_frames: int
    fps: float
    height: int
    width: int
    captions: tuple[CaptionWindow, ...] = ()
    conditions: Conditions = field(default_factory=Conditions)
    scores: dict[str, float] = field(default_factory=dict)
    """Measured values by name, e.g. `motion_global_mean`; a score that was not measured is absent."""
    tags: tuple[str, ...] = ()
    rejected_by: str | None = None
    """Name of the stage that rejected the clip; None for kept clips."""
    rejected_reason: str | None = None
    shard: str | None = None
    """Tar path relative to the curated folder; None for rejected clips."""


@dataclass(frozen=True, kw_only=True)
class LatentCacheCard(Record):
    """`cache.json` of a latent cache: what wrote it and how to read it."""

    tokenizer: str
    tokenizer_fingerprint: str
    """SHA-256 over the tokenizer's config and weights; a model trained with another one is refused."""
    continuous: bool
    latent_shape: tuple[int, ...]
    """C, T, H, W of a sample (continuous), or T, H, W (discrete)."""
    num_frames: int
    height: int
    width: int
    latent_mean: tuple[float, ...]
    """What latents are normalised by: the tokenizer's own statistics where it comes with them (per channel, or per
    channel and latent frame, all of a channel together), else those per channel over the training split. Empty where
    discrete."""
    latent_std: tuple[float, ...]
    text_encoder: str
    """Its name; empty where no text is stored, as in Megatron's token files."""
    text_dim: int
    text_length: int
    vocab_size: int | None = None
    """Codes of a discrete tokenizer; None where continuous, and in caches that were written before it was noted."""
    num_samples: dict[str, int] = field(default_factory=dict)
    """Samples by split."""

    @property
    def num_latent_frames(self) -> int:
        """Latent frames of a sample; 1 for pictures."""
        return self.latent_shape[-3]


@dataclass(frozen=True, kw_only=True)
class LatentSample(Record):
    """JSON beside the tensors of one latent-cache sample.

    The tensors stand in `<key>.safetensors`: `latent` (bf16 [C, T, H, W] as the tokenizer gave it, not normalised, or
    int32 [T, H, W]), `text_emb` (bf16 [L, D], padding zeroed), `text_mask` (bool [L]) and, where known, `actions`
    (float32 [num_frames-1, ACTION_DIM]), `camera_poses` (float32 [num_frames, 4, 4]), `intrinsics` (float32 [3, 3]).
    """

    key: str
    clip_id: str
    source: str
    rollout: str
    split: Split
    start_frame: int
    """First frame within the clip."""
    num_frames: int
    fps: float
    height: int
    width: int
    caption: str
    view: str | None = None
    has_actions: bool = False
    """Whether the tensors hold `actions`."""


@dataclass(frozen=True, kw_only=True)
class CheckpointCard(Record):
    """`card.json` beside a checkpoint."""

    model: str
    """Preset name, e.g. `diffusion_tiny`."""
    config: dict[str, Any]
    step: int
    data: str
    command: str
    figures: dict[str, float] = field(default_factory=dict)
    tokenizer_fingerprint: str | None = None
    token_fingerprint: str | None = None
    """The discrete tokenizer whose tokens a diffusion decoder takes."""
    latent_mean: tuple[float, ...] | None = None
    """What latents are normalised by: per channel, or per channel and latent frame, all of a channel together."""
    latent_std: tuple[float, ...] | None = None
    image_latent_mean: tuple[float, ...] | None = None
    """The same for latents of pictures, per channel, where these have statistics of their own."""
    image_latent_std: tuple[float, ...] | None = None
    text_encoder: str | None = None
    """Name of the encoder whose states a WFM was trained on."""
    parent: str | None = None
    """Fingerprint or path of the checkpoint that this one was post-trained from."""
    versions: dict[str, str] = field(default_factory=dict)
    measured_by: dict[str, str] = field(default_factory=dict)
    """What a tokenizer's loss terms were measured by; tells which weights stood in for ones that could not be had."""


@dataclass(frozen=True, kw_only=True)
class GeneratedVideo(Record):
    """JSON beside a generated mp4: all it takes to generate it again, every field of `SamplingConfig` among it."""

    path: str
    prompt: str
    negative_prompt: str = ""
    seed: int
    fps: float
    num_frames: int
    height: int
    width: int
    checkpoint: str
    tokenizer: str | None = None
    """Where it was named; None is the checkpoint's own or the embedded one."""
    diffusion_decoder: str | None = None
    """What made frames of an autoregressive WFM's tokens; None is the tokenizer."""
    continuous_tokenizer: str | None = None
    """Of the diffusion decoder, where it was named."""
    first_frame: str | None = None
    """Path of the picture or video that it goes on from."""
    num_first_frames: int = 1
    """Frames taken from that video."""
    num_steps: int | None = None
    """Of a diffusion WFM, as all up to `input_frames_guidance`; None where tokens were drawn."""
    guidance: float | None = None
    sampler: str | None = "euler"
    """Name of the integrator."""
    sigma_max: float | None = None
    """First noise level; None in records that tell no levels."""
    sigma_min: float | None = None
    final_sigma: str | None = None
    input_frames_guidance: bool = False
    temperature: float | None = None
    """Of an autoregressive WFM, as all up to `compile`; unset where latents were denoised."""
    top_p: float | None = None
    top_k: int | None = None
    speculation: str | None = None
    """How tokens were guessed ahead."""
    compile: bool = False
    """Whether decoding steps ran through `torch.compile`."""
    chunk_frames: int | None = None
    """Frames generated at once; None is all."""
    overlap_frames: int = 1
    """Frames that two chunks share."""
    conditions: Conditions = field(default_factory=Conditions)
    guard: dict[str, Any] = field(default_factory=dict)
    """Each guard's verdict, by name."""


@dataclass(frozen=True, kw_only=True)
class Verdict(Record):
    """What one guard found about a prompt or a video."""

    guard: str
    safe: bool
    reason: str
    """In words; for a guard that failed itself, the error."""
    scores: dict[str, float] = field(default_factory=dict)
    """Measured values by name."""
