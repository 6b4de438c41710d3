"""Make a database for retrieval from a folder of images, with captions or without.

    python scripts/build_database.py my-pictures --out my-database

Images of the folder and its subfolders are embedded; files of the same content are taken once. Captions are read from
metadata.jsonl, captions.json, or NAME.txt beside an image. A build that was stopped goes on from its last finished
part, and the same command adds images that are new in the folder. The layout is that of the published databases.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

from ldm.cli.parser import GO_ON, Parser, cli, count, run_command, settings_from, whole


def parser() -> Parser:
    p = Parser(
        prog="build_database.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        intermixed=True,
    )
    p.add_argument("folder", type=Path, metavar="FOLDER", help="the images")
    p.add_argument(
        "--out", type=Path, metavar="DIR", help="the database (default: data/rdm/retrieval_databases/FOLDER's name)"
    )
    p.add_argument(
        "--embedder",
        default="emoji",
        metavar="NAME[:FOLDER]",
        help="what embeds the images: emoji (texts too, by the words of emoji; weights in FOLDER or "
        "models/rdm/emoji-encoder); clip (texts too; weights in FOLDER or models/clip/ViT-L-14); efficientnet-lite0 "
        "(images only). A model needs neighbours of the embedder that it was trained with: emoji for the one that "
        "ships, clip for the published one (default: %(default)s)",
    )
    p.add_argument(
        "--thumbnails",
        type=whole(0, 1024),
        default=0,
        metavar="SIDE",
        help="keep small copies of the images, of so many pixels, to show them without the folder (default: 0, none)",
    )
    p.add_argument(
        "--licence",
        metavar="TEXT",
        help="under what terms the images may be used; it is shown with each (default: the name of the nearest file "
        "LICENSE in an image's folder or above)",
    )
    p.add_argument(
        "--processes",
        type=whole(1, 256),
        default=1,
        metavar="N",
        help="processes that embed side by side (default: %(default)s)",
    )
    p.add_argument(
        "--rows",
        type=count,
        default=1024,
        metavar="N",
        help="images in each part of the database (default: %(default)s)",
    )
    p.add_argument(
        "--batch_size", dest="batch", type=count, default=32, metavar="N", help="images at a time (default: 32)"
    )
    return p


def run(args: argparse.Namespace) -> None:
    args.out = args.out or cli.databases.default_out(args.folder)
    cli.databases.build_database(settings_from(args, cli.databases.BuildSettings))


main = partial(run_command, parser(), run, stopped=GO_ON)

if __name__ == "__main__":
    sys.exit(main())
