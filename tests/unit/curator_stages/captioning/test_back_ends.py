"""The back-ends: transformers on tiny models of the class, an OpenAI-compatible server, vLLM's interface."""

from __future__ import annotations

import importlib.machinery
import sys
import threading
import time
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from curator_stages.captioning import endpoint
from curator_stages.captioning.captioner import (
    CaptionError,
    CaptionRequest,
    captioner_gpus,
    check_captioner,
    make_captioner,
)
from curator_stages.captioning.prompts import PROMPTS, prompt_of
from curator_stages.config import CurationConfig
from nemo_cosmos.errors import UserError
from nemo_cosmos.files import write_json
from tests.unit.curator_stages.captioning import tiny_vlm
from tests.unit.curator_stages.captioning.chat_server import serving


def config(captioner: str, **settings: object) -> CurationConfig:
    return CurationConfig(captioner=captioner, **settings)


def requests(count: int, *, num_frames: int = 2) -> list[CaptionRequest]:
    """Each shows its number as its brightness."""
    return [
        CaptionRequest(
            key=f"k{i}", frames=np.full((num_frames, 64, 64, 3), 10 * i, np.uint8), prompt="Say" + " more" * (i % 3)
        )
        for i in range(count)
    ]


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl"])
def test_transformers_answers_each_request_alone_or_in_batches(tmp_path: Path, kind: str) -> None:
    folder = tiny_vlm.save(tmp_path, kind)
    check_captioner(config(f"transformers:{folder}"))
    captioner = make_captioner(config(f"transformers:{folder}", caption_max_tokens=6, caption_batch=3))
    rng = np.random.default_rng(0)
    asked = [replace(r, frames=rng.integers(0, 256, r.frames.shape, dtype=np.uint8)) for r in requests(5)]
    answers = captioner.caption(asked)
    assert list(answers) == ["k0", "k1", "k2", "k3", "k4"]
    # Padding on the left and other requests in the batch change nothing.
    assert all(captioner.caption([request]) == {request.key: answers[request.key]} for request in asked)
    assert answers["k0"] != answers["k3"]  # same prompt, other pictures
    assert not any("<|" in text for text in answers.values())


def test_transformers_refuses_what_it_cannot_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be loaded"):
        check_captioner(config(f"transformers:{tmp_path / 'nothing'}"))
    write_json(tmp_path / "config.json", {"model_type": "bert"})
    with pytest.raises(UserError, match="class bert"):
        check_captioner(config(f"transformers:{tmp_path}"))


def test_endpoint_shows_frames_and_keeps_answers_apart() -> None:
    busy, most = [0], [0]

    def reply(pictures: list[np.ndarray], prompt: str) -> tuple[int, str]:
        busy[0] += 1
        most[0] = max(most[0], busy[0])
        number = round(pictures[0].mean() / 10)
        time.sleep(0.02 * (8 - number) / 8)  # the last one is answered first
        busy[0] -= 1
        return 200, f"{len(pictures)} pictures of {number}: {prompt}"

    with serving(reply) as address:
        settings = config("openai:eye", caption_endpoint=address, caption_batch=4)
        check_captioner(settings)
        asked = requests(8, num_frames=3)
        answers = make_captioner(settings).caption(asked)
    assert answers == {r.key: f"3 pictures of {i}: {r.prompt}" for i, r in enumerate(asked)}
    assert 2 <= most[0] <= 4


def test_endpoint_tries_again_and_tells_what_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    tries: dict[int, int] = {}
    lock = threading.Lock()

    def reply(pictures: list[np.ndarray], prompt: str) -> tuple[int, str]:
        number = round(pictures[0].mean() / 10)
        with lock:
            tries[number] = tries.get(number, 0) + 1
        if number == 1:
            return 400, "not for children"
        return (503, "busy") if number == 2 and tries[2] < 3 else (200, f"{number}")

    monkeypatch.setattr("openai._base_client.BaseClient._calculate_retry_timeout", lambda *_, **__: 0.0)
    with serving(reply) as address:
        answers = make_captioner(config("openai:eye", caption_endpoint=address)).caption(requests(4))
    assert isinstance(answers["k1"], CaptionError) and "HTTP 400" in str(answers["k1"])
    assert (answers["k0"], answers["k2"], answers["k3"]) == ("0", "2", "3") and tries[2] == 3


def test_endpoint_that_is_not_there_is_a_user_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openai._base_client.BaseClient._calculate_retry_timeout", lambda *_, **__: 0.0)
    with pytest.raises(UserError, match="caption_endpoint: not set"):
        check_captioner(config("openai:eye"))
    gone = config("openai:eye", caption_endpoint="http://127.0.0.1:9/v1")
    with pytest.raises(UserError, match="does not work"):
        check_captioner(gone)
    with pytest.raises(UserError, match="does not work"):
        endpoint.EndpointCaptioner(gone, "eye").caption(requests(1))
    with serving(lambda *_: (200, "")) as address, pytest.raises(UserError, match="has no model 'ear'.*eye"):
        check_captioner(config("openai:ear", caption_endpoint=address))


def test_vllm_missing_is_a_user_error() -> None:
    with pytest.raises(UserError, match="needs the package vllm"):
        check_captioner(config("vllm:Qwen/Qwen2.5-VL-7B-Instruct"))


def test_vllm_is_asked_in_one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    class Engine:
        def __init__(self, model: str, limit_mm_per_prompt: dict[str, int]) -> None:
            assert (model, limit_mm_per_prompt) == ("eye", {"image": 8})

        def chat(self, messages: list, sampling_params: types.SimpleNamespace, use_tqdm: bool) -> list:
            assert sampling_params.max_tokens == 512
            texts = [chat[0]["content"][-1]["text"] + f" of {len(chat[0]['content']) - 1}" for chat in messages]
            return [types.SimpleNamespace(outputs=[types.SimpleNamespace(text=text)]) for text in texts]

    module = types.ModuleType("vllm")
    module.__spec__ = importlib.machinery.ModuleSpec("vllm", None)
    module.LLM, module.SamplingParams = Engine, lambda **values: types.SimpleNamespace(**values)
    monkeypatch.setitem(sys.modules, "vllm", module)
    check_captioner(config("vllm:eye"))
    assert make_captioner(config("vllm:eye")).caption(requests(2)) == {"k0": "Say of 2", "k1": "Say more of 2"}


@pytest.mark.parametrize(
    "name", ["no_such_package:Captioner", "curator_stages.tasks:NoSuchCaptioner", "vila", "transformers", "none:x"]
)
def test_unknown_captioner_is_a_user_error(name: str) -> None:
    for build in (make_captioner, check_captioner):
        with pytest.raises(UserError, match=name):
            build(config(name))


def test_gpus_are_asked_for_where_a_model_runs_in_the_stage() -> None:
    assert [captioner_gpus(config(c)) for c in ("none", "openai:x", "vllm:x", "transformers:x")] == [0, 0, 1, 0]
    assert captioner_gpus(config("transformers:x", device="cuda")) == 1


def test_prompts_by_name_or_in_words() -> None:
    assert prompt_of("driving") == PROMPTS["driving"]
    assert prompt_of("What is this?") == "What is this?"
    with pytest.raises(UserError, match="caption_prompt"):
        check_captioner(config("none", caption_prompt="drivign"))
