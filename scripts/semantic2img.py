"""Pictures from maps of labels, plain or with encoder propagation (Faster Diffusion)."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ldm.cli.arguments import (
    ROOT,
    count_arguments,
    model_arguments,
    output_arguments,
    propagation_arguments,
    sampling_arguments,
)
from ldm.cli.inputs import image_items, named, stacked
from ldm.cli.parser import Parser, command
from ldm.cli.run import GO_ON, make_pictures
from ldm.cli.setup import make_setup
from ldm.cli.tasks import label_task
from ldm.io.errors import blame

SYNTHESIS = (
    ROOT / "models/ldm/semantic_synthesis512/config.yaml",
    ROOT / "models/ldm/semantic_synthesis512/model.ckpt",
)


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="semantic2img.py", description=__doc__)
    what = p.add_argument_group("what to make")
    what.add_argument(
        "--maps",
        nargs="+",
        required=True,
        metavar="FILE",
        help="maps of one size, whose grey levels or palette indices are the labels; the pictures are as large",
    )
    count_arguments(what, 1, 1, "pictures of each map")
    sampling_arguments(p, guided=False)
    propagation_arguments(p)
    model_arguments(p, SYNTHESIS)
    output_arguments(p, "outputs/semantic2img")
    return p


def run(args: argparse.Namespace) -> None:
    from ldm.io.images import open_labels

    with blame("--maps"):
        maps = {path: open_labels(path) for path in args.maps}
        stacked(maps)  # of one size
        subjects = [named(path, "map") for path in maps]
    setup = make_setup(args, SYNTHESIS)
    task, size = label_task(setup, maps)

    items = image_items(args, subjects)
    make_pictures(args, setup, items, task, size, args.batch_size)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return command("semantic2img.py", lambda: run(parser().parse_args(argv)), GO_ON)


if __name__ == "__main__":
    sys.exit(main())
