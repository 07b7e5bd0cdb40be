import dataclasses
import json

import pytest
import torch
from safetensors.torch import load as load_safetensors

from nemo_cosmos.contracts import LatentSample
from nemo_cosmos.data import latent_cache, latent_writer
from nemo_cosmos.data.curated import CuratedClips, caption_at, curated_shards
from nemo_cosmos.data.datamodule import LatentDataModule, PackedLatentDataModule
from nemo_cosmos.data.latent_cache import (
    LatentCacheConfig,
    LatentDataset,
    denormalise_latent,
    normalise_latent,
    read_cache_card,
)
from nemo_cosmos.data.latent_writer import LatentWriter, begin_latent_cache, finish_latent_cache, unwritten_shards
from nemo_cosmos.data.tar_shard import TarShard
from nemo_cosmos.errors import UserError
from nemo_cosmos.text import TextEncoderConfig
from nemo_cosmos.video_io import to_model


class AverageTokenizer:
    """Compresses 8x8x8 by taking every eighth frame and averaging its blocks."""

    def __init__(self, name="a"):
        self.name, self.calls = name, 0

    def encode(self, video_BCTHW):
        self.calls += 1
        return torch.nn.functional.avg_pool3d(video_BCTHW[:, :, ::8], (1, 8, 8))

    def fingerprint(self):
        return self.name


class LengthEncoder:
    """Encodes a text by its length."""

    config = TextEncoderConfig(name="length", dim=4, max_length=3, architecture="bert")

    def encode(self, prompts):
        states = torch.tensor([float(len(p)) for p in prompts]).view(-1, 1, 1).expand(-1, 3, 4)
        return states.clone(), torch.ones(len(prompts), 3, dtype=torch.bool)


CONFIG = LatentCacheConfig(num_frames=17, height=32, width=32, window_stride=4, batch_size=2)


def _write(curated, output, *, tokenizer=None, text_encoder=None, config=CONFIG, shards=None, statistics=None):
    tokenizer, text_encoder = tokenizer or AverageTokenizer(), text_encoder or LengthEncoder()
    begin_latent_cache(curated, output, tokenizer.fingerprint(), config, text_encoder.config.name)
    writer = LatentWriter(curated, output, tokenizer=tokenizer, text_encoder=text_encoder, config=config)
    for shard in unwritten_shards(curated, output) if shards is None else shards:
        writer.write(shard)
    return finish_latent_cache(
        curated,
        output,
        fingerprint=tokenizer.fingerprint(),
        tokenizer_name="average",
        text_encoder=text_encoder.config,
        config=config,
        statistics=statistics,
    )


def test_samples_hold_their_own_window_caption_and_actions(curated, tmp_path):
    card = _write(curated, tmp_path / "latents")
    assert card.num_samples == {"train": 9, "heldout": 3}
    assert card.latent_shape == (3, 3, 4, 4)
    data = LatentDataset(tmp_path / "latents", split="train", with_actions=True)
    clips = CuratedClips(curated, split="train")
    for sample, item in zip(data.samples, (data[i] for i in range(len(data))), strict=True):
        index = next(i for i, r in enumerate(clips.records) if r.clip_id == sample.clip_id)
        window = clips.frames(index, height=32, width=32)[sample.start_frame :][:17]
        expected = torch.from_numpy(window[::8].copy()).permute(3, 0, 1, 2).float() / 127.5 - 1
        expected = torch.nn.functional.avg_pool3d(expected, (1, 8, 8))
        stored = denormalise_latent(item["latent"], card.latent_mean, card.latent_std)
        # The cache stores bf16, which keeps eight bits.
        torch.testing.assert_close(stored, expected, atol=2**-8, rtol=2**-8)
        assert item["actions"][0].tolist()[:2] == [float(sample.clip_id[-1]), float(sample.start_frame)]
        assert sample.caption == caption_at(clips.records[index], sample.start_frame, 17)
        assert item["text_emb"][0, 0] == len(sample.caption)


def test_pixels_go_to_this_ranks_device_and_latents_come_back(curated, tmp_path, monkeypatch):
    class OnMeta(AverageTokenizer):
        def encode(self, video_BCTHW):
            assert video_BCTHW.device.type == "meta"
            return super().encode(video_BCTHW)

    monkeypatch.setattr(latent_writer, "current_device", lambda: torch.device("meta"))
    halves = torch.tensor([1.0, 3.0])
    monkeypatch.setattr(
        torch.Tensor, "cpu", lambda tensor: halves.repeat_interleave(tensor.shape[-1] // 2).expand(tensor.shape)
    )
    card = _write(curated, tmp_path / "latents", tokenizer=OnMeta())
    assert (card.latent_mean, card.latent_std) == ((2.0,) * 3, (1.0,) * 3)


def test_training_latents_have_zero_mean_and_unit_variance(curated, tmp_path):
    _write(curated, tmp_path / "latents")
    data = LatentDataset(tmp_path / "latents", split="train")
    latents = torch.stack([data[i]["latent"] for i in range(len(data))])
    torch.testing.assert_close(latents.mean((0, 2, 3, 4)), torch.zeros(3), atol=1e-2, rtol=0)
    torch.testing.assert_close(latents.std((0, 2, 3, 4)), torch.ones(3), atol=1e-2, rtol=0)


def test_a_latent_is_normalised_by_the_numbers_of_its_frames():
    """As the reference and diffusers do: a view by channel and frame, of which the first frames are taken."""
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn(2, 4, 3, 2, 2, generator=generator)
    mean, std = torch.randn(4 * 5, generator=generator), torch.rand(4 * 5, generator=generator) + 0.5
    as_diffusers = [x.view(1, 4, -1, 1, 1)[:, :, :3] for x in (mean, std)]
    numbers = tuple(mean.tolist()), tuple(std.tolist())
    normalised = normalise_latent(latent, *numbers)
    assert torch.equal(normalised, (latent - as_diffusers[0]) / as_diffusers[1])
    assert torch.equal(denormalise_latent(normalised, *numbers), normalised * as_diffusers[1] + as_diffusers[0])
    per_channel = (1.0, 2.0, 3.0, 4.0)
    expected = latent - torch.tensor(per_channel).view(4, 1, 1, 1)
    assert torch.equal(normalise_latent(latent, per_channel, (1.0,) * 4), expected)
    with pytest.raises(UserError, match="latent frames: got 6, expected at most 5"):
        normalise_latent(torch.zeros(4, 6, 2, 2), *numbers)


def test_what_the_tokenizer_comes_with_goes_before_what_is_measured(curated, tmp_path):
    own = (tuple(float(i) for i in range(12)), tuple(1.0 + i for i in range(12)))  # 3 channels, 4 frames
    card = _write(curated, tmp_path / "latents", statistics=own)
    assert (card.latent_mean, card.latent_std) == own
    raw = LatentDataset(tmp_path / "latents", split="train", statistics=((0.0,) * 3, (1.0,) * 3))[0]["latent"]
    expected = (raw - torch.tensor(own[0]).view(3, 4, 1, 1)[:, :3]) / torch.tensor(own[1]).view(3, 4, 1, 1)[:, :3]
    assert torch.equal(LatentDataset(tmp_path / "latents", split="train")[0]["latent"], expected)
    with pytest.raises(UserError, match="latent statistics: got 'statistics of 2 latent frames', expected at least 3"):
        LatentDataset(tmp_path / "latents", split="train", statistics=((0.0,) * 6, (1.0,) * 6))


def test_shards_may_be_written_in_any_order_and_twice(curated, tmp_path):
    _write(curated, tmp_path / "one")
    first, second = curated_shards(curated)
    assert _write(curated, tmp_path / "two", shards=[second]) is None
    card = _write(curated, tmp_path / "two", shards=[first, second])
    assert card == read_cache_card(tmp_path / "one")
    tars = sorted((tmp_path / "one").rglob("*.tar"))
    assert len(tars) == 2  # the second shard's training clip is too short, and energon refuses an empty tar
    for path in tars:
        assert path.read_bytes() == (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes()


def test_a_second_run_encodes_nothing(curated, tmp_path):
    _write(curated, tmp_path / "latents")
    again = AverageTokenizer()
    _write(curated, tmp_path / "latents", tokenizer=again)
    assert again.calls == 0


def test_an_interrupted_run_goes_on(curated, tmp_path):
    class Dying(AverageTokenizer):
        def encode(self, video_BCTHW):
            if self.calls == 3:
                raise KeyboardInterrupt
            return super().encode(video_BCTHW)

    with pytest.raises(KeyboardInterrupt):
        _write(curated, tmp_path / "latents", tokenizer=Dying())
    with pytest.raises(UserError, match="no finished latent cache"):
        read_cache_card(tmp_path / "latents")
    assert _write(curated, tmp_path / "latents") == _write(curated, tmp_path / "whole")
    assert not list((tmp_path / "latents").rglob("*.part*"))


def test_what_a_killed_writer_left_aside_is_not_read(curated, tmp_path):
    _write(curated, tmp_path / "cache")
    whole = len(LatentDataset(tmp_path / "cache", split="train"))
    (tmp_path / "cache" / "train" / ".shard.0a1b2c3d.part.tar").write_bytes(b"half a sh")
    shard = next(curated.glob("resolution_*/**/*.tar"))
    left_aside = shard.with_name(".shard.0a1b2c3d.part.tar")
    left_aside.write_bytes(b"half a sh")
    try:
        assert len(LatentDataset(tmp_path / "cache", split="train")) == whole
        assert len(CuratedClips(curated)) > 0
    finally:
        left_aside.unlink()


def test_another_tokenizer_is_refused(curated, tmp_path):
    _write(curated, tmp_path / "latents")
    with pytest.raises(UserError, match="another output folder"):
        _write(curated, tmp_path / "latents", tokenizer=AverageTokenizer("b"))
    with pytest.raises(UserError, match="another output folder"):
        _write(curated, tmp_path / "latents", config=dataclasses.replace(CONFIG, window_stride=8))


def test_too_short_clips_are_refused(curated, tmp_path):
    with pytest.raises(UserError, match="no training clip has 33 frames"):
        _write(curated, tmp_path / "latents", config=dataclasses.replace(CONFIG, num_frames=33))


def test_sources_and_actions_filter(curated, tmp_path):
    _write(curated, tmp_path / "latents")
    assert {s.source for s in LatentDataset(tmp_path / "latents", split="train", sources=("arm",)).samples} == {"arm"}
    with pytest.raises(UserError, match="no train sample passes"):
        LatentDataset(tmp_path / "latents", split="train", sources=("boat",))


def test_nothing_is_read_of_samples_before_they_are_asked_for(curated, tmp_path, monkeypatch):
    _write(curated, tmp_path / "latents")
    read, names = TarShard.read, []
    monkeypatch.setattr(TarShard, "read", lambda shard, name: names.append(name) or read(shard, name))
    data = LatentDataset(tmp_path / "latents", split="train")
    assert (len(data), names) == (9, [])
    assert data[3]["fps"] == 10.0
    assert [name.rpartition(".")[2] for name in names] == ["json", "safetensors"]


def test_samples_with_actions_are_told_without_reading_tensors(curated, tmp_path, monkeypatch):
    _write(curated, tmp_path / "latents", config=dataclasses.replace(CONFIG, num_frames=5))
    monkeypatch.setattr(latent_cache, "load_safetensors", lambda _: pytest.fail("tensors were read"))
    all_samples = LatentDataset(tmp_path / "latents", split="train").samples
    with_actions = LatentDataset(tmp_path / "latents", split="train", with_actions=True).samples
    assert {s.clip_id for s in all_samples} - {s.clip_id for s in with_actions} == {"clip4"}


def test_a_checkpoints_card_names_the_encoder_of_its_captions(curated, tmp_path):
    _write(curated, tmp_path / "latents")
    assert LatentDataModule(str(tmp_path / "latents")).card_fields()["text_encoder"] == "length"


def test_few_text_states_are_kept_and_neighbours_share_them(curated, tmp_path):
    class Noting(LengthEncoder):
        prompts = ()

        def encode(self, prompts):
            self.prompts += tuple(prompts)
            return super().encode(prompts)

    encoder = Noting()
    _write(curated, tmp_path / "latents", text_encoder=encoder)
    assert len(encoder.prompts) == len(set(encoder.prompts))
    writer = LatentWriter(
        curated, tmp_path / "latents", tokenizer=AverageTokenizer(), text_encoder=encoder, config=CONFIG
    )
    for number in range(100):
        writer._text(f"caption {number}")
    assert writer._text.cache_info().currsize < 50


def test_empty_and_broken_folders_are_refused(curated, tmp_path):
    with pytest.raises(UserError, match="holds no curated shards"):
        CuratedClips(tmp_path / "nothing")
    shard = next(curated.rglob("*.tar"))
    shard.write_bytes(b"not a tar" * 100)
    with pytest.raises(UserError, match=f"{shard.name}: not a readable tar shard"):
        CuratedClips(curated)


def test_decoded_frames_are_kept_when_asked(curated):
    clips = CuratedClips(curated, split="train")
    first = clips.frames(0, height=16, width=16, cache=True)
    again = clips.frames(0, height=16, width=16, cache=True)
    assert not again.flags.writeable
    assert (first == again).all()
    assert json.dumps(clips.records[0].to_dict())


def test_a_discrete_tokenizers_indices_are_kept_as_they_are(curated, tmp_path):
    class Indices(AverageTokenizer):
        def encode(self, video_BCTHW):
            return (super().encode(video_BCTHW).mean(1) * 100).round().to(torch.int32) + 60_000

    tokenizer = Indices()
    card = _write(curated, tmp_path / "latents", tokenizer=tokenizer)
    assert (card.continuous, card.latent_shape, card.latent_mean, card.latent_std) == (False, (3, 4, 4), (), ())
    shard = TarShard(next((tmp_path / "latents" / "train").glob("*.tar")))
    key = shard.keys[0]
    stored = load_safetensors(shard.read(f"{key}.safetensors"))["latent"]
    sample = json.loads(shard.read(f"{key}.json"))
    clips = CuratedClips(curated, split="train")
    index = next(i for i, r in enumerate(clips.records) if r.clip_id == sample["clip_id"])
    frames = clips.frames(index, height=32, width=32)[sample["start_frame"] :][:17]
    assert stored.dtype is torch.int32
    assert torch.equal(stored, tokenizer.encode(to_model(frames)[None])[0])
    item = LatentDataset(tmp_path / "latents", split="train")[0]
    assert item["tokens"].dtype is torch.int32 and torch.equal(item["tokens"], stored)
    assert item.keys() == {"tokens", "text_emb", "text_mask", "fps"}
    assert LatentDataModule(str(tmp_path / "latents"), patch_spatial=1).seq_length == 3 * 4 * 4
    with pytest.raises(UserError, match="indices of the discrete tokenizer average"):
        PackedLatentDataModule((str(tmp_path / "latents"),), tokens_per_pack=100)


def test_what_another_curation_wrote_is_encoded_anew_and_the_rest_removed(curated, tmp_path):
    _write(curated, tmp_path / "latents")
    first, second = curated_shards(curated)
    # Another curation puts other clips under a name that was there, and needs one shard less.
    (curated / first).unlink()
    (curated / second).rename(curated / first)
    assert unwritten_shards(curated, tmp_path / "latents") == [first]
    begin_latent_cache(curated, tmp_path / "latents", "a", CONFIG, "length")
    with pytest.raises(UserError, match="no finished latent cache"):
        read_cache_card(tmp_path / "latents")
    with pytest.raises(UserError, match="no training clip"):  # what is left is too short, or held out
        _write(curated, tmp_path / "latents")
    assert [path.name for path in (tmp_path / "latents").rglob("*.tar")] == [first.replace("/", "__")]
    assert not (tmp_path / "latents" / ".nv-meta" / ".info.json").exists()
    assert {s.clip_id for s in _samples(tmp_path / "latents", "heldout")} == {"clip3"}


def _samples(cache, split):
    shards = [TarShard(path) for path in (cache / split).glob("*.tar")]
    return [LatentSample.from_dict(json.loads(s.read(f"{key}.json"))) for s in shards for key in s.keys]


def test_latents_that_do_not_vary_are_refused(curated, tmp_path):
    class Constant(AverageTokenizer):
        def encode(self, video_BCTHW):
            latent = super().encode(video_BCTHW)
            latent[:, 1] = 0.1
            return latent

    with pytest.raises(UserError, match=r"channels \[1\] are the same number"):
        _write(curated, tmp_path / "latents", tokenizer=Constant())
