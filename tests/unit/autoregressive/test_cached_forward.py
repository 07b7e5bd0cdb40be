"""The transformer with a cache against the transformer on whole sequences."""

from __future__ import annotations

import pytest
import torch

from nemo_cosmos.autoregressive.cached_forward import CachedForward
from nemo_cosmos.autoregressive.model import CosmosAR
from nemo_cosmos.errors import UserError
from tests.unit.autoregressive.test_model import CASES, GRID, TOLERANCE, config_for, inputs_for, model_for


def assert_close(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCE * expected.abs().max().item())


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("case", ["12B", "13B", "tied", "one key head, wider than the model"])
@torch.inference_mode()
def test_logits_are_those_of_the_whole_sequence(
    case: str, static: bool, one_rank: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # its shapes, without its minute
    config = config_for(**CASES[case])
    model = model_for(config)
    tokens, text = inputs_for(config)
    whole, length = model(tokens, GRID, text), tokens.shape[1]
    forward = CachedForward(model, GRID, batch=2, length=length, crossattn_emb_BLC=text, compile=static)

    def logits(start: int, stop: int) -> torch.Tensor:
        return forward.logits(forward(tokens[:, start:stop], [start, start]))

    assert_close(torch.cat([logits(0, 10), *(logits(i, i + 1) for i in range(10, length))], dim=1), whole)
    # Several at once, over what was written before.
    assert_close(torch.cat([logits(7, 8), logits(8, 12), logits(12, 15)], dim=1), whole[:, 7:15])
    # The videos of a batch at unlike places.
    ahead = forward.logits(forward(torch.stack([tokens[0, 15:18], tokens[1, 9:12]]), [15, 9]))
    assert_close(ahead, torch.stack([whole[0, 15:18], whole[1, 9:12]]))


@torch.inference_mode()
def test_actions_are_looked_at(one_rank: torch.device) -> None:
    model = model_for(config := config_for(**CASES["13B"], action_dim=2))
    (tokens, text), actions = inputs_for(config), torch.linspace(-1, 1, 16).view(2, 4, 2)
    forward = CachedForward(model, GRID, batch=2, length=28, crossattn_emb_BLC=text, actions_BFA=actions)
    hidden = [forward(tokens[:, :9], [0, 0]), *(forward(tokens[:, i : i + 1], [i, i]) for i in range(9, 28))]
    assert_close(forward.logits(torch.cat(hidden, dim=1)), model(tokens, GRID, text, actions_BFA=actions))


@pytest.mark.slow
@torch.inference_mode()
def test_compiled_steps_are_the_same(one_rank: torch.device) -> None:
    config = config_for(**CASES["13B"])
    model = model_for(config)
    tokens, text = inputs_for(config)
    forward = CachedForward(model, GRID, batch=2, length=28, crossattn_emb_BLC=text, compile=True)
    hidden = [forward(tokens[:, :9], [0, 0]), *(forward(tokens[:, i : i + 1], [i, i]) for i in range(9, 28))]
    assert_close(forward.logits(torch.cat(hidden, dim=1)), model(tokens, GRID, text))


def test_a_part_of_a_pipeline_is_refused(one_rank: torch.device) -> None:
    with pytest.raises(UserError, match="pipeline-parallel size: got 1, expected 1 for decoding"):
        CachedForward(CosmosAR(config_for(), post_process=False), GRID, batch=1, length=24)
