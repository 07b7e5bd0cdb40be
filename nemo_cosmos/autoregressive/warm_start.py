"""Starting a run from whole weights, in any parallel layout."""

from __future__ import annotations

from pathlib import Path

import torch

from nemo_cosmos.autoregressive.config import ARConfig
from nemo_cosmos.autoregressive.initialization import first_values, own_weight
from nemo_cosmos.autoregressive.model import CosmosAR
from nemo_cosmos.transformer import weights

ACTION_LAYERS = ("action_embedder.",)
"""Prefix of what a model without actions lacks."""

MEDUSA_HEADS = ("medusa_heads.",)
"""Prefix of what a model without Medusa heads lacks."""

_EMBEDDING = "embedding.weight"


def text_layers(num_layers: int) -> tuple[str, ...]:
    """Prefixes of what a model without text lacks: cross-attention, and the embeddings of the special tokens.

    Args:
        num_layers: Of the model.
    """
    parts = ("cross_attention.", "pre_cross_attn_layernorm.")
    return (_EMBEDDING, *(f"layers.{number}.{part}" for number in range(num_layers) for part in parts))


def load_whole_weights(model: CosmosAR, path: str | Path, *, may_lack: tuple[str, ...] = ()) -> None:
    """Copies this rank's share of a safetensors file of whole weights, one weight at a time.

    Args:
        model: This rank's part of the network.
        path: Weights under our names, as one rank holds them; or their address on the hub.
        may_lack: Prefixes of names that may be absent; such weights keep their values. Where the embedding is among
            them, it may lack its last rows.

    Raises:
        UserError: The file is missing, or a weight is missing or of another shape.
    """

    def own(name: str, whole: torch.Tensor) -> torch.Tensor:
        if name == _EMBEDDING and name.startswith(may_lack):
            whole = _with_special_tokens(whole, model.config)
        return own_weight(name, whole, model.groups.tp)

    weights.load_whole_weights(model.global_tensors(), path, own, may_lack=may_lack)


def _with_special_tokens(whole: torch.Tensor, config: ARConfig) -> torch.Tensor:
    """An embedding of the codes, and behind them the first values of the rows that it lacks."""
    missing = config.num_embeddings - whole.shape[0]
    if missing <= 0:
        return whole
    first = first_values(_EMBEDDING, torch.empty(config.num_embeddings, *whole.shape[1:]), config)
    return torch.cat([whole, first[-missing:].to(whole.dtype)])
