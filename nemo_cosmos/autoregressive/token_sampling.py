"""Drawing a token from logits, so that it depends on its video's seed and on its own place alone.

A token is the one that wins a race: the k-th of the admitted tokens, of probability p_k, arrives after E_k / p_k, with
E_k exponential; the first one is k with probability p_k (the Gumbel-max trick in other words; the published code draws
so too). The E_k of a place come from a counter-based generator keyed by the video's seed and that place: so a video's
tokens do not depend on the batch it is in, on the device, on the parallel layout, nor on the order in which places are
tried, which makes speculation exact (see `decode.py`).

Letters: B = batch, m = places, V = codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from nemo_cosmos.errors import user_error

_FIRST_CANDIDATES = 256
"""Of the likeliest tokens are sorted first; mostly they hold enough probability, and sorting all takes longer than a
small model's whole step."""


@dataclass(frozen=True, kw_only=True)
class TokenSampling:
    """How tokens are drawn; the defaults are those of the published command line."""

    temperature: float = 1.0
    """Divides the logits; 0 takes the likeliest token."""
    top_p: float | None = 0.8
    """Admits the fewest tokens, likeliest first, whose probabilities exceed this, in (0, 1]; None admits all."""
    top_k: int | None = None
    """Admits this many of the likeliest; where `top_p` is given too, that is counted among these."""

    def __post_init__(self) -> None:
        """Refuses what cannot be drawn with.

        Raises:
            UserError: A value is out of its range.
        """
        if not self.temperature >= 0:
            raise user_error("temperature", self.temperature, "0 (greedy) or more", "Choose another, usually 1.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise user_error("top_p", self.top_p, "more than 0 and at most 1, or None", "Choose another, usually 0.8.")
        if self.top_k is not None and self.top_k < 1:
            raise user_error("top_k", self.top_k, "1 or more, or None", "Choose another; None admits all tokens.")


GREEDY = TokenSampling(temperature=0.0, top_p=None)
"""The likeliest token every time."""


class TokenSampler:
    """Draws the tokens of a batch of videos.

    Args:
        sampling: How.
        seeds: Of every video, in [0, 2^64).
        allowed_V: bool; tokens that may be drawn; None for all.
        first_place: Of the videos' first tokens, where they go on from others.
    """

    def __init__(
        self,
        sampling: TokenSampling,
        seeds: Sequence[int],
        *,
        allowed_V: torch.Tensor | None = None,
        first_place: int = 0,
    ) -> None:
        self.sampling = sampling
        self._first_place = first_place
        self._seeds = list(seeds)
        self._forbidden_V = None if allowed_V is None else ~allowed_V
        self._arrivals: list[dict[int, np.ndarray]] = [{} for _ in seeds]

    def draw(self, logits_BmV: torch.Tensor, starts: Sequence[int]) -> torch.Tensor:
        """Draws tokens.

        Args:
            logits_BmV: Of places that follow each other; the same places give the same token whenever they are drawn.
            starts: Each video's first place; what was drawn for earlier ones is not drawn again.

        Returns:
            int64 [B, m].
        """
        if self._forbidden_V is not None:
            logits_BmV = logits_BmV.masked_fill(self._forbidden_V, -torch.inf)
        if self.sampling.temperature == 0:
            return logits_BmV.argmax(dim=-1)
        probabilities = admitted_probabilities(logits_BmV, self.sampling)
        num_places, num_codes = logits_BmV.shape[1:]
        arrivals = [self._arrivals_of(i, start, num_places, num_codes) for i, start in enumerate(starts)]
        arrivals_BmV = torch.from_numpy(np.stack(arrivals)).to(probabilities.device, non_blocking=True)
        return probabilities.div_(arrivals_BmV).argmax(dim=-1)

    def _arrivals_of(self, video: int, start: int, num_places: int, num_codes: int) -> np.ndarray:
        """Exponential variates of a video's places, [m, V]; kept until a later start, as drafts are tried anew."""
        kept = self._arrivals[video]
        for place in [place for place in kept if place < start]:
            del kept[place]
        for place in range(start, start + num_places):
            if place not in kept:
                kept[place] = _arrivals(self._seeds[video], self._first_place + place, num_codes)
        return np.stack([kept[place] for place in range(start, start + num_places)])


def _arrivals(seed: int, place: int, num_codes: int) -> np.ndarray:
    generator = np.random.Generator(np.random.Philox(key=[seed, place]))
    arrivals = generator.standard_exponential(num_codes, dtype=np.float32)
    return np.maximum(arrivals, np.finfo(np.float32).tiny)  # a zero would win even without probability


def admitted_probabilities(logits: torch.Tensor, sampling: TokenSampling) -> torch.Tensor:
    """Returns probabilities of which those of tokens that are not admitted are zero, and the others not scaled up.

    Tokens as likely as the last admitted one are admitted too.

    Args:
        logits: [..., V].
        sampling: Temperature, above 0, and what to admit.

    Returns:
        float32 [..., V].

    Source: Holtzman et al., https://arxiv.org/abs/1904.09751, for `top_p`.
    """
    probabilities = torch.softmax(logits.float() / sampling.temperature, dim=-1)
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        least = probabilities.topk(sampling.top_k, dim=-1).values[..., -1:]
        probabilities = probabilities.masked_fill_(probabilities < least, 0.0)
    if sampling.top_p is not None and sampling.top_p < 1:
        least = _least_of_nucleus(probabilities, sampling.top_p)
        probabilities = probabilities.masked_fill_(probabilities < least, 0.0)
    return probabilities


def _least_of_nucleus(probabilities: torch.Tensor, top_p: float) -> torch.Tensor:
    """The least probability among the likeliest tokens that together exceed `top_p` of the whole, [..., 1]."""
    needed = top_p * probabilities.sum(dim=-1, keepdim=True)
    num_codes = probabilities.shape[-1]
    num_candidates = min(_FIRST_CANDIDATES, num_codes)
    while True:
        candidates = probabilities.topk(num_candidates, dim=-1).values
        before = candidates.cumsum(dim=-1) - candidates
        if num_candidates == num_codes or bool((before[..., -1:] > needed).all()):
            break
        num_candidates = min(16 * num_candidates, num_codes)
    last = (before <= needed).sum(dim=-1, keepdim=True) - 1
    return candidates.gather(-1, last)
