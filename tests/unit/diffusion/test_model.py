"""What the DiT promises beyond parity with diffusers: actions, uncertainty, recomputation, errors."""

from __future__ import annotations

import math

import pytest
import torch

from nemo_cosmos.diffusion.config import DiTConfig
from nemo_cosmos.diffusion.embeddings import timestep_features
from nemo_cosmos.diffusion.model import CosmosDiT
from nemo_cosmos.diffusion.positions import sincos_positions
from nemo_cosmos.diffusion.rope import rope_tables
from nemo_cosmos.diffusion.stage_input import Conditioning, pack, unpack
from nemo_cosmos.errors import UserError
from nemo_cosmos.transformer import recompute
from nemo_cosmos.transformer.rotary import apply_rope, axis_channels

BATCH, FRAMES, SIZE = 2, 3, 8


def config_for(**overrides) -> DiTConfig:
    sizes = {
        "num_layers": 2,
        "hidden_size": 48,
        "num_attention_heads": 2,
        "adaln_lora_dim": 8,
        "crossattn_emb_channels": 12,
        "max_latent_size": (4, 16, 16),
        "action_dim": 2,
        "action_frames_per_latent": 4,
        "backend": "torch",
    }
    return DiTConfig(**{**sizes, **overrides})


def model_for(**overrides) -> CosmosDiT:
    model = CosmosDiT(config_for(**overrides))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "action_embedder" not in name:
                parameter.copy_(0.7 * torch.randn(parameter.shape, generator=generator) / parameter.shape[1] ** 0.5)
    return model


def inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "x_BCTHW": torch.randn(BATCH, 16, FRAMES, SIZE, SIZE, generator=generator),
        "timesteps_B": torch.randn(BATCH, generator=generator),
        "crossattn_emb_BLD": torch.randn(BATCH, 5, 12, generator=generator),
    }


@torch.no_grad()
def wake_actions(model: CosmosDiT) -> None:
    for embedder in (model.conditioning.action_embedder, model.conditioning.action_embedder_adaln):
        torch.nn.init.normal_(embedder.linear_2.weight, std=0.2, generator=torch.Generator().manual_seed(2))


def test_actions_have_no_effect_before_training(one_rank: torch.device) -> None:
    model = model_for()
    actions = torch.randn(BATCH, FRAMES, 8)
    torch.testing.assert_close(model(**inputs(), actions_BTA=actions), model(**inputs()), rtol=0, atol=1e-6)


def test_actions_of_a_frame_reach_it_and_equal_actions_equal_a_constant(one_rank: torch.device) -> None:
    model = model_for(extra_pos_embed=None)
    wake_actions(model)
    actions = torch.randn(BATCH, 1, 8, generator=torch.Generator().manual_seed(3)).expand(-1, FRAMES, -1).clone()
    before = model(**inputs(), actions_BTA=actions)
    assert (before - model(**inputs())).abs().max() > 0.1
    actions[:, 2] += 1
    change = (model(**inputs(), actions_BTA=actions) - before).abs().mean(dim=(0, 1, 3, 4))
    assert change[2] > 3 * change[0] > 0  # the frame itself most, the others through attention


def test_uncertainty_head_starts_at_zero_and_follows_its_formula(one_rank: torch.device) -> None:
    model = CosmosDiT(config_for())
    times = torch.tensor([-1.0, 0.3])
    assert torch.equal(model.logvar(times), torch.zeros(2))
    head = model.logvar_head
    with torch.no_grad():
        head.linear.weight.copy_(torch.arange(128.0)[None] / 128)
    expected = [
        sum(w * math.sqrt(2) * math.cos(t * f + p) for w, f, p in zip(*columns, strict=True))
        for t in times.tolist()
        for columns in [(head.linear.weight[0].tolist(), head.freqs.tolist(), head.phases.tolist())]
    ]
    torch.testing.assert_close(model.logvar(times), torch.tensor(expected), rtol=1e-4, atol=1e-4)
    model.logvar(times).sum().backward()
    assert head.linear.weight.grad.abs().sum() > 0


def test_output_starts_at_zero(one_rank: torch.device) -> None:
    assert torch.equal(CosmosDiT(config_for())(**inputs()), torch.zeros(BATCH, 16, FRAMES, SIZE, SIZE))


def test_norms_of_queries_and_keys_start_where_they_are_told(one_rank: torch.device) -> None:
    model = CosmosDiT(config_for(init_qk_norm=2.0))
    starts = {name: parameter.mean().item() for name, parameter in model.named_parameters() if "norm.weight" in name}
    told = {name for name in starts if ".self_attention." in name}
    assert len(told) == 4
    assert {starts[name] for name in told} == {2.0}
    assert {start for name, start in starts.items() if name not in told} == {1.0}


def test_fused_layers_start_as_the_published_ones_that_stand_in_them(one_rank: torch.device) -> None:
    """Xavier's bound is that of each of the layers, not of the tall matrix that they make together."""
    config = config_for()
    state = CosmosDiT(config).state_dict()
    width = config.hidden_size
    for name, inputs in (
        ("self_attention.linear_qkv", width),
        ("cross_attention.linear_q", width),
        ("cross_attention.linear_kv", config.crossattn_emb_channels),
        ("self_attention.linear_proj", width),
    ):
        bound = (6 / (width + inputs)) ** 0.5
        # The largest of some thousand even draws.
        assert 0.98 * bound < state[f"blocks.0.{name}.weight"].abs().max() <= bound, name


def test_weights_depend_on_seed_and_name_alone(one_rank: torch.device) -> None:
    torch.manual_seed(5)
    first = CosmosDiT(config_for()).state_dict()
    torch.manual_seed(6)
    deeper = CosmosDiT(config_for(num_layers=3)).state_dict()
    assert all(torch.equal(value, deeper[name]) for name, value in first.items() if not name.endswith("_extra_state"))
    other = CosmosDiT(config_for(init_seed=7)).state_dict()
    assert not torch.equal(first["x_embedder.proj.weight"], other["x_embedder.proj.weight"])


def full(method: str, layers: int) -> dict:
    return {"recompute_granularity": "full", "recompute_method": method, "recompute_num_layers": layers}


def selective(*modules: str) -> dict:
    return {"recompute_granularity": "selective", "recompute_modules": list(modules)}


def gradients_and_kept_bytes(overrides: dict, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, torch.Tensor], int]:
    """Gradients, and the size of what the forward pass keeps for them besides parameters."""
    model, kept = model_for(num_layers=4, **overrides), {}
    owned = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    def checkpoint_keeping_arguments(function, *args, **kwargs):
        for arg in args:
            if isinstance(arg, torch.Tensor):
                keep(arg)
        return torch.utils.checkpoint.checkpoint(function, *args, **kwargs)

    monkeypatch.setattr(recompute, "checkpoint", checkpoint_keeping_arguments)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(**inputs(), fps=24.0).square().mean()
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, sum(kept.values())


def test_recomputation_gives_the_same_gradients_and_keeps_less(
    one_rank: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, most = gradients_and_kept_bytes({}, monkeypatch)
    # From what keeps most to what keeps least.
    for overrides in (
        selective("core_attn"),
        selective("core_attn", "mlp"),
        full("block", 2),
        full("block", 4),
        full("uniform", 2),
    ):
        gradients, kept = gradients_and_kept_bytes(overrides, monkeypatch)
        assert kept < most, overrides
        most = kept
        assert all(torch.equal(gradients[name], gradient) for name, gradient in expected.items()), overrides


def test_fixed_positions_are_no_weights_and_cut_as_the_tokens_are(one_rank: torch.device) -> None:
    assert (
        model_for(extra_pos_embed="sincos").state_dict().keys() == model_for(extra_pos_embed=None).state_dict().keys()
    )
    grid, device = (2, 3, 4), torch.device("cpu")
    whole = sincos_positions(grid, 48, (0, 24), torch.float32, device)
    piece = sincos_positions(grid, 48, (7, 15), torch.float32, device)
    assert torch.equal(piece, whole[7:15])
    token = (1 * 3 + 2) * 4 + 3
    assert whole[token, 0, 1].item() == pytest.approx(math.sin(1 * 10000 ** (-1 / 8)), abs=1e-7)
    assert whole[token, 0, 16 + 8 + 1].item() == pytest.approx(math.cos(2 * 10000 ** (-1 / 8)), abs=1e-7)
    assert whole[token, 0, 32].item() == pytest.approx(math.sin(3), abs=1e-7)


@pytest.mark.parametrize("rows", [None, 5])
def test_what_crosses_between_stages_comes_out_as_it_went_in(rows: int | None) -> None:
    sent = Conditioning(
        emb_FBD=torch.randn(3, 2, 6),
        shared_FBC=torch.randn(3, 2, 18),
        position_rows_RD=None if rows is None else torch.randn(rows, 6),
    )
    hidden = torch.randn(7, 2, 6)
    got_hidden, got = unpack(pack(hidden, sent), num_tokens=7, num_groups=3)
    assert torch.equal(got_hidden, hidden)
    assert torch.equal(got.emb_FBD, sent.emb_FBD)
    assert torch.equal(got.shared_FBC, sent.shared_FBC)
    assert got.position_rows_RD is None if rows is None else torch.equal(got.position_rows_RD, sent.position_rows_RD)


def test_fps_of_each_sample_counts(one_rank: torch.device) -> None:
    model, batch = model_for(), inputs()
    mixed = model(**batch, fps=torch.tensor([10.0, 24.0]))
    torch.testing.assert_close(mixed[:1], model(**batch, fps=10.0)[:1], rtol=0, atol=2e-6)
    torch.testing.assert_close(mixed[1:], model(**batch, fps=24.0)[1:], rtol=0, atol=2e-6)
    assert (mixed[0] - model(**batch, fps=24.0)[0]).abs().max() > 1e-3


def test_runs_in_bfloat16(one_rank: torch.device) -> None:
    full = model_for()
    half = CosmosDiT(config_for(params_dtype=torch.bfloat16))
    half.load_state_dict(full.state_dict())
    output = half(**inputs(), fps=24.0)
    assert output.dtype == torch.bfloat16
    expected = full(**inputs(), fps=24.0)
    assert (output.float() - expected).square().mean() < 1e-3 * expected.square().mean()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_BCTHW": torch.zeros(2, 16, 3, 7, 8)}, "multiples of the patch"),
        ({"x_BCTHW": torch.zeros(2, 16, 5, 8, 8)}, "at most"),
        ({"crossattn_emb_BLD": torch.zeros(2, 5, 13)}, r"\[batch, tokens, 12\]"),
        ({"actions_BTA": torch.zeros(2, 2, 8)}, r"\(2, 3, 8\)"),
        ({"condition_mask_B1THW": torch.zeros(2, 1, 3, 8, 8)}, "concat_condition_mask"),
        ({"fps": 0.0}, "positive"),
    ],
)
def test_wrong_inputs_are_refused(change: dict, message: str, one_rank: torch.device) -> None:
    with pytest.raises(UserError, match=message):
        model_for()(**{**inputs(), **change})


def test_actions_without_action_layers_are_refused(one_rank: torch.device) -> None:
    with pytest.raises(UserError, match="action_dim"):
        model_for(action_dim=None)(**inputs(), actions_BTA=torch.zeros(2, 3, 8))


def test_rotary_angles_of_a_published_head() -> None:
    assert axis_channels(128) == (44, 42, 42)
    cos, sin = rope_tables((2, 3, 4), 128, (2.0, 1.0, 1.0), (0.5,), (0, 24), torch.device("cpu"))
    frame, row, column = 1, 2, 3
    token = (frame * 3 + row) * 4 + column
    theta_t = 10000 * 2 ** (44 / 42)
    assert cos[token, 0, 0, 1].item() == pytest.approx(math.cos(0.5 * frame * theta_t ** (-2 / 44)), abs=1e-6)
    assert sin[token, 0, 0, 22].item() == pytest.approx(math.sin(row), abs=1e-6)
    assert sin[token, 0, 0, 22 + 21 + 1].item() == pytest.approx(math.sin(column * 10000 ** (-2 / 42)), abs=1e-6)


def test_rotation_keeps_lengths_and_its_gradient_is_the_rotation_back() -> None:
    tables = tuple(t.double() for t in rope_tables((2, 2, 2), 18, (1.0, 1.0, 1.0), (1.0,), (0, 8), torch.device("cpu")))
    x = torch.randn(8, 1, 2, 18, requires_grad=True)
    turned = apply_rope(x, tuple(t.float() for t in tables))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    turned.backward(turned.detach())
    torch.testing.assert_close(x.grad, x.detach())


def test_timestep_features_are_cosines_then_sines() -> None:
    features = timestep_features(torch.tensor([0.5]), 4)
    expected = [math.cos(0.5), math.cos(0.005), math.sin(0.5), math.sin(0.005)]
    torch.testing.assert_close(features, torch.tensor([expected]))
