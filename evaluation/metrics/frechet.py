"""FID and its kin: Fréchet distance of samples from a reference, FID-infinity, KID and CMMD.

`compute` measures images; the functions below it are the arithmetic, in float64.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from scipy.linalg import eigvalsh

from evaluation.metrics.extractors import Extractor, load_extractor, network_fields
from evaluation.metrics.result import Result, normal_interval
from evaluation.metrics.result import bootstrap as resampled
from evaluation.metrics.statistics import FeatureSet, Gaussian, Moments, Reference, check_width, extract, load_reference
from evaluation.runs.images import ImageError, Images, Source, image_warnings, open_samples
from ldm.io.errors import SettingError, fault_of

KID_SUBSETS, KID_SIZE, POINTS = 100, 1000, 15
CMMD_MODEL = 336, 14, 1024, 24  # pixels, patch size, width and layers of the CLIP model that it is published with
INFINITY_LEAST = 20  # samples: the smallest point has a tenth of them, and a covariance needs two
BLOCK = 1024  # rows of a matrix of distances that are in memory at a time


def compute(
    samples: Source,
    reference: Source | Reference,
    *,
    extractor: Extractor | str = "inception-2015",
    weights: str | Path | None = None,
    resize: str | None = None,
    batch_size: int = 50,
    device: str = "auto",
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
        reference: the same, an npz file of statistics (mu, sigma), or a loaded reference.
        extractor, weights, resize, device: of the feature network, see `load_extractor`.
        batch_size: images per batch; changes speed and memory only.
        kid: also KID (kid_real, kid_real_std). cmmd: also CMMD (cmmd_real). infinity: also FID-infinity
            (fid_infinity_real).
        bootstrap: how often the samples are resampled for a 95 % interval (fid_real_interval); None = no interval.
        seed: of KID's subsets, FID-infinity's points and the resampling.
        cache: folder that keeps statistics of reference images; None = none.

    Raises SettingError: an argument can't be used; it names the argument.
    """
    with fault_of("samples"):
        images = open_samples(samples)
        made, n = images.provenance, len(images.names)
    name = extractor if isinstance(extractor, str) else extractor.name
    if cmmd and name != "clip":
        raise SettingError("cmmd", f"is defined for CLIP's embeddings: needs the extractor clip; got {name}")
    if infinity and n < INFINITY_LEAST:
        raise SettingError("infinity", f"needs at least {INFINITY_LEAST} samples; got {n}")
    with fault_of("extractor"):
        network = load_extractor(extractor, weights, resize, device)
    with fault_of("reference"):
        real = reference
        if not isinstance(real, Reference):
            real = load_reference(real, network, batch_size=batch_size, cache=cache, keep=kid or cmmd)
        check_width(real, images, network)
        if (kid or cmmd) and real.features is None:
            raise ImageError("has mean and covariance only; KID and CMMD need its images")
    protocol = {"measure": "fid", **protocol_fields(network, images, real)}
    settings = {"bootstrap": {"resamples": bootstrap, "seed": seed}} if bootstrap else {}
    with fault_of("samples"):
        keep = kid or cmmd or infinity or bootstrap is not None
        found = extract(images, network, batch_size=batch_size, label="samples", keep=keep)
        values: dict[str, Any] = {"fid_real": distance(found.moments.gaussian(), real.gaussian)}
        warnings = measure_warnings(images, real)
        if bootstrap:
            interval = distance_interval(values["fid_real"], found, real.gaussian, bootstrap, seed)
            values["fid_real_interval"] = interval
        if infinity:
            values["fid_infinity_real"] = fid_infinity(found.pooled, real.gaussian, POINTS, seed)
        if kid:
            pair = found.pooled, real.features.pooled
            values["kid_real"], values["kid_real_std"] = kernel_distance(*pair, KID_SUBSETS, KID_SIZE, seed)
            size = min(KID_SIZE, *map(len, pair))
            protocol["kid"] = {"subsets": KID_SUBSETS, "size": size, "seed": seed}
        if cmmd:
            values["cmmd_real"] = clip_distance(found.pooled, real.features.pooled)
            warnings += cmmd_warnings(network)
    if infinity:
        protocol["infinity"] = {"points": POINTS, "seed": seed}
        warnings += infinity_warnings(found)
    return Result(values, protocol, made, warnings, settings)


def distance_interval(value: float, samples: FeatureSet, real: Gaussian, count: int, seed: int) -> list[float]:
    """95 % interval of the distance `value`, by resampling the samples `count` times."""
    again = resampled(samples.pooled, lambda part: distance(Moments.from_features(part).gaussian(), real), count, seed)
    return normal_interval(value, again)


def protocol_fields(extractor: Extractor, images: Images, reference: Reference) -> dict[str, Any]:
    """The fields of a result's protocol that distances share."""
    return {
        **network_fields(extractor),
        "n": len(images.names),
        "reference": reference.about,
        "prompts": images.provenance.get("protocol_sha256"),
    }


# Warnings


def measure_warnings(images: Images, reference: Reference) -> list[str]:
    """What to bear in mind of the images and their distance from the reference."""
    width = len(reference.gaussian.mean)
    return [
        *image_warnings(images),
        *few_images_warnings(len(images.names), width, "samples"),
        *few_images_warnings(reference.gaussian.n, width, "reference"),
        *reference.warnings,
    ]


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


def infinity_warnings(samples: FeatureSet) -> list[str]:
    n, width = samples.pooled.shape
    if n >= 20 * width:  # the smallest point has n / 10
        return []
    return [
        f"fid_infinity_real: {n} images for {width} features are too few for a straight line; needs {20 * width} or "
        f"more"
    ]


def cmmd_warnings(extractor: Extractor) -> list[str]:
    found = (extractor.size, *extractor.network.shape)
    if found == CMMD_MODEL:
        return []
    return [
        f"cmmd_real: published values are of another CLIP model (pixels, patch size, width, layers {CMMD_MODEL}; this "
        f"one has {found})"
    ]


# Arithmetic


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

    Args:
        features: (N, D) of the samples. The N of the points are spread evenly over N/10 .. N. The line holds only
            where they are several times D, and at least INFINITY_LEAST.
        reference: is taken as it is.

    Source: Effectively Unbiased FID and Inception Score (arXiv 1911.07023).
    """
    n = len(features)
    random = np.random.default_rng(seed)
    sizes = np.linspace(n / 10, n, points).astype(int).clip(2)
    values = [
        distance(Moments.from_features(features[random.choice(n, size, replace=False)]).gaussian(), reference)
        for size in sizes
    ]
    return float(np.polynomial.Polynomial.fit(1 / sizes, values, 1).convert().coef[0])


# Kernel distances


def polynomial_kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (x @ y.T / x.shape[1] + 1) ** 3


def gaussian_kernel(x: np.ndarray, y: np.ndarray, sigma: float = 10.0) -> np.ndarray:
    squares = (x * x).sum(1)[:, None] + (y * y).sum(1) - 2 * x @ y.T
    return np.exp(-squares.clip(0) / (2 * sigma**2))


def kernel_distance(
    x: np.ndarray, y: np.ndarray, subsets: int = 100, size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Kernel distance: mean and standard deviation over random subsets of the unbiased squared MMD.

    Args:
        x, y: (N, D) and (M, D).
        size: of the subsets; not more than there are.

    Raises ImageError: a subset would be of fewer than 2.
    Source: Demystifying MMD GANs (arXiv 1801.01401).
    """
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


def clip_distance(x: np.ndarray, y: np.ndarray) -> float:
    """1000 times the squared MMD of CLIP embeddings (unit length), with a Gaussian kernel of sigma 10, biased. `x`,
    `y`: (N, D) and (M, D). Source: Rethinking FID (arXiv 2401.09603)."""

    def mean(a: np.ndarray, b: np.ndarray) -> float:
        return sum(gaussian_kernel(a[i : i + BLOCK], b).sum() for i in range(0, len(a), BLOCK)) / (len(a) * len(b))

    x, y = np.float64(x), np.float64(y)
    return float(1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y)))
