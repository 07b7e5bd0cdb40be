"""Videos and pictures are each normalised by the statistics of their own kind."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nemo_cosmos.contracts import CheckpointCard, LatentCacheCard
from nemo_cosmos.data.datamodule import LatentDataModule, PackedLatentDataModule
from nemo_cosmos.data.latent_cache import LatentCacheConfig
from nemo_cosmos.data.statistics import statistics_for
from nemo_cosmos.errors import UserError
from nemo_cosmos.files import write_json
from nemo_cosmos.tokenizer.statistics import LatentStatistics
from tests.unit.data.curated_folder import write_curated
from tests.unit.data.test_latent_cache import _write

VIDEO = LatentCacheCard(
    tokenizer="tiny",
    tokenizer_fingerprint="f",
    continuous=True,
    latent_shape=(2, 3, 4, 4),
    num_frames=17,
    height=32,
    width=32,
    latent_mean=(1.0, 2.0),
    latent_std=(3.0, 4.0),
    text_encoder="length",
    text_dim=4,
    text_length=3,
    num_samples={"train": 5},
)
PICTURE = dataclasses.replace(VIDEO, latent_shape=(2, 1, 4, 4), latent_mean=(5.0, 6.0), latent_std=(7.0, 8.0))
LATER = dataclasses.replace(VIDEO, latent_shape=(2, 5, 8, 8), latent_mean=(9.0, 9.0), latent_std=(9.0, 9.0))
FROM_VIDEO, FROM_PICTURE = ((1.0, 2.0), (3.0, 4.0)), ((5.0, 6.0), (7.0, 8.0))


def base(folder: Path, **fields: object) -> str:
    card = CheckpointCard(model="m", config={}, step=1, data="", command="", **{"tokenizer_fingerprint": "f", **fields})
    write_json(folder / "card.json", card.to_dict())
    return str(folder / "card.json")


def test_each_kind_has_those_of_its_first_cache() -> None:
    found = statistics_for((VIDEO, PICTURE, LATER))
    assert (found.of(1), found.of(3)) == (FROM_PICTURE, FROM_VIDEO)
    assert found.card_fields() == {
        "latent_mean": (1.0, 2.0),
        "latent_std": (3.0, 4.0),
        "image_latent_mean": (5.0, 6.0),
        "image_latent_std": (7.0, 8.0),
    }
    alone = statistics_for((PICTURE,))
    assert (alone.of(1), alone.image_mean) == (FROM_PICTURE, None)


def test_a_base_model_keeps_its_own(tmp_path: Path) -> None:
    videos = {"latent_mean": (0.1, 0.2), "latent_std": (0.3, 0.4)}
    found = statistics_for((VIDEO, PICTURE), base(tmp_path, **videos))
    assert (found.of(3), found.of(1)) == (((0.1, 0.2), (0.3, 0.4)), FROM_PICTURE)
    of_both = base(tmp_path, **videos, image_latent_mean=(0.5, 0.6), image_latent_std=(0.7, 0.8))
    for caches in ((VIDEO, PICTURE), (VIDEO,)):
        found = statistics_for(caches, of_both)
        assert (found.of(3), found.of(1)) == (((0.1, 0.2), (0.3, 0.4)), ((0.5, 0.6), (0.7, 0.8)))


@pytest.mark.parametrize("field", ["tokenizer_fingerprint", "text_encoder"])
def test_caches_that_differ_are_refused(field: str) -> None:
    with pytest.raises(UserError, match=rf"{field} of the caches: got \['.*', 'other'\], expected one for all"):
        statistics_for((VIDEO, dataclasses.replace(PICTURE, **{field: "other"})))


def test_another_tokenizers_base_is_refused(tmp_path: Path) -> None:
    card = base(tmp_path, tokenizer_fingerprint="g", latent_mean=(0.0, 0.0), latent_std=(1.0, 1.0))
    with pytest.raises(UserError, match="latents of tokenizer g, but the cache was written by f"):
        statistics_for((VIDEO,), card)


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`videos` of three latent frames, `short` of two, and `pictures`."""
    folder = tmp_path_factory.mktemp("caches")
    curated = write_curated(folder)
    for name, frames in (("videos", 17), ("short", 9), ("pictures", 1)):
        _write(
            curated, folder / name, config=LatentCacheConfig(num_frames=frames, height=32, width=32, window_stride=8)
        )
    return folder


def trained_on(module: LatentDataModule | PackedLatentDataModule, num_items: int) -> list[dict]:
    module.trainer = SimpleNamespace(global_step=0, max_steps=num_items // module.global_batch_size)
    samples = module.training_samples(num_items)
    return [samples[i] for i in range(num_items)]


def test_batches_of_pictures_stand_between_those_of_videos(caches: Path) -> None:
    module = LatentDataModule(
        str(caches / "videos"),
        pictures=str(caches / "pictures"),
        pictures_per_sample=2,
        micro_batch_size=1,
        global_batch_size=2,
    )
    shapes = [tuple(item["latent"].shape) for item in trained_on(module, 8)]
    assert shapes == ([(3, 3, 4, 4)] * 2 + [(2, 3, 1, 4, 4)] * 2) * 2
    for place, frames in ((0, 3), (1, 1)):
        data = module.latents(place, "train")
        latents = torch.stack([data[i]["latent"] for i in range(len(data))])
        assert latents.shape[2] == frames
        # Over its own training split each kind has zero mean and unit variance; the cache stores bf16.
        torch.testing.assert_close(latents.mean((0, 2, 3, 4)), torch.zeros(3), atol=5e-3, rtol=0)
        torch.testing.assert_close(latents.std((0, 2, 3, 4)), torch.ones(3), atol=2e-2, rtol=0)
    card = CheckpointCard(model="m", config={}, step=1, command="", **module.card_fields())
    found = LatentStatistics.of_card(card)
    assert found.of(1) == (module.cache_cards[1].latent_mean, module.cache_cards[1].latent_std) != found.of(3)


def test_packs_mix_sizes_and_hold_every_sample(caches: Path) -> None:
    module = PackedLatentDataModule(
        tuple(str(caches / name) for name in ("videos", "short", "pictures")), tokens_per_pack=24
    )
    packs = module.dataset("train")
    sizes = [[clip["latent"].shape[1] for clip in packs[i]["clips"]] for i in range(len(packs))]
    counts = {frames: sum(pack.count(frames) for pack in sizes) for frames in (3, 2, 1)}
    assert counts == {
        frames: card.num_samples["train"] for frames, card in zip((3, 2, 1), module.cache_cards, strict=True)
    }
    assert all(4 * sum(pack) <= 24 for pack in sizes)
    assert any(len(set(pack)) > 1 for pack in sizes)
    assert module.seq_length == 24


def test_packs_of_nothing_are_refused(caches: Path) -> None:
    module = PackedLatentDataModule((str(caches / "videos"),), tokens_per_pack=24)
    module.cache_cards = tuple(dataclasses.replace(card, num_samples={"train": 1}) for card in module.cache_cards)
    with pytest.raises(UserError, match="videos: no heldout sample. Collect and curate"):
        module.dataset("heldout")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pictures": "videos"}, "pictures: got '3 latent frames', expected 1"),
        ({"pictures": "pictures", "with_actions": True}, "pictures: got .*, expected None with actions"),
        ({"pictures": "pictures", "pictures_every": 1}, "pictures_every: got 1, expected at least 2"),
        ({"pictures": "pictures", "pictures_per_sample": 0}, "pictures_per_sample: got 0, expected at least 1"),
    ],
)
def test_pictures_that_do_not_fit_are_refused(caches: Path, settings: dict, message: str) -> None:
    settings["pictures"] = str(caches / settings["pictures"])
    with pytest.raises(UserError, match=message):
        LatentDataModule(str(caches / "videos"), **settings)
