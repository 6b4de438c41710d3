"""The ADM suite without TensorFlow: FID, sFID, Inception Score, precision and recall of SAMPLES against REFERENCE.

REFERENCE is an npz file as published with guided diffusion (images in arr_0, statistics in mu, sigma, mu_s, sigma_s, or
both), a folder of images, or protocol:NAME for the reference of a protocol. SAMPLES is an npz file with images in
arr_0, or a folder of images. Published statistics are for inception-2015 with its own resize (tf1-bilinear). For
another network the statistics are computed from the images in REFERENCE.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from evaluation.metrics.command import MeasureParser, measure_flags, publish, reference_of
from ldm.cli.parser import check_output, run_command
from ldm.io.errors import BadInput, blame, fault_of, flags_named
from ldm.io.files import same_place


def parser() -> MeasureParser:
    p = MeasureParser("adm.py", __doc__)
    p.add_reference("npz file or folder")
    p.add_samples()
    p.add_argument("--save-statistics", metavar="NPZ", help="file for the statistics of the reference")
    p.add_bootstrap(
        "95 %% intervals: for FID and Inception Score by resampling the samples N times, for precision and recall by "
        "Wilson's formula"
    )
    p.add_extractor()
    p.add_run()
    p.add_output()
    return p


def run(args: argparse.Namespace) -> None:
    check_output(args.out)
    check_statistics(args.save_statistics, args.reference)
    from evaluation.metrics import adm, extractors, statistics

    with flags_named(measure_flags(args)):
        source = reference_of(args, statistics.protocol_reference)
        with fault_of("samples"):
            samples = adm.suite_samples(args.samples)
        with fault_of("extractor"):
            extractor = extractors.load_extractor(args.extractor, args.weights, args.resize, args.device)
        with fault_of("reference"):
            real = adm.suite_reference(source, extractor, args.batch_size)
        result = adm.compute(samples, real, extractor=extractor, batch_size=args.batch_size, bootstrap=args.bootstrap)
    publish(result, args.out)
    if args.save_statistics:  # last, so that a full disk costs no value
        with blame("--save-statistics", (OSError,)):
            about = real.about | extractors.network_fields(extractor) | {"doubts": [*real.warnings]}
            statistics.save_statistics(args.save_statistics, real.gaussian, about, real.spatial)


def check_statistics(path: str | None, reference: str) -> None:
    """Raise BadInput, before the work, if the reference's statistics can't be written there."""
    if path is None:
        return
    check_output(path, "--save-statistics")
    if Path(path).suffix != ".npz":
        raise BadInput(f"--save-statistics: expected a name that ends in .npz; got {path}")
    if same_place(path, reference):
        raise BadInput(f"--save-statistics: {path} is REFERENCE itself; expected another file")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return run_command(parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
