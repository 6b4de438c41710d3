"""DPM-Solver++ with the published sampler signature."""

from __future__ import annotations

from ldm.models.diffusion.dpm_solver.rules import DPMMultistep
from ldm.models.diffusion.sampler import DeterministicSampler
from ldm.models.diffusion.schedule import NoiseSchedule, nodes_between


class DPMSolverSampler(DeterministicSampler):
    """DPM-Solver++(2M) on an even grid of times, as published.

    The published class ignores mask, x0, callbacks and more without a word; here they work or raise. It
    returns None for the intermediates, which are here those of the other samplers.
    """

    solver = "dpm-solver++"

    def rule(self, steps: int) -> DPMMultistep:
        return DPMMultistep(nodes_between(NoiseSchedule(self.model.alphas_cumprod).levels(steps)))
