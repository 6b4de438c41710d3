"""DPM-Solver++ with the published sampler signature."""

from __future__ import annotations

from ldm.models.diffusion.dpm_solver.rules import PUBLISHED_BELOW, DPMMultistep
from ldm.models.diffusion.sampler import DeterministicSampler
from ldm.models.diffusion.schedule import OF_DPM_SOLVER, Levels, nodes_between


class DPMSolverSampler(DeterministicSampler):
    """DPM-Solver++(2M), as published: by default on an even grid of times, with lower order at the end below 15 steps.

    That is the solver `dpm-solver++-published`; `dpm-solver++` has smaller errors. The published class ignores mask,
    x0, callbacks and more without a word; here they work or raise. It returns None for the intermediates, which are
    here those of the other samplers.
    """

    solver = "dpm-solver++-published"
    spacings = OF_DPM_SOLVER

    def rule(self, levels: Levels) -> DPMMultistep:
        return DPMMultistep(nodes_between(levels), lower_order_below=PUBLISHED_BELOW)
