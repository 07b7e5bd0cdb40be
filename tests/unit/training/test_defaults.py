from __future__ import annotations

import pytest

from nemo_cosmos.errors import UserError
from nemo_cosmos.training import defaults
from nemo_cosmos.training.defaults import default_trainer


@pytest.mark.parametrize("average", [{"ema_decay": 0.9}, {"ema_power": 6.94}])
def test_background_saves_of_averages_are_refused(average: dict[str, float]) -> None:
    with pytest.raises(UserError, match="async_save: got True, expected False with ema_decay or ema_power"):
        default_trainer(max_steps=1, async_save=True, **average)


def test_averages_see_the_weights_of_their_step() -> None:
    overlap = {
        (on_gpu, averages): defaults._ddp_config(on_gpu=on_gpu, averages=averages).overlap_param_gather
        for on_gpu in (False, True)
        for averages in (False, True)
    }
    assert overlap == {(False, False): False, (False, True): False, (True, False): True, (True, True): False}
