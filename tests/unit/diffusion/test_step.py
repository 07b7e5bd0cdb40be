"""The training step of the diffusion WFM, through Lightning."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from nemo_cosmos.contracts import LatentCacheCard
from nemo_cosmos.data.shuffle import ShuffledEpochs
from nemo_cosmos.diffusion.conditioning import ConditioningConfig
from nemo_cosmos.diffusion.step import DiffusionModel
from nemo_cosmos.errors import UserError
from nemo_cosmos.parallel import startup
from nemo_cosmos.training.api import pretrain
from nemo_cosmos.training.defaults import default_log, default_optim, default_trainer
from tests.unit.diffusion.tiny_run import LATENT, TEXT_DIM, RandomLatents, run, tiny_dit


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


def test_tokens_of_images_need_not_divide_by_the_context_parallel_ranks() -> None:
    model = DiffusionModel(tiny_dit())
    model.config.context_parallel_size = 4
    model.check_data(dataclasses.replace(CARD, latent_shape=(16, 1, 4, 6)))


def test_data_are_checked_before_the_model_is_built(tmp_path: Path) -> None:
    model, data = DiffusionModel(tiny_dit()), RandomLatents(micro_batch_size=1, global_batch_size=4)
    trainer, log, optim = default_trainer(max_steps=1), default_log(tmp_path), default_optim(lr=1e-2, max_steps=1)
    data.cache_card = dataclasses.replace(CARD, text_dim=384)
    with pytest.raises(UserError, match="text_dim of the cache"):
        pretrain(model, data, trainer, log=log, optim=optim)
    assert not hasattr(model, "module")
