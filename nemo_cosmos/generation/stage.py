"""Parts of a world model whose weights are in memory all the time, or only while they are used."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Generic, TypeVar

import torch

Part = TypeVar("Part")
Result = TypeVar("Result")


class Stage(Generic[Part]):
    """A model that is loaded when it is first used.

    Args:
        load: Gives the model, on the device where it runs.
        keep: Keep it for the next use; else it is freed after each, and loaded anew for the next.
    """

    def __init__(self, load: Callable[[], Part], *, keep: bool = True) -> None:
        self._load = load
        self._keep = keep
        self._kept: Part | None = None

    @classmethod
    def of(cls, part: Part) -> Stage[Part]:
        """A stage of a model that is loaded already, and stays."""
        return cls(lambda: part)

    def use(self, work: Callable[[Part], Result]) -> Result:
        """Works with the model, in inference mode.

        Args:
            work: Must not hand on the model, or it cannot be freed.

        Returns:
            What `work` returned.
        """
        if self._keep:
            self._kept = self._kept if self._kept is not None else self._load()
            return _infer(work, self._kept)
        try:
            return _infer(work, self._load())
        finally:
            gc.collect()  # modules refer to themselves in circles
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def _infer(work: Callable[[Part], Result], part: Part) -> Result:
    with torch.inference_mode():
        return work(part)
