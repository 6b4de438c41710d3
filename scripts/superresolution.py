"""Small pictures made large, plain or with encoder propagation (Faster Diffusion).

By bsr_sr, or with --config and --ckpt by the x4 upscaler of Stable Diffusion, which reads text and adds noise to the
small picture. Defaults of bsr_sr: 100 steps, eta 1. Of the x4 upscaler: 75 steps, eta 0, scale 9, noise level 20.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ldm.cli.arguments import (
    ROOT,
    count_arguments,
    model_arguments,
    negative_argument,
    noise_level_argument,
    output_arguments,
    propagation_arguments,
    sampling_arguments,
)
from ldm.cli.inputs import image_items, named, stacked
from ldm.cli.parser import Parser, command
from ldm.cli.run import GO_ON, make_pictures
from ldm.cli.setup import make_setup
from ldm.cli.tasks import settle_upscaling, upscaling_task
from ldm.io.errors import blame

BSR_SR = (ROOT / "models/ldm/bsr_sr/config.yaml", ROOT / "models/ldm/bsr_sr/model.ckpt")


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="superresolution.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = p.add_argument_group("what to make")
    what.add_argument(
        "--images",
        nargs="+",
        required=True,
        metavar="FILE",
        help="small pictures of one size; each side comes out f times as long (4 times by both models)",
    )
    what.add_argument("--prompt", help="what the pictures show, for the x4 upscaler (default: nothing said)")
    negative_argument(what)
    noise_level_argument(what)
    count_arguments(what, 1, 1, "results for each picture")
    sampling_arguments(p, None, None, unknown="see above")
    propagation_arguments(p)
    model_arguments(p, BSR_SR)
    output_arguments(p, "outputs/superresolution")
    return p


def run(args: argparse.Namespace) -> None:
    from ldm.io.images import from_pil, open_image

    with blame("--images"):
        images = {path: from_pil(open_image(path)) for path in args.images}
        pictures = stacked(images)  # (N, 3, h, w)
        subjects = [named(path, "image") for path in images]
    setup = make_setup(args, BSR_SR)
    text = settle_upscaling(args, setup)
    task, size = upscaling_task(args, setup, pictures, text)

    subjects = [subject | ({"prompt": args.prompt} if text else {}) for subject in subjects]
    items = image_items(args, subjects)
    make_pictures(args, setup, items, task, size, args.batch_size)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return command("superresolution.py", lambda: run(parser().parse_args(argv)), GO_ON)


if __name__ == "__main__":
    sys.exit(main())
