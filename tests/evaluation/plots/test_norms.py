"""The figure of norms."""

from __future__ import annotations

from evaluation.plots.features import draw_norms


def test_norms_draw_the_numbers_that_they_write(experiment):
    made = draw_norms(experiment, steps=3)
    _, deviation, relative = made.figure.axes
    assert deviation.get_yscale() == "log"
    assert [line.get_ydata()[0] for line in deviation.lines] == [v["deviation"] for v in made.values.values()]
    assert [bar.get_height() for bar in relative.patches] == [v["percent"] for v in made.values.values()]
