"""One table of names: complete, strict, exact to the bit."""

from __future__ import annotations

import json

import pytest
import torch

from nemo_cosmos.diffusion.config import DiTConfig
from nemo_cosmos.diffusion.model import CosmosDiT
from nemo_cosmos.diffusion.state_dict import (
    NOT_IN_DIFFUSERS,
    config_from_diffusers,
    diffusers_config,
    from_diffusers,
    from_reference,
    to_diffusers,
    to_reference,
)
from nemo_cosmos.errors import UserError


def config_for(**overrides) -> DiTConfig:
    sizes = {
        "num_layers": 2,
        "hidden_size": 48,
        "num_attention_heads": 2,
        "adaln_lora_dim": 8,
        "crossattn_emb_channels": 12,
        "max_latent_size": (4, 16, 12),
        "concat_condition_mask": True,
        "backend": "torch",
    }
    return DiTConfig(**{**sizes, **overrides})


def random_state(config: DiTConfig) -> dict[str, torch.Tensor]:
    """Distinct values in every weight."""
    state = CosmosDiT(config).state_dict()
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(weight.shape, generator=generator) for name, weight in state.items() if weight is not None
    }


def test_reference_round_trip_is_exact(one_rank: torch.device) -> None:
    config = config_for(action_dim=3)
    state = random_state(config)
    reference = to_reference(state, config)
    back = from_reference(reference, config)
    assert set(back) == set(state)
    assert all(torch.equal(back[name], state[name]) for name in state)
    CosmosDiT(config).load_state_dict(back, strict=True)


def test_reference_names_are_the_published_ones(one_rank: torch.device) -> None:
    config = config_for()
    state = random_state(config)
    reference = to_reference(state, config)
    published = {
        "net.x_embedder.proj.1.weight",
        "net.pos_embedder.seq",
        "net.extra_pos_embedder.pos_emb_t",
        "net.t_embedder.1.linear_1.weight",
        "net.affline_norm.weight",
        "net.blocks.block0.blocks.0.block.attn.to_q.0.weight",
        "net.blocks.block0.blocks.0.block.attn.to_q.1.weight",
        "net.blocks.block1.blocks.1.block.attn.to_v.0.weight",
        "net.blocks.block1.blocks.1.adaLN_modulation.2.weight",
        "net.blocks.block1.blocks.2.block.layer2.weight",
        "net.final_layer.adaLN_modulation.1.weight",
        "logvar.0.freqs",
        "logvar.1.weight",
    }
    assert published <= set(reference)
    assert torch.equal(reference["net.pos_embedder.seq"], torch.arange(8.0))
    # Fused rows of head 1 are its query, key and value rows, 24 each.
    fused = state["blocks.0.self_attention.linear_qkv.weight"]
    query = reference["net.blocks.block0.blocks.0.block.attn.to_q.0.weight"]
    value = reference["net.blocks.block0.blocks.0.block.attn.to_v.0.weight"]
    assert torch.equal(query[24:], fused[72:96])
    assert torch.equal(value[24:], fused[120:144])


def test_transformer_engine_extras_and_old_prefix_are_accepted(one_rank: torch.device) -> None:
    config = config_for()
    state = random_state(config)
    reference = to_reference(state, config)
    reference = {name.replace("logvar.", "net.logvar."): weight for name, weight in reference.items()}
    reference["net.blocks.block0.blocks.0.block.attn.to_q.1._extra_state"] = torch.zeros(1)
    assert set(from_reference(reference, config)) == set(state)


def test_missing_and_unknown_weights_are_named(one_rank: torch.device) -> None:
    config = config_for()
    reference = to_reference(random_state(config), config)
    reference["net.surprise"] = reference.pop("net.affline_norm.weight")
    with pytest.raises(
        UserError,
        match=r"1 weights missing \['net.affline_norm.weight'\], 1 unknown \['net.surprise'\], "
        r"expected the \d+ of this configuration\. Choose the preset",
    ):
        from_reference(reference, config)


def test_diffusers_drops_the_uncertainty_head_and_refuses_actions(one_rank: torch.device) -> None:
    config = config_for()
    state = random_state(config)
    moved, _ = to_diffusers(state, config)
    assert set(state) - set(from_diffusers(moved, config)) == set(NOT_IN_DIFFUSERS)
    with pytest.raises(UserError, match="no action layers"):
        to_diffusers(state, config_for(action_dim=3))


def test_configuration_survives_diffusers_json() -> None:
    config = config_for(ffn_hidden_size=100, rope_ratio=(2.0, 2.0, 2.0), extra_pos_embed=None)
    back = config_from_diffusers(json.loads(json.dumps(diffusers_config(config))), backend="torch")
    assert diffusers_config(back) == diffusers_config(config)
    assert back.concat_condition_mask


def test_later_cosmos_models_are_refused() -> None:
    values = {**diffusers_config(config_for()), "use_crossattn_projection": True}
    with pytest.raises(UserError, match="Cosmos 1"):
        config_from_diffusers(values)
