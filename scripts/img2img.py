"""Images from text and an image to start from, with or without encoder propagation (Faster Diffusion)."""

from __future__ import annotations

import argparse
import sys
from functools import partial

from ldm.cli.arguments import (
    EMOJI64,
    model_arguments,
    output_arguments,
    propagation_arguments,
    sampling_arguments,
    start_image_arguments,
)
from ldm.cli.parser import GO_ON, Parser, cli, run_command, settings_from


def parser() -> Parser:
    p = Parser(prog="img2img.py", description=__doc__)
    start_image_arguments(p, strength=0.75)
    sampling_arguments(p)
    propagation_arguments(p)
    model_arguments(p, EMOJI64, adapters=True)
    output_arguments(p, "outputs/img2img-samples")
    return p


def run(args: argparse.Namespace) -> None:
    start, reference = cli.tasks.start_image(args.init_img)
    model = cli.setup.make_setup(settings_from(args, cli.settings.ModelSettings), EMOJI64)
    shown = cli.tasks.shipped_prompts(model.ckpt) if args.compare else []
    image = cli.tasks.resized_start(start, model.sizes, args.H, args.W)
    cli.pipeline.make_images(
        model,
        cli.tasks.text_items(settings_from(args, cli.tasks.TextSettings), shown, reference),
        cli.tasks.image_task(model, image, args.strength, settings_from(args, cli.tasks.PromptSettings)),
        tuple(image.shape[1:]),
        settings_from(args, cli.settings.SamplingSettings),
        settings_from(args, cli.settings.OutputSettings),
        args.batch_size,
    )


main = partial(run_command, parser(), run, stopped=GO_ON)

if __name__ == "__main__":
    sys.exit(main())
