"""Changes to the latents beside the solver's own steps: prior noise injection, inpainting."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from ldm.models.diffusion.schedule import Node, diffuse

Moment = Literal["before", "after", "update"]


@dataclass(frozen=True)
class Edit:
    """A change of the latents at one moment of every node.

    apply: (x, node) -> latents of the same shape, (B, C, H, W); never changes x in place.
    when:  'before': when the node begins, so that a key node's encoder sees the change;
           'after': after the prediction, just before the solver's step;
           'update': after the solver's step; `node` is the node just stepped.
    """

    apply: Callable[[Tensor, Node], Tensor]
    when: Moment = "before"

    def __post_init__(self) -> None:
        if self.when not in get_args(Moment):
            raise ValueError(f"when must be one of {', '.join(get_args(Moment))}; got {self.when!r}")

    def __call__(self, x: Tensor, node: Node) -> Tensor:
        return self.apply(x, node)


def prior_noise(x_T: Tensor, weight: float = 0.003, below: float = 500, when: Moment = "before") -> Edit:
    """Add a little of the starting noise back late in sampling.

    x <- x + weight * x_T   for nodes with t < below

    Args:
        x_T: the latent that sampling began from, (B, C, H, W), unit variance.
        weight: share of x_T per node, dimensionless; 0 = off.
        below: training timestep, 0..T-1; half of T = 1000 as published.
        when: published orders: 'before' the prediction (serial release), 'after' it (parallel and ControlNet
            releases), 'update' (the latent-diffusion fork, with below=150).

    Raises:
        ValueError: weight is negative, or (when called) x and x_T differ in shape.

    Source: Faster Diffusion (arXiv 2312.09608), prior noise injection.
    """
    if weight < 0:
        raise ValueError(f"noise weight must be 0 or more; got {weight}")

    def inject(x: Tensor, node: Node) -> Tensor:
        if x.shape != x_T.shape:
            raise ValueError(f"x_T {tuple(x_T.shape)} and the latents {tuple(x.shape)} must have the same shape")
        return x + weight * x_T if node.t < below else x

    return Edit(inject, when)


def inpainting(x0: Tensor, mask: Tensor, noise: Callable[[Tensor, Node], Tensor]) -> Edit:
    """Keep a region: before every prediction it is replaced by x0 at the node's noise level.

    x <- mask * diffuse(x0) + (1 - mask) * x

    There is no replacement after the last step, as published.

    Args:
        x0: clean latent to keep, (B, C, H, W).
        mask: 1 keeps x0, 0 is painted anew; (B, 1, H, W) or anything that broadcasts to x0.
        noise: (x, node) -> unit normal noise like x.
    """

    def keep(x: Tensor, node: Node) -> Tensor:
        return mask * diffuse(x0, noise(x, node), node.abar) + (1 - mask) * x

    return Edit(keep, "before")
