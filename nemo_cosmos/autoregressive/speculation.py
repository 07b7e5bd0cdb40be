"""Guessing tokens for `decode.write_tokens`: by Medusa heads, or by the frame before.

Letters: B = batch, K = guesses, D = hidden size.
"""

from __future__ import annotations

import math

import torch
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region
from torch.nn import functional

from nemo_cosmos.autoregressive.decode import UNKNOWN, Drafter, Known
from nemo_cosmos.autoregressive.model import CosmosAR
from nemo_cosmos.errors import user_error
from nemo_cosmos.parallel.few_rows import few_rows_linear
from nemo_cosmos.transformer.positions import Grid


class MedusaDrafter:
    """One guess by each of a model's Medusa heads.

    Args:
        model: The transformer.

    Raises:
        UserError: It has no heads.
    """

    def __init__(self, model: CosmosAR) -> None:
        self.num_guesses = model.config.num_medusa_heads
        if self.num_guesses == 0:
            raise user_error("num_medusa_heads", 0, "1 or more", "Train heads first, or guess by the frame before.")
        self._linear, self._group = few_rows_linear(model.medusa_heads.linear.weight), model.groups.tp

    def __call__(self, known: Known) -> torch.Tensor:
        """Draws from the heads' predictions, int64 [B, K]."""
        shifts = self._linear(known.hidden_BD)
        shifts = gather_from_tensor_model_parallel_region(shifts, group=self._group)
        hidden_BKD = known.hidden_BD[:, None] + functional.silu(shifts.unflatten(-1, (self.num_guesses, -1)))
        return known.draw(known.logits(hidden_BKD))


class PreviousFrameDrafter:
    """The tokens that stand at the same rows and columns of the latent frame before; needs no training.

    Args:
        grid: Tokens of the video along T, H, W.
        num_guesses: K.

    Raises:
        UserError: There are more guesses than tokens in a frame.
    """

    def __init__(self, grid: Grid, *, num_guesses: int) -> None:
        self.num_guesses, self._frame = num_guesses, math.prod(grid[1:])
        if not 1 <= num_guesses <= self._frame:
            raise user_error("num_guesses", num_guesses, f"1 to {self._frame}, the tokens of a frame", "Choose fewer.")

    def __call__(self, known: Known) -> torch.Tensor:
        """Returns them, int64 [B, K]."""
        # Before the second frame there is nothing to copy: any token will do, and is found to be wrong.
        return known.tokens_BS.gather(1, (known.places_BK - self._frame).clamp(min=0))


class JacobiDrafter:
    """What the last pass drew on guesses that were not all right, and another drafter's guesses beyond.

    A pass draws at all the places that it is given guesses of; after the first wrong one it draws on wrong grounds, but
    mostly nearly right ones, at no cost. As the chance of each place is fixed, such draws come closer from pass to pass
    to what will be drawn in the end.

    Args:
        beyond: Guesses where nothing was drawn yet.

    Source: Teng et al., Speculative Jacobi Decoding, https://arxiv.org/abs/2410.01699.
    """

    def __init__(self, beyond: Drafter) -> None:
        self.num_guesses, self._beyond = beyond.num_guesses, beyond

    def __call__(self, known: Known) -> torch.Tensor:
        """Returns them, int64 [B, K]."""
        return torch.where(known.drawn_BK == UNKNOWN, self._beyond(known), known.drawn_BK)
