"""Medusa: heads that guess the tokens after the next one, so that one pass of the transformer can tell several.

The k-th head is one residual layer, h + SiLU(W_k h), on what the output layer takes; all share that output layer. As
the layers begin with zeros, a head begins as the model's own prediction.

Source: Cai et al., Medusa, https://arxiv.org/abs/2401.10774, 2.1 and 2.2; Cosmos, https://arxiv.org/abs/2501.03575,
5.2, whose models have 9 heads that share the output layer (the published code has 7 by default).

Letters: s = tokens of this rank, B = batch, S = tokens of the sequence, D = hidden size, K = heads, V = codes.
"""

from __future__ import annotations

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import (
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from torch.nn import functional

from nemo_cosmos.autoregressive.config import ARConfig
from nemo_cosmos.autoregressive.objective import mean_where
from nemo_cosmos.errors import user_error
from nemo_cosmos.parallel.linear import ColumnLinear


class MedusaHeads(MegatronModule):
    """The residual layers of all heads, in one matrix; as published, tensor-parallel ranks share its rows.

    Args:
        config: Sizes; `num_medusa_heads` is K.
        pg_collection: Process groups; `tp` is used.
    """

    def __init__(self, config: ARConfig, pg_collection: ProcessGroupCollection) -> None:
        super().__init__(config=config)
        self.group = pg_collection.tp
        self.linear = ColumnLinear(
            config.hidden_size,
            config.num_medusa_heads * config.hidden_size,
            config=config,
            init_method=config.init_method,
            bias=False,
            gather_output=False,
            tp_group=self.group,
        )

    def forward(self, hidden_sBD: torch.Tensor) -> torch.Tensor:
        """Returns what the output layer takes for each head, [K, s, B, D]."""
        shifts = gather_from_tensor_model_parallel_region(self.linear(hidden_sBD)[0], group=self.group)
        if self.config.sequence_parallel:
            # Each rank has all tokens here, and the output layer joins them once more.
            shifts = scatter_to_sequence_parallel_region(shifts, group=self.group)
        return hidden_sBD + functional.silu(torch.stack(shifts.chunk(self.config.num_medusa_heads, dim=-1)))


def of_later_tokens(x_BS: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Puts beside each token's value those of the tokens after it: what the model and each head are to be told.

    Args:
        x_BS: Labels, or a mask of labels, of the model itself.
        num_heads: K.

    Returns:
        [B, S, 1 + K]; zero, or False, beyond the end of the sequence.
    """
    return torch.stack([functional.pad(x_BS[:, k:], (0, k)) for k in range(1 + num_heads)], dim=-1)


def medusa_loss(
    log_z_BSK: torch.Tensor, logit_BSK: torch.Tensor, counted_BSK: torch.Tensor, *, decay: float = 0.8
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross entropy of the heads, the k-th weighed by decay^k.

    Args:
        log_z_BSK: Logarithm of the normaliser, of the model itself first, [B, S, 1 + K].
        logit_BSK: Of the label.
        counted_BSK: bool; where the label is to be learned.
        decay: Lambda.

    Returns:
        The loss [B], and each head's cross entropy in nats per code [B, K].
    """
    cross_entropy_BK = mean_where((log_z_BSK - logit_BSK)[..., 1:], counted_BSK[..., 1:])
    weights_K = decay ** torch.arange(1, 1 + cross_entropy_BK.shape[1], device=cross_entropy_BK.device)
    return cross_entropy_BK @ weights_K, cross_entropy_BK


def freeze_trunk(model: torch.nn.Module) -> None:
    """Leaves the heads alone to be trained (Medusa-1), so that the model's own predictions stay as they are.

    Args:
        model: A `CosmosAR`, or a stage of it, before it is wrapped for data parallelism.

    Raises:
        UserError: It has no heads.
    """
    if model.config.num_medusa_heads == 0:
        raise user_error("num_medusa_heads", 0, "1 or more, as only heads shall learn", "Give the model heads.")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("medusa_heads."))
