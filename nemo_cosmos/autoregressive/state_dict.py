"""One table of weight names: this package and the published `.pt` files.

States are those of one rank (tensor- and pipeline-parallel size 1). Values are moved, never computed with, so a round
trip is exact to the bit; `leaving` and `entering` move each weight when it is read, so that a 13B model is converted
weight by weight.

The published code fuses queries, keys and values (`wqkv`) where it is told to, and cuts weights over tensor-parallel
ranks (see `shards.py`); both are read. What is written has them apart and whole, which that code takes in either case.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from nemo_cosmos.autoregressive.config import ARConfig
from nemo_cosmos.errors import UserError
from nemo_cosmos.weight_files.fused import check_names, fuse, fused_part, weights_only
from nemo_cosmos.weight_files.stored_tensor import StoredTensor, Weights, read_all, stored

State = dict[str, torch.Tensor]

_PREFIX = "model."
"""Before every published name."""


class Row(NamedTuple):
    """A weight of ours and its parts in the reference; several parts stand in ours interleaved group by group."""

    ours: str
    reference: tuple[str, ...]
    num_groups: int = 1
    sizes: tuple[int, ...] = (1,)
    """Rows that each part has in a group, up to a common factor."""


def weight_table(config: ARConfig) -> list[Row]:
    """Returns the rows of a model of this size."""
    rows = [Row("embedding.weight", ("tok_embeddings.weight",)), Row("final_layernorm.weight", ("norm.weight",))]
    if not config.share_embeddings_and_output_weights:
        rows.append(Row("output_layer.weight", ("output.weight",)))
    if config.action_dim is not None:
        rows += [
            Row(f"action_embedder.linear_{number}.{kind}", (f"action_embedding_layers.{place}.{kind}",))
            for number, place in ((1, 0), (2, 2))
            for kind in ("weight", "bias")
        ]
    for n in range(config.num_layers):
        for row in _layer_rows(config):
            reference = tuple(f"layers.{n}.{name}.weight" for name in row.reference)
            rows.append(row._replace(ours=f"layers.{n}.{row.ours}.weight", reference=reference))
    return rows


def _layer_rows(config: ARConfig) -> list[Row]:
    """Within a layer, without `.weight`."""
    groups = config.num_query_groups
    sizes = (config.num_attention_heads // groups, 1, 1)
    rows = [
        Row("input_layernorm", ("attention_norm",)),
        Row("self_attention.linear_qkv", ("attention.wq", "attention.wk", "attention.wv"), groups, sizes),
        *_attention_rows("self_attention", "attention"),
        Row("pre_mlp_layernorm", ("ffn_norm",)),
        Row("mlp.linear_fc1", ("feed_forward.w1", "feed_forward.w3"), 1, (1, 1)),
        Row("mlp.linear_fc2", ("feed_forward.w2",)),
    ]
    if config.crossattn_emb_channels is not None:
        rows += [
            Row("pre_cross_attn_layernorm", ("cross_attention_norm",)),
            Row("cross_attention.linear_q", ("cross_attention.wq",)),
            Row("cross_attention.linear_kv", ("cross_attention.wk", "cross_attention.wv"), groups, (1, 1)),
            *_attention_rows("cross_attention", "cross_attention"),
        ]
    return rows


def _attention_rows(ours: str, reference: str) -> list[Row]:
    names = {"q_layernorm": "q_norm", "k_layernorm": "k_norm", "linear_proj": "wo"}
    return [Row(f"{ours}.{name}", (f"{reference}.{theirs}",)) for name, theirs in names.items()]


def to_reference(model_state: State, config: ARConfig) -> State:
    """Converts to the published `.pt` layout.

    Args:
        model_state: `CosmosAR.state_dict()` of one rank.
        config: The model's.

    Raises:
        UserError: A weight is missing or unknown.
    """
    return read_all(leaving(stored(model_state), config))


def from_reference(state: State, config: ARConfig) -> State:
    """Converts a published `.pt` to ours.

    Raises:
        UserError: A weight is missing or unknown.
    """
    return read_all(entering(stored(state), config))


def leaving(weights: Weights, config: ARConfig) -> Weights:
    """Our weights under the reference's names, as `to_reference`, each moved when it is read.

    Raises:
        UserError: A weight is missing or unknown.
    """
    # The published weights have no Medusa heads.
    weights = {name: w for name, w in weights_only(weights).items() if not name.startswith("medusa_heads.")}
    rows = weight_table(config)
    check_names(weights, {row.ours for row in rows}, "model state")
    moved: dict[str, StoredTensor] = {}
    for row in rows:
        whole = weights[row.ours]
        for index, name in enumerate(row.reference):
            moved[_PREFIX + name] = (
                whole if len(row.sizes) == 1 else fused_part(whole, row.num_groups, row.sizes, index)
            )
    return moved


def entering(weights: Weights, config: ARConfig) -> Weights:
    """The reference's weights under our names, as `from_reference`, each moved when it is read.

    Raises:
        UserError: A weight is missing or unknown.
    """
    weights, rows = plain_names(weights), weight_table(config)
    check_names(weights, {name for row in rows for name in row.reference}, "reference state")
    moved: dict[str, StoredTensor] = {}
    for row in rows:
        parts = [weights[name] for name in row.reference]
        moved[row.ours] = parts[0] if len(parts) == 1 else fuse(parts, row.num_groups, row.sizes, row.ours)
    return moved


def plain_names(weights: Weights) -> Weights:
    """The reference's weights without the prefix `model.`, with queries, keys and values apart.

    Raises:
        UserError: The shapes beside a fused weight do not tell how to take it apart.
    """
    named = {name.removeprefix(_PREFIX): weight for name, weight in weights_only(weights).items()}
    apart: dict[str, StoredTensor] = {}
    for name, weight in named.items():
        if not name.endswith(".wqkv.weight"):
            apart[name] = weight
            continue
        block = name.removesuffix("wqkv.weight")
        sizes = _sizes_of_fused(named, block, weight)
        for index, part in enumerate("qkv"):
            apart[f"{block}w{part}.weight"] = fused_part(weight, 1, sizes, index)
    return apart


def _sizes_of_fused(named: Weights, block: str, fused: StoredTensor) -> tuple[int, int, int]:
    """Rows of the queries, keys and values: as many of the first as the output projection has columns."""
    output = named.get(f"{block}wo.weight")
    queries = output.shape[-1] if output is not None else 0
    rest = fused.shape[0] - queries
    if queries == 0 or rest <= 0 or rest % 2:
        raise UserError(
            f"reference weights: {block}wqkv.weight of shape {list(fused.shape)} does not fit {block}wo.weight. "
            "Fetch the file again if it is damaged."
        )
    return queries, rest // 2, rest // 2
