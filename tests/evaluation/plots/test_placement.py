"""The figure of key timesteps."""

from __future__ import annotations

import math

import numpy as np
import pytest
from matplotlib.figure import Figure

from evaluation.plots.images import SERIES, STRATEGIES, chart, draw_placement, standard_error


def points_of(specs, error: float) -> dict[str, dict[str, float]]:
    return {
        spec: {"keys": 5 + i, "mean": error / (i + 1), "standard_error": error / 10} for i, spec in enumerate(specs)
    }


def test_placement_draws_each_series_at_its_numbers_and_names_table_5():
    found = {label: points_of(specs, 0.1 * (k + 1)) for k, (label, (specs, *_)) in enumerate(SERIES.items())}
    found["calibrated (auto), held"] = {}
    axes = Figure().subplots()
    chart(axes, found)
    drawn = {curve.get_label(): [*zip(*curve.lines[0].get_data(), strict=True)] for curve in axes.containers}
    assert drawn == {
        label: [(point["keys"], point["mean"]) for point in points.values()]
        for label, points in found.items()
        if points
    }
    assert {note.get_text(): note.xy for note in axes.texts} == {
        f"{name[0]} {name.split()[1]}": (found["table 5, held"][spec]["keys"], found["table 5, held"][spec]["mean"])
        for spec, name in STRATEGIES.items()
    }
    axes.set_xlim(3, 7)
    assert all(tick == int(tick) for tick in axes.get_xticks())


def test_series_of_placement_differ_in_what_is_propagated(experiment):
    made = draw_placement(experiment, steps=10)
    held, quadratic = (made.values[f"every n-th step, {how}"] for how in ("held", "quadratic"))
    assert held["uniform:4"]["keys"] == quadratic["uniform:4"]["keys"] == 3
    assert held["uniform:4"]["mean"] == np.mean(held["uniform:4"]["mse"]) != quadratic["uniform:4"]["mean"] > 0
    assert not made.values["calibrated (auto), held"] and "no calibration for auto:5" in made.caption


def test_standard_error_by_hand():
    assert standard_error(np.array([1.0, 3.0])) == pytest.approx(math.sqrt(2) / math.sqrt(2))
    assert standard_error(np.array([1.0])) == 0
