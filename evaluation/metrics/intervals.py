"""95 % intervals of what measures find."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

NORMAL = 1.959964  # 95 % of a normal distribution lie within so many standard deviations


def resamples(n: int, count: int, seed: int) -> Iterator[np.ndarray]:
    """`count` draws of n out of n images with replacement, (n,) indices; the same for the same n and seed."""
    random = np.random.default_rng(seed)
    for _ in range(count):
        yield random.integers(0, n, n)


def bootstrap(features: np.ndarray, measure: Callable[[np.ndarray], float], count: int, seed: int = 0) -> np.ndarray:
    """The measure on resampled images, (count,). Two sets of the same N are resampled alike, so that paired differences
    may be taken. `features`: (N, D). Source: Efron (1979)."""
    return np.array([measure(features[chosen]) for chosen in resamples(len(features), count, seed)])


def normal_interval(value: float, resampled: np.ndarray) -> list[float]:
    """The interval from the standard deviation of the resampled values. Not from their quantiles: the Fréchet distance
    of a resample, in which images repeat, is too large, which moves the quantiles but hardly the deviation."""
    half = NORMAL * float(np.std(resampled, ddof=1))
    return [value - half, value + half]


def mean_interval(values: np.ndarray, groups: Sequence[Any] | None = None) -> list[float]:
    """The interval of the mean of values (N,), N > 1. Values, or groups of them, are independent of each other.

    Args:
        groups: of each value, such as the prompt of an image; at least two different ones.

    Source: the cluster-robust variance of Liang and Zeger (1986); without groups it is the usual one.
    """
    middle = float(np.mean(values))
    sums = (
        values - middle if groups is None else np.bincount(np.unique(groups, return_inverse=True)[1], values - middle)
    )
    half = NORMAL * (len(sums) / (len(sums) - 1) * float(np.square(sums).sum())) ** 0.5 / len(values)
    return [middle - half, middle + half]


def share_interval(hits: int, n: int) -> list[float]:
    """The interval of a share: `hits` of `n` independent cases. Source: Wilson's score interval (1927)."""
    z2 = NORMAL**2
    middle = (hits + z2 / 2) / (n + z2)
    half = (z2 * (hits * (n - hits) / n + z2 / 4)) ** 0.5 / (n + z2)
    return [middle - half, middle + half]


def mean_values(name: str, values: np.ndarray, groups: Sequence[Any] | None = None) -> dict[str, Any]:
    """The mean of values (N,) under that name (None if N = 0), and its interval where there is one; see
    `mean_interval`."""
    if len(values) < 2 or (groups is not None and len({*groups}) < 2):
        return {name: float(values.mean()) if len(values) else None}
    return {name: float(values.mean()), f"{name}_interval": mean_interval(values, groups)}
