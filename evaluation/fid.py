"""Fréchet distance (FID) between SAMPLES and REFERENCE; with flags also KID, CMMD, FID-infinity and an interval.

SAMPLES and REFERENCE are folders of images, or npz or npy files of images, uint8 (N, H, W, 3). REFERENCE can also be an
npz file of statistics (mu, sigma), or protocol:NAME for the real images of a protocol. To compare an accelerated run
with the plain run from the same noise, use evaluation/paired.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from evaluation.metrics.command import (
    SAMPLES,
    Defaults,
    add_cache,
    add_extractor,
    add_output,
    add_reference,
    add_run,
    measure_flags,
    protocol_name,
    publish,
)
from ldm.cli.arguments import MOST
from ldm.cli.parser import Parser, check_output, command, number, whole
from ldm.io.errors import flags_named


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="fid.py", description=__doc__, formatter_class=Defaults)
    add_reference(p, "real images, or their statistics")
    p.add_argument("samples", metavar="SAMPLES", help=SAMPLES)
    p.add_argument("--kid", action="store_true", help="also compute the kernel distance KID")
    p.add_argument(
        "--cmmd", action="store_true", help="also compute CMMD; needs --extractor clip with ViT-L/14 at 336 px"
    )
    p.add_argument(
        "--infinity", action="store_true", help="also compute FID-infinity, extrapolated to infinitely many samples"
    )
    p.add_argument(
        "--bootstrap",
        type=whole(2, MOST),
        metavar="N",
        help="also compute a 95 %% interval by resampling the samples N times",
    )
    p.add_argument(
        "--seed",
        type=number(int, 0, 2**32 - 1, "0..2^32-1"),
        default=0,
        metavar="N",
        help="seed of the random subsets (KID, FID-infinity) and of the resampling",
    )
    add_extractor(p)
    add_run(p)
    add_output(p)
    add_cache(p)
    return p


def run(args: argparse.Namespace) -> None:
    check_output(args.out)
    protocol = protocol_name(args)
    from evaluation.metrics import frechet, real_images

    with flags_named(measure_flags(args)):
        result = frechet.compute(
            args.samples,
            real_images.protocol_reference(protocol, args.data) if protocol else args.reference,
            extractor=args.extractor,
            weights=args.weights,
            resize=args.resize,
            batch_size=args.batch_size,
            device=args.device,
            kid=args.kid,
            cmmd=args.cmmd,
            infinity=args.infinity,
            bootstrap=args.bootstrap,
            seed=args.seed,
            cache=None if args.cache == "none" else args.cache,
        )
    publish(result, args.out)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return command("fid.py", lambda: run(parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
