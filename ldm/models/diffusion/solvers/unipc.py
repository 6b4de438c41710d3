"""UniPC, the unified predictor-corrector (arXiv 2302.04867)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import factorial

import numpy as np
from torch import Tensor

from ldm.models.diffusion.loop import State
from ldm.models.diffusion.schedule import Node, predict_x0
from ldm.models.diffusion.solvers.exponential import ExponentialStep, Predicts, check_predicts


@dataclass(frozen=True)
class UniPC:
    """A multistep predictor whose last step is corrected by each new prediction, at no extra evaluation.

    predict:  x <- ratio x - scale (psi_1 m + B sum_k p_k (m_k - m) / r_k)
    correct:  the same step again, with its landing as one more point of the sum (r = 1)

    m_k are earlier predictions at places r_k of the step, see `ldm.models.diffusion.solvers.exponential`; B = psi_1
    (the published 'bh2'). The weights p match as many terms of the expansion as there are points, but are 1/2
    where there is one, as published. The corrector is a change of the predicted latents, so that an edit made
    before the prediction stays in them.

    Args:
        nodes: noisiest first; levels strictly fall, none is clean.
        order: of the predictor, 1, 2 or 3; 2 is published for guided sampling. The corrected run converges
            with one more, but for 3, where the first step's error keeps it at 3.
        predicts: what is expanded in lambda, 'x0' or 'eps'; the network may predict either, or v.
        lower_order_final: the last steps are of falling order, ending with 1.

    Raises:
        ValueError: order is not 1, 2 or 3, or predicts is unknown.

    Source: UniPC (arXiv 2302.04867), algorithms 1 and 2, and its published implementation.
    """

    nodes: tuple[Node, ...]
    order: int = 2
    predicts: Predicts = "x0"
    lower_order_final: bool = True

    def __post_init__(self) -> None:
        check_predicts(self.predicts)
        if self.order not in (1, 2, 3):
            raise ValueError(f"order must be 1, 2 or 3; got {self.order}")

    def order_at(self, i: int) -> int:
        """Order of the predictor from node i, and of its corrector."""
        left = len(self.nodes) - i if self.lower_order_final else self.order
        return min(self.order, i + 1, left)

    def step(self, state: State, i: int, eps: Tensor) -> State:
        node = self.nodes[i]
        x0 = predict_x0(state.x, eps, node.abar)  # (B, C, H, W)
        m = eps if self.predicts == "eps" else x0
        x = state.x
        if i > 0:
            leap, slopes, places = self._history(i - 1, state.memory)
            change = weighted(corrector(leap, places), (*slopes, m - state.memory[0]))
            x = x - leap.scale * leap.psi(1) * (change - weighted(predictor(leap, places), slopes))
        values = (m, *state.memory)[: self.order]
        leap, slopes, places = self._history(i, values)
        x = leap.ratio * x - leap.scale * leap.psi(1) * (m + weighted(predictor(leap, places), slopes))
        return State(x, values, x0)

    def _history(self, i: int, values: Sequence[Tensor]) -> tuple[ExponentialStep, list[Tensor], list[float]]:
        """The step from node i: its leap; (m_k - m) / r_k and r_k of the earlier nodes that it uses."""
        node = self.nodes[i]
        leap = ExponentialStep(node.abar, node.abar_next, self.predicts)
        places = [leap.place(self.nodes[i - k].abar) for k in range(1, self.order_at(i))]
        slopes = [(m - values[0]) / r for m, r in zip(values[1:], places, strict=False)]
        return leap, slopes, places


def predictor(leap: ExponentialStep, places: Sequence[float]) -> Sequence[float]:
    return [0.5] * len(places) if len(places) < 2 else weights(leap, places)


def corrector(leap: ExponentialStep, places: Sequence[float]) -> Sequence[float]:
    return [0.5] if not places else weights(leap, [*places, 1.0])


def weights(leap: ExponentialStep, places: Sequence[float]) -> Sequence[float]:
    """p with sum_k p_k r_k^(n-1) = n! psi_{n+1} / psi_1 for n = 1 .. number of places."""
    count = range(1, len(places) + 1)
    moments = [factorial(n) * leap.psi(n + 1) / leap.psi(1) for n in count]
    powers = [[r ** (n - 1) for r in places] for n in count]
    return np.linalg.solve(powers, moments).tolist()


def weighted(factors: Sequence[float], slopes: Sequence[Tensor]) -> Tensor | float:
    return sum(p * slope for p, slope in zip(factors, slopes, strict=True))
