"""Compare the images of an ACCELERATED run with those of the PLAIN run from the same noise.

Images are paired by the noise and the inputs that are stored in the files, or by file name if one side has none stored.
The images of two arrays are paired by position. Every value is named ..._vs_plain: it says how much the acceleration
changes the images, not how good they are. For their quality, use evaluation/fid.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from evaluation.metrics.command import Defaults, add_extractor, add_output, add_run, measure_flags, publish
from ldm.cli.parser import Parser, check_output, command
from ldm.io.errors import flags_named

FLAGS = {"plain": "PLAIN", "accelerated": "ACCELERATED", "packages": "packages"}


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="paired.py", description=__doc__, formatter_class=Defaults)
    p.add_argument("plain", metavar="PLAIN", help="images of the plain run: a folder, or an npz or npy file")
    p.add_argument("accelerated", metavar="ACCELERATED", help="images of the accelerated run, in the same form")
    p.add_argument(
        "--lpips",
        action="store_true",
        help="also compute the perceptual distance LPIPS (AlexNet); needs torchvision and the weights of AlexNet",
    )
    add_extractor(p)
    add_run(p)
    add_output(p)
    return p


def run(args: argparse.Namespace) -> None:
    check_output(args.out)
    from evaluation.metrics import paired

    with flags_named(measure_flags(args) | FLAGS):
        result = paired.compute(
            args.plain,
            args.accelerated,
            extractor=args.extractor,
            weights=args.weights,
            resize=args.resize,
            batch_size=args.batch_size,
            device=args.device,
            lpips=args.lpips,
        )
    publish(result, args.out)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return command("paired.py", lambda: run(parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
