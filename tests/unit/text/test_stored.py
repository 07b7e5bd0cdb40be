"""Text embeddings beside a clip."""

import pytest
import torch

from nemo_cosmos.errors import UserError
from nemo_cosmos.text import pack_text_states, unpack_text_states
from nemo_cosmos.text.cache import hash_of

STATES = {"a car turns": torch.randn(3, 4).bfloat16().float(), "it stops": torch.randn(5, 4).bfloat16().float()}


def test_states_come_back_by_their_text():
    data = pack_text_states("t5", STATES)
    found = unpack_text_states(data, "t5", name="a.tar")
    assert found.keys() == {hash_of(text) for text in STATES}
    assert all(torch.equal(found[hash_of(text)].float(), states) for text, states in STATES.items())
    assert data == pack_text_states("t5", dict(reversed(STATES.items())))


def test_another_encoders_are_not_taken():
    assert unpack_text_states(pack_text_states("t5", STATES), "minilm", name="a.tar") == {}


@pytest.mark.parametrize("data", [b"", b"half a file", pack_text_states("t5", STATES)[:-1]])
def test_a_broken_file_is_named(data):
    with pytest.raises(UserError, match="a.tar: no whole text embeddings"):
        unpack_text_states(data, "t5", name="a.tar")
