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
from typing import Any

from evaluation.metrics.command import (
    SAMPLES,
    Defaults,
    add_extractor,
    add_output,
    add_reference,
    add_run,
    measure_flags,
    protocol_name,
    publish,
)
from ldm.cli.arguments import MOST
from ldm.cli.parser import Parser, check_output, command, whole
from ldm.io.errors import BadInput, blame, fault_of, flags_named
from ldm.io.files import same_place


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="adm.py", description=__doc__, formatter_class=Defaults)
    add_reference(p, "npz file or folder")
    p.add_argument("samples", metavar="SAMPLES", help=SAMPLES)
    p.add_argument("--save-statistics", metavar="NPZ", help="file for the statistics of the reference")
    p.add_argument(
        "--bootstrap",
        type=whole(2, MOST),
        metavar="N",
        help="also compute 95 %% intervals: for FID and Inception Score by resampling the samples N times, for "
        "precision and recall by Wilson's formula",
    )
    add_extractor(p)
    add_run(p)
    add_output(p)
    return p


def run(args: argparse.Namespace) -> None:
    check_output(args.out)
    check_statistics(args.save_statistics, args.reference)
    protocol = protocol_name(args)
    from evaluation.metrics import adm, extractors, real_images, statistics

    with flags_named(measure_flags(args)):
        with fault_of("samples"):
            samples = adm.suite_samples(args.samples)
        source = real_images.protocol_reference(protocol, args.data) if protocol else args.reference
        with fault_of("extractor"):
            extractor = extractors.load_extractor(args.extractor, args.weights, args.resize, args.device)
        with fault_of("reference"):
            reference = adm.suite_reference(source, extractor, args.batch_size)
        result = adm.compute(
            samples, reference, extractor=extractor, batch_size=args.batch_size, bootstrap=args.bootstrap
        )
    publish(result, args.out)
    if args.save_statistics:  # last, so that a full disk costs no value
        with blame("--save-statistics", (OSError,)):
            about: dict[str, Any] = {**reference.about, **extractors.network_fields(extractor)}
            about["doubts"] = [*reference.warnings]
            statistics.save_statistics(args.save_statistics, reference.gaussian, about, reference.spatial)


def check_statistics(path: str | None, reference: str) -> None:
    """Check, before the work, that the reference's statistics can be written there. Raises BadInput: they can't."""
    if path is None:
        return
    check_output(path, "--save-statistics")
    if Path(path).suffix != ".npz":
        raise BadInput(f"--save-statistics: expected a name that ends in .npz; got {path}")
    if same_place(path, reference):
        raise BadInput(f"--save-statistics: {path} is REFERENCE itself; expected another file")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return command("adm.py", lambda: run(parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
