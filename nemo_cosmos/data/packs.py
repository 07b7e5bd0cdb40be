"""Samples of different sizes in packs, each of which becomes one sequence of tokens."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import default_collate

from nemo_cosmos.errors import user_error

_CLIP_DRAWS = 2**40
"""Apart stand the keys of the draws for the clips of one pack: more than training will ever have packs."""

_OPEN_PACKS = 64
"""Packs that the next sample may still go into; more would fill them hardly better."""


class PackedSamples(torch.utils.data.Dataset):
    """Packs of the samples of several data sets, each sample in one of them.

    Which samples share a pack depends on the seed alone, so packs are shuffled, resumed and shared out over ranks as
    single samples are.

    Args:
        datasets: Each of samples of one size.
        tokens: Tokens of a sample of each data set.
        tokens_per_pack: Most tokens in a pack.
        seed: Of who is packed with whom.

    Raises:
        UserError: A sample is larger than a pack.
    """

    def __init__(
        self,
        datasets: Sequence[torch.utils.data.Dataset],
        tokens: Sequence[int],
        *,
        tokens_per_pack: int,
        seed: int,
    ) -> None:
        if max(tokens) > tokens_per_pack:
            raise user_error(
                "tokens_per_pack", tokens_per_pack, f"at least the {max(tokens)} of the largest sample", "Raise it."
            )
        self._datasets = datasets
        self._starts = np.cumsum([0, *(len(dataset) for dataset in datasets)])  # type: ignore[arg-type]
        sizes = np.repeat(tokens, np.diff(self._starts))
        order = np.random.Generator(np.random.Philox(key=[seed, 0])).permutation(len(sizes))
        self._packs = pack_first_fit(sizes, order, tokens_per_pack)

    def __len__(self) -> int:
        """Number of packs."""
        return len(self._packs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """`clips`, a list of the packed samples."""
        clips = []
        for place in self._packs[index]:
            which = bisect.bisect_right(self._starts, place) - 1
            clips.append(self._datasets[which][place - int(self._starts[which])])
        return {"clips": clips}


def pack_first_fit(sizes: np.ndarray, order: np.ndarray, capacity: int) -> list[list[int]]:
    """Puts each item into the first open pack that has room for it.

    Args:
        sizes: Of the items, none above `capacity`.
        order: In which the items come.
        capacity: Of a pack.

    Returns:
        The items' numbers, pack by pack.
    """
    packs: list[list[int]] = []
    room: dict[int, int] = {}
    for item in order.tolist():
        size = int(sizes[item])
        pack = next((number for number, left in room.items() if left >= size), None)
        if pack is None:
            pack = len(packs)
            packs.append([])
            room[pack] = capacity
            if len(room) > _OPEN_PACKS:
                del room[min(room, key=room.__getitem__)]
        packs[pack].append(item)
        room[pack] -= size
    return packs


def collate_packs(items: list[dict[str, Any]]) -> dict[str, list[dict[str, torch.Tensor]]]:
    """Makes the packs of a micro-batch one.

    Args:
        items: Of `PackedSamples`, with `draw_id` from `ShuffledEpochs`.

    Returns:
        `clips`: each a batch of one sample, with a `draw_id` of its own.
    """
    return {
        "clips": [
            default_collate([{**clip, "draw_id": item["draw_id"] + number * _CLIP_DRAWS}])
            for item in items
            for number, clip in enumerate(item["clips"])
        ]
    }
