"""Where a run evaluates the network: timestep grids, the noise levels at their nodes, one step between them.

Notation: a latent at noise level abar (alpha-bar) is x = sqrt(abar) * x0 + sqrt(1 - abar) * eps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np
from torch import Tensor


@dataclass(frozen=True)
class Node:
    """One evaluation of the network.

    t:         training timestep that the network is told, 0..T-1, possibly fractional.
    abar:      alpha-bar of the latent that is evaluated, in (0, 1].
    abar_next: alpha-bar where the update that follows lands, in (0, 1].
    """

    t: float
    abar: float
    abar_next: float


def ddim_timesteps(steps: int, total: int = 1000, method: str = "uniform") -> tuple[int, ...]:
    """The published timestep grids, ascending, each shifted by one so that it ends at t = 1.

    'uniform': every (total // steps)-th timestep. When `steps` does not divide `total` this is more than
        `steps` timesteps (30 of 1000 gives 31), as in the published code.
    'quad': `steps` timesteps whose square roots are evenly spaced up to 0.8 * total; for large `steps` some
        repeat.

    Where the shift would leave the table (uniform, 333 or 1000 of 1000: timestep 1000) the published code
    stops with an index error; here such a grid is left unshifted and begins at t = 0.

    Raises:
        ValueError: `steps` is not in 1..total, or the method is unknown.

    Source: DDIM (arXiv 2010.02502), section 4.2 and appendix D.3.
    """
    if not 1 <= steps <= total:
        raise ValueError(f"steps must be 1..{total}, the timesteps that the model was trained with; got {steps}")
    if method == "uniform":
        grid = np.arange(0, total, total // steps)
    elif method == "quad":
        grid = (np.linspace(0, np.sqrt(0.8 * total), steps) ** 2).astype(int)
    else:
        raise ValueError(f"timestep grid must be 'uniform' or 'quad'; got {method!r}")
    shift = 1 if grid[-1] + 1 < total else 0
    return tuple(int(t) + shift for t in grid)


def ddim_nodes(alphas_cumprod: Tensor, timesteps: Sequence[int], abar_end: float | None = None) -> tuple[Node, ...]:
    """Nodes from the noisiest to the cleanest timestep, each landing on the next one's level.

    Args:
        alphas_cumprod: alpha-bar of every training timestep, (T,).
        timesteps: ascending, each 0..T-1.
        abar_end: where the last update lands; alphas_cumprod[0] if None, as published (not 1).
    """
    abar = [float(alphas_cumprod[t]) for t in timesteps]
    landings = [float(alphas_cumprod[0]) if abar_end is None else abar_end, *abar[:-1]]
    return tuple(map(Node, reversed(timesteps), reversed(abar), reversed(landings)))


def ddim_sigma(node: Node, eta: float) -> float:
    """Standard deviation of the fresh noise in one step; eta 0 = deterministic, 1 = ancestral.

    Source: DDIM (arXiv 2010.02502), eq. 16.
    """
    return eta * sqrt((1 - node.abar_next) / (1 - node.abar) * max(0.0, 1 - node.abar / node.abar_next))


def predict_x0(x: Tensor, eps: Tensor, abar: float) -> Tensor:
    """The clean latent that x at level abar holds if its noise is eps; all (B, C, H, W)."""
    return (x - sqrt(1 - abar) * eps) / sqrt(abar)


def diffuse(x0: Tensor, eps: Tensor, abar: float | Tensor) -> Tensor:
    """x0 brought to noise level abar by the noise eps, (B, C, H, W); abar may be per image, (B, 1, 1, 1)."""
    return abar**0.5 * x0 + (1 - abar) ** 0.5 * eps
