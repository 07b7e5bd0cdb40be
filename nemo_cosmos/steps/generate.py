"""Prompt, first frame and actions in; a guarded video out."""

from __future__ import annotations

import dataclasses
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nemo_cosmos.contracts import ACTION_DIM, Conditions, GeneratedVideo, Verdict
from nemo_cosmos.errors import UserError, user_error
from nemo_cosmos.files import read_json, write_json
from nemo_cosmos.generation.first_frames import read_first_frames
from nemo_cosmos.generation.layout import GenerationLayout
from nemo_cosmos.generation.open import find_world_model, open_world_model
from nemo_cosmos.generation.sampling import SamplingConfig
from nemo_cosmos.generation.world_model import WorldModel
from nemo_cosmos.guardrail import PROMPT_GUARDS, VIDEO_GUARDS, PostGuard, PreGuard, is_safe
from nemo_cosmos.parallel.first_rank import is_first_rank, on_first_rank
from nemo_cosmos.parallel.startup import initialize
from nemo_cosmos.video_io import write_video


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """Which guards run; an empty tuple switches a side off, and the video's record says so."""

    prompt: tuple[str, ...] = tuple(PROMPT_GUARDS)
    video: tuple[str, ...] = tuple(VIDEO_GUARDS)


def generate(
    output: str | Path,
    *,
    prompt: str = "",
    checkpoint: str = "diffusion_tiny_action",
    tokenizer: str | None = None,
    diffusion_decoder: str | None = None,
    continuous_tokenizer: str | None = None,
    first_frame: str | Path | None = None,
    num_first_frames: int = 1,
    actions: str | Path | None = None,
    sampling: SamplingConfig | None = None,
    negative_prompt: str = "",
    guards: GuardConfig | None = None,
    layout: GenerationLayout | None = None,
    offload: bool = False,
) -> GeneratedVideo:
    """Generates one video and writes `<output>` with a JSON record beside it.

    Under `torchrun` all ranks call it with the same arguments; the first one runs the guards and writes.

    Args:
        output: Where to write the mp4.
        prompt: What the video shows; empty for a WFM that takes no text.
        checkpoint: Of a WFM of either family: a NeMo checkpoint folder, a diffusers pipeline folder, or the name of
            embedded weights.
        tokenizer: A tokenizer folder, or the name of embedded weights; see `find_world_model` for what is taken when
            absent.
        diffusion_decoder: Makes frames of an autoregressive WFM's tokens; the tokenizer does when absent.
        continuous_tokenizer: Whose latents the diffusion decoder draws; see `find_world_model`.
        first_frame: Picture, or video whose last frames are gone on from (Video2World); see `read_first_frames`.
        num_first_frames: Frames taken from a video.
        actions: JSON list of rows, or .npy, [num_frames-1, 7], for action-conditioned models.
        sampling: Sizes, how to draw, and seed; what it leaves out takes the model's own value.
        negative_prompt: What guidance moves away from.
        guards: Which guards run.
        layout: How the ranks share the work; for one rank when absent.
        offload: Have the weights of each part (text encoder, network, tokenizer; guards always) in memory only while it
            works.

    Returns:
        The record written.

    Raises:
        UserError: A guard objects, or the input does not fit the model.
    """
    guards, layout = guards or GuardConfig(), layout or GenerationLayout()
    source = find_world_model(
        checkpoint, tokenizer, diffusion_decoder=diffusion_decoder, continuous_tokenizer=continuous_tokenizer
    )
    sampling = source.complete(sampling)
    if prompt and not source.takes_text:
        raise user_error("prompt", prompt, f"none, for {checkpoint} takes no text", "Leave it out.")
    if sampling.height % 2 or sampling.width % 2:
        got = (sampling.height, sampling.width)
        raise user_error("height, width", got, "even numbers, which mp4 files have", "Add or take one.")
    rows = None if actions is None else read_actions(actions)
    first = None
    if first_frame is not None:
        size = {"height": sampling.height, "width": sampling.width}
        first = read_first_frames(Path(first_frame), num_frames=num_first_frames, fps=sampling.fps, **size)
    source.check_layout(layout)
    with initialize(**layout.groups):
        verdicts = on_first_rank(lambda: check_prompt(prompt, guards)) if source.takes_text else []
        frames = _frames(
            open_world_model(source, layout=layout, offload=offload),
            prompt,
            sampling,
            first=first,
            actions=rows,
            negative_prompt=negative_prompt,
        )
        record = GeneratedVideo(
            path=str(output),
            prompt=prompt,
            negative_prompt=negative_prompt,
            checkpoint=checkpoint,
            tokenizer=tokenizer,
            diffusion_decoder=diffusion_decoder,
            continuous_tokenizer=continuous_tokenizer,
            first_frame=None if first_frame is None else str(first_frame),
            num_first_frames=num_first_frames,
            conditions=Conditions(actions=None if rows is None else rows.tolist()),
            guard={verdict.guard: verdict.to_dict() for verdict in verdicts},
            **dataclasses.asdict(sampling),
        )
        return on_first_rank(lambda: _guard_and_write(record, frames, guards))


def _frames(
    opening: AbstractContextManager[WorldModel],
    prompt: str,
    sampling: SamplingConfig,
    *,
    first: np.ndarray | None,
    actions: np.ndarray | None,
    negative_prompt: str,
) -> np.ndarray:
    """Generates; when this returns, nothing of the model is left in memory for the guards to make room for."""
    with opening as model:
        return model.generate(
            [prompt],
            sampling,
            first_frames=None if first is None else [first],
            actions=None if actions is None else actions[None],
            negative_prompt=negative_prompt,
            seeds=[sampling.seed],
            progress=is_first_rank(),
        )[0]


def _guard_and_write(record: GeneratedVideo, frames: np.ndarray, guards: GuardConfig) -> GeneratedVideo:
    frames, verdicts = check_video(frames, record.fps, guards)
    write_video(record.path, frames, fps=record.fps)
    record = dataclasses.replace(record, guard=record.guard | {v.guard: v.to_dict() for v in verdicts})
    write_json(Path(record.path).with_suffix(".json"), record.to_dict())
    return record


def check_prompt(prompt: str, guards: GuardConfig) -> list[Verdict]:
    """Runs the prompt guards.

    Raises:
        UserError: One of them objects; nothing was generated.
    """
    if not guards.prompt:
        return []
    verdicts = PreGuard.from_names(guards.prompt).guard_prompt(prompt)
    _refuse_unsafe("prompt", verdicts)
    return verdicts


def check_video(frames: np.ndarray, fps: float, guards: GuardConfig) -> tuple[np.ndarray, list[Verdict]]:
    """Runs the video guards; faces come back pixelated.

    Raises:
        UserError: One of them objects; the frames must not be written.
    """
    if not guards.video:
        return frames, []
    frames, verdicts = PostGuard.from_names(guards.video).guard_video(frames, fps)
    _refuse_unsafe("generated video", verdicts)
    return frames, verdicts


def _refuse_unsafe(what: str, verdicts: list[Verdict]) -> None:
    if not is_safe(verdicts):
        reasons = "; ".join(f"{v.guard}: {v.reason}" for v in verdicts if not v.safe)
        raise UserError(f"{what} blocked by the guardrail ({reasons}). Change the prompt or the input.")


def read_actions(path: str | Path) -> np.ndarray:
    """Reads a table of actions.

    Args:
        path: .npy, or .json holding a list of rows or a record with `actions`.

    Returns:
        float32 [rows, ACTION_DIM].

    Raises:
        UserError: The file is no table of numbers, or its rows have another width.
    """
    path = Path(path)
    try:
        if path.suffix == ".npy":
            rows = np.load(path, allow_pickle=False).astype(np.float32)
        else:
            values = read_json(path)
            if isinstance(values, dict):
                values = values.get("conditions", values).get("actions")
            rows = np.asarray(values, dtype=np.float32)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file. Check the path.") from error
    except (ValueError, TypeError, AttributeError, EOFError) as error:
        raise UserError(
            f"{path}: is no table of numbers ({error}). Give rows of seven numbers, one per frame."
        ) from error
    if rows.ndim != 2 or rows.shape[1] != ACTION_DIM:
        raise user_error(
            str(path),
            f"shape {rows.shape}",
            f"[frames - 1, {ACTION_DIM}] (x, y, z, roll, pitch, yaw, gripper)",
            "Give one row of seven numbers per frame after the first.",
        )
    return rows
