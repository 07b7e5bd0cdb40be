"""Who writes captions."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Protocol

from curator_stages.tasks import Clip
from nemo_cosmos.contracts import CaptionWindow
from nemo_cosmos.errors import UserError, user_error


class Captioner(Protocol):
    """Captions clips. A class of your own is named in the config as `module:Class` and made without arguments.

    The constructor checks that all it needs is there and raises `UserError` where it is not: it is called before
    any video is touched.
    """

    def caption(self, clips: Sequence[Clip]) -> dict[str, tuple[CaptionWindow, ...]]:
        """Returns the captions of each clip by `clip_id`, in any order; every clip has an entry."""
        ...


class NoCaptions:
    """Leaves clips without captions: chosen where captions come from sidecars, or not at all."""

    def caption(self, clips: Sequence[Clip]) -> dict[str, tuple[CaptionWindow, ...]]:
        """Returns an empty tuple per clip."""
        return {clip.record.clip_id: () for clip in clips}


def make_captioner(name: str) -> Captioner:
    """Builds a captioner by its name in the config.

    Raises:
        UserError: There is no such captioner, or it cannot run here.
    """
    if name in ("none", "simulator"):
        return NoCaptions()
    module_name, _, class_name = name.partition(":")
    if not class_name:
        raise user_error("captioner", name, "`none`, `simulator` or `module:Class`", "Choose one of these.")
    try:
        captioner = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"captioner: {name!r} cannot be loaded ({error}). Install its package, correct the name, or choose `none`."
        ) from error
    return captioner()
