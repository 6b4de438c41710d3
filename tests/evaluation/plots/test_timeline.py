"""Timelines of plans."""

from __future__ import annotations

from evaluation.plots.timeline import shares, together
from ldm.models.diffusion.propagation.load import load_plan
from ldm.models.diffusion.propagation.plan import Plan


def test_timeline_of_a_plan():
    plan = Plan(5, (0, 3))
    assert together(plan) == [(0, 3), (3, 5)]
    assert shares(plan) == [(1, 1), (0, 1), (0, 1), (1, 1), (0, 1)]
    assert together(load_plan("deepcache:2", 3)) == [(0, 1), (1, 2), (2, 3)]
