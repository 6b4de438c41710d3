"""The figure of feature evolution."""

from __future__ import annotations

import numpy as np

from evaluation.plots.features import draw_evolution, line_styles


def test_a_resolution_has_one_style_in_encoder_and_decoder():
    looks = line_styles(["E8", "E4", "E16", "B", "D4", "D16", "D8"])
    assert [*looks] == ["E16", "D16", "E8", "D8", "E4", "D4", "B"]  # finest first
    assert all(looks[f"E{size}"] == looks[f"D{size}"] for size in (4, 8, 16))
    for part in ("color", "marker"):
        assert len({looks[name][part] for name in ("E16", "E8", "E4", "B")}) == 4


def test_evolution_draws_the_numbers_that_it_writes(experiment):
    made = draw_evolution(experiment, steps=3)
    for row, key in enumerate(("norm", "mean", "relative")):
        lines = [line for axes in made.figure.axes[2 * row : 2 * row + 2] for line in axes.lines]
        assert {line.get_label() for line in lines} == {*made.values}
        for line in lines:
            np.testing.assert_allclose(line.get_ydata(), made.values[line.get_label()][key])
            assert [*line.get_xdata()] == [*range(key != "norm", len(made.values["B"]["norm"]))]
