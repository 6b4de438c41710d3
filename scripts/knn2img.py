"""Images by retrieval-augmented diffusion, with or without encoder propagation (Faster Diffusion).

The network is conditioned on embeddings: of the prompt alone; with --use_neighbors also of the images of --database
that are nearest to it; with --query-image of the images that are nearest to an image. scripts/build_database.py makes a
database of a folder of images.

The published model needs one flag more, and its weights: --config configs/retrieval-augmented-diffusion/768x768.yaml
"""

from __future__ import annotations

import argparse
import sys
from functools import partial

from ldm.cli.arguments import (
    RDM_EMOJI,
    model_arguments,
    output_arguments,
    propagation_arguments,
    retrieval_arguments,
    sampling_arguments,
    size_arguments,
    text_arguments,
)
from ldm.cli.parser import GO_ON, Parser, cli, run_command, settings_from
from ldm.io.errors import SettingError


def parser() -> Parser:
    p = Parser(prog="knn2img.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = text_arguments(p, reading=False, batch=3)
    what.add_argument(
        "--query-image",
        nargs="+",
        default=[],
        metavar="FILE",
        help="images in the place of texts: each is made of its neighbours alone, --n_samples times --n_iter times",
    )
    size_arguments(what)
    what.add_argument("--n_repeat", metavar="N", help="for published commands: without effect, there too")
    near = retrieval_arguments(p)
    near.add_argument(
        "--show-neighbors",
        action="store_true",
        help="save a sheet of each image and its neighbours in OUTDIR/neighbors",
    )
    sampling_arguments(p, unknown="the model's, or 5")
    propagation_arguments(p)
    model_arguments(p, RDM_EMOJI)
    output_arguments(p, "outputs/knn2img-samples")
    return p


def run(args: argparse.Namespace) -> None:
    if args.query_image and (args.prompt is not None or args.from_file is not None):
        raise SettingError("query_image", "either texts or images are searched with; got both")
    if args.show_neighbors and not args.save:
        raise SettingError("show_neighbors", "the sheets are of saved images: not with --skip_save")
    setup = cli.setup.make_setup(settings_from(args, cli.settings.ModelSettings), RDM_EMOJI)
    images = [file for file in args.query_image for _ in range(args.repeat)]
    if images:
        subjects = cli.neighbours.query_images(images)
        count = args.batch_size * args.n_iter
        items = cli.tasks.image_items(subjects, count, args.seed, args.seed_by_position)
    else:
        shown = cli.tasks.shipped_prompts(setup.ckpt) if args.compare else []
        items = cli.tasks.text_items(settings_from(args, cli.tasks.TextSettings), shown)
    settings = settings_from(args, cli.neighbours.RetrievalSettings)
    found = cli.neighbours.retrieve(setup, items, images, settings)
    if args.show_neighbors and found.database is None:
        raise SettingError("show_neighbors", "there are neighbours only with --use_neighbors or --query-image")
    runs = cli.pipeline.make_images(
        setup,
        found.items,
        found.task,
        cli.setup.image_size(setup.sizes, args.H, args.W),
        cli.neighbours.with_scale(settings_from(args, cli.settings.SamplingSettings), setup),
        settings_from(args, cli.settings.OutputSettings),
        args.batch_size,
    )
    if found.database is None and args.database is not None and runs:
        print("--database: not used without --use_neighbors or --query-image, as in published commands")
    if args.show_neighbors and runs:
        cli.neighbours.save_sheets(runs, found.database, args.outdir)


main = partial(run_command, parser(), run, stopped=GO_ON)

if __name__ == "__main__":
    sys.exit(main())
