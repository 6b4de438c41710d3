"""The kinds of models: which arguments each takes in Python, and what it makes of what is given.

A kind's arguments, their defaults and what they accept are those of its script, under the same names.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from numbers import Number
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ldm.cli import tasks
from ldm.cli.arguments import (
    class_names_argument,
    control_arguments,
    count_arguments,
    noise_level_argument,
    prompt_arguments,
    propagation_arguments,
    refiner_arguments,
    retrieval_arguments,
    sampling_arguments,
    size_arguments,
    strength_argument,
    tile_argument,
    uncond_class_argument,
)
from ldm.cli.control import ControlSettings, check_control, controlled, read_source, result_size
from ldm.cli.neighbours import RetrievalSettings, retrieve, with_scale
from ldm.cli.parser import Parser, Version
from ldm.cli.pipeline import Refiner, make_refiner
from ldm.cli.settings import RefinerSettings, SamplingSettings
from ldm.cli.setup import Setup, image_size
from ldm.cli.tasks import (
    PromptSettings,
    class_task,
    depth_task,
    file_reference,
    image_task,
    inpainting_task,
    label_task,
    layout_task,
    resized_start,
    stacked,
    text_task,
    unconditional_task,
    upscaling_settings,
    upscaling_task,
)
from ldm.io.errors import BadInput, SettingError, shown
from ldm.io.images import from_pil, open_image, open_labels, open_mask
from ldm.sampling.engine import Task
from ldm.sampling.generate import make_items
from ldm.sampling.task import Layout

ImageLike = Image.Image | str | Path
BATCH = 4  # images at a time
PNG_MODES, TIFF_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"), ("I", "F", "CMYK", "YCbCr", "LAB")
FLAG = r"--([a-zA-Z][\w-]*)(?:/--?[\w-]+)*"  # of a command line, with its other spellings


# Which kind


def kind_of(model: Any) -> str:
    """The key of `KINDS` that the `model` part of a config asks for.

    Raises:
        ValueError: none.
    """
    params, target = model.params, name_of(model.target)
    stage, key = params.get("cond_stage_config"), params.get("conditioning_key")
    if key is None:
        key = "concat" if params.get("concat_mode", True) else "crossattn"
    by_class = {
        "LatentDepth2ImageDiffusion": "depth",
        "LatentInpaintDiffusion": "inpainting from text",
        "StableDiffusionXLInpaint": "inpainting from text",
        "StableDiffusionXL": "text",
        "LatentUpscaleDiffusion": "upscaling",
    }
    if target in by_class:
        return by_class[target]
    if stage == "__is_unconditional__":
        return "nothing"
    conditioner = "" if isinstance(stage, str) else name_of(stage.target)
    if conditioner in ("Identity", "Flatten") and key == "crossattn":
        return "neighbours"
    if params.get("cond_stage_key") == Layout.stage_key:
        return "boxes"
    if conditioner in ("ClassEmbedder", "ClassLabels"):
        return "classes"
    if conditioner == "SpatialRescaler":
        return "labels"
    if target == "LatentDiffusion" and key == "concat":
        extra = params.unet_config.params.in_channels - params.channels
        return "inpainting" if extra == params.channels + 1 else "upscaling"
    if target == "LatentDiffusion" and key == "crossattn":
        return "text"
    raise ValueError(f"there is no task for a {target} with conditioning_key {key!r} yet")


def name_of(target: str) -> str:
    return target.rpartition(".")[2]


# What is given


@dataclass(frozen=True)
class File:
    """An image that was given, as a file; `reference(role)` is how the item refers to it."""

    path: Path
    digest: str | None  # of its pixels, if it was given as an image

    def reference(self, role: str) -> dict[str, str]:
        return (
            file_reference(self.path, role) if self.digest is None else {role: "image", f"{role}_sha256": self.digest}
        )


@dataclass(frozen=True)
class Given:
    """The arguments that say what the images show, as they were given; images as files; height and width."""

    subjects: Any
    images: list[File]
    masks: list[File]
    height: int | None
    width: int | None

    def prompts(self, count: int | None = None) -> list[str]:
        """The prompts; where a count is given, one for all or one for each."""
        prompts = [self.subjects] if isinstance(self.subjects, str) else self.subjects
        if not isinstance(prompts, list | tuple) or not prompts or not all(map(is_text, prompts)):
            raise ValueError(f"subjects must be one or more prompts for this model; got {shown(self.subjects)}")
        prompts = [*prompts]
        if count is not None and len(prompts) not in (1, count):
            raise ValueError(f"expected one prompt, or {count}, one for each image; got {len(prompts)}")
        return prompts if count in (None, len(prompts)) else prompts * count

    def listed(self, what: str) -> list[Any]:
        if isinstance(self.subjects, str) or not isinstance(self.subjects, Sequence) or not self.subjects:
            raise ValueError(f"subjects must be a list of {what} for this model; got {self.subjects!r}")
        return list(self.subjects)

    def only(self, *, subjects: bool = False, images: bool = False, masks: bool = False) -> None:
        """Raise ValueError if more is given than the kind takes."""
        for name, value, taken in (
            ("subjects", self.subjects, subjects),
            ("image", self.images, images),
            ("mask", self.masks, masks),
        ):
            if value is not None and value != [] and not taken:
                raise ValueError(f"{name} is not taken by this kind of model")

    def size(self, setup: Setup) -> tuple[int, int]:
        """Height and width of the results: as given, or the model's."""
        return image_size(setup.sizes, self.height, self.width)

    def start(self, setup: Setup) -> tuple[torch.Tensor, dict[str, str]]:
        """The image to start from, (3, H, W) in the size of the results, and how the item refers to it."""
        if len(self.images) != 1:
            raise ValueError(f"image must be one image here; got {len(self.images)}")
        file = self.images[0]
        return resized_start(open_image(file.path), setup.sizes, self.height, self.width), file.reference("init_img")

    def stacked(self) -> torch.Tensor:
        """The images, (N, 3, H, W) in [-1, 1]."""
        if not self.images:
            raise ValueError("image: needed by this model")
        return stacked((str(i), from_pil(open_image(file.path))) for i, file in enumerate(self.images))

    def masked(self) -> tuple[list[dict[str, str]], torch.Tensor, torch.Tensor]:
        """How the items refer to images and masks, the images, and their masks, (N, 3, H, W) and (N, 1, H, W)."""
        images = self.stacked()
        if len(self.masks) != len(self.images):
            raise ValueError(f"mask: expected one for each image, {len(self.images)}; got {len(self.masks)}")
        masks = stacked((str(i), open_mask(file.path)) for i, file in enumerate(self.masks))
        if masks.shape[-2:] != images.shape[-2:]:
            raise ValueError(
                f"mask must be as large as the image, {tuple(images.shape[-2:])}; got {tuple(masks.shape[-2:])}"
            )
        subjects = [
            image.reference("image") | mask.reference("mask")
            for image, mask in zip(self.images, self.masks, strict=True)
        ]
        return subjects, images, masks


def is_text(prompt: Any) -> bool:
    """Whether it is a text that a file can hold, without half characters."""
    return isinstance(prompt, str) and not any("\ud800" <= character <= "\udfff" for character in prompt)


def as_files(images: ImageLike | Sequence[ImageLike] | None, folder: Path) -> list[File]:
    """What was given as files; PIL images are written into the folder, so that all are read in the same way."""
    if images is None:
        return []
    return [as_file(image, folder) for image in (images if isinstance(images, list | tuple) else [images])]


def with_files(value: Any, folder: Path) -> Any:
    """An argument's value with files in the place of PIL images, see `as_files`."""
    if isinstance(value, list | tuple):
        return [with_files(one, folder) for one in value]
    return as_file(value, folder).path if isinstance(value, Image.Image) else value


def as_file(image: ImageLike, folder: Path) -> File:
    if isinstance(image, str | Path):
        return File(Path(image), None)
    if not isinstance(image, Image.Image):
        raise TypeError(f"expected a PIL image or the path of a file; got a {type(image).__name__}")
    content = repr((image.mode, image.size)).encode() + image.tobytes()
    digest = hashlib.sha256(content).hexdigest()[:16]
    try:
        image = kept_by_files(image)
        path = folder / f"{digest}.{'tif' if image.mode in TIFF_MODES else 'png'}"
        image.save(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"an image of mode {image.mode}: {error}") from error
    return File(path, digest)


def kept_by_files(image: Image.Image) -> Image.Image:
    """The image in a mode that PNG or TIFF keeps; of modes such as HSV, colours and transparency count.

    Raises:
        ValueError: Pillow does not convert its mode.
    """
    if image.mode in (*PNG_MODES, *TIFF_MODES):
        return image
    if image.mode.startswith("I;16"):  # the other orders of its bytes
        return image.convert("I")
    return image.convert("RGBA" if image.has_transparency_data else "RGB")


# The kinds of models: which arguments they take, and what they make of what is given


@dataclass(frozen=True)
class Job:
    """What a call is to make: subjects, task, height and width, how the images are sampled, and what refines them."""

    subjects: Sequence[dict[str, Any]]
    task: Task
    size: tuple[int, int]
    sampling: SamplingSettings
    refiner: Refiner | None = None


@dataclass(frozen=True)
class Kind:
    """What Python takes for a kind of model.

    arguments: adds the kind's own to a parser.
    make: the job of a call, from what is given, the setup, the `SamplingSettings`, and `settings`.
    settings: dataclasses of further arguments.
    own: arguments that `make` takes by name.
    """

    arguments: Callable[[Parser], object]
    make: Callable[..., Job]
    settings: tuple[Callable[..., Any], ...] = ()
    own: tuple[str, ...] = ()


def text(
    given: Given,
    setup: Setup,
    sampling: SamplingSettings,
    prompts: PromptSettings,
    control: ControlSettings,
    refiner: RefinerSettings,
    strength: float | None,
) -> Job:
    """From a text alone; from an image; what is masked of an image; or under control, see `given_task`."""
    given.only(subjects=True, images=True, masks=True)
    follows = any(value not in ([], getattr(ControlSettings(), name)) for name, value in vars(control).items())
    of_text = not (given.images or given.masks or follows)
    if not of_text and refiner != RefinerSettings():
        raise ValueError("a refiner goes with a text alone")
    if strength is not None and (of_text or follows or given.masks):
        raise ValueError("strength needs an image to begin with, which is not for control, and no mask")
    if given.masks and follows:
        raise ValueError("mask does not go with control")
    noise_order = sampling.noise_order or ("after" if follows else "before")  # as in the scripts
    sampling = replace(sampling, noise_order=noise_order)
    if given.masks:
        return text_inpainting(given, setup, sampling, prompts)
    subjects = [{"prompt": prompt} for prompt in given.prompts()]
    if follows:
        size, task = under_control(given, setup, control, prompts)
        return Job(subjects, task, size, sampling)
    if given.images:
        image, reference = given.start(setup)
        task = image_task(setup, image, 0.75 if strength is None else strength, prompts)
        return Job([subject | reference for subject in subjects], task, tuple(image.shape[1:]), sampling)
    size = given.size(setup)
    return Job(subjects, text_task(setup, size, prompts), size, sampling, make_refiner(refiner, setup))


def under_control(
    given: Given, setup: Setup, settings: ControlSettings, prompts: PromptSettings
) -> tuple[tuple[int, int], Task]:
    """Height and width of the results, and the task; the image is what control images are made of."""
    if len(given.images) > 1:
        raise ValueError(f"image must be one image here; got {len(given.images)}")
    settings = replace(settings, image=given.images[0].path if given.images else None)
    check_control(settings)
    source = read_source(settings.image)
    if source is not None and source.subjects:
        raise ValueError(f"image must be one image here; got the folder {settings.image}")
    size = result_size(setup, source, given.height, given.width)
    task = text_task(setup, size, prompts)
    return size, replace(task, network=controlled(setup, settings, source, size))


def text_inpainting_arguments(p: Parser) -> None:
    prompt_arguments(p)
    sampling_arguments(p)
    propagation_arguments(p, compare=False)


def text_arguments(p: Parser) -> None:
    prompt_arguments(p)
    sampling_arguments(p)
    propagation_arguments(p, order=None, compare=False)  # it depends on what else is given
    strength_argument(p, None)
    refiner_arguments(p)
    control_arguments(p)
    p.set_defaults(image=None)


def text_inpainting(given: Given, setup: Setup, sampling: SamplingSettings, prompts: PromptSettings) -> Job:
    given.only(subjects=True, images=True, masks=True)
    subjects, images, masks = given.masked()
    task = inpainting_task(setup, images, masks, True, prompts)
    return Job(with_prompts(subjects, given.prompts(len(subjects))), task, tuple(images.shape[-2:]), sampling)


def with_prompts(subjects: Sequence[dict[str, Any]], prompts: Sequence[str]) -> list[dict[str, Any]]:
    return [subject | {"prompt": prompt} for subject, prompt in zip(subjects, prompts, strict=True)]


def unguided_arguments(p: Parser) -> None:
    sampling_arguments(p, guided=False)
    propagation_arguments(p, compare=False)


def inpainting(given: Given, setup: Setup, sampling: SamplingSettings) -> Job:
    given.only(images=True, masks=True)
    subjects, images, masks = given.masked()
    return Job(subjects, inpainting_task(setup, images, masks, False), tuple(images.shape[-2:]), sampling)


def depth_arguments(p: Parser) -> None:
    prompt_arguments(p, framed=False)
    sampling_arguments(p, scale=9.0)
    propagation_arguments(p, compare=False)
    strength_argument(p, 0.9)


def depth(given: Given, setup: Setup, sampling: SamplingSettings, prompts: PromptSettings, strength: float) -> Job:
    given.only(subjects=True, images=True)
    image, reference = given.start(setup)
    subjects = [{"prompt": prompt} | reference for prompt in given.prompts()]
    return Job(subjects, depth_task(setup, image, strength, prompts), tuple(image.shape[1:]), sampling)


def upscaling_arguments(p: Parser) -> None:
    prompt_arguments(p, framed=False)
    sampling_arguments(p, None, None)
    propagation_arguments(p, compare=False)
    noise_level_argument(p)


def upscaling(
    given: Given, setup: Setup, sampling: SamplingSettings, prompts: PromptSettings, noise_level: int | None
) -> Job:
    given.only(subjects=True, images=True)
    images = given.stacked()
    settings = upscaling_settings(setup, sampling, given.subjects, prompts, noise_level)
    task, size = upscaling_task(setup, images, settings)
    subjects = [file.reference("image") for file in given.images]
    if settings.reads:
        texts = [""] * len(subjects) if given.subjects is None else given.prompts(len(subjects))
        subjects = with_prompts(subjects, texts)
    return Job(subjects, task, size, settings.sampling)


def class_arguments(p: Parser) -> None:
    sampling_arguments(p, 250, scale=1.5)
    propagation_arguments(p, "ldm250", 150.0, "update", compare=False)
    class_names_argument(p)
    uncond_class_argument(p)


def classes(
    given: Given, setup: Setup, sampling: SamplingSettings, class_names: str | None, uncond_class: int | None
) -> Job:
    given.only(subjects=True)
    named = [str(one) for one in given.listed("classes")]
    subjects, task = class_task(setup, named, sampling.scale != 1.0, class_names, uncond_class)
    return Job(subjects, task, given.size(setup), sampling)


def unconditional_arguments(p: Parser) -> None:
    sampling_arguments(p, 50, eta=1.0, guided=False, eta_flags=("--eta",))
    propagation_arguments(p, compare=False)


def unconditional(given: Given, setup: Setup, sampling: SamplingSettings) -> Job:
    given.only()
    return Job([{}], unconditional_task(), given.size(setup), sampling)


def box_arguments(p: Parser) -> None:
    unguided_arguments(p)
    class_names_argument(p)


def boxes(given: Given, setup: Setup, sampling: SamplingSettings, class_names: str | None) -> Job:
    given.only(subjects=True)
    layouts = given.listed("images, each a list of boxes")
    subjects, task = layout_task(setup, layouts, tasks.class_names(class_names))
    return Job(subjects, task, given.size(setup), sampling)


def neighbours_arguments(p: Parser) -> None:
    retrieval_arguments(p)
    sampling_arguments(p)
    propagation_arguments(p, compare=False)


def neighbours(given: Given, setup: Setup, sampling: SamplingSettings, retrieval: RetrievalSettings) -> Job:
    """From texts, or from images that neighbours are found for."""
    given.only(subjects=True, images=True)
    if given.images and given.subjects is not None:
        raise ValueError("either texts or images are searched with; got subjects and image")
    images = [str(file.path) for file in given.images]
    if retrieval.database is not None and not (retrieval.use_neighbors or images):
        raise SettingError("database", "there are neighbours only with use_neighbors or image")
    subjects = (
        [file.reference("query_image") for file in given.images]
        if images
        else [{"prompt": prompt} for prompt in given.prompts()]
    )
    task = retrieve(setup, make_items(subjects, 1, 0), images, retrieval).task
    return Job(subjects, task, given.size(setup), with_scale(sampling, setup))


def labels(given: Given, setup: Setup, sampling: SamplingSettings) -> Job:
    given.only(subjects=True)
    with tempfile.TemporaryDirectory() as folder:
        maps = as_files(given.subjects, Path(folder))
        if not maps:
            raise ValueError("subjects must be maps of labels for this model; got none")
        labelled = [(str(i), open_labels(file.path)) for i, file in enumerate(maps)]
        stacked(labelled)  # of one size
        subjects = [file.reference("map") for file in maps]
    task, size = label_task(setup, labelled)
    return Job(subjects, task, size, sampling)


KINDS = {
    "text": Kind(text_arguments, text, (PromptSettings, ControlSettings, RefinerSettings), ("strength",)),
    "inpainting from text": Kind(text_inpainting_arguments, text_inpainting, (PromptSettings,)),
    "inpainting": Kind(unguided_arguments, inpainting),
    "depth": Kind(depth_arguments, depth, (PromptSettings,), ("strength",)),
    "upscaling": Kind(upscaling_arguments, upscaling, (PromptSettings,), ("noise_level",)),
    "classes": Kind(class_arguments, classes, own=("class_names", "uncond_class")),
    "nothing": Kind(unconditional_arguments, unconditional),
    "boxes": Kind(box_arguments, boxes, own=("class_names",)),
    "labels": Kind(unguided_arguments, labels),
    "neighbours": Kind(neighbours_arguments, neighbours, (RetrievalSettings,)),
}


# Arguments


def parsed(kind: Kind, given: dict[str, Any]) -> argparse.Namespace:
    """The values of a kind's arguments, checked as its script checks them; None stands for the default.

    Raises:
        TypeError: an argument that it does not have, or a value of another type.
        ValueError: a value that is not accepted.
    """
    parser = Parser(add_help=False)
    count_arguments(parser, 1, BATCH, "")
    size_arguments(parser)
    tile_argument(parser)
    kind.arguments(parser)
    actions: dict[str, argparse.Action] = {}
    for action in parser._actions:
        if isinstance(action, Version):
            continue
        for name in (action.dest, *(option.lstrip("-").replace("-", "_") for option in action.option_strings)):
            actions.setdefault(name, action)
    if unknown := given.keys() - actions.keys():
        raise TypeError(
            f"{', '.join(sorted(unknown))}: no argument of this kind of model; there are {', '.join(sorted(actions))}"
        )
    argv = [word for name, value in given.items() for word in _words(name, value, actions[name])]
    try:
        return parser.parse_args(argv)
    except BadInput as error:  # of a flag, which stands here for the argument
        raise ValueError(re.sub(FLAG, lambda match: match[1].replace("-", "_"), str(error))) from error.__cause__


def _words(name: str, value: Any, action: argparse.Action) -> list[str]:
    """An argument's value as words of a command line.

    Raises:
        TypeError: a value of another type.
    """
    flag = action.option_strings[0]
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False; got {value!r}")
        return [flag] if value else []
    if isinstance(value, bool) or not isinstance(value, str | Path | Number | list | tuple | None):
        raise TypeError(f"{name} must be a text, a number, or a list of them; got {value!r}")
    if value is None:
        return []
    if isinstance(action, argparse._AppendAction):
        return [f"{flag}={one}" for one in (value if isinstance(value, (list, tuple)) else [value])]
    return [f"{flag}={','.join(map(str, value)) if isinstance(value, (list, tuple)) else value}"]
