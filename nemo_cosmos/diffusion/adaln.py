"""Adaptive layer norm with a low-rank part per block and a shared vector (adaLN-LoRA).

Letters: s = tokens of this rank, B = batch, D = hidden size, F = groups of tokens that share their modulation: 1, the
latent frames of this rank, or s.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from nemo_cosmos.diffusion.config import DiTConfig
from nemo_cosmos.diffusion.embeddings import linear
from nemo_cosmos.parallel.tokens import AutogradContext


class AdaLNLoRA(nn.Module):
    """Vectors that modulate a sub-layer: shift and scale of its norm, and the gate of its output.

    Both layers stand whole on every tensor-parallel rank: they act on one vector per sample, not per token.

    Args:
        config: Sizes.
        num_chunks: 3 (shift, scale, gate), or 2 without the gate.
    """

    def __init__(self, config: DiTConfig, num_chunks: int) -> None:
        super().__init__()
        self.num_chunks = num_chunks
        self.linear_1 = linear(config.hidden_size, config.adaln_lora_dim, config)
        self.linear_2 = linear(config.adaln_lora_dim, num_chunks * config.hidden_size, config)

    def forward(self, emb_FBD: torch.Tensor, shared_FBC: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Returns `num_chunks` vectors [F, B, D].

        Args:
            emb_FBD: Time embedding after SiLU.
            shared_FBC: Vector of width 3 D that all sub-layers share; the first chunks are used.
        """
        vectors = self.linear_2(self.linear_1(emb_FBD))
        return (vectors + shared_FBC[..., : vectors.shape[-1]]).chunk(self.num_chunks, dim=-1)


def modulate(x_sBD: torch.Tensor, shift_FBD: torch.Tensor, scale_FBD: torch.Tensor, eps: float) -> torch.Tensor:
    """Layer norm without weights, times 1 + scale, plus shift; [s, B, D]."""
    if shift_FBD[..., 0].numel() == 1:  # one modulation for all tokens: it is the norm's own weight and bias
        return functional.layer_norm(x_sBD, x_sBD.shape[-1:], 1 + scale_FBD[0, 0], shift_FBD[0, 0], eps)
    normed = functional.layer_norm(x_sBD, x_sBD.shape[-1:], eps=eps)
    return _AddProduct.apply(shift_FBD, 1 + scale_FBD, normed)


def add_gated(x_sBD: torch.Tensor, gate_FBD: torch.Tensor, update_sBD: torch.Tensor) -> torch.Tensor:
    """`x` plus gate times update; [s, B, D]."""
    return _AddProduct.apply(x_sBD, gate_FBD, update_sBD)


class _AddProduct(torch.autograd.Function):
    """`base + factor * x`, [s, B, D]; factor, and base too where it is no longer, have a row for each of F groups.

    That of `torch.addcmul` makes a copy of `x` on the way back.
    """

    @staticmethod
    def forward(ctx: AutogradContext, base: torch.Tensor, factor: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(factor, x)
        ctx.is_row = len(base) == len(factor)
        groups = len(factor)
        out = torch.addcmul(_grouped(base, groups), _grouped(factor, groups), _grouped(x, groups))
        return out.flatten(0, 1)

    @staticmethod
    def backward(ctx: AutogradContext, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        factor, x = ctx.saved_tensors
        groups = len(factor)
        grad_x = (_grouped(grad, groups) * _grouped(factor, groups)).flatten(0, 1)
        grad_base = _grouped(grad, groups).sum(dim=1) if ctx.is_row else grad
        return grad_base, _grouped(grad * x, groups).sum(dim=1), grad_x


def _grouped(x_sBD: torch.Tensor, groups: int) -> torch.Tensor:
    return x_sBD.unflatten(0, (groups, -1))
