from unittest.mock import Mock

import pytest
import torch

from nemo_cosmos.errors import UserError
from nemo_cosmos.text import TEXT_ENCODERS, TextEncoder, load_text_encoder


@pytest.fixture(scope="module")
def encoder():
    return load_text_encoder("minilm-l6")


def test_padding_is_zero_and_shapes_are_as_configured(encoder):
    states, mask = encoder.encode(["a car turns left", ""])
    assert states.shape == (2, encoder.config.max_length, encoder.config.dim)
    assert states[~mask].abs().max() == 0
    assert states[mask].abs().sum(-1).min() > 0


def test_a_prompt_is_encoded_alike_alone_and_in_a_batch(encoder):
    alone, _ = encoder.encode(["a car turns left"])
    batch, _ = encoder.encode(["a robot arm opens a very long drawer", "a car turns left"])
    torch.testing.assert_close(alone[0], batch[1], atol=1e-5, rtol=0)


def test_meaning_orders_the_states(encoder):
    states, mask = encoder.encode(["a car drives on a street", "a vehicle moves along a road", "a cat sleeps"])
    pooled = torch.nn.functional.normalize(states.sum(1) / mask.sum(1, keepdim=True), dim=-1)
    assert pooled[0] @ pooled[1] > pooled[0] @ pooled[2] + 0.2


@pytest.mark.parametrize(
    ("name", "device", "dtype"),
    [("t5-11b", "cuda", torch.bfloat16), ("t5-11b", "cpu", None), ("minilm-l6", "cuda", None)],
)
def test_only_t5_is_halved_and_only_on_a_gpu(name, device, dtype):
    model = Mock()
    TextEncoder(TEXT_ENCODERS[name], None, model).to(torch.device(device))
    model.to.assert_called_once_with(device=torch.device(device), dtype=dtype)


def test_unknown_name_is_refused():
    with pytest.raises(UserError, match="text encoder.*minilm-l6"):
        load_text_encoder("clip")
