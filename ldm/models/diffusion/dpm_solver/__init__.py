"""DPM-Solver and DPM-Solver++: update rules and the published sampler class."""

from ldm.models.diffusion.dpm_solver.sampler import DPMSolverSampler

__all__ = ["DPMSolverSampler"]
