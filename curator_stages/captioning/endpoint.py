"""Captions by a server with OpenAI's interface: vLLM's, NIM, TensorRT-LLM's, or a hosted one."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from curator_stages.captioning.captioner import Answer, CaptionError, CaptionRequest
from curator_stages.captioning.messages import chat_of
from curator_stages.config import CurationConfig
from nemo_cosmos.errors import UserError


class EndpointCaptioner:
    """Asks several questions at once; the key in `OPENAI_API_KEY`, where the server wants one."""

    def __init__(self, config: CurationConfig, model: str) -> None:
        """Makes the client; nothing is sent yet.

        Args:
            config: `caption_endpoint`, `caption_batch`, `caption_max_tokens` and `caption_timeout_s` count here.
            model: Name that the server knows the model by.

        Raises:
            UserError: No address is set, or the package is missing.
        """
        if not config.caption_endpoint:
            raise UserError(
                f"caption_endpoint: not set, but captioner is {config.captioner!r}. "
                "Give the server's address, e.g. http://localhost:8000/v1."
            )
        try:
            import openai
        except ImportError as error:
            raise UserError("captioner: `openai:` needs the package openai. Install it.") from error
        self._config, self._model = config, model
        # The client itself tries again what is worth it: lost connections, time-outs, 429 and 5xx.
        self._client = openai.OpenAI(
            base_url=config.caption_endpoint,
            api_key=os.environ.get("OPENAI_API_KEY", "none"),
            timeout=config.caption_timeout_s,
            max_retries=2,
        )

    def check(self) -> None:
        """Asks the server for its models.

        Raises:
            UserError: Nothing answers, it refuses, or it has no such model.
        """
        import openai

        try:
            models = [model.id for model in self._client.models.list()]
        except openai.OpenAIError as error:
            raise self._unavailable(error) from error
        if models and self._model not in models:
            raise UserError(
                f"captioner: {self._config.caption_endpoint} has no model {self._model!r}, expected one of "
                f"{', '.join(models[:5])}. Name one of these."
            )

    def caption(self, requests: Sequence[CaptionRequest]) -> dict[str, Answer]:
        """Answers requests, `caption_batch` of them at a time.

        Raises:
            UserError: The server is gone, or refuses the key or the model.
        """
        with ThreadPoolExecutor(self._config.caption_batch) as pool:
            return dict(zip([r.key for r in requests], pool.map(self._ask, requests), strict=True))

    def _ask(self, request: CaptionRequest) -> Answer:
        import openai

        try:
            completion = self._client.chat.completions.create(
                model=self._model,
                messages=chat_of(request),  # type: ignore[arg-type]
                max_tokens=self._config.caption_max_tokens,
                temperature=0.0,
            )
        except openai.APITimeoutError as error:
            return CaptionError(str(error))
        except (openai.APIConnectionError, openai.AuthenticationError, openai.NotFoundError) as error:
            raise self._unavailable(error) from error
        except openai.APIStatusError as error:
            return CaptionError(f"HTTP {error.status_code}: {error.message}")
        except openai.OpenAIError as error:
            return CaptionError(str(error))
        return (completion.choices[0].message.content or "") if completion.choices else ""

    def _unavailable(self, error: Exception) -> UserError:
        return UserError(
            f"captioner: {self._config.caption_endpoint} does not work ({error}). Start the server or correct "
            "caption_endpoint; captioner `none` leaves clips without captions."
        )
