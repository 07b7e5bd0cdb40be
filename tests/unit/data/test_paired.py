"""Latents with the tokens of the same windows."""

import dataclasses
import json

import pytest
import torch

from nemo_cosmos.contracts import LatentCacheCard
from nemo_cosmos.data.datamodule import LatentDataModule, PairedLatentDataModule
from nemo_cosmos.data.latent_cache import LatentCacheConfig, LatentDataset, cache_card
from nemo_cosmos.data.latent_writer import LatentWriter, begin_latent_cache, finish_latent_cache, unwritten_shards
from nemo_cosmos.errors import UserError
from nemo_cosmos.files import write_json
from nemo_cosmos.text import TextEncoderConfig
from tests.unit.data.curated_folder import write_curated


class Averages:
    """8x8x8 by averages; as tokens, their brightness on a scale of 256."""

    def __init__(self, discrete):
        self.discrete = discrete

    def encode(self, video_BCTHW):
        latent = torch.nn.functional.avg_pool3d(video_BCTHW[:, :, ::8], (1, 8, 8))
        return ((latent.mean(1) + 1) * 127.5).int() if self.discrete else latent


class NoText:
    config = TextEncoderConfig(name="none", dim=4, max_length=3, architecture="bert")

    def encode(self, prompts):
        return torch.zeros(len(prompts), 3, 4), torch.ones(len(prompts), 3, dtype=torch.bool)


def write(curated, output, *, discrete, **config):
    config = LatentCacheConfig(**{"num_frames": 17, "height": 32, "width": 32, "window_stride": 4, **config})
    begin_latent_cache(curated, output, f"discrete {discrete}", config, "none")
    writer = LatentWriter(curated, output, tokenizer=Averages(discrete), text_encoder=NoText(), config=config)
    for shard in sorted(unwritten_shards(curated, output), reverse=discrete):
        writer.write(shard)
    finish_latent_cache(
        curated,
        output,
        fingerprint=f"discrete {discrete}",
        tokenizer_name="averages",
        text_encoder=NoText.config,
        config=config,
        vocab_size=256 if discrete else None,
    )
    return str(output)


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    folder = tmp_path_factory.mktemp("paired")
    curated = write_curated(folder)
    latents, tokens = (write(curated, folder / f"{discrete}", discrete=discrete) for discrete in (False, True))
    return latents, tokens


def test_latents_come_with_the_tokens_of_their_own_window(caches):
    data = PairedLatentDataModule(*caches, micro_batch_size=1, global_batch_size=1)
    card = data.cache_cards[0]
    mean, std = (torch.tensor(x).view(-1, 1, 1, 1) for x in (card.latent_mean, card.latent_std))
    for split, number in (("train", 9), ("heldout", 3)):
        samples = data.dataset(split)
        assert len(samples) == number
        for item in (samples[i] for i in range(number)):
            brightness = ((item["latent"] * std + mean).mean(0) + 1) * 127.5
            # bf16 keeps eight bits of the latent, and codes are rounded down.
            assert (brightness - item["tokens"]).abs().max() < 2
    # Neighbouring windows differ by more than that, or the test would see nothing.
    assert (samples[0]["tokens"] - samples[1]["tokens"]).abs().max() > 4
    assert data.card_fields()["tokenizer_fingerprint"] == "discrete False"
    assert data.card_fields()["token_fingerprint"] == "discrete True"
    assert data.card_fields()["data"] == "latents and tokens of 9 windows"


def test_the_order_is_that_of_the_latents_alone(caches):
    """So it is resumed, and shared among ranks, as theirs is."""
    paired = PairedLatentDataModule(*caches, seed=3).training_samples(20)
    alone = LatentDataModule(caches[0], seed=3).training_samples(20)
    for index in (0, 7, 19):
        assert torch.equal(paired[index]["latent"], alone[index]["latent"])
        assert paired[index]["draw_id"] == index


def test_caches_of_other_windows_are_refused(caches, tmp_path):
    latents, tokens = caches
    curated = write_curated(tmp_path)
    other = write(curated, tmp_path / "stride", discrete=True, window_stride=8)
    with pytest.raises(UserError, match=r"windows of .*stride: got .*same curated folder"):
        PairedLatentDataModule(latents, other)
    with pytest.raises(UserError, match="indices of the discrete tokenizer"):
        PairedLatentDataModule(tokens, tokens)
    with pytest.raises(UserError, match="tokens: got .*latents of averages"):
        PairedLatentDataModule(latents, latents)
    # As many windows of the same sizes, but others.
    card = LatentCacheCard.from_dict(json.loads(cache_card(other).read_text()))
    same_sizes = LatentDataset(latents, split="train").card.num_samples
    write_json(cache_card(other), dataclasses.replace(card, num_samples=same_sizes).to_dict())
    with pytest.raises(UserError, match=r"windows of the latents have no tokens, \d+ of the tokens no latents"):
        PairedLatentDataModule(latents, other).dataset("train")
