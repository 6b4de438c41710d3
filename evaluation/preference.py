"""Scores of human preference for SAMPLES, by the published models ImageReward and PickScore.

Their weights must be on this machine; nothing is downloaded.
"""

from __future__ import annotations

import sys

from evaluation.metrics.command import PREFERENCES, MeasureParser


def parser() -> MeasureParser:
    p = MeasureParser("preference.py", __doc__, "preference")
    p.add("samples", "--prompts")
    p.add_argument("--model", choices=PREFERENCES, default=PREFERENCES[0], help="the model that scores the images")
    text = "ImageReward.pt, with vocab.txt of bert-base-uncased beside it, or the folder of PickScore_v1"
    p.add_argument("--weights", metavar="PATH", help=f"its published weights: {text}")
    p.add("--out")
    return p


main = parser().main

if __name__ == "__main__":
    sys.exit(main())
