from types import SimpleNamespace

import pytest
import torch

from nemo_cosmos.errors import UserError
from nemo_cosmos.tokenizer.config import TokenizerConfig
from nemo_cosmos.tokenizer.model_config import TokenizerModelConfig
from nemo_cosmos.tokenizer.recompute import recompute_activations
from tests.unit.tokenizer.conftest import random_tokenizer
from tests.unit.tokenizer.live_memory import LiveMemory

CONFIG = TokenizerConfig(channels=16, channels_mult=(1, 2, 2), num_res_blocks=4, latent_channels=4)
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


def gradients_and_peak(settings: dict[str, object]) -> tuple[dict[str, torch.Tensor], int]:
    tokenizer = random_tokenizer(CONFIG).train()
    nothing = dict.fromkeys(FULL)
    recompute_activations(tokenizer, SimpleNamespace(**{**nothing, **settings}))
    video = torch.rand(1, 3, 9, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with LiveMemory() as memory:
        (tokenizer(video) - video).abs().mean().backward()
    return {name: parameter.grad for name, parameter in tokenizer.named_parameters()}, memory.peak_bytes


def test_gradients_are_the_same_at_less_memory() -> None:
    kept, peak_kept = gradients_and_peak({})
    again, peak_again = gradients_and_peak(FULL)
    assert list(kept) == list(again)
    # The same operations in the same order: no rounding differs.
    assert all(torch.equal(kept[name], again[name]) for name in kept)
    assert peak_again < 0.5 * peak_kept


def test_megatrons_names_switch_it_on() -> None:
    plain = TokenizerModelConfig(architecture=CONFIG).configure_model()
    again = TokenizerModelConfig(architecture=CONFIG, **FULL).configure_model()
    assert "forward" not in vars(plain.encoder.mid.block_1)
    assert "forward" in vars(again.encoder.mid.block_1)
    assert list(plain.state_dict()) == list(again.state_dict())


@pytest.mark.parametrize("settings", [{"recompute_granularity": "selective"}, {**FULL, "recompute_method": "block"}])
def test_other_kinds_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(UserError, match="recompute_granularity"):
        TokenizerModelConfig(architecture=CONFIG, **settings).configure_model()
