"""Small pictures made large, plain or with encoder propagation (Faster Diffusion).

By bsr_sr, or with --config and --ckpt by the x4 upscaler of Stable Diffusion, which reads text and adds noise to the
small picture. Defaults of bsr_sr: 100 steps, eta 1. Of the x4 upscaler: 75 steps, eta 0, scale 9, noise level 20.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ldm.arguments import (
    ROOT,
    count_arguments,
    model_arguments,
    negative_argument,
    output_arguments,
    propagation_arguments,
    sampling_arguments,
)
from ldm.cli import BadInput, Parser, blame, command, number
from ldm.script import GO_ON, Setup, image_items, make_pictures, make_setup, named, stacked, without_weights

if TYPE_CHECKING:
    from torch import Tensor

    from ldm.sampling.conditions import Condition

BSR_SR = (ROOT / "models/ldm/bsr_sr/config.yaml", ROOT / "models/ldm/bsr_sr/model.ckpt")
DEFAULTS = {"steps": 100, "default_eta": 1.0, "scale": 1.0}
TEXT_DEFAULTS = {"steps": 75, "default_eta": 0.0, "scale": 9.0, "prompt": "", "noise_level": 20}


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="superresolution.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = p.add_argument_group("what to make")
    what.add_argument("--images", nargs="+", required=True, metavar="FILE",
                      help="small pictures of one size; each side comes out f times as long (4 times by both models)")
    what.add_argument("--prompt", help="what the pictures show, for the x4 upscaler (default: nothing said)")
    negative_argument(what)
    what.add_argument("--noise_level", type=number(int, 0, sys.maxsize, "a whole number >= 0"), metavar="N",
                      help="noise on the small picture, for the x4 upscaler: the timestep of its schedule; with "
                           "more it invents more (default: see above)")
    count_arguments(what, 1, 1, "results for each picture")
    sampling_arguments(p, None, None, unknown="see above")
    propagation_arguments(p)
    model_arguments(p, BSR_SR)
    output_arguments(p, "outputs/superresolution")
    return p


def settle(args: argparse.Namespace, setup: Setup) -> bool:
    """Fill in what was not given, as published for the kind of model; whether it reads text."""
    text = setup.config.model.params.get("conditioning_key") == "hybrid-adm"
    for flag in () if text else ("prompt", "negative_prompt", "scale", "noise_level"):
        if getattr(args, flag) not in (None, "", DEFAULTS.get(flag)):
            raise BadInput(f"--{flag}: only for an upscaler that reads text, such as x4-upscaling")
    for name, value in (TEXT_DEFAULTS if text else DEFAULTS).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return text


def make_condition(args: argparse.Namespace, setup: Setup, text: bool, pictures: Tensor) -> Condition:
    from ldm.sampling.conditions import Beside
    from ldm.sampling.hybrid import LowResolution

    if not text:
        return Beside(pictures)
    levels = without_weights(setup.config.model.params.get("low_scale_config")).max_noise_level
    if args.noise_level >= levels:
        raise BadInput(f"--noise_level: expected 0..{levels - 1} for this model; got {args.noise_level}")
    return LowResolution(pictures, args.noise_level, args.negative_prompt)


def run(args: argparse.Namespace) -> None:
    from ldm.images import from_pil, open_picture, pad

    with blame("--images"):
        images = {path: from_pil(open_picture(path)) for path in args.images}
        pictures = stacked(images)                                                          # (N, 3, h, w)
        subjects = [named(path, "image") for path in images]
    setup = make_setup(args, BSR_SR)
    text = settle(args, setup)

    from ldm.sampling.engine import Task

    # The small picture is as large as the latents; what the model can't make is filled up with its edge.
    sizes, factor = setup.sizes, setup.sizes.factor
    height, width = (side * factor for side in pictures.shape[-2:])
    pictures = pad(pictures, sizes.whole(height) // factor, sizes.whole(width) // factor)
    condition = make_condition(args, setup, text, pictures)
    subjects = [subject | ({"prompt": args.prompt} if text else {}) for subject in subjects]
    items = image_items(args, subjects)
    make_pictures(args, setup, items, Task(condition), (height, width), args.batch_size)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return command("superresolution.py", lambda: run(parser().parse_args(argv)), GO_ON)


if __name__ == "__main__":
    sys.exit(main())
