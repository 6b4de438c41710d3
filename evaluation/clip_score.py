"""CLIP-score: how well images fit their prompts.

The score has several variants. cos is the cosine of the CLIP embeddings of an image and its prompt.
hessel-b32: 2.5 max(cos, 0) with the prefix "A photo depicts" and ViT-B/32 (arXiv 2104.08718); the paper reports it.
cos100-l14, cos100-g14: 100 cos with ViT-L/14 of OpenAI or ViT-g/14 of LAION.
hessel, cos100: the same formulas with any CLIP model.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from evaluation.metrics.command import (
    PROMPTS,
    RECIPES,
    SAMPLES,
    VARIANTS,
    Defaults,
    add_output,
    add_run,
    measure_flags,
    publish,
)
from ldm.cli.parser import Parser, check_output, command
from ldm.io.errors import flags_named


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="clip_score.py", description=__doc__, formatter_class=Defaults)
    p.add_argument("samples", metavar="SAMPLES", help=SAMPLES)
    p.add_argument("--prompts", metavar="FILE", help=PROMPTS)
    p.add_argument("--variant", choices=VARIANTS, default=VARIANTS[0], help="the formula and the CLIP model, see above")
    p.add_argument(
        "--weights", metavar="DIR", required=True, help="folder of the CLIP model, of transformers or open_clip"
    )
    p.add_argument("--vocabulary", metavar="PATH", help="CLIP's vocabulary (default: in the folder, or installed)")
    p.add_argument("--resize", choices=RECIPES, default="clip-crop", help="how images are resized for the model")
    add_run(p)
    add_output(p)
    return p


def run(args: argparse.Namespace) -> None:
    check_output(args.out)
    from evaluation.metrics import clip_score

    with flags_named(measure_flags(args)):
        result = clip_score.compute(
            args.samples,
            variant=args.variant,
            weights=args.weights,
            prompts=args.prompts,
            vocabulary=args.vocabulary,
            resize=args.resize,
            batch_size=args.batch_size,
            device=args.device,
        )
    publish(result, args.out)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return command("clip_score.py", lambda: run(parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
