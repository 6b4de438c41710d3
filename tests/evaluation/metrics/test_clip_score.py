"""CLIP-scores by hand and from Python."""

from __future__ import annotations

import numpy as np
import pytest

from evaluation.metrics import clip_score as clip_measure
from evaluation.metrics.clip_score import VARIANTS, scores
from tests.helpers.measures import N


def test_hessel_arithmetic_by_hand():
    """cosines 1, 0.6, 0, -0.6 whatever the lengths."""
    images = np.array([[1.0, 0], [3, 4], [0, 2], [-3, 4]])
    texts = np.array([[2.0, 0], [1, 0], [1, 0], [10, 0]])
    assert scores(images, texts, VARIANTS["hessel-b32"]) == pytest.approx([2.5, 1.5, 0, 0])
    assert scores(images, texts, VARIANTS["cos100-l14"]) == pytest.approx([100, 60, 0, -60])
    assert VARIANTS["hessel-b32"].prefix == "A photo depicts " and VARIANTS["cos100-g14"].prefix == ""


def test_prompts_may_be_a_list(sets, clip_folder):
    arguments = {"variant": "hessel", "weights": clip_folder, "device": "cpu"}
    listed = clip_measure.compute(sets / "plain", prompts=[f"shapes {i}" for i in range(N)], **arguments)
    assert listed == clip_measure.compute(sets / "plain", **arguments)
