"""Compare the images of an ACCELERATED run with those of the PLAIN run from the same noise.

Images are paired by the noise and the inputs that are stored in the files, or by file name if one side has none stored.
The images of two arrays are paired by position. Every value is named ..._vs_plain: it says how much the acceleration
changes the images, not how good they are. For their quality, use evaluation/fid.py.
"""

from __future__ import annotations

import sys

from evaluation.metrics.command import MeasureParser


def parser() -> MeasureParser:
    p = MeasureParser("paired.py", __doc__, "paired")
    p.add_argument("plain", metavar="PLAIN", help="images of the plain run: a folder, or an npz or npy file")
    p.add_argument("accelerated", metavar="ACCELERATED", help="images of the accelerated run, in the same form")
    lpips = "the perceptual distance LPIPS (AlexNet); needs torchvision and the weights of AlexNet"
    p.add_argument("--lpips", action="store_true", help=f"also compute {lpips}")
    p.add_extractor()
    p.add("--batch-size", "--device", "--out")
    return p


main = parser().main

if __name__ == "__main__":
    sys.exit(main())
