"""Images by retrieval-augmented diffusion, with or without encoder propagation (Faster Diffusion).

The network is conditioned on embeddings: of the prompt alone; with --use_neighbors also of the images of --database
that are nearest to it; with --query-image of the images that are nearest to an image. scripts/build_database.py makes a
database of a folder of images.
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
    size_arguments,
    text_arguments,
)
from ldm.cli.parser import GO_ON, MOST, Parser, cli, run_command, settings_from, whole
from ldm.io.errors import SettingError

RDM768 = (ROOT / "configs/retrieval-augmented-diffusion/768x768.yaml", ROOT / "models/rdm/rdm768x768/model.ckpt")


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
    retrieval_arguments(p)
    sampling_arguments(p, unknown="the model's, or 5")
    propagation_arguments(p)
    model_arguments(p, RDM768)
    output_arguments(p, "outputs/knn2img-samples")
    return p


def retrieval_arguments(p: argparse.ArgumentParser) -> None:
    near = p.add_argument_group("what it is made of")
    near.add_argument(
        "--use_neighbors", action="store_true", help="beside the prompt: the nearest images of the database"
    )
    near.add_argument(
        "--omit_query", action="store_true", help="leave the prompt itself out: its neighbours alone are used"
    )
    near.add_argument("--knn", type=whole(1, MOST), metavar="K", help="neighbours (default: the model's, or 10)")
    near.add_argument(
        "--database",
        metavar="DIR",
        help="folder of the database, or its name in data/rdm/retrieval_databases (default: artbench-surrealism)",
    )
    near.add_argument(
        "--searcher",
        metavar="DIR",
        help="search by an index of scripts/train_searcher.py (default: compare with every row, which is exact)",
    )
    near.add_argument(
        "--clip_type",
        metavar="NAME[:FOLDER]",
        help="what embeds prompts and images: ViT-L/14, clip:FOLDER, emoji, efficientnet-lite0; it must be what the "
        "database was made with (default: the model's, or ViT-L/14, with its weights in models/clip/ViT-L-14)",
    )
    near.add_argument(
        "--show-neighbors",
        action="store_true",
        help="save a sheet of each image and its neighbours in OUTDIR/neighbors",
    )


def run(args: argparse.Namespace) -> None:
    if args.query_image and (args.prompt is not None or args.from_file is not None):
        raise SettingError("query_image", "either texts or images are searched with; got both")
    if args.show_neighbors and not args.save:
        raise SettingError("show_neighbors", "the sheets are of saved images: not with --skip_save")
    setup = cli.setup.make_setup(settings_from(args, cli.settings.ModelSettings), RDM768)
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
