"""Pictures from boxes and what is in them, plain or with encoder propagation (Faster Diffusion).

--boxes is a JSON file: a list of pictures, each a list of {"class": CLASS, "box": [X, Y, WIDTH, HEIGHT]}. CLASS is a
number, or a name of --class-names; X and Y are the box's top left corner. Lengths are shares of the picture's, 0..1.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from ldm.class_names import Names, find_class
from ldm.cli import BadInput, Parser, blame, command
from ldm.script import GO_ON, Setup, conditioner, given_names, image_items, make_pictures, make_setup, picture_size

if TYPE_CHECKING:
    from ldm.modules.encoders.boxes import Box

LAYOUT = (ROOT / "models/ldm/layout2img-openimages256/config.yaml",
          ROOT / "models/ldm/layout2img-openimages256/model.ckpt")
PARTS = ("class", "box")


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="layout2img.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = p.add_argument_group("what to make")
    what.add_argument("--boxes", required=True, metavar="FILE", help="the pictures' boxes, see above")
    class_names_argument(what)
    count_arguments(what, 1, 4, "pictures of each list of boxes")
    size_arguments(what)
    sampling_arguments(p, guided=False)
    propagation_arguments(p)
    model_arguments(p, LAYOUT)
    output_arguments(p, "outputs/layout2img")
    return p


def vocabulary(setup: Setup) -> tuple[int, int]:
    """How many token ids the config's model knows, and how many tokens it takes; found out without its weights."""
    from ldm.sampling.conditions import Boxes

    key = setup.config.model.params.get("cond_stage_key")
    if key != Boxes.told_of:
        raise BadInput(f"--config: not {Boxes.kind}: its cond_stage_key is {key!r}, expected {Boxes.told_of!r}")
    transformer = conditioner(setup).transformer
    return transformer.num_tokens, transformer.max_seq_len


def read_layouts(path: str) -> list[list[Any]]:
    """The entries of the file, one list for each picture.

    Raises:
        OSError, ValueError: it can't be read, is no JSON, or not a list of lists.
    """
    try:
        layouts = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON file: {error}") from error
    if not isinstance(layouts, list) or not layouts:
        raise ValueError(f"{path}: expected a list of pictures; got {shown(layouts)}")
    for number, layout in enumerate(layouts, start=1):
        if not isinstance(layout, list) or not layout:
            raise ValueError(f"picture {number}: expected a list of boxes; got {shown(layout)}")
    return layouts


def read_box(entry: Any, names: Names, classes: int) -> Box:
    """An entry of the file as a box.

    Raises:
        ValueError: it has other parts, there is no such class, or the box does not lie in the picture.
    """
    from ldm.modules.encoders.boxes import Box

    if not isinstance(entry, dict) or entry.keys() != set(PARTS):
        raise ValueError(f'expected {{"class": CLASS, "box": [X, Y, WIDTH, HEIGHT]}}; got {shown(entry)}')
    category, box = (entry[part] for part in PARTS)
    if not isinstance(category, (int, str)) or isinstance(category, bool):
        raise ValueError(f"class: expected a number or a name; got {shown(category)}")
    # By its type, not isinstance: True is no length.
    if not isinstance(box, list) or len(box) != 4 or any(type(length) not in (int, float) for length in box):
        raise ValueError(f"box: expected four numbers X, Y, WIDTH, HEIGHT; got {shown(box)}")
    return Box(find_class(str(category), names, classes), *box)


def shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def run(args: argparse.Namespace) -> None:
    names = given_names(args)
    with blame("--boxes"):
        layouts = read_layouts(args.boxes)
    setup = make_setup(args, LAYOUT)
    ids, length = vocabulary(setup)
    size = picture_size(args, setup.sizes)

    import torch

    from ldm.modules.encoders.boxes import box_tokens
    from ldm.sampling.conditions import Boxes
    from ldm.sampling.engine import Task

    subjects, tokens = [], []
    for p, layout in enumerate(layouts, start=1):
        boxes = []
        for b, entry in enumerate(layout, start=1):
            with blame(f"--boxes: picture {p}, box {b}"):
                boxes.append(read_box(entry, names, ids - 1))           # the last id stands for no box
        with blame(f"--boxes: picture {p}"):
            tokens.append(box_tokens(boxes, (length - 2) // 3, ids))    # three a box, and the crop's two
        subjects.append({"boxes": [[b.category, b.x, b.y, b.width, b.height] for b in boxes]})
    items = image_items(args, subjects)
    make_pictures(args, setup, items, Task(Boxes(torch.stack(tokens))), size, args.batch_size)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return command("layout2img.py", lambda: run(parser().parse_args(argv)), GO_ON)


if __name__ == "__main__":
    sys.exit(main())
