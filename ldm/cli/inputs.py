"""What the arguments of a sampling script picture: prompts, classes by name, pictures that are read."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.cli.arguments import MOST, PROMPT, SHOWN, Files
from ldm.cli.class_names import Names, read_names
from ldm.cli.model_files import model_files
from ldm.cli.setup import Setup, make_setup, picture_size
from ldm.io.errors import BadInput, blame
from ldm.io.files import read_lines

# PyTorch and what needs it are imported where they are used: --help must answer at once.
if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from ldm.sampling.engine import Sizes
    from ldm.sampling.generate import Item


def prompts_in(path: str | Path, flag: str = "--from-file") -> list[str]:
    """The prompts in a file, one per line; empty lines are skipped."""
    with blame(flag):
        lines = read_lines(path)
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise BadInput(f"{flag}: {path} is empty; expected one prompt per line")
    return prompts


def shipped_prompts(args: argparse.Namespace, default: Files | None) -> list[str]:
    """The first prompts that lie beside the model's weights, if there are any."""
    file = model_files(args, default)[1].parent / "prompts.txt"
    return prompts_in(file)[:SHOWN] if file.is_file() else []


def text_items(
    args: argparse.Namespace, default: Files | None = None, extra: dict[str, Any] | None = None
) -> list[Item]:
    """The pictures that `text_arguments` ask for.

    Args:
        default: the model that needs no flag.
        extra: what else of each picture is to be remembered.
    """
    prompts, per_iteration = [PROMPT if args.prompt is None else args.prompt], args.n_samples
    shown = shipped_prompts(args, default) if args.compare and args.prompt is None and args.from_file is None else []
    if args.from_file is not None or shown:
        # As published: a batch is n_samples pictures of the prompt, or n_samples lines of the file.
        prompts, per_iteration = shown or prompts_in(args.from_file), 1
    subjects = [{"prompt": prompt} | (extra or {}) for prompt in prompts]
    return image_items(
        args, subjects, per_iteration * args.n_iter, args.repeat, per_iteration if args.fixed_code else None
    )


def image_items(
    args: argparse.Namespace,
    subjects: Sequence[Mapping[str, Any]],
    samples: int | None = None,
    repeat: int = 1,
    share_start: int | None = None,
) -> list[Item]:
    """The images of a run, in order.

    Args:
        subjects, share_start: see `ldm.sampling.generate.make_items`.
        samples: of each subject; None = --n_samples.
        repeat: how often each subject is taken.

    Raises:
        BadInput: more than one run makes.
    """
    from ldm.sampling.generate import make_items

    samples = args.n_samples if samples is None else samples
    if (total := len(subjects) * repeat * samples) > MOST:
        raise BadInput(
            f"--n_samples: {len(subjects)} subjects x {repeat * samples} images of each are {total}; one "
            f"run makes {MOST} at most"
        )
    return make_items(
        [subject for subject in subjects for _ in range(repeat)], samples, args.seed, share_start, args.seed_by_position
    )


def given_names(args: argparse.Namespace, default: Path | None = None) -> Names:
    """The names in --class-names, else in the default file; none without either."""
    path = args.class_names or default
    with blame("--class-names"):
        return {} if path is None else read_names(path)


def from_picture(args: argparse.Namespace, default: Files) -> tuple[Tensor, list[Item], Setup]:
    """What `picture_arguments` ask for: the picture in the size of the results, (3, H, W); these; the model."""
    from ldm.io.images import open_image

    with blame("--init-img"):
        image = open_image(args.init_img)
        items = text_items(args, default, named(args.init_img, "init_img"))
    setup = make_setup(args, default)
    return in_size(image, args, setup.sizes), items, setup


def in_size(image: Image.Image, args: argparse.Namespace, sizes: Sizes) -> Tensor:
    """A picture to begin with in the size of the results, (3, H, W): its own, rounded down, unless args say another."""
    from ldm.io.images import fit, from_pil

    step = sizes.multiple
    height, width = (max(step, side // step * step) for side in (image.height, image.width))
    return from_pil(fit(image, *picture_size(args, sizes, (height, width))))


def stacked(pictures: Mapping[str, Tensor]) -> Tensor:
    """Pictures (..., H, W) by name as a batch.

    Raises:
        ValueError: they are not of one size.
    """
    import torch

    (first, one), *others = pictures.items()
    for name, other in others:
        if other.shape != one.shape:
            raise ValueError(
                f"{name} has {pixels(other)}, {first} {pixels(one)}; expected one size, so run each size by itself"
            )
    return torch.stack(list(pictures.values()))


def pixels(picture: Tensor) -> str:
    return f"{picture.shape[-1]} x {picture.shape[-2]} pixels"


def named(path: str | Path, role: str) -> dict[str, str]:
    """How a picture remembers an input file: by name and content."""
    from ldm.checkpoint import fingerprint

    return {role: Path(path).name, f"{role}_sha256": fingerprint(path)[:16]}
