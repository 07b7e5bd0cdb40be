import shutil
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

from nemo_cosmos.errors import UserError
from nemo_cosmos.files import read_json, write_json
from nemo_cosmos.text import TEXT_ENCODERS, TextEncoder, load_text_encoder, text_encoder_config
from nemo_cosmos.text import encoder as encoding
from tests.unit.text.tiny_t5 import write_tiny_t5


@pytest.fixture(scope="module")
def encoder():
    return load_text_encoder("minilm-l6")


def test_padding_is_zero_and_shapes_are_as_configured(encoder):
    states, mask = encoder.encode(["a car turns left", ""])
    assert states.shape == (2, encoder.config.max_length, encoder.config.dim)
    assert states[~mask].abs().max() == 0
    assert states[mask].abs().sum(-1).min() > 0


def test_a_prompt_is_encoded_alike_alone_and_in_a_batch(encoder):
    batch, _ = encoder.encode(["a robot arm opens a very long drawer", "a car turns left"])
    alone, _ = encoder.encode(["a car turns left"])
    assert torch.equal(alone[0], batch[1])


def test_meaning_orders_the_states(encoder):
    states, mask = encoder.encode(["a car drives on a street", "a vehicle moves along a road", "a cat sleeps"])
    pooled = torch.nn.functional.normalize(states.sum(1) / mask.sum(1, keepdim=True), dim=-1)
    assert pooled[0] @ pooled[1] > pooled[0] @ pooled[2] + 0.2


@pytest.mark.parametrize(
    ("name", "device", "dtype"),
    [
        ("t5-11b", "cuda", torch.bfloat16),
        ("t5-11b", "cpu", torch.float32),
        ("minilm-l6", "cuda", torch.float32),
    ],
)
def test_only_t5_is_halved_and_only_on_a_gpu(name, device, dtype):
    model = Mock()
    TextEncoder(TEXT_ENCODERS[name], None, model).to(torch.device(device))
    model.to.assert_called_once_with(device=torch.device(device), dtype=dtype)


def test_unknown_name_is_refused():
    with pytest.raises(UserError, match="text encoder.*minilm-l6"):
        load_text_encoder("clip")


def test_weights_that_are_not_there_are_missed_at_the_first_prompt():
    with pytest.raises(UserError, match="t5-11b: weights cannot be loaded from google-t5/t5-11b"):
        load_text_encoder("t5-11b").encode(["a car"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_t5(tmp_path_factory.mktemp("pipeline"))


PROMPTS = ["a car turns left", "a", "a robot arm opens the drawer " * 100]


def test_prompts_become_what_the_published_pipelines_make_of_them(folder):
    from diffusers import CosmosTextToWorldPipeline
    from transformers import AutoTokenizer, T5EncoderModel

    states, mask = load_text_encoder(folder).encode(PROMPTS)
    parts = SimpleNamespace(
        tokenizer=AutoTokenizer.from_pretrained(folder / "tokenizer"),
        text_encoder=T5EncoderModel.from_pretrained(folder / "text_encoder"),
        _execution_device=torch.device("cpu"),
    )
    with torch.inference_mode():
        theirs = CosmosTextToWorldPipeline._get_t5_prompt_embeds(parts, PROMPTS)
    assert states.shape == (3, 512, 16)
    # They encode the batch at once, whose sums round in another order; the states are of size one.
    torch.testing.assert_close(states, theirs, atol=2e-6, rtol=0)
    lengths = parts.tokenizer(PROMPTS, truncation=True, max_length=512, return_length=True)["length"]
    assert mask.sum(1).tolist() == lengths
    assert lengths[1:] == [3, 512]  # a word's beginning, its letter and the end; a long one is cut
    assert not states[~mask].any()


def test_an_empty_prompt_is_no_text_as_dropout_trains_it(folder, monkeypatch):
    encoder = load_text_encoder(folder)
    (empty, got), (no_token, _) = encoder.encode(["", "a car"])
    assert not empty.any() and not no_token.any()
    assert torch.equal(got, encoder.encode(["a car"])[0][0]) and got.any()
    monkeypatch.setattr(encoding, "_load", lambda *_: pytest.fail("a model was loaded"))
    load_text_encoder(folder).encode([""])


def test_what_was_encoded_once_needs_no_model(folder, monkeypatch):
    first, mask = load_text_encoder(folder).encode(PROMPTS)
    monkeypatch.setattr(encoding, "_load", lambda *_: pytest.fail("a model was loaded"))
    again, same_mask = load_text_encoder(folder).encode([PROMPTS[2], PROMPTS[0]])
    assert torch.equal(again, first[[2, 0]])
    assert torch.equal(same_mask, mask[[2, 0]])


def test_other_weights_find_nothing_in_the_cache(folder, tmp_path):
    other = write_tiny_t5(tmp_path / "other", seed=1)
    assert not torch.equal(
        load_text_encoder(folder).encode(["a car"])[0], load_text_encoder(other).encode(["a car"])[0]
    )
    before = load_text_encoder(other).encode(["a tree"])[0]
    write_tiny_t5(other, seed=2)
    assert not torch.equal(load_text_encoder(other).encode(["a tree"])[0], before)


def test_only_t5_folders_are_encoders(folder, tmp_path):
    assert text_encoder_config(folder).dim == 16
    shutil.copytree(folder, tmp_path / "bert")
    config = tmp_path / "bert" / "text_encoder" / "config.json"
    write_json(config, read_json(config) | {"model_type": "bert"})
    with pytest.raises(UserError, match="got 'bert', expected t5"):
        load_text_encoder(tmp_path / "bert")
