"""The ADM suite without TensorFlow: FID, sFID, Inception Score, precision and recall of SAMPLES against REFERENCE.

REFERENCE is an npz file as published with guided diffusion: pictures in arr_0, statistics in mu, sigma, mu_s, sigma_s,
or both; or a folder. SAMPLES is an npz file with pictures in arr_0, or a folder. The published statistics are of
inception-2015 with its own resize (tf1-bilinear); for another network they are taken of the reference's pictures.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from evaluation.measure import (
    add_network,
    check_output,
    how_made,
    load_network,
    look,
    network_of,
    open_samples,
    reference,
)
from ldm.cli import Parser, blame, command

# What needs PyTorch is imported where it is used: --help must answer at once.
if TYPE_CHECKING:
    from evaluation.measure import Reference, Seen

NEIGHBOURS = 3
SPLIT = 5000            # pictures of one Inception Score


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="adm.py", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("reference", metavar="REFERENCE", help="npz file or folder")
    p.add_argument("samples", metavar="SAMPLES", help="npz file or folder")
    p.add_argument("--save-statistics", metavar="NPZ", help="write the reference's statistics")
    add_network(p)
    return p


def values(samples: Seen, real: Reference) -> dict[str, Any]:
    from evaluation.distances import frechet, inception_score, precision_recall

    found: dict[str, Any] = {"fid_real": frechet(samples.moments.gaussian(), real.gaussian),
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
    from evaluation.distances import doubts
    from evaluation.errors import PictureError
    from evaluation.moments import save_statistics
    from evaluation.results import Result, publish

    with blame("REFERENCE", (PictureError,)):
        real = reference(args.reference, extract, args.batch_size, device, keep=True, spatial=True)
    if args.save_statistics:
        with blame("--save-statistics", (OSError,)):
            save_statistics(args.save_statistics, real.gaussian, real.about | network_of(extract), real.spatial)
    with blame("SAMPLES", (PictureError,)):
        seen = look(pictures, extract, args.batch_size, device, "samples", keep=True, spatial=True)
        found = values(seen, real)
    n = len(pictures.names)
    warnings = [*doubts(n, real.gaussian), *real.warnings]
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
