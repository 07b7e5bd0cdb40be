"""Medusa heads: what they predict, what they learn, and what they leave alone."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from nemo_cosmos.autoregressive.medusa import freeze_trunk, medusa_loss, of_later_tokens
from nemo_cosmos.autoregressive.model import CosmosAR
from nemo_cosmos.autoregressive.state_dict import to_reference
from nemo_cosmos.errors import UserError
from tests.unit.autoregressive.test_model import GRID, config_for, inputs_for, model_for


def test_labels_of_later_tokens() -> None:
    got = of_later_tokens(torch.tensor([[5, 6, 7, 8]]), 2)
    assert got.tolist() == [[[5, 6, 7], [6, 7, 8], [7, 8, 0], [8, 0, 0]]]
    assert of_later_tokens(torch.ones(1, 3, dtype=torch.bool), 1).tolist() == [[[True, True]] * 2 + [[True, False]]]


def test_heads_predict_by_residual_layers_before_the_shared_output_layer(one_rank: torch.device) -> None:
    config = config_for(num_medusa_heads=2)
    model = model_for(config)
    tokens, _ = inputs_for(config)
    labels = of_later_tokens(tokens.roll(-1, dims=1), 2)
    hidden = []
    model.final_layernorm.register_forward_hook(lambda _module, _args, output: hidden.append(output))
    terms = model(tokens, GRID, labels_BS=labels)
    own = model(tokens, GRID, labels_BS=labels[..., 0])
    assert torch.equal(terms.log_z[..., 0], own.log_z)
    assert torch.equal(terms.logit[..., 0], own.logit)
    for k, weight in enumerate(model.medusa_heads.linear.weight.chunk(2), start=1):
        guessing = hidden[0] + functional.silu(hidden[0] @ weight.T)
        logits = (guessing @ model.output_layer.weight[:50].T).transpose(0, 1)
        torch.testing.assert_close(terms.log_z[..., k], logits.logsumexp(-1), rtol=1e-5, atol=1e-5)
        expected = logits.gather(-1, labels[..., k, None]).squeeze(-1)
        torch.testing.assert_close(terms.logit[..., k], expected, rtol=1e-5, atol=1e-5)


def test_the_loss_weighs_later_tokens_less() -> None:
    generator = torch.Generator().manual_seed(0)
    log_z, logit = torch.randn(2, 2, 6, 4, generator=generator)
    counted = torch.rand(2, 6, 4, generator=generator) < 0.6
    published, parts = medusa_loss(log_z, logit, counted)
    torch.testing.assert_close(published, sum(0.8**k * part for k, part in enumerate(parts.unbind(-1), 1)))
    loss, parts = medusa_loss(log_z, logit, counted, decay=0.5)
    error = log_z - logit
    for sample in range(2):
        means = [error[sample, :, k][counted[sample, :, k]].mean() for k in (1, 2, 3)]
        torch.testing.assert_close(parts[sample], torch.stack(means))
        torch.testing.assert_close(loss[sample], means[0] / 2 + means[1] / 4 + means[2] / 8)


def test_heads_learn_while_the_trunk_stays(one_rank: torch.device) -> None:
    """Each token follows from the one before: the heads must learn to go on by two and by three."""
    config = config_for(num_medusa_heads=2)
    model = model_for(config)
    with torch.no_grad():
        model.medusa_heads.linear.weight.zero_()
    freeze_trunk(model)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["medusa_heads.linear.weight"]
    tokens = (torch.arange(24) + torch.arange(8)[:, None] * 3) % 50
    labels = of_later_tokens((tokens + 1) % 50, 2)
    counted = of_later_tokens(torch.ones_like(tokens, dtype=torch.bool), 2)
    before = model(tokens, GRID).detach()
    optimizer = torch.optim.Adam(model.medusa_heads.parameters(), lr=0.02)
    losses = []
    for _ in range(40):
        loss, parts = medusa_loss(*model(tokens, GRID, labels_BS=labels), counted)
        loss.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(parts.mean(0))
    assert (losses[-1] < 0.5 * losses[0]).all()
    assert torch.equal(model(tokens, GRID), before)


def test_heads_begin_as_the_model_itself_and_stay_out_of_the_published_format(one_rank: torch.device) -> None:
    config = config_for(num_medusa_heads=2)
    model = CosmosAR(config)
    assert not model.medusa_heads.linear.weight.any()
    without = CosmosAR(config_for())
    state, expected = (to_reference(m.state_dict(), config) for m in (model, without))
    assert state.keys() == expected.keys()
    with pytest.raises(UserError, match="num_medusa_heads: got -1"):
        config_for(num_medusa_heads=-1)
