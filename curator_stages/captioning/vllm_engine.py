"""Captions by vLLM in this process, on a GPU."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

from curator_stages.captioning.captioner import Answer, CaptionRequest
from curator_stages.captioning.messages import chat_of
from curator_stages.config import CurationConfig
from nemo_cosmos.errors import UserError


def check_installed() -> None:
    """Makes sure that vLLM is there, without importing it.

    Raises:
        UserError: It is not.
    """
    if importlib.util.find_spec("vllm") is None:
        raise UserError(
            "captioner: `vllm:` needs the package vllm, which is not installed here. Install it on the GPU nodes, name "
            "a server with `openai:`, or choose `none` to leave clips without captions."
        )


class VllmCaptioner:
    """A vision-language model of any class that vLLM serves; requests of a call form one batch."""

    def __init__(self, config: CurationConfig, model: str) -> None:
        """Loads the model.

        Args:
            config: `caption_frames` and `caption_max_tokens` count here.
            model: Folder, or name on the Hugging Face hub.

        Raises:
            UserError: vLLM is missing, or cannot load the model.
        """
        check_installed()
        import vllm

        try:
            self._engine = vllm.LLM(model=model, limit_mm_per_prompt={"image": config.caption_frames})
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"captioner: vLLM cannot load {model!r} ({error}). Correct the model's name.") from error
        self._sampling = vllm.SamplingParams(temperature=0.0, max_tokens=config.caption_max_tokens)

    def caption(self, requests: Sequence[CaptionRequest]) -> dict[str, Answer]:
        """Answers requests; vLLM batches them as its memory allows and answers in their order."""
        if not requests:
            return {}
        results = self._engine.chat([chat_of(request) for request in requests], self._sampling, use_tqdm=False)
        return {request.key: r.outputs[0].text for request, r in zip(requests, results, strict=True)}
