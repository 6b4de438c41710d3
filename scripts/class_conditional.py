"""Pictures of classes, plain or with encoder propagation as in the authors' latent-diffusion fork.

The defaults are those of the class-conditional ImageNet experiment: 250 DDIM steps, 48 key steps, prior noise
after the solver's step below t = 150. --plan ldm250-demo is the fork's list of 19 key steps.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

from ldm.arguments import (
    ROOT,
    batch_argument,
    count,
    model_arguments,
    output_arguments,
    propagation_arguments,
    sampling_arguments,
    seed_argument,
    size_arguments,
)
from ldm.cli import BadInput, Parser, blame, command, number
from ldm.script import GO_ON, Setup, conditioner, make_pictures, make_setup, picture_size

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
    what.add_argument("--class-names", metavar="FILE",
                      help="names of the classes, one line each from class 0, synonyms separated by commas "
                           f"(default, for models of {IMAGENET} or {IMAGENET + 1} classes: {NAMES.relative_to(ROOT)})")
    what.add_argument("--n_samples", type=count, default=4, metavar="N",
                      help="pictures of each class (default: %(default)s)")
    batch_argument(what, 4)
    seed_argument(what)
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


def read_names(path: str | None, classes: int) -> dict[str, list[int]]:
    """Class indices by name in lower case: of a whole line, and of each of its synonyms."""
    if path is None and classes not in (IMAGENET, IMAGENET + 1):
        return {}
    with blame("--class-names"):
        lines = Path(path or NAMES).read_text(encoding="utf-8").splitlines()
    if not lines:
        raise BadInput(f"--class-names: {path} is empty; expected one name per line")
    names: dict[str, list[int]] = {}
    for index, line in enumerate(lines):
        for name in {folded(part) for part in (line, *line.split(","))} - {""}:
            names.setdefault(name, []).append(index)
    return names


def folded(name: str) -> str:
    return " ".join(name.lower().split())


def find_class(text: str, names: dict[str, list[int]], classes: int) -> int:
    if text.lstrip("+-").isdigit():
        found = [int(text)]
    else:
        found = names.get(folded(text), [])
        if not found and not names:
            raise BadInput(f"--classes: {text!r} is no number, and there are no names of this model's classes without "
                           f"--class-names")
        if not found:
            like = get_close_matches(folded(text), names)
            raise BadInput(f"--classes: {text!r} is the name of no class"
                           + (f"; there is {' or '.join(like)}" if like else ""))
        if len(found) > 1:
            raise BadInput(f"--classes: {text!r} names classes {', '.join(map(str, found))}; give the number")
    if not 0 <= found[0] < classes:
        raise BadInput(f"--classes: expected 0..{classes - 1}, the classes of this model; got {found[0]}")
    return found[0]


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
    names = read_names(args.class_names, classes)
    chosen = [find_class(text, names, classes) for text in args.classes]
    absent = absent_class(args, classes)
    size = picture_size(args, setup.sizes, (setup.sizes.default,) * 2)

    from ldm.generate import subject_items
    from ldm.sampling.conditions import Classes
    from ldm.sampling.engine import Task

    items = subject_items([{"class": number} for number in chosen], args.n_samples, args.seed)
    make_pictures(args, setup, items, Task(Classes(absent)), size, args.batch_size)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return command("class_conditional.py", lambda: run(parser().parse_args(argv)), GO_ON)


if __name__ == "__main__":
    sys.exit(main())
