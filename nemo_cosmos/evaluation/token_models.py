"""Token models that are counted and not trained: what an autoregressive WFM must foresee tokens better than.

All are counted on, and asked about, predicted tokens alone: those after the given latent frames.

Letters: T H W = latent frames, rows, columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np

_PAIRS_HELD = 1 << 22
"""Pairs that are gathered before equal ones are counted together."""


class UnigramModel:
    """How often each token occurs, with one added to every count, so that no token is impossible.

    Args:
        tokens: Integers in [0, `vocab_size`), any shape each.
        vocab_size: Number of codes.
    """

    def __init__(self, tokens: Iterable[np.ndarray], *, vocab_size: int) -> None:
        counts = np.ones(vocab_size, dtype=np.int64)
        for some in tokens:
            counts += np.bincount(some.ravel(), minlength=vocab_size)
        self.probabilities = counts / counts.sum()

    def bits(self, tokens: np.ndarray) -> np.ndarray:
        """Minus the logarithm to base 2 of each token's probability, float64 of the same shape."""
        return -np.log2(self.probabilities[tokens])


class BigramModel:
    """How often each token follows one context token, interpolated with a unigram model by absolute discounting.

    P(w | h) = max(c(h, w) - D, 0) / c(h) + D n(h) / c(h) P(w), with n(h) the number of different tokens that followed
    h, and D = n1 / (n1 + 2 n2) by the numbers of pairs that were seen once and twice; after what was never seen it is
    the unigram model.

    Args:
        pairs: Contexts and the tokens that followed them, two arrays of equal shape each.
        unigram: What is interpolated with.

    Source: Ney, Essen and Kneser, On structuring probabilistic dependences in stochastic language modelling, 1994.
    """

    def __init__(self, pairs: Iterable[tuple[np.ndarray, np.ndarray]], *, unigram: UnigramModel) -> None:
        self._unigram, self._vocab_size = unigram, len(unigram.probabilities)
        self._keys, self._counts = self._count(pairs)
        contexts = self._keys // self._vocab_size
        self._context_counts = np.bincount(contexts, weights=self._counts, minlength=self._vocab_size)
        followers = np.bincount(contexts, minlength=self._vocab_size)
        once, twice = (int((self._counts == times).sum()) for times in (1, 2))
        # Counts that are all high need no discount for what was not seen, but it must not become impossible.
        self.discount = once / (once + 2 * twice) if once else 0.5
        self._left = np.divide(
            self.discount * followers, self._context_counts, out=np.ones(self._vocab_size), where=followers > 0
        )

    def bits(self, contexts: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Minus the logarithm to base 2 of each token's probability after its context, float64 of the same shape."""
        keys = contexts.astype(np.int64) * self._vocab_size + tokens
        places = np.searchsorted(self._keys, keys).clip(max=max(len(self._keys) - 1, 0))
        counts = np.where(self._keys[places] == keys, self._counts[places], 0) if len(self._keys) else 0 * keys
        seen = np.maximum(counts - self.discount, 0) / np.maximum(self._context_counts[contexts], 1)
        return -np.log2(seen + self._left[contexts] * self._unigram.probabilities[tokens])

    def _count(self, pairs: Iterable[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
        """Keys, context * vocab_size + token, in order, and how often each occurred."""
        keys, counts = np.empty(0, np.int64), np.empty(0, np.int64)
        held: list[np.ndarray] = []
        for contexts, tokens in pairs:
            held.append((contexts.astype(np.int64) * self._vocab_size + tokens).ravel())
            if sum(map(len, held)) >= _PAIRS_HELD:
                keys, counts = _merged(keys, counts, held)
                held = []
        return _merged(keys, counts, held)


def _merged(keys: np.ndarray, counts: np.ndarray, more: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Counts further keys in."""
    new_keys, new_counts = np.unique(np.concatenate([*more, keys[:0]]), return_counts=True)
    all_keys, places = np.unique(np.concatenate([keys, new_keys]), return_inverse=True)
    summed = np.bincount(places, weights=np.concatenate([counts, new_counts]), minlength=len(all_keys))
    return all_keys, summed.astype(np.int64)


UNIGRAM, BIGRAM, PREVIOUS_FRAME = "unigram", "bigram", "bigram of the frame before"
"""Names of the models: of a token alone, after the token before it in raster order, and after the one at the same row
and column of the latent frame before."""


def count_token_models(
    videos: Callable[[], Iterable[np.ndarray]], *, vocab_size: int, num_given: int = 1
) -> Mapping[str, Callable[[np.ndarray], np.ndarray]]:
    """Counts the three models.

    Args:
        videos: Goes through the training videos' tokens, integers [T, H, W], anew at each call.
        vocab_size: Number of codes.
        num_given: Latent frames at the start of a video that are given, and not predicted.

    Returns:
        By name a function from a video's tokens [T, H, W] to the bits of the predicted ones, float64
        [T - num_given, H, W].
    """
    unigram = UnigramModel((video[num_given:] for video in videos()), vocab_size=vocab_size)
    raster = BigramModel((_raster(video, num_given) for video in videos()), unigram=unigram)
    before = BigramModel((_frame_before(video, num_given) for video in videos()), unigram=unigram)
    return {
        UNIGRAM: lambda video: unigram.bits(video[num_given:]),
        BIGRAM: lambda video: raster.bits(*_raster(video, num_given)),
        PREVIOUS_FRAME: lambda video: before.bits(*_frame_before(video, num_given)),
    }


def _raster(video: np.ndarray, num_given: int) -> tuple[np.ndarray, np.ndarray]:
    tokens, first = video.ravel(), num_given * video[0].size
    return tokens[first - 1 : -1].reshape(video[num_given:].shape), video[num_given:]


def _frame_before(video: np.ndarray, num_given: int) -> tuple[np.ndarray, np.ndarray]:
    return video[num_given - 1 : -1], video[num_given:]
