"""Images from text and the depth of an image, with or without encoder propagation (Faster Diffusion).

The network in the model's checkpoint (MiDaS) estimates the depth of --init-img. Sampling also starts from that image,
as in img2img.py; with --strength 1 only its depth is used.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial

from ldm.cli.arguments import (
    ROOT,
    model_arguments,
    output_arguments,
    propagation_arguments,
    sampling_arguments,
    start_image_arguments,
)
from ldm.cli.parser import GO_ON, Parser, cli, run_command, settings_from

DEPTH = (
    ROOT / "configs/stable-diffusion/v2-midas-inference.yaml",
    ROOT / "models/ldm/stable-diffusion-v2/512-depth-ema.safetensors",
)


def parser() -> Parser:
    p = Parser(prog="depth2img.py", description=__doc__)
    start_image_arguments(p, strength=0.9, framed=False)
    sampling_arguments(p, scale=9.0)
    propagation_arguments(p)
    model_arguments(p, DEPTH, adapters=True)
    output_arguments(p, "outputs/depth2img-samples")
    return p


def run(args: argparse.Namespace) -> None:
    start, reference = cli.tasks.start_image(args.init_img)
    model = cli.setup.make_setup(settings_from(args, cli.settings.ModelSettings), DEPTH)
    shown = cli.tasks.shipped_prompts(model.ckpt) if args.compare else []
    image = cli.tasks.resized_start(start, model.sizes, args.H, args.W)
    cli.pipeline.make_images(
        model,
        cli.tasks.text_items(settings_from(args, cli.tasks.TextSettings), shown, reference),
        cli.tasks.depth_task(model, image, args.strength, settings_from(args, cli.tasks.PromptSettings)),
        tuple(image.shape[1:]),
        settings_from(args, cli.settings.SamplingSettings),
        settings_from(args, cli.settings.OutputSettings),
        args.batch_size,
    )


main = partial(run_command, parser(), run, stopped=GO_ON)

if __name__ == "__main__":
    sys.exit(main())
