"""The task of each kind of model, from what was given: what the network is told, and what pictures are painted on."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ldm.cli.arguments import IMAGENET, ROOT
from ldm.cli.class_names import Names, find_class
from ldm.cli.inputs import given_names
from ldm.cli.setup import Setup, conditioner, without_weights
from ldm.io.errors import BadInput, blame, shown

# PyTorch and what needs it are imported where they are used: --help must answer at once.
if TYPE_CHECKING:
    from torch import Tensor

    from ldm.modules.encoders.boxes import Box
    from ldm.sampling.engine import Task

Size = tuple[int, int]  # height and width of pictures, in pixels
CLASS_NAMES = ROOT / "models/ldm/cin256-v2/classes.txt"
UPSCALING = {"steps": 100, "default_eta": 1.0, "scale": 1.0}
TEXT_UPSCALING = {"steps": 75, "default_eta": 0.0, "scale": 9.0, "prompt": "", "noise_level": 20}
PARTS = ("class", "box")


# Classes


def class_task(args: argparse.Namespace, setup: Setup, classes: Sequence[str]) -> tuple[list[dict[str, Any]], Task]:
    """The subjects of classes that are given by number or name; their task."""
    from ldm.sampling.conditions import Classes
    from ldm.sampling.engine import Task

    known = class_count(setup)
    names = given_names(args, CLASS_NAMES if known in (IMAGENET, IMAGENET + 1) else None)
    with blame("--classes"):
        subjects = [{"class": find_class(text, names, known)} for text in classes]
    return subjects, Task(Classes(absent_class(args, known)))


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
        raise BadInput(
            f"--uncond_class: needed for guidance, since this model has {classes} classes, not "
            f"{IMAGENET + 1}; if none of them stands for the absence of a class, use --scale 1"
        )
    if args.uncond_class >= classes:
        raise BadInput(f"--uncond_class: expected 0..{classes - 1}, the classes of this model; got {args.uncond_class}")
    return args.uncond_class


# Pictures


def depth_task(setup: Setup, picture: Tensor, strength: float, negative: str = "") -> Task:
    """Text and the depth of a picture, (3, H, W) in [-1, 1], in the size of the results."""
    from ldm.sampling.engine import Task
    from ldm.sampling.hybrid import Depth
    from ldm.sampling.start import ImageStart, Start

    height, width = (side // setup.sizes.factor for side in picture.shape[1:])
    start = ImageStart(picture, strength) if strength < 1 else Start()
    return Task(Depth(picture, (height, width), negative), start)


def inpainting_task(setup: Setup, pictures: Tensor, masks: Tensor, text: bool, negative: str = "") -> Task:
    """MaskedImage parts painted anew, from text or without.

    Sides that the model can't make are filled up by repeating the edge, which is cut off in the end.

    Args:
        pictures, masks: (N, 3, H, W) in [-1, 1], and (N, 1, H, W), 1 = to be painted.
    """
    from ldm.io.images import pad
    from ldm.sampling.conditions import MaskedImage, Text
    from ldm.sampling.engine import Task
    from ldm.sampling.hybrid import TextAndMaskedImage
    from ldm.sampling.start import KeepOutsideMask, LatentInpaint

    sees_both = setup.config.model.params.get("conditioning_key") == "hybrid"
    if sees_both and not text:
        raise BadInput("--prompt: needed, since this model reads text; '' leaves it free")
    whole = [setup.sizes.whole(side) for side in pictures.shape[-2:]]
    pictures, masks = pad(pictures, *whole), pad(masks, *whole)
    if text and not sees_both:
        return Task(Text(negative), LatentInpaint(pictures, masks))
    condition = TextAndMaskedImage(pictures, masks, negative) if text else MaskedImage(pictures, masks)
    return Task(condition, KeepOutsideMask(pictures, masks))


def settle_upscaling(args: argparse.Namespace, setup: Setup) -> bool:
    """Fill in what was not given, as published for the kind of upscaler; whether it reads text."""
    text = setup.config.model.params.get("conditioning_key") == "hybrid-adm"
    for flag in () if text else ("prompt", "negative_prompt", "scale", "noise_level"):
        if getattr(args, flag) not in (None, "", UPSCALING.get(flag)):
            raise BadInput(f"--{flag}: only for an upscaler that reads text, such as x4-upscaling")
    for name, value in (TEXT_UPSCALING if text else UPSCALING).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return text


def upscaling_task(args: argparse.Namespace, setup: Setup, pictures: Tensor, text: bool) -> tuple[Task, Size]:
    """Small pictures (N, 3, h, w) made large, and how large; the arguments are settled."""
    from ldm.io.images import pad
    from ldm.sampling.conditions import ImageConcat
    from ldm.sampling.engine import Task
    from ldm.sampling.hybrid import LowResolution

    # The small picture is as large as the latents; what the model can't make is filled up with its edge.
    sizes, factor = setup.sizes, setup.sizes.factor
    height, width = (side * factor for side in pictures.shape[-2:])
    pictures = pad(pictures, sizes.whole(height) // factor, sizes.whole(width) // factor)
    if not text:
        return Task(ImageConcat(pictures)), (height, width)
    levels = without_weights(setup.config.model.params.get("low_scale_config")).max_noise_level
    if args.noise_level >= levels:
        raise BadInput(f"--noise_level: expected 0..{levels - 1} for this model; got {args.noise_level}")
    return Task(LowResolution(pictures, args.noise_level, args.negative_prompt)), (height, width)


# Maps of labels


def label_task(setup: Setup, maps: Mapping[str, Tensor]) -> tuple[Task, Size]:
    """Maps of labels by name, each (H, W), as pictures of their size."""
    import torch

    from ldm.io.images import pad
    from ldm.sampling.conditions import SemanticMap
    from ldm.sampling.engine import Task

    labels = label_count(setup)
    for name, labelled in maps.items():
        if labelled.max() >= labels:
            raise BadInput(f"--maps: {name} has a label {labelled.max()}; this model's are 0..{labels - 1}")
    # What the model can't make is filled up with the edge, and cut off in the end.
    batch = torch.stack(list(maps.values()))  # (N, H, W)
    height, width = batch.shape[-2:]
    whole = pad(batch[:, None].float(), *map(setup.sizes.whole, (height, width)))[:, 0].long()
    return Task(SemanticMap(whole)), (height, width)


def label_count(setup: Setup) -> int:
    """How many labels the config's model knows; found out without its weights."""
    from ldm.modules.encoders.modules import SpatialRescaler

    rescaler = conditioner(setup)
    if not isinstance(rescaler, SpatialRescaler) or rescaler.channel_mapper is None:
        raise BadInput(f"--config: not a semantic synthesis model: its conditioner is {type(rescaler).__name__}")
    return rescaler.channel_mapper.in_channels


# Layout


def layout_task(setup: Setup, layouts: Sequence[Any], names: Names) -> tuple[list[dict[str, Any]], Task]:
    """The subjects of lists of boxes, one list for each picture, see `read_box`; their task."""
    import torch

    from ldm.modules.encoders.boxes import box_tokens
    from ldm.sampling.conditions import Layout
    from ldm.sampling.engine import Task

    ids, length = vocabulary(setup)
    subjects, tokens = [], []
    for p, layout in enumerate(layouts, start=1):
        if not isinstance(layout, list) or not layout:
            raise BadInput(f"--boxes: picture {p}: expected a list of boxes; got {shown(layout)}")
        boxes = []
        for b, entry in enumerate(layout, start=1):
            with blame(f"--boxes: picture {p}, box {b}"):
                boxes.append(read_box(entry, names, ids - 1))  # the last id stands for no box
        with blame(f"--boxes: picture {p}"):
            tokens.append(box_tokens(boxes, (length - 2) // 3, ids))  # three a box, and the crop's two
        subjects.append({"boxes": [[b.category, b.x, b.y, b.width, b.height] for b in boxes]})
    return subjects, Task(Layout(torch.stack(tokens)))


def vocabulary(setup: Setup) -> tuple[int, int]:
    """How many token ids the config's model knows, and how many tokens it takes; found out without its weights."""
    from ldm.sampling.conditions import Layout

    key = setup.config.model.params.get("cond_stage_key")
    if key != Layout.stage_key:
        raise BadInput(f"--config: not {Layout.kind}: its cond_stage_key is {key!r}, expected {Layout.stage_key!r}")
    transformer = conditioner(setup).transformer
    return transformer.num_tokens, transformer.max_seq_len


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
