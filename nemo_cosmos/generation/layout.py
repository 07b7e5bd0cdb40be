"""How the ranks of a generation share its work."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nemo_cosmos.errors import user_error


@dataclass(frozen=True, kw_only=True)
class GenerationLayout:
    """Parallel sizes; a seed gives the same video in all of them, up to the rounding of sums in another order."""

    tensor: int = 1
    """Ranks among which every block's weights are cut."""
    pipeline: int = 1
    """Ranks among which the blocks are dealt out; they work one after the other, for want of memory alone."""
    context: int = 1
    """Ranks among which the tokens of a video are cut."""
    sequence_parallel: bool = False
    """Whether the tensor-parallel ranks cut the tokens too between their linear layers."""
    shard_weights: bool = False
    """Whether all ranks that would hold the same weights share them out and gather them block by block (FSDP)."""
    split_guidance: bool = False
    """Whether the branches with and without conditions run on ranks of their own: twice as many ranks."""

    @property
    def groups(self) -> dict[str, int]:
        """Arguments of `nemo_cosmos.parallel.startup.initialize`."""
        return {"tensor": self.tensor, "pipeline": self.pipeline, "context": self.context}

    @property
    def network(self) -> dict[str, Any]:
        """Fields of a network's configuration."""
        return {
            "tensor_model_parallel_size": self.tensor,
            "pipeline_model_parallel_size": self.pipeline,
            "context_parallel_size": self.context,
            "sequence_parallel": self.sequence_parallel,
        }

    def check(self, world_size: int) -> None:
        """Refuses ranks that would only repeat what others do.

        Args:
            world_size: Number of processes.

        Raises:
            UserError: There are more or fewer than the layout has use for.
        """
        parts = self.tensor * self.pipeline
        if self.shard_weights and world_size == parts:
            raise user_error(
                "number of processes",
                world_size,
                f"a multiple of tensor x pipeline = {parts}, for several ranks to share weights",
                "Start more, or do not shard the weights.",
            )
        ranks = parts * self.context * (2 if self.split_guidance else 1)
        if world_size != ranks and (not self.shard_weights or self.split_guidance or world_size % ranks):
            raise user_error(
                "number of processes",
                world_size,
                f"{ranks}: tensor x pipeline x context" + (" x 2 branches" if self.split_guidance else ""),
                "Change it, or the layout; with shard_weights, and without split_guidance, it may be a multiple.",
            )
