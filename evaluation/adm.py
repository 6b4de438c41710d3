"""The ADM suite without TensorFlow: FID, sFID, Inception Score, precision and recall of SAMPLES against REFERENCE.

REFERENCE is an npz file as published with guided diffusion (images in arr_0, statistics in mu, sigma, mu_s, sigma_s, or
both), a folder of images, or protocol:NAME for the reference of a protocol. SAMPLES is an npz file with images in
arr_0, or a folder of images. Published statistics are for inception-2015 with its own resize (tf1-bilinear). For
another network the statistics are computed from the images in REFERENCE.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

from evaluation.metrics.command import MeasureParser, publish, reference_of
from ldm.cli.parser import check_output, run_command
from ldm.io.errors import BadInput, blame, fault_of
from ldm.io.files import same_place


def parser() -> MeasureParser:
    p = MeasureParser("adm.py", __doc__)
    p.add_reference("npz file or folder")
    p.add("samples")
    p.add_argument("--save-statistics", metavar="NPZ", help="file for the statistics of the reference")
    how = "resampling the samples N times, for precision and recall by Wilson's formula"
    p.add("--bootstrap", help=f"also compute 95 %% intervals: for FID and Inception Score by {how}")
    p.add_extractor()
    p.add("--batch-size", "--device", "--out")
    return p


def run(args: argparse.Namespace) -> None:
    check_output(args.out)
    check_statistics(args.save_statistics, args.reference)
    from evaluation.metrics import frechet

    source = reference_of(args)
    with fault_of("samples"):
        samples = frechet.open_samples(args.samples)
        frechet.check_neighbours(len(samples.names))
    extractor = frechet.named_extractor(args.extractor, args.weights, args.resize, args.device)
    size = {"batch_size": args.batch_size}
    with fault_of("reference"):
        real = frechet.load_reference(source, extractor, keep=True, spatial=True, **size)
    publish(frechet.compute(samples, real, extractor=extractor, suite=True, bootstrap=args.bootstrap, **size), args.out)
    if args.save_statistics:  # last, so that a full disk costs no value
        with blame("--save-statistics", (OSError,)):
            about = real.about | frechet.network_fields(extractor) | {"doubts": [*real.warnings]}
            frechet.save_statistics(args.save_statistics, real.gaussian, about, real.spatial)


def check_statistics(path: str | None, reference: str) -> None:
    """Raise BadInput, before the work, if the reference's statistics can't be written there."""
    check_output(path, "--save-statistics")
    if path is not None and Path(path).suffix != ".npz":
        raise BadInput(f"--save-statistics: expected a name that ends in .npz; got {path}")
    if path is not None and same_place(path, reference):
        raise BadInput(f"--save-statistics: {path} is REFERENCE itself; expected another file")


main = partial(run_command, parser(), run)

if __name__ == "__main__":
    sys.exit(main())
