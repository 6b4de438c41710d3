"""Inception Score, precision and recall of known cases."""

from __future__ import annotations

import numpy as np
import pytest

from evaluation.metrics.frechet import inception_score, precision_recall, squared_distances
from evaluation.runs.images import ImageError


def test_a_short_rest_is_no_split_of_the_inception_score():
    logits = np.random.default_rng(0).normal(size=(100, 8))
    one = np.zeros((1, 8))
    assert inception_score(np.concatenate([logits, one]), split=50) == inception_score(logits, split=50)
    assert inception_score(logits, split=5000)[1] == 0


@pytest.mark.parametrize(
    "logits, score",
    [
        (1000 * np.eye(7), 7.0),  # each image a class of its own: as many as classes
        (np.zeros((30, 5)), 1.0),  # nothing is recognised
        (1000 * np.eye(4)[[0, 0, 1, 1]], 2.0),
    ],
)
def test_inception_score_of_known_cases(logits, score):
    assert inception_score(logits) == pytest.approx((score, 0.0))


def line(*points: float) -> np.ndarray:
    return np.array(points)[:, None]


@pytest.mark.parametrize(
    "samples, real, k, precision, recall",
    [
        (line(0, 1, 2, 3, 4), line(0, 1, 2, 3, 4), 3, 1.0, 1.0),
        (line(0, 1, 2, 3), line(100, 101, 102, 103), 3, 0.0, 0.0),
        # real 0, 1, 2 with k = 1 have radius 1: they cover -1..3. Of the samples 0.5 and 4 the radius is 3.5.
        (line(0.5, 4), line(0, 1, 2), 1, 0.5, 1.0),
        # samples in one place cover that place alone
        (line(0, 0, 0, 0), line(0, 1, 2, 3), 3, 1.0, 0.25),
    ],
)
def test_precision_and_recall_of_known_cases(samples, real, k, precision, recall):
    assert precision_recall(samples, real, k) == (precision, recall)


def test_equal_images_lie_on_each_other_in_many_dimensions():
    """Whatever the rounding of long sums: a radius of 0 must hold what lies at its centre."""
    x = np.random.default_rng(0).standard_normal((50, 333)) * 1000
    distances = np.concatenate(list(squared_distances(x, x)))
    assert (np.diag(distances) == 0).all() and (distances + np.eye(50) > 0).all()
    same = x[:1].repeat(6, 0)
    assert precision_recall(same, np.concatenate([same, same + 1]), 3) == (1.0, 0.5)


def test_neighbours_are_needed():
    with pytest.raises(ImageError, match="of 3 neighbours, need at least 4 images; got 3"):
        precision_recall(np.eye(3), np.ones((9, 3)))
