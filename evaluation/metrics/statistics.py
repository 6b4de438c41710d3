"""What distances compare: mean and covariance of the features of images, and the reference that has them.

They are computed in float64 while images stream by, from shards that merge, and kept in files that state their origin.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from scipy.linalg import eigh, issymmetric
from torch import Tensor

from evaluation.metrics.extractors import Extractor, network_fields
from evaluation.protocols.protocol import load_protocol
from evaluation.runs.images import (
    ARRAY,
    ImageError,
    Images,
    Source,
    batched,
    left_out_warnings,
    open_images,
    reading,
    reference_images,
)
from ldm.io.arrays import array_names, load_array
from ldm.io.errors import fault_of
from ldm.io.files import atomic_write, file_sha256, json_sha256, parse_json

WIDEST = 8192  # features of a network; the covariance of these has half a gigabyte
ROUNDING = 1e-4  # of the largest: what a covariance that was kept in single precision may be off


@dataclass(frozen=True)
class Moments:
    """Mean and scatter of N features of width D.

    n:       number of features.
    mean:    (D,) float64.
    scatter: (D, D) float64, sum of the outer products of the deviations from the mean; / (n - 1) = covariance.
    """

    n: int
    mean: np.ndarray
    scatter: np.ndarray

    @staticmethod
    def from_features(features: np.ndarray) -> Moments:
        """The moments of features (N, D).
        Raises ImageError: another shape, no features, or values that are not finite."""
        x = np.asarray(features, dtype=np.float64)
        if x.ndim != 2 or not len(x):
            raise ImageError(f"features must have the shape (N, D), N > 0; got {x.shape}")
        if not np.isfinite(x).all():
            raise ImageError("features must be finite; got NaN or infinity")
        mean = x.mean(0)
        return Moments(len(x), mean, (x - mean).T @ (x - mean))

    def __add__(self, other: Moments) -> Moments:
        """The moments of both sets together. Source: Chan, Golub, LeVeque (1979), which keeps the digits that raw sums
        lose."""
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
        """(D, D), without bias. Raises ImageError: of a single image."""
        if self.n < 2:
            raise ImageError("a covariance needs at least 2 images; got 1")
        return self.scatter / (self.n - 1)

    def gaussian(self) -> Gaussian:
        return Gaussian(self.mean, self.covariance, self.n)


@dataclass(frozen=True)
class Gaussian:
    """The normal distribution that a Fréchet distance compares: mean (D,), covariance (D, D), float64.

    n: images that they were estimated from; None = a published file that does not say.

    Raises ImageError: what is no mean and covariance.
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
        if issymmetric(self.covariance):  # as computed ones are: ten times as fast as how far one is from it
            return
        skew = np.abs(self.covariance - self.covariance.T).max(initial=0)
        if skew > ROUNDING * np.abs(self.covariance).max(initial=0):
            raise ImageError(f"a covariance must be symmetric; got entries that differ by {skew:.3g} from their mirror")

    @cached_property
    def root(self) -> np.ndarray:
        """(D, rank), root @ root.T = covariance; what is 0 but for rounding is left out.
        Raises ImageError: eigenvalues below 0, which no covariance has."""
        values, vectors = eigh(self.covariance)
        if values.min() < -ROUNDING * np.abs(values).max():
            raise ImageError(
                f"a covariance has no eigenvalues below 0; got {values.min():.3g} (the largest is {values.max():.3g})"
            )
        kept = values > values.max() * len(values) * np.finfo(np.float64).eps
        return vectors[:, kept] * np.sqrt(values[kept])


def total(parts: Iterable[Moments]) -> Moments:
    """The moments of all shards together. Raises ImageError: no shards, or features of different widths."""
    merged = None
    for part in parts:
        merged = part if merged is None else merged + part
    if merged is None:
        raise ImageError("there are no features")
    return merged


# The features of a set of images


@dataclass(frozen=True)
class FeatureSet:
    """Features of N images.

    moments: of the pooled features; spatial: of the spatial ones, if they were asked for.
    pooled:  (N, D) float32, if they were to be kept; logits: (N, classes), the same.
    """

    moments: Moments
    spatial: Moments | None = None
    pooled: np.ndarray | None = None
    logits: np.ndarray | None = None


def extract(
    images: Images,
    extractor: Extractor,
    *,
    batch_size: int = 50,
    label: str = "images",
    keep: bool = False,
    spatial: bool = False,
) -> FeatureSet:
    """Run the network once over all images, with a progress bar.

    Args:
        batch_size: images per batch; changes speed and memory only.
        label: of the progress bar.
        keep: keep features and logits of every image, for measures that need more than moments.
        spatial: compute the moments of the spatial features as well.

    Raises ImageError: an image can't be read, or the network has no spatial features.
    """
    pooled, maps, kept, logits = [], [], [], []
    for part in batched(images, len(images.names), batch_size, f"features: {label}"):
        found = extractor.features(part)
        pooled.append(Moments.from_features(to_numpy(found.pooled)))
        if spatial:
            if found.spatial is None:
                raise ImageError(f"{extractor.name} has no spatial features")
            maps.append(Moments.from_features(to_numpy(found.spatial)))
        if keep:
            kept.append(to_numpy(found.pooled))
            logits += [] if found.logits is None else [to_numpy(found.logits)]
        pooled, maps = ([total(parts)] if parts else [] for parts in (pooled, maps))
    return FeatureSet(
        pooled[0],
        maps[0] if maps else None,
        np.concatenate(kept) if kept else None,
        np.concatenate(logits) if logits else None,
    )


def to_numpy(features: Tensor) -> np.ndarray:
    return features.float().cpu().numpy()


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
    """Mean and covariance of a file, and what they are of; None where it does not say, as in published files. Raises
    ImageError: no such file, or not one with these names."""
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


# References

PUBLISHED = {"extractor": "inception-2015", "resize": "tf1-bilinear"}  # of files that do not state their network
# Where statistics came from; results are compared by these texts, so they stay as they are.
IN_FILE, OF_IMAGES = "in the file", "of its pictures"


@dataclass(frozen=True)
class Reference:
    """What samples are compared with.

    gaussian: of its pooled features; spatial: of the spatial ones, if they were asked for.
    about:    its content and where the statistics came from, for the protocol of a result.
    features: of its images, if they were to be kept and there are images.
    warnings: what is not known of it, in words.
    """

    gaussian: Gaussian
    about: dict[str, Any]
    spatial: Gaussian | None = None
    features: FeatureSet | None = None
    warnings: tuple[str, ...] = ()


def load_reference(
    source: Source,
    extractor: Extractor,
    *,
    batch_size: int = 50,
    cache: str | Path | None = None,
    keep: bool = False,
    spatial: bool = False,
) -> Reference:
    """Statistics of a reference: those in the file if they are of this network, else of its images.

    Args:
        source: a folder of images, an npy file, or an npz file with images, statistics or both; or images.
        cache: folder that keeps statistics of images; None = none.
        keep: the images' features are needed as well; spatial: see `extract`.

    Raises ImageError: it can't be read, or has statistics of another network or resize and no images.
    """
    arrays = arrays_in(source) if isinstance(source, str | Path) else set()
    has_images = not arrays or ARRAY in arrays
    complete = {*SPATIAL} <= arrays or not (spatial and has_images)  # what is missing is computed from the images
    stored = stored_statistics(source, extractor, spatial, has_images) if "mu" in arrays and complete else None
    if stored is not None and not (keep and has_images):
        return stored
    images = open_images(source) if isinstance(source, str | Path) else source
    about = {"sha256": images.sha256(), "n": len(images.names), "statistics": OF_IMAGES}
    wanted = about | network_fields(extractor)
    left_out = tuple(left_out_warnings(images))
    found = None if keep or spatial else cached_statistics(cache, wanted)
    if found is not None:
        return Reference(found, about, warnings=left_out)
    images.check(one_size=False)
    features = extract(images, extractor, batch_size=batch_size, label="reference", keep=keep, spatial=spatial)
    if stored is not None:
        return replace(stored, features=features)
    gaussian, unsaved = features.moments.gaussian(), ()
    try:
        if cache is not None:
            save_statistics(cache_file(cache, wanted), gaussian, wanted)
    except OSError as error:  # costs time in the next run, but must not cost what has been computed
        unsaved = (f"cache: the reference's statistics are not kept: {error}",)
    return Reference(
        gaussian,
        about,
        features.spatial.gaussian() if spatial else None,
        features if keep else None,
        (*left_out, *unsaved),
    )


def arrays_in(path: str | Path) -> set[str]:
    """Names of the arrays in an npz file; none for anything else."""
    if Path(path).suffix != ".npz":
        return set()
    with reading(path, "can't be read"):
        return array_names(path)


def stored_statistics(path: str | Path, extractor: Extractor, spatial: bool, has_images: bool) -> Reference | None:
    """The statistics of a file; None if they are of another network or resize but there are images.

    Files of ours state their network. Published ones do not: they are of Inception, but those that are not of the ADM
    suite may have another resize, which the user must know.

    Raises ImageError: they are of another network or resize and there are no images; or are no statistics.
    """
    gaussian, of = load_statistics(path)
    ours, stated = network_fields(extractor), of or PUBLISHED
    other = [key for key, value in ours.items() if stated.get(key, value) != value]
    unsure = of is None and other == ["resize"] and not has_images
    if other and not unsure:
        if has_images:
            return None
        raise ImageError(
            f"{path}: statistics of another {other[0]}, {stated[other[0]]}, and no images; asked for "
            f"is {ours[other[0]]}"
        )
    maps = load_statistics(path, *SPATIAL)[0] if spatial else None
    about = (
        {"sha256": file_sha256(path), "n": gaussian.n, "statistics": IN_FILE}
        if of is None
        else {"sha256": of.get("sha256"), "n": gaussian.n, "statistics": of.get("statistics", OF_IMAGES)}
    )
    warnings = (
        (f"reference: a file that does not state its resize; taken for {extractor.resize}",)
        if unsure
        else (*(of or {}).get("doubts", ()),)
    )
    return Reference(gaussian, about, maps, warnings=warnings)


def protocol_reference(name: str, data: str | Path | None = None) -> Path | Images:
    """The reference of the protocol of that name; see `reference_images`.

    Args:
        data: the folder of the protocol's data; None = the protocol's own.

    Raises SettingError: `reference`: no such protocol, or its real images are not what they should be.
    """
    with fault_of("reference"):
        protocol = load_protocol(name)
        return reference_images(protocol, protocol.folder(data))


def check_width(reference: Reference, images: Images, extractor: Extractor) -> None:
    """Check on the first image that the reference's statistics are as wide as the network's features. Raises
    ImageError: they are not."""
    features = extractor.features([next(iter(images))])
    for what, gaussian, found in (
        ("", reference.gaussian, features.pooled),
        ("spatial ", reference.spatial, features.spatial),
    ):
        if gaussian is not None and found is not None and len(gaussian.mean) != found.shape[1]:
            raise ImageError(
                f"statistics of {len(gaussian.mean)} {what}features; {extractor.name} has {found.shape[1]}"
            )
