"""The caption stage: which window an answer lands on, whatever the captioner does."""

from __future__ import annotations

import sys
import types
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curator_stages.captioning.captioner import Answer, CaptionError, CaptionRequest
from curator_stages.config import CurationConfig
from curator_stages.pipeline import curate
from curator_stages.stages.caption import CaptionStage, caption_windows
from curator_stages.tasks import Clip, ClipsTask, VideoSpan
from nemo_cosmos.contracts import CaptionWindow, ClipRecord, RawVideo
from nemo_cosmos.errors import UserError

CONFIG = CurationConfig(captioner="my_captioners:Eye", caption_window=20, caption_frames=3)


def clip_of(number: int, num_frames: int) -> Clip:
    """A clip whose pixels tell clip (red) and frame (green)."""
    frames = np.zeros((num_frames, 4, 4, 3), np.uint8)
    frames[..., 0], frames[..., 1] = number, np.arange(num_frames)[:, None, None]
    record = ClipRecord(
        clip_id=f"clip{number}", source_video="a.mp4", source="s", rollout="a", split="train", start_frame=0,
        num_frames=num_frames, fps=10.0, height=4, width=4,
    )  # fmt: skip
    return Clip(record=record, frames=frames)


def task_of(clips: list[Clip], captions: tuple[CaptionWindow, ...] = ()) -> ClipsTask:
    video = RawVideo(source="s", rollout="a", fps=10.0, num_frames=99, split="train", captions=captions)
    span = VideoSpan(path="a.mp4", source_video="a.mp4", key="k", video=video, simulated=False)
    return ClipsTask(dataset_name="d", data=clips, span=span)


class Eye:
    """Says what it sees: clip, first and last frame shown, and whether it was asked to refine what it said."""

    def caption(self, requests: Sequence[CaptionRequest]) -> dict[str, Answer]:
        return {request.key: self.look(request) for request in requests}

    def look(self, request: CaptionRequest) -> Answer:
        shown = request.frames
        assert len(set(shown[..., 0].ravel())) == 1
        seen = f"clip {shown[0, 0, 0, 0]} frames {shown[0, 0, 0, 1]} to {shown[-1, 0, 0, 1]}"
        return f"better {seen}" if seen in request.prompt else seen


class Unsteady(Eye):
    """Shuffles, fails, forgets and says nothing as a random generator bids."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)

    def caption(self, requests: Sequence[CaptionRequest]) -> dict[str, Answer]:
        answers: dict[str, Answer] = {}
        for place in self._rng.permutation(len(requests)):
            request, fate = requests[place], self._rng.random()
            if fate < 0.2:
                answers[request.key] = CaptionError("HTTP 500")
            elif fate < 0.3:
                answers[request.key] = "  "
            elif fate < 0.9:
                answers[request.key] = self.look(request)
        return answers


def stage_with(captioner: object, config: CurationConfig = CONFIG) -> CaptionStage:
    module = types.ModuleType("my_captioners")
    module.Eye = lambda: captioner
    sys.modules["my_captioners"] = module
    try:
        stage = CaptionStage(config=config)
        stage.setup()
    finally:
        del sys.modules["my_captioners"]
    return stage


def seen_in(number: int, start: int, end: int, *, refined: bool = False) -> str:
    middles = [start + int((i + 0.5) * (end - start) / 3) for i in range(3)]
    return f"{'better ' if refined else ''}clip {number} frames {middles[0]} to {middles[-1]}"


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    lengths=st.lists(st.lists(st.integers(3, 75), min_size=1, max_size=4), min_size=1, max_size=3),
    refine=st.booleans(),
    retries=st.integers(0, 3),
)
def test_a_caption_never_lands_on_another_window(
    seed: int, lengths: list[list[int]], refine: bool, retries: int
) -> None:
    config = replace(CONFIG, caption_refine=refine, caption_retries=retries)
    numbers = iter(range(100))
    tasks = [task_of([clip_of(next(numbers), length) for length in span]) for span in lengths]
    stage = stage_with(Unsteady(seed), config)
    stage._answered = 1  # it has worked before: failures are its windows' own
    captioned = stage.process_batch(tasks)
    assert captioned == tasks
    for clip in (clip for task in captioned for clip in task.data):
        number = int(clip.record.clip_id.removeprefix("clip"))
        windows = caption_windows(clip.record.num_frames, config)
        if clip.kept:
            expected = [(s, e, seen_in(number, s, e, refined=refine)) for s, e in windows]
            assert [(w.start_frame, w.end_frame, w.text) for w in clip.record.captions] == expected
        else:
            assert clip.record.rejected_by == "caption" and "no caption for frames" in clip.record.rejected_reason


def test_a_stage_that_is_run_again_on_the_same_clips_gives_the_same() -> None:
    task = task_of([clip_of(1, 50)])
    stage = stage_with(Eye())
    first = stage.process(task).data[0].record
    assert stage.process(task).data[0].record == first and len(first.captions) == 3


def test_failures_are_asked_about_again_before_a_clip_is_rejected() -> None:
    class Late(Eye):
        rounds = 0

        def caption(self, requests: Sequence[CaptionRequest]) -> dict[str, Answer]:
            self.rounds += 1
            open_keys = [r.key for r in requests]
            assert self.rounds == 1 or open_keys == ["clip1:0-20"]
            fails = "clip1:0-20" if self.rounds < 4 else None
            return super().caption([r for r in requests if r.key != fails])

    for retries, kept in ((2, False), (3, True)):
        clips = [clip_of(0, 20), clip_of(1, 40), clip_of(2, 20)]
        stage_with(Late(), replace(CONFIG, caption_retries=retries)).process(task_of(clips))
        assert [clip.kept for clip in clips] == [True, kept, True]
        assert [clip.failed for clip in clips] == [False, not kept, False]  # the next run asks again
    assert [w.text for w in clips[1].record.captions] == [seen_in(1, 0, 20), seen_in(1, 20, 40)]


def test_an_answer_to_no_question_is_a_fault() -> None:
    class Confused(Eye):
        def caption(self, requests: Sequence[CaptionRequest]) -> dict[str, Answer]:
            return super().caption(requests) | {"clip9:0-20": "something else"}

    with pytest.raises(ValueError, match="clip9:0-20"):
        stage_with(Confused()).process(task_of([clip_of(0, 20)]))


def test_a_captioner_that_never_answers_fails_the_run() -> None:
    class Dead:
        def caption(self, requests: Sequence[CaptionRequest]) -> dict[str, Answer]:
            return {request.key: CaptionError("HTTP 500") for request in requests}

    stage = stage_with(Dead())
    stage.process(task_of([clip_of(n, 20) for n in range(4)]))
    with pytest.raises(UserError, match="none of the first 8 requests .HTTP 500."):
        stage.process(task_of([clip_of(n, 20) for n in range(4)]))


def test_a_captioner_that_breaks_on_a_batch_is_asked_again() -> None:
    class Breaking(Eye):
        calls = 0

        def caption(self, requests: Sequence[CaptionRequest]) -> dict[str, Answer]:
            self.calls += 1
            if self.calls < 3:
                raise RuntimeError("out of memory")
            return super().caption(requests)

    for retries, reason in ((1, "no caption for frames 0 to 20 (RuntimeError: out of memory)"), (2, None)):
        clip = clip_of(1, 20)
        stage_with(Breaking(), replace(CONFIG, caption_retries=retries)).process(task_of([clip]))
        assert (clip.failed, clip.record.rejected_reason) == (reason is not None, reason)


def test_sidecar_captions_win_and_are_cut_to_the_clip() -> None:
    told = (CaptionWindow(start_frame=0, end_frame=15, text="told", captioner="simulator"),)
    clips = [clip_of(0, 10), clip_of(1, 10)]
    clips[1].record = replace(clips[1].record, start_frame=20)
    stage_with(Eye()).process(task_of(clips, told))
    assert clips[0].record.captions == (replace(told[0], end_frame=10),)
    assert [w.text for w in clips[1].record.captions] == [seen_in(1, 0, 10)]


@pytest.mark.parametrize(
    ("num_frames", "expected"),
    [
        (100, [(0, 100)]),
        (256, [(0, 256)]),
        (383, [(0, 383)]),
        (384, [(0, 256), (256, 384)]),
        (520, [(0, 256), (256, 520)]),
    ],
)
def test_windows_of_256_frames(num_frames: int, expected: list[tuple[int, int]]) -> None:
    assert caption_windows(num_frames, CurationConfig(captioner="none")) == expected


def test_without_a_back_end_the_run_fails_before_any_work(videos: Path, tmp_path: Path, config: CurationConfig) -> None:
    for captioner in ("vllm:Qwen/Qwen2.5-VL-7B-Instruct", "openai:eye", f"transformers:{tmp_path / 'none'}"):
        with pytest.raises(UserError, match="caption"):
            curate(videos, tmp_path / "out", replace(config, captioner=captioner), progress=False)
    assert not (tmp_path / "out").exists()
