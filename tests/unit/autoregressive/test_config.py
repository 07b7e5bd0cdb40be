"""Published sizes, refused configurations, refused layouts, cards."""

from __future__ import annotations

import json

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nemo_cosmos.autoregressive.architecture import architecture_of, config_from, is_architecture
from nemo_cosmos.autoregressive.config import (
    PRESETS,
    Yarn,
    autoregressive_12b,
    autoregressive_13b,
    autoregressive_tiny,
    check_layout,
)
from nemo_cosmos.autoregressive.flops import forward_flops
from nemo_cosmos.autoregressive.model import CosmosAR
from nemo_cosmos.autoregressive.published import config_of_reference, is_reference
from nemo_cosmos.autoregressive.state_dict import entering, leaving, weight_table
from nemo_cosmos.errors import UserError
from nemo_cosmos.weight_files.stored_tensor import Weights, stored
from tests.unit.autoregressive.test_model import GRID, WITH_TEXT, config_for, inputs_for


def on_meta(config) -> CosmosAR:
    with torch.device("meta"):
        return CosmosAR(config)


def reference_weights(model: CosmosAR) -> Weights:
    return leaving(stored(dict(model.named_parameters())), model.config)


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("autoregressive_4b", 4_014_088_192),
        ("autoregressive_5b", 4_584_845_312),
        ("autoregressive_12b", 11_560_975_360),
        ("autoregressive_13b", 13_323_125_760),
        ("autoregressive_tiny", 5_640_192),
        ("autoregressive_tiny_video2world", 7_035_136),
    ],
)
def test_published_sizes(name: str, published: int, one_rank: torch.device) -> None:
    config = PRESETS[name](backend="torch")
    model = on_meta(config)
    assert all(p.is_meta for p in model.parameters())
    assert sum(p.numel() for p in model.parameters()) == published
    names = {name for name, _ in model.global_tensors()}
    assert names == {row.ours for row in weight_table(config)}
    sharded = {entry.key for entry in model.sharded_state_dict().values() if not entry.key.endswith("_extra_state")}
    assert sharded == names
    # Reference weights of this size are found by their shapes alone.
    reference = reference_weights(model)
    assert is_reference(reference)
    found = config_of_reference(reference, name if "tiny" in name else None)
    assert architecture_of(found) == architecture_of(config)
    assert entering(reference, found).keys() == names


def test_published_vocabularies() -> None:
    config = autoregressive_13b()
    assert (config.num_embeddings, config.num_outputs) == (64_064, 64_000)
    assert (config.begin_of_video, config.padding, config.num_first) == (64_000, 64_002, 1)
    assert (autoregressive_12b().num_embeddings, autoregressive_12b().num_first) == (64_000, 0)


def test_other_sizes_need_a_name_or_a_card(one_rank: torch.device) -> None:
    weights = dict(reference_weights(on_meta(autoregressive_tiny(backend="torch"))))
    with pytest.raises(UserError, match=r"'hidden_size': 256.*expected the shapes of a published model"):
        config_of_reference(weights)
    with pytest.raises(UserError, match="expected the shapes of autoregressive_4b"):
        config_of_reference(weights, "autoregressive_4b")
    del weights["model.layers.0.feed_forward.w1.weight"]
    with pytest.raises(UserError, match=r"feed_forward\.w1\.weight is missing"):
        config_of_reference(weights)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"hidden_size": 190}, "a positive multiple of num_attention_heads"),
        ({"hidden_size": 64}, "18 or more"),
        ({"num_query_groups": 3}, "a divisor of the 4 heads"),
        ({"vocab_size": 1}, "2 or more"),
        (
            {"special_tokens": True, "share_embeddings_and_output_weights": True},
            r"as many embeddings \(4160\) as outputs \(4096\)",
        ),
        ({"action_dim": 7}, "action_dim: got 7, expected positive, and crossattn_emb_channels set"),
        ({"extra_pos_embed": "learnable"}, "'sincos' or None"),
        ({"recompute_granularity": "selective", "recompute_modules": ["layernorm"]}, r"\['core_attn', 'mlp'\]"),
    ],
)
def test_impossible_configuration_is_refused(overrides: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        autoregressive_tiny(**overrides)


@pytest.mark.parametrize(
    ("overrides", "layout", "message"),
    [
        ({}, {"tp": 4}, "tensor-parallel size: got 4, .*2 key heads.*Nearest: 2"),
        ({}, {"pp": 4}, "pipeline-parallel size: got 4, .*6 layers.*Nearest: 3 or 6"),
        ({}, {"cp": 5}, "tokens of a sample: got 192, .*multiple of 10.*Nearest: 190 or 200"),
        ({"sequence_parallel": True}, {"tp": 2, "cp": 5}, "multiple of 10, .*cuts once more"),
        ({"sequence_parallel": True}, {"tp": 1}, "2 or more"),
        ({"cp_comm_type": "a2a"}, {"tp": 2, "cp": 4}, "context-parallel size: got 4, .*2 heads of a rank.*Nearest: 2;"),
        ({}, {"cp": 0}, "1 or more"),
    ],
)
def test_impossible_layout_is_refused_with_the_nearest(overrides: dict, layout: dict[str, int], message: str) -> None:
    config = autoregressive_tiny()
    for name, value in overrides.items():  # Megatron's own check would come first and knows no nearest value
        setattr(config, name, value)
    with pytest.raises(UserError, match=message):
        check_layout(config, **{"tp": 1, "pp": 1, "cp": 1, **layout}, num_tokens=192)


def test_possible_layouts_pass() -> None:
    for tp, pp, cp in [(1, 1, 1), (2, 6, 8), (2, 3, 3)]:
        check_layout(autoregressive_tiny(), tp, pp, cp, 192)
    check_layout(autoregressive_13b(), 8, 4, 8, 12_864)


def test_a_card_tells_the_architecture() -> None:
    for config in (autoregressive_13b(), autoregressive_tiny(vocab_size=1000)):
        values = json.loads(json.dumps(architecture_of(config)))
        assert is_architecture(values)
        again = config_from(values, backend="torch")
        assert architecture_of(again) == values and again.yarn == config.yarn
    with pytest.raises(UserError, match=r"missing \['yarn'\], unknown \['sinus'\]"):
        config_from({**{name: value for name, value in values.items() if name != "yarn"}, "sinus": 1})
    assert autoregressive_12b().yarn == Yarn(original_grid=(3, 40, 64), scale=2.0, beta_fast=4.0, beta_slow=1.0)


@pytest.mark.parametrize("overrides", [{}, WITH_TEXT])
def test_flops_are_those_that_torch_counts(overrides: dict, one_rank: torch.device) -> None:
    config = config_for(**overrides)
    tokens, text = inputs_for(config)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        CosmosAR(config)(tokens, GRID, text)
    length = tokens.shape[1]
    counted = forward_flops(config, length, text_length=0 if text is None else text.shape[1], num_samples=2)
    # torch counts all pairs of tokens, also those that a causal mask hides.
    hidden = 2 * 2 * length**2 * config.num_attention_heads * config.kv_channels * config.num_layers
    assert counter.get_total_flops() == counted + hidden
