"""The ADM suite without TensorFlow: FID, sFID, Inception Score, precision and recall.

`compute` measures images; the functions below it are the arithmetic, in float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import log_softmax

from evaluation.metrics.extractors import Extractor, load_extractor
from evaluation.metrics.frechet import distance, distance_interval, measure_warnings, protocol_fields
from evaluation.metrics.result import Result, normal_interval, share_interval
from evaluation.metrics.result import bootstrap as resampled
from evaluation.metrics.statistics import FeatureSet, Reference, check_width, extract, load_reference
from evaluation.runs.images import ImageError, Images, Source, open_samples
from ldm.io.errors import fault_of

NEIGHBOURS = 3
SPLIT = 5000  # images of one Inception Score
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
    bootstrap: int | None = None,
    seed: int = 0,
) -> Result:
    """The suite of samples against a reference: fid_real, sfid_real, inception_score, precision, recall.

    There is no Inception Score without a classifier, and no precision and recall without images of the reference.

    Args:
        samples: see `Source`.
        reference: the same, an npz file of statistics (mu, sigma, mu_s, sigma_s), or what `suite_reference` loaded.
        extractor, weights, resize, device: of the feature network, see `load_extractor`.
        batch_size: images per batch; changes speed and memory only.
        bootstrap: how often the samples are resampled for 95 % intervals; None = no intervals.
        seed: of the resampling.

    Raises SettingError: an argument can't be used; it names the argument.
    """
    with fault_of("samples"):
        images = suite_samples(samples)
        made = images.provenance
    with fault_of("extractor"):
        network = load_extractor(extractor, weights, resize, device)
    with fault_of("reference"):
        real = reference if isinstance(reference, Reference) else suite_reference(reference, network, batch_size)
        check_width(real, images, network)
    with fault_of("samples"):
        found = extract(images, network, batch_size=batch_size, label="samples", keep=True, spatial=True)
        values = all_values(found, real, bootstrap, seed)
    warnings = measure_warnings(images, real)
    if real.features is None:
        warnings.append("reference: has statistics but no images: no precision and recall")
    protocol = {"measure": "adm", **protocol_fields(network, images, real), "neighbours": NEIGHBOURS, "split": SPLIT}
    settings = {"bootstrap": {"resamples": bootstrap, "seed": seed}} if bootstrap else {}
    return Result(values, protocol, made, warnings, settings)


def suite_samples(source: Source) -> Images:
    """Samples that are enough for the suite. Raises ImageError: see `open_samples`; or they are too few."""
    images = open_samples(source)
    check_neighbours(len(images.names))
    return images


def suite_reference(source: Source, extractor: Extractor, batch_size: int = 50) -> Reference:
    """A reference with all that the suite needs; see `load_reference`.
    Raises ImageError: see `load_reference`; or too few images for precision and recall."""
    real = load_reference(source, extractor, batch_size=batch_size, keep=True, spatial=True)
    if real.features is not None:
        check_neighbours(len(real.features.pooled))
    return real


def check_neighbours(n: int, k: int = NEIGHBOURS) -> None:
    """Precision and recall need k neighbours. Raises ImageError: n images are too few."""
    if n <= k:
        raise ImageError(f"precision and recall, of {k} neighbours, need at least {k + 1} images; got {n}")


def all_values(samples: FeatureSet, reference: Reference, count: int | None, seed: int) -> dict[str, Any]:
    """The suite's values, by name; and, if the samples are resampled `count` times, the 95 % intervals over the samples
    of all but sFID, whose features are not kept.

    FID and Inception Score: by resampling. Precision and recall: as shares of independent images; that the images which
    they are compared with are a sample too is not included.
    """
    fid = distance(samples.moments.gaussian(), reference.gaussian)
    values: dict[str, Any] = {"fid_real": fid, "sfid_real": distance(samples.spatial.gaussian(), reference.spatial)}
    found = {"fid_real": distance_interval(fid, samples, reference.gaussian, count, seed)} if count else {}
    if samples.logits is not None:
        values["inception_score"], values["inception_score_std"] = inception_score(samples.logits, SPLIT)
        if count:
            again = resampled(samples.logits, lambda part: inception_score(part, SPLIT)[0], count, seed)
            found["inception_score"] = normal_interval(values["inception_score"], again)
    if reference.features is not None:
        sets = samples.pooled, reference.features.pooled
        values["precision"], values["recall"] = precision_recall(*sets, NEIGHBOURS)
        for name, of in zip(("precision", "recall"), sets, strict=True) if count else ():
            found[name] = share_interval(round(values[name] * len(of)), len(of))
    return values | {f"{name}_interval": interval for name, interval in found.items()}


# Arithmetic


def inception_score(logits: np.ndarray, split: int = 5000) -> tuple[float, float]:
    """exp of the mean divergence of p(class | image) from p(class): mean and deviation over splits in order.

    Args:
        logits: (N, classes).
        split: images of a split. What is left over at the end is left out: a short split has a low score.

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
    """Share of the samples that lie among the real images, and of the real ones that lie among the samples.

    A point lies among a set if it is no further from some member than that member's k-th nearest neighbour.

    Args:
        samples, real: (N, D) and (M, D).

    Raises ImageError: see `check_neighbours`. Source: Improved Precision and Recall Metric (arXiv 1904.06991).
    """
    check_neighbours(min(len(samples), len(real)), k)
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
