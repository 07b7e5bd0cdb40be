"""Training through NeMo Lightning: batches, cards, checks, and going on after a stop."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from nemo_cosmos.autoregressive.architecture import config_from
from nemo_cosmos.autoregressive.flops import training_flops
from nemo_cosmos.autoregressive.model import CosmosAR
from nemo_cosmos.autoregressive.objective import next_token_loss
from nemo_cosmos.autoregressive.step import AutoregressiveModel, NextTokenConfig
from nemo_cosmos.autoregressive.warm_start import text_layers
from nemo_cosmos.contracts import CheckpointCard, LatentCacheCard
from nemo_cosmos.errors import UserError
from nemo_cosmos.parallel import startup
from nemo_cosmos.weight_files.safetensors_files import write_safetensors
from nemo_cosmos.weight_files.stored_tensor import stored
from tests.unit.autoregressive.test_model import WITH_TEXT, config_for, model_for
from tests.unit.autoregressive.tiny_run import GRID, Codes, run


@pytest.fixture(autouse=True)
def _closed_groups() -> Iterator[None]:
    yield
    startup.shutdown()


CARD = LatentCacheCard(
    tokenizer="tiny",
    tokenizer_fingerprint="f",
    continuous=False,
    latent_shape=GRID,
    num_frames=9,
    height=16,
    width=32,
    latent_mean=(),
    latent_std=(),
    text_encoder="tiny",
    text_dim=12,
    text_length=5,
)


def batch_of(*indices: int) -> dict[str, torch.Tensor]:
    items = [{**Codes()[i], "draw_id": torch.tensor(i)} for i in indices]
    return {name: torch.stack([item[name] for item in items]) for name in items[0]}


def test_a_batch_becomes_sequences() -> None:
    model = AutoregressiveModel(config_for(**WITH_TEXT))
    batch = batch_of(0, 1)
    made = model.data_step(iter([(batch, 0, 0)]))
    assert made["tokens"].shape == (2, 64) and made["grid"] == GRID  # 1 + 16 codes, padded as published
    assert made["counted"].sum(dim=1).tolist() == [8, 8]
    assert torch.equal(made["text_emb"], batch["text_emb"])
    flops = training_flops(model.config, 64, text_length=5, num_samples=2)
    assert model.take_work() == (128, flops) and model.take_work() == (0, 0)
    picture = {**batch, "tokens": batch["tokens"][:, :1]}
    assert model.sequences(picture)["counted"].sum(dim=1).tolist() == [8, 8]  # none of its codes is given
    bare = AutoregressiveModel(config_for())
    assert bare.sequences(batch)["tokens"].shape == (2, 16) and "text_emb" not in bare.sequences(batch)


def test_samples_of_pictures_are_taken_one_by_one() -> None:
    model = AutoregressiveModel(config_for(**WITH_TEXT), objective=NextTokenConfig(text_dropout=0.5))
    items = [batch_of(0, 1, 2), batch_of(3, 4, 5)]
    joint = {name: torch.stack([item[name] for item in items]) for name in ("tokens", "text_emb")}
    joint = {**joint, "tokens": joint["tokens"][:, :, :1], "draw_id": torch.tensor([7, 8])}
    made = model.sequences(joint)
    alone = model.sequences({**batch_of(*range(6)), "tokens": batch_of(*range(6))["tokens"][:, :1]})
    assert made["grid"] == (1, 2, 4) and torch.equal(made["tokens"], alone["tokens"])
    kept = made["text_emb"].flatten(1).any(dim=1)
    assert torch.equal(made["text_emb"][kept], batch_of(*range(6))["text_emb"][kept])
    # Each has a draw of its own.
    assert 0 < kept[:3].sum() < 3 or 0 < kept[3:].sum() < 3


ACTIONS = torch.randn(2, 8, 7, generator=torch.Generator().manual_seed(0))


def test_actions_are_tokens_beside_the_text_and_know_their_place(one_rank: torch.device) -> None:
    model = AutoregressiveModel(config_for(**WITH_TEXT, action_dim=7))
    model.configure_model()

    def terms(actions: torch.Tensor) -> torch.Tensor:
        made = model.sequences({**batch_of(0, 1), "actions": actions})
        return model.forward_step(made).logit

    embedder = model.module.action_embedder
    seen = []
    embedder.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
    got = terms(ACTIONS)
    (scaled, tokens) = seen[0]
    assert torch.equal(scaled[..., :6], torch.asinh(20 * ACTIONS[..., :6])) and tokens.shape == (2, 8, 12)
    # The same as a text that ends with these tokens.
    text = torch.cat([batch_of(0, 1)["text_emb"], tokens], dim=1)
    made = model.sequences({**batch_of(0, 1), "actions": ACTIONS})
    alone = model.forward(made["tokens"], GRID, text, labels_BS=made["labels"]).logit
    torch.testing.assert_close(got, alone, rtol=0, atol=0)
    assert not torch.allclose(terms(ACTIONS.flip(1)), got)  # their order matters
    made = model.sequences({**batch_of(0, 1), "actions": ACTIONS})
    model._count(made)
    assert model.take_work()[1] == training_flops(model.config, 64, text_length=5 + 8, num_samples=2)


def test_text_is_dropped_by_the_samples_key_alone() -> None:
    model = AutoregressiveModel(config_for(**WITH_TEXT), objective=NextTokenConfig(text_dropout=0.5))
    together = model.sequences(batch_of(*range(16)))["text_emb"]
    alone = torch.cat([model.sequences(batch_of(i))["text_emb"] for i in range(16)])
    assert torch.equal(together, alone)
    kept = together.flatten(1).any(dim=1)
    assert 2 < kept.sum() < 14
    assert torch.equal(together[kept], batch_of(*range(16))["text_emb"][kept])


def test_a_run_resumed_inside_an_epoch_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    """Sixteen samples of 4 in a batch: step 4 ends the first epoch."""
    whole = run(tmp_path, steps=5, log={"save_every": 3})
    startup.shutdown()
    card = CheckpointCard.from_dict(json.loads((tmp_path / "checkpoints/step=0000003/card.json").read_text()))
    assert card.model == "autoregressive_4x72_video2world"
    assert config_from(card.config).vocab_size == 50
    for lost in (tmp_path / "checkpoints").glob("step=0000005*"):
        lost.unlink() if lost.is_symlink() else shutil.rmtree(lost)
    assert run(tmp_path, steps=5) == {step: whole[step] for step in (4, 5)}


def test_trains_in_mixed_precision(tmp_path: Path) -> None:
    exact = run(tmp_path / "exact", steps=2)
    startup.shutdown()
    mixed = run(tmp_path / "mixed", steps=2, precision="bf16-mixed")
    # Weights and products of 8 bits, losses near log 50.
    assert mixed == {step: pytest.approx(loss, rel=5e-3) for step, loss in exact.items()}


def test_a_model_without_text_learns_to_take_it(tmp_path: Path, one_rank: torch.device) -> None:
    codes = 48  # which fill the rows: the special tokens, which the base has not, need more
    base = {name: weight.detach() for name, weight in model_for(config_for(vocab_size=codes)).named_parameters()}
    path, config = tmp_path / "base.safetensors", config_for(**WITH_TEXT, vocab_size=codes)
    write_safetensors(path, stored(base))
    model = AutoregressiveModel(config, init_from=str(path), may_lack=text_layers(2))
    model.configure_model()
    state = dict(model.module.named_parameters())
    assert all(torch.equal(state[name][: len(weight)], weight) for name, weight in base.items())
    assert all(name.startswith(text_layers(2)) for name in state.keys() - base.keys())
    untrained = dict(CosmosAR(config).named_parameters())["embedding.weight"]
    assert len(untrained) == 64 and torch.equal(state["embedding.weight"][codes:], untrained[codes:])
    with pytest.raises(UserError, match=r"embedding\.weight has shape \[48, 72\]"):
        AutoregressiveModel(config, init_from=str(path), may_lack=text_layers(2)[1:]).configure_model()


def test_medusa_heads_learn_beside_the_model_or_alone(one_rank: torch.device) -> None:
    objective = NextTokenConfig(medusa_weight=0.5, medusa_only=True)
    model = AutoregressiveModel(config_for(num_medusa_heads=2), objective=objective)
    model.configure_model()
    batch = model.sequences(batch_of(0, 1))
    terms = model.forward_step(batch)
    loss, told = model.training_loss_reduction.forward(batch, terms)
    own = model.module(batch["tokens"], batch["grid"], labels_BS=batch["labels"])
    expected, cross_entropy = next_token_loss(*own, batch["predicts"], batch["counted"], z_loss_coeff=1e-4)
    error = (terms.log_z - terms.logit).detach()
    # Eight given codes, whose last tells the first to be learned; a head's labels stand so much further ahead.
    heads = [error[:, 7 - k : 15 - k, k].mean() for k in (1, 2)]
    torch.testing.assert_close(loss, expected.mean() + 0.5 * (0.8 * heads[0] + 0.64 * heads[1]))
    torch.testing.assert_close(told["cross_entropy"], cross_entropy.mean().view(1))
    loss.backward()
    assert [n for n, p in model.module.named_parameters() if p.grad is not None] == ["medusa_heads.linear.weight"]
    with pytest.raises(UserError, match="num_medusa_heads: got 0, expected 1 or more, as only heads shall learn"):
        AutoregressiveModel(config_for(), objective=objective).configure_model()


@pytest.mark.parametrize(
    ("card", "layout", "message"),
    [
        ({"latent_shape": (16, 2, 8, 8), "continuous": True}, {}, r"latent_shape of the cache: .*expected \[T, H, W\]"),
        ({"vocab_size": 64_000}, {}, "vocab_size of the cache: got 64000, expected 50"),
        ({"text_dim": 384}, {}, "text_dim of the cache: got 384, expected 12"),
        ({}, {"context_parallel_size": 5}, None),  # padded to a multiple of ten, too
        ({}, {"context_parallel_size": 3, "special_tokens": False}, "tokens of a sample: got 16, .*multiple of 6"),
        ({"latent_shape": (2, 8, 8)}, {"tensor_model_parallel_size": 4}, "tensor-parallel size: got 4"),
    ],
)
def test_data_that_do_not_fit_the_model_are_refused(card: dict, layout: dict, message: str | None) -> None:
    model = AutoregressiveModel(config_for(**WITH_TEXT))
    for name, value in layout.items():  # as the strategy does
        setattr(model.config, name, value)
    told = dataclasses.replace(CARD, **card)
    if message is None:
        model.check_data(told)
        return
    with pytest.raises(UserError, match=message):
        model.check_data(told)


def test_actions_in_data_and_model_must_agree() -> None:
    without = AutoregressiveModel(config_for(**WITH_TEXT))
    with pytest.raises(UserError, match="with_actions of the data: got True, expected False"):
        without.check_data(CARD, with_actions=True)
    model = AutoregressiveModel(config_for(**WITH_TEXT, action_dim=7))
    with pytest.raises(UserError, match="with_actions of the data: got False, expected True"):
        model.check_data(CARD, with_actions=False)
    model.check_data(CARD, with_actions=True)
    assert model.card_fields()["model"] == "autoregressive_2x72_action"
    model.config.pipeline_model_parallel_size = 2
    with pytest.raises(UserError, match="pipeline-parallel size: got 2, expected 1 with action_dim"):
        model.check_data(CARD)


def test_heads_alone_do_not_learn_in_a_pipeline() -> None:
    objective = NextTokenConfig(medusa_only=True)
    model = AutoregressiveModel(config_for(**WITH_TEXT, num_medusa_heads=2), objective=objective)
    model.check_data(CARD)
    model.config.pipeline_model_parallel_size = 2
    with pytest.raises(UserError, match="pipeline-parallel size: got 2, expected 1 with medusa_only"):
        model.check_data(CARD)


def test_all_frames_given_leave_nothing_to_learn() -> None:
    model = AutoregressiveModel(config_for(**WITH_TEXT), objective=NextTokenConfig(num_condition_latents_t=2))
    with pytest.raises(UserError, match="num_condition_latents_t: got 2, expected fewer than the 2 latent frames"):
        model.check_data(CARD)
    model.check_data(dataclasses.replace(CARD, latent_shape=(1, 8, 8)))  # pictures are given none
    with pytest.raises(UserError, match="text_dropout: got 2, expected a probability"):
        NextTokenConfig(text_dropout=2)
