"""Heun's method for the sampling ODE (arXiv 2206.00364)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

from torch import Tensor

from ldm.models.diffusion.loop import State
from ldm.models.diffusion.schedule import Level, Node, eps_weight, nodes_between, predict_x0


@dataclass(frozen=True)
class Heun:
    """Two nodes per step: a trial step along the prediction, then the same step along the mean of both ends'.

    x  <- sqrt(abar' / abar) x + eps_weight(abar, abar') e_1
    x  <- x + eps_weight(abar, abar') (e_2 - e_1) / 2

    The second node stands at the level where the first landed and moves the latents by the difference only,
    so that an edit made there stays in them. A step to clean latents has no second node.

    Args:
        nodes: of `heun_nodes`.

    Source: Karras et al. (arXiv 2206.00364), algorithm 1.
    """

    nodes: tuple[Node, ...]

    def step(self, state: State, i: int, eps: Tensor) -> State:
        node = self.nodes[i]
        if node.abar != node.abar_next:
            x = sqrt(node.abar_next / node.abar) * state.x + eps_weight(node.abar, node.abar_next) * eps
            return State(x, (eps,), predict_x0(state.x, eps, node.abar))
        (first,) = state.memory  # prediction at the step's beginning, (B, C, H, W)
        x = state.x + eps_weight(self.nodes[i - 1].abar, node.abar) * (eps - first) / 2
        return State(x, (), predict_x0(state.x, eps, node.abar))


def heun_nodes(levels: Sequence[Level]) -> tuple[Node, ...]:
    """Two nodes per step between levels; one for a step that lands on clean latents."""
    nodes: list[Node] = []
    for node, landing in zip(nodes_between(levels), levels[1:], strict=True):
        nodes.append(node)
        if landing.abar < 1:
            nodes.append(Node(landing.t, landing.abar, landing.abar))
    return tuple(nodes)
