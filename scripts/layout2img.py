"""Pictures from boxes and what is in them, plain or with encoder propagation (Faster Diffusion).

--boxes is a JSON file: a list of pictures, each a list of {"class": CLASS, "box": [X, Y, WIDTH, HEIGHT]}. CLASS is a
number, or a name of --class-names; X and Y are the box's top left corner. Lengths are shares of the picture's, 0..1.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from ldm.cli.arguments import (
    ROOT,
    class_names_argument,
    count_arguments,
    model_arguments,
    output_arguments,
    propagation_arguments,
    sampling_arguments,
    size_arguments,
)
from ldm.cli.inputs import given_names, image_items
from ldm.cli.parser import Parser, command
from ldm.cli.run import GO_ON, make_pictures
from ldm.cli.setup import make_setup, picture_size
from ldm.cli.tasks import layout_task
from ldm.io.errors import blame, shown
from ldm.io.files import read_json

LAYOUT = (
    ROOT / "models/ldm/layout2img-openimages256/config.yaml",
    ROOT / "models/ldm/layout2img-openimages256/model.ckpt",
)


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="layout2img.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = p.add_argument_group("what to make")
    what.add_argument("--boxes", required=True, metavar="FILE", help="the pictures' boxes, see above")
    class_names_argument(what)
    count_arguments(what, 1, 4, "pictures of each list of boxes")
    size_arguments(what)
    sampling_arguments(p, guided=False)
    propagation_arguments(p)
    model_arguments(p, LAYOUT)
    output_arguments(p, "outputs/layout2img")
    return p


def read_layouts(path: str) -> list[Any]:
    """The entries of the file, one for each picture.

    Raises:
        OSError, ValueError: it can't be read, is no JSON, or not a list.
    """
    layouts = read_json(path)
    if not isinstance(layouts, list) or not layouts:
        raise ValueError(f"{path}: expected a list of pictures; got {shown(layouts)}")
    return layouts


def run(args: argparse.Namespace) -> None:
    names = given_names(args)
    with blame("--boxes"):
        layouts = read_layouts(args.boxes)
    setup = make_setup(args, LAYOUT)
    subjects, task = layout_task(setup, layouts, names)
    size = picture_size(args, setup.sizes)

    items = image_items(args, subjects)
    make_pictures(args, setup, items, task, size, args.batch_size)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return command("layout2img.py", lambda: run(parser().parse_args(argv)), GO_ON)


if __name__ == "__main__":
    sys.exit(main())
