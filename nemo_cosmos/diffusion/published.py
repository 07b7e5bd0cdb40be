"""Which published model reference weights are, told by their names and shapes.

That is what the released files have in common: Cosmos-1.0-Diffusion-{7B,14B}-{Text2World,Video2World} and
Cosmos-Predict1-{7B,14B}-{Text2World,Video2World}, and what was post-trained from them, all hold the same weights under
the same names, and no configuration.
"""

from __future__ import annotations

import re
from typing import Any

import torch

from nemo_cosmos.contracts import ACTION_DIM
from nemo_cosmos.diffusion.config import PRESETS, DiTConfig
from nemo_cosmos.errors import UserError, user_error
from nemo_cosmos.weight_files.stored_tensor import Weights

_PATCH = (1, 2, 2)
"""Latent frames, rows and columns per token of every published model."""
_BLOCK = re.compile(r"net\.blocks\.block(\d+)\.")


def is_reference(weights: Weights) -> bool:
    """Tells whether weights have a diffusion WFM's names of the reference, and no diffusion decoder's."""
    return "net.x_embedder.proj.1.weight" in weights and "net.token_embedder.weight" not in weights


def config_of_reference(weights: Weights, preset: str | None = None) -> DiTConfig:
    """The configuration of reference weights.

    Args:
        weights: Under the reference's names.
        preset: The model's name in `PRESETS`; None finds the published one of these shapes.

    Raises:
        UserError: A weight that tells the architecture is missing, or no model of that name, or no published one, has
            such shapes.
    """
    told = told_by_shapes(weights)
    for name in ("diffusion_7b", "diffusion_14b") if preset is None else (preset,):
        config = PRESETS[name](**{field: told[field] for field in _VARIANTS})
        if all(getattr(config, field) == value for field, value in told.items()):
            return config
    known = ", ".join(sorted(PRESETS))
    raise user_error(
        "reference weights",
        told,
        "the shapes of diffusion_7b or diffusion_14b" if preset is None else f"the shapes of {preset}",
        f"Put the card that conversion wrote beside the file, or choose the model: --preset {known}.",
    )


_VARIANTS = ("concat_condition_mask", "concat_padding_mask", "action_dim", "action_frames_per_latent")
"""In what models of one preset differ."""


def told_by_shapes(weights: Weights, *, more_channels: int = 0) -> dict[str, Any]:
    """Fields of `DiTConfig` that follow from shapes alone; the rotary ratios do not.

    Args:
        weights: Under the reference's names.
        more_channels: That enter the patches besides latent and masks.

    Raises:
        UserError: A weight is missing, or others enter the patches.
    """
    volume = _PATCH[0] * _PATCH[1] * _PATCH[2]
    hidden_size, patch_width = _shape(weights, "net.x_embedder.proj.1.weight", 2)
    out_channels = _shape(weights, "net.final_layer.linear.weight", 2)[0] // volume
    masks = patch_width // volume - out_channels - more_channels
    if not 0 <= masks <= 2:
        raise user_error(
            "net.x_embedder.proj.1.weight",
            f"{patch_width // volume} channels into patches for {out_channels} out of them",
            "up to two more: those of the condition mask and the padding mask",
            "This network takes other conditions than Text2World and Video2World models do.",
        )
    block = "net.blocks.block0.blocks"
    (head_width,) = _shape(weights, f"{block}.0.block.attn.to_q.1.weight", 1)
    told = {
        "num_layers": 1 + max(int(match[1]) for name in weights if (match := _BLOCK.match(name))),
        "hidden_size": hidden_size,
        "num_attention_heads": hidden_size // head_width,
        "ffn_hidden_size": _shape(weights, f"{block}.2.block.layer1.weight", 2)[0],
        "crossattn_emb_channels": _shape(weights, f"{block}.1.block.attn.to_k.0.weight", 2)[1],
        "adaln_lora_dim": _shape(weights, f"{block}.0.adaLN_modulation.1.weight", 2)[0],
        "in_channels": out_channels,
        "out_channels": out_channels,
        "concat_condition_mask": masks == 2,
        "concat_padding_mask": masks > 0,
        **_actions(weights),
    }
    if "net.extra_pos_embedder.pos_emb_t" not in weights:
        return {**told, "extra_pos_embed": None}
    tables = [_shape(weights, f"net.extra_pos_embedder.pos_emb_{axis}", 2)[0] for axis in "thw"]
    sizes = tuple(size * patch for size, patch in zip(tables, _PATCH, strict=True))
    return {**told, "extra_pos_embed": "learnable", "max_latent_size": sizes}


def _actions(weights: Weights) -> dict[str, Any]:
    name = "net.action_embedder_B_D.fc1.weight"
    if name not in weights:
        return {"action_dim": None, "action_frames_per_latent": DiTConfig.action_frames_per_latent}
    width = _shape(weights, name, 2)[1]
    if width % ACTION_DIM:
        raise user_error(name, f"actions of {width} numbers", f"a multiple of {ACTION_DIM}", "Convert another model.")
    return {"action_dim": ACTION_DIM, "action_frames_per_latent": width // ACTION_DIM}


def _shape(weights: Weights, name: str, num_axes: int) -> torch.Size:
    if name not in weights:
        raise UserError(f"reference weights: {name} is missing. Fetch the file again if it is damaged.")
    if len(weights[name].shape) != num_axes:
        raise user_error(name, list(weights[name].shape), f"{num_axes} axes", "Fetch the file again if it is damaged.")
    return weights[name].shape
