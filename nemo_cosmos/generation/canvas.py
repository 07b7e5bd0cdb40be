"""The picture that is generated: the size asked for, grown to whole tokens, and cut back at the end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np

from nemo_cosmos.errors import user_error


@dataclass(frozen=True, kw_only=True)
class Canvas:
    """Where a video of any size is generated. The rows and columns beyond it are pictures too, and are not shown."""

    height: int
    """Asked for, pixels."""
    width: int
    padded_height: int
    """Generated, pixels."""
    padded_width: int

    @classmethod
    def covering(cls, height: int, width: int, *, token: int) -> Self:
        """Finds the smallest canvas of whole tokens.

        Args:
            height: Pixels.
            width: Pixels.
            token: Pixels along each side of a token.

        Raises:
            UserError: There is no pixel.
        """
        if min(height, width) < 1:
            raise user_error("height, width", (height, width), "positive numbers of pixels", "Correct them.")
        padded_height, padded_width = (-(-side // token) * token for side in (height, width))
        return cls(height=height, width=width, padded_height=padded_height, padded_width=padded_width)

    def pad(self, frames: np.ndarray) -> np.ndarray:
        """Continues pictures by their mirror image, as the reference pads its training videos.

        Args:
            frames: uint8 [T, height, width, 3].

        Returns:
            uint8 [T, padded_height, padded_width, 3].
        """
        below, right = self.padded_height - self.height, self.padded_width - self.width
        if not below and not right:
            return frames
        return np.pad(frames, ((0, 0), (0, below), (0, right), (0, 0)), mode="reflect")

    def crop(self, frames: np.ndarray) -> np.ndarray:
        """Cuts [T, padded_height, padded_width, 3] to [T, height, width, 3]."""
        return frames[:, : self.height, : self.width]
