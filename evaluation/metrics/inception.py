"""The Inception network of the Fréchet distance: Inception-v3 as TensorFlow published it in December 2015.

The network is here and not taken from a package, because those that have it import torchvision, which not every
PyTorch has. Names of modules are those of torch-fidelity's weights, which are the published ones converted.
Source: Rethinking the Inception Architecture (arXiv 1512.00567); its use: arXiv 1706.08500.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDE, HIGH, BOTH = (1, 7), (7, 1), ((1, 3), (3, 1))  # kernels; BOTH: two layers side by side
Kernel = int | tuple[int, int]
# A chain of layers: its name, and channels and kernel of each. Of several, the names of the layers end in _1, _2, ...
Branch = tuple[str, tuple[int, ...], tuple[Kernel | tuple[Kernel, Kernel], ...]]
CLASSES = 1008


class InceptionOutput(NamedTuple):
    """pooled (B, 2048), mixed_6 (B, 192, 17, 17): the first branch of the block of that name; logits (B, 1008),
    without the classifier's bias, as the published Inception scores have them."""

    pooled: Tensor
    mixed_6: Tensor
    logits: Tensor


class Conv(nn.Module):
    """Convolution, normalisation, ReLU; with stride 1 the size stays, with stride 2 nothing is padded."""

    def __init__(self, inside: int, outside: int, kernel: Kernel, stride: int = 1, padded: bool = True) -> None:
        super().__init__()
        height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (height // 2, width // 2) if stride == 1 and padded else 0
        self.conv = nn.Conv2d(inside, outside, (height, width), stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outside, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class Mixed(nn.Module):
    """Branches side by side, of an input of `inside` channels; the last one pools, by the mean (the padding does not
    count) or the maximum. `pool`: channels of the convolution after it; 0 = none, and the block halves the size."""

    def __init__(self, inside: int, *branches: Branch, pool: int = 0, mean: bool = True) -> None:
        super().__init__()
        self.chains: list[list[list[str]]] = []
        self.halves, self.mean = not pool, mean
        for name, channels, kernels in branches:
            width, chain = inside, []
            for place, (outside, kernel) in enumerate(zip(channels, kernels, strict=True), 1):
                stem = f"{name}_{place}" if len(channels) > 1 else name
                layers = {f"{stem}a": kernel[0], f"{stem}b": kernel[1]} if kernel == BOTH else {stem: kernel}
                for layer, size in layers.items():
                    stride = 2 if self.halves and place == len(channels) else 1
                    self.add_module(layer, Conv(width, outside, size, stride))
                chain.append([*layers])
                width = outside * len(layers)
            self.chains.append(chain)
        if pool:
            self.branch_pool = Conv(inside, pool, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([*(self.follow(chain, x) for chain in self.chains), self.pooled(x)], dim=1)

    def follow(self, chain: Sequence[Sequence[str]], x: Tensor) -> Tensor:
        for names in chain:
            x = torch.cat([self.get_submodule(name)(x) for name in names], dim=1)
        return x

    def pooled(self, x: Tensor) -> Tensor:
        if self.halves:
            return F.max_pool2d(x, 3, stride=2)
        if self.mean:
            return self.branch_pool(F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False))
        return self.branch_pool(F.max_pool2d(x, 3, stride=1, padding=1))


THREES: Branch = "branch3x3dbl", (64, 96, 96), (1, 3, 3)


def at_35(inside: int, pool: int) -> Mixed:
    """A block at 35 x 35."""
    return Mixed(inside, ("branch1x1", (64,), (1,)), ("branch5x5", (48, 64), (1, 5)), THREES, pool=pool)


def at_17(c: int) -> Mixed:
    """A block at 17 x 17 with c channels between its long filters."""
    once = "branch7x7", (c, c, 192), (1, WIDE, HIGH)
    twice = "branch7x7dbl", (c, c, c, c, 192), (1, HIGH, WIDE, HIGH, WIDE)
    return Mixed(768, ("branch1x1", (192,), (1,)), once, twice, pool=192)


def at_8(inside: int, mean: bool) -> Mixed:
    """A block at 8 x 8."""
    once, twice = ("branch3x3", (384, 384), (1, BOTH)), ("branch3x3dbl", (448, 384, 384), (1, 3, BOTH))
    return Mixed(inside, ("branch1x1", (320,), (1,)), once, twice, pool=192, mean=mean)


class Inception(nn.Module):
    """The network, with the names of its published weights."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3, padded=False)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3, padded=False)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = at_35(192, 32), at_35(256, 64), at_35(288, 64)
        self.Mixed_6a = Mixed(288, ("branch3x3", (384,), (3,)), THREES)
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = map(at_17, (128, 160, 160, 192))
        long = "branch7x7x3", (192, 192, 192, 192), (1, WIDE, HIGH, 3)
        self.Mixed_7a = Mixed(768, ("branch3x3", (192, 320), (1, 3)), long)
        # The published network pools by the maximum in its last block only.
        self.Mixed_7b, self.Mixed_7c = at_8(1280, mean=True), at_8(2048, mean=False)
        self.fc = nn.Linear(2048, CLASSES)

    def forward(self, x: Tensor) -> InceptionOutput:
        """Images (B, 3, 299, 299), (level - 128) / 128."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))  # (B, 64, 147, 147)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, stride=2)))  # (B, 192, 71, 71)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, stride=2))))  # (B, 288, 35, 35)
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))  # (B, 768, 17, 17)
        mixed_6 = self.Mixed_6d.branch1x1(x)
        x = self.Mixed_7a(self.Mixed_6e(self.Mixed_6d(x)))  # (B, 1280, 8, 8)
        pooled = self.Mixed_7c(self.Mixed_7b(x)).mean((2, 3))  # (B, 2048)
        return InceptionOutput(pooled, mixed_6, pooled @ self.fc.weight.T)
