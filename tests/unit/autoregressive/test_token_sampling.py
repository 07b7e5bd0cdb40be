"""Draws of tokens: their distribution, and what they depend on."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nemo_cosmos.autoregressive.token_sampling import GREEDY, TokenSampler, TokenSampling, admitted_probabilities
from nemo_cosmos.errors import UserError

LOGITS = torch.tensor([2.0, -1.0, 1.5, 0.0, 1.0, -0.5])


def published_top_p(logits: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    """cosmos-predict1's `sample_top_p`, up to the draw."""
    ordered, index = torch.softmax(logits / temperature, dim=-1).sort(descending=True)
    ordered[ordered.cumsum(-1) - ordered > top_p] = 0
    return torch.zeros_like(ordered).scatter(-1, index, ordered / ordered.sum(-1, keepdim=True))


def normed(probabilities: torch.Tensor) -> torch.Tensor:
    return probabilities / probabilities.sum(-1, keepdim=True)


@pytest.mark.parametrize("scale", [0.0, 0.3, 4.0])
def test_top_p_admits_what_the_published_code_admits(scale: float) -> None:
    """From hardly different tokens, of which thousands are admitted, to a handful."""
    logits = scale * torch.randn(3, 1, 6000, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    logits += 1e-3 * torch.arange(6000)  # no two alike
    for temperature, top_p in ((1.0, 0.8), (0.6, 0.9)):
        got = admitted_probabilities(logits, TokenSampling(temperature=temperature, top_p=top_p))
        expected = published_top_p(logits, temperature, top_p)
        # Sums in another order may leave out or take in the last one.
        assert ((got > 0) != (expected > 0)).sum() <= 3
        torch.testing.assert_close(normed(got), expected, rtol=0, atol=1e-3)


def test_top_k_admits_the_likeliest_and_top_p_counts_among_them() -> None:
    every = TokenSampling(top_p=None)
    p = admitted_probabilities(LOGITS, every)
    torch.testing.assert_close(p, LOGITS.softmax(-1))
    assert admitted_probabilities(LOGITS, TokenSampling(top_p=None, top_k=3)).nonzero().flatten().tolist() == [0, 2, 4]
    # 0.51, 0.31 and 0.19 of the three.
    assert admitted_probabilities(LOGITS, TokenSampling(top_p=0.5, top_k=3)).nonzero().flatten().tolist() == [0]
    assert admitted_probabilities(LOGITS, TokenSampling(top_p=0.6, top_k=3)).nonzero().flatten().tolist() == [0, 2]


@pytest.mark.parametrize(
    "sampling", [TokenSampling(top_p=None), TokenSampling(temperature=0.7, top_p=0.8), TokenSampling(top_k=2)]
)
def test_draws_have_the_model_s_distribution(sampling: TokenSampling) -> None:
    num_draws = 4000
    drawn = TokenSampler(sampling, [5]).draw(LOGITS.expand(1, num_draws, 6), [0])
    counts = torch.bincount(drawn.flatten(), minlength=6)
    expected = normed(admitted_probabilities(LOGITS, sampling))
    # Four standard deviations; the draws are fixed by the seed.
    assert ((counts / num_draws - expected).abs() <= 4 * (expected * (1 - expected) / num_draws).sqrt()).all()


def test_a_draw_depends_on_its_seed_and_place_alone() -> None:
    logits = torch.randn(1, 40, 50, generator=torch.Generator().manual_seed(1))
    sampling = TokenSampling(top_p=None)
    drawn = TokenSampler(sampling, [7]).draw(logits, [100])
    sampler = TokenSampler(sampling, [3, 7])
    first = sampler.draw(logits[:, :30].expand(2, -1, -1), [90, 100])
    then = sampler.draw(logits[:, 25:].expand(2, -1, -1), [115, 125])  # five of them once more
    assert torch.equal(first[1], drawn[0, :30])
    assert torch.equal(then[1], drawn[0, 25:])
    assert not torch.equal(first[0], first[1])


def test_draws_from_a_like_distribution_mostly_agree() -> None:
    """As speculation needs: of any two draws with these distributions 1 - d at most agree, here nearly as many."""
    generator = torch.Generator().manual_seed(2)
    own = torch.randn(1, 2000, 20, generator=generator)
    other = own + 0.5 * torch.randn(own.shape, generator=generator)
    sampler = TokenSampler(TokenSampling(top_p=None), [0])
    agree = (sampler.draw(own, [0]) == sampler.draw(other, [0])).float().mean().item()
    distance = (own.softmax(-1) - other.softmax(-1)).abs().sum(-1).mean().item() / 2
    assert (1 - distance) / (1 + distance) - 0.03 < agree < 1 - distance


def test_greedy_and_forbidden_tokens() -> None:
    logits = LOGITS.expand(1, 300, 6)
    allowed = torch.tensor([False, True, True, True, True, False])
    assert TokenSampler(GREEDY, [0]).draw(logits, [0]).unique().tolist() == [0]
    assert TokenSampler(GREEDY, [0], allowed_V=allowed).draw(logits, [0]).unique().tolist() == [2]
    drawn = TokenSampler(TokenSampling(top_p=None), [0], allowed_V=allowed).draw(logits, [0])
    assert drawn.unique().tolist() == [1, 2, 3, 4]


def test_a_token_without_probability_is_never_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    class Zeros:
        def __init__(self, _: object) -> None: ...

        def standard_exponential(self, size: int, dtype: type) -> np.ndarray:
            return np.zeros(size, dtype)

    monkeypatch.setattr(np.random, "Generator", Zeros)
    assert TokenSampler(TokenSampling(top_k=1), [0]).draw(LOGITS.flip(0)[None, None], [0]).item() == 5


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("temperature", -1.0, "expected 0 .greedy. or more"),
        ("temperature", float("nan"), "expected 0 .greedy. or more"),
        ("top_p", 0.0, "more than 0 and at most 1"),
        ("top_p", 1.1, "more than 0 and at most 1"),
        ("top_k", 0, "expected 1 or more"),
    ],
)
def test_impossible_values_are_refused(field: str, value: float, message: str) -> None:
    with pytest.raises(UserError, match=f"{field}: got .*{message}"):
        TokenSampling(**{field: value})
