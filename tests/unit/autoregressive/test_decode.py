"""Writing tokens: against the whole forward pass, and speculation against plain decoding."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from nemo_cosmos.autoregressive.decode import UNKNOWN, Known, write_tokens
from nemo_cosmos.autoregressive.model import CosmosAR
from nemo_cosmos.autoregressive.speculation import JacobiDrafter, MedusaDrafter, PreviousFrameDrafter
from nemo_cosmos.autoregressive.token_sampling import GREEDY, TokenSampling
from nemo_cosmos.errors import UserError
from tests.unit.autoregressive.test_model import GRID, WITH_TEXT, config_for, inputs_for, model_for

SAMPLED = TokenSampling(temperature=1.5)


class Oracle:
    """Knows what will be written, but for one token."""

    num_guesses = 4

    def __init__(self, tokens_BS: torch.Tensor, wrong: int) -> None:
        self.tokens_BS = torch.nn.functional.pad(tokens_BS, (0, 8)).clone()
        self.tokens_BS[:, wrong] = (self.tokens_BS[:, wrong] + 1) % 50

    def __call__(self, known: Known) -> torch.Tensor:
        return self.tokens_BS.gather(1, known.places_BK)


def unfinished(config) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Two videos, of which one and two frames are given, and of one a token of the last frame."""
    tokens, text = inputs_for(config)
    tokens, first = tokens[:, : config.num_first + 24].clone(), config.num_first
    tokens[0, first + 8 :] = UNKNOWN
    tokens[1, first + 16 :] = UNKNOWN
    tokens[0, first + 20] = 3
    return tokens, text


@torch.inference_mode()
def one_by_one(model: CosmosAR, tokens_BS: torch.Tensor, text: torch.Tensor | None) -> torch.Tensor:
    """The likeliest tokens by whole forward passes."""
    tokens = tokens_BS.clone()
    for place in range(1, tokens.shape[1]):
        likeliest = model(tokens.clamp(min=0), GRID, text)[:, place - 1].argmax(-1)
        tokens[:, place] = torch.where(tokens[:, place] == UNKNOWN, likeliest, tokens[:, place])
    return tokens


@pytest.mark.parametrize("overrides", [{}, WITH_TEXT])
def test_greedy_tokens_are_the_likeliest_of_the_whole_forward_pass(overrides: dict, one_rank: torch.device) -> None:
    model = model_for(config_for(**overrides))
    tokens, text = unfinished(model.config)
    written = write_tokens(model, tokens, GRID, text, sampling=GREEDY, seeds=[0, 0])
    assert torch.equal(written.tokens_BS, one_by_one(model, tokens, text))
    assert (written.num_written, written.num_passes) == (16, 16)


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED])
def test_neither_batch_nor_speculation_changes_a_video(sampling: TokenSampling, one_rank: torch.device) -> None:
    model = model_for(config_for(**WITH_TEXT, num_medusa_heads=3))
    tokens, text = unfinished(model.config)
    arguments = {"sampling": sampling, "seeds": [1, 2]}
    plain = write_tokens(model, tokens, GRID, text, **arguments).tokens_BS
    for i in range(2):
        alone = write_tokens(
            model, tokens[i : i + 1], GRID, text[i : i + 1], sampling=sampling, seeds=[1 + i]
        ).tokens_BS
        assert torch.equal(alone[0], plain[i])
    before = PreviousFrameDrafter(GRID, num_guesses=5)
    drafters = (MedusaDrafter(model), before, JacobiDrafter(before), Oracle(plain, wrong=14))
    for drafter in drafters:
        written = write_tokens(model, tokens, GRID, text, drafter=drafter, **arguments)
        assert torch.equal(written.tokens_BS, plain)
        assert written.num_passes <= 16
    # 8 given in the first, and the begin of video: place 9, then 10 to 14 with its wrong guess, 15 to 19, 20 to 24.
    assert written.num_passes == 4
    other = write_tokens(model, tokens, GRID, text, sampling=sampling, seeds=[3, 2]).tokens_BS
    assert torch.equal(other[1], plain[1])
    assert torch.equal(other[0], plain[0]) == (sampling is GREEDY)


def test_the_frame_before_is_copied_place_by_place() -> None:
    tokens = torch.arange(60).view(2, 30)
    places = torch.tensor([[9, 10, 11], [25, 26, 27]])
    nothing = torch.full_like(places, UNKNOWN)
    known = Known(
        tokens_BS=tokens,
        places_BK=places,
        drawn_BK=nothing,
        hidden_BD=torch.empty(2, 1),
        logits=lambda _: pytest.fail("no model is asked"),
        draw=lambda _: pytest.fail("nothing is drawn"),
    )
    guesses = PreviousFrameDrafter(GRID, num_guesses=3)(known)  # of 8 tokens a frame
    assert guesses.tolist() == [[1, 2, 3], [47, 48, 49]]


def test_what_was_drawn_after_a_wrong_guess_is_guessed_next(one_rank: torch.device) -> None:
    """Against whole forward passes over the same wrong guesses."""
    model = model_for(config_for())
    tokens = unfinished(model.config)[0][:1]

    class Sevens:
        num_guesses = 4

        def __init__(self) -> None:
            self.knew: list[Known] = []

        def __call__(self, known: Known) -> torch.Tensor:
            self.knew.append(dataclasses.replace(known, tokens_BS=known.tokens_BS.clone()))
            return torch.full_like(known.places_BK, 7)

    sevens = Sevens()
    write_tokens(model, tokens, GRID, sampling=GREEDY, seeds=[0], drafter=sevens)
    assert (sevens.knew[0].drawn_BK == UNKNOWN).all()
    before, after = sevens.knew[1:3]
    tried = before.tokens_BS[:, : tokens.shape[1]].scatter(1, before.places_BK, 7)
    place = int(before.places_BK[0, 0])
    assert int(after.places_BK[0, 0]) == place + 1  # the first guess was wrong, and nothing else is told yet
    with torch.inference_mode():
        drawn = model(tried.clamp(min=0), GRID)[:, place : place + 4].argmax(-1)
    assert after.drawn_BK.tolist() == drawn[:, :4].tolist()
    assert JacobiDrafter(Sevens())(sevens.knew[0]).tolist() == [[7] * 4]
    assert torch.equal(JacobiDrafter(Sevens())(after), after.drawn_BK)


def test_speculation_keeps_the_distribution(one_rank: torch.device) -> None:
    """Of three tokens in a row, over many seeds, against their probabilities from whole forward passes."""
    config = config_for(vocab_size=3, num_medusa_heads=2)
    model, videos = model_for(config), 1500
    start = torch.tensor([[0, 2, 1, 2, 1, UNKNOWN, UNKNOWN, UNKNOWN]])
    grid, sampling = (2, 2, 2), TokenSampling(temperature=2.0, top_p=None)
    written = write_tokens(
        model,
        start.repeat(videos, 1),
        grid,
        sampling=sampling,
        seeds=range(videos),
        drafter=MedusaDrafter(model),
    )
    counts = torch.bincount((written.tokens_BS[:, 5:] * torch.tensor([9, 3, 1])).sum(1), minlength=27)
    every = start.repeat(27, 1)
    every[:, 5:] = torch.cartesian_prod(*[torch.arange(3)] * 3)
    with torch.inference_mode():
        probabilities = (model(every, grid)[:, 4:7] / 2.0).softmax(-1)
    expected = probabilities.gather(-1, every[:, 5:, None]).prod(dim=1).squeeze(-1)
    # Four standard deviations; the seeds are fixed.
    assert ((counts / videos - expected).abs() <= 4 * (expected * (1 - expected) / videos).sqrt()).all()


def test_only_allowed_codes_are_written(one_rank: torch.device) -> None:
    model = model_for(config_for())
    tokens, _ = unfinished(model.config)
    allowed = torch.arange(50) % 5 == 0
    written = write_tokens(model, tokens, GRID, sampling=SAMPLED, seeds=[1, 2], allowed_V=allowed).tokens_BS
    assert (written[tokens == UNKNOWN] % 5 == 0).all()
    assert torch.equal(written[tokens != UNKNOWN], tokens[tokens != UNKNOWN])


def test_what_is_complete_stays(one_rank: torch.device) -> None:
    model = model_for(config_for())
    tokens, _ = inputs_for(model.config)
    written = write_tokens(model, tokens, GRID, sampling=GREEDY, seeds=[0, 0])
    assert torch.equal(written.tokens_BS, tokens)
    assert written.num_written == 0


@pytest.mark.parametrize(
    ("tokens", "seeds", "message"),
    [
        (torch.zeros(2, 23, dtype=torch.long), [0, 0], r"tokens_BS: got \(2, 23\), expected \[B, 24\] for this grid"),
        (torch.full((2, 24), UNKNOWN), [0, 0], "tokens_BS: got 'an unknown first token'"),
        (torch.zeros(2, 24, dtype=torch.long), [0], "seeds: got '1 of them', expected 2, one for each video"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(
    tokens: torch.Tensor, seeds: list[int], message: str, one_rank: torch.device
) -> None:
    with pytest.raises(UserError, match=message):
        write_tokens(CosmosAR(config_for()), tokens, GRID, sampling=GREEDY, seeds=seeds)


def test_drafters_that_cannot_guess_are_refused(one_rank: torch.device) -> None:
    with pytest.raises(UserError, match="num_medusa_heads: got 0, expected 1 or more"):
        MedusaDrafter(CosmosAR(config_for()))
    with pytest.raises(UserError, match="num_guesses: got 9, expected 1 to 8, the tokens of a frame"):
        PreviousFrameDrafter(GRID, num_guesses=9)
