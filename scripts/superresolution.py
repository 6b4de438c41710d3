"""Super-resolution: larger versions of small images, with or without encoder propagation (Faster Diffusion).

The default model is bsr_sr: 100 steps, eta 1. With --config and --ckpt the model can be the x4 upscaler of Stable
Diffusion, which reads a prompt and adds noise to the small image: 75 steps, eta 0, scale 9, noise level 20.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial

from ldm.cli.arguments import (
    ROOT,
    count_arguments,
    model_arguments,
    noise_level_argument,
    output_arguments,
    prompt_arguments,
    propagation_arguments,
    sampling_arguments,
)
from ldm.cli.parser import GO_ON, Parser, cli, run_command, settings_from

BSR_SR = (ROOT / "models/ldm/bsr_sr/config.yaml", ROOT / "models/ldm/bsr_sr/model.ckpt")


def parser() -> Parser:
    p = Parser(prog="superresolution.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = p.add_argument_group("what to make")
    what.add_argument(
        "--images",
        nargs="+",
        required=True,
        metavar="FILE",
        help="small images of one size; each side becomes f times as long (4 times with both models)",
    )
    what.add_argument("--prompt", help="what the images show, for the x4 upscaler (default: the empty text)")
    prompt_arguments(what, framed=False)
    noise_level_argument(what)
    count_arguments(what, 1, 1, "results for each image")
    sampling_arguments(p, None, None, unknown="see above")
    propagation_arguments(p)
    model_arguments(p, BSR_SR)
    output_arguments(p, "outputs/superresolution")
    return p


def run(args: argparse.Namespace) -> None:
    subjects, images = cli.tasks.small_images(args.images)
    model = cli.setup.make_setup(settings_from(args, cli.settings.ModelSettings), BSR_SR)
    sampling = settings_from(args, cli.settings.SamplingSettings)
    prompts = settings_from(args, cli.tasks.PromptSettings)
    settings = cli.tasks.upscaling_settings(model, sampling, args.prompt, prompts, args.noise_level)
    task, size = cli.tasks.upscaling_task(model, images, settings)
    text = {"prompt": args.prompt or ""} if settings.reads else {}
    cli.pipeline.make_images(
        model,
        cli.tasks.image_items(
            [subject | text for subject in subjects], args.n_samples, args.seed, args.seed_by_position
        ),
        task,
        size,
        settings.sampling,
        settings_from(args, cli.settings.OutputSettings),
        args.batch_size,
    )


main = partial(run_command, parser(), run, stopped=GO_ON)

if __name__ == "__main__":
    sys.exit(main())
