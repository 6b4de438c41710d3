"""The figure of error against cost."""

from __future__ import annotations

from matplotlib.figure import Figure

from evaluation.plots.pareto import Row, front, plot, table


def test_a_front_is_what_no_cheaper_point_equals():
    assert front([(54, 8.0), (44, 5.0), (32, 28.0), (58, 1.0)]) == [(32, 28.0), (44, 5.0), (58, 1.0)]
    assert front([(78, 3.0), (78, 1.0), (78, 2.0)]) == [(78, 1.0)]
    assert front([]) == []


def test_every_row_with_an_error_is_drawn_at_its_numbers_and_the_best_have_their_labels():
    rows = [
        dict(Row(family="a", steps=steps, label="{steps} steps")) | {"macs_share": steps / 50, "mse_latents": error}
        for steps, error in ((10, 0.3), (20, 0.4), (25, 0.1), (50, 0.0))
    ]
    axes = Figure().subplots()
    plot(axes, rows, "macs_share")
    marks, line = axes.lines
    assert [*zip(*marks.get_data(), strict=True)] == [(20, 0.3), (40, 0.4), (50, 0.1)]  # a logarithmic axis has no 0
    assert [*zip(*line.get_data(), strict=True)] == [(20, 0.3), (50, 0.1)]  # 40 % is no gain over 20 %
    assert {note.get_text(): note.xy for note in axes.texts} == {"10 steps": (20, 0.3), "25 steps": (50, 0.1)}


def test_a_table_has_a_column_for_each_measure_that_there_is():
    values = {"macs_share": 0.5, "mse_latents": 0.1, "psnr": None}
    assert [*table({"a": values})][::2] == ["| method | MACs | latents' MSE | PSNR |", "| a | 50% | 0.100000 |  |"]
