"""The tokenizers' convolutions from fewer multiplications, for inference on CPUs.

There the networks are bound by multiplications, almost all of them in 3x3 convolutions over space and convolutions of
3 frames over time. Both are written as matrix products over channels of sums of inputs, which share products among
neighbouring outputs. Results differ from the direct sums by rounding alone. Weights are transformed anew in every call:
kept, they would take several times the memory of the model. Of the rest some pixels are there at once, and a result may
take its input's memory.

In bf16, where differences of inputs would be rounded, weights of equal inputs are summed and nothing else is changed.

Shape letters: N frames, C channels in, O channels out, H height, W width, Y X rows and columns of tiles, S pixels,
K entries of a kernel, P products.

Source: Lavin and Gray, Fast Algorithms for Convolutional Neural Networks, arXiv 1509.09308.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from nemo_cosmos.tokenizer import pages

Prologue = Callable[[Tensor], Tensor]
"""Takes and gives frames [N, C, H, W], each alone."""

_TILE = 4
"""Edge of the square of outputs that are computed together, from (_TILE + 2)^2 products instead of 9 _TILE^2."""
_MIN_CHANNELS = 64
"""With fewer, the transforms cost more than the multiplications that they save."""
_MIN_PIXELS = 512
"""With fewer, of all frames, transforming the weights costs more."""
_TILES_AT_ONCE = 64
"""Tiles in memory together: rows enough for a matrix product, and few enough for the cache."""
_PIXELS_AT_ONCE = 512
"""Pixels that a convolution over time works on together, for the same reasons."""


def applies(x: Tensor) -> bool:
    """Whether a layer may sum in another order and overwrite what it made itself.

    That is on a CPU, without gradients, and not while a program is recorded, which must hold for every size.

    Args:
        x: The layer's input.
    """
    return (
        x.device.type == "cpu"
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.jit.is_tracing()
        and not torch.compiler.is_compiling()
    )


def pays(x: Tensor, weight: Tensor) -> bool:
    """Whether a layer may use the convolutions here and gains by it, having channels and pixels enough.

    Args:
        x: The layer's input [B, C, ...].
        weight: The kernel [O, C, ...].
    """
    # Asked first, for sizes are not to be looked at while a program is recorded.
    if not applies(x):
        return False
    return min(weight.shape[:2]) >= _MIN_CHANNELS and x.numel() >= _MIN_PIXELS * x.shape[1]


def linear(x: Tensor, weight_OC: Tensor, bias: Tensor | None) -> Tensor:
    """As `F.linear`, with the result in pages of its own."""
    y = pages.empty(x, *x.shape[:-1], len(weight_OC))
    _product(x.flatten(0, -2), weight_OC.T, bias, y.flatten(0, -2))
    return y


def conv2d(
    x_NCHW: Tensor,
    weight_OCHW: Tensor,
    bias: Tensor | None,
    padding: tuple[int, int],
    *,
    prologue: Prologue | None = None,
    overwrite: bool = False,
) -> Tensor:
    """As `F.conv2d` with a 3x3 kernel and stride 1, by Winograd's minimal filtering of 4x4 outputs at a time.

    Args:
        x_NCHW: Float32 in channels-last memory.
        weight_OCHW: Float32 [O, C, 3, 3].
        bias: Float32 [O], or None.
        padding: Zeros above and below, and at both sides.
        prologue: Applied first, to a few frames at a time.
        overwrite: The result may take the memory of the input, which it does if it has its shape.

    Returns:
        [N, O, H + 2 padding[0] - 2, W + 2 padding[1] - 2] in channels-last memory.

    Source: arXiv 1509.09308 section 4.3, F(4x4, 3x3).
    """
    x_NHWC = x_NCHW.permute(0, 2, 3, 1)
    num_frames, in_height, in_width, channels = x_NHWC.shape
    above, aside = padding
    height, width = in_height + 2 * above - 2, in_width + 2 * aside - 2
    rows, columns = -(-height // _TILE), -(-width // _TILE)
    y_shape = (num_frames, rows * _TILE, columns * _TILE, len(weight_OCHW))
    y_NHWC = x_NHWC if overwrite and x_NHWC.shape == y_shape else pages.empty(x_NHWC, *y_shape)
    frames_at_once = min(num_frames, max(1, _TILES_AT_ONCE // (rows * columns)))
    rows_at_once = min(rows, max(1, _TILES_AT_ONCE // columns))
    padded_shape = (frames_at_once, rows * _TILE + 2, columns * _TILE + 2, channels)
    most_products = (_TILE + 2) ** 2 * frames_at_once * rows_at_once * columns * max(weight_OCHW.shape[:2])
    sizes = ((_TILE + 2) ** 2 * weight_OCHW[..., 0, 0].numel(), math.prod(padded_shape), most_products, most_products)
    mixed, padded, *workspace = pages.empty(x_NHWC, sum(sizes)).split(sizes)
    weight_PCO = _mixed_kernel(weight_OCHW, x_NHWC.new_tensor(_KERNEL_MIX), mixed).transpose(1, 2)
    padded_NHWC = padded.view(padded_shape).zero_()
    for x_part, y_part in zip(x_NCHW.split(frames_at_once), y_NHWC.split(frames_at_once), strict=True):
        part_NCHW = x_part if prologue is None else prologue(x_part)
        part_NHWC = padded_NHWC[: len(x_part)]
        part_NHWC[:, above : above + in_height, aside : aside + in_width] = part_NCHW.permute(0, 2, 3, 1)
        del part_NCHW
        for row in range(0, rows, rows_at_once):
            start, stop = row * _TILE, min(row + rows_at_once, rows) * _TILE
            _convolve_tiles(part_NHWC[:, start : stop + 2], weight_PCO, y_part[:, start:stop], workspace)
        if bias is not None:
            y_part += bias
    return y_NHWC[:, :height, :width].contiguous().permute(0, 3, 1, 2)


_R = 2**0.5
_KERNEL_MIX = (
    (1, 0, 0),
    (-_R / 3, -1 / 3, -_R / 6),
    (-_R / 3, 1 / 3, -_R / 6),
    (1 / 3, _R / 3, 2 / 3),
    (1 / 3, -_R / 3, 2 / 3),
    (0, 0, 1),
)
"""What the six products along an axis take of a kernel's three entries.

They interpolate at 0, +-sqrt(1/2), +-sqrt(2) and infinity, by which results are as exact as oneDNN's direct sums; with
the usual 0, +-1, +-2 errors are more than twice as large. The products are scaled so that no sum below needs a
multiplication more.
"""


def _mixed_kernel(weight_OCHW: Tensor, mix_PK: Tensor, memory: Tensor | None = None) -> Tensor:
    """Applies a matrix to both axes of a kernel: [O, C, K, K] -> [P^2, O, C], the products along W slowest."""
    mix_PPKK = mix_PK[:, None, None, :] * mix_PK[None, :, :, None]  # K along H, then along W, as the entries stand
    mix_PK, entries_MK = mix_PPKK.flatten(2).flatten(0, 1), weight_OCHW.flatten(0, 1).flatten(1)
    out = None if memory is None else memory.view(len(mix_PK), len(entries_MK))
    return torch.mm(mix_PK, entries_MK.T, out=out).unflatten(1, weight_OCHW.shape[:2])


def _convolve_tiles(x_NHWC: Tensor, weight_PCO: Tensor, y_NHWO: Tensor, workspace: Sequence[Tensor]) -> None:
    """Writes the outputs [N, 4 Y, 4 X, O] over [N, 4 Y + 2, 4 X + 2, C].

    Every result in between is made in the memory of the last but one, in the two parts of the workspace in turn.
    """
    num_frames, height, width, channels = x_NHWC.shape
    rows, columns, edge = height // _TILE, width // _TILE, _TILE + 2

    half_PNYWC = _shaped(workspace[0], edge, num_frames, rows, width, channels)
    _mix_inputs([x_NHWC[:, i::_TILE][:, :rows] for i in range(edge)], half_PNYWC)
    tiles_PPNYXC = _shaped(workspace[1], edge, edge, num_frames, rows, columns, channels)
    _mix_inputs([half_PNYWC[:, :, :, i::_TILE][:, :, :, :columns] for i in range(edge)], tiles_PPNYXC)

    tiles_PSC = tiles_PPNYXC.view(edge**2, -1, channels)
    products_PSO = _shaped(workspace[0], *tiles_PSC.shape[:2], weight_PCO.shape[2])
    torch.bmm(tiles_PSC, weight_PCO, out=products_PSO)

    half_JPNYXO = _shaped(workspace[1], _TILE, edge, num_frames, rows, columns, weight_PCO.shape[2])
    _mix_products(products_PSO.view(edge, *half_JPNYXO.shape[1:]), half_JPNYXO)
    y_NYIXJO = y_NHWO.unflatten(2, (-1, _TILE)).unflatten(1, (-1, _TILE))
    _mix_products(half_JPNYXO.unbind(1), y_NYIXJO.permute(2, 4, 0, 1, 3, 5))


def _shaped(memory: Tensor, *shape: int) -> Tensor:
    return memory[: math.prod(shape)].view(shape)


def _mix_inputs(x: Sequence[Tensor], out: Tensor) -> None:
    """Writes what the six products along an axis take of the six inputs there."""
    even, odd = out[0], out[5]  # until they get their own results
    torch.sub(x[4], x[2], alpha=2, out=even)
    torch.sub(x[3], x[1], alpha=2, out=odd)
    torch.add(even, odd, alpha=_R / 2, out=out[1])
    torch.sub(even, odd, alpha=_R / 2, out=out[2])
    torch.sub(x[4], x[2], alpha=0.5, out=even)
    torch.sub(x[3], x[1], alpha=0.5, out=odd)
    torch.add(even, odd, alpha=_R, out=out[3])
    torch.sub(even, odd, alpha=_R, out=out[4])
    torch.add(x[0], x[4], out=out[0]).sub_(x[2], alpha=2.5)
    torch.add(x[1], x[5], out=out[5]).sub_(x[3], alpha=2.5)


def _mix_products(m: Sequence[Tensor], out: Tensor) -> None:
    """Sums the six products along an axis to the four outputs there."""
    near, far = m[1] + m[2], m[3] + m[4]
    torch.add(m[0], near, alpha=_R, out=out[0]).add_(far, alpha=0.5)
    torch.add(far, near, alpha=_R / 2, out=out[2])
    torch.sub(m[1], m[2], out=near)
    torch.sub(m[3], m[4], out=far)
    torch.add(near, far, alpha=_R / 2, out=out[1])
    torch.add(m[5], near, alpha=0.5, out=out[3]).add_(far, alpha=_R)


def conv2d_of_doubled(x_NCHW: Tensor, weight_OCHW: Tensor, bias: Tensor | None) -> Tensor:
    """As `F.conv2d` with a 3x3 kernel and one zero around, of pictures whose pixels are repeated along both axes.

    Along an axis with a kernel (f, g, h) the outputs over pixel i are (f + g + h) x_i + f (x_{i-1} - x_i) and
    (f + g + h) x_i + h (x_{i+1} - x_i): three products for two outputs, nine instead of 36 on both axes.

    Args:
        x_NCHW: Float, before the repetition, in channels-last memory.
        weight_OCHW: [O, C, 3, 3].
        bias: [O], or None.

    Returns:
        [N, O, 2 H, 2 W] in channels-last memory.
    """
    if x_NCHW.dtype != torch.float32:
        return _phases_of_doubled(x_NCHW, weight_OCHW, bias)
    num_frames, channels, height, width = x_NCHW.shape
    y_NHWO = pages.empty(x_NCHW, num_frames, 2 * height, 2 * width, len(weight_OCHW))
    mix_PK = x_NCHW.new_tensor(((1, 0, 0), (1, 1, 1), (0, 0, 1)))
    weight_PPCO = _mixed_kernel(weight_OCHW, mix_PK).transpose(1, 2).unflatten(0, (3, 3))
    padded_HWC = x_NCHW.new_zeros(height + 2, width + 2, channels)
    for x_HWC, y_HWO in zip(x_NCHW.permute(0, 2, 3, 1), y_NHWO, strict=True):
        padded_HWC[1:-1, 1:-1] = x_HWC
        middle_HWC = padded_HWC[:, 1:-1].contiguous()
        left = _doubled_rows(padded_HWC[:, :-2] - middle_HWC, weight_PPCO[0], None)
        middle = _doubled_rows(middle_HWC, weight_PPCO[1], bias)
        right = _doubled_rows(padded_HWC[:, 2:] - middle_HWC, weight_PPCO[2], None)
        for row in range(2):
            torch.add(middle[row], left[row], out=y_HWO[row::2, ::2])
            torch.add(middle[row], right[row], out=y_HWO[row::2, 1::2])
    return y_NHWO.permute(0, 3, 1, 2)


def _phases_of_doubled(x_NCHW: Tensor, weight_OCHW: Tensor, bias: Tensor | None) -> Tensor:
    """As `conv2d_of_doubled`, by a 2x2 convolution for each output over a pixel: 16 products in place of 36."""
    num_frames, _, height, width = x_NCHW.shape
    # Over pixel i the upper or left output sees pixels i - 1, i, i and the other one i, i, i + 1.
    mixes = [torch.tensor(mix) for mix in (((1.0, 0, 0), (0, 1, 1)), ((1.0, 1, 0), (0, 0, 1)))]
    padded_NCHW = F.pad(x_NCHW, (1, 1, 1, 1))
    y_NHWO = x_NCHW.new_empty(num_frames, 2 * height, 2 * width, len(weight_OCHW))
    for row, mix_h in enumerate(mixes):
        for column, mix_w in enumerate(mixes):
            kernel = (mix_h @ weight_OCHW.float() @ mix_w.T).to(x_NCHW.dtype)
            seen_NCHW = padded_NCHW[:, :, row : row + height + 1, column : column + width + 1]
            y_NHWO[:, row::2, column::2] = F.conv2d(seen_NCHW, kernel, bias).permute(0, 2, 3, 1)
    return y_NHWO.permute(0, 3, 1, 2)


def _doubled_rows(x_HWC: Tensor, weight_PCO: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns the even and the odd rows [H, W, O] over [H + 2, W, C], of which the first and the last row are zeros."""
    middle_HWC = x_HWC[1:-1]
    both_SO = _product(middle_HWC.flatten(0, 1), weight_PCO[1], bias)
    even_SO = torch.addmm(both_SO, (x_HWC[:-2] - middle_HWC).flatten(0, 1), weight_PCO[0])
    odd_SO = _add_product(both_SO, (x_HWC[2:] - middle_HWC).flatten(0, 1), weight_PCO[2])
    return even_SO.view(*middle_HWC.shape[:2], -1), odd_SO.view(*middle_HWC.shape[:2], -1)


def _product(x_SC: Tensor, weight_CO: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    return torch.mm(x_SC, weight_CO, out=out) if bias is None else torch.addmm(bias, x_SC, weight_CO, out=out)


def _add_product(y_SO: Tensor, x_SC: Tensor, weight_CO: Tensor) -> Tensor:
    return torch.addmm(y_SO, x_SC, weight_CO, out=y_SO)


def conv_over_time(
    frames: Sequence[Tensor],
    weight_OCK: Tensor,
    bias: Tensor | None,
    *,
    stride: int,
    num_equal: int,
    out: Tensor | None = None,
) -> Tensor:
    """A convolution of three frames over time.

    Equal frames at the start are multiplied once with the sum of their weights. Of other outputs with stride 1 two at a
    time come from four products, not six (Winograd's F(2, 3), in float32).

    Args:
        frames: At least three [B, C, H, W] in channels-last memory.
        weight_OCK: [O, C, 3].
        bias: [O], or None.
        stride: Frames from one output to the next.
        num_equal: So many of the first frames are one and the same, at least 1.
        out: [B, O, T, H, W] in channels-last memory that the result may take; with stride 1 it may be that of the last
            T frames.

    Returns:
        [B, O, T, H, W] in channels-last memory, with T = 1 + (frames - 3) / stride rounded down.
    """
    if frames[0].dtype != torch.float32:
        return _direct_over_time(frames, weight_OCK, bias, stride=stride, num_equal=num_equal)
    batch_size, _, height, width = frames[0].shape
    num_outputs = (len(frames) - 3) // stride + 1
    if out is None:
        y_BTSO = pages.empty(frames[0], batch_size, num_outputs, height * width, len(weight_OCK))
    else:
        y_BTSO = out.permute(0, 2, 3, 4, 1).flatten(2, 3)
    kernel = _TimeKernel(weight_OCK, bias)
    for sample, y_TSO in enumerate(y_BTSO):
        rows = [frame[sample].permute(1, 2, 0).flatten(0, 1) for frame in frames]
        for start in range(0, height * width, _PIXELS_AT_ONCE):
            block = slice(start, start + _PIXELS_AT_ONCE)
            kernel.write([row_SC[block] for row_SC in rows], y_TSO[:, block].unbind(), stride, num_equal)
    return y_BTSO.unflatten(2, (height, width)).permute(0, 4, 1, 2, 3)


def _direct_over_time(
    frames: Sequence[Tensor], weight_OCK: Tensor, bias: Tensor | None, *, stride: int, num_equal: int
) -> Tensor:
    """As `conv_over_time`, with every output rounded once."""

    def convolve(seen: Sequence[Tensor], kernel_OCK: Tensor) -> Tensor:
        y_BOTS = F.conv2d(torch.stack(seen, 2).flatten(3), kernel_OCK.unsqueeze(3), bias, stride=(stride, 1))
        return y_BOTS.unflatten(3, frames[0].shape[2:])

    outputs, first = [], 0
    while num_equal - first > 1 and first + 3 <= len(frames):
        equal = min(num_equal - first, 3)
        of_equal = weight_OCK[:, :, :equal].sum(2, keepdim=True, dtype=torch.float32).to(weight_OCK.dtype)
        kernel_OCK = torch.cat([of_equal, weight_OCK[:, :, equal:]], 2)
        outputs.append(convolve(frames[first + equal - 1 : first + 3], kernel_OCK))
        first += stride
    if first + 3 <= len(frames):
        outputs.append(convolve(frames[first:], weight_OCK))
    return torch.cat(outputs, 2)


class _TimeKernel:
    """The weights of a convolution over time, as the products take them.

    Args:
        weight_OCK: [O, C, 3].
        bias: [O], or None.
    """

    def __init__(self, weight_OCK: Tensor, bias: Tensor | None) -> None:
        self.bias = bias
        self.each = weight_OCK.permute(2, 0, 1).contiguous().transpose(1, 2).unbind()
        self.of_first = list(itertools.accumulate(self.each))
        """Sums over the first 1, 2 and 3 frames."""
        self.half_sum_CO = self.of_first[2] / 2
        self.half_difference_CO = self.half_sum_CO - self.each[1]

    def write(self, x: Sequence[Tensor], out: Sequence[Tensor], stride: int, num_equal: int) -> None:
        """Writes outputs [S, O] over inputs [S, C], the last ones first: what they overwrite no other one sees."""
        for t, num_outputs, equal in reversed(list(_steps(len(out), stride, num_equal))):
            if num_outputs == 2:
                self._write_two(x[t:], out[t], out[t + 1])
            else:
                self._write_one(x[t * stride :], out[t], equal)

    def _write_one(self, x: Sequence[Tensor], out_SO: Tensor, num_equal: int) -> None:
        y_SO = _product(x[0], self.of_first[num_equal - 1], self.bias)
        for k in range(num_equal, 3):
            _add_product(y_SO, x[k], self.each[k])
        out_SO.copy_(y_SO)

    def _write_two(self, x: Sequence[Tensor], first_SO: Tensor, second_SO: Tensor) -> None:
        difference_SO = torch.mm(x[2] - x[1], self.half_difference_CO)
        inner_SC, early_SC, late_SC = x[1] + x[2], x[0] - x[2], x[3] - x[1]
        _product(inner_SC, self.half_sum_CO, self.bias, first_SO)
        torch.sub(first_SO, difference_SO, out=second_SO)
        _add_product(second_SO, late_SC, self.each[2])
        _add_product(first_SO.add_(difference_SO), early_SC, self.each[0])


def _steps(num_outputs: int, stride: int, num_equal: int) -> Iterator[tuple[int, int, int]]:
    """Yields which outputs are computed together: the first, how many, and how many of its three inputs are equal."""
    t = 0
    while t < num_outputs:
        equal = min(max(1, num_equal - t * stride), 3)
        # Over two equal frames one output alone takes two products, as many as each of a pair.
        pair = stride == 1 and t + 1 < num_outputs and (equal == 1 or (equal == 2 and (num_outputs - t) % 2 == 0))
        yield t, 1 + pair, equal
        t += 1 + pair
