"""Learning-rate factors over optimizer steps, under the names that published training configs use.

Each is a function step -> factor for `torch.optim.lr_scheduler.LambdaLR`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence


class LambdaWarmUpCosineScheduler:
    """Linear from lr_start to lr_max over warm_up_steps, then a half cosine down to lr_min.

    Args:
        warm_up_steps, max_decay_steps: optimizer steps; the factor stays at lr_min after max_decay_steps.
        lr_min, lr_max, lr_start: factors of the base learning rate (the published configs set that to 1).
        verbosity_interval: accepted for published configs; logging is the trainer's.
    """

    def __init__(
        self,
        warm_up_steps: int,
        lr_min: float,
        lr_max: float,
        lr_start: float,
        max_decay_steps: int,
        verbosity_interval: int = 0,
    ):
        if not 0 <= warm_up_steps < max_decay_steps:
            raise ValueError(f"warm_up_steps must lie in [0, max_decay_steps={max_decay_steps}); got {warm_up_steps}")
        self.warm_up_steps, self.max_decay_steps = warm_up_steps, max_decay_steps
        self.lr_min, self.lr_max, self.lr_start = lr_min, lr_max, lr_start

    def __call__(self, step: int) -> float:
        if step < self.warm_up_steps:
            return self.lr_start + (self.lr_max - self.lr_start) * step / self.warm_up_steps
        done = min((step - self.warm_up_steps) / (self.max_decay_steps - self.warm_up_steps), 1.0)
        return self.lr_min + 0.5 * (self.lr_max - self.lr_min) * (1.0 + math.cos(math.pi * done))

    schedule = __call__


class Cycles(ABC):
    """Cycles of a warm-up from f_start to f_max and of a decay to f_min; subclasses say how it decays.

    Args:
        warm_up_steps, f_min, f_max, f_start, cycle_lengths: one entry per cycle. The last step of a cycle belongs to
            it; after the last cycle the factor stays at its f_min.
        verbosity_interval: accepted for published configs; logging is the trainer's.
    """

    def __init__(
        self,
        warm_up_steps: Sequence[int],
        f_min: Sequence[float],
        f_max: Sequence[float],
        f_start: Sequence[float],
        cycle_lengths: Sequence[int],
        verbosity_interval: int = 0,
    ):
        lengths = {len(v) for v in (warm_up_steps, f_min, f_max, f_start, cycle_lengths)}
        if len(lengths) != 1:
            raise ValueError(
                "warm_up_steps, f_min, f_max, f_start and cycle_lengths need one entry per cycle; "
                f"got lengths {sorted(lengths)}"
            )
        if wrong := [pair for pair in zip(warm_up_steps, cycle_lengths, strict=True) if not 0 <= pair[0] < pair[1]]:
            raise ValueError(f"warm_up_steps must lie in [0, cycle_lengths={wrong[0][1]}); got {wrong[0][0]}")
        self.cycles = list(zip(warm_up_steps, f_min, f_max, f_start, cycle_lengths, strict=True))

    @abstractmethod
    def left(self, step: int, warm_up: int, length: int) -> float:
        """How much of the way from f_min to f_max is left, 1..0, at a step of a cycle after its warm-up."""

    def __call__(self, step: int) -> float:
        for warm_up, f_min, f_max, f_start, length in self.cycles:
            if step < warm_up:
                return f_start + (f_max - f_start) * step / warm_up
            if step <= length:
                return f_min + (f_max - f_min) * self.left(step, warm_up, length)
            step -= length
        return f_min

    schedule = __call__


class LambdaWarmUpCosineScheduler2(Cycles):
    """Cycles that decay by half a cosine; see `Cycles`."""

    def left(self, step: int, warm_up: int, length: int) -> float:
        return 0.5 * (1.0 + math.cos(math.pi * min((step - warm_up) / (length - warm_up), 1.0)))


class LambdaLinearScheduler(Cycles):
    """Cycles that decay linearly. As published the line begins with the cycle, so the factor jumps after a warm-up."""

    def left(self, step: int, warm_up: int, length: int) -> float:
        return (length - step) / length
