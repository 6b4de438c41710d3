"""Rows of a comparison from a YAML file."""

from __future__ import annotations

from evaluation.figures import ROWS as SHIPPED
from evaluation.plots.pareto import read_rows, rule_digest
from ldm.sampling.engine import Recipe


def test_lists_in_a_row_are_rows(tmp_path):
    file = tmp_path / "rows.yaml"
    file.write_text(
        "rows:\n- {family: a, steps: [5, 10], plan: ['off', 'uniform:2']}\n- {family: b, noise_weight: 0.1}\n"
    )
    rows, _ = read_rows(str(file), 40)
    assert [(row.family, row.steps, row.plan) for row in rows] == [
        ("a", 5, "off"),
        ("a", 5, "uniform:2"),
        ("a", 10, "off"),
        ("a", 10, "uniform:2"),
        ("b", 40, "off"),
    ]
    assert len(set(map(str, rows))) == 5 and "prior noise 0.1" in str(rows[-1])
    shipped, _ = read_rows(str(SHIPPED), 50)
    assert len(shipped) == len(set(map(str, shipped))) > 25


def test_a_plan_by_name_counts_the_steps_of_the_spacing(experiment):
    """30 steps of ddim are 31 as published, and 30 where they are spread otherwise."""
    assert experiment.engine("ddim", 30).plan.num_nodes == 31
    assert experiment.engine("ddim", 30, spacing="quad").plan.num_nodes == 30


def test_rules_that_differ_in_a_step_have_different_digests():
    """Measured rows are found again by it: with the same nodes, only the order at the end differs."""
    ours, published = (Recipe(64, 64, name, 20, spacing="time") for name in ("dpm-solver++", "dpm-solver++-published"))
    assert rule_digest(ours, 1000) != rule_digest(published, 1000)
    for name in ("ddim", "ddpm", "unipc"):
        assert rule_digest(Recipe(64, 64, name, 9), 1000) == rule_digest(Recipe(64, 64, name, 9), 1000)
