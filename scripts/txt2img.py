"""Pictures from text, plain or with encoder propagation (Faster Diffusion)."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ldm.cli.arguments import (
    EMOJI64,
    ROOT,
    model_arguments,
    output_arguments,
    propagation_arguments,
    sampling_arguments,
    size_arguments,
    text_arguments,
)
from ldm.cli.inputs import text_items
from ldm.cli.parser import Parser, command
from ldm.cli.run import GO_ON, make_pictures
from ldm.cli.setup import make_setup, picture_size

LAION400M = (ROOT / "configs/latent-diffusion/txt2img-1p4B-eval.yaml", ROOT / "models/ldm/text2img-large/model.ckpt")


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="txt2img.py", description=__doc__)
    size_arguments(text_arguments(p))
    sampling_arguments(p)
    propagation_arguments(p)
    model_arguments(p, EMOJI64).add_argument(
        "--laion400m",
        action="store_true",
        help="without --config and --ckpt: latent diffusion trained on LAION-400M, models/ldm/text2img-large",
    )
    output_arguments(p, "outputs/txt2img-samples")
    return p


def run(args: argparse.Namespace) -> None:
    default = LAION400M if args.laion400m else EMOJI64
    items = text_items(args, default)
    setup = make_setup(args, default)
    size = picture_size(args, setup.sizes)

    from ldm.sampling.conditions import Text
    from ldm.sampling.engine import Task

    make_pictures(args, setup, items, Task(Text(args.negative_prompt)), size, args.n_samples)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return command("txt2img.py", lambda: run(parser().parse_args(argv)), GO_ON)


if __name__ == "__main__":
    sys.exit(main())
