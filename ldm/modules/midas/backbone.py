"""The hybrid vision transformer under MiDaS's depth network: a ResNet whose last map is cut into tokens.

Module names are those of the published checkpoints. Sources: vision transformer (arXiv 2010.11929), big transfer
(arXiv 1912.11370) for the ResNet with group norm and standardised weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STEM, STAGES = 64, (256, 512, 1024)  # channels of the ResNet; each stage but the first halves the size


def pad_same(x: Tensor, kernel: int, stride: int) -> Tensor:
    """Zeros around, the odd one at the right or bottom, so that a strided window gives ceil(size / stride)."""
    sides = []
    for size in (x.shape[-1], x.shape[-2]):
        total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        sides += [total // 2, total - total // 2]
    return F.pad(x, sides)


class StandardConv(nn.Conv2d):
    """Convolution whose weights are standardised for each output channel, with `pad_same`."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> None:
        super().__init__(in_channels, out_channels, kernel, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        var, mean = torch.var_mean(self.weight, dim=(1, 2, 3), correction=0, keepdim=True)
        weight = (self.weight - mean) / (var + 1e-8).sqrt()
        return F.conv2d(pad_same(x, self.kernel_size[0], self.stride[0]), weight, stride=self.stride)


class ConvNorm(nn.Module):
    """A standardised convolution and its norm."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.conv = StandardConv(in_channels, out_channels, kernel, stride)
        self.norm = nn.GroupNorm(32, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class Bottleneck(nn.Module):
    """Three convolutions with a residual; the second one strides."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        middle = out_channels // 4
        same = in_channels == out_channels and stride == 1
        self.downsample = None if same else ConvNorm(in_channels, out_channels, 1, stride)
        self.conv1 = StandardConv(in_channels, middle, 1)
        self.norm1 = nn.GroupNorm(32, middle)
        self.conv2 = StandardConv(middle, middle, 3, stride)
        self.norm2 = nn.GroupNorm(32, middle)
        self.conv3 = StandardConv(middle, out_channels, 1)
        self.norm3 = nn.GroupNorm(32, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm1(self.conv1(x)))
        h = F.relu(self.norm2(self.conv2(h)))
        return F.relu(self.norm3(self.conv3(h)) + (x if self.downsample is None else self.downsample(x)))


class Stage(nn.Module):
    """Bottlenecks at one size."""

    def __init__(self, in_channels: int, out_channels: int, depth: int, stride: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            *(Bottleneck(out_channels if i else in_channels, out_channels, 1 if i else stride) for i in range(depth))
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


class ResNet(nn.Module):
    """(B, 3, H, W) -> the maps of its three stages, (B, 256, H/4, W/4) to (B, 1024, H/16, W/16)."""

    def __init__(self, depths: Sequence[int]) -> None:
        super().__init__()
        self.stem = ConvNorm(3, STEM, 7, 2)
        self.stages = nn.ModuleList(
            Stage(before, after, depth, stride)
            for (before, after), depth, stride in zip(pairwise((STEM, *STAGES)), depths, (1, 2, 2), strict=True)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        # Nothing is below zero after the ReLU, so the padding never is the maximum that counts.
        x = F.max_pool2d(pad_same(F.relu(self.stem(x)), 3, 2), 3, stride=2)
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps


class Attention(nn.Module):
    """Multi-head self-attention, (B, L, width) -> (B, L, width)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, L, width/heads)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Perceptron(nn.Module):
    """Two layers with GELU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm attention and perceptron."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Perceptron(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    """The ResNet, and the projection of its last map to tokens."""

    def __init__(self, width: int, depths: Sequence[int]) -> None:
        super().__init__()
        self.backbone = ResNet(depths)
        self.proj = nn.Conv2d(STAGES[-1], width, 1)


class HybridTransformer(nn.Module):
    """Tokens of an image and the maps beneath them.

    Args:
        width, heads, depth: of the transformer.
        stages: residual blocks of the ResNet's stages.
        grid: side of the square of tokens that the positions were learned for.
    """

    def __init__(self, width: int, heads: int, depth: int, stages: Sequence[int], grid: int) -> None:
        super().__init__()
        self.grid = grid
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, grid * grid + 1, width))
        self.patch_embed = PatchEmbed(width, stages)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        # A classifier's last layers, which published checkpoints hold and depth does not need.
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, 1000)

    def positions(self, height: int, width: int) -> Tensor:
        """The learned positions, stretched to a grid of another shape; (1, 1 + height * width, D)."""
        first, rest = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        rest = rest.transpose(1, 2).unflatten(2, (self.grid, self.grid))
        rest = F.interpolate(rest, size=(height, width), mode="bilinear")
        return torch.cat([first, rest.flatten(2).transpose(1, 2)], dim=1)

    def forward(self, x: Tensor, taps: Sequence[int]) -> tuple[list[Tensor], list[Tensor]]:
        """(B, 3, H, W) -> the ResNet's maps, and the tokens (B, 1 + H/16 * W/16, D) after each block in `taps`."""
        maps = self.patch_embed.backbone(x)
        patches = self.patch_embed.proj(maps[-1])  # (B, D, H/16, W/16)
        tokens = torch.cat([self.cls_token.expand(len(x), -1, -1), patches.flatten(2).transpose(1, 2)], dim=1)
        tokens = tokens + self.positions(*patches.shape[2:])
        tapped = []
        for i, block in enumerate(self.blocks):
            tokens = block(tokens)
            if i in taps:
                tapped.append(tokens)
        return maps, tapped
