"""What the images of a run show: prompts, classes by name, images that are read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ldm.checkpoint import fingerprint
from ldm.cli.arguments import MOST, PROMPT, SHOWN
from ldm.cli.class_names import Names, read_names
from ldm.cli.setup import image_size
from ldm.io.errors import SettingError, fault_of, shown
from ldm.io.files import read_json, read_lines
from ldm.io.images import fit, from_pil, open_image, open_labels, open_mask
from ldm.sampling.engine import Sizes
from ldm.sampling.generate import Item, make_items

Named = tuple[str, Tensor]  # an image or a map, for messages with the name of its file
MASK = "_mask.png"  # what a mask's name has in the place of .png


@dataclass(frozen=True)
class TextSettings:
    """Prompts, and how many images of each; see `ldm.cli.arguments.text_arguments`."""

    prompt: str | None = None
    from_file: str | None = None
    repeat: int = 1
    batch_size: int = 4
    n_iter: int = 1
    seed: int = 42
    seed_by_position: bool = False
    fixed_code: bool = False


def text_items(settings: TextSettings, shown: Sequence[str] = (), extra: Mapping[str, Any] | None = None) -> list[Item]:
    """The images that are asked for.

    Args:
        shown: the prompts where none are given; without them the usual one.
        extra: what else is recorded with each image.

    Raises:
        SettingError: the file has no prompts, or they are more images than one run makes.
    """
    prompts, per_iteration = [PROMPT if settings.prompt is None else settings.prompt], settings.batch_size
    if settings.from_file is not None or (shown and settings.prompt is None):
        # As published: a batch is batch_size images of the prompt, or batch_size lines of the file.
        prompts = shown if settings.from_file is None else prompts_in(settings.from_file)
        per_iteration = 1
    return image_items(
        [{"prompt": prompt, **(extra or {})} for prompt in prompts],
        per_iteration * settings.n_iter,
        settings.seed,
        settings.seed_by_position,
        settings.repeat,
        per_iteration if settings.fixed_code else None,
    )


def prompts_in(path: str | Path, setting: str = "from_file") -> list[str]:
    """The prompts in a file, one per line; empty lines are skipped.

    Raises:
        SettingError: it can't be read, or has none.
    """
    with fault_of(setting):
        prompts = [line.strip() for line in read_lines(path) if line.strip()]
        if not prompts:
            raise ValueError(f"{path} is empty; expected one prompt per line")
    return prompts


def shipped_prompts(ckpt: Path) -> list[str]:
    """The first prompts that lie beside a model's weights, if there are any."""
    file = ckpt.parent / "prompts.txt"
    return prompts_in(file)[:SHOWN] if file.is_file() else []


def image_items(
    subjects: Sequence[Mapping[str, Any]],
    samples: int,
    seed: int,
    by_position: bool = False,
    repeat: int = 1,
    share_start: int | None = None,
) -> list[Item]:
    """The images of a run, in order.

    Args:
        subjects, samples, seed, by_position, share_start: see `ldm.sampling.generate.make_items`.
        repeat: how often each subject is taken.

    Raises:
        SettingError: more than one run makes.
    """
    if (total := len(subjects) * repeat * samples) > MOST:
        raise SettingError(
            "n_samples",
            f"{len(subjects)} subjects x {repeat * samples} images of each are {total}; one run makes {MOST} at most",
        )
    return make_items([subject for subject in subjects for _ in range(repeat)], samples, seed, share_start, by_position)


def class_names(path: str | Path | None, default: Path | None = None) -> Names:
    """The names in a file, else in the default file; none without either."""
    path = path or default
    with fault_of("class_names"):
        return {} if path is None else read_names(path)


def start_image(path: str | Path) -> tuple[Image.Image, dict[str, str]]:
    """The image to start from, and how each result refers to it."""
    with fault_of("init_img"):
        return open_image(path), file_reference(path, "init_img")


def resized_start(image: Image.Image, sizes: Sizes, height: int | None, width: int | None) -> Tensor:
    """An image to start from in the size of the results, (3, H, W): as given, or its own, rounded down."""
    step = sizes.multiple
    own = tuple(max(step, side // step * step) for side in (image.height, image.width))
    return from_pil(fit(image, *image_size(sizes, height, width, own)))


def stacked(images: Iterable[Named]) -> Tensor:
    """Images (..., H, W) with their names, of which several may be the same, as a batch.

    Raises:
        ValueError: they are not of one size.
    """
    (first, one), *others = images = [*images]
    for name, other in others:
        if other.shape != one.shape:
            raise ValueError(
                f"{name} has {pixels(other)}, {first} {pixels(one)}; expected one size, so run each size by itself"
            )
    return torch.stack([image for _, image in images])


def pixels(image: Tensor) -> str:
    """Its size in words."""
    return f"{image.shape[-1]} x {image.shape[-2]} pixels"


def file_reference(path: str | Path, role: str) -> dict[str, str]:
    """How an image refers to an input file: by name and content."""
    return {role: Path(path).name, f"{role}_sha256": fingerprint(path)[:16]}


@dataclass(frozen=True)
class MaskedImages:
    """What is in a folder for inpainting, by name.

    subjects: how each result refers to its image and mask.
    images:   (N, 3, H, W) in [-1, 1].
    masks:    (N, 1, H, W), 1 = to be made anew.
    left_out: names of the files that are no pair of image and mask.
    """

    subjects: list[dict[str, Any]]
    images: Tensor
    masks: Tensor
    left_out: Sequence[str]


def masked_images(folder: Path) -> MaskedImages:
    """The images NAME.png of a folder with their masks NAME_mask.png.

    Raises:
        ValueError: there are none, a mask without its image or of another size, or images of several sizes.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    subjects, images, masks = [], {}, {}
    for mask_path in sorted(folder.glob(f"*{MASK}")):
        path = mask_path.with_name(mask_path.name.removesuffix(MASK) + ".png")
        image, mask = from_pil(open_image(path)), open_mask(mask_path)
        if mask.shape[1:] != image.shape[1:]:
            raise ValueError(f"{mask_path.name} has {pixels(mask)}, its image {pixels(image)}")
        subjects.append(file_reference(path, "image") | file_reference(mask_path, "mask"))
        images[path.name], masks[mask_path.name] = image, mask
    if not subjects:
        raise ValueError(f"{folder} has no masks; expected images NAME.png with masks NAME{MASK}")
    left_out = [path.name for path in folder.iterdir() if path.is_file() and path.name not in images | masks]
    return MaskedImages(subjects, stacked(images.items()), stacked(masks.items()), left_out)


def small_images(paths: Sequence[str | Path]) -> tuple[list[dict[str, str]], Tensor]:
    """Images of one size, (N, 3, h, w) in [-1, 1], and how each result refers to its own.

    Raises:
        SettingError: they can't be read, or are of several sizes.
    """
    with fault_of("images"):
        images = stacked((str(path), from_pil(open_image(path))) for path in paths)
        return [file_reference(path, "image") for path in paths], images


def label_maps(paths: Sequence[str | Path]) -> tuple[list[dict[str, str]], list[Named]]:
    """Maps of labels with their names, each (H, W), and how each result refers to its own.

    Raises:
        SettingError: they can't be read, or are of several sizes.
    """
    with fault_of("maps"):
        maps = [(str(path), open_labels(path)) for path in paths]
        stacked(maps)  # of one size
        return [file_reference(path, "map") for path in paths], maps


def read_layouts(path: str | Path) -> list[Any]:
    """The entries of a file of boxes, one for each image.

    Raises:
        SettingError: it can't be read, is no JSON, or not a list.
    """
    with fault_of("boxes"):
        layouts = read_json(path)
        if not isinstance(layouts, list) or not layouts:
            raise ValueError(f"{path}: expected a list of images; got {shown(layouts)}")
        return layouts
