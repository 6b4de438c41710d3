"""The ADM suite without TensorFlow: FID, sFID, Inception Score, precision and recall of SAMPLES against REFERENCE.

REFERENCE is an npz file as published with guided diffusion: pictures in arr_0, statistics in mu, sigma, mu_s, sigma_s,
or both; or a folder; or protocol:NAME for the reference of a protocol. SAMPLES is an npz file with pictures in arr_0,
or a folder. The published statistics are of inception-2015 with its own resize (tf1-bilinear); for another network they
are taken of the reference's pictures.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaluation.metrics.reference import (
    add_network,
    add_reference,
    check_width,
    how_made,
    incomplete,
    load_network,
    look,
    network_of,
    open_samples,
    real_of,
    reference,
)
from ldm.cli.arguments import MOST
from ldm.cli.parser import Parser, command, whole
from ldm.cli.setup import check_output
from ldm.io.errors import BadInput, blame

# What needs PyTorch is imported where it is used: --help must answer at once.
if TYPE_CHECKING:
    from evaluation.metrics.reference import Reference, Seen
    from evaluation.runs.images import Pictures

NEIGHBOURS = 3
SPLIT = 5000  # pictures of one Inception Score


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="adm.py", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_reference(p, "npz file or folder")
    p.add_argument("samples", metavar="SAMPLES", help="npz file or folder")
    p.add_argument("--save-statistics", metavar="NPZ", help="write the reference's statistics")
    p.add_argument(
        "--bootstrap",
        type=whole(2, MOST),
        metavar="N",
        help="95 %% intervals: of FID and Inception Score by resampling the samples N times, of precision "
        "and recall by Wilson's",
    )
    add_network(p)
    return p


def values(samples: Seen, real: Reference) -> dict[str, Any]:
    from evaluation.metrics.distances import frechet, inception_score, precision_recall

    found: dict[str, Any] = {
        "fid_real": frechet(samples.moments.gaussian(), real.gaussian),
        "sfid_real": frechet(samples.spatial.gaussian(), real.spatial),
    }
    if samples.logits is not None:
        found["inception_score"], found["inception_score_std"] = inception_score(samples.logits, SPLIT)
    if real.seen is not None:
        found["precision"], found["recall"] = precision_recall(samples.pooled, real.seen.pooled, NEIGHBOURS)
    return found


def intervals(found: dict[str, Any], samples: Seen, real: Reference, count: int) -> dict[str, Any]:
    """95 % intervals, over the samples, of all but sFID, whose features are not kept.

    Those of precision and recall are of a share of independent pictures; that the pictures beside which they lie are a
    sample too is left out.
    """
    from evaluation.metrics.distances import bootstrap, frechet, inception_score, normal_interval, share_interval
    from evaluation.metrics.statistics import Moments

    again = {"fid_real": bootstrap(samples.pooled, lambda f: frechet(Moments.of(f).gaussian(), real.gaussian), count)}
    if "inception_score" in found:
        again["inception_score"] = bootstrap(samples.logits, lambda f: inception_score(f, SPLIT)[0], count)
    spread = {name: normal_interval(found[name], resampled) for name, resampled in again.items()}
    if "precision" in found:
        for name, n in (("precision", len(samples.pooled)), ("recall", len(real.seen.pooled))):
            spread[name] = share_interval(round(found[name] * n), n)
    return {f"{name}_interval": interval for name, interval in spread.items()}


def run(args: argparse.Namespace) -> None:
    # What is quick to check comes before what is slow to do.
    check_output(args.out)
    pictures, source = open_samples("SAMPLES", args.samples), real_of(args)
    if args.save_statistics is not None:
        check_statistics(args.save_statistics, source)
    made, n = how_made("SAMPLES", pictures), len(pictures.names)
    check_neighbours("SAMPLES", n)
    extract, device = load_network(args)
    from evaluation.metrics.distances import doubts
    from evaluation.metrics.statistics import save_statistics
    from evaluation.results import Result, publish
    from evaluation.runs.errors import PictureError

    with blame("REFERENCE", (PictureError, OSError)):
        real = reference(source, extract, args.batch_size, device, keep=True, spatial=True)
        check_width(real, pictures, extract, device)
    if real.seen is not None:
        check_neighbours("REFERENCE", len(real.seen.pooled))
    with blame("SAMPLES", (PictureError,)):
        seen = look(pictures, extract, args.batch_size, device, "samples", keep=True, spatial=True)
        found = values(seen, real)
        if args.bootstrap:
            found |= intervals(found, seen, real, args.bootstrap)
    warnings = [*incomplete(pictures, made), *doubts(n, real.gaussian), *real.warnings]
    if real.seen is None:
        warnings.append("reference: has statistics but no pictures: no precision and recall")
    protocol = {
        "measure": "adm",
        **network_of(extract),
        "n": n,
        "reference": real.about,
        "neighbours": NEIGHBOURS,
        "split": SPLIT,
        "prompts": made.get("protocol_sha256"),
    }
    settings = {"bootstrap": {"resamples": args.bootstrap, "seed": 0}} if args.bootstrap else {}
    publish(Result(found, protocol, made, warnings, settings), args.out)
    if args.save_statistics:  # last, so that a full disk costs no value
        with blame("--save-statistics", (OSError,)):
            about = real.about | network_of(extract) | {"doubts": [*real.warnings]}
            save_statistics(args.save_statistics, real.gaussian, about, real.spatial)


def check_statistics(path: str, source: str | Pictures) -> None:
    """Raise BadInput if the reference's statistics can't be written there; found out before the work."""
    check_output(path, "--save-statistics")
    if Path(path).suffix != ".npz":
        raise BadInput(f"--save-statistics: expected a name that ends in .npz; got {path}")
    if isinstance(source, str) and Path(path).resolve() == Path(source).resolve():
        raise BadInput(f"--save-statistics: {path} is REFERENCE itself; expected another file")


def check_neighbours(argument: str, n: int) -> None:
    """Precision and recall need neighbours; found out before the work."""
    if n <= NEIGHBOURS:
        raise BadInput(
            f"{argument}: precision and recall, of {NEIGHBOURS} neighbours, need at least {NEIGHBOURS + 1} "
            f"pictures; got {n}"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return command("adm.py", lambda: run(parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
