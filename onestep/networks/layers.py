"""Layers of the EDM networks: resampling convolutions, embeddings of the noise level and the residual block.

Parameters and buffers are named, shaped and laid out as in the published EDM networks (Karras et al. 2022).
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def group_norm(channels: int, eps: float = 1e-5) -> nn.GroupNorm:
    """32 groups, or fewer so that every group has at least 4 channels."""
    return nn.GroupNorm(min(32, channels // 4), channels, eps=eps)


class Conv2d(nn.Module):
    """A same-sized convolution, with x2 resampling by a separable filter f before it, or after it for `down_last`.

    up: zeros between the samples, then 4 f (x) f / sum^2; down: f (x) f / sum^2, then every second sample. Both pad by
    zeros. `down_last` convolves beyond the border too, so that the filter needs no padding. Without kernel (0) there is
    no convolution and no bias. (B, C_in, H, W) -> (B, C_out, H', W') with H' = 2H for up, H / 2 for down.
    """

    resample_filter: Tensor | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        up: bool = False,
        down: bool = False,
        resample_filter: Sequence[int] = (1, 1),
        down_last: bool = False,
    ):
        super().__init__()
        assert not (up and down) and (down or not down_last) and (kernel or in_channels == out_channels)
        self.out_channels, self.up, self.down, self.down_last = out_channels, up, down, down_last
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, kernel, kernel)) if kernel else None
        self.bias = nn.Parameter(torch.empty(out_channels)) if kernel else None
        taps = torch.tensor(resample_filter, dtype=torch.float32)
        kernel_2d = taps.outer(taps)[None, None] / taps.sum() ** 2
        # it follows from the config, so it is not saved
        self.register_buffer("resample_filter", kernel_2d if up or down else None, persistent=False)
        if self.weight is not None and self.bias is not None:
            bound = 1 / math.sqrt(in_channels * kernel**2)
            nn.init.uniform_(self.weight, -bound, bound)
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        f = self.resample_filter
        pad = 0 if f is None else (f.shape[-1] - 1) // 2
        if f is not None and self.up:
            x = F.conv_transpose2d(x, 4 * _depthwise(f, x), stride=2, padding=pad, groups=x.shape[1])
        if f is not None and self.down and not self.down_last:
            x = F.conv2d(x, _depthwise(f, x), stride=2, padding=pad, groups=x.shape[1])
        if self.weight is not None:
            x = F.conv2d(x, self.weight, self.bias, padding=self.weight.shape[-1] // 2 + (pad if self.down_last else 0))
        if f is not None and self.down_last:
            x = F.conv2d(x, _depthwise(f, x), stride=2, groups=x.shape[1])
        return x


def _depthwise(f: Tensor, x: Tensor) -> Tensor:
    return f.to(x.dtype).expand(x.shape[1], -1, -1, -1)


class PositionalEmbedding(nn.Module):
    """[cos(w x), sin(w x)] with w_i = 10000^(-i / n), i < n = channels / 2; `endpoint` divides by n - 1. (B,) -> (B, 2n)."""

    def __init__(self, channels: int, endpoint: bool = False):
        super().__init__()
        self.pairs, self.endpoint = channels // 2, endpoint

    def forward(self, x: Tensor) -> Tensor:
        steps = torch.arange(self.pairs, dtype=x.dtype, device=x.device) / (self.pairs - self.endpoint)
        angles = x.outer((1 / 10000) ** steps)
        return torch.cat([angles.cos(), angles.sin()], dim=1)


class FourierEmbedding(nn.Module):
    """[cos(2 pi w x), sin(2 pi w x)] with fixed random w ~ N(0, 16^2). (B,) -> (B, channels)."""

    freqs: Tensor

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("freqs", 16 * torch.randn(channels // 2))

    def forward(self, x: Tensor) -> Tensor:
        angles = x.outer(2 * math.pi * self.freqs.to(x.dtype))
        return torch.cat([angles.cos(), angles.sin()], dim=1)


class UNetBlock(nn.Module):
    """Residual block, then self-attention over the pixels where heads > 0; both sums are scaled by `skip_scale`.

    `adaptive_scale`: the embedding scales and shifts the second norm (ADM), else it is added before it (DDPM++).
    `resample_proj`: a block that resamples has a 1x1 convolution on its skip even where the width stays.
    x (B, in_channels, H, W), emb (B, emb_channels) -> (B, out_channels, H', W').
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        up: bool = False,
        down: bool = False,
        heads: int = 0,
        dropout: float = 0.0,
        skip_scale: float = 1.0,
        eps: float = 1e-5,
        resample_filter: Sequence[int] = (1, 1),
        resample_proj: bool = False,
        adaptive_scale: bool = True,
    ):
        super().__init__()
        self.out_channels, self.heads, self.dropout = out_channels, heads, dropout
        self.skip_scale, self.adaptive_scale = skip_scale, adaptive_scale
        self.norm0 = group_norm(in_channels, eps)
        self.conv0 = Conv2d(in_channels, out_channels, 3, up, down, resample_filter)
        self.affine = nn.Linear(emb_channels, out_channels * (2 if adaptive_scale else 1))
        self.norm1 = group_norm(out_channels, eps)
        self.conv1 = Conv2d(out_channels, out_channels, 3)
        self.skip: Conv2d | None = None
        if up or down or in_channels != out_channels:
            kernel = 1 if resample_proj or in_channels != out_channels else 0
            self.skip = Conv2d(in_channels, out_channels, kernel, up, down, resample_filter)
        if heads:
            self.norm2 = group_norm(out_channels, eps)
            self.qkv = Conv2d(out_channels, 3 * out_channels, 1)
            self.proj = Conv2d(out_channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.norm1_with(self.conv0(F.silu(self.norm0(x))), self.affine(emb)[:, :, None, None])
        h = self.conv1(F.dropout(F.silu(h), self.dropout, self.training))
        x = (h + (x if self.skip is None else self.skip(x))) * self.skip_scale
        return (x + self.attention(x)) * self.skip_scale if self.heads else x

    def norm1_with(self, h: Tensor, emb: Tensor) -> Tensor:
        if not self.adaptive_scale:
            return self.norm1(h + emb)
        scale, shift = emb.chunk(2, dim=1)
        return self.norm1(h) * (1 + scale) + shift

    def attention(self, x: Tensor) -> Tensor:
        """softmax(q k^T / sqrt(c)) v; channels of qkv are ordered (head, c, q/k/v), the last index fastest."""
        qkv = self.qkv(self.norm2(x)).reshape(len(x), self.heads, x.shape[1] // self.heads, 3, -1)
        q, k, v = qkv.transpose(2, 4).unbind(3)  # (B, heads, pixels, c) each
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(x.shape))
