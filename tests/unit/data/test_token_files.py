"""Tokens as Megatron's indexed data set."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset

from nemo_cosmos.data.datamodule import LatentDataModule
from nemo_cosmos.data.latent_cache import LatentDataset, read_cache_card
from nemo_cosmos.data.token_files import TokenFiles, are_token_files, write_token_files
from nemo_cosmos.errors import UserError
from nemo_cosmos.files import write_json
from tests.unit.data.test_latent_cache import AverageTokenizer, _write


class Indices(AverageTokenizer):
    def encode(self, video_BCTHW: torch.Tensor) -> torch.Tensor:
        return (super().encode(video_BCTHW).mean(1) * 400).round().to(torch.int32) + 60_000


@pytest.fixture
def files(curated: Path, tmp_path: Path) -> Path:
    card = _write(curated, tmp_path / "latents", tokenizer=Indices())
    with pytest.raises(UserError, match="continuous False, vocab_size None"):
        write_token_files(tmp_path / "latents", tmp_path / "files")
    write_json(tmp_path / "latents" / "cache.json", {**card.to_dict(), "vocab_size": 64_000})
    write_token_files(tmp_path / "latents", tmp_path / "files")
    return tmp_path / "files"


def test_megatron_reads_a_document_for_each_video(files: Path) -> None:
    cache = LatentDataset(files.parent / "latents", split="train")
    theirs, ours = IndexedDataset(str(files / "train")), TokenFiles(files, split="train")
    assert len(theirs) == len(ours) == len(cache) == 9
    assert theirs.document_indices.tolist() == list(range(10))
    assert theirs[0].dtype == np.uint16  # half of what int32 takes, as Megatron's own tools choose
    for index in range(9):
        tokens = cache[index]["tokens"]
        assert theirs[index].tolist() == tokens.flatten().tolist()
        assert torch.equal(ours[index]["tokens"], tokens) and ours[index]["tokens"].dtype is torch.int32
    card, of_cache = read_cache_card(files), read_cache_card(files.parent / "latents")
    assert (card.text_encoder, card.text_dim, card.latent_shape) == ("", 0, (3, 4, 4))
    assert (card.vocab_size, card.tokenizer_fingerprint) == (64_000, of_cache.tokenizer_fingerprint)


def test_training_takes_the_folder_for_a_cache(files: Path) -> None:
    assert are_token_files(files) and not are_token_files(files.parent / "latents")
    ours, cache = LatentDataModule(str(files)), LatentDataModule(str(files.parent / "latents"))
    for split in ("train", "heldout"):
        assert torch.equal(ours.dataset(split)[1]["tokens"], cache.dataset(split)[1]["tokens"])
    with pytest.raises(UserError, match="token files hold tokens only"):
        LatentDataModule(str(files), with_actions=True).dataset("train")


def test_files_that_do_not_fit_their_card_are_refused(files: Path) -> None:
    card = read_cache_card(files).to_dict()
    write_json(files / "cache.json", {**card, "latent_shape": [3, 4, 8]})
    with pytest.raises(UserError, match="9 of other lengths, such as 48.*expected 96 tokens each"):
        TokenFiles(files, split="train")
    (files / "heldout.bin").unlink()
    with pytest.raises(UserError, match=r"heldout: no \.bin and \.idx here"):
        TokenFiles(files, split="heldout")
    (files / "cache.json").unlink()
    with pytest.raises(UserError, match="no finished latent cache here"):
        TokenFiles(files, split="train")
