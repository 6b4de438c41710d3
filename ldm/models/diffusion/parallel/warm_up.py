"""What the first call of a network costs for each shape, and a run that pays for it."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ldm.models.diffusion.conditioning import Conditioning
from ldm.models.diffusion.denoiser import ConditionedNetwork
from ldm.modules.diffusionmodules.features import Features, PartWeights

T = TypeVar("T")


def timed(call: Callable[[], T], device: torch.device) -> tuple[T, float]:
    """What call() returns, and its seconds, with those of what it leaves running on a GPU."""

    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    began = clock()
    result = call()
    return result, clock() - began


class WarmUp:
    """A `ConditionedNetwork` that computes each shape it meets twice, then no more; it predicts zeros.

    A run of it pays for the first calls of all shapes of the run, in little more time than these take.

    Args:
        network: what computes.
        first_calls: seconds that the first call of a shape took beyond the second, by name and shape. What is already
            there was called before in this process, and is kept.
        device: of the network.
    """

    def __init__(self, network: ConditionedNetwork, first_calls: dict[Hashable, float], device: torch.device) -> None:
        self.network, self.first_calls, self.device = network, first_calls, device
        self.seconds = 0.0  # spent in the network
        self.results: dict[Hashable, Any] = {}  # by name and shape

    def embed_time(self, t: Tensor) -> Tensor:
        return self.network.embed_time(t)

    def parameters(self) -> Iterator[nn.Parameter]:
        return self.network.parameters()

    def encode(self, x: Tensor, t: Tensor, cond: Conditioning, tome: float) -> Features:
        return self._once(("encode", len(x)), lambda: self.network.encode(x, t, cond, tome))

    def encode_outer(self, x: Tensor, t: Tensor, cond: Conditioning, blocks: int, tome: float) -> Sequence[Tensor]:
        return self._once(("encode_outer", len(x), blocks), lambda: self.network.encode_outer(x, t, cond, blocks, tome))

    def part_weights(self) -> Sequence[PartWeights]:
        return self._once(("part_weights",), self.network.part_weights)

    def share(self, features: Features, weights: Sequence[PartWeights] | None) -> Features:
        return self._once(("share", len(features)), lambda: self.network.share(features, weights))

    def advance(self, features: Features, t: Tensor, cond: Conditioning, blocks: int, tome: float) -> Features:
        return self._once(
            ("advance", len(features), blocks), lambda: self.network.advance(features, t, cond, blocks, tome)
        )

    def decode(self, features: Features, t: Tensor, cond: Conditioning, tome: float) -> Tensor:
        # Zeros keep the latents finite, whatever the solver.
        return self._once(
            ("decode", len(t), len(features.skips), bool(features.shared)),
            lambda: torch.zeros_like(self.network.decode(features, t, cond, tome)),
        )

    def _once(self, key: Hashable, call: Callable[[], T]) -> T:
        if key not in self.results:
            _, first = timed(call, self.device)
            self.results[key], again = timed(call, self.device)
            self.first_calls.setdefault(key, max(0.0, first - again))
            self.seconds += first + again
        return self.results[key]
