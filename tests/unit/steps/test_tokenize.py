"""The latent cache through NeMo-Curator's executors, with the embedded tokenizer."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import webdataset

from nemo_cosmos.checkpoints.convert import convert
from nemo_cosmos.data.latent_cache import LatentCacheConfig, read_cache_card
from nemo_cosmos.data.token_files import TokenFiles
from nemo_cosmos.errors import UserError
from nemo_cosmos.files import read_json, write_json
from nemo_cosmos.steps.tokenize import tokenize
from nemo_cosmos.steps.tokenize_stages import TokenizeStage
from nemo_cosmos.text import encoder, load_text_encoder, pack_text_states, text_encoder_fingerprint
from nemo_cosmos.tokenizer import weights
from nemo_cosmos.tokenizer.config import preset
from nemo_cosmos.tokenizer.model import CausalVideoTokenizer, ImageTokenizer
from tests.unit.text.tiny_t5 import write_tiny_t5

CONFIG = LatentCacheConfig(num_frames=17, height=32, width=32, window_stride=8, batch_size=2)


def _files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


@pytest.fixture
def reference(curated, tmp_path):
    """The cache that one process writes."""
    tokenize(curated, tmp_path / "one", config=CONFIG)
    return _files(tmp_path / "one")


def test_an_array_of_tasks_writes_the_same_cache(curated, tmp_path, reference, monkeypatch):
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "3")
    cards = []
    for task in range(3):
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(task))
        cards.append(tokenize(curated, tmp_path / "array", config=CONFIG))
    assert cards[0] is None
    assert cards[-1] == read_cache_card(tmp_path / "one")
    assert _files(tmp_path / "array") == reference


def test_the_text_encoder_is_loaded_once_and_not_by_what_tokenizes(curated, tmp_path, monkeypatch):
    monkeypatch.setenv("NEMO_COSMOS_CACHE", str(tmp_path / "cache"))
    loads, tokenizing = [], []
    load, process = encoder._load, TokenizeStage.process
    monkeypatch.setattr(encoder, "_load", lambda *args: loads.append(bool(tokenizing)) or load(*args))
    monkeypatch.setattr(TokenizeStage, "process", lambda *args: tokenizing.append(1) or process(*args))
    tokenize(curated, tmp_path / "one", config=CONFIG)
    assert loads == [False]
    tokenize(curated, tmp_path / "two", config=CONFIG)
    assert loads == [False]
    assert _files(tmp_path / "one") == _files(tmp_path / "two")


def _store_states(curated, text_encoder, *, but=()):
    """Puts the states of all captions, but those, beside the clips, as curation does that embeds them."""
    whole = load_text_encoder(text_encoder)
    for path in curated.rglob("*.tar"):
        samples = [dict(sample) for sample in webdataset.WebDataset(str(path), shardshuffle=False)]
        with webdataset.TarWriter(str(path), encoder=False) as tar:
            for sample in samples:
                texts = {window["text"] for window in json.loads(sample["json"])["captions"]} - set(but)
                states = {text: whole.encode([text]) for text in texts}
                states = {text: found[mask] for text, ((found,), (mask,)) in states.items()}
                packed = pack_text_states(text_encoder_fingerprint(text_encoder), states)
                tar.write({name: sample[name] for name in ("__key__", "mp4", "json")} | {"safetensors": packed})


def test_what_curation_embedded_is_not_encoded_again(curated, tmp_path, monkeypatch):
    t5 = str(write_tiny_t5(tmp_path / "pipeline"))
    tokenize(curated, tmp_path / "encoded", text_encoder=t5, config=CONFIG)
    _store_states(curated, t5, but=["first of 0"])
    monkeypatch.setenv("NEMO_COSMOS_CACHE", str(tmp_path / "empty"))
    encoded, encode = [], encoder.TextEncoder.encode
    monkeypatch.setattr(encoder.TextEncoder, "encode", lambda self, texts: encoded.extend(texts) or encode(self, texts))
    tokenize(curated, tmp_path / "stored", text_encoder=t5, config=CONFIG)
    assert encoded == ["first of 0"]
    latents = [
        {name: data for name, data in _files(tmp_path / folder).items() if not name.startswith("shards")}
        for folder in ("encoded", "stored")  # `shards` tells which curated files they were made of
    ]
    assert latents[0] == latents[1]
    other = str(write_tiny_t5(tmp_path / "other", seed=1))
    encoded.clear()
    tokenize(curated, tmp_path / "other_encoder", text_encoder=other, config=CONFIG)
    assert len(encoded) == len(set(encoded)) == 8  # clip 4 is too short


def test_captions_may_be_encoded_by_a_pipelines_own_t5(curated, tmp_path):
    folder = write_tiny_t5(tmp_path / "pipeline")
    card = tokenize(curated, tmp_path / "out", text_encoder=str(folder), config=CONFIG)
    assert (card.text_encoder, card.text_dim, card.text_length) == (str(folder), 16, 512)


@pytest.mark.slow
def test_ray_data_writes_the_same_cache(curated, tmp_path, reference):
    tokenize(curated, tmp_path / "ray", config=CONFIG, executor="ray_data")
    assert _files(tmp_path / "ray") == reference


def test_a_discrete_tokenizer_gives_indices(curated, tmp_path):
    torch.manual_seed(0)
    weights.save(CausalVideoTokenizer(preset("DV8x8x8-tiny")), tmp_path / "dv")
    given = {"tokenizer": str(tmp_path / "dv"), "token_files": tmp_path / "files"}
    card = tokenize(curated, tmp_path / "out", config=CONFIG, **given)
    assert (card.continuous, card.latent_shape, card.vocab_size) == (False, (3, 4, 4), 4096)
    assert len(TokenFiles(tmp_path / "files", split="train")) == card.num_samples["train"]
    with pytest.raises(UserError, match="token_files: got .*, expected None with a continuous tokenizer"):
        tokenize(curated, tmp_path / "other", config=CONFIG, token_files=tmp_path / "files")
    assert not (tmp_path / "other").exists()


def test_the_cache_is_normalised_by_what_the_tokenizer_comes_with(curated, tmp_path):
    convert("tokenizer_tiny", tmp_path / "vae", to="diffusers")
    values = read_json(tmp_path / "vae" / "config.json")
    mean, std = [0.1 * i for i in range(16 * 3)], [1 + 0.1 * i for i in range(16 * 3)]
    write_json(tmp_path / "vae" / "config.json", values | {"latents_mean": mean, "latents_std": std})
    card = tokenize(curated, tmp_path / "out", tokenizer=str(tmp_path / "vae"), config=CONFIG)
    assert (card.latent_mean, card.latent_std) == (tuple(mean), tuple(std))
    longer = dataclasses.replace(CONFIG, num_frames=25)
    with pytest.raises(UserError, match="latent statistics of vae: got 'statistics of 3 latent frames', .*at least 4"):
        tokenize(curated, tmp_path / "longer", tokenizer=str(tmp_path / "vae"), config=longer)
    assert not (tmp_path / "longer").exists()


def test_bad_names_are_refused_before_anything_is_written(curated, tmp_path):
    for wrong in ({"executor": "threads"}, {"text_encoder": "none"}, {"tokenizer": "nothing_of_that_name"}):
        with pytest.raises(UserError, match=next(iter(wrong.values()))):
            tokenize(curated, tmp_path / "out", config=CONFIG, **wrong)
    assert not (tmp_path / "out").exists()


def test_what_the_tokenizer_cannot_take_is_refused_before_anything_is_written(curated, tmp_path):
    torch.manual_seed(0)
    weights.save(ImageTokenizer(preset("CI8x8-tiny")), tmp_path / "ci")
    with pytest.raises(UserError, match="expected a video tokenizer"):
        tokenize(curated, tmp_path / "out", tokenizer=str(tmp_path / "ci"), config=CONFIG)
    with pytest.raises(UserError, match="number of frames: got 16"):
        tokenize(curated, tmp_path / "out", config=dataclasses.replace(CONFIG, num_frames=16))
    with pytest.raises(UserError, match="holds no curated shards"):
        tokenize(tmp_path / "nowhere", tmp_path / "out", config=CONFIG)
    assert not (tmp_path / "out").exists()
