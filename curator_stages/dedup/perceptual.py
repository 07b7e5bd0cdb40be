"""Perceptual hashes: clips that look the same have nearly the same bits, however they were encoded or scaled."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

FRAMES = 4
BITS = 64 * FRAMES
MOST_APART = 31
"""Largest distance in bits that `close_pairs` finds without loss."""
CROPS = (0.93, 0.87, 0.81, 0.75)
"""Shares of each side of the middles that are hashed; pictures cropped to 75% and more are within 4% of one."""
_SMALL = 32
_QUERIES_AT_ONCE = 128
"""Each may be close to all others."""
_LEAST_CONTRAST = 4.0
"""Standard deviation of grey values in [0, 255]; below, the bits would tell of noise."""


def perceptual_hashes(frames: np.ndarray) -> np.ndarray | None:
    """Hashes four frames of a clip, spread evenly, by the signs of their 64 lowest frequencies; and their middles.

    A copy that was cropped looks like the middle of its original.

    Args:
        frames: uint8 RGB [T, H, W, 3].

    Returns:
        uint8 [5, 32], 64 bits per frame: of whole pictures and of `CROPS`; None where a frame shows next to nothing.

    Source: the pHash of Zauner 2010, "Implementation and Benchmarking of Perceptual Image Hash Functions", section 3.2.
    """
    import cv2

    places = ((np.arange(FRAMES) + 0.5) / FRAMES * len(frames)).astype(int)
    greys = [cv2.cvtColor(frames[place], cv2.COLOR_RGB2GRAY) for place in places]
    whole = _bits(greys)
    if whole is None:
        return None
    middles = (_bits([_middle(grey, share) for grey in greys]) for share in CROPS)
    return np.stack([whole, *(whole if bits is None else bits for bits in middles)])


def _bits(greys: list[np.ndarray]) -> np.ndarray | None:
    import cv2

    hashes = []
    for grey in greys:
        small = cv2.resize(grey, (_SMALL, _SMALL), interpolation=cv2.INTER_AREA).astype(np.float32)
        if small.std() < _LEAST_CONTRAST:
            return None
        # Without the first row and column: brightness and gradients of light, which recolouring changes.
        low = cv2.dct(small)[1:9, 1:9]
        hashes.append(np.packbits(low > np.median(low)))
    return np.concatenate(hashes)


def _middle(picture: np.ndarray, share: float) -> np.ndarray:
    """Crops to a share of each side."""
    height, width = (max(1, round(share * side)) for side in picture.shape)
    top, left = (picture.shape[0] - height) // 2, (picture.shape[1] - width) // 2
    return picture[top : top + height, left : left + width]


def close_pairs(hashes: np.ndarray, most_apart: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Finds all pairs of clips where the whole picture of one and that, or a middle, of the other differ in few bits.

    Of 16 parts of 16 bits, two hashes that differ in at most 31 bits have one part that differs in at most one bit.

    Args:
        hashes: uint8 [N, K, 32], as of `perceptual_hashes`.
        most_apart: Largest distance in bits, at most 31.

    Yields:
        Some pairs at a time, int64 [P] each: the smaller number, the larger one, and a distance in bits. A pair comes
        once for every distance of it that is small enough.
    """
    import faiss

    assert most_apart <= MOST_APART
    index = faiss.IndexBinaryMultiHash(BITS, 16, 16)
    index.nflip = 1
    index.add(np.ascontiguousarray(hashes[:, 0]))
    for start in range(0, len(hashes), _QUERIES_AT_ONCE):
        some = hashes[start : start + _QUERIES_AT_ONCE]
        for kind in range(hashes.shape[1]):
            limits, distances, others = index.range_search(np.ascontiguousarray(some[:, kind]), most_apart + 1)
            ones = np.repeat(np.arange(start, start + len(some)), np.diff(limits).astype(np.int64))
            close = (ones < others if kind == 0 else ones != others) & (distances <= most_apart)
            ones, others = ones[close], others[close]
            yield np.minimum(ones, others), np.maximum(ones, others), distances[close].astype(np.int64)
