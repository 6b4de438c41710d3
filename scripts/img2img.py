"""Pictures from text and a picture to begin with, plain or with encoder propagation (Faster Diffusion)."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ldm.arguments import (
    EMOJI64,
    model_arguments,
    output_arguments,
    propagation_arguments,
    sampling_arguments,
    size_arguments,
    text_arguments,
)
from ldm.cli import Parser, blame, command, number
from ldm.script import GO_ON, make_pictures, make_setup, named, picture_size, text_items

LEAST = sys.float_info.min


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="img2img.py", description=__doc__)
    what = text_arguments(p)
    what.add_argument("--init-img", required=True, metavar="FILE",
                      help="the picture to begin with; transparent parts become white")
    what.add_argument("--strength", type=number(float, LEAST, 1, "a number above 0, up to 1"), default=0.75,
                      help="how much of the picture is made anew: the share of the steps that is run; a plan "
                           "counts these (default: %(default)s)")
    size_arguments(what, "the picture's, rounded down to what the model can make; the picture is scaled to "
                         "cover it and cut off evenly")
    sampling_arguments(p)
    propagation_arguments(p)
    model_arguments(p, EMOJI64)
    output_arguments(p, "outputs/img2img-samples")
    return p


def run(args: argparse.Namespace) -> None:
    from ldm.images import fit, from_pil, open_picture

    with blame("--init-img"):
        image = open_picture(args.init_img)
        items = text_items(args, named(args.init_img, "init_img"))
    setup = make_setup(args, EMOJI64)
    step = setup.sizes.multiple
    height, width = (max(step, side // step * step) for side in (image.height, image.width))
    size = picture_size(args, setup.sizes, (height, width))

    from ldm.sampling.canvas import Picture
    from ldm.sampling.conditions import Text
    from ldm.sampling.engine import Task

    task = Task(Text(), Picture(from_pil(fit(image, *size)), args.strength))
    make_pictures(args, setup, items, task, size, args.n_samples)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return command("img2img.py", lambda: run(parser().parse_args(argv)), GO_ON)


if __name__ == "__main__":
    sys.exit(main())
