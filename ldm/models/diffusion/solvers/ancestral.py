"""Ancestral sampling: the reverse of the forward process, one noisy step after the other (DDPM)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import log, sqrt

from torch import Tensor

from ldm.models.diffusion.loop import State
from ldm.models.diffusion.schedule import Node, ddim_sigma, predict_x0


def posterior_mean(x: Tensor, x0: Tensor, node: Node) -> Tensor:
    """The mean of q(x' | x, x0) where a step from this node lands; all (B, C, H, W). DDPM (arXiv 2006.11239), eq. 7."""
    a = node.abar / node.abar_next
    to_x0, to_x = sqrt(node.abar_next) * (1 - a), sqrt(a) * (1 - node.abar_next)
    return (to_x0 * x0 + to_x * x) / (1 - node.abar)


@dataclass(frozen=True)
class Ancestral:
    """A draw from the forward process's posterior q(x' | x, x0), with the predicted x0.

    x <- sqrt(abar') (1 - a) / (1 - abar) x0 + sqrt(a) (1 - abar') / (1 - abar) x + sigma * noise
    a = abar / abar',   sigma^2 = (1 - abar') / (1 - abar) (1 - a)

    Over every training timestep this is DDPM; over fewer, DDPM with respaced timesteps. Without clipping it is
    DDIM with eta 1, and on a grid of `sigma_levels` it is known as Euler ancestral, whose formula is the same.

    Args:
        nodes: noisiest first; one that lands on clean latents adds no noise.
        noise: (i, x) -> unit normal noise of node i, like x.
        clip: clip x0 to [-1, 1] (published as clip_denoised), for models of pixels.

    Raises:
        ValueError: no source of noise.

    Source: DDPM (arXiv 2006.11239), eq. 6 and 7.
    """

    nodes: tuple[Node, ...]
    noise: Callable[[int, Tensor], Tensor] | None
    clip: bool = False

    def __post_init__(self) -> None:
        if self.noise is None:
            raise ValueError("ancestral sampling needs noise, the source of each node's fresh noise")

    def step(self, state: State, i: int, eps: Tensor) -> State:
        node = self.nodes[i]
        x0 = predict_x0(state.x, eps, node.abar)  # (B, C, H, W)
        if self.clip:
            x0 = x0.clamp(-1, 1)
        x = posterior_mean(state.x, x0, node)
        if node.abar_next < 1:
            x = x + ddim_sigma(node, eta=1) * self.noise(i, state.x)
        return State(x, x0=x0)


def log_variance(v: Tensor, node: Node) -> Tensor:
    """The logarithm of the variance that a network means by v, where a step lands on noisy latents; like v.

    -1 stands for that of the forward process's posterior, 1 for that of the forward process itself. v is not clamped.
    """
    lower, upper = 2 * log(ddim_sigma(node, eta=1)), log(1 - node.abar / node.abar_next)
    return lower + (v + 1) / 2 * (upper - lower)


@dataclass(frozen=True)
class LearnedVariance:
    """Ancestral sampling whose noise has the variance that the network predicts.

    eps of `step` has a channel of the variance for each of the noise behind it, (B, 2 C, H, W).

    Args:
        nodes: noisiest first; one that lands on clean latents adds no noise.
        noise: (i, x) -> unit normal noise of node i, like x.

    Raises:
        ValueError: no source of noise; or (in step) a prediction without a variance.

    Source: Nichol and Dhariwal (arXiv 2102.09672), eq. 15.
    """

    nodes: tuple[Node, ...]
    noise: Callable[[int, Tensor], Tensor] | None

    def __post_init__(self) -> None:
        if self.noise is None:
            raise ValueError("ancestral sampling needs noise, the source of each node's fresh noise")

    def step(self, state: State, i: int, eps: Tensor) -> State:
        channels = state.x.shape[1]
        if eps.shape[1] != 2 * channels:
            raise ValueError(f"a predicted variance needs {2 * channels} channels; the network gives {eps.shape[1]}")
        node = self.nodes[i]
        x0 = predict_x0(state.x, eps[:, :channels], node.abar)  # (B, C, H, W)
        x = posterior_mean(state.x, x0, node)
        if node.abar_next < 1:
            x = x + (log_variance(eps[:, channels:], node) / 2).exp() * self.noise(i, state.x)
        return State(x, x0=x0)
