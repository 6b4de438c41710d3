"""DPM-Solver (arXiv 2206.00927) and DPM-Solver++ (arXiv 2211.01095): multistep and singlestep update rules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import inf
from typing import Literal, get_args

from torch import Tensor

from ldm.models.diffusion.loop import State
from ldm.models.diffusion.schedule import Node, NoiseSchedule, check_steps, nodes_between, predict_x0
from ldm.models.diffusion.solvers.exponential import ExponentialStep, Predicts, check_predicts, derivatives, expansion

Variant = Literal["dpmsolver", "taylor"]
PUBLISHED_BELOW = 15  # the published code ends with lower order in runs of fewer steps than this


@dataclass(frozen=True)
class _DPMSolver:
    """What the two rules share.

    Args:
        nodes: noisiest first.
        predicts: what is expanded in lambda: 'eps' is DPM-Solver, 'x0' is DPM-Solver++. The network may
            predict either, or v.
        variant: weights of the expansion's higher terms: 'taylor' are the exact ones, 'dpmsolver' those of the
            papers' algorithms.

    Raises:
        ValueError: an unknown predicts or variant.
    """

    nodes: tuple[Node, ...]
    predicts: Predicts = "x0"
    variant: Variant = "dpmsolver"

    def __post_init__(self) -> None:
        check_predicts(self.predicts)
        if self.variant not in get_args(Variant):
            raise ValueError(f"variant must be one of {', '.join(get_args(Variant))}; got {self.variant!r}")

    def _predictions(self, x: Tensor, eps: Tensor, node: Node) -> tuple[Tensor, Tensor]:
        """The clean latents at a node, and what is expanded; both (B, C, H, W)."""
        x0 = predict_x0(x, eps, node.abar)
        return x0, eps if self.predicts == "eps" else x0


@dataclass(frozen=True)
class DPMMultistep(_DPMSolver):
    """The expansion's derivatives come from the predictions at earlier nodes: one node per step.

    x <- ratio x - scale (psi_1 m + ...), see `ldm.models.diffusion.solvers.exponential`, of order

        1: psi_1 m, which is the deterministic DDIM
        2: + psi_1 / 2 h m' ('dpmsolver') or + psi_2 h m' ('taylor')
        3: + psi_2 h m' + psi_3 / 2 h^2 m'' ('dpmsolver') or + psi_2 h m' + psi_3 h^2 m'' ('taylor')

    The first steps have fewer earlier nodes and lower order; the very first one's error is of order 2. Order 3
    as published counts half of the second derivative and so has order 2 throughout ('dpmsolver'); 'taylor',
    which the published code takes there and ignores, has order 3 after the first two steps.

    Args:
        nodes, predicts, variant: see `_DPMSolver`. The last may land on clean latents with 'x0'; a
            step that does is of order 1.
        order: 1, 2 or 3.
        lower_order_below: in a run of fewer steps than this the last ones are of falling order, ending with 1: in
            every run, or none (0). The published code has it in runs of fewer than 15 (`PUBLISHED_BELOW`), and stops
            with an error there for order 3, and where steps are fewer than the order. On levels that are evenly
            spaced in time, longer runs of the published rule have a larger error than runs of 14 steps.

    Raises:
        ValueError: see `_DPMSolver`; an order that is not 1, 2 or 3.

    Source: DPM-Solver++ (arXiv 2211.01095), algorithm 2 and appendix; published implementation.
    """

    order: int = 2
    lower_order_below: float = inf

    def __post_init__(self) -> None:
        super().__post_init__()
        check_order(self.order)

    def order_at(self, i: int) -> int:
        """Order of the step from node i."""
        left = len(self.nodes) - i
        if self.nodes[i].abar_next == 1:
            return 1
        if len(self.nodes) < self.lower_order_below:
            return min(self.order, i + 1, left)
        return min(self.order, i + 1)

    def step(self, state: State, i: int, eps: Tensor) -> State:
        node = self.nodes[i]
        x0, m = self._predictions(state.x, eps, node)
        leap = ExponentialStep(node.abar, node.abar_next, self.predicts)
        values = (m, *state.memory)
        used = values[: self.order_at(i)]
        places = [leap.place(self.nodes[i - j].abar) for j in range(1, len(used))]
        x = leap.ratio * state.x - leap.scale * self._terms(leap, used, places)
        return State(x, values[: self.order - 1], x0)

    def _terms(self, leap: ExponentialStep, values: Sequence[Tensor], places: Sequence[float]) -> Tensor:
        if self.variant == "taylor":
            return expansion(leap, values, places)
        weights = (leap.psi(1) / 2,) if len(values) == 2 else (leap.psi(2), leap.psi(3) / 2)
        higher = zip(weights, derivatives(values, places), strict=False)  # fewer derivatives at order 1
        return leap.psi(1) * values[0] + sum(w * d for w, d in higher)


@dataclass(frozen=True)
class DPMSinglestep(_DPMSolver):
    """The expansion's derivatives come from nodes inside the step: as many nodes per step as its order.

    x <- ratio x - scale (psi_1 m + ...), see `ldm.models.diffusion.solvers.exponential`; m_1, m_2 are predictions at
    places r_1, r_2 of the step, on the way to which the latents are taken with the terms known by then:

        2: + psi_1 / 2 (m_1 - m) / r_1 ('dpmsolver') or + psi_2 (m_1 - m) / r_1 ('taylor')
        3: + psi_2 (m_2 - m) / r_2 ('dpmsolver'), or + psi_2 h m' + psi_3 h^2 m'' of the parabola ('taylor')

    From a node inside a step the latents go back to the step's beginning along the terms that brought them,
    and from there to the next place. So only predictions are remembered, and an edit made inside a step stays
    in the latents.

    Args:
        nodes, predicts, variant: see `_DPMSolver`.
        spans: for each node the nodes of its step; `singlestep_nodes` makes both.

    Source: DPM-Solver (arXiv 2206.00927), algorithms 1 and 2, appendix; published implementation.
    """

    spans: tuple[range, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.spans) != len(self.nodes):
            raise ValueError(f"spans must be one per node; got {len(self.spans)} for {len(self.nodes)}")

    def step(self, state: State, i: int, eps: Tensor) -> State:
        x0, m = self._predictions(state.x, eps, self.nodes[i])
        begin, end = self.spans[i].start, self.spans[i][-1]
        x, values = state.x, (m,)
        if i > begin:
            values = (*state.memory, m)
            leap, terms = self._move(i - 1, state.memory)
            x = (x + leap.scale * terms) / leap.ratio
        leap, terms = self._move(i, values)
        return State(leap.ratio * x - leap.scale * terms, () if i == end else values, x0)

    def _move(self, i: int, values: Sequence[Tensor]) -> tuple[ExponentialStep, Tensor]:
        """The leap from the beginning of node i's step to where node i lands, and its terms, (B, C, H, W)."""
        span = self.spans[i]
        leap = ExponentialStep(self.nodes[span.start].abar, self.nodes[i].abar_next, self.predicts)
        places = [leap.place(self.nodes[j].abar) for j in range(span.start + 1, i + 1)]
        if self.variant == "dpmsolver" and i == span[-1]:
            if len(values) == 2:
                slope = (values[1] - values[0]) / places[0]
                return leap, leap.psi(1) * (values[0] + slope / 2)
            if len(values) == 3:
                values, places = values[::2], places[1:]
        return leap, expansion(leap, values, places)


def singlestep_nodes(
    schedule: NoiseSchedule, steps: int, order: int, skip_type: str = "logSNR", fixed: bool = False
) -> tuple[tuple[Node, ...], tuple[range, ...]]:
    """Nodes of a singlestep run from time 1 to the first training timestep, and the span of each node's step.

    Args:
        steps: network evaluations, which is the number of nodes.
        order: of the steps, 1, 2 or 3; the last one or two are of lower order so that `steps` comes out.
        skip_type: see `NoiseSchedule.times`; for the steps and for the nodes inside them.
        fixed: every step of the same order; steps // order * order evaluations ('singlestep_fixed').

    Raises:
        ValueError: an order that is not 1, 2 or 3, or steps or skip type out of range.
    """
    check_order(order)
    check_steps(steps, schedule.total)
    if fixed:
        if steps < order:
            raise ValueError(f"steps must be at least the order {order}; got {steps}")
        orders = [order] * (steps // order)
    else:
        orders = singlestep_orders(steps, order)
    if fixed or skip_type == "logSNR":
        outer = schedule.times(len(orders), skip_type)
    else:
        fine = schedule.times(steps, skip_type)
        outer = [fine[i] for i in accumulate(orders, initial=0)]
    spans = singlestep_spans(orders)
    nodes: list[Node] = []
    for n, (begin, end) in zip(orders, pairwise(outer), strict=True):
        nodes += nodes_between([schedule.level(time) for time in schedule.times(n, skip_type, begin, end)])
    return tuple(nodes), spans


def singlestep_spans(orders: Sequence[int]) -> tuple[range, ...]:
    """For each node of steps of these orders the nodes of its step."""
    steps = (range(first, first + n) for first, n in zip(accumulate(orders, initial=0), orders, strict=False))
    return tuple(step for step in steps for _ in step)


def singlestep_orders(steps: int, order: int) -> list[int]:
    """Orders that sum to `steps`: as many of the wanted as fit, then lower ones; for 3 never ending in 3."""
    if order == 3 and steps % 3 == 0:
        return [3] * (steps // 3 - 1) + [2, 1]
    return [order] * (steps // order) + [steps % order] * (steps % order > 0)


def check_order(order: int) -> None:
    if order not in (1, 2, 3):
        raise ValueError(f"order must be 1, 2 or 3; got {order}")
