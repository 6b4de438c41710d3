"""Images from text that follow edges, scribbles, depth or any other picture (ControlNet), with or without encoder
propagation (Faster Diffusion).

With --control edges, scribble or depth the picture is made of --image; a FILE is taken as it is. Give --control several
times, with a --control-model each, and their effects add up. Control networks run at key timesteps, where the UNet's
encoder runs, unless --control-at says otherwise.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace

from ldm.cli.arguments import (
    EMOJI64,
    model_arguments,
    output_arguments,
    propagation_arguments,
    sampling_arguments,
    scale_value,
    size_arguments,
    text_arguments,
)
from ldm.cli.parser import GO_ON, Parser, cli, number, run_command, settings_from


def thresholds(text: str) -> tuple[float, float]:
    """An argparse type: two numbers of at least 0, LOW,HIGH."""
    low, comma, high = text.partition(",")
    if not comma:
        raise argparse.ArgumentTypeError(f"must be LOW,HIGH, two numbers such as 100,200; got {text!r}")
    one = number(float, 0, sys.float_info.max, "a number >= 0")
    return one(low), one(high)


def parser() -> Parser:
    p = Parser(prog="controlnet.py", description=__doc__)
    size_arguments(
        text_arguments(p), "the shape of --image near the model's own size; without --image the model's own size"
    )
    control_arguments(p)
    sampling_arguments(p)
    propagation_arguments(p, order="after")
    model_arguments(p, EMOJI64, adapters=True)
    output_arguments(p, "outputs/controlnet-samples")
    return p


def control_arguments(p: argparse.ArgumentParser) -> None:
    """What the images follow, and by which networks."""
    control = p.add_argument_group("what the images follow")
    control.add_argument(
        "--control",
        action="append",
        required=True,
        metavar="KIND",
        help="edges (Canny), scribble (HED) or depth (MiDaS) of --image; or FILE, a picture of the size of the results "
        "that shows the edges, the depth or what else the control network was trained with; may be given several times",
    )
    control.add_argument(
        "--control-model",
        action="append",
        required=True,
        metavar="FILE",
        help="the control network of each --control: a file that has it alone or beside its base model, or a folder of "
        "the diffusers library",
    )
    control.add_argument(
        "--control-weight",
        action="append",
        default=[],
        type=scale_value,
        metavar="X",
        help="how much each control network counts (default: 1)",
    )
    control.add_argument("--image", metavar="FILE", help="the image that edges, scribble or depth are made of")
    control.add_argument("--hed", metavar="FILE", help="weights of HED, for --control scribble")
    control.add_argument(
        "--midas",
        metavar="FILE",
        help="weights of MiDaS, or of a depth-to-image model that has them, for --control depth",
    )
    control.add_argument(
        "--canny",
        type=thresholds,
        default=(100.0, 200.0),
        metavar="LOW,HIGH",
        help="thresholds of the edges (default: 100,200)",
    )
    control.add_argument(
        "--guess",
        action="store_true",
        help="guess mode: control counts less the further out in the network it is added, and not for the "
        "unconditional prediction; for an empty prompt",
    )
    control.add_argument(
        "--control-at",
        choices=("key", "every"),
        default="key",
        help="run control networks at key timesteps, or at every step, where their part of the features is then new "
        "(default: %(default)s)",
    )


def run(args: argparse.Namespace) -> None:
    settings = settings_from(args, cli.control.ControlSettings)
    cli.control.check_control(settings)
    image = cli.control.read_image(settings)
    model = cli.setup.make_setup(settings_from(args, cli.setup.ModelSettings), EMOJI64)
    size = cli.control.result_size(model, image, args.H, args.W)
    shown = cli.tasks.shipped_prompts(model.ckpt) if args.compare else []
    network = cli.control.controlled(model, settings, image, size)
    made = cli.pipeline.make_images(
        model,
        cli.tasks.text_items(settings_from(args, cli.tasks.TextSettings), shown),
        replace(cli.tasks.text_task(model, size, args.negative_prompt), network=network),
        size,
        settings_from(args, cli.pipeline.SamplingSettings),
        settings_from(args, cli.pipeline.OutputSettings),
        args.batch_size,
        keep="edges" in args.control,
    )
    for line in cli.control.edges_followed(network, made):
        print(line)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return run_command(parser(), run, argv, GO_ON)


if __name__ == "__main__":
    sys.exit(main())
