"""The training step of the diffusion WFM, through Lightning."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from nemo_cosmos.contracts import LatentCacheCard
from nemo_cosmos.data.shuffle import ShuffledEpochs
from nemo_cosmos.diffusion.conditioning import ConditioningConfig, draw
from nemo_cosmos.diffusion.flops import training_flops
from nemo_cosmos.diffusion.step import DiffusionModel
from nemo_cosmos.errors import UserError
from nemo_cosmos.parallel import startup
from nemo_cosmos.training.api import pretrain
from nemo_cosmos.training.defaults import default_log, default_optim, default_trainer
from tests.unit.diffusion.tiny_run import (
    LATENT,
    PICTURE,
    TEXT_DIM,
    AlternatingLatents,
    PackedLatents,
    RandomLatents,
    num_tokens,
    run,
    tiny_dit,
)


@pytest.fixture(autouse=True)
def _closed_groups() -> Iterator[None]:
    yield
    startup.shutdown()


def test_the_logged_loss_does_not_depend_on_the_number_of_micro_batches(tmp_path: Path) -> None:
    one = run(tmp_path / "one", micro_batch_size=4)
    startup.shutdown()
    two = run(tmp_path / "two", micro_batch_size=2)
    assert two == {1: pytest.approx(one[1], rel=1e-5)}


def test_giving_every_frame_as_condition_is_refused() -> None:
    model = DiffusionModel(tiny_dit(), conditioning=ConditioningConfig(min_condition_frames=1, max_condition_frames=2))
    data = RandomLatents(micro_batch_size=1, global_batch_size=1)
    sample = next(iter(torch.utils.data.DataLoader(ShuffledEpochs(data.dataset("train"), num_samples=1, seed=0))))
    with pytest.raises(UserError, match="max_condition_frames: got 2, expected fewer than the 2 latent frames"):
        model.noised(sample)
    model.conditioning = ConditioningConfig(min_condition_frames=1, max_condition_frames=1)
    assert model.noised(sample)["condition_mask"][0, 0, :, 0, 0].tolist() == [1, 0]


def sample_of(shape: tuple[int, ...], *, draw_id: int = 5) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(draw_id)
    return {
        "latent": torch.randn(1, *shape, generator=generator),
        "text_emb": torch.randn(1, 5, TEXT_DIM, generator=generator),
        "fps": torch.tensor([24.0]),
        "draw_id": torch.tensor([draw_id]),
    }


def test_hidden_frames_are_zeros_that_the_mask_does_not_tell_and_the_loss_leaves_out() -> None:
    given = ConditioningConfig(min_condition_frames=1, max_condition_frames=1)
    hidden = dataclasses.replace(given, condition_dropout=1.0)
    shown, without = (DiffusionModel(tiny_dit(), conditioning=c).noised(sample_of(LATENT)) for c in (given, hidden))
    assert shown["condition_mask"][0, 0, 0].eq(1).all()
    assert shown["network_input"][:, :, 0].abs().min() > 0
    assert without["condition_mask"].eq(0).all()
    assert without["network_input"][:, :, 0].eq(0).all()
    assert torch.equal(without["network_input"][:, :, 1:], shown["network_input"][:, :, 1:])
    assert torch.equal(without["free"], shown["free"])
    assert shown["free"][0, 0, :, 0, 0].tolist() == [0, 1]


def test_a_picture_is_given_no_frame_and_has_the_noise_of_one_frame() -> None:
    model = DiffusionModel(tiny_dit(), conditioning=ConditioningConfig(min_condition_frames=1, max_condition_frames=1))
    picture, video = model.noised(sample_of(PICTURE)), model.noised(sample_of(LATENT))
    assert picture["condition_mask"].eq(0).all() and picture["free"].eq(1).all()
    torch.testing.assert_close(video["sigma"], picture["sigma"] * 2**0.5)


def test_pictures_of_one_sample_are_samples_with_draws_of_their_own() -> None:
    pictures = [sample_of(PICTURE, draw_id=i) for i in range(3)]
    together = {name: torch.stack([p[name] for p in pictures], 1) for name in ("latent", "text_emb", "fps")}
    made = DiffusionModel(tiny_dit()).noised({**together, "draw_id": torch.tensor([7])})
    assert made["clean"].shape == (3, *PICTURE)
    torch.testing.assert_close(made["clean"][1], pictures[1]["latent"][0] * 0.5)
    assert len(set(made["sigma"].tolist())) == 3
    noise = (made["noisy"] - made["clean"]) / made["sigma"].view(-1, 1, 1, 1, 1)
    assert (noise[0] - noise[1]).abs().mean() > 0.5


def test_the_network_is_told_what_was_drawn() -> None:
    law = ConditioningConfig(
        text_dropout=0.0, min_condition_frames=1, max_condition_frames=1, augment_sigma=3.0, augment_p_std=0.5
    )
    model, sample = DiffusionModel(tiny_dit(action_dim=7), conditioning=law), sample_of(LATENT)
    sample["actions"] = torch.randn(1, 8, 7)
    draws = draw(law, sample["latent"].shape, sample["draw_id"], seed=model.seed)
    made = model.noised(sample)
    torch.testing.assert_close(made["c_noise"], made["sigma"].log() / 4)
    level = draws.augment_sigma
    assert level.item() != pytest.approx(3.0)
    given = (made["clean"] + level * draws.augment_noise)[:, :, 0] / (level**2 + 0.25).sqrt()
    torch.testing.assert_close(made["network_input"][:, :, 0], given)
    assert torch.equal(made["text_emb"], sample["text_emb"]) and made["actions"].any()

    class Noting(torch.nn.Module):
        post_process = True

        def forward(self, *args: torch.Tensor, **named: torch.Tensor) -> torch.Tensor:
            self.args, self.named = args, named
            return args[0]

        def logvar(self, c_noise: torch.Tensor) -> torch.Tensor:
            return c_noise

    model.module = Noting()
    assert torch.equal(model.forward_step(made)["logvar"], made["c_noise"])
    inputs = dict(zip(("network_input", "c_noise", "text_emb"), model.module.args, strict=True))
    named = {"fps": "fps", "condition_mask": "condition_mask_B1THW", "actions": "actions_BTA"}
    inputs |= {ours: model.module.named[theirs] for ours, theirs in named.items()}
    for name, value in inputs.items():
        assert torch.equal(value, made[name]), name


def test_dropped_text_and_actions_are_zeros() -> None:
    law = ConditioningConfig(text_dropout=1.0, action_dropout=1.0)
    sample = {**sample_of(LATENT), "actions": torch.randn(1, 8, 7)}
    made = DiffusionModel(tiny_dit(action_dim=7), conditioning=law).noised(sample)
    assert not made["text_emb"].any() and not made["actions"].any()


def test_the_loss_is_the_weighted_error_of_the_denoised_latent() -> None:
    """Written out once more: D = c_skip x + c_out F, and exp(-u) w |D - y|^2 + u over what is not given."""
    law = ConditioningConfig(min_condition_frames=1, max_condition_frames=1)
    model = DiffusionModel(tiny_dit(), conditioning=law)
    parts = [sample_of(LATENT, draw_id=i) for i in (1, 2)]
    made = model.noised({name: torch.cat([part[name] for part in parts]) for name in parts[0]})
    output, u = torch.randn(2, *LATENT), torch.tensor([0.3, -0.7])
    loss, logged = model.training_loss_reduction.forward(made, {"network_output": output, "logvar": u})
    s, d = made["sigma"].double(), 0.5
    errors = []
    for i in range(2):
        total = s[i] ** 2 + d**2
        denoised = d**2 / total * made["noisy"][i].double() + s[i] * d / total.sqrt() * output[i].double()
        errors.append(total / (s[i] * d) ** 2 * (denoised - made["clean"][i].double())[:, 1:].square().mean())
    error = torch.stack(errors)
    # float32 keeps 1.2e-7, and the error is a small difference of large numbers at neither level.
    assert loss.item() == pytest.approx(((-u).exp() * error + u).mean().item(), rel=1e-5)
    assert logged["error"].item() == pytest.approx(error.mean().item(), rel=1e-5)


def test_rates_stay_where_the_network_reads_them_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nemo_cosmos.diffusion.step.current_device", lambda: torch.device("meta"))
    batch = DiffusionModel(tiny_dit()).data_step(iter([sample_of(LATENT)]))
    assert batch["fps"].tolist() == [24.0]
    assert {value.device.type for name, value in batch.items() if name != "fps"} == {"meta"}


def test_frames_are_not_given_to_a_network_that_cannot_tell_them() -> None:
    with pytest.raises(UserError, match="max_condition_frames: got 1, expected 0, for the network has concat_cond"):
        DiffusionModel(tiny_dit(concat_condition_mask=False), conditioning=ConditioningConfig(max_condition_frames=1))


@pytest.mark.parametrize(
    ("config", "frames", "kind"),
    [({}, 0, "text2world"), ({}, 1, "video2world"), ({"action_dim": 7}, 1, "action")],
)
def test_a_card_names_what_the_model_was_trained_for(config: dict, frames: int, kind: str) -> None:
    law = ConditioningConfig(max_condition_frames=frames)
    assert DiffusionModel(tiny_dit(**config), conditioning=law).card_fields()["model"] == f"diffusion_4x72_{kind}"


def test_batches_of_videos_and_of_pictures_train_one_model(tmp_path: Path) -> None:
    losses = run(tmp_path, steps=2, data=AlternatingLatents, micro_batch_size=2)
    assert sorted(losses) == [1, 2]
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    tokens = [row["tokens_per_s"] / row["tflops_per_rank"] for row in rows]
    flops = [training_flops(tiny_dit(), shape[1:], text_length=5) / num_tokens(shape) for shape in (LATENT, PICTURE)]
    # Four videos, then twelve pictures: attention makes a video's token dearer.
    assert tokens == [pytest.approx(1e12 / of_one, rel=1e-2) for of_one in flops]


@pytest.mark.parametrize("data", [RandomLatents, AlternatingLatents, PackedLatents])
def test_a_run_resumed_inside_an_epoch_goes_on_as_if_it_had_not_stopped(tmp_path: Path, data: type) -> None:
    """Sixteen samples of 4 in a batch: steps 3 and 4 end the first epoch, 5 and 6 are of the second one."""
    whole = run(tmp_path, steps=6, data=data, log={"save_every": 3})
    startup.shutdown()
    for lost in (tmp_path / "checkpoints").glob("step=0000006*"):
        lost.unlink() if lost.is_symlink() else shutil.rmtree(lost)
    assert run(tmp_path, steps=6, data=data) == {step: whole[step] for step in (4, 5, 6)}


CARD = LatentCacheCard(
    tokenizer="tiny",
    tokenizer_fingerprint="f",
    continuous=True,
    latent_shape=LATENT,
    num_frames=9,
    height=64,
    width=64,
    latent_mean=(0.0,) * 16,
    latent_std=(1.0,) * 16,
    text_encoder="tiny",
    text_dim=TEXT_DIM,
    text_length=5,
)


def test_samples_of_several_sizes_do_not_go_through_a_pipeline_that_expects_one() -> None:
    model = DiffusionModel(tiny_dit())
    model.config.pipeline_model_parallel_size = 2
    cards = (CARD, dataclasses.replace(CARD, latent_shape=PICTURE))
    model.check_data(CARD, CARD)
    model.config.variable_seq_lengths = False
    with pytest.raises(UserError, match="variable_seq_lengths: got False, expected True where the model is cut"):
        model.check_data(CARD)
    model.config.variable_seq_lengths = True
    model.check_data(*cards)


@pytest.mark.parametrize(
    ("card", "layout", "message"),
    [
        (
            {"latent_shape": (8, 2, 8, 8)},
            {},
            r"latent_shape of the cache: got \(8, 2, 8, 8\), expected \[16, T, H, W\]",
        ),
        ({"latent_shape": (2, 8, 8), "continuous": False}, {}, "latent_shape of the cache"),
        ({"latent_shape": (16, 2, 7, 8)}, {}, "latent size T, H, W"),
        ({"text_dim": 384}, {}, "text_dim of the cache: got 384, expected 12"),
        ({}, {"context_parallel_size": 3}, "context-parallel size: got 3, .*32 tokens.*Nearest: 2 or 4"),
        (
            {"latent_shape": (16, 3, 4, 6)},
            {"context_parallel_size": 2, "tensor_model_parallel_size": 2, "sequence_parallel": True},
            "context-parallel size x tensor-parallel size: got 4, .*18 tokens",
        ),
    ],
)
def test_data_that_do_not_fit_the_model_are_refused(card: dict, layout: dict, message: str) -> None:
    model = DiffusionModel(tiny_dit())
    for name, value in layout.items():  # as the strategy does
        setattr(model.config, name, value)
    with pytest.raises(UserError, match=message):
        model.check_data(dataclasses.replace(CARD, **card))


@pytest.mark.parametrize(
    ("config", "layout", "frames", "kind", "message"),
    [
        (
            {},
            {"context_parallel_size": 2, "cp_comm_type": "p2p"},
            0,
            {"is_packed": True},
            "context-parallel size: got 2, .*a ring knows no clips",
        ),
        ({"action_dim": 7}, {}, 0, {"is_packed": True}, "actions in packs"),
        ({"action_dim": 7}, {}, 0, {"with_actions": False}, "with_actions of the data: got False, expected True, for"),
        ({}, {}, 0, {"with_actions": True}, "with_actions of the data: got True, expected False, .*action_dim None"),
        (
            {"action_dim": 7, "action_frames_per_latent": 4},
            {},
            0,
            {},
            "action_frames_per_latent: got 4, .*the 9 frames",
        ),
        ({}, {}, 2, {}, "max_condition_frames: got 2, expected fewer than the 2 latent frames"),
    ],
)
def test_kinds_of_data_that_do_not_fit_are_refused(
    config: dict, layout: dict, frames: int, kind: dict, message: str
) -> None:
    model = DiffusionModel(tiny_dit(**config), conditioning=ConditioningConfig(max_condition_frames=frames))
    for name, value in layout.items():
        setattr(model.config, name, value)
    with pytest.raises(UserError, match=message):
        model.check_data(CARD, **kind)
    picture = dataclasses.replace(CARD, latent_shape=PICTURE)
    DiffusionModel(tiny_dit(), conditioning=ConditioningConfig(max_condition_frames=2)).check_data(picture)


def test_tokens_of_images_need_not_divide_by_the_context_parallel_ranks() -> None:
    model = DiffusionModel(tiny_dit())
    model.config.context_parallel_size = 4
    card = dataclasses.replace(CARD, latent_shape=(16, 1, 4, 6))
    model.check_data(card)
    with pytest.raises(UserError, match=r"context-parallel size.* got 4, .*6 tokens"):  # in a pack they are cut too
        model.check_data(card, is_packed=True)


def test_data_are_checked_before_the_model_is_built(tmp_path: Path) -> None:
    model, data = DiffusionModel(tiny_dit()), RandomLatents(micro_batch_size=1, global_batch_size=4)
    trainer, log, optim = default_trainer(max_steps=1), default_log(tmp_path), default_optim(lr=1e-2, max_steps=1)
    data.cache_cards = (CARD, dataclasses.replace(CARD, text_dim=384))
    with pytest.raises(UserError, match="text_dim of the cache"):
        pretrain(model, data, trainer, log=log, optim=optim)
    assert not hasattr(model, "module")
