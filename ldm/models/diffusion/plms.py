"""Pseudo linear multistep sampling (arXiv 2202.09778): update rule and published sampler class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

from torch import Tensor

from ldm.models.diffusion.loop import State
from ldm.models.diffusion.sampler import DeterministicSampler
from ldm.models.diffusion.schedule import OF_DDIM, Level, Levels, Node, eps_weight, nodes_between, predict_x0

ADAMS_BASHFORTH = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


@dataclass(frozen=True)
class PLMS:
    """DDIM steps along a noise extrapolated from up to four predictions (Adams-Bashforth, order 1 to 4).

    x <- sqrt(abar' / abar) x + eps_weight(abar, abar') e,   e = (55 e_i - 59 e_{i-1} + 37 e_{i-2} - 9 e_{i-3}) / 24

    The first step has no earlier prediction. It is tried with its own (node 0) and judged where it lands
    (node 1), and then goes along the mean of both. Node 1 moves the tried latents by the difference, so that
    an edit made there stays in them. Its prediction is not kept for later steps, as published.

    Converges with order 2: the coefficients take the levels for evenly spaced.

    Args:
        nodes: of `plms_nodes`, one more than steps.

    Source: PNDM (arXiv 2202.09778), eq. 12, in the form that Stable Diffusion published.
    """

    nodes: tuple[Node, ...]

    def step(self, state: State, i: int, eps: Tensor) -> State:
        node = self.nodes[i]
        if i == 1:
            (first,) = state.memory  # prediction of node 0, (B, C, H, W)
            x = state.x + eps_weight(self.nodes[0].abar, node.abar) * (eps - first) / 2
            return State(x, state.memory, predict_x0(x, (eps + first) / 2, node.abar))
        history = (eps, *state.memory)
        weights = ADAMS_BASHFORTH[len(history) - 1]
        e = sum(w * past for w, past in zip(weights, history, strict=True))  # (B, C, H, W)
        x = sqrt(node.abar_next / node.abar) * state.x + eps_weight(node.abar, node.abar_next) * e
        return State(x, history[:3], predict_x0(state.x, e, node.abar))


def plms_nodes(levels: Sequence[Level]) -> tuple[Node, ...]:
    """Nodes of a grid of levels: one per step, and after the first one more where the first lands.

    With a single step the published code asks the network about where it lands at the timestep where it
    began; here the timestep is that of the landing.
    """
    first, *rest = nodes_between(levels)
    return (first, Node(levels[1].t, levels[1].abar, levels[1].abar), *rest)


class PLMSSampler(DeterministicSampler):
    """PLMS sampling with the published signature.

    A run has one node more than steps: plans, callbacks and intermediates count nodes, and the first is the
    trial of the first step.
    """

    solver = "plms"
    spacings = OF_DDIM

    def rule(self, levels: Levels) -> PLMS:
        return PLMS(plms_nodes(levels))
