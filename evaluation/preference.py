"""Scores of human preference for SAMPLES, by the published models ImageReward and PickScore.

Their weights must be on this machine; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from evaluation.metrics.command import PREFERENCES, MeasureParser, arguments
from evaluation.metrics.result import Result


def parser() -> MeasureParser:
    p = MeasureParser("preference.py", __doc__)
    p.add_samples()
    p.add_prompts()
    p.add_argument("--model", choices=PREFERENCES, default=PREFERENCES[0], help="the model that scores the images")
    p.add_argument(
        "--weights",
        metavar="PATH",
        help="its published weights: ImageReward.pt, with vocab.txt of bert-base-uncased beside it, or the folder of "
        "PickScore_v1",
    )
    p.add_output()
    return p


def compute(args: argparse.Namespace) -> Result:
    from evaluation.metrics import preference

    return preference.compute(**arguments(args))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return parser().run(compute, argv)


if __name__ == "__main__":
    sys.exit(main())
