"""Endless views of data sets in which item i is always the same sample."""

from __future__ import annotations

import functools

import numpy as np
import torch


class ShuffledEpochs(torch.utils.data.Dataset):
    """Strings epochs together, each in its own order.

    Item i depends on nothing but i and the seed, so a sequential sampler that knows how many samples were consumed
    resumes in the middle of an epoch, and every world size sees the same global batches.

    Args:
        dataset: A finite map-style data set whose items are dicts. Where it has a method `drawn(index, generator)`,
            items come from there, with a generator that depends on the item's number and the seed.
        num_samples: How many items training will ask for in all.
        seed: Of the orders.
    """

    def __init__(self, dataset: torch.utils.data.Dataset, *, num_samples: int, seed: int) -> None:
        self._dataset = dataset
        self._num_samples = num_samples
        self._seed = seed
        length = len(dataset)  # type: ignore[arg-type]
        self._order = functools.lru_cache(maxsize=2)(functools.partial(_order_of_epoch, length, seed))

    def __len__(self) -> int:
        """Number of items, over all epochs."""
        return self._num_samples

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """The dataset's item, and `draw_id` (int64 scalar): the key of all random draws made for it."""
        epoch, position = divmod(index, len(self._dataset))  # type: ignore[arg-type]
        place = int(self._order(epoch)[position])
        item = dict(_item(self._dataset, place, np.random.default_rng([self._seed, index])))
        item["draw_id"] = torch.tensor(index, dtype=torch.int64)
        return item


class PictureSamples(torch.utils.data.Dataset):
    """Several pictures as one sample, so that a batch of pictures is about as much work as one of videos.

    Args:
        pictures: A data set; items come from its method `drawn(index, generator)` where it has one.
        num_pictures: In a sample; what is left over is in none.
    """

    def __init__(self, pictures: torch.utils.data.Dataset, *, num_pictures: int) -> None:
        self._pictures = pictures
        self._num_pictures = num_pictures

    def __len__(self) -> int:
        """Number of samples."""
        return max(len(self._pictures) // self._num_pictures, 1)  # type: ignore[arg-type]

    def drawn(self, index: int, generator: np.random.Generator) -> dict[str, torch.Tensor]:
        """Pictures that stand far from each other in the data set, each [C, 1, H, W], stacked on a new first axis."""
        length = len(self._pictures)  # type: ignore[arg-type]
        places = [(index + k * len(self)) % length for k in range(self._num_pictures)]
        items = [_item(self._pictures, place, generator) for place in places]
        return {name: torch.stack([item[name] for item in items]) for name in items[0]}


_PICTURE_DRAWS = 2**40
"""Apart stand the keys of the draws for the parts of one sample: more than training will ever have samples."""


def pictures_one_by_one(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Makes a batch of pictures of one whose samples are of several each, as `PictureSamples` gives them.

    Args:
        batch: Tensors [B, N, ...] of B samples of N pictures, and `draw_id` int64 [B].

    Returns:
        Tensors [B N, ...], and for each picture a `draw_id` of its own.
    """
    num_pictures = next(value.shape[1] for name, value in batch.items() if name != "draw_id")
    keys = batch["draw_id"][:, None] + _PICTURE_DRAWS * torch.arange(num_pictures)
    return {name: value.flatten(0, 1) for name, value in {**batch, "draw_id": keys}.items()}


class AlternatingBatches(torch.utils.data.Dataset):
    """Global batches of videos, and every n-th one of pictures instead.

    A step's samples are all of one kind, on every rank and in every micro-batch, and which kind depends on the number
    of the optimizer step alone: a resumed run alternates on, also with another global batch size.

    Args:
        videos: Endless data set.
        pictures: Endless data set; its item i takes the place of the videos' item i.
        every: Of so many batches the last one holds pictures.
        global_batch_size: Samples per optimizer step.
        first_item: The item with which this process's training begins.
        first_step: Optimizer steps made before it.
    """

    def __init__(
        self,
        videos: torch.utils.data.Dataset,
        pictures: torch.utils.data.Dataset,
        *,
        every: int,
        global_batch_size: int,
        first_item: int,
        first_step: int,
    ) -> None:
        self._videos, self._pictures, self._every = videos, pictures, every
        self._global_batch_size = global_batch_size
        self._first_item, self._first_step = first_item, first_step

    def __len__(self) -> int:
        """Number of items, over all epochs."""
        return len(self._videos)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """The item of the kind that its optimizer step has."""
        step = self._first_step + (index - self._first_item) // self._global_batch_size
        return (self._pictures if step % self._every == self._every - 1 else self._videos)[index]


def _item(dataset: torch.utils.data.Dataset, place: int, generator: np.random.Generator) -> dict[str, torch.Tensor]:
    return dataset.drawn(place, generator) if hasattr(dataset, "drawn") else dataset[place]


def _order_of_epoch(length: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(length)
