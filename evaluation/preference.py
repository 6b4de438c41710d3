"""Scores of human preference for SAMPLES, by the published models ImageReward and HPS v2.1.

Their packages are installed separately and download their own weights.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from evaluation.metrics.command import PREFERENCES, PROMPTS, SAMPLES, Defaults, add_output, measure_flags, publish
from ldm.cli.parser import Parser, check_output, command
from ldm.io.errors import flags_named


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="preference.py", description=__doc__, formatter_class=Defaults)
    p.add_argument("samples", metavar="SAMPLES", help=SAMPLES)
    p.add_argument("--prompts", metavar="FILE", help=PROMPTS)
    p.add_argument("--model", choices=PREFERENCES, default=PREFERENCES[0], help="the model that scores the images")
    add_output(p)
    return p


def run(args: argparse.Namespace) -> None:
    check_output(args.out)
    from evaluation.metrics import preference

    with flags_named(measure_flags(args)):
        result = preference.compute(args.samples, model=args.model, prompts=args.prompts)
    publish(result, args.out)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return command("preference.py", lambda: run(parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
