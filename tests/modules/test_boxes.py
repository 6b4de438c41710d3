"""Boxes as tokens of the layout-to-image model."""

from __future__ import annotations

import pytest

from ldm.modules.encoders.boxes import Box, box_tokens

WHOLE = (0.0, 0.0, 1.0, 1.0)


def test_tokens_of_the_published_model():
    """By hand: category, corners on 90 x 90 points, y * 90 + x; then absent boxes; then the crop. 92 in all."""
    boxes = [Box(17, *WHOLE), Box(3, 0.5, 0.25, 0.5, 0.5), Box(0, 0.1, 0.9, 0.2, 0.1)]
    tokens = box_tokens(boxes, crop=(0.125, 0, 0.75, 1)).tolist()
    assert tokens[:3] == [17, 0, 8099]
    assert tokens[3:6] == [3, 2024, 6119]  # (44, 22), since a half goes to the even point, and (89, 67)
    assert tokens[6:9] == [0, 7209, 8037]  # (9, 80) and (27, 89)
    assert tokens[9:90] == [8191] * 81
    assert tokens[90:] == [11, 8088]  # (11, 0) and (78, 89)
    assert box_tokens(boxes).tolist() == tokens[:90] + [0, 8099]


def test_a_small_grid_can_be_read():
    """16 ids: 4 x 4 points, numbered row by row; without a crop."""
    assert box_tokens([Box(1, 2 / 3, 1 / 3, 1 / 3, 2 / 3)], 2, 16, crop=None).tolist() == [1, 6, 15, 15, 15, 15]


@pytest.mark.parametrize(
    "build, why",
    [
        (lambda: Box(-1, *WHOLE), "category must be a whole number >= 0; got -1"),
        (lambda: Box(1.5, *WHOLE), "category must be a whole number >= 0; got 1.5"),
        (lambda: Box("1", *WHOLE), "category must be a whole number >= 0; got '1'"),
        (lambda: Box(1, 0, 0, 0, 1), "width and height must be positive"),
        (lambda: Box(1, 0.5, 0, 0.6, 1), "must lie in the image"),
        (lambda: Box(1, float("nan"), 0, 0.5, 1), "must lie in the image"),
        (lambda: box_tokens([Box(8191, *WHOLE)]), "category must be in 0..8190"),
        (lambda: box_tokens([Box(1, *WHOLE)] * 31), "at most 30; got 31"),
        (lambda: box_tokens([], crop=(0.5, 0.5, 1, 1)), "must lie in the image"),
    ],
)
def test_malformed_boxes_say_why(build, why):
    with pytest.raises(ValueError, match=why):
        build()
