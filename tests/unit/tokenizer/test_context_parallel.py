"""How ranks share a picture; what they then compute is tested with real processes in tests/distributed."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from nemo_cosmos.errors import UserError
from nemo_cosmos.tokenizer.config import TokenizerConfig
from nemo_cosmos.tokenizer.context_parallel import Axis, Sharing

CONFIG = TokenizerConfig()  # 8 x 8 x 8


@dataclass
class Ranks:
    """A process group as far as cutting needs it."""

    num: int
    own: int

    def size(self) -> int:
        return self.num

    def rank(self) -> int:
        return self.own


def sharing(axis: Axis, num_ranks: int, rank: int = 0) -> Sharing:
    return Sharing(config=CONFIG, axis=axis, group=Ranks(num_ranks, rank))


@pytest.mark.parametrize(
    ("axis", "frames", "height", "sizes"),
    [
        ("time", 33, 8, [17, 16]),
        ("time", 33, 8, [9, 16, 8]),  # the last rank hands nothing on
        ("height", 1, 40, [24, 16]),
        ("height", 1, 24, [8, 8, 8]),
        ("time", 9, 8, [9]),
    ],
)
def test_pieces_are_the_video_and_chunks_that_continue_each_other(
    axis: Axis, frames: int, height: int, sizes: list[int]
) -> None:
    video = torch.arange(float(3 * frames * height * 8)).view(1, 3, frames, height, 8)
    shares = [sharing(axis, len(sizes), rank) for rank in range(len(sizes))]
    pieces = [share.own(video) for share in shares]
    dim = 2 if axis == "time" else 3
    assert [piece.shape[dim] for piece in pieces] == sizes
    assert torch.equal(torch.cat(pieces, dim), video)
    latents = [share.latent_shape(video.shape) for share in shares]
    assert [sum(x) for x in zip(*latents, strict=True)][dim - 2] == CONFIG.latent_shape(frames, height, 8)[dim - 1]


@pytest.mark.parametrize(
    ("axis", "num_ranks", "shape", "message"),
    [
        ("time", 2, (1, 3, 9, 64, 64), r"time of the picture: got 9, expected at least 1 \+ 2 x 8 .*Use 1 of them"),
        ("time", 4, (1, 3, 41, 64, 64), r"got 41, expected at least 1 \+ 6 x 8 .*Use 3 of them"),
        ("time", 2, (1, 3, 1, 64, 64), "Use 1 of them, or divide along the other axis"),
        ("height", 4, (1, 3, 9, 24, 64), r"height of the picture: got 24, expected at least 4 x 8 .*Use 3 of them"),
    ],
)
def test_too_small_a_picture_is_refused(axis: Axis, num_ranks: int, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        sharing(axis, num_ranks).own(torch.zeros(shape))
