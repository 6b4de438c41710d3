"""Moments of features: laws, files, references."""

from __future__ import annotations

import zipfile
from io import BytesIO

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation.metrics import frechet
from evaluation.metrics.frechet import (
    Moments,
    cache_file,
    cached_statistics,
    distance,
    extract,
    load_statistics,
    save_statistics,
    total,
)
from evaluation.runs.images import ImageError, ImageFolder
from tests.helpers.measures import N, gaussian, golden_features


def test_batches_and_shards_change_nothing(sets, lite0):
    folder = ImageFolder(sets / "plain")
    whole = extract(folder, lite0, keep=True, spatial=True)
    ones = extract(folder, lite0, batch_size=3, keep=True, spatial=True)
    parts = [extract(folder.subset(range(a, b)), lite0, batch_size=4) for a, b in ((0, 5), (5, 6), (6, N))]
    assert whole.pooled.shape == (N, 1280) and whole.logits.shape == (N, 1000)
    merged = total(part.moments for part in parts)
    for one, other in ((whole.moments, ones.moments), (whole.moments, merged), (whole.spatial, ones.spatial)):
        assert one.n == other.n == N
        np.testing.assert_allclose(one.mean, other.mean, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(one.covariance, other.covariance, rtol=1e-3, atol=1e-4)


def test_published_statistics_can_be_saved_again(tmp_path):
    """They do not say of how many images they are."""
    np.savez(tmp_path / "a.npz", mu=np.zeros(3), sigma=np.eye(3))
    gaussian, _ = load_statistics(tmp_path / "a.npz")
    save_statistics(tmp_path / "b.npz", gaussian, {})
    assert load_statistics(tmp_path / "b.npz")[0].n is None


def test_statistics_that_do_not_say_what_they_are_of_are_inceptions(tmp_path):
    class Network:
        name, sha256, resize, size = "inception-2015", "x", "tf1-bilinear", 299

    np.savez(tmp_path / "s.npz", mu=np.zeros(4), sigma=np.eye(4))
    np.savez(tmp_path / "both.npz", mu=np.zeros(4), sigma=np.eye(4), arr_0=np.zeros((2, 8, 8, 3), np.uint8))
    alone, both = str(tmp_path / "s.npz"), str(tmp_path / "both.npz")
    for path in (alone, both):
        found = frechet.load_reference(path, Network())
        assert found.about["statistics"] == "in the file" and found.warnings == ()
    Network.resize = "clean"
    assert frechet.load_reference(alone, Network()).warnings == (
        "reference: a file that does not state its resize; taken for clean",
    )
    assert frechet.stored_statistics(both, Network(), False, has_images=True) is None


@pytest.mark.parametrize(
    "name, shape, why",
    [
        ("sigma", (20_000, 20_000), "wrong header"),
        ("sigma", (-2, -2), "no side below 0"),
        ("n", (10**9,), "wrong header"),
    ],
)
def test_statistics_whose_headers_lie_are_refused_unread(tmp_path, name, shape, why):
    stream = BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "<f8", "fortran_order": False, "shape": shape})
    np.savez(tmp_path / "liar.npz", mu=np.zeros(2))
    with zipfile.ZipFile(tmp_path / "liar.npz", "a") as archive:
        archive.writestr(f"{name}.npy", stream.getvalue())
    with pytest.raises(ImageError, match=f"liar.npz: not statistics .*{why}"):
        load_statistics(tmp_path / "liar.npz")


@pytest.mark.parametrize("n", [-3, 0])
def test_statistics_of_no_images_are_refused(tmp_path, n):
    np.savez(tmp_path / "none.npz", mu=np.zeros(2), sigma=np.eye(2), n=n)
    with pytest.raises(ImageError, match=f"n must be a number of images; got {n}"):
        load_statistics(tmp_path / "none.npz")


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
    about = {"extractor": "e"}
    assert cached_statistics(tmp_path, about) is None
    cache_file(tmp_path, about).write_bytes(b"PK no")
    assert cached_statistics(tmp_path, about) is None
    save_statistics(cache_file(tmp_path, about), gaussian(np.eye(3)), about)
    assert cached_statistics(tmp_path, about).n == 3
    save_statistics(cache_file(tmp_path, about), gaussian(np.eye(3)), {"extractor": "other"})
    assert cached_statistics(tmp_path, about) is None
