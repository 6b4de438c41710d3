"""Distances between sets of features, and what is made of a single set. Pure arithmetic, in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from scipy.linalg import eigvalsh
from scipy.special import log_softmax

from evaluation.metrics.statistics import Gaussian, Moments
from evaluation.runs.errors import PictureError

INFINITY_LEAST = 20  # samples: the smallest point has a tenth of them, and a covariance needs two
BLOCK = 1024  # rows of a matrix of distances that are in memory at a time


def frechet(samples: Gaussian, reference: Gaussian) -> float:
    """Squared Fréchet distance of two normal distributions.

    |m1 - m2|^2 + tr C1 + tr C2 - 2 tr (C2^1/2 C1 C2^1/2)^1/2, with the eigenvalues of the symmetric product: real
    and finite also where a covariance is singular, which the square root of the plain product need not be.

    Raises:
        PictureError: features of different widths.

    Source: Dowson and Landau (1982); its use for pictures: arXiv 1706.08500.
    """
    if samples.mean.shape != reference.mean.shape:
        raise PictureError(f"features of width {len(samples.mean)} and {len(reference.mean)} can't be compared")
    product = reference.root.T @ samples.covariance @ reference.root  # (rank, rank)
    shared = eigvalsh((product + product.T) / 2) if len(product) else np.zeros(0)
    noise = shared.max(initial=0) * len(shared) * np.finfo(np.float64).eps  # a zero that rounding moved
    cross = np.sqrt(shared[shared > noise]).sum()
    gap = samples.mean - reference.mean
    return float(max(gap @ gap + np.trace(samples.covariance) + np.trace(reference.covariance) - 2 * cross, 0.0))


def cautions(n: int | None, width: int, what: str) -> list[str]:
    """What N pictures are too few for, in words; nothing if there are enough or the number is not known."""
    if n is None or n >= 10_000:
        return []
    if n <= width:
        return [
            f"{what}: {n} pictures for {width} features: the covariance is singular (rank {n - 1} at most) and "
            f"the Fréchet distance far too large; only such numbers of the same N can be compared"
        ]
    return [
        f"{what}: {n} pictures: the Fréchet distance is biased upwards, by more the fewer pictures; compare only "
        f"with the same N, or use KID"
    ]


def doubts(samples: int, real: Gaussian) -> list[str]:
    """The cautions of so many samples and of the reference that they are compared with."""
    width = len(real.mean)
    return [*cautions(samples, width, "samples"), *cautions(real.n, width, "reference")]


def resamples(n: int, count: int, seed: int) -> Iterator[np.ndarray]:
    """`count` draws of n out of n pictures with replacement, (n,) indices; the same for the same n and seed."""
    random = np.random.default_rng(seed)
    for _ in range(count):
        yield random.integers(0, n, n)


def bootstrap(features: np.ndarray, measure: Callable[[np.ndarray], float], count: int, seed: int = 0) -> np.ndarray:
    """The measure on resampled pictures, (count,). Two sets of the same N are resampled alike, so that paired
    differences may be taken.

    Source: Efron (1979).
    """
    return np.array([measure(features[chosen]) for chosen in resamples(len(features), count, seed)])


def normal_interval(value: float, resampled: np.ndarray) -> list[float]:
    """95 % by the resampled values' deviation. Not their quantiles: a Fréchet distance of a resample, in which
    pictures repeat, is too large, which moves the quantiles but hardly the deviation."""
    half = 1.959964 * float(np.std(resampled, ddof=1))
    return [value - half, value + half]


def mean_interval(values: np.ndarray, groups: Sequence[Any] | None = None) -> list[float]:
    """95 % of the mean of values (N,), N > 1, that are independent of each other, or those of different groups are.

    Args:
        groups: what each value is of, such as the prompt of a picture; at least two different ones.

    Source: the cluster-robust variance of Liang and Zeger (1986); without groups it is the usual one.
    """
    middle = float(np.mean(values))
    sums = (
        values - middle if groups is None else np.bincount(np.unique(groups, return_inverse=True)[1], values - middle)
    )
    half = 1.959964 * (len(sums) / (len(sums) - 1) * float(np.square(sums).sum())) ** 0.5 / len(values)
    return [middle - half, middle + half]


def share_interval(hits: int, n: int) -> list[float]:
    """95 % of a share: `hits` of `n` independent cases.

    Source: Wilson's score interval (1927).
    """
    z2 = 1.959964**2
    middle = (hits + z2 / 2) / (n + z2)
    half = (z2 * (hits * (n - hits) / n + z2 / 4)) ** 0.5 / (n + z2)
    return [middle - half, middle + half]


def mean_of(name: str, values: np.ndarray, groups: Sequence[Any] | None = None) -> dict[str, Any]:
    """The mean of values (N,) by that name (of none: None), and its 95 % interval if it can be told; see
    `mean_interval`."""
    if len(values) < 2 or (groups is not None and len({*groups}) < 2):
        return {name: float(values.mean()) if len(values) else None}
    return {name: float(values.mean()), f"{name}_interval": mean_interval(values, groups)}


def fid_infinity(features: np.ndarray, reference: Gaussian, points: int = 15, seed: int = 0) -> float:
    """The Fréchet distance extrapolated to infinitely many samples: a line through its values at several N, over 1/N.

    Args:
        features: (N, D) of the samples. The N of the points are spread evenly over N/10 .. N. The line holds only
            where they are several times D.
        reference: is taken as it is.

    Raises:
        PictureError: fewer than INFINITY_LEAST samples.

    Source: Effectively Unbiased FID and Inception Score (arXiv 1911.07023).
    """
    n = len(features)
    if n < INFINITY_LEAST:
        raise PictureError(f"FID-infinity needs at least {INFINITY_LEAST} samples; got {n}")
    random = np.random.default_rng(seed)
    sizes = np.linspace(n / 10, n, points).astype(int).clip(2)
    values = [
        frechet(Moments.of(features[random.choice(n, size, replace=False)]).gaussian(), reference) for size in sizes
    ]
    return float(np.polynomial.Polynomial.fit(1 / sizes, values, 1).convert().coef[0])


# Kernel distances


def polynomial_kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (x @ y.T / x.shape[1] + 1) ** 3


def gaussian_kernel(x: np.ndarray, y: np.ndarray, sigma: float = 10.0) -> np.ndarray:
    squares = (x * x).sum(1)[:, None] + (y * y).sum(1) - 2 * x @ y.T
    return np.exp(-squares.clip(0) / (2 * sigma**2))


def kid(x: np.ndarray, y: np.ndarray, subsets: int = 100, size: int = 1000, seed: int = 0) -> tuple[float, float]:
    """Kernel distance: mean and standard deviation over random subsets of the unbiased squared MMD.

    Args:
        x, y: (N, D) and (M, D).
        size: of the subsets; not more than there are.

    Raises:
        PictureError: a subset would be of fewer than 2.

    Source: Demystifying MMD GANs (arXiv 1801.01401).
    """
    size = min(size, len(x), len(y))
    if size < 2:
        raise PictureError(f"KID needs at least 2 pictures in both sets; got {len(x)} and {len(y)}")
    x, y, random = np.float64(x), np.float64(y), np.random.default_rng(seed)
    values = []
    for _ in range(subsets):
        a, b = (z[random.choice(len(z), size, replace=False)] for z in (x, y))
        same = sum(k.sum() - k.trace() for k in (polynomial_kernel(a, a), polynomial_kernel(b, b)))
        values.append(same / (size * (size - 1)) - 2 * polynomial_kernel(a, b).mean())
    return float(np.mean(values)), float(np.std(values))


def cmmd(x: np.ndarray, y: np.ndarray) -> float:
    """1000 times the squared MMD of CLIP embeddings (unit length), with a Gaussian kernel of sigma 10, biased.

    Args:
        x, y: (N, D) and (M, D).

    Source: Rethinking FID (arXiv 2401.09603).
    """

    def mean(a: np.ndarray, b: np.ndarray) -> float:
        return sum(gaussian_kernel(a[i : i + BLOCK], b).sum() for i in range(0, len(a), BLOCK)) / (len(a) * len(b))

    x, y = np.float64(x), np.float64(y)
    return float(1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y)))


# Of the ADM suite


def inception_score(logits: np.ndarray, split: int = 5000) -> tuple[float, float]:
    """exp of the mean divergence of p(class | picture) from p(class): mean and deviation over splits in order.

    Args:
        logits: (N, classes).
        split: pictures of a split. What is left over at the end is left out: a short split has a low score.

    Source: Improved Techniques for Training GANs (arXiv 1606.03498).
    """
    scores = []
    for start in range(0, max(len(logits) // split, 1) * split, split):
        log_p = log_softmax(np.float64(logits[start : start + split]), axis=1)
        p = np.exp(log_p)
        mean = p.mean(0)
        log_mean = np.log(mean, out=np.zeros_like(mean), where=mean > 0)  # a class of none adds 0 * log 0 = 0
        scores.append(np.exp((p * (log_p - log_mean)).sum(1).mean()))
    return float(np.mean(scores)), float(np.std(scores))


def precision_recall(samples: np.ndarray, real: np.ndarray, k: int = 3) -> tuple[float, float]:
    """Share of the samples that lie among the real pictures, and of the real ones that lie among the samples.

    A point lies among a set if it is no further from some member than that member's k-th nearest neighbour.

    Args:
        samples, real: (N, D) and (M, D).

    Raises:
        PictureError: a set has no k neighbours.

    Source: Improved Precision and Recall Metric (arXiv 1904.06991).
    """
    if min(len(samples), len(real)) <= k:
        raise PictureError(
            f"precision and recall with k = {k} need at least {k + 1} pictures in both sets; got "
            f"{len(samples)} and {len(real)}"
        )
    samples, real = np.float64(samples), np.float64(real)
    return inside(samples, real, k), inside(real, samples, k)


def inside(points: np.ndarray, members: np.ndarray, k: int) -> float:
    """The share of points that lie among the members."""
    radii = np.concatenate([np.partition(part, k, axis=1)[:, k] for part in squared_distances(members, members)])
    hits = [(part <= radii).any(1) for part in squared_distances(points, members)]
    return float(np.concatenate(hits).mean())


def squared_distances(x: np.ndarray, y: np.ndarray) -> Iterator[np.ndarray]:
    """Squared distances of x (N, D) from y (M, D), some rows at a time."""
    y_squares = (y * y).sum(1)
    for start in range(0, len(x), BLOCK):
        part = x[start : start + BLOCK]
        squares = (part * part).sum(1)[:, None] + y_squares
        distances = squares - 2 * part @ y.T
        distances[distances < 1e-13 * squares] = 0  # equal points, but for rounding
        yield distances
