"""Samples of different sizes, packed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nemo_cosmos.data.packs import PackedSamples, collate_packs, pack_first_fit
from nemo_cosmos.data.shuffle import ShuffledEpochs
from nemo_cosmos.errors import UserError


class Sized(torch.utils.data.Dataset):
    def __init__(self, tokens: int, length: int) -> None:
        self.tokens, self.length = tokens, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"tokens": torch.tensor(self.tokens), "index": torch.tensor(index), "latent": torch.zeros(self.tokens)}


def packs(seed: int = 0, tokens_per_pack: int = 100) -> PackedSamples:
    return PackedSamples([Sized(60, 10), Sized(10, 40)], [60, 10], tokens_per_pack=tokens_per_pack, seed=seed)


def contents(data: PackedSamples) -> list[list[tuple[int, int]]]:
    return [[(int(c["tokens"]), int(c["index"])) for c in data[i]["clips"]] for i in range(len(data))]


def test_every_sample_is_in_one_pack_and_no_pack_is_too_full() -> None:
    found = contents(packs())
    assert sorted(sum(found, [])) == sorted([(60, i) for i in range(10)] + [(10, i) for i in range(40)])
    assert all(sum(tokens for tokens, _ in pack) <= 100 for pack in found)
    assert len(found) == 10  # 1000 tokens fill ten packs to the brim


def test_packs_depend_on_the_seed_alone() -> None:
    assert contents(packs()) == contents(packs()) != contents(packs(seed=1))


def test_few_packs_stay_open() -> None:
    """Items of 51 never share a pack of 100; looking for room among all of them would take quadratic time."""
    sizes = np.array([51] * 500 + [49] * 500)
    made = pack_first_fit(sizes, np.arange(1000), 100)
    assert sorted(sum(made, [])) == list(range(1000))
    filled = [sizes[pack].sum() for pack in made]
    assert max(filled) <= 100 and sum(total > 51 for total in filled) > 60


def test_a_sample_larger_than_a_pack_is_refused() -> None:
    with pytest.raises(UserError, match="tokens_per_pack: got 50, expected at least the 60 of the largest sample"):
        packs(tokens_per_pack=50)


def test_clips_of_a_micro_batch_become_batches_of_one_with_draws_of_their_own() -> None:
    endless = ShuffledEpochs(packs(), num_samples=1000, seed=3)
    items = [endless[17], endless[18]]
    clips = collate_packs(items)["clips"]
    assert len(clips) == sum(len(item["clips"]) for item in items)
    assert all(clip["latent"].shape == (1, int(clip["tokens"])) for clip in clips)
    draws = [int(clip["draw_id"]) for clip in clips]
    assert len(set(draws)) == len(draws)
    assert draws[0] == 17  # the first clip draws what it would draw alone
