"""Encoder and decoder of the first stage (the autoencoder between images and latents).

Module names and their order of use follow the published checkpoints (latent diffusion, arXiv 2112.10752).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.compatibility import Normalize, nonlinearity  # noqa: F401  (published names of this module)

ATTENTION_TYPES = ("vanilla", "vanilla-xformers", "none")  # the second names another kernel for the same result


def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


class Upsample(nn.Module):
    """Nearest-neighbour doubling, then (if with_conv) a 3x3 convolution."""

    def __init__(self, channels: int, with_conv: bool):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if with_conv else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Downsample(nn.Module):
    """Halve the size: a strided convolution, or average pooling if not with_conv."""

    def __init__(self, channels: int, with_conv: bool):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2) if with_conv else None

    def forward(self, x: Tensor) -> Tensor:
        if self.conv is None:
            return F.avg_pool2d(x, 2)
        # The published first stages pad on the right and the bottom only.
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class ResnetBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, dropout: float = 0.0):
        super().__init__()
        self.norm1 = group_norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)
        else:
            self.nin_shortcut = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return self.nin_shortcut(x) + h


class AttnBlock(nn.Module):
    """Single-head self-attention over all positions, with a residual."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = group_norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (f(h).flatten(2).transpose(1, 2).unsqueeze(1) for f in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v)  # (B, 1, H*W, C)
        h = h.squeeze(1).transpose(1, 2).reshape(x.shape)
        return x + self.proj_out(h)


def make_attn(channels: int, attn_type: str) -> nn.Module:
    if attn_type not in ATTENTION_TYPES:
        raise ValueError(f"attn_type {attn_type!r} is not one of {', '.join(ATTENTION_TYPES)}")
    return nn.Identity() if attn_type == "none" else AttnBlock(channels)


class Middle(nn.Module):
    def __init__(self, channels: int, dropout: float, attn_type: str):
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, dropout)
        self.attn_1 = make_attn(channels, attn_type)
        self.block_2 = ResnetBlock(channels, channels, dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Level(nn.Module):
    """The blocks of one resolution; `downsample` / `upsample` is added by the owner where there is one."""

    def __init__(self, in_channels: int, out_channels: int, num_blocks: int, dropout: float, attn_type: str | None):
        super().__init__()
        widths = [in_channels] + [out_channels] * num_blocks
        self.block = nn.ModuleList(ResnetBlock(a, b, dropout) for a, b in pairwise(widths))
        self.attn = nn.ModuleList(make_attn(out_channels, attn_type) for _ in self.block if attn_type)

    def forward(self, h: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            h = block(h)
            if self.attn:
                h = self.attn[i](h)
        return h


class Encoder(nn.Module):
    """Image to latent moments.

    Args (the `ddconfig` of the published configurations):
        ch, ch_mult: width of the first level, and each level's multiple of it; every level after the
            first halves the size.
        num_res_blocks: residual blocks per level.
        attn_resolutions: nominal sizes (counted from `resolution`, not from the input) with attention.
        z_channels, double_z: latent channels; doubled where mean and log-variance are wanted.
        attn_type: one of ATTENTION_TYPES; also decides the attention of the middle.
        patch_size: side of the pixel patches folded into channels before the first convolution; 1 in every
            published model, more makes a small first stage much cheaper.
        linear_shortcut: add a linear map between each latent position and its pixels, beside the deep path
            (residual autoencoding, arXiv 2410.10733); false in every published model.
    """

    def __init__(
        self,
        *,
        ch: int,
        out_ch: int,
        num_res_blocks: int,
        attn_resolutions: Sequence[int],
        in_channels: int,
        resolution: int,
        z_channels: int,
        ch_mult: Sequence[int] = (1, 2, 4, 8),
        dropout: float = 0.0,
        resamp_with_conv: bool = True,
        double_z: bool = True,
        attn_type: str = "vanilla",
        patch_size: int = 1,
        linear_shortcut: bool = False,
    ):
        super().__init__()
        self.patch_size = patch_size
        self.factor = patch_size * 2 ** (len(ch_mult) - 1)
        self.conv_in = nn.Conv2d(in_channels * patch_size**2, ch, 3, padding=1)
        self.down = nn.ModuleList()
        width, size = ch, resolution // patch_size
        for i, mult in enumerate(ch_mult):
            level = Level(width, ch * mult, num_res_blocks, dropout, attn_type if size in attn_resolutions else None)
            width = ch * mult
            if i < len(ch_mult) - 1:
                level.downsample = Downsample(width, resamp_with_conv)
                size //= 2
            self.down.append(level)
        self.mid = Middle(width, dropout, attn_type)
        self.norm_out = group_norm(width)
        out_channels = 2 * z_channels if double_z else z_channels
        self.conv_out = nn.Conv2d(width, out_channels, 3, padding=1)
        self.shortcut = nn.Conv2d(in_channels * self.factor**2, out_channels, 1) if linear_shortcut else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> (B, z_channels or twice that, H/f, W/f)."""
        h = self.conv_in(F.pixel_unshuffle(x, self.patch_size))
        for i, level in enumerate(self.down):
            h = level(h)
            if i < len(self.down) - 1:
                h = level.downsample(h)
        z = self.conv_out(F.silu(self.norm_out(self.mid(h))))
        return z if self.shortcut is None else z + self.shortcut(F.pixel_unshuffle(x, self.factor))


class Decoder(nn.Module):
    """Latent to image; the arguments are those of `Encoder`.

    tanh_out squashes the image into [-1, 1]; give_pre_end returns the features before the last norm.
    """

    def __init__(
        self,
        *,
        ch: int,
        out_ch: int,
        num_res_blocks: int,
        attn_resolutions: Sequence[int],
        in_channels: int,
        resolution: int,
        z_channels: int,
        ch_mult: Sequence[int] = (1, 2, 4, 8),
        dropout: float = 0.0,
        resamp_with_conv: bool = True,
        double_z: bool = True,
        attn_type: str = "vanilla",
        patch_size: int = 1,
        linear_shortcut: bool = False,
        tanh_out: bool = False,
        give_pre_end: bool = False,
    ):
        super().__init__()
        self.factor = patch_size * 2 ** (len(ch_mult) - 1)
        self.patch_size, self.tanh_out, self.give_pre_end = patch_size, tanh_out, give_pre_end
        width, size = ch * ch_mult[-1], resolution // patch_size // 2 ** (len(ch_mult) - 1)
        self.conv_in = nn.Conv2d(z_channels, width, 3, padding=1)
        self.mid = Middle(width, dropout, attn_type)
        levels = []
        for i, mult in reversed(list(enumerate(ch_mult))):
            level = Level(
                width, ch * mult, num_res_blocks + 1, dropout, attn_type if size in attn_resolutions else None
            )
            width = ch * mult
            if i > 0:
                level.upsample = Upsample(width, resamp_with_conv)
                size *= 2
            levels.append(level)
        # Checkpoints index the levels by resolution, the finest first; they run the other way round.
        self.up = nn.ModuleList(reversed(levels))
        self.norm_out = group_norm(width)
        self.conv_out = nn.Conv2d(width, out_ch * patch_size**2, 3, padding=1)
        self.shortcut = nn.Conv2d(z_channels, out_ch * self.factor**2, 1) if linear_shortcut else None

    @property
    def last_layer(self) -> nn.Parameter:
        """The weight at which adversarial losses balance their gradients."""
        return self.conv_out.weight

    def forward(self, z: Tensor) -> Tensor:
        """(B, z_channels, h, w) -> (B, out_ch, f*h, f*w)."""
        h = self.mid(self.conv_in(z))
        for i, level in reversed(list(enumerate(self.up))):
            h = level(h)
            if i > 0:
                h = level.upsample(h)
        if self.give_pre_end:
            return h
        x = F.pixel_shuffle(self.conv_out(F.silu(self.norm_out(h))), self.patch_size)
        if self.shortcut is not None:
            x = x + F.pixel_shuffle(self.shortcut(z), self.factor)
        return torch.tanh(x) if self.tanh_out else x
