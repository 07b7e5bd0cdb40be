"""States of captions: which, beside which clip, and the same as tokenizing would make."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from curator_stages.config import CurationConfig
from curator_stages.pipeline import curate, in_process_workers
from curator_stages.stages.text_embed import TextEmbedStage
from curator_stages.tasks import Clip, ClipsTask, VideoSpan
from nemo_cosmos.contracts import CaptionWindow, ClipRecord, RawVideo
from nemo_cosmos.errors import UserError
from nemo_cosmos.text import load_text_encoder, text_encoder_fingerprint, unpack_text_states
from nemo_cosmos.text.cache import hash_of
from tests.unit.text.tiny_t5 import write_tiny_t5


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_t5(tmp_path_factory.mktemp("t5")))


def clip_of(name: str, *texts: str) -> Clip:
    windows = tuple(
        CaptionWindow(start_frame=i, end_frame=i + 1, text=text, captioner="c") for i, text in enumerate(texts)
    )
    record = ClipRecord(
        clip_id=name, source_video="v", source="s", rollout="v", split="train", start_frame=0, num_frames=9, fps=1.0,
        height=4, width=4, captions=windows,
    )  # fmt: skip
    return Clip(record=record)


def task_of(*clips: Clip) -> ClipsTask:
    video = RawVideo(source="s", rollout="v", fps=1.0, num_frames=9, split="train")
    span = VideoSpan(path="v", source_video="v", key="k", video=video, simulated=False)
    return ClipsTask(dataset_name="d", data=list(clips), span=span)


def test_each_clip_gets_the_states_of_its_own_captions(t5: str) -> None:
    texts = {"one": ("a car turns", "it stops"), "two": ("an arm lifts",), "silent": (), "empty": ("",)}
    clips = {name: clip_of(name, *captions) for name, captions in texts.items()}
    clips["rejected"] = clip_of("rejected", "a tree")
    clips["rejected"].reject("motion_filter", "still")
    stage = TextEmbedStage(text_encoder=t5)
    stage.setup()
    stage.process(task_of(*clips.values()))
    assert {name for name, clip in clips.items() if clip.text_states} == {"one", "two"}
    for name in ("one", "two"):
        found = unpack_text_states(clips[name].text_states, text_encoder_fingerprint(t5), name=name)
        assert found.keys() == {hash_of(text) for text in texts[name]}
        states, mask = load_text_encoder(t5).encode(list(texts[name]))
        for row, text in enumerate(texts[name]):
            assert torch.equal(found[hash_of(text)], states[row][mask[row]].bfloat16())


def test_a_caption_that_many_clips_share_is_encoded_once(t5: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = TextEmbedStage(text_encoder=t5)
    stage.setup()
    encoded: list[str] = []
    states = stage._encoder.states
    monkeypatch.setattr(stage._encoder, "states", lambda text: encoded.append(text) or states(text))
    for _ in range(2):
        stage.process(task_of(clip_of("one", "a car", "a car"), clip_of("two", "a car")))
    assert encoded == ["a car"]


def test_an_unknown_encoder_fails_before_any_work(videos: Path, tmp_path: Path, config: CurationConfig) -> None:
    with pytest.raises(UserError, match="text encoder: got 'clip'"):
        curate(videos, tmp_path / "out", replace(config, text_encoder="clip"), progress=False)
    assert not (tmp_path / "out").exists()


def test_t5_is_not_loaded_by_many_processes(t5: str, config: CurationConfig) -> None:
    assert in_process_workers(replace(config, text_encoder=t5)) == 1
    assert in_process_workers(replace(config, text_encoder="minilm-l6")) is None
