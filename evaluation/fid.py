"""Fréchet distance (FID) between SAMPLES and REFERENCE; with flags also KID, CMMD, FID-infinity and an interval.

SAMPLES and REFERENCE are folders of images, or npz or npy files of images, uint8 (N, H, W, 3). REFERENCE can also be an
npz file of statistics (mu, sigma), or protocol:NAME for the real images of a protocol. To compare an accelerated run
with the plain run from the same noise, use evaluation/paired.py.
"""

from __future__ import annotations

import sys
from pathlib import Path

from evaluation.metrics.command import MeasureParser
from ldm.cli.parser import number

CACHE = Path.home() / ".cache" / "faster-diffusion-ldm" / "statistics"


def folder_or_none(text: str) -> str | None:
    return None if text == "none" else text


def parser() -> MeasureParser:
    p = MeasureParser("fid.py", __doc__, "frechet")
    p.add_reference("real images, or their statistics")
    p.add("samples")
    for flag, what in {
        "--kid": "the kernel distance KID",
        "--cmmd": "CMMD; needs --extractor clip with ViT-L/14 at 336 px",
        "--infinity": "FID-infinity, extrapolated to infinitely many samples",
    }.items():
        p.add_argument(flag, action="store_true", help=f"also compute {what}")
    p.add("--bootstrap", help="also compute a 95 %% interval by resampling the samples N times")
    seed, text = number(int, 0, 2**32 - 1, "0..2^32-1"), "seed of the random subsets (KID, FID-infinity) and resampling"
    p.add_argument("--seed", type=seed, default=0, metavar="N", help=text)
    p.add_extractor()
    p.add("--batch-size", "--device", "--out")
    text = "folder that keeps statistics of reference images; none = keep none"
    p.add_argument("--cache", type=folder_or_none, default=str(CACHE), metavar="DIR", help=text)
    return p


main = parser().main

if __name__ == "__main__":
    sys.exit(main())
