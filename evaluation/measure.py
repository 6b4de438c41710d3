"""What the measures' command lines share: pictures to features, reference statistics with a cache, flags."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.cli import BadInput, blame, number

# What needs PyTorch is imported where it is used: --help must answer at once.
if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

    from evaluation.features import Extractor
    from evaluation.moments import Gaussian, Moments
    from evaluation.pictures import Pictures

EXTRACTORS = ("inception-2015", "efficientnet-lite0", "dinov2", "clip")
RECIPES = ("clean", "tf1-bilinear", "torch-bilinear", "torch-antialias", "clip-crop")
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


def look(pictures: Pictures, extract: Extractor, batch: int, device: torch.device, label: str,
         keep: bool = False, spatial: bool = False) -> Seen:
    """Show all pictures to the network, once.

    Args:
        batch: pictures at a time; changes speed and memory only.
        keep: keep features and logits of every picture, for measures that need more than moments.
        spatial: take the moments of spatial features as well.

    Raises:
        PictureError: a picture can't be read, or the network has no spatial features.
    """
    import numpy as np

    from evaluation.errors import PictureError
    from evaluation.moments import Moments, total

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
    return Seen(pooled[0], maps[0] if maps else None, np.concatenate(features) if features else None,
                np.concatenate(logits) if logits else None)


def array(features: Tensor) -> np.ndarray:
    return features.float().cpu().numpy()


def network_of(extract: Extractor) -> dict[str, Any]:
    """The network and the resize, for a protocol."""
    return {"extractor": extract.name, "features_sha256": extract.sha256, "resize": extract.resize,
            "size": extract.size}


@dataclass(frozen=True)
class Reference:
    """What samples are compared with.

    gaussian: of its features. about: what it is of, for a protocol.
    pooled:   (M, D), if they were asked for.
    """

    gaussian: Gaussian
    about: dict[str, Any]
    pooled: np.ndarray | None = None


def reference(path: str, extract: Extractor, batch: int, device: torch.device, cache: str | Path | None,
              keep: bool = False) -> Reference:
    """Statistics of reference pictures: from a statistics file, from the cache, or else computed and cached.

    Raises:
        PictureError: pictures or statistics that can't be used, or statistics of another network or resize.
    """
    from evaluation.moments import cache_file, cached_statistics, save_statistics
    from evaluation.pictures import open_pictures

    if is_statistics(path):
        return published(path, extract, keep)
    pictures = open_pictures(path)
    about = {"sha256": pictures.sha256(), "n": len(pictures.names)}
    wanted = about | network_of(extract)
    found = None if keep else cached_statistics(cache, wanted)
    if found is not None:
        return Reference(found, about)
    pictures.check(one_size=False)
    seen = look(pictures, extract, batch, device, "reference", keep)
    gaussian = seen.moments.gaussian()
    if cache is not None:
        with blame("--cache", (OSError,)):
            save_statistics(cache_file(cache, wanted), gaussian, wanted)
    return Reference(gaussian, about, seen.pooled)


def is_statistics(path: str) -> bool:
    """Whether this is an npz file that has mean and covariance but no pictures."""
    import numpy as np

    if Path(path).suffix != ".npz" or not Path(path).is_file():
        return False
    try:
        with np.load(path, allow_pickle=False) as file:
            return "mu" in file.files and "arr_0" not in file.files
    except Exception:  # a damaged file fails later, with a message of its own
        return False


def published(path: str, extract: Extractor, keep: bool) -> Reference:
    """A statistics file; if it says what network it is of, that must be this one."""
    from evaluation.errors import PictureError
    from evaluation.moments import load_statistics
    from ldm.util import file_sha256

    if keep:
        raise PictureError(f"{path}: holds mean and covariance only; KID and CMMD need the pictures themselves")
    gaussian, about = load_statistics(path)
    for key, value in network_of(extract).items():
        if about is not None and about.get(key, value) != value:
            raise PictureError(f"{path}: statistics of another {key}: {about[key]}; asked for is {value}")
    return Reference(gaussian, {"sha256": file_sha256(path) if about is None else about.get("sha256"),
                                "n": gaussian.n})


# Flags

def add_network(p: argparse.ArgumentParser, default: str = "inception-2015") -> None:
    group = p.add_argument_group("network")
    group.add_argument("--extractor", choices=EXTRACTORS, default=default, help="the network that looks at pictures")
    group.add_argument("--weights", metavar="PATH", help="its weights: a file, or a folder for dinov2 and clip; "
                                                         "default: where its package or download puts them")
    group.add_argument("--resize", choices=RECIPES, help="how pictures come to its size; default: as is usual with it")
    add_run(p)


def add_run(p: argparse.ArgumentParser) -> None:
    p.add_argument("--batch-size", type=number(int, 1, math.inf, "a whole number >= 1"), default=50, metavar="N",
                   help="pictures at a time; changes speed and memory only")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    p.add_argument("--out", metavar="JSON", help="write the result, with all that it depends on")


def add_cache(p: argparse.ArgumentParser) -> None:
    p.add_argument("--cache", default=str(CACHE), metavar="DIR",
                   help="where statistics of reference pictures are kept; 'none' = nowhere")


def cache_of(args: argparse.Namespace) -> str | None:
    return None if args.cache == "none" else args.cache


def check_output(path: str | None) -> None:
    """It must be possible to write the file; found out before the work."""
    if path is None:
        return
    place = next(p for p in Path(path).absolute().parents if p.exists())
    if Path(path).is_dir() or not place.is_dir() or not os.access(place, os.W_OK):
        raise BadInput(f"--out: can't write {path}; expected a file in a writable directory")


def load_network(args: argparse.Namespace) -> tuple[Extractor, torch.device]:
    """The network that the flags name, on its device."""
    from evaluation.errors import FeatureError
    from evaluation.features import extractor
    from ldm.script import find_device

    device = find_device(args.device)
    with blame("--weights" if args.weights else "--extractor", (FeatureError,)):
        return extractor(args.extractor, args.weights, args.resize).to(device), device


def open_samples(argument: str, path: str, one_size: bool = True) -> Pictures:
    """Pictures that are worth looking at, found out before the work."""
    from evaluation.errors import PictureError
    from evaluation.pictures import open_pictures

    with blame(argument, (PictureError,)):
        pictures = open_pictures(path)
        pictures.check(one_size)
        return pictures


def how_made(argument: str, pictures: Pictures) -> dict[str, Any]:
    """Plan, seeds, weights of the pictures, as far as they are known; found out before the work."""
    from evaluation.errors import PictureError

    with blame(argument, (PictureError,)):
        return pictures.made_with()
