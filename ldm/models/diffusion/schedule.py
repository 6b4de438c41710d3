"""Where a run evaluates the network: timesteps and noise levels, the nodes on them, how its steps are spread; noise.

A latent at noise level abar (alpha-bar) is x = alpha x0 + sigma eps, with alpha = sqrt(abar), sigma = sqrt(1 - abar).
Three measures of the level are used beside abar: the noise of x / alpha, here `noise_ratio` (sigma of the
variance-exploding literature); lambda = log(alpha / sigma), half the log signal-to-noise ratio; and time, 0..1.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from math import exp, inf, log, log1p, sqrt
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

KARRAS_RHO = 7.0  # of Karras et al.
SKIP_TYPES = ("time_uniform", "logSNR", "time_quadratic", "karras")


@dataclass(frozen=True)
class Node:
    """One evaluation of the network.

    t:         training timestep that the network gets, 0..T-1, possibly fractional.
    abar:      alpha-bar of the latent that is evaluated, in (0, 1].
    abar_next: alpha-bar where the update that follows lands, in (0, 1].
    """

    t: float
    abar: float
    abar_next: float


class Level(NamedTuple):
    """A noise level: the training timestep that the network gets there, possibly fractional; alpha-bar."""

    t: float
    abar: float


CLEAN = Level(0, 1.0)


def timesteps_of(nodes: Sequence[Node]) -> list[float]:
    """The nodes' training timesteps, to a thousandth, by which two runs are told apart."""
    return [round(node.t, 3) for node in nodes]


def nodes_between(levels: Sequence[Level]) -> tuple[Node, ...]:
    """One node per step of a grid of levels, noisiest first: evaluated at a level, landing on the next."""
    return tuple(Node(here.t, here.abar, there.abar) for here, there in pairwise(levels))


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


def leading(steps: int, offset: int = 0, total: int = 1000) -> tuple[int, ...]:
    """Every (total // steps)-th timestep from `offset` up, `steps` of them, noisiest first: diffusers' "leading".

    Raises:
        ValueError: `steps` is not in 1..total.
    """
    check_steps(steps, total)
    return tuple(i * (total // steps) + offset for i in reversed(range(steps)))


def ddim_levels(alphas_cumprod: Tensor, timesteps: Sequence[int], end: Level | None = None) -> tuple[Level, ...]:
    """The levels of ascending timesteps, noisiest first, and the level where the last step lands.

    Args:
        alphas_cumprod: alpha-bar of every training timestep, (T,).
        timesteps: ascending, each 0..T-1, such as `ddim_timesteps`.
        end: timestep 0 if None, as published; not `CLEAN`.
    """
    levels = [Level(t, float(alphas_cumprod[t])) for t in reversed(timesteps)]
    return (*levels, end or Level(0, float(alphas_cumprod[0])))


def ddim_nodes(alphas_cumprod: Tensor, timesteps: Sequence[int], end: Level | None = None) -> tuple[Node, ...]:
    """The nodes of a DDIM run; arguments as for `ddim_levels`."""
    return nodes_between(ddim_levels(alphas_cumprod, timesteps, end))


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


def noise_ratio(abar: float) -> float:
    """Standard deviation of the noise in x / sqrt(abar); 0 for clean latents."""
    return sqrt((1 - abar) / abar)


def log_snr(abar: float) -> float:
    """lambda = log(alpha / sigma); infinite for clean latents."""
    return inf if abar == 1 else 0.5 * log(abar / (1 - abar))


def eps_weight(abar: float, abar_next: float) -> float:
    """How far a step from abar to abar_next goes along the predicted noise.

    The deterministic DDIM step, which is Euler's in x / alpha over noise_ratio, is
    x <- sqrt(abar_next / abar) x + eps_weight eps.
    """
    return sqrt(abar_next) * (noise_ratio(abar_next) - noise_ratio(abar))


class NoiseSchedule:
    """The trained noise levels made continuous in time, as DPM-Solver sees them.

    Training timestep i of N is time (i + 1) / N; between them log alpha is linear in time, and beyond the
    first and the last as in their neighbourhood.

    Args:
        alphas_cumprod: alpha-bar of every training timestep, (N,), falling, each in (0, 1).

    Source: DPM-Solver (arXiv 2206.00927), appendix D.
    """

    def __init__(self, alphas_cumprod: Tensor) -> None:
        self.total = len(alphas_cumprod)
        self._times = np.arange(1, self.total + 1) / self.total
        self._log_alphas = 0.5 * np.log(alphas_cumprod.cpu().double().numpy())

    def level(self, time: float) -> Level:
        log_alpha = interpolate(time, self._times, self._log_alphas)
        return Level(time * self.total - 1, exp(2 * log_alpha))

    def time_of(self, lam: float) -> float:
        """The time at which log_snr is lam."""
        log_alpha = -0.5 * (log1p(exp(-2 * abs(lam))) + max(0.0, -2 * lam))
        return interpolate(log_alpha, self._log_alphas[::-1], self._times[::-1])

    def times(
        self, steps: int, skip_type: str = "time_uniform", begin: float = 1.0, end: float | None = None
    ) -> list[float]:
        """steps + 1 times from begin down to end.

        Args:
            skip_type: evenly spaced in time ('time_uniform'), in lambda ('logSNR'), in the square root of time
                ('time_quadratic') or in the seventh root of noise_ratio ('karras').
            end: the first training timestep, 1 / N, if None.

        Raises:
            ValueError: steps is not in 1..N, or the skip type is unknown.
        """
        check_steps(steps, self.total)
        end = 1 / self.total if end is None else end
        if skip_type == "time_uniform":
            between = np.linspace(begin, end, steps + 1)
        elif skip_type == "time_quadratic":
            between = np.linspace(sqrt(begin), sqrt(end), steps + 1) ** 2
        elif skip_type in ("logSNR", "karras"):
            lambdas = _lambdas_between(self.level(begin).abar, self.level(end).abar, steps, skip_type == "karras")
            between = map(self.time_of, lambdas)
        else:
            raise ValueError(f"skip_type must be one of {', '.join(SKIP_TYPES)}; got {skip_type!r}")
        return [begin, *map(float, [*between][1:-1]), end]

    def levels(self, steps: int, skip_type: str = "time_uniform") -> tuple[Level, ...]:
        """The levels of a run from time 1 to the first training timestep; see `times`.

        As published. diffusers rounds the timesteps of DPM-Solver and UniPC to trained ones, and without
        final_sigmas_type 'sigma_min' the last step goes on to clean latents.
        """
        return tuple(map(self.level, self.times(steps, skip_type)))


def _lambdas_between(abar: float, abar_next: float, steps: int, karras: bool) -> np.ndarray:
    """steps + 1 values of lambda between two levels: evenly spaced, or evenly in noise_ratio to the power 1 / rho."""
    if not karras:
        return np.linspace(log_snr(abar), log_snr(abar_next), steps + 1)
    roots = (noise_ratio(level) ** (1 / KARRAS_RHO) for level in (abar, abar_next))
    return -KARRAS_RHO * np.log(np.linspace(*roots, steps + 1))


def interpolate(x: float, xs: np.ndarray, ys: np.ndarray) -> float:
    """Piecewise linear through (xs, ys), xs rising; beyond the ends the outermost pieces go on."""
    i = int(np.clip(np.searchsorted(xs, x), 1, len(xs) - 1))
    return float(ys[i - 1] + (x - xs[i - 1]) * (ys[i] - ys[i - 1]) / (xs[i] - xs[i - 1]))


def sigma_levels(alphas_cumprod: Tensor, steps: int) -> tuple[Level, ...]:
    """Timesteps evenly spaced from the last to 0, then clean; log noise_ratio is linear in between.

    In diffusers it is noise_ratio itself that is linear there, and a run begins from sigma / sqrt(1 + sigma^2)
    times unit noise, not from unit noise.

    Source: k-diffusion's grid for models with discrete timesteps.
    """
    log_sigmas = _log_noise_ratios(alphas_cumprod)
    check_steps(steps, len(log_sigmas))
    ts = np.linspace(len(log_sigmas) - 1, 0, steps)
    sigmas = np.exp(np.interp(ts, np.arange(len(log_sigmas)), log_sigmas))
    return (*map(Level, ts.tolist(), (1 / (1 + sigmas**2)).tolist()), CLEAN)


def trailing_levels(alphas_cumprod: Tensor, steps: int) -> tuple[Level, ...]:
    """Whole timesteps evenly spaced from the last, as 999, 979, .., 19 for 50 of 1000; then clean.

    Source: the sampling code of SDXL (arXiv 2307.01952), which rounds down.
    """
    total = len(alphas_cumprod)
    check_steps(steps, total)
    ts = np.linspace(total - 1, 0, steps, endpoint=False).astype(int)
    return ddim_levels(alphas_cumprod, ts[::-1].tolist(), CLEAN)


def karras_levels(alphas_cumprod: Tensor, steps: int, rho: float = KARRAS_RHO) -> tuple[Level, ...]:
    """noise_ratio to the power 1 / rho evenly spaced over the trained range, then clean.

    The timestep is found by interpolation of log noise_ratio; diffusers rounds it.

    Source: Karras et al. (arXiv 2206.00364), eq. 5.
    """
    log_sigmas = _log_noise_ratios(alphas_cumprod)
    check_steps(steps, len(log_sigmas))
    roots = np.exp(log_sigmas[[-1, 0]] / rho)
    sigmas = np.linspace(*roots, steps) ** rho
    ts = np.interp(np.log(sigmas), log_sigmas, np.arange(len(log_sigmas)))
    return (*map(Level, ts.tolist(), (1 / (1 + sigmas**2)).tolist()), CLEAN)


def _log_noise_ratios(alphas_cumprod: Tensor) -> np.ndarray:
    abar = alphas_cumprod.cpu().double().numpy()
    return 0.5 * np.log((1 - abar) / abar)


def check_steps(steps: int, total: int) -> None:
    if not 1 <= steps <= total:
        raise ValueError(f"steps must be 1..{total}, the timesteps that the model was trained with; got {steps}")


# How the steps of a run are spread over the noise levels: spacings by name, and timesteps of a user's own.


Levels = tuple[Level, ...]
Grid = Callable[[Tensor, int], Levels]

SKIP_TYPE_OF = {"time": "time_uniform", "logsnr": "logSNR", "karras": "karras", "quad": "time_quadratic"}
SPACINGS = tuple(SKIP_TYPE_OF)


class Spacings(NamedTuple):
    """Where the steps of some solvers can begin and end.

    grids: (alphas_cumprod, steps) -> levels, noisiest first, for each name of SPACINGS that these solvers take; the
        first is the published one.
    clean: whether the last step lands on clean latents; else at the first training timestep.
    """

    grids: Mapping[str, Grid]
    clean: bool = False

    @property
    def published(self) -> str:
        return next(iter(self.grids))

    def levels(
        self, alphas_cumprod: Tensor, steps: int, spacing: str | None = None, timesteps_at: Sequence[int] | None = None
    ) -> Levels:
        """The levels of a run.

        Args:
            alphas_cumprod: alpha-bar of every training timestep, (T,).
            steps: 1..T; with timesteps_at their number.
            spacing: one of `grids`; None = the published one.
            timesteps_at: in place of a spacing, the training timesteps where the steps begin, see `levels_at`.

        Raises:
            ValueError: steps out of range; a spacing that these solvers do not take; timesteps that are no descent,
                not as many as steps, or given beside a spacing.
        """
        self.check(spacing, timesteps_at)
        if timesteps_at is None:
            return self.grids[spacing or self.published](alphas_cumprod, steps)
        if len(timesteps_at) != steps:
            raise ValueError(f"steps must be the number of the timesteps, {len(timesteps_at)}; got {steps}")
        return levels_at(alphas_cumprod, timesteps_at, self.clean)

    def name_of(self, solver: str, spacing: str | None, timesteps_at: Sequence[int] | None) -> str:
        """A solver with its nodes, as a calibration for it is named; on the published grid just the solver's name."""
        if timesteps_at is not None:
            return f"{solver}-at-{hashlib.sha256(repr([*timesteps_at]).encode()).hexdigest()[:8]}"
        return solver if spacing in (None, self.published) else f"{solver}-{spacing}"

    def check(self, spacing: str | None, timesteps_at: Sequence[int] | None) -> None:
        """Raise ValueError for a spacing that these solvers do not take, or one beside timesteps of one's own."""
        if spacing is not None and timesteps_at is not None:
            raise ValueError(f"must be left out where the timesteps are given; got {spacing!r}")
        if spacing is not None and spacing not in self.grids:
            raise ValueError(f"must be {' or '.join(self.grids)} for this solver; got {spacing!r}")


def spaced_levels(alphas_cumprod: Tensor, steps: int, spacing: str, clean: bool = False) -> Levels:
    """Levels from the last training timestep to the first, evenly spaced in the measure that the spacing names.

    Args:
        alphas_cumprod: alpha-bar of every training timestep, (T,).
        spacing: see `NoiseSchedule.times`, by the names of SPACINGS.
        clean: one level fewer, and from the last on to clean latents.

    Returns:
        steps + 1 levels, noisiest first.

    Raises:
        ValueError: steps is not in 1..T.
    """
    schedule = NoiseSchedule(alphas_cumprod)
    check_steps(steps, schedule.total)
    if not clean:
        return schedule.levels(steps, SKIP_TYPE_OF[spacing])
    trained = schedule.levels(steps - 1, SKIP_TYPE_OF[spacing]) if steps > 1 else (schedule.level(1.0),)
    return (*trained, CLEAN)


def levels_at(alphas_cumprod: Tensor, timesteps: Sequence[int], clean: bool = False) -> Levels:
    """The levels of these training timesteps, and where the last step lands.

    Args:
        alphas_cumprod: alpha-bar of every training timestep, (T,).
        timesteps: strictly falling, each 1..T-1, or with `clean` 0..T-1.
        clean: the last step lands on clean latents; else at timestep 0.

    Raises:
        ValueError: timesteps that are none, do not fall or are out of range.
    """
    lowest, highest = (0 if clean else 1), len(alphas_cumprod) - 1
    if not timesteps:
        raise ValueError("at least one timestep is needed; got none")
    for before, after in pairwise(timesteps):
        if after >= before:
            raise ValueError(f"timesteps must fall strictly, as in 981,961,941; got {after} after {before}")
    for t in timesteps:
        if not lowest <= t <= highest:
            landing = "" if clean else "; the last step lands on 0"
            raise ValueError(f"timesteps must be {lowest}..{highest} for this model and solver{landing}; got {t}")
    return ddim_levels(alphas_cumprod, timesteps[::-1], CLEAN if clean else None)


def _published_ddim(alphas_cumprod: Tensor, steps: int, end: Level | None = None) -> Levels:
    return ddim_levels(alphas_cumprod, ddim_timesteps(steps, len(alphas_cumprod)), end)


def _respaced(alphas_cumprod: Tensor, steps: int) -> Levels:
    """Timesteps evenly from the last to 0, both of them among the steps, rounded to trained ones; then clean.

    Source: Nichol and Dhariwal (arXiv 2102.09672), section 4.
    """
    total = len(alphas_cumprod)
    check_steps(steps, total)
    stride = (total - 1) / (steps - 1) if steps > 1 else 1
    return ddim_levels(alphas_cumprod, [round(i * stride) for i in range(steps)], CLEAN)


def _spacings(published: Grid | None = None, clean: bool = False) -> Spacings:
    """All spacings; `time` is the published one, with a grid of its own if one is given."""
    grids: dict[str, Grid] = {name: partial(spaced_levels, spacing=name, clean=clean) for name in SPACINGS}
    return Spacings(grids | ({"time": published} if published else {}), clean)


OF_DDIM = _spacings(_published_ddim)
OF_DDPM = _spacings(partial(_published_ddim, end=CLEAN), clean=True)
OF_LEARNED_VARIANCE = _spacings(_respaced, clean=True)
OF_DPM_SOLVER = _spacings()
OF_EULER = _spacings(sigma_levels, clean=True)
ONLY_KARRAS = Spacings({"karras": karras_levels}, clean=True)
ONLY_TRAILING = Spacings({"trailing": trailing_levels}, clean=True)


# Random numbers that belong to an image: the same whatever batch, order or device it is made in


class ImageNoise:
    """Standard normal noise for a batch of images, one independent stream per image and node.

    Every draw is a pure function of (the image's seed, the stream, the shape): numpy's SeedSequence gives
    each pair its own 128-bit generator, so that no two of millions collide. Drawn on the CPU in float32.

    Args:
        seeds: for each image a tuple of integers 0..2^32-1, such as (seed, prompt index, sample index).

    Raises:
        ValueError: no seeds, or a seed that is empty or out of range.
    """

    def __init__(self, seeds: Sequence[tuple[int, ...]]):
        if not seeds or any(not seed or min(seed) < 0 or max(seed) >= 2**32 for seed in seeds):
            raise ValueError(f"seeds: expected a tuple of integers 0..2^32-1 for each image; got {seeds!r}")
        self.seeds = tuple(seeds)

    def start(self, shape: Sequence[int]) -> Tensor:
        """The noise that sampling begins from; shape (C, H, W) of one image -> (B, C, H, W)."""
        return self._draw(0, tuple(shape))

    def node(self, i: int, x: Tensor) -> Tensor:
        """The noise of node i >= 0 for x, (B, C, H, W), in its dtype and on its device."""
        if len(x) != len(self.seeds):
            raise ValueError(f"x: expected {len(self.seeds)} images, one per seed; got {len(x)}")
        return self._draw(1 + i, tuple(x.shape[1:])).to(x)

    def _draw(self, stream: int, shape: tuple[int, ...]) -> Tensor:
        draws = []
        for seed in self.seeds:
            # SeedSequence pads with zeros: without the length (1, 0) would be the same seed as (1,).
            sequence = np.random.SeedSequence(seed, spawn_key=(len(seed), stream))
            draws.append(np.random.default_rng(sequence).standard_normal(shape, dtype=np.float32))
        return torch.from_numpy(np.stack(draws))
