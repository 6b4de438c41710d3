"""Images from bounding boxes and their classes, with or without encoder propagation (Faster Diffusion).

--boxes is a JSON file: a list of images. Each image is a list of {"class": CLASS, "box": [X, Y, WIDTH, HEIGHT]}.
CLASS is a number, or a name from --class-names. X and Y are the top left corner of the box. All four numbers are
fractions of the image's width or height, from 0 to 1.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial

from ldm.cli.arguments import (
    ROOT,
    class_names_argument,
    count_arguments,
    model_arguments,
    output_arguments,
    propagation_arguments,
    sampling_arguments,
    size_arguments,
)
from ldm.cli.parser import GO_ON, Parser, cli, run_command, settings_from

LAYOUT = (
    ROOT / "models/ldm/layout2img-openimages256/config.yaml",
    ROOT / "models/ldm/layout2img-openimages256/model.ckpt",
)


def parser() -> Parser:
    p = Parser(prog="layout2img.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = p.add_argument_group("what to make")
    what.add_argument("--boxes", required=True, metavar="FILE", help="the boxes of the images, see above")
    class_names_argument(what)
    count_arguments(what, 1, 4, "images of each list of boxes")
    size_arguments(what)
    sampling_arguments(p, guided=False)
    propagation_arguments(p)
    model_arguments(p, LAYOUT)
    output_arguments(p, "outputs/layout2img")
    return p


def run(args: argparse.Namespace) -> None:
    names = cli.tasks.class_names(args.class_names)
    layouts = cli.tasks.read_layouts(args.boxes)
    model = cli.setup.make_setup(settings_from(args, cli.settings.ModelSettings), LAYOUT)
    subjects, task = cli.tasks.layout_task(model, layouts, names)
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
