"""Class-conditional images, with or without encoder propagation, as in the authors' fork of latent diffusion.

The defaults are those of the class-conditional ImageNet experiment: 250 DDIM steps, 48 key timesteps, prior noise
after the solver's update at timesteps below 150. --plan ldm250-demo is the fork's list of 19 key timesteps.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial

from ldm.cli.arguments import (
    ROOT,
    classes_arguments,
    model_arguments,
    output_arguments,
    propagation_arguments,
    sampling_arguments,
    size_arguments,
)
from ldm.cli.parser import GO_ON, Parser, cli, run_command, settings_from

CIN256 = (ROOT / "configs/latent-diffusion/cin256-v2.yaml", ROOT / "models/ldm/cin256-v2/model.ckpt")
NOTEBOOK = ("25", "187", "448", "992")  # the published example


def parser() -> Parser:
    p = Parser(prog="class_conditional.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = p.add_argument_group("what to make")
    classes_arguments(what, NOTEBOOK, 4)
    size_arguments(what)
    sampling_arguments(p, 250, scale=1.5)
    propagation_arguments(p, "ldm250", 150.0, "update")
    model_arguments(p, CIN256)
    output_arguments(p, "outputs/class-conditional")
    return p


def run(args: argparse.Namespace) -> None:
    model = cli.setup.make_setup(settings_from(args, cli.settings.ModelSettings), CIN256)
    subjects, task = cli.tasks.class_task(model, args.classes, args.scale != 1.0, args.class_names, args.uncond_class)
    cli.pipeline.make_images(
        model,
        cli.tasks.image_items(subjects, args.n_samples, args.seed, args.seed_by_position),
        task,
        cli.setup.image_size(model.sizes, args.H, args.W),
        settings_from(args, cli.settings.SamplingSettings),
        settings_from(args, cli.settings.OutputSettings),
        args.batch_size,
    )


main = partial(run_command, parser(), run, stopped=GO_ON)

if __name__ == "__main__":
    sys.exit(main())
