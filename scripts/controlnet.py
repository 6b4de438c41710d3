"""Images from text that follow edges, scribbles, depth or another control image (ControlNet), with or without encoder
propagation (Faster Diffusion).

With --control edges, scribble or depth the control image is made of --image; a FILE is one. Give --control several
times, with a --control-model each, and their effects add up. The control network of emoji64's edges ships, so for that
model --control edges needs no --control-model. Control networks run at key timesteps, where the UNet's encoder runs,
unless --control-at says otherwise.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from functools import partial

from ldm.cli.arguments import (
    EMOJI64,
    control_arguments,
    model_arguments,
    output_arguments,
    propagation_arguments,
    sampling_arguments,
    size_arguments,
    text_arguments,
)
from ldm.cli.parser import GO_ON, Parser, cli, run_command, settings_from


def parser() -> Parser:
    p = Parser(prog="controlnet.py", description=__doc__)
    size_arguments(
        text_arguments(p), "the shape of --image near the model's own size; without --image the model's own size"
    )
    control = p.add_argument_group("what the images follow")
    control_arguments(control, required=True)
    control.add_argument(
        "--image",
        metavar="FILE",
        help="the image that edges, scribble or depth are made of; or a folder of images with captions, which are the "
        "prompts",
    )
    sampling_arguments(p)
    propagation_arguments(p, order="after")
    model_arguments(p, EMOJI64, adapters=True)
    output_arguments(p, "outputs/controlnet-samples")
    return p


def run(args: argparse.Namespace) -> None:
    settings = settings_from(args, cli.control.ControlSettings)
    cli.control.check_control(settings)
    source = cli.control.read_source(settings.image)
    model = cli.setup.make_setup(settings_from(args, cli.settings.ModelSettings), EMOJI64)
    size = cli.control.result_size(model, source, args.H, args.W)
    shown = cli.tasks.shipped_prompts(model.ckpt) if args.compare else []
    items = cli.control.controlled_items(source, settings_from(args, cli.tasks.TextSettings), shown)
    network = cli.control.controlled(model, settings, source, size)
    made = cli.pipeline.make_images(
        model,
        items,
        replace(cli.tasks.text_task(model, size, settings_from(args, cli.tasks.PromptSettings)), network=network),
        size,
        settings_from(args, cli.settings.SamplingSettings),
        settings_from(args, cli.settings.OutputSettings),
        args.batch_size,
        keep="edges" in args.control and not args.save,
    )
    for line in cli.control.edges_followed(network, made):
        print(line)


main = partial(run_command, parser(), run, stopped=GO_ON)

if __name__ == "__main__":
    sys.exit(main())
