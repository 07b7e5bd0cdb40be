"""Writes a video's tokens one after the other, or several at once where guesses prove right.

**Speculation.** A drafter guesses the next K tokens; one pass over the last token and the guesses tells what is to be
drawn at each of these places. Guesses stand as far as they are what is drawn; the first that is not is replaced by it.
As the draw of a place is fixed by the video's seed and the tokens before (`token_sampling.py`), the result is to the
token that of plain decoding, greedy or not, whatever the drafter; only rounding can tell them apart, as products of
several rows are added up in another order. A guess without chance stands with the probability that the model gives it,
as under the usual rejection rule (Leviathan et al., https://arxiv.org/abs/2211.17192); one that is drawn from a
distribution of the drafter's takes part in the same race, and so agrees nearly as often as any rule could make it
(Daliri et al., https://arxiv.org/abs/2408.07978).

Letters: B = batch, S = tokens of the sequence, K = guesses, m = K + 1, D = hidden size, L = text tokens, C = channels
of one, V = codes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from nemo_cosmos.autoregressive.cached_forward import CachedForward
from nemo_cosmos.autoregressive.model import CosmosAR
from nemo_cosmos.autoregressive.token_sampling import TokenSampler, TokenSampling
from nemo_cosmos.errors import user_error
from nemo_cosmos.transformer.positions import Grid

UNKNOWN = -1
"""Stands for a token that is to be written."""


@dataclass(frozen=True, kw_only=True)
class Known:
    """What a drafter may guess from."""

    tokens_BS: Tensor
    """int64; `UNKNOWN` at places that are not written yet."""
    places_BK: Tensor
    """int64; the places to be guessed."""
    drawn_BK: Tensor
    """int64; what the last pass drew there, after a guess that was wrong; `UNKNOWN` where it drew nothing."""
    hidden_BD: Tensor
    """What the output layer took to tell the token before these."""
    logits: Callable[[Tensor], Tensor]
    """The model's output layer, [B, K, D] -> [B, K, V]."""
    draw: Callable[[Tensor], Tensor]
    """Draws tokens of these places from logits [B, K, V] by the chance that the model's own draw will have."""


class Drafter(Protocol):
    """Guesses tokens."""

    num_guesses: int
    """K."""

    def __call__(self, known: Known) -> Tensor:
        """Returns token ids, int64 [B, K]."""


@dataclass(frozen=True, kw_only=True)
class WrittenTokens:
    """A batch of sequences, and what they took."""

    tokens_BS: Tensor
    """int64."""
    num_written: int
    """Tokens of a sequence that were not given at its start."""
    num_passes: int
    """Of the transformer, the one over the tokens given at the start included."""


@torch.inference_mode()
def write_tokens(
    model: CosmosAR,
    tokens_BS: Tensor,
    grid: Grid,
    crossattn_emb_BLC: Tensor | None = None,
    *,
    sampling: TokenSampling,
    seeds: Sequence[int],
    actions_BFA: Tensor | None = None,
    drafter: Drafter | None = None,
    allowed_V: Tensor | None = None,
    first_place: int = 0,
    compile: bool = False,  # noqa: A002 - the field's name for it
    progress: bool = False,
) -> WrittenTokens:
    """Writes the tokens that are unknown.

    Args:
        model: The transformer; all ranks of a tensor-parallel group take part, and get the same.
        tokens_BS: int64; as `CosmosAR` takes them, `UNKNOWN` where a token is to be written. Others stay wherever they
            are: the videos of a batch may be given unlike numbers of frames.
        grid: Tokens of the video along T, H, W.
        crossattn_emb_BLC: Text tokens, where the model takes text.
        sampling: How tokens are drawn.
        seeds: Of every video, whose tokens depend on its own alone.
        actions_BFA: Scaled actions, where the model takes them.
        drafter: Guesses tokens. It changes how long this takes and nothing else.
        allowed_V: bool; codes that may be written; None for all. Special tokens never are.
        first_place: Place of the sequence's first token in a longer video, so that no two windows of it draw alike.
        compile: See `CachedForward`.
        progress: Show a progress bar.

    Raises:
        UserError: A size does not fit, or a sequence's first token is unknown.
    """
    batch, length = tokens_BS.shape
    num_given = _num_given(tokens_BS)
    _check(model.config.num_first + math.prod(grid), tokens_BS, num_given, seeds)
    num_guesses = 0 if drafter is None else drafter.num_guesses
    # What a video that is complete does while it waits for others reaches beyond its end, and is dropped.
    room = length + num_guesses
    forward = CachedForward(
        model,
        grid,
        batch=batch,
        length=room,
        crossattn_emb_BLC=crossattn_emb_BLC,
        actions_BFA=actions_BFA,
        compile=compile,
    )
    sampler = TokenSampler(sampling, seeds, allowed_V=allowed_V, first_place=first_place)
    tokens = functional.pad(tokens_BS, (0, num_guesses + 1), value=UNKNOWN)
    with tqdm(total=length, initial=num_given, unit="token", disable=not progress) as bar:
        write = _write_one_by_one if drafter is None else partial(_write_guessing, drafter=drafter)
        num_passes = write(forward, sampler, tokens, num_given, length, bar)
    return WrittenTokens(tokens_BS=tokens[:, :length], num_written=length - num_given, num_passes=num_passes)


def _write_one_by_one(
    forward: CachedForward, sampler: TokenSampler, tokens_BS: Tensor, num_given: int, length: int, bar: tqdm
) -> int:
    """Fills `tokens_BS`; returns the number of passes."""
    batch, last = len(tokens_BS), tokens_BS[:, :num_given]
    for place in range(num_given, length):
        hidden = forward(last, [place - last.shape[1]] * batch)[:, -1:]
        drawn = sampler.draw(forward.logits(hidden), [place] * batch)
        given = tokens_BS[:, place : place + 1]
        last = torch.where(given == UNKNOWN, drawn, given)
        given.copy_(last)
        bar.update()
    return length - num_given


def _write_guessing(
    forward: CachedForward,
    sampler: TokenSampler,
    tokens_BS: Tensor,
    num_given: int,
    length: int,
    bar: tqdm,
    *,
    drafter: Drafter,
) -> int:
    """Fills `tokens_BS`, of which there are m more than `length`; returns the number of passes."""
    batch, device = len(tokens_BS), tokens_BS.device
    ahead, samples = torch.arange(drafter.num_guesses + 1, device=device), torch.arange(batch, device=device)
    first, num_passes = [num_given] * batch, 0
    drafts_BS = torch.full_like(tokens_BS, UNKNOWN)
    block, starts = tokens_BS[:, :num_given], [0] * batch
    guesses = tokens_BS[:, :0]
    while min(first) < length:
        hidden = forward(block, starts)[:, -1 - guesses.shape[1] :]
        num_passes += 1
        places = torch.tensor(first, device=device)[:, None] + ahead[: hidden.shape[1]]
        drawn = sampler.draw(forward.logits(hidden), first)
        drafts_BS.scatter_(1, places, drawn)
        num_right = _settle(tokens_BS, places, guesses, drawn)
        first = [min(place + right + 1, length) for place, right in zip(first, num_right, strict=True)]
        bar.update(min(first) - bar.n)
        places = torch.tensor(first, device=device)[:, None] + ahead
        known = Known(
            tokens_BS=tokens_BS,
            places_BK=places[:, :-1],
            drawn_BK=drafts_BS.gather(1, places[:, :-1]),
            hidden_BD=hidden[samples, num_right],
            logits=forward.logits,
            draw=lambda logits, first=first: sampler.draw(logits, first),
        )
        given = tokens_BS.gather(1, known.places_BK)
        guesses = torch.where(given == UNKNOWN, drafter(known), given)
        block = torch.cat([tokens_BS.gather(1, places[:, :1] - 1), guesses], dim=1)
        starts = [place - 1 for place in first]
    return num_passes


def _settle(tokens_BS: Tensor, places_Bm: Tensor, guesses_BK: Tensor, drawn_Bm: Tensor) -> list[int]:
    """Writes what stands of the guesses, and the token after them; returns how many stood in each sequence."""
    given = tokens_BS.gather(1, places_Bm)
    drawn = torch.where(given == UNKNOWN, drawn_Bm, given)
    right_BK = (guesses_BK == drawn[:, :-1]).cumprod(dim=1)
    stands = functional.pad(right_BK.bool(), (1, 0), value=True)
    tokens_BS.scatter_(1, places_Bm, torch.where(stands, drawn, given))
    return right_BK.sum(dim=1).tolist()


def _num_given(tokens_BS: Tensor) -> int:
    """Tokens that are known from the start in all sequences."""
    return int((tokens_BS != UNKNOWN).all(dim=0).cumprod(dim=0).sum())


def _check(length: int, tokens_BS: Tensor, num_given: int, seeds: Sequence[int]) -> None:
    if tokens_BS.shape[1] != length:
        raise user_error(
            "tokens_BS", tuple(tokens_BS.shape), f"[B, {length}] for this grid", "Give one place to every token."
        )
    if num_given == 0:
        raise user_error(
            "tokens_BS", "an unknown first token", "a known one, from which to go on", "Give a frame to begin with."
        )
    if len(seeds) != len(tokens_BS):
        raise user_error("seeds", f"{len(seeds)} of them", f"{len(tokens_BS)}, one for each video", "Give as many.")
