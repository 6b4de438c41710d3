"""Images from text, with or without encoder propagation (Faster Diffusion)."""

from __future__ import annotations

import argparse
import sys
from functools import partial

from ldm.cli.arguments import (
    EMOJI64,
    ROOT,
    model_arguments,
    output_arguments,
    propagation_arguments,
    refiner_arguments,
    sampling_arguments,
    size_arguments,
    text_arguments,
)
from ldm.cli.parser import GO_ON, Parser, cli, run_command, settings_from

LAION400M = (ROOT / "configs/latent-diffusion/txt2img-1p4B-eval.yaml", ROOT / "models/ldm/text2img-large/model.ckpt")


def parser() -> Parser:
    p = Parser(prog="txt2img.py", description=__doc__)
    size_arguments(text_arguments(p))
    sampling_arguments(p)
    propagation_arguments(p)
    of_model = model_arguments(p, EMOJI64, adapters=True)
    of_model.add_argument(
        "--laion400m",
        action="store_true",
        help="without --config and --ckpt: latent diffusion trained on LAION-400M, in models/ldm/text2img-large",
    )
    refiner_arguments(of_model)
    output_arguments(p, "outputs/txt2img-samples")
    return p


def run(args: argparse.Namespace) -> None:
    default = LAION400M if args.laion400m else EMOJI64
    model = cli.setup.make_setup(settings_from(args, cli.settings.ModelSettings), default)
    shown = cli.tasks.shipped_prompts(model.ckpt) if args.compare else []
    items = cli.tasks.text_items(settings_from(args, cli.tasks.TextSettings), shown)
    size = cli.setup.image_size(model.sizes, args.H, args.W)
    cli.pipeline.make_images(
        model,
        items,
        cli.tasks.text_task(model, size, settings_from(args, cli.tasks.PromptSettings)),
        size,
        settings_from(args, cli.settings.SamplingSettings),
        settings_from(args, cli.settings.OutputSettings),
        args.batch_size,
        refiner=cli.pipeline.make_refiner(settings_from(args, cli.settings.RefinerSettings), model),
    )


main = partial(run_command, parser(), run, stopped=GO_ON)

if __name__ == "__main__":
    sys.exit(main())
