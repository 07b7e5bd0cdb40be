"""Sizes and lengths by which clips are put together, so that a batch can be of clips of one shape."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from nemo_cosmos.contracts import ClipRecord

ASPECT_RATIOS = ((16, 9), (4, 3), (1, 1), (3, 4), (9, 16))
"""Width and height of the usual shapes, those of the technical report's shards."""


class Bucket(NamedTuple):
    """What clips of one folder have in common."""

    resolution: str
    """The shorter side in pixels."""
    aspect_ratio: str
    """Width and height of the nearest usual one, such as `16_9`."""
    frames: str
    """Least and most frames, between powers of two, such as `17_32`."""

    @property
    def folder(self) -> str:
        """For example `resolution_256/aspect_ratio_1_1/frames_17_32`."""
        return f"resolution_{self.resolution}/aspect_ratio_{self.aspect_ratio}/frames_{self.frames}"


def bucket_of(record: ClipRecord) -> Bucket:
    """Returns where a clip belongs by its stored size and length."""
    wide, high = _nearest(record.height, record.width, ASPECT_RATIOS)
    upper = 1 << (record.num_frames - 1).bit_length()
    return Bucket(str(min(record.height, record.width)), f"{wide}_{high}", f"{upper // 2 + 1}_{upper}")


def stored_size(height: int, width: int, sizes: Sequence[Sequence[int]]) -> tuple[int, int]:
    """Chooses the size that a source is stored at.

    Of `sizes` those count that are of the usual aspect ratio nearest to the source's; of these it is the largest that
    the source fills without being enlarged, or the smallest where it fills none.

    Args:
        height: The source's, in pixels, upright.
        width: The source's.
        sizes: Height and width each, one or more.

    Returns:
        Height and width.
    """
    ratio_of = {(tall, broad): _nearest(tall, broad, ASPECT_RATIOS) for tall, broad in sizes}
    ratio = _nearest(height, width, tuple(ratio_of.values()))
    fitting = sorted((size for size in ratio_of if ratio_of[size] == ratio), key=math.prod)
    return max((size for size in fitting if size[0] <= height and size[1] <= width), key=math.prod, default=fitting[0])


def _nearest(height: int, width: int, ratios: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Returns the ratio (width, height) that is nearest by factor."""
    shape = math.log(width / height)
    return min(ratios, key=lambda ratio: abs(shape - math.log(ratio[0] / ratio[1])))
