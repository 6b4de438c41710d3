"""The task of each kind of model, from what was given: its conditioning, and where sampling starts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ldm.cli.arguments import CLASS_NAMES, IMAGENET
from ldm.cli.class_names import Names, find_class
from ldm.cli.inputs import Named, class_names
from ldm.cli.settings import SamplingSettings
from ldm.cli.setup import Setup, conditioner, without_weights
from ldm.io.errors import SettingError, fault_of, shown
from ldm.io.images import pad
from ldm.modules.encoders.boxes import Box, box_tokens
from ldm.modules.encoders.modules import ClassEmbedder, ClassLabels, SpatialRescaler
from ldm.modules.encoders.reading import AS_PUBLISHED, Reading
from ldm.sampling.engine import Task
from ldm.sampling.framed import FramedText, FramedTextAndMaskedImage, Framing
from ldm.sampling.generate import Item
from ldm.sampling.hybrid import Depth, LowResolution, TextAndMaskedImage
from ldm.sampling.task import (
    Classes,
    Condition,
    ImageConcat,
    ImageStart,
    KeepOutsideMask,
    Labels,
    LatentInpaint,
    Layout,
    MaskedImage,
    SemanticMap,
    Start,
    Text,
)

Subjects = list[dict[str, Any]]  # what each image shows, see `ldm.sampling.generate.Item`
Size = tuple[int, int]  # height and width of images, in pixels
PARTS = ("class", "box")


# Text


@dataclass(frozen=True)
class FramingSettings:
    """What a model of SDXL is told of the picture, see `Framing`; None = what is usual.

    original_size, crop: height and width, top and left, in pixels.
    """

    original_size: tuple[int, int] | None = None
    crop: tuple[int, int] | None = None


def text_condition(
    setup: Setup,
    size: Size,
    negative: str = "",
    framing: FramingSettings = FramingSettings(),
    reading: Reading = AS_PUBLISHED,
) -> Text:
    """Text for images of this size; `negative` is what guidance leads away from, `reading` how texts are read.

    Raises:
        SettingError: a framing for a model that is not told any.
    """
    if is_framed(setup):
        return FramedText(framing_of(size, framing), negative, reading)
    for name, value in vars(framing).items():
        if value is not None:
            raise SettingError(name, "only for a model that is told how the image is framed, such as SDXL")
    return Text(negative, reading)


def check_prompts(items: Sequence[Item], negative: str, reading: Reading) -> None:
    """Raise SettingError for a prompt that can't be read in this way."""
    for name, prompts in (("prompt", [item.inputs["prompt"] for item in items]), ("negative_prompt", [negative])):
        with fault_of(name):
            for prompt in dict.fromkeys(prompts):
                reading.spans(prompt)


def is_framed(setup: Setup) -> bool:
    """Whether the model is told how an image is framed, beside the text: SDXL."""
    conditioner = setup.config.model.params.get("cond_stage_config")
    return isinstance(conditioner, Mapping) and conditioner["target"].endswith(".GeneralConditioner")


def is_refiner(setup: Setup) -> bool:
    """Whether the model finishes images of another: it is told how much people like an image."""
    embedders = setup.config.model.params.cond_stage_config.params.emb_models if is_framed(setup) else []
    return any(entry["input_key"] == "aesthetic_score" for entry in embedders)


def framing_of(size: Size, framing: FramingSettings = FramingSettings()) -> Framing:
    """Of images of this size: by default not cropped."""
    return Framing(size, framing.original_size or size, framing.crop or (0, 0))


def text_task(
    setup: Setup,
    size: Size,
    negative: str = "",
    framing: FramingSettings = FramingSettings(),
    reading: Reading = AS_PUBLISHED,
) -> Task:
    """Text to image; arguments and errors as for `text_condition`; a refiner is refused, too."""
    if is_refiner(setup):
        raise SettingError(
            "config", "a refiner finishes images of a base model; expected the base model, and this one as its refiner"
        )
    return Task(text_condition(setup, size, negative, framing, reading))


def image_task(setup: Setup, image: Tensor, strength: float, negative: str = "") -> Task:
    """Text and an image to start from, (3, H, W) in [-1, 1], in the size of the results."""
    return Task(text_condition(setup, tuple(image.shape[1:]), negative), ImageStart(image, strength))


def depth_task(setup: Setup, image: Tensor, strength: float, negative: str = "") -> Task:
    """Text and the depth of an image, (3, H, W) in [-1, 1], in the size of the results."""
    height, width = (side // setup.sizes.factor for side in image.shape[1:])
    return Task(Depth(image, (height, width), negative), ImageStart(image, strength) if strength < 1 else Start())


def unconditional_task() -> Task:
    return Task(Condition())


# Classes


def class_task(
    setup: Setup, classes: Sequence[str], guided: bool, names_file: str | None = None, uncond: int | None = None
) -> tuple[Subjects, Task]:
    """The subjects of classes that are given by number or name; their task.

    Args:
        guided: whether there is guidance.
        names_file: of the classes' names, see `read_names`; None = those of ImageNet, for a model that knows its
            classes.
        uncond: the class that stands for none; None = the one that a model has beside ImageNet's.

    Raises:
        SettingError: the model knows no such class, or has none that stands for none.
    """
    embedder = class_conditioner(setup)
    known = embedder.n_classes
    names = class_names(names_file, CLASS_NAMES if known in (IMAGENET, IMAGENET + 1) else None)
    with fault_of("classes"):
        subjects = [{"class": find_class(text, names, known)} for text in classes]
    condition = Labels if isinstance(embedder, ClassLabels) else Classes
    return subjects, Task(condition(unconditional_class(known, uncond) if guided else None))


def class_conditioner(setup: Setup) -> ClassEmbedder | ClassLabels:
    """What takes the classes in the config's model, without its weights; it tells how many there are."""
    embedder = conditioner(setup)
    if not isinstance(embedder, ClassEmbedder | ClassLabels):
        raise SettingError("config", f"not a class-conditional model: its conditioner is {type(embedder).__name__}")
    return embedder


def unconditional_class(classes: int, given: int | None) -> int:
    """The class that guidance leads away from."""
    if given is None and classes == IMAGENET + 1:
        return IMAGENET
    if given is None:
        raise SettingError(
            "uncond_class",
            f"needed for guidance, since this model has {classes} classes, not {IMAGENET + 1}; if none of them stands "
            f"for the absence of a class, sample without guidance: scale 1",
        )
    if given >= classes:
        raise SettingError("uncond_class", f"expected 0..{classes - 1}, the classes of this model; got {given}")
    return given


# Images


def inpainting_task(setup: Setup, images: Tensor, masks: Tensor, text: bool, negative: str = "") -> Task:
    """Masked parts made anew, from text or without.

    Sides that the model can't make are filled up by repeating the edge, which is cut off in the end.

    Args:
        images, masks: (N, 3, H, W) in [-1, 1], and (N, 1, H, W), 1 = to be made anew.
        text: whether there are prompts.

    Raises:
        SettingError: there are none, and the model reads text.
    """
    sees_both = setup.config.model.params.get("conditioning_key") in ("hybrid", "hybrid-adm")
    if sees_both and not text:
        raise SettingError("prompt", "needed, since this model reads text; '' leaves it free")
    size = tuple(images.shape[-2:])
    whole = [setup.sizes.whole(side) for side in size]
    images, masks = pad(images, *whole), pad(masks, *whole)
    if text and not sees_both:
        return Task(text_condition(setup, size, negative), LatentInpaint(images, masks))
    if not text:
        condition = MaskedImage(images, masks)
    elif is_framed(setup):
        condition = FramedTextAndMaskedImage(images, masks, framing_of(size), negative)
    else:
        condition = TextAndMaskedImage(images, masks, negative)
    return Task(condition, KeepOutsideMask(images, masks))


@dataclass(frozen=True)
class UpscalingSettings:
    """What an upscaler that reads text is told, and how its images are sampled.

    prompt: None = the upscaler reads no text.
    """

    sampling: SamplingSettings
    prompt: str | None = None
    negative: str = ""
    noise_level: int = 0


def upscaling_settings(
    setup: Setup, sampling: SamplingSettings, prompt: Any = None, negative: str = "", noise_level: int | None = None
) -> UpscalingSettings:
    """Settings with what was not given filled in, as published for the kind of upscaler.

    Raises:
        SettingError: text, guidance or a noise level, for an upscaler that reads no text.
    """

    def filled(steps: int, eta: float, scale: float) -> SamplingSettings:
        return replace(
            sampling,
            steps=steps if sampling.steps is None else sampling.steps,
            default_steps=steps,
            default_eta=eta if sampling.default_eta is None else sampling.default_eta,
            scale=scale if sampling.scale is None else sampling.scale,
        )

    if setup.config.model.params.get("conditioning_key") == "hybrid-adm":
        return UpscalingSettings(
            filled(75, 0.0, 9.0), "" if prompt is None else prompt, negative, 20 if noise_level is None else noise_level
        )
    given = {"prompt": prompt, "negative_prompt": negative, "noise_level": noise_level}
    for name, value in {**given, "scale": None if sampling.scale == 1.0 else sampling.scale}.items():
        if value not in (None, ""):
            raise SettingError(name, "only for an upscaler that reads text, such as x4-upscaling")
    return UpscalingSettings(filled(100, 1.0, 1.0))


def upscaling_task(setup: Setup, images: Tensor, settings: UpscalingSettings) -> tuple[Task, Size]:
    """Small images (N, 3, h, w) made large, and how large.

    Raises:
        SettingError: the model knows no such noise level.
    """
    # The small image is as large as the latents; what the model can't make is filled up with its edge.
    sizes, factor = setup.sizes, setup.sizes.factor
    height, width = (side * factor for side in images.shape[-2:])
    images = pad(images, sizes.whole(height) // factor, sizes.whole(width) // factor)
    if settings.prompt is None:
        return Task(ImageConcat(images)), (height, width)
    if settings.noise_level >= (levels := noise_levels(setup)):
        raise SettingError("noise_level", f"expected 0..{levels - 1} for this model; got {settings.noise_level}")
    return Task(LowResolution(images, settings.noise_level, settings.negative)), (height, width)


def noise_levels(setup: Setup) -> int:
    """How many levels of noise on the small image an upscaler that reads text knows; found out without its weights."""
    return without_weights(setup.config.model.params.get("low_scale_config")).max_noise_level


# Maps of labels


def label_task(setup: Setup, maps: Sequence[Named]) -> tuple[Task, Size]:
    """Maps of labels with their names, each (H, W), as images of their size.

    Raises:
        SettingError: the model knows no such label.
    """
    labels = label_count(setup)
    for name, labelled in maps:
        for label in (labelled.min(), labelled.max()):
            if not 0 <= label < labels:
                raise SettingError("maps", f"{name} has a label {label}; this model's are 0..{labels - 1}")
    # What the model can't make is filled up with the edge, and cut off in the end.
    batch = torch.stack([labelled for _, labelled in maps])  # (N, H, W)
    height, width = batch.shape[-2:]
    whole = pad(batch[:, None].float(), *map(setup.sizes.whole, (height, width)))[:, 0].long()
    return Task(SemanticMap(whole)), (height, width)


def label_count(setup: Setup) -> int:
    """How many labels the config's model knows; found out without its weights."""
    rescaler = conditioner(setup)
    if not isinstance(rescaler, SpatialRescaler) or rescaler.channel_mapper is None:
        raise SettingError("config", f"not a semantic synthesis model: its conditioner is {type(rescaler).__name__}")
    return rescaler.channel_mapper.in_channels


# Boxes


def layout_task(setup: Setup, layouts: Sequence[Any], names: Names) -> tuple[Subjects, Task]:
    """The subjects of lists of boxes, one list for each image, see `read_box`; their task.

    Raises:
        SettingError: the model knows no such class, or takes fewer boxes.
    """
    ids, length = vocabulary(setup)
    subjects, tokens = [], []
    for i, layout in enumerate(layouts, start=1):
        image = f"image {i}"
        with fault_of("boxes"):
            boxes = read_boxes(layout, image, names, ids - 1)  # the last id stands for no box
            with _at(image):
                tokens.append(box_tokens(boxes, (length - 2) // 3, ids))  # three a box, and the crop's two
        subjects.append({"boxes": [[b.category, b.x, b.y, b.width, b.height] for b in boxes]})
    return subjects, Task(Layout(torch.stack(tokens)))


def vocabulary(setup: Setup) -> tuple[int, int]:
    """How many token ids the config's model knows, and how many tokens it takes; found out without its weights."""
    key = setup.config.model.params.get("cond_stage_key")
    if key != Layout.stage_key:
        raise SettingError("config", f"not {Layout.kind}: its cond_stage_key is {key!r}, expected {Layout.stage_key!r}")
    transformer = conditioner(setup).transformer
    return transformer.num_tokens, transformer.max_seq_len


def read_boxes(layout: Any, image: str, names: Names, classes: int) -> list[Box]:
    """The boxes of one image of the file; `image` is what errors call it.

    Raises:
        ValueError: no list of boxes, or a box is refused by `read_box`.
    """
    if not isinstance(layout, list) or not layout:
        raise ValueError(f"{image}: expected a list of boxes; got {shown(layout)}")
    boxes = []
    for i, entry in enumerate(layout, start=1):
        with _at(f"{image}, box {i}"):
            boxes.append(read_box(entry, names, classes))
    return boxes


@contextmanager
def _at(place: str) -> Iterator[None]:
    """A ValueError inside the block names the place."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error


def read_box(entry: Any, names: Names, classes: int) -> Box:
    """An entry of the file as a box.

    Raises:
        ValueError: it has other parts, there is no such class, or the box does not lie in the image.
    """
    if not isinstance(entry, dict) or entry.keys() != set(PARTS):
        raise ValueError(f'expected {{"class": CLASS, "box": [X, Y, WIDTH, HEIGHT]}}; got {shown(entry)}')
    category, box = (entry[part] for part in PARTS)
    if not isinstance(category, (int, str)) or isinstance(category, bool):
        raise ValueError(f"class: expected a number or a name; got {shown(category)}")
    # By its type, not isinstance: True is no length.
    if not isinstance(box, list) or len(box) != 4 or any(type(length) not in (int, float) for length in box):
        raise ValueError(f"box: expected four numbers X, Y, WIDTH, HEIGHT; got {shown(box)}")
    return Box(find_class(str(category), names, classes), *box)
