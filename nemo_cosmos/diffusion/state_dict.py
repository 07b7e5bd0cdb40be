"""One table of weight names: this package, diffusers' `CosmosTransformer3DModel`, and the published `.pt` files.

States are those of one rank (tensor- and pipeline-parallel size 1). Values are moved, never computed with, so a round
trip is exact to the bit; `leaving` and `entering` move each weight when it is read, so that a 14B model is converted
weight by weight. What a format cannot hold is said by name and never lost unseen:

- diffusers has no uncertainty head: `logvar_head.*` is dropped on the way there and missing on the way back, so
  training that goes on from diffusers weights starts that head anew;
- diffusers has no action layers: a model with `action_dim` is refused there. The reference names are those of the
  published action-conditioned models, which take the actions of a clip, or of a latent frame, in the same two layers.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch

from nemo_cosmos.diffusion.config import DiTConfig
from nemo_cosmos.errors import user_error
from nemo_cosmos.weight_files.fused import check_names, fuse, fused_part, weights_only
from nemo_cosmos.weight_files.stored_tensor import StoredTensor, Weights, read_all, stored

State = dict[str, torch.Tensor]
Format = Literal["diffusers", "reference"]

NOT_IN_DIFFUSERS = ("logvar_head.freqs", "logvar_head.phases", "logvar_head.linear.weight")
"""Our names that diffusers cannot hold."""


class Row(NamedTuple):
    """A weight of ours and its parts elsewhere; several parts stand in ours interleaved head by head."""

    ours: str
    diffusers: tuple[str, ...]
    reference: tuple[str, ...]


_MODEL_ROWS = (
    Row("x_embedder.proj.weight", ("patch_embed.proj.weight",), ("net.x_embedder.proj.1.weight",)),
    Row(
        "conditioning.t_embedder.linear_1.weight",
        ("time_embed.t_embedder.linear_1.weight",),
        ("net.t_embedder.1.linear_1.weight",),
    ),
    Row(
        "conditioning.t_embedder.linear_2.weight",
        ("time_embed.t_embedder.linear_2.weight",),
        ("net.t_embedder.1.linear_2.weight",),
    ),
    Row("conditioning.affline_norm.weight", ("time_embed.norm.weight",), ("net.affline_norm.weight",)),
    Row(
        "final_layer.adaln.linear_1.weight",
        ("norm_out.linear_1.weight",),
        ("net.final_layer.adaLN_modulation.1.weight",),
    ),
    Row(
        "final_layer.adaln.linear_2.weight",
        ("norm_out.linear_2.weight",),
        ("net.final_layer.adaLN_modulation.2.weight",),
    ),
    Row("final_layer.linear.weight", ("proj_out.weight",), ("net.final_layer.linear.weight",)),
    Row("logvar_head.freqs", (), ("logvar.0.freqs",)),
    Row("logvar_head.phases", (), ("logvar.0.phases",)),
    Row("logvar_head.linear.weight", (), ("logvar.1.weight",)),
)

_POSITION_ROWS = tuple(
    Row(
        f"extra_pos_embedder.pos_emb_{axis}",
        (f"learnable_pos_embed.pos_emb_{axis}",),
        (f"net.extra_pos_embedder.pos_emb_{axis}",),
    )
    for axis in "thw"
)

_ACTION_ROWS = tuple(
    Row(f"conditioning.{ours}.linear_{n}.{kind}", (), (f"net.{reference}.fc{n}.{kind}",))
    for ours, reference in (
        ("action_embedder", "action_embedder_B_D"),
        ("action_embedder_adaln", "action_embedder_B_3D"),
    )
    for n in (1, 2)
    for kind in ("weight", "bias")
)

_ROTARY_INDEX = "net.pos_embedder.seq"
"""In the reference a running index; no weight."""

_BLOCK_ROWS = (
    Row("adaln_self_attention.linear_1", ("norm1.linear_1",), ("0.adaLN_modulation.1",)),
    Row("adaln_self_attention.linear_2", ("norm1.linear_2",), ("0.adaLN_modulation.2",)),
    Row(
        "self_attention.linear_qkv",
        ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
        ("0.block.attn.to_q.0", "0.block.attn.to_k.0", "0.block.attn.to_v.0"),
    ),
    Row("self_attention.q_layernorm", ("attn1.norm_q",), ("0.block.attn.to_q.1",)),
    Row("self_attention.k_layernorm", ("attn1.norm_k",), ("0.block.attn.to_k.1",)),
    Row("self_attention.linear_proj", ("attn1.to_out.0",), ("0.block.attn.to_out.0",)),
    Row("adaln_cross_attention.linear_1", ("norm2.linear_1",), ("1.adaLN_modulation.1",)),
    Row("adaln_cross_attention.linear_2", ("norm2.linear_2",), ("1.adaLN_modulation.2",)),
    Row("cross_attention.linear_q", ("attn2.to_q",), ("1.block.attn.to_q.0",)),
    Row("cross_attention.linear_kv", ("attn2.to_k", "attn2.to_v"), ("1.block.attn.to_k.0", "1.block.attn.to_v.0")),
    Row("cross_attention.q_layernorm", ("attn2.norm_q",), ("1.block.attn.to_q.1",)),
    Row("cross_attention.k_layernorm", ("attn2.norm_k",), ("1.block.attn.to_k.1",)),
    Row("cross_attention.linear_proj", ("attn2.to_out.0",), ("1.block.attn.to_out.0",)),
    Row("adaln_mlp.linear_1", ("norm3.linear_1",), ("2.adaLN_modulation.1",)),
    Row("adaln_mlp.linear_2", ("norm3.linear_2",), ("2.adaLN_modulation.2",)),
    Row("mlp.linear_fc1", ("ff.net.0.proj",), ("2.block.layer1",)),
    Row("mlp.linear_fc2", ("ff.net.2",), ("2.block.layer2",)),
)
"""Within a block, without `.weight`."""


def weight_table(config: DiTConfig) -> list[Row]:
    """Returns the rows of a model of this size."""
    rows = list(_MODEL_ROWS)
    if config.action_dim is not None:
        rows.extend(_ACTION_ROWS)
    if config.extra_pos_embed == "learnable":
        rows.extend(_POSITION_ROWS)
    for n in range(config.num_layers):
        rows.extend(
            Row(
                f"blocks.{n}.{row.ours}.weight",
                tuple(f"transformer_blocks.{n}.{name}.weight" for name in row.diffusers),
                tuple(f"net.blocks.block{n}.blocks.{name}.weight" for name in row.reference),
            )
            for row in _BLOCK_ROWS
        )
    return rows


def to_diffusers(model_state: State, config: DiTConfig) -> tuple[State, dict[str, Any]]:
    """Converts to diffusers; the uncertainty head is dropped.

    Args:
        model_state: `CosmosDiT.state_dict()` of one rank.
        config: The model's.

    Returns:
        Weights, and the configuration of `CosmosTransformer3DModel`.

    Raises:
        UserError: A weight is missing or unknown, or the model has action layers.
    """
    return read_all(leaving(stored(model_state), config, "diffusers")), diffusers_config(config)


def from_diffusers(state: State, config: DiTConfig) -> State:
    """Converts diffusers weights to ours, all but `NOT_IN_DIFFUSERS`.

    Raises:
        UserError: A weight is missing or unknown, or the model has action layers.
    """
    return read_all(entering(stored(state), config, "diffusers"))


def to_reference(model_state: State, config: DiTConfig) -> State:
    """Converts to the published `.pt` layout, the uncertainty head and the rotary index included.

    Raises:
        UserError: A weight is missing or unknown.
    """
    return read_all(leaving(stored(model_state), config, "reference"))


def from_reference(state: State, config: DiTConfig) -> State:
    """Converts a published `.pt` to ours; accepts the uncertainty head with and without the prefix `net.`.

    Raises:
        UserError: A weight is missing or unknown.
    """
    return read_all(entering(stored(state), config, "reference"))


def leaving(weights: Weights, config: DiTConfig, target: Format) -> Weights:
    """Our weights under another format's names, as `to_diffusers` and `to_reference`, each moved when it is read.

    Raises:
        UserError: A weight is missing or unknown, or the model has action layers that the target lacks.
    """
    if target == "diffusers":
        _refuse_what_diffusers_lacks(config)
    weights, rows = weights_only(weights), weight_table(config)
    check_names(weights, {row.ours for row in rows}, "model state")
    moved: dict[str, StoredTensor] = {}
    for row in rows:
        names = getattr(row, target)
        if len(names) == 1:
            moved[names[0]] = weights[row.ours]
        for index, name in enumerate(names if len(names) > 1 else ()):  # no names: the format lacks this weight
            moved[name] = fused_part(weights[row.ours], config.num_attention_heads, (1,) * len(names), index)
    if target == "reference":
        longest = max(config.token_grid(config.max_latent_size))
        moved[_ROTARY_INDEX] = StoredTensor.of(torch.arange(longest, dtype=torch.float32))
    return moved


def entering(weights: Weights, config: DiTConfig, source: Format) -> Weights:
    """Another format's weights under our names, as `from_diffusers` and `from_reference`, each moved when it is read.

    Raises:
        UserError: A weight is missing or unknown, or the model has action layers that the source lacks.
    """
    if source == "diffusers":
        _refuse_what_diffusers_lacks(config)
    weights = weights_only(weights)
    if source == "reference":
        weights = {name.replace("net.logvar.", "logvar."): w for name, w in weights.items() if name != _ROTARY_INDEX}
    rows = [row for row in weight_table(config) if getattr(row, source)]
    check_names(weights, {name for row in rows for name in getattr(row, source)}, f"{source} state")
    moved: dict[str, StoredTensor] = {}
    for row in rows:
        parts = [weights[name] for name in getattr(row, source)]
        heads, sizes = config.num_attention_heads, (1,) * len(parts)
        moved[row.ours] = parts[0] if len(parts) == 1 else fuse(parts, heads, sizes, row.ours)
    return moved


def diffusers_config(config: DiTConfig) -> dict[str, Any]:
    """Returns the arguments of diffusers' `CosmosTransformer3DModel`."""
    return {
        "in_channels": config.in_channels + int(config.concat_condition_mask),
        "out_channels": config.out_channels,
        "num_attention_heads": config.num_attention_heads,
        "attention_head_dim": config.kv_channels,
        "num_layers": config.num_layers,
        "mlp_ratio": config.ffn_hidden_size / config.hidden_size,
        "text_embed_dim": config.crossattn_emb_channels,
        "adaln_lora_dim": config.adaln_lora_dim,
        "max_size": list(config.max_latent_size),
        "patch_size": list(config.patch_size),
        "rope_scale": list(config.rope_ratio),
        "concat_padding_mask": config.concat_padding_mask,
        "extra_pos_embed_type": config.extra_pos_embed,
    }


def config_from_diffusers(values: dict[str, Any], **overrides: Any) -> DiTConfig:  # noqa: ANN401 - any field
    """Returns the configuration of the model that a diffusers `config.json` describes.

    Args:
        values: The JSON's fields.
        **overrides: Fields of `DiTConfig`, such as the layout.

    Raises:
        UserError: It describes a later Cosmos model that this class is not.
    """
    foreign = {
        k: values[k]
        for k in ("use_crossattn_projection", "controlnet_block_every_n", "img_context_dim_in")
        if values.get(k)
    }
    if foreign or values["patch_size"][1] != values["patch_size"][2]:
        raise user_error(
            "diffusers config", foreign or values["patch_size"], "a Cosmos 1 model", "Convert another checkpoint."
        )
    hidden_size = values["num_attention_heads"] * values["attention_head_dim"]
    fields = {
        "num_layers": values["num_layers"],
        "hidden_size": hidden_size,
        "num_attention_heads": values["num_attention_heads"],
        "ffn_hidden_size": round(values["mlp_ratio"] * hidden_size),
        "in_channels": values["out_channels"],
        "out_channels": values["out_channels"],
        "concat_condition_mask": values["in_channels"] == values["out_channels"] + 1,
        "concat_padding_mask": values["concat_padding_mask"],
        "patch_temporal": values["patch_size"][0],
        "patch_spatial": values["patch_size"][1],
        "max_latent_size": tuple(values["max_size"]),
        "rope_ratio": tuple(float(ratio) for ratio in values["rope_scale"]),
        "extra_pos_embed": values["extra_pos_embed_type"],
        "crossattn_emb_channels": values["text_embed_dim"],
        "adaln_lora_dim": values["adaln_lora_dim"],
    }
    return DiTConfig(**{**fields, **overrides})


def _refuse_what_diffusers_lacks(config: DiTConfig) -> None:
    if config.extra_pos_embed == "sincos":
        raise user_error(
            "extra_pos_embed",
            "sincos",
            "'learnable' or None",
            "diffusers has no such positions; convert to 'reference'.",
        )
    if config.action_dim is not None:
        raise user_error(
            "action_dim", config.action_dim, "None", "diffusers has no action layers; convert to 'reference'."
        )
