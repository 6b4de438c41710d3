"""What a run keeps of earlier nodes, and the values at later ones that are forecast from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import isfinite, sqrt
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from ldm.models.diffusion.propagation.forecast import METHODS, Forecast, Method, Span
from ldm.models.diffusion.schedule import Node, log_snr
from ldm.modules.diffusionmodules.features import Features


def _times(axis: str, nodes: Sequence[Node]) -> tuple[tuple[float, ...], Span]:
    """The time of every node, and where the run begins and ends."""
    if axis == "step":
        return tuple(map(float, range(len(nodes)))), (0.0, float(len(nodes)))
    if axis == "timestep":
        times = tuple(node.t for node in nodes)
    else:
        times = tuple(log_snr(node.abar) if node.abar > 0 else -float("inf") for node in nodes)
    if not all(map(isfinite, times)):
        raise ValueError("the log-SNR of this run's first or last node is infinite; the axis must be timestep or step")
    return times, (times[0], times[-1])


@dataclass(frozen=True)
class Forecaster:
    """A method on the nodes of one run; times: of every node; span: where the run begins and ends."""

    method: Method
    times: tuple[float, ...]
    span: Span

    @staticmethod
    def of(forecast: Forecast, nodes: Sequence[Node]) -> Forecaster:
        """For a run of these nodes.

        Raises:
            ValueError: the log-SNR of a node is not finite.
        """
        return Forecaster(METHODS[forecast.name], *_times(forecast.axis, nodes))

    def distinct(self, keys: Sequence[int]) -> list[int]:
        """Of these nodes those that are the last at their time: solvers that come back to a time replace its value."""
        last: dict[float, int] = {}
        for key in keys:
            last.pop(self.times[key], None)
            last[self.times[key]] = key
        return [*last.values()]

    def weights(self, keys: Sequence[int], i: int) -> list[float]:
        """Of the values at these nodes, in the value at node i; at the time of the last of them it is that value."""
        if self.times[i] == self.times[keys[-1]]:
            return [0.0] * (len(keys) - 1) + [1.0]
        return self.method.weigh([self.times[k] for k in keys], self.times[i], self.span)


class Sized(Protocol):
    def __len__(self) -> int: ...


T = TypeVar("T", bound=Sized)


def relative_error(guess: Features | Tensor, value: Features | Tensor) -> float:
    """|guess - value| / |value|; of features the root mean square over their tensors."""
    pairs = [(guess, value)] if isinstance(value, Tensor) else zip(guess.tensors, value.tensors, strict=True)
    squares = [_sum_of_squares(a - b) / max(_sum_of_squares(b), 1e-30) for a, b in pairs]
    return sqrt(sum(squares) / len(squares))


def _sum_of_squares(x: Tensor) -> float:
    """In single precision at least: half precision ends at 65504."""
    return float(x.to(torch.promote_types(x.dtype, torch.float32)).square().sum())


@dataclass(frozen=True, eq=False)
class History(Generic[T]):
    """What was computed at the last nodes, and what is forecast from it.

    combine: (values, weights) -> their weighted sum.
    keys:    number and value of the nodes that are kept, oldest first.

    Memory: as many values as the method takes, see `Method.keep`.
    """

    forecaster: Forecaster
    combine: Callable[[Sequence[T], Sequence[float]], T]
    keys: tuple[tuple[int, T], ...] = ()

    def key(self, i: int, value: T) -> History[T]:
        """After one more node that computed its value."""
        # Guidance that begins or ends changes the batch: values before that have nothing to say of those after.
        # Solvers that come back to a time replace its value.
        times = self.forecaster.times
        kept = [old for old in self.keys if len(old[1]) == len(value) and times[old[0]] != times[i]]
        return replace(self, keys=(*kept, (i, value))[-self.forecaster.method.keep :])

    @property
    def last(self) -> T:
        return self.keys[-1][1]

    @property
    def holds(self) -> bool:
        """Whether every forecast is the last value."""
        return self.forecaster.method is METHODS["hold"]

    def at(self, i: int) -> T:
        """The value at node i: where one was computed last, exactly that."""
        numbers = [k for k, _ in self.keys]
        if self.holds or self.forecaster.times[i] == self.forecaster.times[numbers[-1]]:
            return self.last
        weights = self.forecaster.weights(numbers, i)
        return self.last if weights == [1.0] else self.combine([value for _, value in self.keys], weights)

    def with_last(self, value: T) -> History[T]:
        """With another form of the last value."""
        return replace(self, keys=(*self.keys[:-1], (self.keys[-1][0], value)))
