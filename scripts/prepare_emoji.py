"""Make the emoji images and captions that models/ldm/emoji64 and emoji128 are trained on.

    python scripts/prepare_emoji.py --out data/emoji64
    python scripts/prepare_emoji.py --size 128 --out data/emoji128
    python scripts/prepare_emoji.py --size 128 --out data/emoji128 --images my-pictures
    python scripts/prepare_emoji.py --out data/emoji64 --images data/giraffe --only giraffe

The script downloads the emoji sets with the npm client, which must be on the PATH. A set that was downloaded before is
not downloaded again. The script puts each image on white at 64 x 64 or 128 x 128 pixels and writes `pictures.npy` and
`captions.json` (COCO captions). The dataset of 64 pixels has five sets; that of 128 pixels has nine, and skin tones.
scripts/emoji_concepts.yaml lists which concepts are kept; heldout.yaml in the model's folder lists which are not used
for training.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ldm.cli.parser import Parser, check_outdir, run_command
from ldm.io.errors import BadInput, fault_of

CONCEPTS = Path(__file__).with_name("emoji_concepts.yaml")


def parser() -> Parser:
    p = Parser(prog="prepare_emoji.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--size", type=int, choices=(64, 128), default=64, help="pixels (default: %(default)s)")
    p.add_argument(
        "--out", type=Path, metavar="DIR", help="the dataset's folder (default: data/emoji64 or data/emoji128)"
    )
    p.add_argument(
        "--cache", type=Path, metavar="DIR", help="folder for the downloaded packages (default: OUT/packages)"
    )
    p.add_argument(
        "--images",
        type=Path,
        metavar="DIR",
        help="write the images of the dataset in --out, which is made if it is not there, as PNG files: a folder for "
        "each style, with captions and licence, as scripts/build_database.py reads them",
    )
    p.add_argument(
        "--only",
        metavar="WHAT",
        help="with --images: those of a split (train, heldout_pair, heldout_concept) or of a concept (giraffe)",
    )
    p.add_argument(
        "--max-tier",
        type=int,
        choices=(1, 2, 3, 4),
        help="with --images: those of tiers 1 to this; the models are trained on tiers 1 and 2; 3 has people and "
        "everything else, 4 skin tones (default: all)",
    )
    return p


def run(args: argparse.Namespace) -> None:
    out = args.out or Path(f"data/emoji{args.size}")
    if importlib.util.find_spec("resvg_py") is None:  # before anything is fetched
        raise BadInput('the package resvg-py is needed to draw SVG files: pip install -e ".[train]", or ".[eval]"')
    for flag, value in (("--only", args.only), ("--max-tier", args.max_tier)):
        if value is not None and args.images is None:
            raise BadInput(f"{flag}: goes with --images, the folder of the files that it is about")
    for flag, folder in (("--out", out), ("--cache", args.cache), ("--images", args.images)):
        if folder is not None:
            check_outdir(folder, flag)
    from ldm.data.emoji_set import dataset, packages

    if args.images is None or not (out / "captions.json").is_file():
        with fault_of("out", (OSError,)):
            made = dataset.prepare(packages.RECIPES[args.size], out, args.cache or out / "packages", CONCEPTS)
        report(made["images"], out)
    if args.images is not None:
        with fault_of("images"):
            print(f"{dataset.write_files(out, args.images, args.only, args.max_tier)} files in {args.images}")


def report(images: Sequence[Mapping[str, Any]], out: Path) -> None:
    """Print what the dataset is made of."""
    for key in ("style", "tier", "category", "split"):
        print(f"{key}: " + ", ".join(f"{k} {n}" for k, n in sorted(Counter(i[key] for i in images).items())))
    print(f"{len(images)} images in {out}")


main = partial(run_command, parser(), run, stopped="stopped; what was fetched is kept")

if __name__ == "__main__":
    sys.exit(main())
