"""Moments and distances: laws, closed forms, and two independent libraries on the same features."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from evaluation.metrics.adm import inception_score, precision_recall, squared_distances
from evaluation.metrics.frechet import cmmd, distance, few_images_warnings, fid_infinity, kid
from evaluation.metrics.intervals import bootstrap, mean_interval, mean_values, normal_interval
from evaluation.metrics.statistics import Gaussian, Moments, cached_statistics, load_statistics, save_statistics, total
from evaluation.runs.images import ImageError
from tests.helpers.paths import GOLDENS

GOLDEN = json.loads((GOLDENS / "torch_fidelity.json").read_text())


def golden_features() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """real (90, 12), fake (70, 12), logits (70, 9), as the golden numbers were made from."""
    r = np.random.RandomState(5)
    real = r.standard_normal((90, 12)) @ r.standard_normal((12, 12))
    fake = r.standard_normal((70, 12)) @ r.standard_normal((12, 12)) * 0.8 + 0.5
    return real, fake, 3 * r.standard_normal((70, 9))


def gaussian(features: np.ndarray) -> Gaussian:
    return Moments.from_features(features).gaussian()


# Moments


@settings(max_examples=30)
@given(seed=st.integers(0, 2**32 - 1), cuts=st.lists(st.integers(1, 39), max_size=6), offset=st.sampled_from([0, 1e6]))
def test_shards_merge_to_one_pass(seed, cuts, offset):
    features = np.random.default_rng(seed).standard_normal((40, 5)) * [1, 2, 3, 0.1, 0] + offset
    merged = total(Moments.from_features(part) for part in np.split(features, sorted(set(cuts))))
    assert merged.n == 40
    np.testing.assert_allclose(merged.mean, features.mean(0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(merged.covariance, np.cov(features, rowvar=False), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    "features, why", [(np.zeros((0, 3)), "N > 0"), (np.zeros(3), r"\(N, D\)"), (np.full((2, 2), np.nan), "finite")]
)
def test_features_that_are_none_say_why(features, why):
    with pytest.raises(ImageError, match=why):
        Moments.from_features(features)


def test_what_can_not_be_merged_or_compared_says_why():
    two, three = Moments.from_features(np.eye(2)), Moments.from_features(np.eye(3))
    with pytest.raises(ImageError, match="width 2 and 3"):
        two + three
    with pytest.raises(ImageError, match="width 3 and 2"):
        distance(three.gaussian(), two.gaussian())
    with pytest.raises(ImageError, match="at least 2 images"):
        Moments.from_features(np.ones((1, 2))).gaussian()
    with pytest.raises(ImageError, match="no features"):
        total([])


def test_statistics_keep_their_numbers_and_their_origin(tmp_path):
    real, fake, _ = golden_features()
    about = {"extractor": "e", "resize": "clean"}
    save_statistics(tmp_path / "s.npz", gaussian(real), about, gaussian(fake))
    pooled, of = load_statistics(tmp_path / "s.npz")
    assert of == about and pooled.n == 90 and np.array_equal(pooled.covariance, gaussian(real).covariance)
    assert np.array_equal(load_statistics(tmp_path / "s.npz", "mu_s", "sigma_s")[0].mean, fake.mean(0))
    np.savez(tmp_path / "published.npz", mu=real.mean(0), sigma=np.cov(real, rowvar=False))
    assert load_statistics(tmp_path / "published.npz")[1] is None
    with pytest.raises(ImageError, match="published.npz: not statistics .mu_s, sigma_s"):
        load_statistics(tmp_path / "published.npz", "mu_s", "sigma_s")
    np.savez(tmp_path / "odd.npz", mu=np.zeros(3), sigma=np.eye(2))
    with pytest.raises(ImageError, match="odd.npz: a mean of shape .3,. and a covariance of shape .2, 2. don't"):
        load_statistics(tmp_path / "odd.npz")


@pytest.mark.parametrize(
    "covariance, why",
    [
        (-np.eye(3), "has no eigenvalues below 0; got -1"),
        (np.diag([1.0, 1.0, -0.01]), "has no eigenvalues below 0; got -0.01"),
        (np.triu(np.ones((3, 3))), "must be symmetric; got entries that differ by 1 from"),
        (np.full((3, 3), np.nan), "must be finite"),
        (np.eye(2), "don't belong together"),
    ],
)
def test_a_covariance_that_is_none_says_why(tmp_path, covariance, why):
    """It would give a distance, and a wrong one: of -I from itself 0."""
    np.savez(tmp_path / "s.npz", mu=np.zeros(3), sigma=covariance)
    with pytest.raises(ImageError, match=f"s.npz: .*{why}"):
        load_statistics(tmp_path / "s.npz")


def test_statistics_of_nothing_say_why(tmp_path):
    np.savez(tmp_path / "s.npz", mu=np.zeros(0), sigma=np.zeros((0, 0)))
    with pytest.raises(ImageError, match="s.npz: a mean of shape .0,. and a covariance of shape .0, 0. don't"):
        load_statistics(tmp_path / "s.npz")
    np.savez(tmp_path / "s.npz", mu=np.zeros(1), sigma=np.eye(1), about=np.array("[1]"))
    with pytest.raises(ImageError, match="s.npz: not statistics .*about must be an object; got .1."):
        load_statistics(tmp_path / "s.npz")


def test_a_covariance_in_single_precision_is_one(tmp_path):
    features = np.random.default_rng(0).normal(size=(40, 100)) + 5  # singular: eigenvalues of 0, and a little below
    covariance = np.cov(features, rowvar=False).astype(np.float32)
    assert np.linalg.eigvalsh(covariance.astype(np.float64)).min() < 0
    np.savez(tmp_path / "s.npz", mu=features.mean(0), sigma=covariance)
    assert distance(gaussian(features), load_statistics(tmp_path / "s.npz")[0]) < 1e-3


def test_a_damaged_cache_is_none(tmp_path):
    from evaluation.metrics.statistics import cache_file

    about = {"extractor": "e"}
    assert cached_statistics(tmp_path, about) is None
    cache_file(tmp_path, about).write_bytes(b"PK no")
    assert cached_statistics(tmp_path, about) is None
    save_statistics(cache_file(tmp_path, about), gaussian(np.eye(3)), about)
    assert cached_statistics(tmp_path, about).n == 3
    save_statistics(cache_file(tmp_path, about), gaussian(np.eye(3)), {"extractor": "other"})
    assert cached_statistics(tmp_path, about) is None


# The Fréchet distance


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
    assert kid(fake, real[:70], subsets=3)[0] == pytest.approx(kernel.compute()[0].item(), rel=1e-3)

    score = InceptionScore(Pass(9), splits=1).set_dtype(torch.float64)
    score.update(torch.from_numpy(logits))
    assert inception_score(logits)[0] == pytest.approx(score.compute()[0].item(), rel=1e-3)


def test_torch_fidelity_agrees():
    """Golden numbers, because the package imports torchvision."""
    real, fake, logits = golden_features()
    assert distance(gaussian(fake), gaussian(real)) == pytest.approx(GOLDEN["fid"], rel=1e-9)
    assert kid(fake, real[:70], subsets=2)[0] == pytest.approx(GOLDEN["kid_of_70"], rel=1e-9)
    mean, std = inception_score(logits, split=10)
    assert mean == pytest.approx(GOLDEN["isc"]["inception_score_mean"], rel=1e-9)
    assert std == pytest.approx(GOLDEN["isc"]["inception_score_std"], rel=1e-9)
    precision, recall = precision_recall(fake, real)
    assert (precision, recall) == pytest.approx((GOLDEN["prc"]["precision"], GOLDEN["prc"]["recall"]), rel=1e-6)


# Few images


def test_extrapolation_takes_the_bias_of_few_images_away():
    truth = Gaussian(np.zeros(20), np.eye(20))
    samples = [np.random.default_rng(seed).standard_normal((400, 20)) for seed in range(4)]
    plain = np.mean([distance(gaussian(x), truth) for x in samples])
    infinite = [fid_infinity(x, truth) for x in samples]
    assert plain > 0.25 and abs(np.mean(infinite)) < plain / 3
    assert fid_infinity(samples[0], truth) == infinite[0]
    with pytest.raises(ImageError, match="at least 20 samples; got 19"):
        fid_infinity(samples[0][:19], truth)


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


def test_small_n_is_warned_of():
    assert "singular (rank 99 at most)" in few_images_warnings(100, 2048, "samples")[0]
    assert "biased upwards" in few_images_warnings(5000, 2048, "samples")[0]
    assert few_images_warnings(10_000, 2048, "samples") == few_images_warnings(None, 2048, "samples") == []


# Kernels, scores, manifolds


def test_cmmd_by_hand():
    """Unit vectors at right angles: k(x, x) = 1, k(x, y) = exp(-2 / 200)."""
    x, y = np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]])
    assert cmmd(x, y) == pytest.approx(1000 * (2 - 2 * np.exp(-0.01)))
    assert cmmd(x, x) == 0


def test_kid_is_unbiased_and_needs_two():
    random = np.random.default_rng(0)
    values = [kid(*random.standard_normal((2, 40, 6)), subsets=1)[0] for _ in range(200)]
    assert abs(np.mean(values)) < 3 * np.std(values) / 200**0.5
    with pytest.raises(ImageError, match="at least 2 images"):
        kid(np.ones((1, 3)), np.ones((5, 3)))


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
    with pytest.raises(ImageError, match="at least 4 images in both sets; got 3 and 9"):
        precision_recall(np.eye(3), np.ones((9, 3)))
