"""Pictures of classes, plain or with encoder propagation as in the authors' latent-diffusion fork.

The defaults are those of the class-conditional ImageNet experiment: 250 DDIM steps, 48 key steps, prior noise
after the solver's step below t = 150. --plan ldm250-demo is the fork's list of 19 key steps.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ldm.cli.arguments import (
    IMAGENET,
    ROOT,
    class_names_argument,
    count_arguments,
    model_arguments,
    output_arguments,
    propagation_arguments,
    sampling_arguments,
    size_arguments,
    uncond_class_argument,
)
from ldm.cli.inputs import image_items
from ldm.cli.parser import Parser, command
from ldm.cli.run import GO_ON, make_pictures
from ldm.cli.setup import make_setup, picture_size
from ldm.cli.tasks import CLASS_NAMES, class_task

CIN256 = (ROOT / "configs/latent-diffusion/cin256-v2.yaml", ROOT / "models/ldm/cin256-v2/model.ckpt")
NOTEBOOK = ["25", "187", "448", "992"]  # the published example


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="class_conditional.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = p.add_argument_group("what to make")
    what.add_argument(
        "--classes",
        nargs="+",
        default=NOTEBOOK,
        metavar="CLASS",
        help=f"class indices or names (default: {' '.join(NOTEBOOK)})",
    )
    class_names_argument(what, f"{CLASS_NAMES.relative_to(ROOT)} for models of {IMAGENET} or {IMAGENET + 1} classes")
    count_arguments(what, 4, 4, "pictures of each class")
    uncond_class_argument(what)
    size_arguments(what)
    sampling_arguments(p, 250, scale=1.5)
    propagation_arguments(p, "ldm250", 150.0, "update")
    model_arguments(p, CIN256)
    output_arguments(p, "outputs/class-conditional")
    return p


def run(args: argparse.Namespace) -> None:
    setup = make_setup(args, CIN256)
    subjects, task = class_task(args, setup, args.classes)
    size = picture_size(args, setup.sizes)

    items = image_items(args, subjects)
    make_pictures(args, setup, items, task, size, args.batch_size)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return command("class_conditional.py", lambda: run(parser().parse_args(argv)), GO_ON)


if __name__ == "__main__":
    sys.exit(main())
