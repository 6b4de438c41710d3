"""Forecasters: what stands in for a value at a node that does not compute it, made of those at the nodes before.

A forecaster is a row of weights over past values. Written NAME[:AXIS][:QUANTITY], as in quadratic:logsnr:eps: the
method, what it takes for time, and, for whole predictions, the quantity that is forecast. No tensor is known here;
`History` sums values with these weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import comb, factorial
from typing import Annotated

import numpy as np
from pydantic import AfterValidator

from ldm.io.errors import did_you_mean, shown

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
POLYNOMIALS = ("hold", "linear", "quadratic", "cubic")  # of METHODS
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


def _checked(text: str) -> str:
    try:
        Forecast.parse(text)
    except ValueError as error:
        raise ValueError(f"should be a forecaster: {error}") from None
    return text


ForecastName = Annotated[str, AfterValidator(_checked)]  # for what is read from files
