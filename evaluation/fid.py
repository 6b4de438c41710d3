"""Fréchet distance (FID) between SAMPLES and REFERENCE; with flags also KID, CMMD, FID-infinity and an interval.

SAMPLES and REFERENCE are folders of images, or npz or npy files of images, uint8 (N, H, W, 3). REFERENCE can also be an
npz file of statistics (mu, sigma), or protocol:NAME for the real images of a protocol. To compare an accelerated run
with the plain run from the same noise, use evaluation/paired.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from evaluation.metrics.command import MeasureParser, arguments, reference_of
from evaluation.metrics.result import Result
from ldm.cli.parser import number

CACHE = Path.home() / ".cache" / "faster-diffusion-ldm" / "statistics"


def parser() -> MeasureParser:
    p = MeasureParser("fid.py", __doc__)
    p.add_reference("real images, or their statistics")
    p.add_samples()
    p.add_argument("--kid", action="store_true", help="also compute the kernel distance KID")
    p.add_argument(
        "--cmmd", action="store_true", help="also compute CMMD; needs --extractor clip with ViT-L/14 at 336 px"
    )
    p.add_argument(
        "--infinity", action="store_true", help="also compute FID-infinity, extrapolated to infinitely many samples"
    )
    p.add_bootstrap("a 95 %% interval by resampling the samples N times")
    p.add_argument(
        "--seed",
        type=number(int, 0, 2**32 - 1, "0..2^32-1"),
        default=0,
        metavar="N",
        help="seed of the random subsets (KID, FID-infinity) and of the resampling",
    )
    p.add_extractor()
    p.add_run()
    p.add_output()
    p.add_argument(
        "--cache",
        default=str(CACHE),
        metavar="DIR",
        help="folder that keeps statistics of reference images; none = keep none",
    )
    return p


def compute(args: argparse.Namespace) -> Result:
    from evaluation.metrics import frechet, statistics

    options = arguments(args, "reference", "data", "cache")
    cache = None if args.cache == "none" else args.cache
    return frechet.compute(reference=reference_of(args, statistics.protocol_reference), cache=cache, **options)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return parser().run(compute, argv)


if __name__ == "__main__":
    sys.exit(main())
