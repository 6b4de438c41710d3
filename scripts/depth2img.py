"""Pictures from text and the depth of a picture, plain or with encoder propagation (Faster Diffusion).

The depth is estimated from --init-img by the network in the model's checkpoint (MiDaS). The picture itself is where
sampling begins, as in img2img.py; with --strength 1 only its depth is kept.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ldm.cli.arguments import (
    ROOT,
    model_arguments,
    output_arguments,
    picture_arguments,
    propagation_arguments,
    sampling_arguments,
)
from ldm.cli.inputs import from_picture
from ldm.cli.parser import Parser, command
from ldm.cli.run import GO_ON, make_pictures
from ldm.cli.tasks import depth_task

DEPTH = (
    ROOT / "configs/stable-diffusion/v2-midas-inference.yaml",
    ROOT / "models/ldm/stable-diffusion-v2/512-depth-ema.safetensors",
)


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="depth2img.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    picture_arguments(p, strength=0.9)
    sampling_arguments(p, scale=9.0)
    propagation_arguments(p)
    model_arguments(p, DEPTH)
    output_arguments(p, "outputs/depth2img-samples")
    return p


def run(args: argparse.Namespace) -> None:
    picture, items, setup = from_picture(args, DEPTH)
    task = depth_task(setup, picture, args.strength, args.negative_prompt)
    make_pictures(args, setup, items, task, tuple(picture.shape[1:]), args.n_samples)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return command("depth2img.py", lambda: run(parser().parse_args(argv)), GO_ON)


if __name__ == "__main__":
    sys.exit(main())
