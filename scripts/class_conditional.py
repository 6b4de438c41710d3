"""Pictures of classes, plain or with encoder propagation as in the authors' latent-diffusion fork.

The defaults are those of the class-conditional ImageNet experiment: 250 DDIM steps, 48 key steps, prior noise
after the solver's step below t = 150. --plan ldm250-demo is the fork's list of 19 key steps.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ldm.arguments import (
    ROOT,
    class_names_argument,
    count_arguments,
    model_arguments,
    output_arguments,
    propagation_arguments,
    sampling_arguments,
    size_arguments,
)
from ldm.class_names import find_class
from ldm.cli import BadInput, Parser, blame, command, number
from ldm.script import GO_ON, Setup, conditioner, given_names, image_items, make_pictures, make_setup, picture_size

CIN256 = (ROOT / "configs/latent-diffusion/cin256-v2.yaml", ROOT / "models/ldm/cin256-v2/model.ckpt")
NAMES = ROOT / "models/ldm/cin256-v2/classes.txt"
IMAGENET = 1000                         # classes; where a model has one more, that one is their absence
NOTEBOOK = ["25", "187", "448", "992"]  # the published example


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="class_conditional.py", description=__doc__,
               formatter_class=argparse.RawDescriptionHelpFormatter)
    what = p.add_argument_group("what to make")
    what.add_argument("--classes", nargs="+", default=NOTEBOOK, metavar="CLASS",
                      help=f"class indices or names (default: {' '.join(NOTEBOOK)})")
    class_names_argument(what, f"{NAMES.relative_to(ROOT)} for models of {IMAGENET} or {IMAGENET + 1} classes")
    count_arguments(what, 4, 4, "pictures of each class")
    size_arguments(what)
    sampling_arguments(p, 250, scale=1.5)
    p.add_argument("--uncond_class", type=number(int, 0, sys.maxsize, "a whole number >= 0"), metavar="CLASS",
                   help=f"class that stands for none, which guidance needs (default: {IMAGENET}, of a model with "
                        f"{IMAGENET + 1} classes)")
    propagation_arguments(p, "ldm250", 150.0, "update")
    model_arguments(p, CIN256)
    output_arguments(p, "outputs/class-conditional")
    return p


def class_count(setup: Setup) -> int:
    """How many classes the config's model knows; found out without its weights."""
    from ldm.modules.encoders.modules import ClassEmbedder

    embedder = conditioner(setup)
    if not isinstance(embedder, ClassEmbedder):
        raise BadInput(f"--config: not a class-conditional model: its conditioner is {type(embedder).__name__}")
    return embedder.n_classes


def absent_class(args: argparse.Namespace, classes: int) -> int | None:
    """The class that guidance leads away from; None without guidance."""
    if args.scale == 1.0:
        return None
    if args.uncond_class is None and classes == IMAGENET + 1:
        return IMAGENET
    if args.uncond_class is None:
        raise BadInput(f"--uncond_class: needed for guidance, since this model has {classes} classes, not "
                       f"{IMAGENET + 1}; if none of them stands for the absence of a class, use --scale 1")
    if args.uncond_class >= classes:
        raise BadInput(f"--uncond_class: expected 0..{classes - 1}, the classes of this model; got {args.uncond_class}")
    return args.uncond_class


def run(args: argparse.Namespace) -> None:
    setup = make_setup(args, CIN256)
    classes = class_count(setup)
    names = given_names(args, NAMES if classes in (IMAGENET, IMAGENET + 1) else None)
    with blame("--classes"):
        chosen = [find_class(text, names, classes) for text in args.classes]
    absent = absent_class(args, classes)
    size = picture_size(args, setup.sizes)

    from ldm.sampling.conditions import Classes
    from ldm.sampling.engine import Task

    subjects = [{"class": number} for number in chosen]
    items = image_items(args, subjects)
    make_pictures(args, setup, items, Task(Classes(absent)), size, args.batch_size)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return command("class_conditional.py", lambda: run(parser().parse_args(argv)), GO_ON)


if __name__ == "__main__":
    sys.exit(main())
