"""Fréchet distance of samples from a reference, with KID, CMMD, FID-infinity and intervals on request.

SAMPLES and REFERENCE are folders of pictures, or npz or npy files of pictures uint8 (N, H, W, 3); REFERENCE may be an
npz file with statistics (mu, sigma), or protocol:NAME for the real pictures of a protocol. For pictures of the plain
run from the same noise there is evaluation/paired.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from evaluation.metrics.reference import (
    add_cache,
    add_network,
    add_reference,
    cache_of,
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
from ldm.cli.parser import Parser, command, number, whole
from ldm.cli.setup import check_output
from ldm.io.errors import BadInput, blame

# What needs PyTorch is imported where it is used: --help must answer at once.
if TYPE_CHECKING:
    from evaluation.metrics.reference import Reference, Seen

KID_SUBSETS, KID_SIZE, POINTS = 100, 1000, 15
CMMD_MODEL = 336, 14, 1024, 24  # pixels, patch size, width and layers of the CLIP model that it is published with


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="fid.py", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_reference(p, "real pictures, or their statistics")
    p.add_argument("samples", metavar="SAMPLES", help="pictures to measure")
    p.add_argument("--kid", action="store_true", help=f"kernel distance, {KID_SUBSETS} subsets of {KID_SIZE}")
    p.add_argument("--cmmd", action="store_true", help="CMMD; needs --extractor clip with ViT-L/14 at 336 px")
    p.add_argument("--infinity", action="store_true", help="extrapolate to infinitely many samples")
    p.add_argument(
        "--bootstrap", type=whole(2, MOST), metavar="N", help="resample the samples N times for a 95 %% interval"
    )
    p.add_argument(
        "--seed",
        type=number(int, 0, 2**32 - 1, "0..2^32-1"),
        default=0,
        metavar="N",
        help="of KID's subsets, FID-infinity and resampling",
    )
    add_network(p)
    add_cache(p)
    return p


def values(samples: Seen, real: Reference, args: argparse.Namespace) -> dict[str, Any]:
    """All that was asked for, by explicit name."""
    from evaluation.metrics.distances import bootstrap, cmmd, fid_infinity, frechet, kid, normal_interval
    from evaluation.metrics.statistics import Moments

    found: dict[str, Any] = {"fid_real": frechet(samples.moments.gaussian(), real.gaussian)}
    if args.bootstrap:
        again = bootstrap(
            samples.pooled, lambda f: frechet(Moments.of(f).gaussian(), real.gaussian), args.bootstrap, args.seed
        )
        found["fid_real_interval"] = normal_interval(found["fid_real"], again)
    if args.infinity:
        found["fid_infinity_real"] = fid_infinity(samples.pooled, real.gaussian, POINTS, args.seed)
    if args.kid:
        found["kid_real"], found["kid_real_std"] = kid(
            samples.pooled, real.seen.pooled, KID_SUBSETS, KID_SIZE, args.seed
        )
    if args.cmmd:
        found["cmmd_real"] = cmmd(samples.pooled, real.seen.pooled)
    return found


def run(args: argparse.Namespace) -> None:
    # What is quick to check comes before what is slow to do.
    check_output(args.out)
    if args.cmmd and args.extractor != "clip":
        raise BadInput(f"--cmmd: is defined for CLIP's embeddings: needs --extractor clip; got {args.extractor}")
    pictures, source = open_samples("SAMPLES", args.samples), real_of(args)
    made, n = how_made("SAMPLES", pictures), len(pictures.names)
    from evaluation.metrics.distances import INFINITY_LEAST, doubts
    from evaluation.results import Result, publish
    from evaluation.runs.errors import PictureError

    if args.infinity and n < INFINITY_LEAST:
        raise BadInput(f"--infinity: needs at least {INFINITY_LEAST} samples; got {n}")
    extract, device = load_network(args)
    with blame("REFERENCE", (PictureError, OSError)):
        real = reference(source, extract, args.batch_size, device, cache_of(args), keep=args.kid or args.cmmd)
        if (args.kid or args.cmmd) and real.seen is None:
            raise PictureError(f"{args.reference}: mean and covariance only; KID and CMMD need the pictures themselves")
        check_width(real, pictures, extract, device)
    with blame("SAMPLES", (PictureError,)):
        keep = bool(args.kid or args.cmmd or args.infinity or args.bootstrap)
        seen = look(pictures, extract, args.batch_size, device, "samples", keep)
        found = values(seen, real, args)
    protocol = {
        "measure": "fid",
        **network_of(extract),
        "n": n,
        "reference": real.about,
        "prompts": made.get("protocol_sha256"),
    }
    if args.kid:
        protocol["kid"] = {"subsets": KID_SUBSETS, "size": min(KID_SIZE, n, len(real.seen.pooled)), "seed": args.seed}
    if args.infinity:
        protocol["infinity"] = {"points": POINTS, "seed": args.seed}
    warnings = [*incomplete(pictures, made), *doubts(n, real.gaussian), *real.warnings]
    if args.cmmd and (found_model := (extract.size, *extract.network.shape)) != CMMD_MODEL:
        warnings.append(
            f"cmmd_real: published values are of another CLIP model (pixels, patch size, width, layers "
            f"{CMMD_MODEL}; this one has {found_model})"
        )
    if args.infinity and n < 20 * (width := len(real.gaussian.mean)):  # its smallest point has n / 10
        warnings.append(
            f"fid_infinity_real: {n} pictures for {width} features are too few for a straight line; needs "
            f"{20 * width} or more"
        )
    settings = {"bootstrap": {"resamples": args.bootstrap, "seed": args.seed}} if args.bootstrap else {}
    publish(Result(found, protocol, made, warnings, settings), args.out)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return command("fid.py", lambda: run(parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
