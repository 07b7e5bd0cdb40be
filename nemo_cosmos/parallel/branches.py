"""Two ranks that each compute one branch of classifier-free guidance."""

from __future__ import annotations

import torch
from megatron.core import parallel_state

from nemo_cosmos.errors import user_error
from nemo_cosmos.parallel.tokens import all_gather_first_axis


class BranchRanks:
    """The two data-parallel ranks of a generation; Megatron's groups must be open.

    Raises:
        UserError: There are more or fewer than two.
    """

    def __init__(self) -> None:
        self._group = parallel_state.get_data_parallel_group()
        if self._group.size() != 2:
            raise user_error(
                "data-parallel size",
                self._group.size(),
                "2 where the branches of guidance are split",
                "Start twice as many processes as tensor-parallel size times context-parallel size.",
            )

    @property
    def own(self) -> int:
        """0 on the rank of the conditional branch, 1 on that of the unconditional one."""
        return self._group.rank()

    def exchange(self, own: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Gives both ranks both branches.

        Args:
            own: This rank's, of the same shape on both.

        Returns:
            The conditional and the unconditional one.
        """
        conditional, unconditional = all_gather_first_axis(own, self._group).chunk(2)
        return conditional, unconditional
