"""What megatron-energon makes of the folders that `nemo-cosmos curate` and `nemo-cosmos tokenize` write."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from megatron.energon import WorkerConfig, get_loader, get_savable_loader, get_train_dataset, get_val_dataset

from nemo_cosmos.data.energon import LatentTaskEncoder
from nemo_cosmos.data.latent_cache import LatentDataset
from tests.unit.data.test_latent_cache import _write
from tests.unit.data.test_token_files import Indices
from tests.unit.energon_prepared import assert_prepared_as_by_energon

FIELDS = ("latent", "text_emb", "text_mask", "fps", "actions")


@pytest.fixture
def cache(curated: Path, tmp_path: Path) -> Path:
    """Nine training samples in one shard, three held-out ones in another; another shard has too short a clip only."""
    _write(curated, tmp_path / "latents")
    return tmp_path / "latents"


def alone() -> WorkerConfig:
    return WorkerConfig(rank=0, world_size=1, num_workers=0)


@pytest.mark.parametrize(("split", "part"), [("train", "train"), ("heldout", "val")])
def test_samples_are_those_that_training_reads(cache: Path, split: str, part: str) -> None:
    encoder = LatentTaskEncoder(cache, with_actions=True)
    data = get_val_dataset(cache, split_part=part, task_encoder=encoder, worker_config=alone(), batch_size=1)
    ours = LatentDataset(cache, split=split, with_actions=True)
    theirs = list(get_loader(data))
    assert [batch.__key__ for batch in theirs] == [[sample.key] for sample in ours.samples]
    for batch, item in zip(theirs, (ours[i] for i in range(len(ours))), strict=True):
        assert all(torch.equal(getattr(batch, name)[0], item[name]) for name in FIELDS)


def test_indices_of_a_discrete_tokenizer_come_as_tokens(curated: Path, tmp_path: Path) -> None:
    _write(curated, tmp_path / "tokens", tokenizer=Indices())
    encoder = LatentTaskEncoder(tmp_path / "tokens")
    data = get_val_dataset(
        tmp_path / "tokens", split_part="train", task_encoder=encoder, worker_config=alone(), batch_size=3
    )
    batch = next(iter(get_loader(data)))
    ours = LatentDataset(tmp_path / "tokens", split="train")
    assert batch.latent == [None] * 3  # what energon makes of absent fields
    assert torch.equal(batch.tokens, torch.stack([ours[i]["tokens"] for i in range(3)]))


def test_energon_goes_on_in_mid_epoch(cache: Path) -> None:
    def loader():
        data = get_train_dataset(
            cache,
            task_encoder=LatentTaskEncoder(cache),
            worker_config=alone(),
            batch_size=2,
            shuffle_buffer_size=4,
            max_samples_per_sequence=2,
        )
        return get_savable_loader(data)

    whole = loader()
    steps = iter(whole)
    for _ in range(2):
        next(steps)
    state = whole.save_state_rank()
    expected = [next(steps).__key__ for _ in range(6)]  # 9 samples are an epoch: into the second one
    resumed = loader()
    resumed.restore_state_rank(state)
    steps = iter(resumed)
    assert [next(steps).__key__ for _ in range(6)] == expected


def test_a_cache_is_prepared_as_by_energon(cache: Path, tmp_path: Path) -> None:
    assert_prepared_as_by_energon(cache, tmp_path / "scratch")
