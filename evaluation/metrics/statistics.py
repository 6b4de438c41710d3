"""Mean and covariance of features: streaming, in float64, from shards that merge; kept in files with their origin."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from scipy.linalg import eigh

from evaluation.runs.errors import ImageError, reading
from ldm.io.arrays import array_names, load_array
from ldm.io.files import atomic_write, json_sha256, parse_json

WIDEST = 8192  # features of a network; the covariance of these has half a gigabyte
ROUNDING = 1e-4  # of the largest: what a covariance that was kept in single precision may be off


@dataclass(frozen=True)
class Moments:
    """Of N features of width D.

    n:       number of features.
    mean:    (D,) float64.
    scatter: (D, D) float64, sum of the outer products of the deviations from the mean; / (n - 1) = covariance.
    """

    n: int
    mean: np.ndarray
    scatter: np.ndarray

    @staticmethod
    def of(features: np.ndarray) -> Moments:
        """Of features (N, D).

        Raises:
            ImageError: another shape, no features, or values that are not finite.
        """
        x = np.asarray(features, dtype=np.float64)
        if x.ndim != 2 or not len(x):
            raise ImageError(f"features must have the shape (N, D), N > 0; got {x.shape}")
        if not np.isfinite(x).all():
            raise ImageError("features must be finite; got NaN or infinity")
        mean = x.mean(0)
        return Moments(len(x), mean, (x - mean).T @ (x - mean))

    def __add__(self, other: Moments) -> Moments:
        """Of both sets together. Source: Chan, Golub, LeVeque (1979), which keeps the digits that raw sums lose."""
        if self.mean.shape != other.mean.shape:
            raise ImageError(f"features of width {len(self.mean)} and {len(other.mean)} can't be merged")
        n, gap = self.n + other.n, other.mean - self.mean
        return Moments(
            n,
            self.mean + gap * (other.n / n),
            self.scatter + other.scatter + np.outer(gap, gap) * (self.n * other.n / n),
        )

    @property
    def covariance(self) -> np.ndarray:
        """(D, D), without bias.

        Raises:
            ImageError: of a single image.
        """
        if self.n < 2:
            raise ImageError("a covariance needs at least 2 images; got 1")
        return self.scatter / (self.n - 1)

    def gaussian(self) -> Gaussian:
        return Gaussian(self.mean, self.covariance, self.n)


@dataclass(frozen=True)
class Gaussian:
    """The normal distribution that a Fréchet distance compares: mean (D,), covariance (D, D), float64.

    n: images that they were estimated from; None = a published file that does not say.

    Raises:
        ImageError: what is no mean and covariance.
    """

    mean: np.ndarray
    covariance: np.ndarray
    n: int | None = None

    def __post_init__(self) -> None:
        if self.mean.ndim != 1 or not self.mean.size or self.covariance.shape != 2 * self.mean.shape:
            raise ImageError(
                f"a mean of shape {self.mean.shape} and a covariance of shape "
                f"{self.covariance.shape} don't belong together"
            )
        if not (np.isfinite(self.mean).all() and np.isfinite(self.covariance).all()):
            raise ImageError("mean and covariance must be finite; got NaN or infinity")
        skew = np.abs(self.covariance - self.covariance.T).max(initial=0)
        if skew > ROUNDING * np.abs(self.covariance).max(initial=0):
            raise ImageError(f"a covariance must be symmetric; got entries that differ by {skew:.3g} from their mirror")

    @cached_property
    def root(self) -> np.ndarray:
        """(D, rank), root @ root.T = covariance; what is 0 but for rounding is left out.

        Raises:
            ImageError: eigenvalues below 0, which no covariance has.
        """
        values, vectors = eigh(self.covariance)
        if values.min() < -ROUNDING * np.abs(values).max():
            raise ImageError(
                f"a covariance has no eigenvalues below 0; got {values.min():.3g} (the largest is {values.max():.3g})"
            )
        kept = values > values.max() * len(values) * np.finfo(np.float64).eps
        return vectors[:, kept] * np.sqrt(values[kept])


def total(parts: Iterable[Moments]) -> Moments:
    """Of all shards together.

    Raises:
        ImageError: no shards, or features of different widths.
    """
    merged = None
    for part in parts:
        merged = part if merged is None else merged + part
    if merged is None:
        raise ImageError("there are no features")
    return merged


# Files. mu and sigma are the names that published statistics have; `about` is ours.

SPATIAL = ("mu_s", "sigma_s")


def save_statistics(
    path: str | Path, gaussian: Gaussian, about: Mapping[str, Any], spatial: Gaussian | None = None
) -> None:
    """Write mean and covariance, with JSON values that say what they are of; the file appears whole or not at all."""
    more = {} if spatial is None else dict(zip(SPATIAL, (spatial.mean, spatial.covariance), strict=True))
    if gaussian.n is not None:  # published files do not say it
        more["n"] = np.int64(gaussian.n)
    # Through a stream: np.savez gives a path the ending .npz if it has another.
    with atomic_write(path) as temporary, temporary.open("wb") as stream:
        np.savez(
            stream,
            mu=gaussian.mean,
            sigma=gaussian.covariance,
            about=np.array(json.dumps(dict(about), sort_keys=True)),
            **more,
        )


def load_statistics(
    path: str | Path, mean: str = "mu", covariance: str = "sigma"
) -> tuple[Gaussian, dict[str, Any] | None]:
    """Mean and covariance of a file, and what they are of; None where it does not say, as in published files.

    Raises:
        ImageError: no such file, or not one with these names.
    """
    with reading(path, f"not statistics ({mean}, {covariance}) in an npz file"):
        names = array_names(path)
        n = int(load_array(path, "n", 1)) if "n" in names else None
        if n is not None and n < 1:
            raise ValueError(f"n must be a number of images; got {n}")
        about = parse_json(str(load_array(path, "about", 1))) if "about" in names else None
        if not isinstance(about, dict | None):
            raise ValueError(f"about must be an object; got {about!r}")
        found = np.float64(load_array(path, mean, WIDEST)), np.float64(load_array(path, covariance, WIDEST**2))
    try:
        gaussian = Gaussian(*found, n)
        _ = gaussian.root  # is needed anyway, and here what is wrong with it is known before samples are looked at
    except ImageError as error:
        raise ImageError(f"{path}: {error}") from error
    return gaussian, about


def cached_statistics(folder: str | Path | None, about: Mapping[str, Any]) -> Gaussian | None:
    """What an earlier run left in a cache for exactly these images, network and resize; None = nothing."""
    if folder is None or not (path := cache_file(folder, about)).is_file():
        return None
    try:
        gaussian, of = load_statistics(path)
    except ImageError:
        return None  # a damaged cache is one that is not there
    return gaussian if of == about else None


def cache_file(folder: str | Path, about: Mapping[str, Any]) -> Path:
    return Path(folder) / f"{json_sha256(about)[:24]}.npz"
