"""Images from semantic maps (a label for every pixel), with or without encoder propagation (Faster Diffusion)."""

from __future__ import annotations

import argparse
import sys
from functools import partial

from ldm.cli.arguments import (
    ROOT,
    count_arguments,
    model_arguments,
    output_arguments,
    propagation_arguments,
    sampling_arguments,
)
from ldm.cli.parser import GO_ON, Parser, cli, run_command, settings_from

SYNTHESIS = (
    ROOT / "models/ldm/semantic_synthesis512/config.yaml",
    ROOT / "models/ldm/semantic_synthesis512/model.ckpt",
)


def parser() -> Parser:
    p = Parser(prog="semantic2img.py", description=__doc__)
    what = p.add_argument_group("what to make")
    what.add_argument(
        "--maps",
        nargs="+",
        required=True,
        metavar="FILE",
        help="images of one size whose grey levels or palette indices are the labels; the results have the same size",
    )
    count_arguments(what, 1, 1, "images of each map")
    sampling_arguments(p, guided=False)
    propagation_arguments(p)
    model_arguments(p, SYNTHESIS)
    output_arguments(p, "outputs/semantic2img")
    return p


def run(args: argparse.Namespace) -> None:
    subjects, maps = cli.tasks.label_maps(args.maps)
    model = cli.setup.make_setup(settings_from(args, cli.settings.ModelSettings), SYNTHESIS)
    task, size = cli.tasks.label_task(model, maps)
    cli.pipeline.make_images(
        model,
        cli.tasks.image_items(subjects, args.n_samples, args.seed, args.seed_by_position),
        task,
        size,
        settings_from(args, cli.settings.SamplingSettings),
        settings_from(args, cli.settings.OutputSettings),
        args.batch_size,
    )


main = partial(run_command, parser(), run, stopped=GO_ON)

if __name__ == "__main__":
    sys.exit(main())
