"""Published sizes, refused configurations, refused layouts."""

from __future__ import annotations

import pytest
import torch

from nemo_cosmos.diffusion.config import (
    DiTConfig,
    check_layout,
    diffusion_7b,
    diffusion_14b,
    diffusion_tiny,
)
from nemo_cosmos.diffusion.model import CosmosDiT
from nemo_cosmos.diffusion.state_dict import diffusers_config, weight_table
from nemo_cosmos.errors import UserError

UNCERTAINTY_HEAD = 128
FULL_RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


@pytest.mark.parametrize(("preset", "published"), [(diffusion_7b, 7_236_192_256), (diffusion_14b, 14_267_149_312)])
def test_published_sizes(preset, published: int, one_rank: torch.device) -> None:
    config = preset(backend="torch")
    with torch.device("meta"):
        model = CosmosDiT(config)
    assert all(p.is_meta for p in model.parameters())
    assert sum(p.numel() for p in model.parameters()) == published + UNCERTAINTY_HEAD
    names = {name for name, _ in model.global_tensors()}
    assert names == {row.ours for row in weight_table(config)}
    sharded = {entry.key for entry in model.sharded_state_dict().values() if not entry.key.endswith("_extra_state")}
    assert sharded == names


def test_7b_is_the_model_that_diffusers_describes() -> None:
    described = diffusers_config(diffusion_7b())
    expected = {
        "in_channels": 16,
        "num_attention_heads": 32,
        "attention_head_dim": 128,
        "num_layers": 28,
        "mlp_ratio": 4.0,
        "text_embed_dim": 1024,
        "adaln_lora_dim": 256,
        "max_size": [128, 240, 240],
        "rope_scale": [2.0, 1.0, 1.0],
        "extra_pos_embed_type": "learnable",
    }
    assert {name: described[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"hidden_size": 190}, "188 or 192"),
        ({"hidden_size": 64}, "18 or more"),
        ({"num_query_groups": 2}, "shares no keys"),
        ({"extra_pos_embed": "rotary"}, "'learnable', 'sincos' or None"),
        ({"recompute_granularity": "selective", "recompute_modules": ["layernorm"]}, r"\['core_attn', 'mlp'\]"),
        ({"distribute_saved_activations": True, **FULL_RECOMPUTE}, "sequence_parallel"),
        ({"action_dim": 0}, "1 or more"),
        ({"action_dim": 7, "patch_temporal": 2}, "One action goes to one latent frame"),
        ({"max_latent_size": (0, 8, 8)}, "positive"),
    ],
)
def test_impossible_configuration_is_refused(overrides: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        diffusion_tiny(**overrides)


@pytest.mark.parametrize(
    ("overrides", "layout", "message"),
    [
        ({}, {"tp": 3}, "tensor-parallel size: got 3, .*Nearest: 2 or 4"),
        ({}, {"pp": 4}, "pipeline-parallel size: got 4, .*6 layers.*Nearest: 3 or 6"),
        ({"virtual_pipeline_model_parallel_size": 2}, {"pp": 2}, "2 virtual stages. Nearest: 1 or 3"),
        ({}, {"cp": 5}, "context-parallel size: got 5, .*192 tokens.*Nearest: 4 or 6; or tokens: 190 or 195"),
        ({"sequence_parallel": True}, {"tp": 2, "cp": 5}, "context-parallel size x tensor-parallel size: got 10"),
        ({"sequence_parallel": True}, {"tp": 1}, "2 or more"),
        ({"cp_comm_type": "a2a"}, {"tp": 2, "cp": 4}, "context-parallel size: got 4, .*2 heads of a rank.*Nearest: 2;"),
        ({}, {"cp": 0}, "1 or more"),
    ],
)
def test_impossible_layout_is_refused_with_the_nearest(overrides: dict, layout: dict[str, int], message: str) -> None:
    config = diffusion_tiny()
    for name, value in overrides.items():  # Megatron's own check would come first and knows no nearest value
        setattr(config, name, value)
    with pytest.raises(UserError, match=message):
        check_layout(config, **{"tp": 1, "pp": 1, "cp": 1, **layout}, num_tokens=192)


def test_possible_layouts_pass() -> None:
    for tp, pp, cp in [(1, 1, 1), (4, 6, 8), (2, 3, 3)]:
        check_layout(diffusion_tiny(), tp, pp, cp, 192)
    check_layout(diffusion_14b(), 8, 4, 8, 56_320)


def test_token_grid() -> None:
    config = diffusion_tiny()
    assert config.token_grid((3, 16, 16)) == (3, 8, 8)
    with pytest.raises(UserError, match="multiples of the patch"):
        config.token_grid((3, 15, 16))
    with pytest.raises(UserError, match="at most"):
        config.token_grid((3, 16, 242))


def test_configuration_is_a_megatron_configuration_without_bias_or_dropout() -> None:
    config = DiTConfig(num_layers=2, hidden_size=256, num_attention_heads=2)
    assert (config.ffn_hidden_size, config.kv_channels, config.add_bias_linear) == (1024, 128, False)
    assert (config.hidden_dropout, config.attention_dropout) == (0, 0)
    assert config.pipeline_dtype == config.params_dtype
