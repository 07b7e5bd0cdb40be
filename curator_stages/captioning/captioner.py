"""Who writes captions: the interface of all back-ends, and which one a config names."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from curator_stages.captioning.prompts import prompt_of
from curator_stages.config import CurationConfig
from nemo_cosmos.errors import UserError, user_error

SILENT = ("none", "simulator")
"""Captioners of configs that write nothing: captions come from sidecars, or not at all."""
BACK_ENDS = ("transformers", "vllm", "openai")


class CaptionError(Exception):
    """Why one window got no caption; another try may give it one."""


@dataclass(frozen=True, kw_only=True)
class CaptionRequest:
    """A question about one window of one clip."""

    key: str
    """Names clip and window, the same in every round of questions; the answer comes back under it."""
    frames: np.ndarray
    """uint8 RGB [N, H, W, 3], evenly spaced over the window."""
    prompt: str


Answer = str | CaptionError


class Captioner(Protocol):
    """Answers requests. A class of your own is named in the config as `module:Class` and made without arguments.

    The constructor checks that all it needs is there and raises `UserError` where it is not: it is called before any
    video is touched.
    """

    def caption(self, requests: Sequence[CaptionRequest]) -> dict[str, Answer]:
        """Answers requests, in any order.

        Args:
            requests: Questions, each with a key of its own.

        Returns:
            Text or error by key. A key that is left out counts as an error; one that was not asked for is a fault.

        Raises:
            UserError: It cannot answer at all.
        """
        ...


def check_captioner(config: CurationConfig) -> None:
    """Makes sure, before any video is touched and without loading a model, that the captioner can work.

    Raises:
        UserError: There is no such captioner, its package or model is missing, or nothing answers at its address.
    """
    prompt_of(config.caption_prompt)
    kind, model = _named(config)
    if kind == "openai":
        from curator_stages.captioning.endpoint import EndpointCaptioner

        EndpointCaptioner(config, model).check()
    elif kind == "vllm":
        from curator_stages.captioning.vllm_engine import check_installed

        check_installed()
    elif kind == "transformers":
        from curator_stages.captioning.transformers_vlm import check_model

        check_model(model)
    elif kind not in SILENT:
        _own(config.captioner)


def make_captioner(config: CurationConfig) -> Captioner | None:
    """Builds the captioner that the config names; None where it writes nothing.

    Raises:
        UserError: There is no such captioner, or it cannot run here.
    """
    kind, model = _named(config)
    if kind in SILENT:
        return None
    if kind == "openai":
        from curator_stages.captioning.endpoint import EndpointCaptioner

        return EndpointCaptioner(config, model)
    if kind == "vllm":
        from curator_stages.captioning.vllm_engine import VllmCaptioner

        return VllmCaptioner(config, model)
    if kind == "transformers":
        from curator_stages.captioning.transformers_vlm import TransformersCaptioner

        return TransformersCaptioner(config, model)
    return _own(config.captioner)


def captioner_gpus(config: CurationConfig) -> float:
    """GPUs that a captioning worker needs: vLLM one always, transformers where `device` is one, others none."""
    kind = _named(config)[0]
    return float(kind == "vllm" or (kind == "transformers" and config.device != "cpu"))


def loads_model(config: CurationConfig) -> bool:
    """Whether the captioner has, or may have, a model in the memory of the process."""
    return _named(config)[0] not in (*SILENT, "openai")


def _named(config: CurationConfig) -> tuple[str, str]:
    """Splits `transformers:Qwen/Qwen2.5-VL-7B-Instruct` into back-end and model."""
    kind, colon, model = config.captioner.partition(":")
    if kind in (*SILENT, *BACK_ENDS) and bool(model) == (kind in BACK_ENDS):
        return kind, model
    if colon and model and kind not in (*SILENT, *BACK_ENDS):
        return "own", ""
    raise user_error(
        "captioner",
        config.captioner,
        "`none`, `simulator`, `transformers:MODEL`, `vllm:MODEL`, `openai:MODEL` or `module:Class`",
        "Choose one of these; `none` leaves clips without captions.",
    )


def _own(name: str) -> Captioner:
    module_name, _, class_name = name.partition(":")
    try:
        captioner = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"captioner: {name!r} cannot be loaded ({error}). Install its package, correct the name, or choose `none`."
        ) from error
    return captioner()
