"""Which published model reference weights are, told by their names and shapes.

Cosmos-1.0-Autoregressive-{4B,5B-Video2World,12B,13B-Video2World} and Cosmos-Predict1-{4B,5B-Video2World,12B,
13B-Video2World}, and what was post-trained from them, all hold their weights under the same names.
"""

from __future__ import annotations

import re
from typing import Any

import torch

from nemo_cosmos.autoregressive.config import PRESETS, ARConfig
from nemo_cosmos.autoregressive.state_dict import plain_names
from nemo_cosmos.errors import UserError, user_error
from nemo_cosmos.weight_files.stored_tensor import Weights

_LAYER = re.compile(r"layers\.(\d+)\.")
_EMBEDDING = "tok_embeddings.weight"
_ACTIONS = "action_embedding_layers.0.weight"
_PUBLISHED = ("autoregressive_4b", "autoregressive_5b", "autoregressive_12b", "autoregressive_13b")


def is_reference(weights: Weights) -> bool:
    """Tells whether weights have an autoregressive WFM's names of the reference."""
    return _EMBEDDING in weights or f"model.{_EMBEDDING}" in weights


def config_of_reference(weights: Weights, preset: str | None = None) -> ARConfig:
    """The configuration of reference weights.

    Args:
        weights: Under the reference's names.
        preset: The model's name in `PRESETS`; None finds the published one of these shapes.

    Raises:
        UserError: A weight that tells the architecture is missing, or no model of that name, or no published one, has
            such shapes.
    """
    told = _told_by_shapes(plain_names(weights))
    for name in _PUBLISHED if preset is None else (preset,):
        config = PRESETS[name]()
        if all(getattr(config, field) == value for field, value in told.items()):
            return config
    raise user_error(
        "reference weights",
        told,
        "the shapes of a published model" if preset is None else f"the shapes of {preset}",
        f"Put the card that conversion wrote beside the file, or choose the model: --preset {', '.join(PRESETS)}.",
    )


def _told_by_shapes(weights: Weights) -> dict[str, Any]:
    """Fields of `ARConfig` that follow from shapes alone; how positions are told does not."""
    num_embeddings, hidden_size = _shape(weights, _EMBEDDING, 2)
    (head_width,) = _shape(weights, "layers.0.attention.q_norm.weight", 1)
    tied = "output.weight" not in weights
    text = "layers.0.cross_attention.wk.weight"
    return {
        "num_layers": 1 + max(int(match[1]) for name in weights if (match := _LAYER.match(name))),
        "hidden_size": hidden_size,
        "num_attention_heads": _shape(weights, "layers.0.attention.wq.weight", 2)[0] // head_width,
        "num_query_groups": _shape(weights, "layers.0.attention.wk.weight", 2)[0] // head_width,
        "kv_channels": head_width,
        "ffn_hidden_size": _shape(weights, "layers.0.feed_forward.w1.weight", 2)[0],
        "num_embeddings": num_embeddings,
        "num_outputs": num_embeddings if tied else _shape(weights, "output.weight", 2)[0],
        "share_embeddings_and_output_weights": tied,
        "crossattn_emb_channels": _shape(weights, text, 2)[1] if text in weights else None,
        "action_dim": _shape(weights, _ACTIONS, 2)[1] if _ACTIONS in weights else None,
    }


def _shape(weights: Weights, name: str, num_axes: int) -> torch.Size:
    if name not in weights:
        raise UserError(f"reference weights: {name} is missing. Fetch the file again if it is damaged.")
    if len(weights[name].shape) != num_axes:
        raise user_error(name, list(weights[name].shape), f"{num_axes} axes", "Fetch the file again if it is damaged.")
    return weights[name].shape
