"""What the measures' command lines share: pictures to features, reference statistics with a cache, flags."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.cli.arguments import count
from ldm.io.errors import BadInput, blame, some
from ldm.io.files import file_sha256

# What needs PyTorch is imported where it is used: --help must answer at once.
if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

    from evaluation.metrics.extractors import Extractor
    from evaluation.metrics.statistics import Gaussian, Moments
    from evaluation.runs.images import Pictures

EXTRACTORS = ("inception-2015", "efficientnet-lite0", "dinov2", "clip")
RECIPES = ("clean", "tf1-bilinear", "torch-bilinear", "torch-antialias", "clip-crop")
PUBLISHED = {"extractor": "inception-2015", "resize": "tf1-bilinear"}  # what statistics that do not say it are of
OF_PICTURES = "of its pictures"
OF_PROTOCOL = "protocol:"  # before the name of a protocol, whose real pictures are meant
CACHE = Path.home() / ".cache" / "faster-diffusion-ldm" / "statistics"


@dataclass(frozen=True)
class Seen:
    """What a network saw in N pictures.

    moments: of its pooled features. spatial: of the spatial ones, if they were asked for.
    pooled:  (N, D) float32, if they were to be kept; logits: (N, classes), the same.
    """

    moments: Moments
    spatial: Moments | None = None
    pooled: np.ndarray | None = None
    logits: np.ndarray | None = None


def batches(pictures: Pictures, extract: Extractor, batch: int, label: str) -> Iterator[Tensor]:
    """Pictures at the network's size, (B, 3, size, size), each resized on its own; with progress."""
    import torch
    from tqdm import tqdm

    waiting: list[Tensor] = []
    for picture in tqdm(pictures, total=len(pictures.names), desc=f"features: {label}", unit="image", disable=None):
        waiting.append(extract.prepare(picture[None]))
        if len(waiting) == batch:
            yield torch.cat(waiting)
            waiting = []
    if waiting:
        yield torch.cat(waiting)


def look(
    pictures: Pictures,
    extract: Extractor,
    batch: int,
    device: torch.device,
    label: str,
    keep: bool = False,
    spatial: bool = False,
) -> Seen:
    """Show all pictures to the network, once.

    Args:
        batch: pictures at a time; changes speed and memory only.
        keep: keep features and logits of every picture, for measures that need more than moments.
        spatial: take the moments of spatial features as well.

    Raises:
        PictureError: a picture can't be read, or the network has no spatial features.
    """
    import numpy as np

    from evaluation.metrics.statistics import Moments, total
    from evaluation.runs.errors import PictureError

    pooled, maps, features, logits = [], [], [], []
    for prepared in batches(pictures, extract, batch, label):
        views = extract.see(prepared.to(device))
        pooled.append(Moments.of(array(views.pooled)))
        if spatial:
            if views.spatial is None:
                raise PictureError(f"{extract.name} has no spatial features")
            maps.append(Moments.of(array(views.spatial)))
        if keep:
            features.append(array(views.pooled))
            logits += [] if views.logits is None else [array(views.logits)]
        pooled, maps = ([total(parts)] if parts else [] for parts in (pooled, maps))
    return Seen(
        pooled[0],
        maps[0] if maps else None,
        np.concatenate(features) if features else None,
        np.concatenate(logits) if logits else None,
    )


def array(features: Tensor) -> np.ndarray:
    return features.float().cpu().numpy()


def network_of(extract: Extractor) -> dict[str, Any]:
    """The network and the resize, for a protocol."""
    return {
        "extractor": extract.name,
        "features_sha256": extract.sha256,
        "resize": extract.resize,
        "size": extract.size,
    }


@dataclass(frozen=True)
class Reference:
    """What samples are compared with.

    gaussian: of its pooled features; spatial: of the spatial ones, if they were asked for.
    about:    what it is of, for a protocol.
    seen:     its pictures, if they were to be kept and are there.
    warnings: what is not known of it, in words.
    """

    gaussian: Gaussian
    about: dict[str, Any]
    spatial: Gaussian | None = None
    seen: Seen | None = None
    warnings: tuple[str, ...] = ()


def reference(
    source: str | Pictures,
    extract: Extractor,
    batch: int,
    device: torch.device,
    cache: str | Path | None = None,
    keep: bool = False,
    spatial: bool = False,
) -> Reference:
    """Statistics of reference pictures: those in the file if they are of this network, else of its pictures.

    Args:
        source: a folder, an npy file, or an npz file with pictures, statistics or both; or pictures.
        cache: folder for statistics of pictures; None = none.
        keep: the pictures' features are needed as well; spatial: see `look`.

    Raises:
        PictureError: what can't be read, or statistics of another network or resize without pictures.
    """
    from evaluation.metrics.statistics import SPATIAL, cache_file, cached_statistics, save_statistics
    from evaluation.runs.images import ARRAY

    arrays = arrays_in(source) if isinstance(source, str) else set()
    pictured = not arrays or ARRAY in arrays
    enough = {*SPATIAL} <= arrays or not (spatial and pictured)  # what is missing can be taken of the pictures
    stored = stored_statistics(source, extract, spatial, pictured) if "mu" in arrays and enough else None
    if stored is not None and not (keep and pictured):
        return stored
    pictures = pictures_at(source) if isinstance(source, str) else source
    about = {"sha256": pictures.sha256(), "n": len(pictures.names), "statistics": OF_PICTURES}
    wanted = about | network_of(extract)
    found = None if keep or spatial else cached_statistics(cache, wanted)
    if found is not None:
        return Reference(found, about)
    pictures.check(one_size=False)
    seen = look(pictures, extract, batch, device, "reference", keep, spatial)
    if stored is not None:
        return replace(stored, seen=seen)
    gaussian = seen.moments.gaussian()
    if cache is not None:
        try:
            save_statistics(cache_file(cache, wanted), gaussian, wanted)
        except OSError as error:  # costs time the next time, but must not cost what has been computed
            print(f"warning: --cache: the reference's statistics are not kept: {error}", file=sys.stderr)
    return Reference(gaussian, about, seen.spatial.gaussian() if spatial else None, seen if keep else None)


def real_of(args: argparse.Namespace) -> str | Pictures:
    """What REFERENCE names: a path as it is, or the pictures (or the path) of a protocol's.

    Raises:
        BadInput: no such protocol, or none with real pictures.
    """
    kind, colon, name = args.reference.partition(":")
    if kind + colon != OF_PROTOCOL:
        if args.data is not None:
            raise BadInput(f"--data: is for a REFERENCE {OF_PROTOCOL}NAME; got {args.reference}")
        return args.reference
    from evaluation.metrics.real_images import real_pictures
    from evaluation.protocols.protocol import load_protocol

    with blame("REFERENCE"):
        protocol = load_protocol(name)
        found = real_pictures(protocol, protocol.folder(args.data))
    return str(found) if isinstance(found, Path) else found


def arrays_in(path: str) -> set[str]:
    """Names of the arrays in an npz file; none of anything else."""
    from evaluation.runs.errors import reading
    from ldm.io.arrays import array_names

    if Path(path).suffix != ".npz":
        return set()
    with reading(path, "can't be read"):
        return array_names(path)


def stored_statistics(path: str, extract: Extractor, spatial: bool, pictured: bool) -> Reference | None:
    """Those of the file; None if they are of another network or resize but there are pictures.

    Files of ours say what they are of. Published ones do not: they are of Inception, and if not of the ADM suite
    perhaps with another resize, which the user must know.

    Raises:
        PictureError: they are of another network or resize and there are no pictures; or are no statistics.
    """
    from evaluation.metrics.statistics import SPATIAL, load_statistics
    from evaluation.runs.errors import PictureError

    gaussian, of = load_statistics(path)
    ours, stated = network_of(extract), of or PUBLISHED
    other = [key for key, value in ours.items() if stated.get(key, value) != value]
    unsure = of is None and other == ["resize"] and not pictured
    if other and not unsure:
        if pictured:
            return None
        raise PictureError(
            f"{path}: statistics of another {other[0]}, {stated[other[0]]}, and no pictures; asked for "
            f"is {ours[other[0]]}"
        )
    maps = load_statistics(path, *SPATIAL)[0] if spatial else None
    about = (
        {"sha256": file_sha256(path), "n": gaussian.n, "statistics": "in the file"}
        if of is None
        else {"sha256": of.get("sha256"), "n": gaussian.n, "statistics": of.get("statistics", OF_PICTURES)}
    )
    warnings = (
        (f"reference: a file that does not say its resize; taken for {extract.resize}",)
        if unsure
        else (*(of or {}).get("doubts", ()),)
    )
    return Reference(gaussian, about, maps, warnings=warnings)


# Flags


def add_network(p: argparse.ArgumentParser, default: str = "inception-2015") -> None:
    group = p.add_argument_group("network")
    group.add_argument("--extractor", choices=EXTRACTORS, default=default, help="the network that looks at pictures")
    group.add_argument(
        "--weights",
        metavar="PATH",
        help="its weights: a file, or a folder for dinov2 and clip; default: where its package or download puts them",
    )
    group.add_argument("--resize", choices=RECIPES, help="how pictures come to its size; default: as is usual with it")
    add_run(p)


def add_run(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--batch-size", type=count, default=50, metavar="N", help="pictures at a time; changes speed and memory only"
    )
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    p.add_argument("--out", metavar="JSON", help="write the result, with all that it depends on")


def add_reference(p: argparse.ArgumentParser, what: str) -> None:
    p.add_argument("reference", metavar="REFERENCE", help=f"{what}; or {OF_PROTOCOL}NAME, as generate.py names it")
    p.add_argument("--data", metavar="DIR", help=f"of a {OF_PROTOCOL}NAME: the folder of its data; default: its own")


def add_cache(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--cache",
        default=str(CACHE),
        metavar="DIR",
        help="where statistics of reference pictures are kept; 'none' = nowhere",
    )


def cache_of(args: argparse.Namespace) -> str | None:
    return None if args.cache == "none" else args.cache


def load_network(args: argparse.Namespace) -> tuple[Extractor, torch.device]:
    """The network that the flags name, on its device."""
    from evaluation.metrics.extractors import extractor
    from evaluation.runs.errors import FeatureError
    from ldm.cli.devices import find_device

    device = find_device(args.device)
    with blame("--weights" if args.weights else "--extractor", (FeatureError, OSError)):
        return extractor(args.extractor, args.weights, args.resize).to(device), device


def open_samples(argument: str, path: str, one_size: bool = True) -> Pictures:
    """Pictures that are worth looking at, found out before the work."""
    from evaluation.runs.errors import PictureError

    with blame(argument, (PictureError, OSError)):
        pictures = pictures_at(path)
        pictures.check(one_size)
        return pictures


def pictures_at(path: str) -> Pictures:
    """A folder or array of pictures; of files in the folder that are left out it is said."""
    from evaluation.runs.images import SHOWN, SUFFIXES, Folder, open_pictures

    pictures = open_pictures(path)
    if isinstance(pictures, Folder) and (left := pictures.left_out):
        print(
            f"warning: {path}: {len(left)} of {len(left) + len(pictures.names)} files are left out, since their "
            f"names do not end in {', '.join(SUFFIXES)}{some(left, SHOWN)}",
            file=sys.stderr,
        )
    return pictures


def how_made(argument: str, pictures: Pictures) -> dict[str, Any]:
    """Plan, seeds, weights of the pictures, as far as they are known; found out before the work."""
    from evaluation.runs.errors import PictureError

    with blame(argument, (PictureError,)):
        return pictures.made_with()


def check_width(real: Reference, pictures: Pictures, extract: Extractor, device: torch.device) -> None:
    """Statistics must be as wide as what the network sees; found out by the first picture.

    Raises:
        PictureError: they are not.
    """
    from evaluation.runs.errors import PictureError

    views = extract.see(extract.prepare(next(iter(pictures))[None]).to(device))
    for what, gaussian, seen in (("", real.gaussian, views.pooled), ("spatial ", real.spatial, views.spatial)):
        if gaussian is not None and seen is not None and len(gaussian.mean) != seen.shape[1]:
            raise PictureError(f"statistics of {len(gaussian.mean)} {what}features; {extract.name} has {seen.shape[1]}")


def incomplete(pictures: Pictures, made: dict[str, Any]) -> list[str]:
    """A warning, if the run that made the pictures has not made as many as it was to."""
    expected = made.get("pictures")
    if type(expected) is not int or expected == len(pictures.names):
        return []
    return [
        f"{pictures.path}: {len(pictures.names)} pictures of a run of {expected}: it is not finished, or not all "
        f"of it is here"
    ]
