"""The Fréchet distance and its kin: closed forms, and two independent libraries on the same features."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from evaluation.metrics.frechet import (
    Gaussian,
    clip_distance,
    distance,
    few_images_warnings,
    fid_infinity,
    inception_score,
    kernel_distance,
    precision_recall,
)
from evaluation.runs.images import ImageError
from tests.helpers.measures import gaussian, golden_features
from tests.helpers.paths import GOLDENS

GOLDEN = json.loads((GOLDENS / "torch_fidelity.json").read_text())


@settings(max_examples=30)
@given(seed=st.integers(0, 2**32 - 1), width=st.integers(1, 8))
def test_frechet_of_gaussians_with_the_same_axes_is_known(seed, width):
    """|m1 - m2|^2 + sum (sqrt a - sqrt b)^2 for variances a, b along shared axes."""
    random = np.random.default_rng(seed)
    axes = np.linalg.qr(random.standard_normal((width, width)))[0]
    a, b, gap = random.random(width), random.random(width) * 100, random.standard_normal(width)
    one, other = Gaussian(gap, axes * a @ axes.T), Gaussian(np.zeros(width), axes * b @ axes.T)
    expected = gap @ gap + ((a**0.5 - b**0.5) ** 2).sum()
    assert distance(one, other) == pytest.approx(expected, rel=1e-9)
    assert distance(other, one) == pytest.approx(expected, rel=1e-9)


def test_frechet_of_two_known_gaussians():
    """In the plane, trace of the root of a 2 x 2 matrix M: sqrt(tr M + 2 sqrt det M)."""
    c1, c2 = np.array([[2.0, 0.5], [0.5, 1.0]]), np.array([[1.0, -0.3], [-0.3, 3.0]])
    m = c1 @ c2
    root = np.sqrt(np.trace(m) + 2 * np.sqrt(np.linalg.det(m)))
    found = distance(Gaussian(np.array([1.0, 2.0]), c1), Gaussian(np.array([0.0, 4.0]), c2))
    assert found == pytest.approx(5 + 3 + 4 - 2 * root, rel=1e-12)


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e9])
def test_singular_covariances_give_a_finite_distance(scale):
    """Ten images for 200 features, and features that never change, over many magnitudes."""
    random = np.random.default_rng(0)
    x = random.standard_normal((10, 200)) * np.logspace(-6, 0, 200) * scale
    x[:, 50:60] = 7
    same, other = gaussian(x), gaussian(2 * x)
    assert distance(same, same) == pytest.approx(0, abs=1e-6 * scale**2)
    expected = (x.mean(0) ** 2).sum() + np.trace(same.covariance)  # (2 - 1)^2 times each
    assert distance(same, other) == pytest.approx(expected, rel=1e-6)
    wide = gaussian(random.standard_normal((150, 200)) * scale)  # the product has the smaller rank
    assert np.isfinite([distance(same, wide), distance(wide, same)]).all()
    assert distance(same, wide) == pytest.approx(distance(wide, same), rel=1e-6)
    zero = Gaussian(np.zeros(200), np.zeros((200, 200)))
    assert distance(zero, zero) == 0


class Pass(nn.Module):
    """A network whose features are what it is shown."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.mark.filterwarnings("ignore")
def test_torchmetrics_agrees():
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.inception import InceptionScore
    from torchmetrics.image.kid import KernelInceptionDistance

    real, fake, logits = golden_features()
    theirs = FrechetInceptionDistance(Pass(12)).set_dtype(torch.float64)
    theirs.update(torch.from_numpy(real), real=True)
    theirs.update(torch.from_numpy(fake), real=False)
    assert distance(gaussian(fake), gaussian(real)) == pytest.approx(theirs.compute().item(), rel=1e-3)

    kernel = KernelInceptionDistance(Pass(12), subsets=1, subset_size=70).set_dtype(torch.float64)
    kernel.update(torch.from_numpy(real[:70]), real=True)
    kernel.update(torch.from_numpy(fake), real=False)
    assert kernel_distance(fake, real[:70], subsets=3)[0] == pytest.approx(kernel.compute()[0].item(), rel=1e-3)

    score = InceptionScore(Pass(9), splits=1).set_dtype(torch.float64)
    score.update(torch.from_numpy(logits))
    assert inception_score(logits)[0] == pytest.approx(score.compute()[0].item(), rel=1e-3)


def test_torch_fidelity_agrees():
    """Golden numbers, because the package imports torchvision."""
    real, fake, logits = golden_features()
    assert distance(gaussian(fake), gaussian(real)) == pytest.approx(GOLDEN["fid"], rel=1e-9)
    assert kernel_distance(fake, real[:70], subsets=2)[0] == pytest.approx(GOLDEN["kid_of_70"], rel=1e-9)
    mean, std = inception_score(logits, split=10)
    assert mean == pytest.approx(GOLDEN["isc"]["inception_score_mean"], rel=1e-9)
    assert std == pytest.approx(GOLDEN["isc"]["inception_score_std"], rel=1e-9)
    precision, recall = precision_recall(fake, real)
    assert (precision, recall) == pytest.approx((GOLDEN["prc"]["precision"], GOLDEN["prc"]["recall"]), rel=1e-6)


def test_extrapolation_takes_the_bias_of_few_images_away():
    truth = Gaussian(np.zeros(20), np.eye(20))
    samples = [np.random.default_rng(seed).standard_normal((400, 20)) for seed in range(4)]
    plain = np.mean([distance(gaussian(x), truth) for x in samples])
    infinite = [fid_infinity(x, truth) for x in samples]
    assert plain > 0.25 and abs(np.mean(infinite)) < plain / 3
    assert fid_infinity(samples[0], truth) == infinite[0]


def test_small_n_is_warned_of():
    assert "singular (rank 99 at most)" in few_images_warnings(100, 2048, "samples")[0]
    assert "biased upwards" in few_images_warnings(5000, 2048, "samples")[0]
    assert few_images_warnings(10_000, 2048, "samples") == few_images_warnings(None, 2048, "samples") == []


def test_cmmd_by_hand():
    """Unit vectors at right angles: k(x, x) = 1, k(x, y) = exp(-2 / 200)."""
    x, y = np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]])
    assert clip_distance(x, y) == pytest.approx(1000 * (2 - 2 * np.exp(-0.01)))
    assert clip_distance(x, x) == 0


def test_kid_is_unbiased_and_needs_two():
    random = np.random.default_rng(0)
    values = [kernel_distance(*random.standard_normal((2, 40, 6)), subsets=1)[0] for _ in range(200)]
    assert abs(np.mean(values)) < 3 * np.std(values) / 200**0.5
    with pytest.raises(ImageError, match="at least 2 images"):
        kernel_distance(np.ones((1, 3)), np.ones((5, 3)))
