"""How figures are drawn and saved."""

from __future__ import annotations

from itertools import combinations

import torch
from matplotlib.figure import Figure
from matplotlib.text import Text

from evaluation.plots.drawing import Drawing, image_grid, keep_apart, new_figure, thin_out


def test_thinning_keeps_both_ends():
    assert thin_out(range(50), 10)[0] == 0 and thin_out(range(50), 10)[-1] == 49
    assert thin_out(range(3), 10) == [0, 1, 2]


def test_notes_are_moved_up_until_none_lies_on_another():
    axes = (figure := Figure(figsize=(4, 4))).subplots()
    axes.set(xlim=(0, 1), ylim=(0, 1))
    notes = [
        axes.annotate(text, place, xytext=(5, 0), textcoords="offset points")
        for text, place in (("one", (0.5, 0.5)), ("two", (0.51, 0.5)), ("three", (0.49, 0.53)), ("far", (0.1, 0.5)))
    ]
    keep_apart(notes)
    figure.draw_without_rendering()
    boxes = [note.get_window_extent() for note in notes]
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))
    assert notes[0].xyann == notes[3].xyann == (5, 0) and notes[2].xyann[1] > notes[1].xyann[1] > 0
    assert max(box.y1 for box in boxes) - boxes[0].y0 < 3.5 * boxes[0].height  # no farther than needed


def test_dollar_signs_in_texts_are_no_maths_but_powers_at_an_axis_are(tmp_path):
    text = r"cash $^$ money, $\nope{$"
    left, right = (figure := new_figure(8, 5)).subfigures(1, 2)
    image_grid(left, [[torch.zeros(3, 8, 8)]], [text], [text])
    left.suptitle(text)
    (axes := right.subplots()).plot([1, 2], [1, 100], label=text)
    axes.annotate(text, (1, 1), xytext=(5, 0), textcoords="offset points")
    axes.text(1, 2, text)
    axes.set_yscale("log")
    figure.legend(*axes.get_legend_handles_labels())
    Drawing(figure, text, {}).save(tmp_path / "out", text, {})
    shown = [artist for artist in figure.findobj(Text) if "nope" in artist.get_text().replace("\n", "")]
    assert len(shown) == 7 and not any(artist.get_parse_math() for artist in shown)
    powers = [label for label in axes.get_yticklabels() if label.get_text()]
    assert powers and all("10^" in label.get_text() and label.get_parse_math() for label in powers)
