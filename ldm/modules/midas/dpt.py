"""MiDaS's depth network DPT-Hybrid, under the module names of the published checkpoints.

Source: vision transformers for dense prediction (arXiv 2103.13413).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.modules.midas.backbone import STAGES, HybridTransformer


class Readout(nn.Module):
    """Mix the first token into every other one, (B, 1 + N, D) -> (B, N, D)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.project = nn.Sequential(nn.Linear(2 * width, width), nn.GELU())

    def forward(self, tokens: Tensor) -> Tensor:
        rest = tokens[:, 1:]
        return self.project(torch.cat([rest, tokens[:, :1].expand_as(rest)], dim=-1))


class Reassemble(nn.Module):
    """Tokens (B, 1 + h * w, D) to a map (B, D, h, w), or half as high and wide."""

    def __init__(self, width: int, halve: bool) -> None:
        super().__init__()
        # Published as a sequence whose second and third entries have no weights.
        self.add_module("0", Readout(width))
        self.add_module("3", nn.Conv2d(width, width, 1))
        if halve:
            self.add_module("4", nn.Conv2d(width, width, 3, stride=2, padding=1))

    def forward(self, tokens: Tensor, height: int, width: int) -> Tensor:
        readout, *convolutions = self.children()
        x = readout(tokens).transpose(1, 2).unflatten(2, (height, width))
        for convolution in convolutions:
            x = convolution(x)
        return x


class Pretrained(nn.Module):
    """(B, 3, H, W) -> four maps, (B, 256, H/4, W/4) to (B, width, H/32, W/32)."""

    def __init__(
        self, width: int, heads: int, depth: int, taps: tuple[int, int], stages: Sequence[int], grid: int
    ) -> None:
        super().__init__()
        self.taps = taps
        self.model = HybridTransformer(width, heads, depth, stages, grid)
        self.act_postprocess3 = Reassemble(width, halve=False)
        self.act_postprocess4 = Reassemble(width, halve=True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        (first, second, last), (early, late) = self.model(x, self.taps)
        grid = last.shape[2:]
        return first, second, self.act_postprocess3(early, *grid), self.act_postprocess4(late, *grid)


class ResidualUnit(nn.Module):
    """Two convolutions with a residual, (B, C, h, w) -> (B, C, h, w)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(F.relu(self.conv1(F.relu(x)))) + x


class Fusion(nn.Module):
    """Add a finer map to what comes from below, and double the size."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.out_conv = nn.Conv2d(channels, channels, 1)
        self.resConfUnit1 = ResidualUnit(channels)
        self.resConfUnit2 = ResidualUnit(channels)

    def forward(self, x: Tensor, finer: Tensor | None = None) -> Tensor:
        x = x if finer is None else x + self.resConfUnit1(finer)
        x = self.resConfUnit2(x)
        return self.out_conv(F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True))


class Scratch(nn.Module):
    """Four maps to depth, (B, 1, H, W)."""

    def __init__(self, width: int, features: int) -> None:
        super().__init__()
        for i, channels in enumerate((*STAGES[:2], width, width), start=1):
            self.add_module(f"layer{i}_rn", nn.Conv2d(channels, features, 3, padding=1, bias=False))
            self.add_module(f"refinenet{i}", Fusion(features))
        self.output_conv = nn.Sequential(
            nn.Conv2d(features, features // 2, 3, padding=1),
            nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True),
            nn.Conv2d(features // 2, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 1, 1),
            nn.ReLU(),
        )

    def forward(self, first: Tensor, second: Tensor, third: Tensor, fourth: Tensor) -> Tensor:
        x = self.refinenet4(self.layer4_rn(fourth))
        x = self.refinenet3(x, self.layer3_rn(third))
        x = self.refinenet2(x, self.layer2_rn(second))
        x = self.refinenet1(x, self.layer1_rn(first))
        return self.output_conv(x)


class DPTHybrid(nn.Module):
    """Relative inverse depth of images.

    Args:
        width, heads, depth: of the transformer.
        taps: blocks whose tokens are read, counted from 0.
        stages: residual blocks of the ResNet's stages.
        grid: side of the square of tokens that the positions were learned for (384 / 16).
        features: channels of the fused maps.
    """

    def __init__(
        self,
        width: int = 768,
        heads: int = 12,
        depth: int = 12,
        taps: tuple[int, int] = (8, 11),
        stages: Sequence[int] = (3, 4, 9),
        grid: int = 24,
        features: int = 256,
    ) -> None:
        super().__init__()
        self.pretrained = Pretrained(width, heads, depth, taps, stages, grid)
        self.scratch = Scratch(width, features)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> inverse depth (B, 1, H, W), 0 or more, larger is nearer.

        Raises:
            ValueError: H or W is not a multiple of 32.
        """
        if x.shape[2] % 32 or x.shape[3] % 32:
            raise ValueError(f"x must be a multiple of 32 high and wide; got {tuple(x.shape[2:])}")
        return self.scratch(*self.pretrained(x))
