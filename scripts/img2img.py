"""Pictures from text and a picture to begin with, plain or with encoder propagation (Faster Diffusion)."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ldm.cli.arguments import (
    EMOJI64,
    model_arguments,
    output_arguments,
    picture_arguments,
    propagation_arguments,
    sampling_arguments,
)
from ldm.cli.inputs import from_picture
from ldm.cli.parser import Parser, command
from ldm.cli.run import GO_ON, make_pictures


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="img2img.py", description=__doc__)
    picture_arguments(p, strength=0.75)
    sampling_arguments(p)
    propagation_arguments(p)
    model_arguments(p, EMOJI64)
    output_arguments(p, "outputs/img2img-samples")
    return p


def run(args: argparse.Namespace) -> None:
    picture, items, setup = from_picture(args, EMOJI64)

    from ldm.sampling.conditions import Text
    from ldm.sampling.engine import Task
    from ldm.sampling.start import ImageStart

    task = Task(Text(args.negative_prompt), ImageStart(picture, args.strength))
    make_pictures(args, setup, items, task, tuple(picture.shape[1:]), args.n_samples)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return command("img2img.py", lambda: run(parser().parse_args(argv)), GO_ON)


if __name__ == "__main__":
    sys.exit(main())
