"""Dividing a tokenizer's channels among tensor-parallel ranks.

A tokenizer is built whole and then cut, so first weights are those of one rank. Between layers each rank holds its own
channels, the counterpart of Megatron's sequence parallelism. A convolution gathers its input's channels and computes
its own output channels (column parallel); of a factorised pair the second instead takes its own input channels, and
the ranks add up and divide what they get (row parallel). Norms are over the channels of all ranks. Attention has one
head, whose scores need all channels: queries and keys are gathered, so every rank computes all scores, for its own
channels of the values. The latent and the pixels are whole on every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from torch import Tensor, nn

from nemo_cosmos.parallel.group_norm import SplitGroupNorm
from nemo_cosmos.parallel.pieces import ProcessGroup, gather, gather_result, share, sum_and_split
from nemo_cosmos.tokenizer.image_layers import ImageAttention
from nemo_cosmos.tokenizer.layers import CausalAttention, CausalConv3d, FactorisedConv
from nemo_cosmos.tokenizer.model import Tokenizer

Change = Callable[[Tensor], Tensor]


def split_channels(tokenizer: Tokenizer, group: ProcessGroup) -> None:
    """Leaves a rank its share of a whole tokenizer, in place.

    Args:
        tokenizer: With the same weights on every rank; its widths are multiples of the group's size.
        group: The tensor-parallel ranks.
    """
    if group.size() == 1:
        return
    for network in (tokenizer.encoder, tokenizer.decoder):
        first = next(convolutions(network))
        seconds = {pair[1] for pair in network.modules() if isinstance(pair, FactorisedConv)}
        for conv in convolutions(network):
            if conv in seconds:
                _take_own_inputs(conv, group)
            else:
                _take_own_outputs(conv, group, enter=share if conv is first else partial(gather, dim=1))
        for attention in network.modules():
            if isinstance(attention, CausalAttention | ImageAttention):
                for conv in (attention.q, attention.k):
                    change_output(conv, partial(gather, dim=1, group=group))
        replace_norms(network, partial(SplitGroupNorm.of, group=group, cut_channels=True))
        change_output(network.conv_out, partial(gather_result, dim=1, group=group))
        for norm in network.modules():
            if isinstance(norm, SplitGroupNorm):
                _mark(norm.weight, 0)
                _mark(norm.bias, 0)


def split_axes(tokenizer: nn.Module) -> dict[str, int]:
    """Returns the axis along which ranks divide a weight, by its name; whole weights are left out."""
    return {
        name: weight.partition_dim
        for name, weight in tokenizer.named_parameters()
        if getattr(weight, "tensor_model_parallel", False)
    }


def convolutions(network: nn.Module) -> Iterator[CausalConv3d | nn.Conv2d]:
    """Yields every convolution of a network, of videos or of images, in the order of their definition."""
    return (module for module in network.modules() if isinstance(module, CausalConv3d | nn.Conv2d))


def replace_norms(network: nn.Module, replacement: Callable[[nn.GroupNorm], nn.GroupNorm]) -> None:
    """Replaces every group norm of a network."""
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.GroupNorm):
                setattr(parent, name, replacement(child))


def change_input(module: nn.Module, change: Change) -> None:
    """Lets a module see its first argument changed."""

    def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return change(args[0]), *args[1:]

    module.register_forward_pre_hook(hook)


def change_output(module: nn.Module, change: Change) -> None:
    """Lets the users of a module see its result changed."""
    module.register_forward_hook(lambda _module, _args, output: change(output))


def _take_own_outputs(conv: CausalConv3d | nn.Conv2d, group: ProcessGroup, enter: Callable[..., Tensor]) -> None:
    kernel = _kernel(conv)
    _cut(kernel.weight, 0, group)
    _cut(kernel.bias, 0, group)
    change_input(conv, partial(enter, group=group))


def _take_own_inputs(conv: CausalConv3d, group: ProcessGroup) -> None:
    kernel = _kernel(conv)
    _cut(kernel.weight, 1, group)
    _cut(kernel.bias, 0, group)
    conv.adds_bias = False  # each rank would
    change_output(conv, lambda y: sum_and_split(y, 1, group) + kernel.bias.view(-1, 1, 1, 1))


def _kernel(conv: CausalConv3d | nn.Conv2d) -> nn.Conv2d | nn.Conv3d:
    return conv.conv3d if isinstance(conv, CausalConv3d) else conv


def _cut(weight: nn.Parameter, axis: int, group: ProcessGroup) -> None:
    weight.data = weight.data.chunk(group.size(), axis)[group.rank()].clone()
    _mark(weight, axis)


def _mark(weight: nn.Parameter, axis: int) -> None:
    """By this Megatron counts every weight once in the gradient norm."""
    set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=axis, stride=1)
