"""Caption: what the sidecar tells, else what a captioner writes about each window of frames."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from nemo_curator.backends.base import WorkerMetadata
from nemo_curator.stages.base import ProcessingStage
from nemo_curator.stages.resources import Resources

from curator_stages.captioning.captioner import (
    Answer,
    Captioner,
    CaptionError,
    CaptionRequest,
    captioner_gpus,
    make_captioner,
)
from curator_stages.captioning.prompts import prompt_of, refining
from curator_stages.conditions import slice_captions
from curator_stages.config import CurationConfig
from curator_stages.faults import reason_of
from curator_stages.gpu_shares import with_gpus
from curator_stages.tasks import Clip, ClipsTask
from nemo_cosmos.contracts import CaptionWindow
from nemo_cosmos.errors import UserError

MOST_IN_VAIN = 8
"""Windows in a row, from a worker's first one on, after which a captioner without an answer counts as broken."""


@dataclass
class CaptionStage(ProcessingStage[ClipsTask, ClipsTask]):
    """Gives clips their caption windows; an answer finds its window by a key, never by position.

    A window without an answer is asked about again, `caption_retries` times; then its clip is rejected with the reason,
    and the next run asks again. When a worker's first windows all go without, the run fails.
    """

    config: CurationConfig
    name: str = "caption"
    resources: Resources = field(default_factory=Resources)
    batch_size: int = 1
    """Spans whose windows are asked about together."""

    def __post_init__(self) -> None:
        """Asks for a GPU where the model is held on one."""
        self.resources = with_gpus(self.resources, captioner_gpus(self.config))

    def inputs(self) -> tuple[list[str], list[str]]:
        """Clips with frames."""
        return ["data", "span"], []

    def outputs(self) -> tuple[list[str], list[str]]:
        """The same clips, captioned."""
        return ["data", "span"], []

    def setup(self, worker_metadata: WorkerMetadata | None = None) -> None:
        """Makes the captioner."""
        self._captioner = make_captioner(self.config)
        self._answered, self._failed = 0, 0

    def process(self, task: ClipsTask) -> ClipsTask:
        """Captions the kept clips of one span."""
        return self.process_batch([task])[0]

    def process_batch(self, tasks: list[ClipsTask]) -> list[ClipsTask]:
        """Captions the kept clips of several spans.

        Raises:
            UserError: The captioner cannot answer at all.
            ValueError: The captioner answered what it was not asked.
        """
        silent = []
        for task in tasks:
            for clip in task.kept():
                record = clip.record
                told = slice_captions(task.span.video.captions, record.start_frame, record.num_frames)
                clip.record = replace(record, captions=told)
                if not told:
                    silent.append(clip)
        if self._captioner is not None and silent:
            self._write(silent, self._captioner)
        return tasks

    def _write(self, clips: Sequence[Clip], captioner: Captioner) -> None:
        config, question = self.config, prompt_of(self.config.caption_prompt)
        windows = [(clip, *window) for clip in clips for window in caption_windows(clip.record.num_frames, config)]
        keys = [f"{clip.record.clip_id}:{start}-{end}" for clip, start, end in windows]
        shown = {key: _frames(clip, start, end, config) for key, (clip, start, end) in zip(keys, windows, strict=True)}
        answers = self._ask(captioner, {key: (shown[key], question) for key in keys})
        if config.caption_refine:
            first = {key: text for key, text in answers.items() if isinstance(text, str)}
            # A refinement that fails leaves the clip without a caption: a set's captions are all made the same way.
            better = {key: (shown[key], refining(question, text)) for key, text in first.items()}
            answers |= self._ask(captioner, better)
        self._check(answers)
        for key, (clip, start, end) in zip(keys, windows, strict=True):
            answer = answers[key]
            if isinstance(answer, CaptionError):
                clip.fail(self.name, f"no caption for frames {start} to {end} ({answer})")
            elif clip.kept:
                window = CaptionWindow(start_frame=start, end_frame=end, text=answer, captioner=config.captioner)
                clip.record = replace(clip.record, captions=(*clip.record.captions, window))

    def _check(self, answers: dict[str, Answer]) -> None:
        """Tells a captioner that does not work from one that now and then fails.

        Raises:
            UserError: It has not answered once.
        """
        errors = [answer for answer in answers.values() if isinstance(answer, CaptionError)]
        self._failed += len(errors)
        self._answered += len(answers) - len(errors)
        if not self._answered and self._failed >= MOST_IN_VAIN:
            raise UserError(
                f"captioner: {self.config.captioner!r} answered none of the first {self._failed} requests "
                f"({errors[0]}). Mend it, or choose `none` to leave clips without captions."
            )

    def _ask(self, captioner: Captioner, questions: dict[str, tuple[np.ndarray, str]]) -> dict[str, Answer]:
        """Asks until all is answered or the tries are used up."""
        answers: dict[str, Answer] = {}
        for _ in range(1 + self.config.caption_retries):
            open_keys = [key for key in questions if not isinstance(answers.get(key), str)]
            if not open_keys:
                break
            requests = [
                CaptionRequest(key=key, frames=questions[key][0], prompt=questions[key][1]) for key in open_keys
            ]
            given = self._given(captioner, requests)
            if unasked := sorted(set(given) - set(open_keys)):
                raise ValueError(f"captioner {self.config.captioner}: answered {unasked[:3]}, which it was not asked")
            for key in open_keys:
                answers[key] = _checked(given.get(key))
        return answers

    def _given(self, captioner: Captioner, requests: list[CaptionRequest]) -> dict[str, Answer]:
        try:
            return captioner.caption(requests)
        except Exception as error:  # noqa: BLE001 - a network or server may raise anything
            reason = reason_of(error, self.name, f"{len(requests)} windows")
            return {request.key: CaptionError(reason) for request in requests}


def caption_windows(num_frames: int, config: CurationConfig) -> list[tuple[int, int]]:
    """Cuts a clip into windows of `caption_window` frames; a rest of less than half joins the window before."""
    length = config.caption_window
    count = max(1, num_frames // length + (num_frames % length >= length / 2))
    return [(i * length, num_frames if i == count - 1 else (i + 1) * length) for i in range(count)]


def _frames(clip: Clip, start: int, end: int, config: CurationConfig) -> np.ndarray:
    """Takes frames from the middles of equal parts of a window."""
    count = min(config.caption_frames, end - start)
    return clip.pixels[start + ((np.arange(count) + 0.5) * (end - start) / count).astype(int)]


def _checked(answer: Answer | None) -> Answer:
    if answer is None:
        return CaptionError("no answer")
    if isinstance(answer, str):
        return answer.strip() or CaptionError("an empty answer")
    return answer
