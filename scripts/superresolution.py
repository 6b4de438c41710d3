"""Small pictures made large, plain or with encoder propagation (Faster Diffusion)."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ldm.arguments import (
    ROOT,
    batch_argument,
    count,
    model_arguments,
    output_arguments,
    propagation_arguments,
    sampling_arguments,
    seed_argument,
)
from ldm.cli import Parser, blame, command
from ldm.script import GO_ON, make_pictures, make_setup, named, stacked

BSR_SR = (ROOT / "models/ldm/bsr_sr/config.yaml", ROOT / "models/ldm/bsr_sr/model.ckpt")


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="superresolution.py", description=__doc__)
    what = p.add_argument_group("what to make")
    what.add_argument("--images", nargs="+", required=True, metavar="FILE",
                      help="small pictures of one size; each side comes out f times as long (4 times by bsr_sr)")
    what.add_argument("--n_samples", type=count, default=1, metavar="N",
                      help="results for each picture (default: %(default)s)")
    batch_argument(what, 1)
    seed_argument(what)
    sampling_arguments(p, 100, eta=1.0, guided=False)
    propagation_arguments(p)
    model_arguments(p, BSR_SR)
    output_arguments(p, "outputs/superresolution")
    return p


def run(args: argparse.Namespace) -> None:
    from ldm.images import from_pil, open_picture, pad

    with blame("--images"):
        images = {path: from_pil(open_picture(path)) for path in args.images}
        pictures = stacked(images)                                                          # (N, 3, h, w)
        subjects = [named(path, "image") for path in images]
    setup = make_setup(args, BSR_SR)

    from ldm.generate import subject_items
    from ldm.sampling.conditions import Beside
    from ldm.sampling.engine import Task

    # The small picture is as large as the latents; what the model can't make is filled up with its edge.
    sizes, factor = setup.sizes, setup.sizes.factor
    height, width = (side * factor for side in pictures.shape[-2:])
    pictures = pad(pictures, sizes.whole(height) // factor, sizes.whole(width) // factor)
    items = subject_items(subjects, args.n_samples, args.seed)
    make_pictures(args, setup, items, Task(Beside(pictures)), (height, width), args.batch_size)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return command("superresolution.py", lambda: run(parser().parse_args(argv)), GO_ON)


if __name__ == "__main__":
    sys.exit(main())
