"""Causal building blocks of the video tokenizers.

Tensors between blocks are `B C T H W` in channels-last memory, so that merging frames into the batch, pixels into one
axis, or channels into a matrix product is a view and never a copy. Every convolution is factorised, hence runs as the
two-dimensional or pointwise operation that it really is.

Layers that look back in time take a `Past`, by which a video may come in chunks or be shared among ranks.

For inference on a CPU convolutions come from fewer multiplications (`fast_conv`), and blocks overwrite what they made.

Shape letters: B batch, C channels, T frames, H height, W width, S = H W pixels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from nemo_cosmos.tokenizer import fast_conv
from nemo_cosmos.tokenizer.causal_cache import WHOLE_VIDEO, Past

NORM_EPS = 1e-6


class CausalConv3d(nn.Module):
    """Convolution over space or over time that never sees a later frame.

    In time the video's first frame is repeated on the left, kernel - stride times; later frames have as many of the
    frames before them there. In space zeros surround the picture.

    Args:
        in_channels: Channels in.
        out_channels: Channels out.
        time_kernel: Frames that the kernel covers; above 1 only with `space_kernel` 1.
        space_kernel: Pixels that the kernel covers along height and width, odd.
        time_stride: Step along time.
        space_stride: Step along height and width.
        space_padding: Zeros around the picture; None for (space_kernel - 1) / 2.

    Attributes:
        space_padding: Zeros above and below, and at both sides. Ranks that share a picture put each other's rows there.
        adds_bias: Whether the bias is added; ranks that share the input channels add it to their sum.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        time_kernel: int = 1,
        space_kernel: int = 1,
        time_stride: int = 1,
        space_stride: int = 1,
        space_padding: int | None = None,
    ) -> None:
        super().__init__()
        assert space_kernel % 2 == 1, space_kernel
        assert time_kernel == 1 or space_kernel == 1, "factorise the convolution"
        self.time_pad = time_kernel - time_stride
        padding = (space_kernel - 1) // 2 if space_padding is None else space_padding
        self.space_padding = (padding, padding)
        self.adds_bias = True
        self.conv3d = nn.Conv3d(
            in_channels,
            out_channels,
            (time_kernel, space_kernel, space_kernel),
            stride=(time_stride, space_stride, space_stride),
        )

    def forward(self, x_BCTHW: Tensor, past: Past = WHOLE_VIDEO, *, overwrite: bool = False) -> Tensor:
        """[B, C, T, H, W] -> [B, C', T / time_stride, H', W'].

        With `overwrite` a convolution over time may give the result in the memory of the input.
        """
        kernel_t, kernel_s, _ = self.conv3d.kernel_size
        if kernel_t > 1:
            return self._over_time(x_BCTHW, past, overwrite)
        if kernel_s > 1:
            return self._over_space(x_BCTHW)
        return self._pointwise(x_BCTHW)

    def _pointwise(self, x_BCTHW: Tensor) -> Tensor:
        own_pages = x_BCTHW.dtype == torch.float32 and fast_conv.applies(x_BCTHW)
        linear = fast_conv.linear if own_pages else F.linear
        y_BTHWC = linear(x_BCTHW.permute(0, 2, 3, 4, 1), self.conv3d.weight.flatten(1), self._bias())
        return y_BTHWC.permute(0, 4, 1, 2, 3)

    def _over_space(self, x_BCTHW: Tensor) -> Tensor:
        if self._tiles(x_BCTHW):
            return self._over_tiles(x_BCTHW)
        x_NCHW, weight = frames_to_batch(x_BCTHW), self.conv3d.weight.squeeze(2)
        y_NCHW = F.conv2d(x_NCHW, weight, self._bias(), stride=self.conv3d.stride[1:], padding=self.space_padding)
        return batch_to_frames(y_NCHW, x_BCTHW.shape[0])

    def _tiles(self, x_BCTHW: Tensor) -> bool:
        tiled = self.conv3d.kernel_size[1:] == (3, 3) and self.conv3d.stride[1:] == (1, 1)
        return tiled and x_BCTHW.dtype == torch.float32 and fast_conv.pays(x_BCTHW, self.conv3d.weight)

    def _over_tiles(
        self, x_BCTHW: Tensor, prologue: fast_conv.Prologue | None = None, *, overwrite: bool = False
    ) -> Tensor:
        x_NCHW, weight = frames_to_batch(x_BCTHW), self.conv3d.weight.squeeze(2)
        y_NCHW = fast_conv.conv2d(
            x_NCHW, weight, self._bias(), self.space_padding, prologue=prologue, overwrite=overwrite
        )
        return batch_to_frames(y_NCHW, x_BCTHW.shape[0])

    @property
    def hooked(self) -> bool:
        """Whether others take part, as ranks that share channels or rows do (`tensor_parallel`)."""
        return bool(self._forward_pre_hooks or self._forward_hooks)

    def takes_norm(self, x_BCTHW: Tensor) -> bool:
        """Whether there is `after_norm` for an input."""
        return not self.hooked and self._tiles(x_BCTHW)

    def after_norm(self, norm: CausalNorm, x_BCTHW: Tensor, *, overwrite: bool) -> Tensor:
        """As `self(silu(norm(x)))`, with no more than a few frames of the norm in memory at once.

        Args:
            norm: Comes first.
            x_BCTHW: Its input.
            overwrite: The result may take the memory of the input.

        Returns:
            [B, C', T, H', W'].
        """
        return self._over_tiles(x_BCTHW, lambda x_NCHW: silu(norm.norm(x_NCHW)), overwrite=overwrite)

    def _over_time(self, x_BCTHW: Tensor, past: Past, overwrite: bool) -> Tensor:
        weight, bias, stride = self.conv3d.weight.squeeze(4), self._bias(), self.conv3d.stride[0]
        if self.conv3d.kernel_size[0] == 3 and fast_conv.pays(x_BCTHW, weight):
            frames = past.frames(self, x_BCTHW, self.time_pad)
            num_equal = 1 + self.time_pad if past.at_start else 1
            out = x_BCTHW if overwrite and stride == 1 and len(weight) == x_BCTHW.shape[1] else None
            return fast_conv.conv_over_time(
                frames, weight.squeeze(3), bias, stride=stride, num_equal=num_equal, out=out
            )
        x_BCTHW = past.before(self, x_BCTHW, self.time_pad)
        x_BCTS = rearrange(x_BCTHW, "B C T H W -> B C T (H W)")
        y_BCTS = F.conv2d(x_BCTS, weight, bias, stride=(stride, 1))
        return rearrange(y_BCTS, "B C T (H W) -> B C T H W", H=x_BCTHW.shape[3])

    def _bias(self) -> Tensor | None:
        return self.conv3d.bias if self.adds_bias else None


def silu(x: Tensor) -> Tensor:
    """SiLU of a tensor that nobody else needs, such as a norm gives."""
    return F.silu(x, inplace=fast_conv.applies(x))


def add(x: Tensor, y: Tensor) -> Tensor:
    """Sum of two tensors, the first of which nobody else needs."""
    return x.add_(y) if fast_conv.applies(x) else x + y


def frames_to_batch(x_BCTHW: Tensor) -> Tensor:
    """[B, C, T, H, W] -> [B T, C, H, W]; a view for channels-last memory."""
    return rearrange(x_BCTHW, "B C T H W -> (B T) C H W")


def batch_to_frames(x_NCHW: Tensor, batch_size: int) -> Tensor:
    """[B T, C, H, W] -> [B, C, T, H, W]; a view for channels-last memory."""
    return rearrange(x_NCHW, "(B T) C H W -> B C T H W", B=batch_size)


class CausalNorm(nn.Module):
    """Group norm with one group, of every frame alone, so that no statistic flows back in time.

    Args:
        channels: Channels in and out.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, channels, eps=NORM_EPS)

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        """[B, C, T, H, W] -> the same shape."""
        return batch_to_frames(self.norm(frames_to_batch(x_BCTHW)), x_BCTHW.shape[0])


class FactorisedConv(nn.Sequential):
    """A 3x3 convolution over space followed by one of 3 frames over time.

    Args:
        in_channels: Channels in.
        out_channels: Channels out.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(
            CausalConv3d(in_channels, out_channels, space_kernel=3),
            CausalConv3d(out_channels, out_channels, time_kernel=3),
        )

    def forward(self, x_BCTHW: Tensor, past: Past = WHOLE_VIDEO) -> Tensor:
        """[B, C, T, H, W] -> [B, C', T, H, W]."""
        space, time = self
        return time(space(x_BCTHW), past, overwrite=True)


class ResnetBlock(nn.Module):
    """Twice norm, SiLU, factorised convolution, around a shortcut.

    Args:
        in_channels: Channels in.
        out_channels: Channels out; a pointwise shortcut is added where they differ.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = CausalNorm(in_channels)
        self.conv1 = FactorisedConv(in_channels, out_channels)
        self.norm2 = CausalNorm(out_channels)
        self.conv2 = FactorisedConv(out_channels, out_channels)
        self.nin_shortcut = CausalConv3d(in_channels, out_channels) if in_channels != out_channels else nn.Identity()

    def forward(self, x_BCTHW: Tensor, past: Past = WHOLE_VIDEO) -> Tensor:
        """[B, C, T, H, W] -> [B, C', T, H, W]."""
        h_BCTHW = x_BCTHW
        for norm, (space, time) in ((self.norm1, self.conv1), (self.norm2, self.conv2)):
            if space.takes_norm(h_BCTHW):
                h_BCTHW = space.after_norm(norm, h_BCTHW, overwrite=h_BCTHW is not x_BCTHW)
            else:
                # One step a line, so that the tensor before is free when the next one is made.
                h_BCTHW = silu(norm(h_BCTHW))
                h_BCTHW = space(h_BCTHW)
            h_BCTHW = time(h_BCTHW, past, overwrite=True)
        return add(h_BCTHW, self.nin_shortcut(x_BCTHW))


class CausalAttention(nn.Module):
    """Single-head self-attention with a residual; subclasses say along which axis.

    Args:
        channels: Channels in and out; the scale is channels^-0.5.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = CausalNorm(channels)
        self.q = CausalConv3d(channels, channels)
        self.k = CausalConv3d(channels, channels)
        self.v = CausalConv3d(channels, channels)
        self.proj_out = CausalConv3d(channels, channels)

    def forward(self, x_BCTHW: Tensor, past: Past = WHOLE_VIDEO) -> Tensor:
        """[B, C, T, H, W] -> the same shape."""
        h_BCTHW = self.norm(x_BCTHW)
        return add(self.proj_out(self._attend(self.q(h_BCTHW), self.k(h_BCTHW), self.v(h_BCTHW), past)), x_BCTHW)

    def _attend(self, q_BCTHW: Tensor, k_BCTHW: Tensor, v_BCTHW: Tensor, past: Past) -> Tensor:
        raise NotImplementedError


class SpatialAttention(CausalAttention):
    """All pixels of a frame see each other."""

    def _attend(self, q_BCTHW: Tensor, k_BCTHW: Tensor, v_BCTHW: Tensor, past: Past) -> Tensor:
        _, _, _, height, width = q_BCTHW.shape
        qkv = (rearrange(x, "B C T H W -> B T (H W) C") for x in (q_BCTHW, k_BCTHW, v_BCTHW))
        out_BTSC = F.scaled_dot_product_attention(*qkv)
        return rearrange(out_BTSC, "B T (H W) C -> B C T H W", H=height, W=width)


class TemporalAttention(CausalAttention):
    """A pixel sees itself in this frame and all before."""

    def _attend(self, q_BCTHW: Tensor, k_BCTHW: Tensor, v_BCTHW: Tensor, past: Past) -> Tensor:
        _, _, _, height, width = q_BCTHW.shape
        k_BCTHW, v_BCTHW = past.keys_before(self, k_BCTHW, v_BCTHW)
        q_BSTC, k_BSTC, v_BSTC = (rearrange(x, "B C T H W -> B (H W) T C") for x in (q_BCTHW, k_BCTHW, v_BCTHW))
        num_queries, num_keys = q_BSTC.shape[2], k_BSTC.shape[2]
        if num_queries == num_keys and past.max_attended_frames is None:
            out_BSTC = F.scaled_dot_product_attention(q_BSTC, k_BSTC, v_BSTC, is_causal=True)
        else:
            mask = causal_mask(num_queries, num_keys, past.max_attended_frames).to(q_BSTC.device)
            out_BSTC = F.scaled_dot_product_attention(q_BSTC, k_BSTC, v_BSTC, attn_mask=mask)
        return rearrange(out_BSTC, "B (H W) T C -> B C T H W", H=height, W=width)


def causal_mask(num_queries: int, num_keys: int, max_attended_frames: int | None) -> Tensor:
    """Returns bool [num_queries, num_keys], True where a query sees a key; both end with the same frame."""
    offset = num_keys - num_queries
    mask = torch.ones(num_queries, num_keys, dtype=torch.bool).tril(offset)
    return mask if max_attended_frames is None else mask.triu(offset - max_attended_frames + 1)


class HybridDownsample(nn.Module):
    """Halves space, then time, each as strided convolution plus average pooling, then mixes channels.

    Args:
        channels: Channels in and out.
        space: Whether height and width are halved.
        time: Whether frames go from 1 + 2 k to 1 + k; in a later chunk from 2 k to k.
    """

    def __init__(self, channels: int, *, space: bool, time: bool) -> None:
        super().__init__()
        self.space, self.time = space, time
        if space:
            self.pad = nn.ZeroPad2d((0, 1, 0, 1))
            self.conv1 = CausalConv3d(channels, channels, space_kernel=3, space_stride=2, space_padding=0)
        if time:
            self.conv2 = CausalConv3d(channels, channels, time_kernel=3, time_stride=2)
        self.conv3 = CausalConv3d(channels, channels)

    def forward(self, x_BCTHW: Tensor, past: Past = WHOLE_VIDEO) -> Tensor:
        """[B, C, T, H, W] -> [B, C, 1 + (T-1) / 2, H / 2, W / 2] where both are halved."""
        if self.space:
            batch_size = x_BCTHW.shape[0]
            padded_BCTHW = batch_to_frames(self.pad(frames_to_batch(x_BCTHW)), batch_size)
            pooled_BCTHW = batch_to_frames(F.avg_pool2d(frames_to_batch(x_BCTHW), 2), batch_size)
            x_BCTHW = add(self.conv1(padded_BCTHW), pooled_BCTHW)
        if self.time:
            if past.at_start:
                x_BCTHW = torch.cat([x_BCTHW[:, :, :1], x_BCTHW], dim=2)
            x_BCTHW = add(self.conv2(x_BCTHW, past), (x_BCTHW[:, :, 0::2] + x_BCTHW[:, :, 1::2]) * 0.5)
        return self.conv3(x_BCTHW)


class HybridUpsample(nn.Module):
    """Doubles time, then space, each by repetition with a convolution residual, then mixes channels.

    Args:
        channels: Channels in and out.
        space: Whether height and width are doubled.
        time: Whether frames go from 1 + k to 1 + 2 k; in a later chunk from k to 2 k.
    """

    def __init__(self, channels: int, *, space: bool, time: bool) -> None:
        super().__init__()
        self.space, self.time = space, time
        if time:
            self.conv1 = CausalConv3d(channels, channels, time_kernel=3)
        if space:
            self.conv2 = CausalConv3d(channels, channels, space_kernel=3)
        self.conv3 = CausalConv3d(channels, channels)

    def forward(self, x_BCTHW: Tensor, past: Past = WHOLE_VIDEO) -> Tensor:
        """[B, C, T, H, W] -> [B, C, 1 + 2 (T-1), 2 H, 2 W] where both are doubled."""
        if self.time:
            num_single = 1 if past.at_start else 0  # the video's first frame stays one frame
            x_BCTHW = x_BCTHW.repeat_interleave(2, dim=2)[:, :, num_single:]
            x_BCTHW = add(self.conv1(x_BCTHW, past), x_BCTHW)
        if self.space:
            x_BCTHW = self._double(x_BCTHW)
        return self.conv3(x_BCTHW)

    def _double(self, x_BCTHW: Tensor) -> Tensor:
        weight, bias = self.conv2.conv3d.weight.squeeze(2), self.conv2.conv3d.bias
        if not self.conv2.hooked and fast_conv.pays(x_BCTHW, weight):
            y_NCHW = fast_conv.conv2d_of_doubled(frames_to_batch(x_BCTHW), weight, bias)
            y_BCTHW = batch_to_frames(y_NCHW, x_BCTHW.shape[0])
            y_BCTHW.unflatten(4, (-1, 2)).unflatten(3, (-1, 2)).add_(x_BCTHW[:, :, :, :, None, :, None])
            return y_BCTHW
        x_BCTHW = x_BCTHW.repeat_interleave(2, dim=3).repeat_interleave(2, dim=4)
        return add(self.conv2(x_BCTHW), x_BCTHW)


class MiddleBlock(nn.Module):
    """Residual block, spatial then temporal attention, residual block, at the coarsest level.

    Args:
        channels: Channels in and out.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels)
        self.attn_1 = nn.ModuleList([SpatialAttention(channels), TemporalAttention(channels)])
        self.block_2 = ResnetBlock(channels, channels)

    def forward(self, x_BCTHW: Tensor, past: Past = WHOLE_VIDEO) -> Tensor:
        """[B, C, T, H, W] -> the same shape."""
        x_BCTHW = self.block_1(x_BCTHW, past)
        for attention in self.attn_1:
            x_BCTHW = attention(x_BCTHW, past)
        return self.block_2(x_BCTHW, past)
