"""Sharing a video among context-parallel ranks, by frames or by rows of the picture.

**Time.** The first rank has 1 + k c_t frames and the rule for the first frame, each other one k' c_t: ranks continue
each other as chunks of a stream do, only that the frames before come from the previous rank's present and not from
memory (`PreviousRanks`). Temporal attention gathers the keys and values of all ranks.

**Height.** Every rank has some rows of all frames. Convolutions take one row from each neighbour, strided ones from
below alone, and norms and spatial attention see the rows of all ranks.

In both ways all weights are on every rank, whose gradients are parts of the sum.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch import Tensor, nn

from nemo_cosmos.errors import user_error
from nemo_cosmos.parallel.group_norm import SplitGroupNorm
from nemo_cosmos.parallel.halo import exchange_halo
from nemo_cosmos.parallel.pieces import (
    ProcessGroup,
    gather,
    gather_result,
    own_piece,
    piece_sizes,
    sizes_of_ranks,
)
from nemo_cosmos.tokenizer.causal_cache import WHOLE_VIDEO, Past, repeat_first_frame
from nemo_cosmos.tokenizer.config import TokenizerConfig
from nemo_cosmos.tokenizer.image_layers import ImageAttention
from nemo_cosmos.tokenizer.layers import CausalConv3d, SpatialAttention
from nemo_cosmos.tokenizer.model import Tokenizer
from nemo_cosmos.tokenizer.tensor_parallel import change_input, change_output, convolutions, replace_norms

Axis = Literal["height", "time"]

_REACH = 2
"""Frames that the convolutions over time reach back."""


@dataclass(frozen=True, kw_only=True)
class Sharing:
    """How ranks share a video or an image."""

    config: TokenizerConfig
    """The tokenizer's architecture."""
    axis: Axis
    """What is divided. Images have no time."""
    group: ProcessGroup
    """The context-parallel ranks."""

    def own(self, picture: Tensor) -> Tensor:
        """Returns this rank's piece of a whole [B, C, (T,) H, W].

        Raises:
            UserError: There are too few frames or rows for so many ranks.
        """
        return own_piece(picture, self._dim, self.group, self._pixels(self.latent_sizes(tuple(picture.shape))))

    def join(self, piece: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Joins the pieces of all ranks to a picture of that shape, for all ranks to do the same with it."""
        if self.group.size() == 1:
            return piece
        return gather_result(piece, self._dim, self.group, self._pixels(self.latent_sizes(shape)))

    def past(self, shape: tuple[int, ...]) -> Past:
        """Returns what the layers of an encoder or decoder see before this rank's piece of a video of that shape."""
        if self.group.size() == 1 or self.axis == "height":
            return WHOLE_VIDEO
        return PreviousRanks(self.group, self.latent_sizes(shape))

    def latent_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the grid of this rank's piece of the latent: (frames,) rows and columns."""
        sides = shape[2:]
        grid = list(self.config.latent_shape(*sides)[-len(sides) :])
        grid[0 if self.axis == "time" else -2] = self.latent_sizes(shape)[self.group.rank()]
        return tuple(grid)

    def latent_sizes(self, shape: tuple[int, ...]) -> list[int]:
        """Returns every rank's number of latent frames or rows of a picture of shape [B, C, (T,) H, W].

        Raises:
            UserError: There are too few for so many ranks.
        """
        check_shareable(self.config, self.axis, self.group.size(), shape)
        return piece_sizes(-(-shape[self._dim] // self._step), self.group.size())

    def _pixels(self, latent_sizes: list[int]) -> list[int]:
        sizes = [size * self._step for size in latent_sizes]
        if self.axis == "time":
            sizes[0] -= self._step - 1
        return sizes

    @property
    def _dim(self) -> int:
        return _dim_of(self.axis)

    @property
    def _step(self) -> int:
        return _step_of(self.axis, self.config)


def check_shareable(config: TokenizerConfig, axis: Axis, ranks: int, shape: tuple[int, ...]) -> None:
    """Refuses a picture that is too small for context-parallel ranks to share.

    Args:
        config: The tokenizer's architecture.
        axis: What is divided.
        ranks: How many share.
        shape: The picture's [B, C, (T,) H, W].

    Raises:
        UserError: There are too few frames or rows, with the number of ranks that would do.
    """
    step, length = _step_of(axis, config), shape[_dim_of(axis)]
    total = -(-length // step)
    # A rank hands frames to the next one, of its coarsest level too; the last one has none to hand on.
    needed = ranks if axis == "height" else _REACH * (ranks - 1) + 1
    if total >= needed or ranks == 1:
        return
    most = total if axis == "height" else (total - 1) // _REACH + 1
    first = "1 + " if axis == "time" else ""
    least = f"{first}{needed - (axis == 'time')} x {step}"
    raise user_error(
        f"{axis} of the picture",
        length,
        f"at least {least} to be shared among {ranks} context-parallel ranks",
        f"Use {max(1, most)} of them, or divide along the other axis (context_parallel_axis).",
    )


def _dim_of(axis: Axis) -> int:
    return 2 if axis == "time" else -2


def _step_of(axis: Axis, config: TokenizerConfig) -> int:
    return config.temporal_compression if axis == "time" else config.spatial_compression


class PreviousRanks:
    """Past of this rank's frames, which the ranks before it have.

    Args:
        group: The ranks that share a video along time.
        latent_sizes: Latent frames of each.
    """

    max_attended_frames = None

    def __init__(self, group: ProcessGroup, latent_sizes: list[int]) -> None:
        self.at_start = group.rank() == 0
        self._group, self._latent_sizes = group, latent_sizes

    def before(self, layer: nn.Module, x_BCTHW: Tensor, num_frames: int) -> Tensor:
        """See `Past`. The backward pass takes the gradient to the rank that owns the frames."""
        extended_BCTHW = exchange_halo(x_BCTHW, 2, self._group, before=num_frames)
        # The first rank has sent, hence takes part in the backward pass, but has got zeros.
        return repeat_first_frame(extended_BCTHW[:, :, num_frames:], num_frames) if self.at_start else extended_BCTHW

    def keys_before(self, layer: nn.Module, k_BCTHW: Tensor, v_BCTHW: Tensor) -> tuple[Tensor, Tensor]:
        """See `Past`."""
        stop = sum(self._latent_sizes[: self._group.rank() + 1])
        k_BCTHW, v_BCTHW = (gather(x, 2, self._group, self._latent_sizes) for x in (k_BCTHW, v_BCTHW))
        return k_BCTHW[:, :, :stop], v_BCTHW[:, :, :stop]

    def end_chunk(self) -> None:
        """See `Past`; ranks have one chunk each."""


def split_rows(tokenizer: Tokenizer, group: ProcessGroup) -> None:
    """Lets a tokenizer code some rows of a picture, of which other ranks have the others; in place.

    Args:
        tokenizer: Whole. Channels are divided afterwards, as rows should be exchanged before channels are gathered.
        group: The ranks that share a picture, in the order of their rows.
    """
    if group.size() == 1:
        return
    for network in (tokenizer.encoder, tokenizer.decoder):
        for conv in convolutions(network):
            name = "space_padding" if isinstance(conv, CausalConv3d) else "padding"
            above, aside = getattr(conv, name)
            if above:
                setattr(conv, name, (0, aside))
                change_input(conv, partial(exchange_halo, dim=-2, group=group, before=above, after=above))
        for module in network.modules():
            if isinstance(module, nn.ZeroPad2d):
                left, right, above, below = module.padding
                module.padding = (left, right, 0, 0)
                change_input(module, partial(exchange_halo, dim=-2, group=group, before=above, after=below))
            elif isinstance(module, SpatialAttention | ImageAttention):
                for conv in (module.k, module.v):
                    change_output(conv, partial(_gather_rows, group=group))
        replace_norms(network, partial(SplitGroupNorm.of, group=group))


def _gather_rows(x: Tensor, group: ProcessGroup) -> Tensor:
    return gather(x, -2, group, sizes_of_ranks(x.shape[-2], group, x.device))
