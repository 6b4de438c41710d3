"""Pictures from text, plain or with encoder propagation (Faster Diffusion)."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ldm.arguments import (
    EMOJI64,
    count,
    model_arguments,
    output_arguments,
    propagation_arguments,
    sampling_arguments,
    text_arguments,
)
from ldm.cli import BadInput, Parser, command
from ldm.script import GO_ON, make_pictures, make_setup, text_items

if TYPE_CHECKING:
    from ldm.sampling.engine import Sizes


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="txt2img.py", description=__doc__)
    what = text_arguments(p)
    what.add_argument("--H", type=count, help="height in pixels (default: the model's)")
    what.add_argument("--W", type=count, help="width in pixels (default: the model's)")
    sampling_arguments(p)
    propagation_arguments(p)
    model_arguments(p, EMOJI64)
    output_arguments(p, "outputs/txt2img-samples")
    return p


def check_size(args: argparse.Namespace, sizes: Sizes) -> tuple[int, int]:
    """Height and width of the pictures."""
    height, width = args.H or sizes.default, args.W or sizes.default
    for flag, value in (("--H", height), ("--W", width)):
        if value % sizes.multiple:
            raise BadInput(f"{flag}: must be a multiple of {sizes.multiple} for this model; got {value}")
    return height, width


def run(args: argparse.Namespace) -> None:
    items = text_items(args)
    setup = make_setup(args, EMOJI64)
    size = check_size(args, setup.sizes)

    from ldm.sampling.conditions import Text
    from ldm.sampling.engine import Task

    make_pictures(args, setup, items, Task(Text()), size, args.n_samples)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return command("txt2img.py", lambda: run(parser().parse_args(argv)), GO_ON)


if __name__ == "__main__":
    sys.exit(main())
