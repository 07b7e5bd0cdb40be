from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch

from nemo_cosmos.diffusion.step import DiffusionModel
from nemo_cosmos.errors import UserError
from nemo_cosmos.parallel.stored_weights import read_whole
from nemo_cosmos.training.api import pretrain
from nemo_cosmos.training.defaults import default_log, default_optim, default_trainer
from nemo_cosmos.training.ema import EMA
from tests.unit.diffusion.tiny_run import RandomLatents, tiny_dit


def _trainer(module):
    strategy = SimpleNamespace(megatron_parallel=[module], optimizers=[])
    return SimpleNamespace(strategy=strategy, ckpt_path=None, global_step=0)


def _averages(ema, weights):
    """Feeds a sequence of weights, the first of them as the start; returns the average after each step."""
    module = torch.nn.Linear(1, 1, bias=False)
    trainer = _trainer(module)
    torch.nn.init.constant_(module.weight, weights[0])
    ema.on_train_start(trainer, module)
    averages = []
    for trainer.global_step, value in enumerate(weights[1:], start=1):
        torch.nn.init.constant_(module.weight, value)
        ema.on_train_batch_end(trainer)
        averages.append(ema._shadow[module.weight].item())
    return averages


def test_constant_decay():
    assert _averages(EMA(decay=0.75), [8.0, 0.0, 4.0]) == pytest.approx([6.0, 5.5])


def test_power_function_decay_weighs_step_t_by_t_to_the_power():
    """The average of Karras et al. is sum(t^g w_t) / sum(t^g) up to the discretisation; for g = 0 the mean."""
    assert _averages(EMA(power=0.0), [100.0, 1.0, 2.0, 6.0]) == pytest.approx([1.0, 1.5, 3.0])


def test_power_decay_at_a_step():
    assert EMA(power=6.94).decay_at(100) == pytest.approx(0.99**7.94)


def test_frozen_weights_are_left_out():
    module = torch.nn.Linear(1, 1)
    module.bias.requires_grad_(False)
    ema = EMA(decay=0.9)
    ema.on_train_start(_trainer(module), module)
    assert set(ema._shadow) == {module.weight}


def test_bfloat16_weights_are_averaged_in_float32():
    module = torch.nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    torch.nn.init.constant_(module.weight, 1.0)
    trainer, ema = _trainer(module), EMA(decay=0.999)
    ema.on_train_start(trainer, module)
    torch.nn.init.constant_(module.weight, 2.0)
    ema.on_train_batch_end(trainer)
    assert ema._shadow[module.weight].item() == pytest.approx(1.001, abs=1e-6)  # bfloat16 would stay at 1.0


@pytest.mark.parametrize("settings", [{}, {"decay": 0.9, "power": 1.0}, {"decay": 1.0}, {"power": -1.0}])
def test_bad_settings_are_refused(settings):
    with pytest.raises(UserError, match="EMA"):
        EMA(**settings)


def test_masters_of_16_bit_weights_are_averaged_rather_than_the_weights(tmp_path):
    """Steps of 1e-6 move the float32 masters, but no bf16 weight: 0.02 and 0.02 + 1e-6 are the same to bf16."""
    frozen = {"lr": 1e-6, "max_steps": 10, "weight_decay": 0.0}
    model = DiffusionModel(tiny_dit())
    ema = EMA(decay=0.5)
    moved = _Moved(ema)
    pretrain(
        model,
        RandomLatents(micro_batch_size=4, global_batch_size=4),
        default_trainer(max_steps=3, precision="bf16-mixed", callbacks=[ema, moved]),
        log=default_log(tmp_path),
        optim=default_optim(**frozen),
    )
    assert 0 < moved.largest < 5e-6
    folder = tmp_path / "checkpoints" / "step=0000003"
    averaged, plain = read_whole(folder), read_whole(folder, use_ema=False)
    name = "blocks.0.mlp.linear_fc1.weight"
    assert (averaged[name].dtype, plain[name].dtype) == (torch.float32, torch.bfloat16)
    difference = (averaged[name] - plain[name].float()).abs()
    assert 0 < difference.max() < 5e-6


class _Moved(pl.Callback):
    """How far the averages are from where they began."""

    def __init__(self, ema):
        self.ema, self.largest = ema, 0.0

    def on_train_start(self, trainer, pl_module):
        self.first = {parameter: average.clone() for parameter, average in self.ema._shadow.items()}

    def on_train_batch_end(self, *_):
        self.largest = max(
            float((self.ema._shadow[parameter] - first).abs().max()) for parameter, first in self.first.items()
        )
