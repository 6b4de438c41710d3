"""Concept retrieval: are the real images nearest to a sampled image of the concept that its caption names?

For each of --count captions of the dataset the model samples one image. The image is recognised at k if one of the k
real images with the most similar features shows the same concept, in any style. The real images themselves are measured
as well, each with itself left out, and so are the copies of real images by the model's first stage.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial

from evaluation.metrics.command import MeasureParser
from ldm.cli.arguments import EMOJI64
from ldm.cli.parser import MOST, check_output, finite, number, run_command, settings_from, step_count, whole
from ldm.io.errors import BadInput, blame
from ldm.io.files import write_json

# The splits of the dataset, whose module needs PyTorch.
SPLITS = ("train", "heldout_pair", "heldout_concept")
COLUMNS = 20  # of the grid of images


def parser() -> MeasureParser:
    p = MeasureParser("recognition.py", __doc__)
    p.add_argument("--data", default="data/emoji64", metavar="DIR", help="dataset of scripts/prepare_emoji.py")
    text = "number of captions, at most those of the split; 0 = measure only the real images, without a model"
    p.add_argument("--count", type=whole(0, MOST), default=200, metavar="N", help=text)
    p.add_argument("--split", choices=SPLITS, default="train", help="split of the captions")
    tiers = {"type": int, "choices": (1, 2, 3)}
    text = "use captions of tiers 1 to this; tier 1 has the most concrete concepts"
    p.add_argument("--max-tier", **tiers, default=1, help=text)
    text = "use real images of tiers 1 to this, at least --max-tier; more real images make the task harder"
    p.add_argument("--real-tier", **tiers, default=2, help=text)
    p.add_argument("--config", default=str(EMOJI64[0]), metavar="YAML", help="the model's config (default: emoji64's)")
    p.add_argument("--ckpt", default=str(EMOJI64[1]), metavar="FILE", help="the model's weights (default: emoji64's)")
    p.add_argument("--steps", type=step_count, default=25, metavar="N", help="sampling steps")
    p.add_argument("--scale", type=finite, metavar="X", help="guidance scale, 1 = none (default: the model's, or 7.5)")
    text = "encoder propagation, as --plan of txt2img.py; without prior noise injection"
    p.add_argument("--plan", default="off", help=text)
    p.add_argument("--sampler", default="ddim", help="name of the solver")
    p.add("--batch-size")
    seed, text = number(int, 0, 2**32 - 1, "0..2^32-1"), "seed of the choice of captions and of the noise of the images"
    p.add_argument("--seed", type=seed, default=0, metavar="N", help=text)
    p.add("--out")
    text = f"file for the sampled images as a grid, {COLUMNS} in a row"
    p.add_argument("--images", "--pictures", metavar="PNG", help=text)
    return p


def run(args: argparse.Namespace) -> None:
    check_output(args.out)
    check_output(args.images, "--images")
    if args.images and not args.count:
        raise BadInput("--images: with --count 0 no images are sampled")
    from evaluation.metrics.retrieval import Settings, recognise
    from ldm.io.images import grid, save_png

    report, images = recognise(settings_from(args, Settings))
    if args.images:
        with blame("--images", (OSError, ValueError)):
            save_png(args.images, grid(images, COLUMNS), report["settings"])
    if args.out is not None:
        with blame("--out", (OSError,)):
            write_json(args.out, report)
    for name, result in report["results"].items():
        shown = (
            f"{key} {value['share']:.3f} ({value['interval'][0]:.3f} to {value['interval'][1]:.3f})"
            for key, value in result.items()
            if isinstance(value, dict) and "share" in value
        )
        print(f"{name:13} n {result['n']:5}  {'  '.join(shown)}")
    if score := report["results"].get("generated", {}).get("score"):
        of = "of models/rdm/emoji-encoder (100 cos)"
        print(f"score         {score['mean']} {of}; its correlation with R@5: {score['correlation']}")


main = partial(run_command, parser(), run)

if __name__ == "__main__":
    sys.exit(main())
