"""Intervals cover the truth."""

from __future__ import annotations

import numpy as np
import pytest

from evaluation.metrics.result import bootstrap, mean_interval, mean_values, normal_interval, share_interval


def test_bootstrap_covers_the_truth_and_pairs_sets():
    random = np.random.default_rng(0)
    values = random.standard_normal((400, 1)) + 5
    again = bootstrap(values, lambda x: float(x.mean()), count=300, seed=1)
    low, high = normal_interval(float(values.mean()), again)
    assert low < 5 < high and high - low == pytest.approx(2 * 1.96 * 0.05, rel=0.2)
    assert mean_interval(values) == pytest.approx([low, high], abs=0.02)
    # Copies of an image say nothing new, if it is known that they are of one prompt.
    copies, prompts = np.repeat(values[:, 0], 5), [f"prompt {i // 5}" for i in range(2000)]
    assert mean_interval(copies, prompts) == pytest.approx(mean_interval(values[:, 0]))
    assert np.ptp(mean_interval(copies)) < 0.5 * np.ptp(mean_interval(values))
    assert mean_values("score", copies[:5], prompts[:5]) == {"score": copies[0]}  # one prompt alone says nothing
    shifted = bootstrap(values + 2, lambda x: float(x.mean()), count=300, seed=1)
    np.testing.assert_allclose(shifted - again, 2)  # the same images each time
    assert not np.array_equal(again, bootstrap(values, lambda x: float(x.mean()), 300, seed=2))


def test_intervals_by_hand():
    assert normal_interval(5.0, np.array([0.0, 2.0])) == pytest.approx([5 - 1.959964 * 2**0.5, 5 + 1.959964 * 2**0.5])
    assert mean_interval(np.array([0.0, 2.0])) == pytest.approx([1 - 1.959964, 1 + 1.959964])
    assert share_interval(5, 10) == pytest.approx([0.236593, 0.763407], abs=1e-6)  # published tables of Wilson's
    assert share_interval(0, 10)[0] == pytest.approx(0, abs=1e-12)
    assert mean_values("score", np.array([])) == {"score": None}
