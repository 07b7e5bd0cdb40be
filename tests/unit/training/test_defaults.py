from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nemo_cosmos.errors import UserError
from nemo_cosmos.training.defaults import default_log, default_optim


@pytest.mark.parametrize(
    ("decay", "expected"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1.0, 0.75, 0.5, 0.25]),
    ],
)
def test_the_rate_falls_as_asked_after_the_warm_up(decay: str, expected: list[float]) -> None:
    schedule = default_optim(lr=1.0, max_steps=5, warmup=1, decay=decay).lr_scheduler
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = schedule.scheduler(None, optimizer)["lr_scheduler"]["scheduler"]
    rates = []
    for _ in range(5):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    if decay == "cosine":  # above the line in the first half, below it in the second
        assert rates[:2] == expected[:2] and rates[2] > 0.75 and rates[4] < 0.25
    else:
        assert rates == pytest.approx(expected)


def test_an_unknown_decay_is_refused() -> None:
    with pytest.raises(UserError, match="decay: got 'exponential', expected one of"):
        default_optim(lr=1.0, max_steps=5, decay="exponential")


def test_weights_and_biases_gets_one_run_for_each_directory(tmp_path: Path) -> None:
    log = default_log("runs/diffusion_7b", wandb_project="worlds")
    assert log.tensorboard is None
    assert (log.wandb.version, log.wandb._wandb_init["project"], log.wandb._wandb_init["resume"]) == (
        "runs-diffusion_7b",
        "worlds",
        "allow",
    )
    assert default_log(tmp_path).wandb is None
