"""What the configurations of both world models' transformers have in common: settings, and checks of a layout."""

from __future__ import annotations

import math

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from nemo_cosmos.errors import user_error


def leave_uninitialized(weight: torch.Tensor) -> torch.Tensor:
    """An `init_method` that does nothing: each model's `initialization.py` draws all weights once it stands."""
    return weight


def fit_interleaved_pipeline(config: TransformerConfig) -> None:
    """Sets how stages talk, where several of them are on one rank."""
    if config.virtual_pipeline_model_parallel_size is not None:
        # Two interleaved stages are each other's next and previous one: in one batch of messages Megatron takes
        # hidden states for gradients, where it sends them one by one it does not.
        config.overlap_p2p_comm, config.batch_p2p_comm = True, False


def check_recomputation(config: TransformerConfig) -> None:
    """Refuses settings of recomputation that `recompute.py` does not know.

    Raises:
        UserError: With those that it does.
    """
    known = {"core_attn", "mlp"}
    if config.recompute_granularity == "selective" and not set(config.recompute_modules) <= known:
        raise user_error(
            "recompute_modules",
            config.recompute_modules,
            f"some of {sorted(known)}",
            "Leave the others out, or recompute whole blocks: recompute_granularity='full'.",
        )
    if config.distribute_saved_activations:
        raise user_error(
            "distribute_saved_activations", True, "False", "Use sequence_parallel, which divides them as well."
        )


def check_groups(config: TransformerConfig, tp: int, pp: int, cp: int) -> None:
    """Refuses sizes of parallel groups that no model of these heads and layers can be cut into.

    Args:
        config: The model; `sequence_parallel`, `cp_comm_type` and `virtual_pipeline_model_parallel_size` are read.
        tp: Tensor-parallel size, a divisor of the heads.
        pp: Pipeline-parallel size.
        cp: Context-parallel size.

    Raises:
        UserError: With the reason and the nearest values that would do.
    """
    if config.cp_comm_type == "a2a" and config.num_attention_heads // tp % cp:
        raise user_error(
            "context-parallel size",
            cp,
            f"a divisor of the {config.num_attention_heads // tp} heads of a rank, with cp_comm_type 'a2a'",
            f"Nearest: {nearest_divisors(cp, config.num_attention_heads // tp)}; or cp_comm_type 'p2p'.",
        )
    _check_pipeline(config, pp)
    if config.sequence_parallel and tp == 1:
        raise user_error(
            "sequence_parallel", True, "a tensor-parallel size of 2 or more", "Switch it off, or raise that size."
        )


def check_positive(tp: int, pp: int, cp: int) -> None:
    """Refuses sizes of parallel groups below 1.

    Raises:
        UserError: One is.
    """
    for name, size in (("tensor", tp), ("pipeline", pp), ("context", cp)):
        if size < 1:
            raise user_error(f"{name}-parallel size", size, "1 or more", "Correct the layout.")


def _check_pipeline(config: TransformerConfig, pp: int) -> None:
    if config.pipeline_model_parallel_layout is not None or config.num_layers_in_first_pipeline_stage is not None:
        return  # Megatron has checked layouts that the user wrote by hand.
    chunks = config.virtual_pipeline_model_parallel_size or 1
    if config.num_layers % (pp * chunks):
        fitting = [
            size // chunks for size in range(chunks, config.num_layers + 1, chunks) if config.num_layers % size == 0
        ]
        raise user_error(
            "pipeline-parallel size",
            pp,
            f"a divisor of the {config.num_layers} layers" + (f" over {chunks} virtual stages" if chunks > 1 else ""),
            f"Nearest: {nearest(pp, fitting)}.",
        )


def nearest_divisors(wanted: int, *numbers: int) -> str:
    """Common divisors of some numbers next to one that is none, in words."""
    common = math.gcd(*numbers)
    return nearest(wanted, [size for size in range(1, common + 1) if common % size == 0])


def nearest_multiples(wanted: int, unit: int) -> str:
    """Multiples next to a number that is none, in words."""
    below = wanted // unit * unit
    return nearest(wanted, [size for size in (below, below + unit) if size > 0])


def nearest(wanted: int, fitting: list[int]) -> str:
    """The next lower and the next higher of some ascending numbers, in words."""
    below, above = [s for s in fitting if s <= wanted], [s for s in fitting if s > wanted]
    return " or ".join(str(size) for size in (*below[-1:], *above[:1])) or "none"
