"""Masked parts of pictures painted anew, plain or with encoder propagation (Faster Diffusion).

With --prompt any text-to-image model does it (the rest of the picture is put back, at the latents' noise level,
before every step), and so does an inpainting model of Stable Diffusion, which sees picture and mask; without, the
inpainting model of latent diffusion, which sees them, too. Every pixel outside of the mask stays as it is.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.cli.arguments import (
    EMOJI64,
    ROOT,
    count_arguments,
    model_arguments,
    negative_argument,
    output_arguments,
    propagation_arguments,
    sampling_arguments,
)
from ldm.cli.inputs import image_items, named, pixels, stacked
from ldm.cli.parser import Parser, command
from ldm.cli.run import GO_ON, make_pictures
from ldm.cli.setup import make_setup
from ldm.cli.tasks import inpainting_task
from ldm.io.errors import BadInput, blame, some

if TYPE_CHECKING:
    from torch import Tensor

INPAINTING_BIG = (ROOT / "models/ldm/inpainting_big/config.yaml", ROOT / "models/ldm/inpainting_big/last.ckpt")
MASK = "_mask.png"
SHOWN = 3  # of files that are left alone, how many the warning names


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="inpaint.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = p.add_argument_group("what to make")
    what.add_argument(
        "--indir",
        required=True,
        metavar="DIR",
        help=f"pictures NAME.png with masks NAME{MASK}, white where to paint; pictures of one size",
    )
    what.add_argument("--prompt", help="what to paint, for a model that reads text")
    negative_argument(what)
    count_arguments(what, 1, 4, "results for each picture")
    sampling_arguments(p)
    propagation_arguments(p)
    model_arguments(p)
    p.epilog = (
        f"Without --config and --ckpt: {EMOJI64[1].parent.relative_to(ROOT)} with --prompt, "
        f"{INPAINTING_BIG[1].parent.relative_to(ROOT)} without."
    )
    output_arguments(p, "outputs/inpainting")
    return p


@dataclass(frozen=True)
class Inputs:
    """What is in the folder, by name.

    subjects: how each result remembers its picture and mask.
    pictures: (N, 3, H, W) in [-1, 1].
    masks:    (N, 1, H, W), 1 = to be painted.
    """

    subjects: list[dict[str, Any]]
    pictures: Tensor
    masks: Tensor


def read_folder(folder: Path) -> Inputs:
    """Pictures with masks, as published; of files that are left alone, such as pictures without a mask, it is said.

    Raises:
        ValueError: none, a mask without its picture or of another size, or pictures of several sizes.
    """
    from ldm.io.images import from_pil, open_image, open_mask

    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    subjects, pictures, masks = [], {}, {}
    for mask_path in sorted(folder.glob(f"*{MASK}")):
        path = mask_path.with_name(mask_path.name.removesuffix(MASK) + ".png")
        picture, mask = from_pil(open_image(path)), open_mask(mask_path)
        if mask.shape[1:] != picture.shape[1:]:
            raise ValueError(f"{mask_path.name} has {pixels(mask)}, its picture {pixels(picture)}")
        subjects.append(named(path, "image") | named(mask_path, "mask"))
        pictures[path.name], masks[mask_path.name] = picture, mask
    if not subjects:
        raise ValueError(f"{folder} has no masks; expected pictures NAME.png with masks NAME{MASK}")
    left = [path.name for path in folder.iterdir() if path.is_file() and path.name not in pictures | masks]
    if left:
        print(
            f"warning: --indir: {len(left)} files are left alone, which are no pair of NAME.png and NAME{MASK}"
            f"{some(left, SHOWN)}",
            file=sys.stderr,
        )
    return Inputs(subjects, stacked(pictures), stacked(masks))


def run(args: argparse.Namespace) -> None:
    with blame("--indir"):
        inputs = read_folder(Path(args.indir))
    text = args.prompt is not None
    if not text:
        if args.negative_prompt:
            raise BadInput("--negative_prompt: only with --prompt")
        if args.scale not in (None, 1.0):
            raise BadInput("--scale: there is guidance only with --prompt")
        args.scale = 1.0
    setup = make_setup(args, EMOJI64 if text else INPAINTING_BIG)

    subjects = [subject | ({"prompt": args.prompt} if text else {}) for subject in inputs.subjects]
    items = image_items(args, subjects)
    height, width = inputs.pictures.shape[-2:]
    task = inpainting_task(setup, inputs.pictures, inputs.masks, text, args.negative_prompt)
    make_pictures(args, setup, items, task, (height, width), args.batch_size)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return command("inpaint.py", lambda: run(parser().parse_args(argv)), GO_ON)


if __name__ == "__main__":
    sys.exit(main())
