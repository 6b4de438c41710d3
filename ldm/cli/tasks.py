"""What was given, as the items of a run and its task: prompts, classes, images, masks, maps of labels, boxes.

For each kind of input: how it is read, what each image of the run shows, how it conditions the model, and where
sampling starts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ldm.checkpoint import fingerprint
from ldm.cli.arguments import CLASS_NAMES, IMAGENET, PROMPT, SHOWN
from ldm.cli.class_names import Names, find_class, read_names
from ldm.cli.parser import MOST
from ldm.cli.settings import SamplingSettings
from ldm.cli.setup import Setup, conditioner, image_size, without_weights
from ldm.io.errors import SettingError, fault_of, shown
from ldm.io.files import read_json, read_lines
from ldm.io.images import fit, from_pil, open_image, open_labels, open_mask, pad
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.encoders.boxes import Box, box_tokens
from ldm.modules.encoders.modules import ClassEmbedder, ClassLabels, SpatialRescaler
from ldm.modules.encoders.tokenizer import Reading
from ldm.sampling.engine import Sizes, Task
from ldm.sampling.generate import Item, make_items
from ldm.sampling.hybrid import Depth, LowResolution, TextAndMaskedImage
from ldm.sampling.task import (
    Condition,
    FramedText,
    FramedTextAndMaskedImage,
    Framing,
    ImageConcat,
    ImageStart,
    KeepOutsideMask,
    LatentInpaint,
    Layout,
    MaskedImage,
    SemanticMap,
    Start,
    Text,
    class_condition,
    unknown_words,
)

Named = tuple[str, Tensor]  # an image or a map, for messages with the name of its file
Subjects = list[dict[str, Any]]  # what each image shows, see `ldm.sampling.generate.Item`
Size = tuple[int, int]  # height and width of images, in pixels
MASK = "_mask.png"  # what a mask's name has in the place of .png
PARTS = ("class", "box")


# Text, and what every run has


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


@dataclass(frozen=True)
class PromptSettings:
    """What conditions a model of text beside the prompt, and how it reads both; see `prompt_arguments`.

    prompt_weights, prompt_chunks: see `Reading`.
    original_size, crop: of the original image, for SDXL, see `Framing`; height and width, top and left, in pixels;
        None = the size of the result, no crop.
    """

    negative_prompt: str = ""
    prompt_weights: bool = False
    prompt_chunks: int = 1
    original_size: tuple[int, int] | None = None
    crop: tuple[int, int] | None = None

    @property
    def texts(self) -> dict[str, Any]:
        """What each condition from text takes."""
        return {"negative": self.negative_prompt, "reading": Reading(self.prompt_weights, self.prompt_chunks)}

    def unframed(self) -> PromptSettings:
        """These, for a model that is not conditioned on size and crop.

        Raises:
            SettingError: they say it.
        """
        for name in ("original_size", "crop"):
            if getattr(self, name) is not None:
                raise SettingError(name, "only for a model that is conditioned on size and crop, such as SDXL")
        return self


AS_USUAL = PromptSettings()


def text_condition(setup: Setup, size: Size, prompts: PromptSettings = AS_USUAL) -> Text:
    """Text for images of this size.

    Raises:
        SettingError: a size or crop for a model that is not conditioned on them.
    """
    if is_framed(setup):
        return FramedText(framing_of(size, prompts), **prompts.texts)
    return Text(**prompts.unframed().texts)


def is_framed(setup: Setup) -> bool:
    """Whether the model is conditioned on size and crop beside the text: SDXL."""
    conditioner = setup.config.model.params.get("cond_stage_config")
    return isinstance(conditioner, Mapping) and conditioner["target"].endswith(".GeneralConditioner")


def is_refiner(setup: Setup) -> bool:
    """Whether the model refines images of another: it is conditioned on an aesthetic score."""
    embedders = setup.config.model.params.cond_stage_config.params.emb_models if is_framed(setup) else []
    return any(entry["input_key"] == "aesthetic_score" for entry in embedders)


def is_video(setup: Setup) -> bool:
    """Whether the model's network makes the frames of a video together."""
    return str(setup.config.model.params.unet_config.get("target")).endswith(".VideoUNet")


def framing_of(size: Size, prompts: PromptSettings) -> Framing:
    """The framing of images of this size; by default they are not cropped."""
    return Framing(size, prompts.original_size or size, prompts.crop or (0, 0))


def text_task(setup: Setup, size: Size, prompts: PromptSettings = AS_USUAL) -> Task:
    """Text to image; arguments and errors as for `text_condition`; a refiner is refused, too."""
    if is_refiner(setup):
        raise SettingError(
            "config", "a refiner finishes images of a base model; expected the base model, and this one as its refiner"
        )
    return Task(text_condition(setup, size, prompts))


def unconditional_task() -> Task:
    return Task(Condition())


def texts_of(items: Sequence[Item], task: Task) -> dict[str, list[str]]:
    """What the model is to read, by the name of the setting."""
    given = {"prompt": [item.inputs for item in items], "negative_prompt": [task.condition.settings()]}
    return {name: [inputs[name] for inputs in places if name in inputs] for name, places in given.items()}


def check_texts(items: Sequence[Item], task: Task) -> None:
    """Raise SettingError for a text that can't be read."""
    for name, texts in texts_of(items, task).items():
        with fault_of(name):
            task.condition.check(texts)


def truncated_prompts(items: Sequence[Item], task: Task, model: LatentDiffusion) -> str | None:
    """What the model does not read of the texts, the negative prompt among them; None if it reads all.

    That is the ends of long ones, words such as <new1> that it was not given, and weights that are read as text.
    """
    prompts, notes = {text for texts in texts_of(items, task).values() for text in texts}, []
    if unknown := unknown_words(model, [*prompts]):
        notes.append(
            f"{', '.join(unknown)}: no word of this model, which reads the letters; an embedding or a delta brings it"
        )
    if weighted := sorted(text for text in prompts if isinstance(task.condition, Text) and task.condition.unread(text)):
        notes.append(
            f"{shown(weighted[0])}: brackets are read as text, since weights are not asked for (prompt-weights)"
        )
    if cut := task.condition.cut(model, [*prompts]):
        notes.append(
            f"{cut} of {len(prompts)} prompts longer than the text encoder reads: what is past its last token is left "
            f"out"
        )
    return "; ".join(notes) or None


# Classes


def class_task(
    setup: Setup, classes: Sequence[str], guided: bool, names_file: str | None = None, uncond: int | None = None
) -> tuple[Subjects, Task]:
    """The subjects of classes that are given by number or name; their task.

    Args:
        guided: whether there is guidance.
        names_file: of the classes' names, see `read_names`; None = classes.txt beside the weights, or the names of
            ImageNet's for a model that knows these.
        uncond: the class that stands for none; None = the one that the config names (`sampling.uncond_class`),
            or that a model has beside ImageNet's.

    Raises:
        SettingError: the model knows no such class, or has none that stands for none.
    """
    embedder = class_conditioner(setup)
    known = embedder.n_classes
    shipped, uncond = setup.ckpt.parent / "classes.txt", absent_class(setup, known) if uncond is None else uncond
    usual = CLASS_NAMES if known in (IMAGENET, IMAGENET + 1) else None
    names = class_names(names_file, shipped if shipped.is_file() else usual)
    with fault_of("classes"):
        subjects = [{"class": find_class(text, names, known)} for text in classes]
    absent = unconditional_class(known, uncond) if guided else None
    return subjects, Task(class_condition(embedder, absent))


def absent_class(setup: Setup, classes: int) -> int | None:
    """The class that stands for none: the one that the config names, or that a model has beside ImageNet's."""
    named = setup.config.get("sampling", {}).get("uncond_class")
    return IMAGENET if named is None and classes == IMAGENET + 1 else named


def usual_classes(setup: Setup, published: Sequence[str]) -> Sequence[str]:
    """The default classes: the published ones for a model of ImageNet; for another, all but the one that means none."""
    known = class_conditioner(setup).n_classes
    return published if known in (IMAGENET, IMAGENET + 1) else named_classes(setup)


def named_classes(setup: Setup) -> list[str]:
    """The numbers of a model's classes, but for the one that means none."""
    known = class_conditioner(setup).n_classes
    return [str(number) for number in range(known) if number != absent_class(setup, known)]


def class_conditioner(setup: Setup) -> ClassEmbedder | ClassLabels:
    """What takes the classes in the config's model, without its weights; it tells how many there are."""
    embedder = conditioner(setup)
    if not isinstance(embedder, ClassEmbedder | ClassLabels):
        raise SettingError("config", f"not a class-conditional model: its conditioner is {type(embedder).__name__}")
    return embedder


def unconditional_class(classes: int, given: int | None) -> int:
    """The class that guidance leads away from, one of so many."""
    if given is None:
        raise SettingError(
            "uncond_class",
            f"needed for guidance, since this model has {classes} classes, not {IMAGENET + 1}; if none of them stands "
            f"for the absence of a class, sample without guidance: scale 1",
        )
    if given >= classes:
        raise SettingError("uncond_class", f"expected 0..{classes - 1}, the classes of this model; got {given}")
    return given


def class_names(path: str | Path | None, default: Path | None = None) -> Names:
    """The names in a file, else in the default file; none without either."""
    path = path or default
    with fault_of("class_names"):
        return {} if path is None else read_names(path)


# An image to start from


def start_image(path: str | Path) -> tuple[Image.Image, dict[str, str]]:
    """The image to start from, and how each result refers to it."""
    with fault_of("init_img"):
        return open_image(path), file_reference(path, "init_img")


def resized_start(image: Image.Image, sizes: Sizes, height: int | None, width: int | None) -> Tensor:
    """An image to start from in the size of the results, (3, H, W): as given, or its own, rounded down."""
    step = sizes.multiple
    own = tuple(max(step, side // step * step) for side in (image.height, image.width))
    return from_pil(fit(image, *image_size(sizes, height, width, own)))


def image_task(setup: Setup, image: Tensor, strength: float, prompts: PromptSettings = AS_USUAL) -> Task:
    """Text and an image to start from, (3, H, W) in [-1, 1], in the size of the results."""
    return Task(text_condition(setup, tuple(image.shape[1:]), prompts), ImageStart(image, strength))


def depth_task(setup: Setup, image: Tensor, strength: float, prompts: PromptSettings = AS_USUAL) -> Task:
    """Text and the depth of an image, (3, H, W) in [-1, 1], in the size of the results."""
    height, width = (side // setup.sizes.factor for side in image.shape[1:])
    condition = Depth(image, (height, width), **prompts.unframed().texts)
    return Task(condition, ImageStart(image, strength) if strength < 1 else Start())


def file_reference(path: str | Path, role: str) -> dict[str, str]:
    """How an image refers to an input file: by name and content."""
    return {role: Path(path).name, f"{role}_sha256": fingerprint(path)[:16]}


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


# Images with masks


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


def inpainting_task(
    setup: Setup, images: Tensor, masks: Tensor, text: bool, prompts: PromptSettings = AS_USUAL
) -> Task:
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
        return Task(text_condition(setup, size, prompts), LatentInpaint(images, masks))
    if not text:
        condition = MaskedImage(images, masks)
    elif is_framed(setup):
        condition = FramedTextAndMaskedImage(images, masks, framing_of(size, prompts), **prompts.texts)
    else:
        condition = TextAndMaskedImage(images, masks, **prompts.unframed().texts)
    return Task(condition, KeepOutsideMask(images, masks))


# Small images


@dataclass(frozen=True)
class UpscalingSettings:
    """What conditions an upscaler that reads text, and how its images are sampled.

    reads: whether it reads text at all.
    """

    sampling: SamplingSettings
    reads: bool = False
    prompts: PromptSettings = AS_USUAL
    noise_level: int = 0


def small_images(paths: Sequence[str | Path]) -> tuple[list[dict[str, str]], Tensor]:
    """Images of one size, (N, 3, h, w) in [-1, 1], and how each result refers to its own.

    Raises:
        SettingError: they can't be read, or are of several sizes.
    """
    with fault_of("images"):
        images = stacked((str(path), from_pil(open_image(path))) for path in paths)
        return [file_reference(path, "image") for path in paths], images


def upscaling_settings(
    setup: Setup,
    sampling: SamplingSettings,
    prompt: Any = None,
    prompts: PromptSettings = AS_USUAL,
    noise_level: int | None = None,
) -> UpscalingSettings:
    """Settings with what was not given filled in, as published for the kind of upscaler.

    Raises:
        SettingError: no upscaler; or text, guidance or a noise level, for one that reads no text.
    """

    def filled(steps: int, eta: float, scale: float) -> SamplingSettings:
        return replace(
            sampling,
            steps=steps if sampling.steps is None else sampling.steps,
            default_steps=steps,
            default_eta=eta if sampling.default_eta is None else sampling.default_eta,
            scale=scale if sampling.scale is None else sampling.scale,
        )

    key = setup.config.model.params.get("conditioning_key") or "concat"
    if key == "hybrid-adm":
        return UpscalingSettings(
            filled(75, 0.0, 9.0), True, prompts.unframed(), 20 if noise_level is None else noise_level
        )
    if key != "concat":
        raise SettingError("config", f"not {ImageConcat.kind}: its conditioning_key is {key!r}, expected 'concat'")
    given = {name: value for name, value in vars(prompts).items() if value != getattr(AS_USUAL, name)}
    given |= {"prompt": prompt, "noise_level": noise_level, "scale": None if sampling.scale == 1.0 else sampling.scale}
    for name, value in given.items():
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
    if not settings.reads:
        return Task(ImageConcat(images)), (height, width)
    if settings.noise_level >= (levels := noise_levels(setup)):
        raise SettingError("noise_level", f"expected 0..{levels - 1} for this model; got {settings.noise_level}")
    return Task(LowResolution(images, settings.noise_level, **settings.prompts.texts)), (height, width)


def noise_levels(setup: Setup) -> int:
    """How many levels of noise on the small image an upscaler that reads text knows; found out without its weights."""
    return without_weights(setup.config.model.params.get("low_scale_config")).max_noise_level


# Maps of labels


def label_maps(paths: Sequence[str | Path]) -> tuple[list[dict[str, str]], list[Named]]:
    """Maps of labels with their names, each (H, W), and how each result refers to its own.

    Raises:
        SettingError: they can't be read, or are of several sizes.
    """
    with fault_of("maps"):
        maps = [(str(path), open_labels(path)) for path in paths]
        stacked(maps)  # of one size
        return [file_reference(path, "map") for path in paths], maps


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
