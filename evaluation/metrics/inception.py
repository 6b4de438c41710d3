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

Size = int | tuple[int, int]
Layer = tuple[str, int, Size]  # name, channels, kernel
CLASSES = 1008
SIDE = 299


class InceptionOutput(NamedTuple):
    """pooled (B, 2048), mixed_6 (B, 192, 17, 17): the first branch of the block of that name; logits (B, 1008),
    without the classifier's bias, as the published Inception scores have them."""

    pooled: Tensor
    mixed_6: Tensor
    logits: Tensor


class Conv(nn.Module):
    """Convolution, normalisation, ReLU; with stride 1 the size stays, with stride 2 nothing is padded."""

    def __init__(self, inside: int, outside: int, kernel: Size, stride: int = 1, padded: bool = True) -> None:
        super().__init__()
        height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (height // 2, width // 2) if stride == 1 and padded else 0
        self.conv = nn.Conv2d(inside, outside, (height, width), stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outside, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class Mixed(nn.Module):
    """Branches side by side; the last one pools.

    Args:
        inside: channels of the input.
        branches: each a chain of layers. A chain may end in a tuple of layers, which all see what comes before.
        pool: channels of the convolution after pooling; 0 = none, and the block halves the size.
        pool_mean: pool by the mean (the padding does not count) or the maximum.
    """

    def __init__(
        self,
        inside: int,
        branches: Sequence[Sequence[Layer | tuple[Layer, ...]]],
        pool: int = 0,
        pool_mean: bool = True,
    ) -> None:
        super().__init__()
        self.chains: list[list[tuple[str, ...]]] = []
        self.halves, self.pool_mean = not pool, pool_mean
        for branch in branches:
            width, chain = inside, []
            for place, step in enumerate(branch):
                layers = step if isinstance(step[0], tuple) else (step,)
                stride = 2 if self.halves and place == len(branch) - 1 else 1
                for name, channels, kernel in layers:
                    self.add_module(name, Conv(width, channels, kernel, stride))
                chain.append(tuple(name for name, _, _ in layers))
                width = sum(channels for _, channels, _ in layers)
            self.chains.append(chain)
        if pool:
            self.branch_pool = Conv(inside, pool, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([*(self.follow(chain, x) for chain in self.chains), self.pooled(x)], dim=1)

    def follow(self, chain: Sequence[tuple[str, ...]], x: Tensor) -> Tensor:
        for names in chain:
            x = torch.cat([self.get_submodule(name)(x) for name in names], dim=1)
        return x

    def pooled(self, x: Tensor) -> Tensor:
        if self.halves:
            return F.max_pool2d(x, 3, stride=2)
        if self.pool_mean:
            return self.branch_pool(F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False))
        return self.branch_pool(F.max_pool2d(x, 3, stride=1, padding=1))


def at_35(inside: int, pool: int) -> Mixed:
    """A block at 35 x 35."""
    return Mixed(
        inside,
        [
            [("branch1x1", 64, 1)],
            [("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5)],
            [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)],
        ],
        pool,
    )


def at_17(c: int) -> Mixed:
    """A block at 17 x 17 with c channels between its long filters."""
    return Mixed(
        768,
        [
            [("branch1x1", 192, 1)],
            [("branch7x7_1", c, 1), ("branch7x7_2", c, (1, 7)), ("branch7x7_3", 192, (7, 1))],
            [
                ("branch7x7dbl_1", c, 1),
                ("branch7x7dbl_2", c, (7, 1)),
                ("branch7x7dbl_3", c, (1, 7)),
                ("branch7x7dbl_4", c, (7, 1)),
                ("branch7x7dbl_5", 192, (1, 7)),
            ],
        ],
        192,
    )


def at_8(inside: int, pool_mean: bool) -> Mixed:
    """A block at 8 x 8."""

    def both(name: str) -> tuple[Layer, Layer]:
        return (f"{name}a", 384, (1, 3)), (f"{name}b", 384, (3, 1))

    return Mixed(
        inside,
        [
            [("branch1x1", 320, 1)],
            [("branch3x3_1", 384, 1), both("branch3x3_2")],
            [("branch3x3dbl_1", 448, 1), ("branch3x3dbl_2", 384, 3), both("branch3x3dbl_3")],
        ],
        192,
        pool_mean,
    )


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
        self.Mixed_6a = Mixed(
            288,
            [
                [("branch3x3", 384, 3)],
                [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)],
            ],
        )
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = map(at_17, (128, 160, 160, 192))
        self.Mixed_7a = Mixed(
            768,
            [
                [("branch3x3_1", 192, 1), ("branch3x3_2", 320, 3)],
                [
                    ("branch7x7x3_1", 192, 1),
                    ("branch7x7x3_2", 192, (1, 7)),
                    ("branch7x7x3_3", 192, (7, 1)),
                    ("branch7x7x3_4", 192, 3),
                ],
            ],
        )
        # The published network pools by the maximum in its last block only.
        self.Mixed_7b, self.Mixed_7c = at_8(1280, pool_mean=True), at_8(2048, pool_mean=False)
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
