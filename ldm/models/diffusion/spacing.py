"""How the steps of a run are spread over the noise levels: spacings by name, and timesteps of a user's own."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import NamedTuple

from torch import Tensor

from ldm.models.diffusion.schedule import (
    CLEAN,
    Level,
    NoiseSchedule,
    check_steps,
    ddim_levels,
    ddim_timesteps,
    karras_levels,
    sigma_levels,
)

Levels = tuple[Level, ...]
Grid = Callable[[Tensor, int], Levels]

SKIP_TYPES = {"time": "time_uniform", "logsnr": "logSNR", "karras": "karras", "quad": "time_quadratic"}
SPACINGS = tuple(SKIP_TYPES)


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
        return schedule.levels(steps, SKIP_TYPES[spacing])
    trained = schedule.levels(steps - 1, SKIP_TYPES[spacing]) if steps > 1 else (schedule.level(1.0),)
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


def _spacings(published: Grid | None = None, clean: bool = False) -> Spacings:
    """All spacings; `time` is the published one, with a grid of its own if one is given."""
    grids: dict[str, Grid] = {name: partial(spaced_levels, spacing=name, clean=clean) for name in SPACINGS}
    return Spacings(grids | ({"time": published} if published else {}), clean)


OF_DDIM = _spacings(_published_ddim)
OF_DDPM = _spacings(partial(_published_ddim, end=CLEAN), clean=True)
OF_DPM_SOLVER = _spacings()
OF_EULER = _spacings(sigma_levels, clean=True)
ONLY_KARRAS = Spacings({"karras": karras_levels}, clean=True)
