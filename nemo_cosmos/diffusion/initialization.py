"""First weights of a DiT, the same in every parallel layout (see `nemo_cosmos.transformer.weights`)."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes

from nemo_cosmos.transformer.weights import generator_of, own_part

_COLUMN_PARALLEL = ("linear_qkv.weight", "linear_q.weight", "linear_kv.weight", "linear_fc1.weight")
_ROW_PARALLEL = ("linear_proj.weight", "linear_fc2.weight")
_FUSED = {"linear_qkv.weight": 3, "linear_kv.weight": 2}
"""How many layers of the published model stand in one of ours."""
_QK_NORMS = (".self_attention.q_layernorm.weight", ".self_attention.k_layernorm.weight")
_ZERO = (
    ".adaln.linear_2.weight",
    ".adaln_self_attention.linear_2.weight",
    ".adaln_cross_attention.linear_2.weight",
    ".adaln_mlp.linear_2.weight",
    "action_embedder.linear_2.weight",
    "action_embedder_adaln.linear_2.weight",
    "final_layer.linear.weight",
    "logvar_head.linear.weight",
    ".bias",
)
"""Blocks start as identities, the output and the uncertainty at zero, actions without effect."""


def tensor_parallel_axis(name: str) -> int | None:
    """Axis along which the tensor-parallel ranks split a parameter; None where each holds it whole."""
    if name.endswith(_COLUMN_PARALLEL):
        return 0
    return 1 if name.endswith(_ROW_PARALLEL) else None


def initialize_weights(
    named: Iterable[tuple[str, torch.Tensor]],
    *,
    seed: int,
    qk_norm: float,
    groups: ProcessGroupCollection,
    draw: bool,
) -> None:
    """Draws parameters and fixed features in place and marks those that tensor-parallel ranks split.

    Source: adaptive-norm and output zeros: Peebles and Xie, DiT, https://arxiv.org/abs/2212.09748, 3.2; the rest as the
    published Cosmos model: Xavier-uniform layers, normal(0.02) time and position tables.

    Args:
        named: Global names (layers numbered over all pipeline stages) and tensors.
        seed: Of the model.
        qk_norm: First weight of the norms of self-attention's queries and keys; all other norms start at 1.
        groups: Process groups; `tp` is used.
        draw: False only marks, for weights that will be loaded.
    """
    for name, tensor in named:
        axis = tensor_parallel_axis(name)
        if axis is not None and not hasattr(tensor, "partition_dim"):  # Megatron marks only what it initializes
            set_tensor_model_parallel_attributes(tensor, is_parallel=True, dim=axis, stride=1)
        if draw and not tensor.is_meta:
            if name.endswith(_QK_NORMS):
                tensor.data.fill_(qk_norm)
            else:
                _draw(name, tensor, axis, seed, groups)


@torch.no_grad()
def _draw(name: str, tensor: torch.Tensor, axis: int | None, seed: int, groups: ProcessGroupCollection) -> None:
    shape = list(tensor.shape)
    if axis is not None:
        shape[axis] *= groups.tp.size()
    whole = _first_values(name, shape, generator_of(seed, name))
    tensor.copy_(own_part(whole, axis, groups.tp))


def _first_values(name: str, shape: list[int], generator: torch.Generator) -> torch.Tensor:
    if name.endswith(_ZERO):
        return torch.zeros(shape)
    if name.endswith("norm.weight"):
        return torch.ones(shape)
    if name.endswith("freqs"):
        return 2 * math.pi * torch.randn(shape, generator=generator)
    if name.endswith("phases"):
        return 2 * math.pi * torch.rand(shape, generator=generator)
    values = torch.empty(shape)
    if ".t_embedder." in name or ".pos_emb_" in name:
        return torch.nn.init.normal_(values, std=0.02, generator=generator)
    # Each of several layers that stand in one has the range that it would have alone.
    parts = next((parts for suffix, parts in _FUSED.items() if name.endswith(suffix)), 1)
    bound = math.sqrt(6 / (shape[0] / parts + shape[1]))
    return values.uniform_(-bound, bound, generator=generator)
