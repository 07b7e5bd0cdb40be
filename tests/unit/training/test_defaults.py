from __future__ import annotations

import pytest

from nemo_cosmos.errors import UserError
from nemo_cosmos.training.defaults import default_trainer


@pytest.mark.parametrize("average", [{"ema_decay": 0.9}, {"ema_power": 6.94}])
def test_background_saves_of_averages_are_refused(average: dict[str, float]) -> None:
    with pytest.raises(UserError, match="async_save: got True, expected False with ema_decay or ema_power"):
        default_trainer(max_steps=1, async_save=True, **average)
