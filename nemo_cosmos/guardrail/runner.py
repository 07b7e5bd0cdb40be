"""Runs named guards over prompts and videos, and closes when one of them breaks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, Self, TypeVar

import numpy as np

from nemo_cosmos.contracts import Verdict
from nemo_cosmos.errors import user_error
from nemo_cosmos.guardrail.blocklist import Blocklist
from nemo_cosmos.guardrail.content import ContentFilter
from nemo_cosmos.guardrail.faces import FaceBlur
from nemo_cosmos.guardrail.toxicity import Toxicity
from nemo_cosmos.guardrail.verdict import failed_verdict

Guard = TypeVar("Guard")


class PromptGuard(Protocol):
    """Judges prompts."""

    name: str

    def check(self, prompt: str) -> Verdict:
        """Judges one prompt."""


class VideoGuard(Protocol):
    """Judges videos and may change them."""

    name: str

    def check(self, frames: np.ndarray, fps: float) -> tuple[np.ndarray, Verdict]:
        """Judges uint8 RGB [T, H, W, 3] and returns the frames that may be shown, of the same shape."""


PROMPT_GUARDS: Mapping[str, Callable[[], PromptGuard]] = {Blocklist.name: Blocklist, Toxicity.name: Toxicity}
"""Guards for prompts by name, in the order in which they run."""

VIDEO_GUARDS: Mapping[str, Callable[[], VideoGuard]] = {ContentFilter.name: ContentFilter, FaceBlur.name: FaceBlur}
"""Guards for videos by name, in the order in which they run."""


class PreGuard:
    """All prompt guards together."""

    def __init__(self, guards: Sequence[PromptGuard]) -> None:
        """Takes guards that are already loaded.

        Raises:
            UserError: There is none; no guard is not the same as a safe prompt.
        """
        self._guards = _at_least_one(guards, "prompt guards")

    @classmethod
    def from_names(cls, names: Sequence[str] = tuple(PROMPT_GUARDS)) -> Self:
        """Loads guards by name, with their default settings.

        Raises:
            UserError: A name is unknown or a package is missing.
        """
        return cls(_load(names, PROMPT_GUARDS, "prompt guards"))

    def guard_prompt(self, prompt: str) -> list[Verdict]:
        """Returns one verdict per guard; a guard that raises counts as unsafe."""
        verdicts = []
        for guard in self._guards:
            try:
                verdicts.append(guard.check(prompt))
            except Exception as error:  # whatever it is, the prompt was not judged
                verdicts.append(failed_verdict(guard.name, error))
        return verdicts


class PostGuard:
    """All video guards together."""

    def __init__(self, guards: Sequence[VideoGuard]) -> None:
        """Takes guards that are already loaded, in the order in which they shall run.

        Raises:
            UserError: There is none.
        """
        self._guards = _at_least_one(guards, "video guards")

    @classmethod
    def from_names(cls, names: Sequence[str] = tuple(VIDEO_GUARDS)) -> Self:
        """Loads guards by name, with their default settings.

        Raises:
            UserError: A name is unknown or a package is missing.
        """
        return cls(_load(names, VIDEO_GUARDS, "video guards"))

    def guard_video(self, frames: np.ndarray, fps: float) -> tuple[np.ndarray, list[Verdict]]:
        """Runs every guard, each on what the one before it returned.

        Args:
            frames: uint8 RGB [T, H, W, 3].
            fps: Frames per second.

        Returns:
            The frames that may be shown (faces pixelated) and one verdict per guard. When a guard raises, its verdict
            is unsafe and the frames come back black: nothing that was not judged gets out by mistake.

        Raises:
            UserError: The frames are not uint8 [T, H, W, 3].
        """
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
            raise user_error("frames", f"{frames.dtype} {frames.shape}", "uint8 [T, H, W, 3]", "Convert them first.")
        verdicts, failed = [], False
        for guard in self._guards:
            try:
                frames, verdict = guard.check(frames, fps)
            except Exception as error:  # whatever it is, the video was not judged
                verdict, failed = failed_verdict(guard.name, error), True
            verdicts.append(verdict)
        return (np.zeros_like(frames) if failed else frames), verdicts


def _at_least_one(guards: Sequence[Guard], what: str) -> list[Guard]:
    if not guards:
        raise user_error(what, [], "at least one guard", "To run unguarded, do not call the guards at all.")
    return list(guards)


def _load(names: Sequence[str], known: Mapping[str, Callable[[], Guard]], what: str) -> list[Guard]:
    unknown = [name for name in names if name not in known]
    if unknown:
        raise user_error(what, unknown, f"names out of {', '.join(known)}", "Correct the list.")
    return [known[name]() for name in known if name in names]
