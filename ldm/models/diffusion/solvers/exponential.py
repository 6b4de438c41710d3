"""Exponential integration of the sampling ODE over lambda = log(alpha / sigma): DPM-Solver's and UniPC's base.

From level s to level t, h = lambda_t - lambda_s, the linear part of the ODE is solved exactly and the
network's prediction m, as noise or as clean latents, is expanded in lambda:

    x_t = ratio x_s - scale (psi_1 m + psi_2 h m' + psi_3 h^2 m'' + ...)
    psi_1 = exp(z) - 1,   psi_{k+1} = psi_k / z - 1 / k!

    m is eps: ratio = alpha_t / alpha_s, scale = sigma_t, z =  h
    m is x0:  ratio = sigma_t / sigma_s, scale = alpha_t, z = -h

Source: DPM-Solver (arXiv 2206.00927), eq. 3.4 and 3.6; DPM-Solver++ (arXiv 2211.01095), eq. 8 and 9.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import expm1, factorial, sqrt
from typing import Literal, get_args

from torch import Tensor

from ldm.models.diffusion.schedule import log_snr

Predicts = Literal["eps", "x0"]


def check_predicts(predicts: str) -> None:
    if predicts not in get_args(Predicts):
        raise ValueError(f"predicts must be one of {', '.join(get_args(Predicts))}; got {predicts!r}")


@dataclass(frozen=True)
class ExponentialStep:
    """The numbers of one exponential step from alpha-bar `abar` to `abar_next`.

    Clean latents (abar_next = 1) can be reached with predicts 'x0' and psi(1) only.
    """

    abar: float
    abar_next: float
    predicts: Predicts

    @property
    def ratio(self) -> float:
        if self.predicts == "eps":
            return sqrt(self.abar_next / self.abar)
        return sqrt((1 - self.abar_next) / (1 - self.abar))

    @property
    def scale(self) -> float:
        return sqrt(1 - self.abar_next if self.predicts == "eps" else self.abar_next)

    @property
    def h(self) -> float:
        return log_snr(self.abar_next) - log_snr(self.abar)

    @property
    def z(self) -> float:
        return self.h if self.predicts == "eps" else -self.h

    def psi(self, k: int) -> float:
        return expm1(self.z) if k == 1 else self.psi(k - 1) / self.z - 1 / factorial(k - 1)

    def place(self, abar: float) -> float:
        """Where a level is, as lambda: 0 at the beginning of the step, 1 at its end, less than 0 before it."""
        return (log_snr(abar) - log_snr(self.abar)) / self.h


def derivatives(values: Sequence[Tensor], places: Sequence[float]) -> tuple[Tensor, ...]:
    """h m' and h^2 m'' at place 0 of the parabola (or line, or constant: fewer) through 1 to 3 values.

    Args:
        values: predictions, the first at place 0, each (B, C, H, W).
        places: of the others, see `ExponentialStep.place`.
    """
    slopes = [(m - values[0]) / r for m, r in zip(values[1:], places, strict=True)]
    if len(slopes) < 2:
        return tuple(slopes)
    (one, two), (r1, r2) = slopes, places
    return (r2 * one - r1 * two) / (r2 - r1), 2 * (two - one) / (r2 - r1)


def expansion(leap: ExponentialStep, values: Sequence[Tensor], places: Sequence[float]) -> Tensor:
    """psi_1 m + psi_2 h m' + ... with as many terms as there are values, (B, C, H, W)."""
    terms = (values[0], *derivatives(values, places))
    return sum(leap.psi(k) * term for k, term in enumerate(terms, 1))
