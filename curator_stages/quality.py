"""Measures of a picture that need no weights, each under the name of what it is: none of them claims to be taste."""

from __future__ import annotations

import numpy as np

_BLOCK = 8
_DARK, _BRIGHT = 4, 251
"""Luma at and beyond which nothing can be told apart any more, in [0, 255]."""


def sharpness(luma: np.ndarray) -> float:
    """Returns the variance of the Laplacian of uint8 [H, W]: 0 for a plain or wholly blurred picture.

    Source: Pech-Pacheco et al. 2000, "Diatom autofocusing in brightfield microscopy: a comparative study", LAP4.
    """
    import cv2

    return float(cv2.Laplacian(luma, cv2.CV_64F).var())


def contrast(luma: np.ndarray) -> float:
    """Returns the standard deviation of uint8 [H, W] as a share of 255 (root mean square contrast)."""
    return float(luma.std() / 255)


def clipped(luma: np.ndarray) -> float:
    """Returns the share of uint8 [H, W] that is black or white all through: under- or over-exposed."""
    return float(((luma <= _DARK) | (luma >= _BRIGHT)).mean())


def blockiness(luma: np.ndarray) -> float:
    """Returns how much larger steps are at the borders of 8x8 blocks than inside them; 1 where there are no blocks.

    Args:
        luma: uint8 [H, W] at the size it was compressed at, 16 or more pixels a side: scaling moves the borders.

    Source: after Wang, Bovik and Evan 2000, "Blind measurement of blocking artifacts in images".
    """
    grey = luma.astype(np.float32)
    at_borders, inside = [], []
    for steps in (np.abs(np.diff(grey, axis=1)), np.abs(np.diff(grey, axis=0)).T):
        border = np.arange(steps.shape[1]) % _BLOCK == _BLOCK - 1
        at_borders.append(steps[:, border].mean())
        inside.append(steps[:, ~border].mean())
    return float((sum(at_borders) + 1e-3) / (sum(inside) + 1e-3))
