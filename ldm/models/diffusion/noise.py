"""Random numbers that belong to an image: the same whatever batch, order or device it is made in."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


class ImageNoise:
    """Standard normal noise for a batch of images, one independent stream per image and node.

    Every draw is a pure function of (the image's seed, the stream, the shape): numpy's SeedSequence gives
    each pair its own 128-bit generator, so that no two of millions collide. Drawn on the CPU in float32.

    Args:
        seeds: for each image a tuple of integers 0..2^32-1, such as (seed, prompt index, sample index).

    Raises:
        ValueError: no seeds, or a seed that is empty or out of range.
    """

    def __init__(self, seeds: Sequence[tuple[int, ...]]):
        if not seeds or any(not seed or min(seed) < 0 or max(seed) >= 2**32 for seed in seeds):
            raise ValueError(f"seeds: expected a tuple of integers 0..2^32-1 for each image; got {seeds!r}")
        self.seeds = tuple(seeds)

    def start(self, shape: Sequence[int]) -> Tensor:
        """The noise that sampling begins from; shape (C, H, W) of one image -> (B, C, H, W)."""
        return self._draw(0, tuple(shape))

    def node(self, i: int, x: Tensor) -> Tensor:
        """The noise of node i >= 0 for x, (B, C, H, W), in its dtype and on its device."""
        if len(x) != len(self.seeds):
            raise ValueError(f"x: expected {len(self.seeds)} images, one per seed; got {len(x)}")
        return self._draw(1 + i, tuple(x.shape[1:])).to(x)

    def _draw(self, stream: int, shape: tuple[int, ...]) -> Tensor:
        draws = []
        for seed in self.seeds:
            # SeedSequence pads with zeros: without the length (1, 0) would be the same seed as (1,).
            sequence = np.random.SeedSequence(seed, spawn_key=(len(seed), stream))
            draws.append(np.random.default_rng(sequence).standard_normal(shape, dtype=np.float32))
        return torch.from_numpy(np.stack(draws))
