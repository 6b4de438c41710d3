"""The ADM suite without TensorFlow: FID, sFID, Inception Score, precision and recall of SAMPLES against REFERENCE.

REFERENCE is an npz file as published with guided diffusion: pictures in arr_0, statistics in mu, sigma, mu_s, sigma_s,
or both; or a folder. SAMPLES is an npz file with pictures in arr_0, or a folder. The published statistics are of
inception-2015 with its own resize (tf1-bilinear); for another network they are taken of the reference's pictures.
"""

from __future__ import annotations

import argparse
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaluation.measure import add_network, check_output, how_made, load_network, look, network_of, open_samples
from ldm.cli import Parser, blame, command
from ldm.util import file_sha256

# What needs PyTorch is imported where it is used: --help must answer at once.
if TYPE_CHECKING:
    import torch

    from evaluation.features import Extractor
    from evaluation.measure import Seen
    from evaluation.moments import Gaussian

NEIGHBOURS = 3
SPLIT = 5000                                            # pictures of one Inception Score
PUBLISHED = {"extractor": "inception-2015", "resize": "tf1-bilinear"}    # what published statistics are of


@dataclass(frozen=True)
class Reference:
    """pooled and spatial statistics; what they are of; seen: the pictures, None if the file has only statistics."""

    pooled: Gaussian
    spatial: Gaussian
    about: dict[str, Any]
    seen: Seen | None


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="adm.py", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("reference", metavar="REFERENCE", help="npz file or folder")
    p.add_argument("samples", metavar="SAMPLES", help="npz file or folder")
    p.add_argument("--save-statistics", metavar="NPZ", help="write the reference's statistics")
    add_network(p)
    return p


def arrays_in(path: str) -> set[str]:
    """Names of the arrays in an npz file; none for a folder."""
    from evaluation.errors import PictureError

    if Path(path).is_dir():
        return set()
    try:
        with zipfile.ZipFile(path) as archive:
            return {name.removesuffix(".npy") for name in archive.namelist()}
    except (OSError, zipfile.BadZipFile) as error:
        raise PictureError(f"{path}: neither a folder nor an npz file: {error}") from error


def load_reference(path: str, extract: Extractor, batch: int, device: torch.device) -> Reference:
    """Statistics from the file if they are of this network, else of its pictures.

    Raises:
        PictureError: neither can be had.
    """
    from evaluation.errors import PictureError
    from evaluation.pictures import ARRAY, open_pictures

    arrays = arrays_in(path)
    stored = stored_statistics(path, extract) if {"mu", "sigma"} <= arrays else None
    if stored is None and arrays and ARRAY not in arrays:
        raise PictureError(f"{path}: has no pictures ({ARRAY}), and no statistics of {extract.name} with "
                           f"{extract.resize}; it has: {', '.join(sorted(arrays))}")
    seen = None
    about: dict[str, Any] = {"n": None}
    if not arrays or ARRAY in arrays:
        pictures = open_pictures(path)
        pictures.check(one_size=False)
        seen = look(pictures, extract, batch, device, "reference", keep=True, spatial=True)
        about = {"n": len(pictures.names), "sha256": pictures.sha256()}
    if stored is None:
        about["statistics"] = "of its pictures"
        return Reference(seen.moments.gaussian(), seen.spatial.gaussian(), about, seen)
    return Reference(*stored, about | {"sha256": file_sha256(path), "statistics": "in the file"}, seen)


def stored_statistics(path: str, extract: Extractor) -> tuple[Gaussian, Gaussian] | None:
    """Those of the file; None if they are of another network."""
    from evaluation.moments import SPATIAL, load_statistics

    pooled, about = load_statistics(path)
    ours = network_of(extract)
    if any(ours[key] != value for key, value in (about or PUBLISHED).items() if key in ours):
        return None
    return pooled, load_statistics(path, *SPATIAL)[0]


def values(samples: Seen, real: Reference) -> dict[str, Any]:
    from evaluation.distances import frechet, inception_score, precision_recall

    found: dict[str, Any] = {"fid_real": frechet(samples.moments.gaussian(), real.pooled),
                             "sfid_real": frechet(samples.spatial.gaussian(), real.spatial)}
    if samples.logits is not None:
        found["inception_score"], found["inception_score_std"] = inception_score(samples.logits, SPLIT)
    if real.seen is not None:
        found["precision"], found["recall"] = precision_recall(samples.pooled, real.seen.pooled, NEIGHBOURS)
    return found


def run(args: argparse.Namespace) -> None:
    # What is quick to check comes before what is slow to do.
    check_output(args.out)
    pictures = open_samples("SAMPLES", args.samples)
    made = how_made("SAMPLES", pictures)
    extract, device = load_network(args)
    from evaluation.distances import cautions
    from evaluation.errors import PictureError
    from evaluation.moments import save_statistics
    from evaluation.results import Result, publish

    with blame("REFERENCE", (PictureError,)):
        real = load_reference(args.reference, extract, args.batch_size, device)
    if args.save_statistics:
        with blame("--save-statistics", (OSError,)):
            save_statistics(args.save_statistics, real.pooled, real.about | network_of(extract), real.spatial)
    with blame("SAMPLES", (PictureError,)):
        seen = look(pictures, extract, args.batch_size, device, "samples", keep=True, spatial=True)
        found = values(seen, real)
    n = len(pictures.names)
    warnings = [*cautions(n, len(real.pooled.mean), "samples"),
                *cautions(real.pooled.n, len(real.pooled.mean), "reference")]
    if real.seen is None:
        warnings.append("reference: has statistics but no pictures: no precision and recall")
    protocol = {"measure": "adm", **network_of(extract), "n": n, "reference": real.about, "neighbours": NEIGHBOURS,
                "split": SPLIT, "prompts": made.get("protocol_sha256")}
    publish(Result(found, protocol, made, warnings), args.out)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return command("adm.py", lambda: run(parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
