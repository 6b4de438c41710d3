"""Forecasters: what stands in for a value at a node that does not compute it, made of those at the nodes before.

A forecaster is a row of weights over past values. Written NAME[:AXIS][:QUANTITY], as in quadratic:logsnr:eps: the
method, what it takes for time, and, for whole predictions, the quantity that is forecast.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import comb, factorial, isfinite, sqrt
from typing import Annotated, Generic, Protocol, TypeVar

import numpy as np
from pydantic import AfterValidator
from torch import Tensor

from ldm.io.errors import did_you_mean, shown
from ldm.models.diffusion.schedule import Node, log_snr
from ldm.modules.diffusionmodules.features import Features

Times = Sequence[float]
Span = tuple[float, float]


def lagrange(times: Times, t: float, span: Span) -> list[float]:
    """The polynomial of degree len(times) - 1 through all past values, at t; the weights sum to 1."""
    weights = []
    for i, here in enumerate(times):
        weight = 1.0
        for other in [*times[:i], *times[i + 1 :]]:
            weight *= (t - other) / (here - other)
        weights.append(weight)
    return weights


def zeros(times: Times, t: float, span: Span) -> list[float]:
    return [0.0] * len(times)


def taylor(times: Times, t: float, span: Span) -> list[float]:
    """A Taylor polynomial at the last key node, its derivatives by differences; the weights sum to 1.

    The i-th derivative at a key node is the difference of the (i-1)-th ones there and at the key node before, over the
    time between the two. It is exact for degree 1: a backward difference is not the derivative where it is used.

    Source: TaylorSeer (arXiv 2503.06923); the recursion is its released code's.
    """
    rows = np.eye(len(times))  # [i]: the value at key node i, as weights over the values
    derivatives: list[np.ndarray] = []  # at the key node reached, the value first
    for i, row in enumerate(rows):
        new = [row]
        for before in derivatives:
            new.append((new[-1] - before) / (times[i] - times[i - 1]))
        derivatives = new
    step = t - times[-1]
    return sum(step**i / factorial(i) * row for i, row in enumerate(derivatives)).tolist()


def adams_bashforth(times: Times, t: float, span: Span) -> list[float]:
    """Binomial weights, 2 and -1 of the last two values, 3, -3 and 1 of the last three, at every distance.

    They continue equally spaced values by one distance, exactly for polynomials of degree len(times) - 1, and sum to 1.

    Source: AB-Cache (arXiv 2504.10540). The weights of two values are those of its released code as others describe it;
    the paper's higher orders are taken to be the same rule, which has the error O(h^k) that it states.
    """
    k = len(times)
    return [float((-1) ** (j + 1) * comb(k, j)) for j in range(k, 0, -1)]


BASES, RIDGE = 4, 0.1  # highest Chebyshev polynomial and ridge weight of Spectrum's released configuration


def chebyshev(times: Times, t: float, span: Span) -> list[float]:
    """The Chebyshev polynomials T_0..T_4 fitted to all past values by ridge regression, at t.

    The span of the run is mapped to [-1, 1]. The ridge shrinks the constant too: the weights sum to less than 1, with
    few values by a tenth. Of a single value nothing is fitted: it is held.

    Source: Spectrum (arXiv 2603.01623), with M = 4 and lambda = 0.1 as in its released configuration. That maps step
    0..50 to [-1, 1] whatever the run; here it is 0..steps (on the axis `step`).
    """
    if len(times) < 2:
        return [1.0]
    first, last = span
    taus = (2 * np.array([*times, t]) - first - last) / (last - first)
    basis = np.polynomial.chebyshev.chebvander(taus, BASES)
    past, new = basis[:-1], basis[-1]
    return (new @ np.linalg.solve(past.T @ past + RIDGE * np.eye(BASES + 1), past.T)).tolist()


def spectrum(times: Times, t: float, span: Span, share: float = 0.5) -> list[float]:
    """`chebyshev` and the line through the last two values, mixed.

    Source: Spectrum (arXiv 2603.01623); the share of 0.5 is that of the released script for Stable Diffusion XL.
    """
    line = [0.0] * (len(times) - 2) + lagrange(times[-2:], t, span)
    return [share * a + (1 - share) * b for a, b in zip(chebyshev(times, t, span), line, strict=True)]


@dataclass(frozen=True)
class Method:
    """A forecaster's rule.

    weigh: (times of past values, new time, first and last time of the run) -> weight of each value. With fewer values
        than `keep` it is that of the lower degree or order that they allow.
    keep:  past values that it takes at most.
    axis:  what is time, unless it is said.
    """

    weigh: Callable[[Times, float, Span], list[float]]
    keep: int
    axis: str = "timestep"


METHODS = {
    "hold": Method(lagrange, 1),
    "linear": Method(lagrange, 2),
    "quadratic": Method(lagrange, 3),
    "cubic": Method(lagrange, 4),
    "taylor1": Method(taylor, 2, "step"),
    "taylor2": Method(taylor, 3, "step"),
    "taylor3": Method(taylor, 4, "step"),
    "ab2": Method(adams_bashforth, 2, "step"),
    "ab3": Method(adams_bashforth, 3, "step"),
    "ab4": Method(adams_bashforth, 4, "step"),
    "chebyshev": Method(chebyshev, 100, "step"),
    "spectrum": Method(spectrum, 100, "step"),
    "zeros": Method(zeros, 1),
}
AXES = ("timestep", "logsnr", "step")
QUANTITIES = ("v", "eps", "x0")
GRAMMAR = "NAME[:AXIS][:QUANTITY]"


@dataclass(frozen=True)
class Forecast:
    """How values between key nodes are forecast.

    name:     one of METHODS.
    axis:     what is time: 'timestep' as the network gets it, 'logsnr' = log(alpha / sigma), 'step' = the number of
        the node.
    quantity: of whole predictions, what is forecast: 'v', 'eps', 'x0', or '' = what the network predicts.
    """

    name: str = "hold"
    axis: str = "timestep"
    quantity: str = ""

    @staticmethod
    def parse(text: str) -> Forecast:
        """The forecaster that a text such as quadratic:logsnr:eps names.

        Raises:
            ValueError: a word is unknown, or out of place.
        """
        name, *words = text.split(":") if isinstance(text, str) else [text]
        if name not in METHODS:
            known = did_you_mean(name, METHODS) if isinstance(name, str) else ""
            raise ValueError(f"a forecaster must be one of {', '.join(METHODS)}; got {shown(name)}{known}")
        forecast = Forecast(name, METHODS[name].axis)
        for field, known in (("axis", AXES), ("quantity", QUANTITIES)):
            if words and words[0] in known:
                forecast = replace(forecast, **{field: words.pop(0)})
        if words:
            raise ValueError(
                f"a forecaster is {GRAMMAR}, with the axis one of {', '.join(AXES)} and the quantity one of "
                f"{', '.join(QUANTITIES)}; got {shown(text)}"
            )
        return forecast

    def on(self, nodes: Sequence[Node]) -> Forecaster:
        """For a run of these nodes.

        Raises:
            ValueError: the log-SNR of a node is not finite.
        """
        return Forecaster(METHODS[self.name], *_times(self.axis, nodes))


def _checked(text: str) -> str:
    try:
        Forecast.parse(text)
    except ValueError as error:
        raise ValueError(f"should be a forecaster: {error}") from None
    return text


ForecastName = Annotated[str, AfterValidator(_checked)]  # for what is read from files


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

    def weights(self, keys: Sequence[int], i: int) -> list[float]:
        """Of the values at these nodes, in the value at node i."""
        return self.method.weigh([self.times[k] for k in keys], self.times[i], self.span)


class Sized(Protocol):
    def __len__(self) -> int: ...


T = TypeVar("T", bound=Sized)


def relative_error(guess: Features | Tensor, value: Features | Tensor) -> float:
    """|guess - value| / |value|; of features the root mean square over their tensors."""
    pairs = [(guess, value)] if isinstance(value, Tensor) else zip(guess.tensors, value.tensors, strict=True)
    squares = [float((a - b).square().sum() / b.square().sum()) for a, b in pairs]
    return sqrt(sum(squares) / len(squares))


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
