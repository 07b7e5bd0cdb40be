"""Tokens of videos as Megatron's indexed data set: `.bin` and `.idx`, with a card beside them.

    tokens/cache.json                        tokenizer, its fingerprint and vocabulary, grid, number of videos
    tokens/train.bin, tokens/train.idx       one document of one sequence for each video
    tokens/heldout.bin, tokens/heldout.idx

A sequence holds a video's indices frame by frame and row by row, T x H x W of them, without special tokens. They are
uint16 where the vocabulary fits, as Megatron's own tools write them, and may be read by
`megatron.core.datasets.indexed_dataset.IndexedDataset`. There is no text and there are no actions. Files that other
tools wrote need the card only; its `text_encoder` is empty.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import (
    DType,
    IndexedDataset,
    IndexedDatasetBuilder,
    get_bin_path,
    get_idx_path,
)

from nemo_cosmos.contracts import LatentCacheCard, Split
from nemo_cosmos.data.latent_cache import LatentDataset, cache_card, read_cache_card
from nemo_cosmos.errors import UserError, user_error
from nemo_cosmos.files import write_json, written_aside

_SPLITS: tuple[Split, ...] = ("train", "heldout")


def are_token_files(root: str | Path) -> bool:
    """Tells whether a folder holds token files, and not a latent cache."""
    return any(Path(get_idx_path(_prefix(root, split))).is_file() for split in _SPLITS)


def _prefix(root: str | Path, split: Split) -> str:
    return str(Path(root) / split)


class TokenFiles(torch.utils.data.Dataset):
    """The videos of one split of token files.

    Args:
        root: The folder.
        split: Which split.

    Raises:
        UserError: A file or the card is missing, or a sequence is not a whole video of the card's grid.
    """

    def __init__(self, root: str | Path, *, split: Split) -> None:
        self.card = read_cache_card(root)
        prefix = _prefix(root, split)
        if not IndexedDataset.exists(prefix):
            raise UserError(f"{prefix}: no .bin and .idx here. Write them, or give the folder that holds them.")
        self._sequences = IndexedDataset(prefix)
        length = math.prod(self.card.latent_shape)
        lengths = self._sequences.sequence_lengths
        if not len(lengths):
            raise UserError(f"{prefix}: holds no video. Collect and curate such video first.")
        if (others := lengths[lengths != length]).size:
            raise user_error(
                f"sequences of {prefix}",
                f"{others.size} of other lengths, such as {others[0]}",
                f"{length} tokens each, the card's grid {self.card.latent_shape}",
                "Correct the card, or write videos of other sizes to a folder of their own.",
            )

    def __len__(self) -> int:
        """Number of videos."""
        return len(self._sequences)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """`tokens`, int32 [T, H, W]."""
        tokens = self._sequences[index].astype(np.int32)
        return {"tokens": torch.from_numpy(tokens).view(self.card.latent_shape)}


def write_token_files(cache: str | Path, output: str | Path) -> LatentCacheCard:
    """Writes the tokens of a latent cache as Megatron's indexed data set, in the cache's order.

    Args:
        cache: Folder of a finished cache of a discrete tokenizer.
        output: Folder to write.

    Returns:
        The card of the token files.

    Raises:
        UserError: The cache is unfinished or continuous, or it does not tell its vocabulary.
    """
    card = read_cache_card(cache)
    if card.continuous or card.vocab_size is None:
        raise user_error(
            f"{cache}",
            f"continuous {card.continuous}, vocab_size {card.vocab_size}",
            "indices of a discrete tokenizer, and how many codes it has",
            "Write the cache anew with a DV tokenizer.",
        )
    Path(output).mkdir(parents=True, exist_ok=True)
    for split in _SPLITS:
        if card.num_samples.get(split):
            _write_split(LatentDataset(cache, split=split), _prefix(output, split), card.vocab_size)
    written = dataclasses.replace(card, text_encoder="", text_dim=0, text_length=0)
    write_json(cache_card(output), written.to_dict())
    return written


def _write_split(samples: LatentDataset, prefix: str, vocab_size: int) -> None:
    # The index comes last: without it nobody takes the folder for whole.
    with written_aside(Path(get_idx_path(prefix))) as index, written_aside(Path(get_bin_path(prefix))) as data:
        builder = IndexedDatasetBuilder(str(data), dtype=DType.optimal_dtype(vocab_size))
        for number in range(len(samples)):
            builder.add_item(samples[number]["tokens"].flatten())
            builder.end_document()
        builder.finalize(str(index))
