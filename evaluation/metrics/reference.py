"""The reference that samples are compared with: statistics of its features, from a file, a cache or its images."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from evaluation.metrics.extractors import Extractor, FeatureSet, extract, network_fields
from evaluation.metrics.statistics import (
    SPATIAL,
    Gaussian,
    cache_file,
    cached_statistics,
    load_statistics,
    save_statistics,
)
from evaluation.runs.errors import ImageError, reading
from evaluation.runs.images import ARRAY, Images, left_out_warnings, open_images
from ldm.io.arrays import array_names
from ldm.io.files import file_sha256

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
    source: str | Path | Images,
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

    Raises:
        ImageError: it can't be read, or has statistics of another network or resize and no images.
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
    gaussian = features.moments.gaussian()
    unsaved = () if cache is None else save_in_cache(cache, gaussian, wanted)
    return Reference(
        gaussian,
        about,
        features.spatial.gaussian() if spatial else None,
        features if keep else None,
        (*left_out, *unsaved),
    )


def save_in_cache(folder: str | Path, gaussian: Gaussian, about: dict[str, Any]) -> tuple[str, ...]:
    """A warning if they can't be saved: that costs time in the next run, but must not cost what has been computed."""
    try:
        save_statistics(cache_file(folder, about), gaussian, about)
    except OSError as error:
        return (f"cache: the reference's statistics are not kept: {error}",)
    return ()


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

    Raises:
        ImageError: they are of another network or resize and there are no images; or are no statistics.
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


def check_width(reference: Reference, images: Images, extractor: Extractor) -> None:
    """Check on the first image that the reference's statistics are as wide as the network's features.

    Raises:
        ImageError: they are not.
    """
    first = next(iter(images))[None].to(extractor.device)
    features = extractor.extract(extractor.prepare(first))
    for what, gaussian, found in (
        ("", reference.gaussian, features.pooled),
        ("spatial ", reference.spatial, features.spatial),
    ):
        if gaussian is not None and found is not None and len(gaussian.mean) != found.shape[1]:
            raise ImageError(
                f"statistics of {len(gaussian.mean)} {what}features; {extractor.name} has {found.shape[1]}"
            )
