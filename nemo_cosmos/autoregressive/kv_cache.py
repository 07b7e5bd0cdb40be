"""Keys and values of the tokens that a decoder has seen, in memory that is allocated once.

Letters: B = batch, S = tokens that fit, m = new tokens, L = text tokens, G = key and value heads of this rank,
H = channels per head.
"""

from __future__ import annotations

import torch


class KVCache:
    """Keys and values of one layer's self-attention.

    Args:
        batch: B.
        num_heads: G.
        length: S.
        head_dim: H.
        dtype: Of keys and values.
        device: Where they are kept.
    """

    def __init__(
        self, batch: int, num_heads: int, length: int, head_dim: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        # Zeros: where a mask hides what was never written, that must still be a number.
        self._both = torch.zeros(2, batch, num_heads, length, head_dim, dtype=dtype, device=device)
        self._keys, self._values = self._both
        self._rows = torch.arange(batch, device=device)[:, None]

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """What is kept, each as `write_at` and `read` use it."""
        return self._keys, self._values, self._rows

    def write(self, both_BmG2H: torch.Tensor, start: int) -> None:
        """Keeps keys and values of new tokens at the same places of all samples.

        Args:
            both_BmG2H: A key and a value of each head.
            start: Place of the first token.
        """
        places = self._both.narrow(3, start, both_BmG2H.shape[1])
        places.copy_(both_BmG2H.permute(3, 0, 2, 1, 4))

    def write_at(self, both_BmG2H: torch.Tensor, places_Bm: torch.Tensor) -> None:
        """Keeps keys and values of new tokens at places that differ from sample to sample.

        Args:
            both_BmG2H: A key and a value of each head.
            places_Bm: Where each token's go; int64.
        """
        self._keys[self._rows, :, places_Bm] = both_BmG2H[..., 0, :]
        self._values[self._rows, :, places_Bm] = both_BmG2H[..., 1, :]

    def read(self, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns keys and values of the first `end` places, views [B, G, `end`, H]."""
        return self._keys.narrow(2, 0, end), self._values.narrow(2, 0, end)
