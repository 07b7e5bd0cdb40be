"""The model against a plain one written from the published formulas: logits and every gradient."""

from __future__ import annotations

import pytest
import torch

from nemo_cosmos.autoregressive.config import ARConfig, Yarn
from nemo_cosmos.autoregressive.model import CosmosAR
from nemo_cosmos.autoregressive.positions import rope_tables
from nemo_cosmos.autoregressive.state_dict import from_reference, to_reference
from nemo_cosmos.errors import UserError
from nemo_cosmos.parallel.tokens import CausalShard
from tests.unit.autoregressive import plain_model

TOLERANCE = 1e-5
"""Of the largest value: float32 gave 8e-6 at most, where positions outweigh what was embedded."""

GRID, TEXT = (3, 2, 4), (5, 12)
WITH_TEXT = {"special_tokens": True, "extra_pos_embed": "sincos", "crossattn_emb_channels": TEXT[1]}
YARN = Yarn(original_grid=(2, 3, 4), scale=2.0, beta_fast=1.5, beta_slow=0.1)
CASES = {
    "4B": {},
    "12B": {"yarn": YARN},
    "5B": WITH_TEXT,
    "13B": {**WITH_TEXT, "yarn": YARN},
    "every head has keys": {"num_query_groups": 4},
    "one key head, wider than the model": {"num_query_groups": 1, "kv_channels": 26},
    "tied": {"share_embeddings_and_output_weights": True},
    "positions without text": {"extra_pos_embed": "sincos"},
}


def config_for(**overrides) -> ARConfig:
    sizes = {
        "num_layers": 2,
        "hidden_size": 72,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "kv_channels": 18,
        "ffn_hidden_size": 40,
        "vocab_size": 50,
        "make_vocab_size_divisible_by": 16,
        "backend": "torch",
    }
    return ARConfig(**{**sizes, **overrides})


def plain_sizes(config: ARConfig) -> plain_model.Sizes:
    yarn = config.yarn
    return plain_model.Sizes(
        layers=config.num_layers,
        dim=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_query_groups,
        head_dim=config.kv_channels,
        vocab_size=config.vocab_size,
        yarn=yarn and (yarn.original_grid, yarn.scale, yarn.beta_fast, yarn.beta_slow),
        has_bov=config.special_tokens,
        adds_positions=config.extra_pos_embed is not None,
        tied=config.share_embeddings_and_output_weights,
    )


def inputs_for(config: ARConfig, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(config.vocab_size, (batch, 24), generator=generator)
    if config.special_tokens:
        begin, pad = (torch.full((batch, n), code) for n, code in ((1, config.begin_of_video), (3, config.padding)))
        tokens = torch.cat([begin, tokens, pad], dim=1)
    text = torch.randn(batch, *TEXT, generator=generator) if config.crossattn_emb_channels else None
    return tokens, text


def model_for(config: ARConfig) -> CosmosAR:
    """Norms differ from one, and no two weights are alike."""
    model = CosmosAR(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if parameter.ndim == 1 else noise / parameter.shape[1] ** 0.5)
    return model


def assert_close(name: str, got: torch.Tensor, expected: torch.Tensor) -> None:
    error, scale = (got - expected).abs().max().item(), expected.abs().max().item()
    assert error <= TOLERANCE * scale, f"{name}: off by {error:.3g} where values reach {scale:.3g}"


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_are_those_of_the_published_formulas(case: str, one_rank: torch.device) -> None:
    config = config_for(**CASES[case])
    model = model_for(config)
    tokens, text = inputs_for(config)
    weights = to_reference(dict(model.named_parameters()), config)
    weights = {name: w.detach().double().requires_grad_() for name, w in weights.items()}
    got = model(tokens, GRID, text)
    plain_text = None if text is None else text.double()
    expected = plain_model.logits(weights, plain_sizes(config), tokens, GRID, plain_text)
    assert_close("logits", got, expected.float())
    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2))
    (got * direction).sum().backward()
    (expected * direction).sum().backward()
    gradients = to_reference({name: p.grad for name, p in model.named_parameters()}, config)
    assert gradients.keys() == weights.keys()
    for name, gradient in gradients.items():
        assert_close(name, gradient, weights[name].grad.float())


def test_label_terms_are_those_of_the_logits(one_rank: torch.device) -> None:
    config = config_for(**WITH_TEXT)  # 50 codes in 64 rows
    model = model_for(config)
    tokens, text = inputs_for(config)
    labels = tokens.roll(-1, dims=1).clamp(max=config.vocab_size - 1)
    logits, terms = model(tokens, GRID, text), model(tokens, GRID, text, labels_BS=labels)
    cross_entropy = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    torch.testing.assert_close((terms.log_z - terms.logit).flatten(), cross_entropy, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(terms.log_z, logits.logsumexp(-1), rtol=1e-6, atol=1e-6)
    parameters = list(model.parameters())
    expected = torch.autograd.grad(cross_entropy.sum() + logits.logsumexp(-1).square().sum(), parameters)
    got = torch.autograd.grad((terms.log_z - terms.logit).sum() + terms.log_z.square().sum(), parameters)
    for (name, _), one, other in zip(model.named_parameters(), got, expected, strict=True):
        assert_close(name, one, other)


@pytest.mark.parametrize(
    "recompute",
    [
        {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
        {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp"]},
    ],
)
def test_recomputation_changes_nothing(recompute: dict, one_rank: torch.device) -> None:
    gradients = []
    for overrides in ({}, recompute):
        config = config_for(**WITH_TEXT, **overrides)
        model = model_for(config)
        model(*_arguments(config)).square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def _arguments(config: ARConfig) -> tuple:
    tokens, text = inputs_for(config)
    return tokens, GRID, text


def test_a_token_sees_none_that_comes_later(one_rank: torch.device) -> None:
    config = config_for()
    model = model_for(config)
    tokens, _ = inputs_for(config)
    changed = tokens.clone()
    changed[:, 10] = (changed[:, 10] + 1) % config.vocab_size
    before, after = model(tokens, GRID), model(changed, GRID)
    same = (before == after).all(dim=-1).all(dim=0)
    assert same.tolist() == [True] * 10 + [False] * 14


def test_rotary_tables_of_the_published_head() -> None:
    device = torch.device("cpu")

    def angles(yarn: Yarn | None) -> torch.Tensor:
        """Of the last token, frame 4, row 39, column 63; up to whole turns."""
        cos, sin = rope_tables((5, 40, 64), 128, 5e5, yarn, CausalShard(12_800), 0, device)
        assert cos.shape == (12_800, 1, 1, 64)
        return torch.atan2(sin, cos)[-1, 0, 0]

    plain, stretched = angles(None), angles(Yarn())
    assert plain[21].item() == pytest.approx(4 * 5e5 ** (-42 / 44))
    assert plain[42].item() == pytest.approx(39 * 5e5 ** (-40 / 42))
    assert plain[63].item() == pytest.approx(63 * 5e5 ** (-40 / 42))
    # Of three frames even the fastest angle made less than one turn; of 40 rows it made six, slow ones less than one.
    torch.testing.assert_close(stretched[1:22], plain[1:22] / 2)
    assert stretched[22] == plain[22]
    torch.testing.assert_close(stretched[27:43], plain[27:43] / 2)


def test_weights_depend_on_seed_and_name_alone(one_rank: torch.device) -> None:
    config = config_for(**WITH_TEXT)
    state = CosmosAR(config).state_dict()
    again = CosmosAR(config_for(**WITH_TEXT, num_layers=3)).state_dict()
    assert all(torch.equal(again[name], weight) for name, weight in state.items() if weight is not None)
    other = CosmosAR(config_for(**WITH_TEXT, init_seed=2)).state_dict()
    assert not torch.equal(other["embedding.weight"], state["embedding.weight"])
    assert state["embedding.weight"].std().item() == pytest.approx(1, rel=0.05)
    assert state["output_layer.weight"][:50].std().item() == pytest.approx(72**-0.5, rel=0.05)
    assert not state["output_layer.weight"][50:].any()
    gate, gated = state["layers.1.mlp.linear_fc1.weight"].chunk(2)
    assert gate.std().item() == pytest.approx(0.02, rel=0.05)
    assert gated.std().item() == pytest.approx(0.01, rel=0.05)


@pytest.mark.parametrize(
    ("overrides", "tokens", "text", "message"),
    [
        ({}, 20, None, r"tokens_BS: got \(2, 20\), expected \[B, 24 or more\] for a grid \(3, 2, 4\)"),
        ({}, 24, 12, r"crossattn_emb_BLC: got \(2, 5, 12\), expected None"),
        (WITH_TEXT, 24, 12, r"expected \[B, 25 or more\]"),
        (WITH_TEXT, 25, None, r"crossattn_emb_BLC: got None, expected \[B, L, 12\]"),
        (WITH_TEXT, 25, 8, r"got \(2, 5, 8\), expected \[B, L, 12\]"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(
    overrides: dict, tokens: int, text: int | None, message: str, one_rank: torch.device
) -> None:
    with pytest.raises(UserError, match=message):
        CosmosAR(config_for(**overrides))(
            torch.zeros(2, tokens, dtype=torch.int64), GRID, None if text is None else torch.zeros(2, 5, text)
        )


def test_loading_the_reference_state(one_rank: torch.device) -> None:
    config = config_for(**WITH_TEXT)
    state = to_reference(dict(model_for(config).named_parameters()), config)
    CosmosAR(config).load_state_dict(from_reference(state, config), strict=True)


def test_all_weights_have_the_dtype_asked_for(one_rank: torch.device) -> None:
    config = config_for(**WITH_TEXT, action_dim=7, num_medusa_heads=2, params_dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in CosmosAR(config).parameters()} == {torch.bfloat16}
