"""An endless, shuffled view of a data set in which item i is always the same sample."""

from __future__ import annotations

import functools

import numpy as np
import torch


class ShuffledEpochs(torch.utils.data.Dataset):
    """Strings epochs together, each in its own order.

    Item i depends on nothing but i and the seed, so a sequential sampler that knows how many samples were consumed
    resumes in the middle of an epoch, and every world size sees the same global batches.

    Args:
        dataset: A finite map-style data set whose items are dicts.
        num_samples: How many items training will ask for in all.
        seed: Of the orders.
    """

    def __init__(self, dataset: torch.utils.data.Dataset, *, num_samples: int, seed: int) -> None:
        self._dataset = dataset
        self._num_samples = num_samples
        length = len(dataset)  # type: ignore[arg-type]
        self._order = functools.lru_cache(maxsize=2)(functools.partial(_order_of_epoch, length, seed))

    def __len__(self) -> int:
        """Number of items, over all epochs."""
        return self._num_samples

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """The dataset's item, and `draw_id` (int64 scalar): the key of all random draws made for it."""
        epoch, position = divmod(index, len(self._dataset))  # type: ignore[arg-type]
        item = dict(self._dataset[int(self._order(epoch)[position])])
        item["draw_id"] = torch.tensor(index, dtype=torch.int64)
        return item


def _order_of_epoch(length: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(length)
