"""FID and its kin: Fréchet distance of samples from a reference, FID-infinity, KID, CMMD, and the ADM suite.

`compute` measures images. Below it: what distances compare (mean and covariance of features, computed in float64 while
images stream by, and kept in files that state their origin), references that have them, and the arithmetic.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from operator import add
from pathlib import Path
from typing import Any

import numpy as np
from scipy.linalg import eigh, eigvalsh, issymmetric
from scipy.linalg.lapack import dpstrf
from scipy.special import log_softmax
from torch import Tensor

from evaluation.metrics.extractors import Extractor, named_extractor, network_fields
from evaluation.metrics.result import Result, bootstrap, normal_interval, share_interval
from evaluation.runs.images import (
    ARRAY,
    ImageError,
    Images,
    Source,
    batched,
    image_warnings,
    left_out_warnings,
    open_images,
    open_samples,
    reading,
)
from ldm.io.arrays import array_names, load_array
from ldm.io.errors import SettingError, fault_of
from ldm.io.files import atomic_write, file_sha256, json_sha256, parse_json

KID_SUBSETS, KID_SIZE, POINTS = 100, 1000, 15
CMMD_MODEL = 336, 14, 1024, 24  # pixels, patch size, width and layers of the CLIP model that it is published with
INFINITY_LEAST = 20  # samples: the smallest point has a tenth of them, and a covariance needs two
NEIGHBOURS = 3  # of precision and recall
SPLIT = 5000  # images of one Inception Score
BLOCK = 1024  # rows of a matrix of distances that are in memory at a time
WIDEST = 8192  # features of a network; the covariance of these has half a gigabyte
ROUNDING = 1e-4  # of the largest: what a covariance that was kept in single precision may be off


def compute(
    samples: Source,
    reference: Source | Reference,
    *,
    extractor: Extractor | str = "inception-2015",
    weights: str | Path | None = None,
    resize: str | None = None,
    batch_size: int = 50,
    device: str = "auto",
    suite: bool = False,
    kid: bool = False,
    cmmd: bool = False,
    infinity: bool = False,
    bootstrap: int | None = None,
    seed: int = 0,
    cache: str | Path | None = None,
) -> Result:
    """Fréchet distance of samples from a reference: `fid_real`, and what else is asked for.

    Args:
        samples: see `Source`.
        reference: the same, an npz file of statistics (mu, sigma; for the suite also mu_s, sigma_s), or a loaded one.
        extractor, weights, resize, device: of the feature network, see `load_extractor`.
        batch_size: images per batch; changes speed and memory only.
        suite: also the ADM suite (sfid_real; inception_score, if the network has a classifier; precision and recall,
            if the reference has images). kid: also KID (kid_real, kid_real_std). cmmd: also CMMD (cmmd_real). infinity:
            also FID-infinity (fid_infinity_real).
        bootstrap: how often the samples are resampled for 95 % intervals; None = no intervals.
        seed: of KID's subsets, FID-infinity's points and the resampling.
        cache: folder that keeps statistics of reference images; None = none.

    Raises SettingError: an argument can't be used; it names the argument.
    """
    with fault_of("samples"):
        images = open_samples(samples)
        made, n = images.provenance, len(images.names)
        if suite:
            check_neighbours(n)
    name = extractor if isinstance(extractor, str) else extractor.name
    if cmmd and name != "clip":
        raise SettingError("cmmd", f"is defined for CLIP's embeddings: needs the extractor clip; got {name}")
    if infinity and n < INFINITY_LEAST:
        raise SettingError("infinity", f"needs at least {INFINITY_LEAST} samples; got {n}")
    network = named_extractor(extractor, weights, resize, device)
    with fault_of("reference"):
        keep = suite or kid or cmmd
        real = reference
        if not isinstance(real, Reference):
            real = load_reference(real, network, batch_size=batch_size, cache=cache, keep=keep, spatial=suite)
        check_reference(real, images, network, kernels=kid or cmmd)
    with fault_of("samples"):
        keep = keep or infinity or bool(bootstrap)
        found = extract(images, network, batch_size=batch_size, label="samples", keep=keep, spatial=suite)
        values: dict[str, Any] = {"fid_real": distance(found.moments.gaussian(), real.gaussian)}
        protocol = {"measure": "adm" if suite else "fid", **network_fields(network), "n": n, "reference": real.about}
        protocol["prompts"] = made.get("protocol_sha256")
        warnings = measure_warnings(images, real)
        if suite:
            values |= suite_values(found, real)
            protocol |= {"neighbours": NEIGHBOURS, "split": SPLIT}
            warnings += ["reference: has statistics but no images: no precision and recall"] * (real.features is None)
        values |= intervals(values, found, real, bootstrap, seed) if bootstrap else {}
        if infinity:
            values["fid_infinity_real"] = fid_infinity(found.pooled, real.gaussian, POINTS, seed)
            protocol["infinity"] = {"points": POINTS, "seed": seed}
            warnings += infinity_warnings(*found.pooled.shape)
        if kid:
            pair = found.pooled, real.features.pooled
            values["kid_real"], values["kid_real_std"] = kernel_distance(*pair, KID_SUBSETS, KID_SIZE, seed)
            protocol["kid"] = {"subsets": KID_SUBSETS, "size": min(KID_SIZE, *map(len, pair)), "seed": seed}
        if cmmd:
            values["cmmd_real"] = clip_distance(found.pooled, real.features.pooled)
            warnings += cmmd_warnings(network)
    settings = {"bootstrap": {"resamples": bootstrap, "seed": seed}} if bootstrap else {}
    return Result(values, protocol, made, warnings, settings)


def suite_values(samples: FeatureSet, reference: Reference) -> dict[str, float]:
    """What the ADM suite has beside the Fréchet distance."""
    values = {"sfid_real": distance(samples.spatial.gaussian(), reference.spatial)}
    if samples.logits is not None:
        values["inception_score"], values["inception_score_std"] = inception_score(samples.logits)
    if reference.features is not None:
        values["precision"], values["recall"] = precision_recall(samples.pooled, reference.features.pooled)
    return values


def intervals(
    values: Mapping[str, float], samples: FeatureSet, reference: Reference, count: int, seed: int
) -> dict[str, list[float]]:
    """95 % intervals over the samples, of the values that have one; sFID's features are not kept.

    FID and Inception Score: by resampling the samples `count` times. Precision and recall: as shares of independent
    images; that the images which they are compared with are a sample too is not included.
    """
    found = {"fid_real": distance_interval(values["fid_real"], samples.pooled, reference.gaussian, count, seed)}
    if "inception_score" in values:
        scores = bootstrap(samples.logits, lambda part: inception_score(part)[0], count, seed)
        found["inception_score"] = normal_interval(values["inception_score"], scores)
    for name, of in {"precision": samples, "recall": reference.features}.items():
        if name in values:
            found[name] = share_interval(round(values[name] * len(of.pooled)), len(of.pooled))
    return {f"{name}_interval": interval for name, interval in found.items()}


def distance_interval(value: float, features: np.ndarray, real: Gaussian, count: int, seed: int) -> list[float]:
    """95 % interval of the distance `value` of samples with these features, by resampling them `count` times."""
    again = bootstrap(features, lambda part: distance(gaussian_of(part), real), count, seed)
    return normal_interval(value, again)


# Warnings


def measure_warnings(images: Images, reference: Reference) -> list[str]:
    """What to bear in mind of the images and their distance from the reference."""
    width = len(reference.gaussian.mean)
    few = [
        *few_images_warnings(len(images.names), width, "samples"),
        *few_images_warnings(reference.gaussian.n, width, "reference"),
    ]
    return [*image_warnings(images), *few, *reference.warnings]


def few_images_warnings(n: int | None, width: int, what: str) -> list[str]:
    """A warning, if `n` images are few for a Fréchet distance over `width` features; n = None: not known."""
    if n is None or n >= 10_000:
        return []
    if n <= width:
        return [
            f"{what}: {n} images for {width} features: the covariance is singular (rank {n - 1} at most) and "
            f"the Fréchet distance far too large; only such numbers of the same N can be compared"
        ]
    return [
        f"{what}: {n} images: the Fréchet distance is biased upwards, the more the fewer images; compare only "
        f"with the same N, or use KID"
    ]


def infinity_warnings(n: int, width: int) -> list[str]:
    few = f"{n} images for {width} features are too few for a straight line; needs {20 * width} or more"
    return [f"fid_infinity_real: {few}"] if n < 20 * width else []  # the smallest point has n / 10


def cmmd_warnings(extractor: Extractor) -> list[str]:
    found = (extractor.size, *extractor.network.shape)
    if found == CMMD_MODEL:
        return []
    names = f"pixels, patch size, width, layers {CMMD_MODEL}; this one has {found}"
    return [f"cmmd_real: published values are of another CLIP model ({names})"]


def check_neighbours(n: int, k: int = NEIGHBOURS) -> None:
    """Precision and recall need k neighbours. Raises ImageError: n images are too few."""
    if n <= k:
        raise ImageError(f"precision and recall, of {k} neighbours, need at least {k + 1} images; got {n}")


# Mean and covariance


@dataclass(frozen=True)
class Moments:
    """Mean and scatter of n features of width D, in float64."""

    n: int
    mean: np.ndarray  # (D,)
    scatter: np.ndarray  # (D, D), sum of the outer products of the deviations from the mean; / (n - 1) = covariance

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
        scatter = self.scatter + other.scatter + np.outer(gap, gap) * (self.n * other.n / n)
        return Moments(n, self.mean + gap * (other.n / n), scatter)

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
    """The normal distribution that a Fréchet distance compares, in float64.
    Raises ImageError: what is no mean and covariance."""

    mean: np.ndarray  # (D,)
    covariance: np.ndarray  # (D, D)
    n: int | None = None  # images that they were estimated from; None = a published file that does not say

    def __post_init__(self) -> None:
        shapes = self.mean.shape, self.covariance.shape
        if len(shapes[0]) != 1 or not self.mean.size or shapes[1] != 2 * shapes[0]:
            raise ImageError(f"a mean of shape {shapes[0]} and a covariance of shape {shapes[1]} don't belong together")
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
        exact = len(self.mean) * np.finfo(np.float64).eps * np.abs(self.covariance).max()
        factor, order, rank, _ = dpstrf(self.covariance, lower=1)  # Cholesky's: the fewer images, the quicker
        root = np.zeros((len(factor), rank))
        root[order - 1] = np.tril(factor)[:, :rank]
        if rank == len(root) or np.abs(root @ root.T - self.covariance).max() <= exact:
            return root
        values, vectors = eigh(self.covariance)
        least, most = values.min(), values.max()
        if least < -ROUNDING * np.abs(values).max():
            raise ImageError(f"a covariance has no eigenvalues below 0; got {least:.3g} (the largest is {most:.3g})")
        kept = values > most * len(values) * np.finfo(np.float64).eps
        return vectors[:, kept] * np.sqrt(values[kept])


def gaussian_of(features: np.ndarray) -> Gaussian:
    """The normal distribution of features (N, D). Raises ImageError: see `Moments.from_features`; a single image."""
    return Moments.from_features(features).gaussian()


def total(parts: Iterable[Moments]) -> Moments:
    """The moments of all shards together. Raises ImageError: no shards, or features of different widths."""
    if not (parts := list(parts)):
        raise ImageError("there are no features")
    return reduce(add, parts)


@dataclass(frozen=True)
class FeatureSet:
    """Features of N images."""

    moments: Moments  # of the pooled features
    spatial: Moments | None = None  # of the spatial ones, if they were asked for
    pooled: np.ndarray | None = None  # (N, D) float32, if they were to be kept
    logits: np.ndarray | None = None  # (N, classes), the same


def extract(
    images: Images,
    extractor: Extractor,
    *,
    batch_size: int = 50,  # changes speed and memory only
    label: str = "images",  # of the progress bar
    keep: bool = False,  # features and logits of every image, for measures that need more than moments
    spatial: bool = False,  # compute the moments of the spatial features as well
) -> FeatureSet:
    """Run the network once over all images, with a progress bar. Raises ImageError: an image can't be read, or the
    network has no spatial features."""
    moments: dict[str, Moments] = {}
    kept: dict[str, list[np.ndarray]] = {}
    for part in batched(images, len(images.names), batch_size, f"features: {label}"):
        found = {name: to_numpy(x) for name, x in extractor.features(part)._asdict().items() if x is not None}
        if spatial and "spatial" not in found:
            raise ImageError(f"{extractor.name} has no spatial features")
        for name in ("pooled", "spatial") if spatial else ("pooled",):
            new = Moments.from_features(found[name])
            moments[name] = moments[name] + new if name in moments else new
        for name in found.keys() & {"pooled", "logits"} if keep else ():
            kept.setdefault(name, []).append(found[name])
    rows = {name: np.concatenate(parts) for name, parts in kept.items()}
    return FeatureSet(moments["pooled"], moments.get("spatial"), **rows)


def to_numpy(features: Tensor) -> np.ndarray:
    return features.float().cpu().numpy()


# Files. mu and sigma are the names that published statistics have; `about` is ours.

SPATIAL = ("mu_s", "sigma_s")


def save_statistics(
    path: str | Path, gaussian: Gaussian, about: Mapping[str, Any], spatial: Gaussian | None = None
) -> None:
    """Write mean and covariance, with JSON values that say what they are of; the file appears whole or not at all."""
    arrays = {"mu": gaussian.mean, "sigma": gaussian.covariance, "about": np.array(json.dumps(about, sort_keys=True))}
    if spatial is not None:
        arrays |= dict(zip(SPATIAL, (spatial.mean, spatial.covariance), strict=True))
    if gaussian.n is not None:  # published files do not say it
        arrays["n"] = np.int64(gaussian.n)
    # Through a stream: np.savez gives a path the ending .npz if it has another.
    with atomic_write(path) as temporary, temporary.open("wb") as stream:
        np.savez(stream, **arrays)


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
    """What samples are compared with."""

    gaussian: Gaussian  # of its pooled features
    about: dict[str, Any]  # its content and where the statistics came from, for the protocol of a result
    spatial: Gaussian | None = None  # of the spatial features, if they were asked for
    features: FeatureSet | None = None  # of its images, if they were to be kept and there are images
    warnings: tuple[str, ...] = ()  # what is not known of it, in words


def load_reference(
    source: Source,
    extractor: Extractor,
    *,
    batch_size: int = 50,
    cache: str | Path | None = None,  # folder that keeps statistics of images; None = none
    keep: bool = False,  # the images' features are needed as well
    spatial: bool = False,  # see `extract`
) -> Reference:
    """Statistics of a reference: those in the file (an npz file may have images, statistics or both) if they are of
    this network, else of its images.
    Raises ImageError: it can't be read, or has statistics of another network or resize and no images."""
    arrays: set[str] = set()
    if isinstance(source, str | Path) and Path(source).suffix == ".npz":
        with reading(source, "can't be read"):
            arrays = array_names(source)
    has_images = not arrays or ARRAY in arrays
    complete = {*SPATIAL} <= arrays or not (spatial and has_images)  # what is missing is computed from the images
    stored = stored_statistics(source, extractor, spatial, has_images) if "mu" in arrays and complete else None
    if stored is not None and not (keep and has_images):
        return stored
    images = open_images(source) if isinstance(source, str | Path) else source
    about = {"sha256": images.sha256(), "n": len(images.names), "statistics": OF_IMAGES}
    wanted = about | network_fields(extractor)
    warnings = left_out_warnings(images)
    if not (keep or spatial) and (found := cached_statistics(cache, wanted)) is not None:
        return Reference(found, about, warnings=(*warnings,))
    images.check(one_size=False)
    features = extract(images, extractor, batch_size=batch_size, label="reference", keep=keep, spatial=spatial)
    if stored is not None:
        return replace(stored, features=features)
    gaussian = features.moments.gaussian()
    try:
        if cache is not None:
            save_statistics(cache_file(cache, wanted), gaussian, wanted)
    except OSError as error:  # costs time in the next run, but must not cost what has been computed
        warnings.append(f"cache: the reference's statistics are not kept: {error}")
    maps = features.spatial.gaussian() if spatial else None
    return Reference(gaussian, about, maps, features if keep else None, (*warnings,))


def stored_statistics(path: str | Path, extractor: Extractor, spatial: bool, has_images: bool) -> Reference | None:
    """The statistics of a file; None if they are of another network or resize but there are images.

    Files of ours state their network. Published ones do not: they are of Inception, but those that are not of the ADM
    suite may have another resize, which the user must know. Raises ImageError: see `load_reference`.
    """
    gaussian, of = load_statistics(path)
    ours, stated = network_fields(extractor), of or PUBLISHED
    other = [key for key, value in ours.items() if stated.get(key, value) != value]
    unsure = of is None and other == ["resize"] and not has_images
    if other and not unsure:
        if has_images:
            return None
        one, two = stated[other[0]], ours[other[0]]
        raise ImageError(f"{path}: statistics of another {other[0]}, {one}, and no images; asked for is {two}")
    maps = load_statistics(path, *SPATIAL)[0] if spatial else None
    about = {"sha256": file_sha256(path), "n": gaussian.n, "statistics": IN_FILE}
    if of is not None:
        about |= {"sha256": of.get("sha256"), "statistics": of.get("statistics", OF_IMAGES)}
    doubts = [f"reference: a file that does not state its resize; taken for {extractor.resize}"]
    return Reference(gaussian, about, maps, warnings=(*(doubts if unsure else (of or {}).get("doubts", ())),))


def check_reference(reference: Reference, images: Images, extractor: Extractor, kernels: bool) -> None:
    """Check on the first image that the reference's statistics are as wide as the network's features; and that it has
    images for kernel distances, and enough for precision and recall. Raises ImageError: it is not so."""
    features = extractor.features([next(iter(images))])
    pairs = {"": (reference.gaussian, features.pooled), "spatial ": (reference.spatial, features.spatial)}
    for what, (gaussian, found) in pairs.items():
        if gaussian is not None and found is not None and (width := len(gaussian.mean)) != found.shape[1]:
            raise ImageError(f"statistics of {width} {what}features; {extractor.name} has {found.shape[1]}")
    if kernels and reference.features is None:
        raise ImageError("has mean and covariance only; KID and CMMD need its images")
    if reference.spatial is not None and reference.features is not None:
        check_neighbours(len(reference.features.pooled))


# Arithmetic, in float64


def distance(samples: Gaussian, reference: Gaussian) -> float:
    """Squared Fréchet distance of two normal distributions.

    |m1 - m2|^2 + tr C1 + tr C2 - 2 tr (C2^1/2 C1 C2^1/2)^1/2, with the eigenvalues of the symmetric product: real
    and finite also where a covariance is singular, which the square root of the plain product need not be.

    Raises ImageError: features of different widths.
    Source: Dowson and Landau (1982); its use for images: arXiv 1706.08500.
    """
    if samples.mean.shape != reference.mean.shape:
        raise ImageError(f"features of width {len(samples.mean)} and {len(reference.mean)} can't be compared")
    product = reference.root.T @ samples.covariance @ reference.root  # (rank, rank)
    shared = eigvalsh((product + product.T) / 2) if len(product) else np.zeros(0)
    noise = shared.max(initial=0) * len(shared) * np.finfo(np.float64).eps  # a zero that rounding moved
    cross = np.sqrt(shared[shared > noise]).sum()
    gap = samples.mean - reference.mean
    return float(max(gap @ gap + np.trace(samples.covariance) + np.trace(reference.covariance) - 2 * cross, 0.0))


def fid_infinity(features: np.ndarray, reference: Gaussian, points: int = 15, seed: int = 0) -> float:
    """The Fréchet distance extrapolated to infinitely many samples: a line through its values at several N, over 1/N.

    The points are spread evenly over N/10 .. N of the features (N, D). The line holds only where they are several times
    D, and at least INFINITY_LEAST. Source: Effectively Unbiased FID and Inception Score (arXiv 1911.07023).
    """
    n, random = len(features), np.random.default_rng(seed)
    sizes = np.linspace(n / 10, n, points).astype(int).clip(2)
    values = [distance(gaussian_of(features[random.choice(n, k, replace=False)]), reference) for k in sizes]
    return float(np.polynomial.Polynomial.fit(1 / sizes, values, 1).convert().coef[0])


def squared_distances(x: np.ndarray, y: np.ndarray) -> Iterator[np.ndarray]:
    """Squared distances of x (N, D) from y (M, D), some rows at a time."""
    y_squares = (y * y).sum(1)
    for start in range(0, len(x), BLOCK):
        part = x[start : start + BLOCK]
        squares = (part * part).sum(1)[:, None] + y_squares
        distances = squares - 2 * part @ y.T
        distances[distances < 1e-13 * squares] = 0  # equal points, but for rounding
        yield distances


def polynomial_kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (x @ y.T / x.shape[1] + 1) ** 3


def kernel_distance(
    x: np.ndarray, y: np.ndarray, subsets: int = 100, size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Kernel distance: mean and standard deviation of the unbiased squared MMD over random subsets of x, y: (N, D) and
    (M, D), of at most `size`. Raises ImageError: a subset would be of fewer than 2.
    Source: Demystifying MMD GANs (arXiv 1801.01401)."""
    size = min(size, len(x), len(y))
    if size < 2:
        raise ImageError(f"KID needs at least 2 images in both sets; got {len(x)} and {len(y)}")
    x, y, random = np.float64(x), np.float64(y), np.random.default_rng(seed)
    values = []
    for _ in range(subsets):
        a, b = (z[random.choice(len(z), size, replace=False)] for z in (x, y))
        same = sum(k.sum() - k.trace() for k in (polynomial_kernel(a, a), polynomial_kernel(b, b)))
        values.append(same / (size * (size - 1)) - 2 * polynomial_kernel(a, b).mean())
    return float(np.mean(values)), float(np.std(values))


def clip_distance(x: np.ndarray, y: np.ndarray, sigma: float = 10.0) -> float:
    """1000 times the squared MMD of CLIP embeddings (unit length), with a Gaussian kernel, biased. `x`, `y`: (N, D) and
    (M, D). Source: Rethinking FID (arXiv 2401.09603)."""

    def mean(a: np.ndarray, b: np.ndarray) -> float:
        return sum(np.exp(-part / (2 * sigma**2)).sum() for part in squared_distances(a, b)) / (len(a) * len(b))

    x, y = np.float64(x), np.float64(y)
    return float(1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y)))


def inception_score(logits: np.ndarray, split: int = SPLIT) -> tuple[float, float]:
    """exp of the mean divergence of p(class | image) from p(class), of logits (N, classes): mean and deviation over
    splits of so many images, in order. What is left over at the end is left out: a short split has a low score.
    Source: Improved Techniques for Training GANs (arXiv 1606.03498)."""
    scores = []
    for start in range(0, max(len(logits) // split, 1) * split, split):
        log_p = log_softmax(np.float64(logits[start : start + split]), axis=1)
        p = np.exp(log_p)
        mean = p.mean(0)
        log_mean = np.log(mean, out=np.zeros_like(mean), where=mean > 0)  # a class of none adds 0 * log 0 = 0
        scores.append(np.exp((p * (log_p - log_mean)).sum(1).mean()))
    return float(np.mean(scores)), float(np.std(scores))


def precision_recall(samples: np.ndarray, real: np.ndarray, k: int = NEIGHBOURS) -> tuple[float, float]:
    """Share of the samples (N, D) that lie among the real images (M, D), and of the real ones among the samples.

    A point lies among a set if it is no further from some member than that member's k-th nearest neighbour.
    Raises ImageError: see `check_neighbours`. Source: Improved Precision and Recall Metric (arXiv 1904.06991).
    """
    check_neighbours(min(len(samples), len(real)), k)
    samples, real = np.float64(samples), np.float64(real)

    def inside(points: np.ndarray, members: np.ndarray) -> float:
        radii = np.concatenate([np.partition(part, k, axis=1)[:, k] for part in squared_distances(members, members)])
        return float(np.concatenate([(part <= radii).any(1) for part in squared_distances(points, members)]).mean())

    return inside(samples, real), inside(real, samples)
