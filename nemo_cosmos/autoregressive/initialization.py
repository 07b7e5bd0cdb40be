"""First weights of an autoregressive transformer, the same in every parallel layout.

See `nemo_cosmos.transformer.weights` for how they are drawn and cut.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes

from nemo_cosmos.autoregressive.config import ARConfig
from nemo_cosmos.parallel.pieces import ProcessGroup
from nemo_cosmos.transformer.weights import generator_of, own_part

_COLUMN_PARALLEL = (
    "linear_qkv.weight",
    "linear_q.weight",
    "linear_kv.weight",
    "linear_fc1.weight",
    "medusa_heads.linear.weight",
)
_ROW_PARALLEL = ("linear_proj.weight", "linear_fc2.weight")
_VOCABULARY_PARALLEL = ("embedding.weight", "output_layer.weight")
_GATED = "linear_fc1.weight"
"""The gate's rows, then those of what it lets through, which are cut each by themselves."""
_LAYER = re.compile(r"layers\.(\d+)\.")
_STD = 0.02


def tensor_parallel_axis(name: str) -> int | None:
    """Axis along which the tensor-parallel ranks split a parameter; None where each holds it whole."""
    if name.endswith((*_COLUMN_PARALLEL, *_VOCABULARY_PARALLEL)):
        return 0
    return 1 if name.endswith(_ROW_PARALLEL) else None


def own_weight(name: str, whole: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
    """What this tensor-parallel rank holds of a whole weight of that name."""
    return own_part(whole, tensor_parallel_axis(name), group, num_layers=2 if name.endswith(_GATED) else 1)


def initialize_weights(
    named: Iterable[tuple[str, torch.Tensor]], *, config: ARConfig, groups: ProcessGroupCollection
) -> None:
    """Draws parameters in place and marks those that tensor-parallel ranks split.

    With `config.perform_initialization` off it only marks, for weights that will be loaded.

    Source: as the published model, after torchtitan's Llama 3: normal(0.02) layers, those that write to the residual
    stream, and the gated half of the MLP, less by sqrt(2 n) in the n-th layer; normal(1) embeddings;
    normal(D^-0.5) outputs, cut at three standard deviations. Rows that pad the outputs are zero. An embedding that is
    the output layer too begins as that. Medusa heads begin as zero, as theirs do. Weights of actions are uniform by
    Glorot's law, their biases zero.

    Args:
        named: Global names (layers numbered over all pipeline stages) and tensors.
        config: Of the model.
        groups: Process groups; `tp` is used.
    """
    for name, tensor in named:
        axis = tensor_parallel_axis(name)
        if axis is not None and not hasattr(tensor, "partition_dim"):  # Megatron marks only what it initializes
            set_tensor_model_parallel_attributes(tensor, is_parallel=True, dim=axis, stride=1)
        if config.perform_initialization and not tensor.is_meta:
            _draw(name, tensor, axis, config, groups)


@torch.no_grad()
def _draw(name: str, tensor: torch.Tensor, axis: int | None, config: ARConfig, groups: ProcessGroupCollection) -> None:
    shape = list(tensor.shape)
    if axis is not None:
        shape[axis] *= groups.tp.size()
    tensor.copy_(own_weight(name, first_values(name, torch.empty(shape), config), groups.tp))


def first_values(name: str, values: torch.Tensor, config: ARConfig) -> torch.Tensor:
    """Fills a whole weight with what it begins as.

    Args:
        name: Of the weight, as one rank has it.
        values: Of the whole weight's shape; filled in place.
        config: Of the model.

    Returns:
        `values`.
    """
    if name.endswith("norm.weight"):
        return values.fill_(1.0)
    if name == "medusa_heads.linear.weight":
        return values.zero_()
    generator = generator_of(config.init_seed, name)

    def normal(values: torch.Tensor, std: float, cut: float = 2.0) -> torch.Tensor:
        return torch.nn.init.trunc_normal_(values, std=std, a=-cut, b=cut, generator=generator)

    if name.endswith(_VOCABULARY_PARALLEL):
        if name == "embedding.weight" and not config.share_embeddings_and_output_weights:
            return values.normal_(generator=generator)
        std = config.hidden_size**-0.5
        normal(values, std, cut=3 * std)
        values[config.vocab_size :].zero_()
        return values
    if name.startswith("action_embedder."):
        if name.endswith(".bias"):
            return values.zero_()
        return torch.nn.init.xavier_uniform_(values, generator=generator)
    layer = int(_LAYER.match(name)[1])  # type: ignore[index]  # all other weights are a layer's
    residual_std = _STD / (2 * (layer + 1)) ** 0.5
    if name.endswith(_GATED):
        gate, gated = values.chunk(2)
        normal(gate, _STD)
        normal(gated, residual_std)
        return values
    return normal(values, residual_std if name.endswith(_ROW_PARALLEL) else _STD)
