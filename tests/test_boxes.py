"""Boxes as tokens of the layout-to-image model."""

from __future__ import annotations

import pytest

from ldm.modules.encoders.boxes import Box, box_tokens

WHOLE = (0.0, 0.0, 1.0, 1.0)
LAST = 89 * 90 + 89     # the bottom right corner of 90 x 90 points, the most that 8192 ids have room for


def test_tokens_of_the_published_model():
    """Category, corners on the grid; then absent boxes; then the crop."""
    tokens = box_tokens([Box(17, 0, 0, 1, 1), Box(3, 0.5, 0.25, 0.5, 0.5)]).tolist()
    middle, low = round(0.5 * 89), round(0.25 * 89)
    assert tokens[:3] == [17, 0, LAST]
    assert tokens[3:6] == [3, low * 90 + middle, round(0.75 * 89) * 90 + 89]
    assert tokens[6:90] == [8191] * 84
    assert tokens[90:] == [0, LAST]
    assert len(tokens) == 92    # max_seq_len of its BERTEmbedder


def test_a_small_grid_can_be_read():
    """16 ids: 4 x 4 points, numbered row by row; without a crop."""
    assert box_tokens([Box(1, 2 / 3, 1 / 3, 1 / 3, 2 / 3)], 2, 16, crop=None).tolist() == [1, 6, 15, 15, 15, 15]


@pytest.mark.parametrize("build, why", [
    (lambda: Box(-1, *WHOLE), "category must not be negative"),
    (lambda: Box(1, 0, 0, 0, 1), "width and height must be positive"),
    (lambda: Box(1, 0.5, 0, 0.6, 1), "must lie in the picture"),
    (lambda: Box(1, float("nan"), 0, 0.5, 1), "must lie in the picture"),
    (lambda: box_tokens([Box(8191, *WHOLE)]), "category must be in 0..8190"),
    (lambda: box_tokens([Box(1, *WHOLE)] * 31), "at most 30; got 31"),
    (lambda: box_tokens([], crop=(0.5, 0.5, 1, 1)), "must lie in the picture"),
])
def test_malformed_boxes_say_why(build, why):
    with pytest.raises(ValueError, match=why):
        build()
