"""Perceptual hashes: clips that look the same have nearly the same bits, however they were encoded or scaled."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

FRAMES = 4
BITS = 64 * FRAMES
MOST_APART = 31
"""Largest distance in bits that `close_pairs` finds without loss."""
_SMALL = 32
_QUERIES_AT_ONCE = 128
"""Each may be close to all others."""
_LEAST_CONTRAST = 4.0
"""Standard deviation of grey values in [0, 255]; below, the bits would tell of noise."""


def perceptual_hash(frames: np.ndarray) -> np.ndarray | None:
    """Hashes four frames of a clip, spread evenly, by the signs of their 64 lowest frequencies.

    Args:
        frames: uint8 RGB [T, H, W, 3].

    Returns:
        uint8 [32], 64 bits per frame; None where a frame shows next to nothing.

    Source: the pHash of Zauner 2010, "Implementation and Benchmarking of Perceptual Image Hash Functions", section 3.2.
    """
    import cv2

    hashes = []
    for share in (np.arange(FRAMES) + 0.5) / FRAMES:
        grey = cv2.cvtColor(frames[int(share * len(frames))], cv2.COLOR_RGB2GRAY)
        small = cv2.resize(grey, (_SMALL, _SMALL), interpolation=cv2.INTER_AREA).astype(np.float32)
        if small.std() < _LEAST_CONTRAST:
            return None
        # Without the first row and column: brightness and gradients of light, which recolouring changes.
        low = cv2.dct(small)[1:9, 1:9]
        hashes.append(np.packbits(low > np.median(low)))
    return np.concatenate(hashes)


def close_pairs(hashes: np.ndarray, most_apart: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Finds all pairs of hashes that differ in few bits.

    Of 16 parts of 16 bits, two hashes that differ in at most 31 bits have one part that differs in at most one bit.

    Args:
        hashes: uint8 [N, 32].
        most_apart: Largest distance in bits, at most 31.

    Yields:
        Some pairs at a time, int64 [P] each: the smaller number, the larger one, and their distance in bits.
    """
    import faiss

    assert most_apart <= MOST_APART
    index = faiss.IndexBinaryMultiHash(BITS, 16, 16)
    index.nflip = 1
    index.add(hashes)
    for start in range(0, len(hashes), _QUERIES_AT_ONCE):
        limits, distances, others = index.range_search(hashes[start : start + _QUERIES_AT_ONCE], most_apart + 1)
        ones = np.repeat(np.arange(start, start + len(limits) - 1), np.diff(limits).astype(np.int64))
        close = (ones < others) & (distances <= most_apart)
        yield ones[close], others[close], distances[close].astype(np.int64)
