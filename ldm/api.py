"""Pictures from Python, as the sampling scripts make them: the same settings give the same pictures.

What each kind of model takes is in KINDS; a kind's arguments, their defaults and what they accept are those of its
script, under the same names (docs/scripts.md).
"""

from __future__ import annotations

import argparse
import hashlib
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Number
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ldm.checkpoint.published import load_manifest
from ldm.cli.arguments import (
    EMOJI64,
    Files,
    class_names_argument,
    count_arguments,
    negative_argument,
    noise_level_argument,
    propagation_arguments,
    sampling_arguments,
    size_arguments,
    strength_argument,
    uncond_class_argument,
)
from ldm.cli.devices import find_device
from ldm.cli.inputs import given_names, image_items, in_size, named, stacked
from ldm.cli.model_files import model_files
from ldm.cli.parser import Parser, Version
from ldm.cli.run import check_amount, check_guidance, check_network, what_is_cut
from ldm.cli.settings import count_nodes, make_plan, make_recipe, run_facts, uses_autocast, with_batches
from ldm.cli.setup import Setup, picture_size, read_setup
from ldm.cli.tasks import (
    class_task,
    depth_task,
    inpainting_task,
    label_task,
    layout_task,
    settle_upscaling,
    upscaling_task,
)
from ldm.io.errors import BadInput
from ldm.io.images import from_pil, open_image, open_labels, open_mask, to_pil
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.sampling.conditions import Condition, Layout, Text
from ldm.sampling.engine import Engine, Task
from ldm.sampling.generate import Item
from ldm.sampling.start import ImageStart, Start
from ldm.util import PROJECT_ROOT, find_file

PictureLike = Image.Image | str | Path
WEIGHTS = ("model.safetensors", "model.ckpt", "last.ckpt")
BATCH = 4  # pictures at a time


class Model:
    """A model with its settings; `ldm.load` makes it.

    Attributes:
        network: the `LatentDiffusion`. On a CPU its UNet's layers are packed for the size of the first pictures, see
            `ldm.modules.packed`; for pictures of another size it is loaded anew.
        config: the YAML as an OmegaConf mapping.
        sizes: what pictures it makes.
        kind: "text", "classes", ... the key of `KINDS`.
    """

    def __init__(self, setup: Setup, weights: str = "auto", precision: str | None = None):
        self.kind = kind_of(setup.config.model)
        self.setup, self.config, self.sizes = setup, setup.config, setup.sizes
        self.weights, self.precision = weights, precision
        self.network: LatentDiffusion = setup.load(weights)
        self._packed_for: tuple[int, ...] | None = None

    def __repr__(self) -> str:
        return f"<ldm model {self.setup.ckpt} ({self.kind}) on {self.setup.device}>"

    def images(
        self,
        subjects: Any = None,
        *,
        image: PictureLike | Sequence[PictureLike] | None = None,
        mask: PictureLike | Sequence[PictureLike] | None = None,
        samples: int = 1,
        seed: int = 42,
        batch_size: int = BATCH,
        **settings: Any,
    ) -> list[Image.Image]:
        """Pictures, `samples` of each subject.

        Args:
            subjects: what is pictured, by the kind of model: prompts; classes (numbers or names); lists of boxes; maps
                of labels; None for a model that is told nothing, or only pictures.
            image: the picture to begin with, to paint in, or to enlarge; a PIL image or a file.
            mask: what to paint of it: white is painted, black stays to the pixel.
            samples: pictures of each subject.
            seed: fixes each picture's noise, together with what is pictured and the number of its sample.
            batch_size: pictures at a time.
            settings: arguments of the kind's script under the same names: plan, steps, sampler, eta, scale, parallel,
                propagate, noise_weight, H, W, strength, ...

        Returns:
            RGB pictures: those of the first subject, then those of the second, ...

        Raises:
            TypeError: an argument that this kind of model does not take.
            ValueError: a value that is not accepted.
            FileNotFoundError: a file that is not there.
        """
        return self.run(
            subjects, image=image, mask=mask, samples=samples, seed=seed, batch_size=batch_size, **settings
        ).images()

    def run(
        self,
        subjects: Any = None,
        *,
        image: PictureLike | Sequence[PictureLike] | None = None,
        mask: PictureLike | Sequence[PictureLike] | None = None,
        samples: int = 1,
        seed: int = 42,
        batch_size: int = BATCH,
        **settings: Any,
    ) -> Run:
        """What `images` would make, before it is made; arguments and errors as there."""
        with python_errors():
            args = parsed(KINDS[self.kind], {"n_samples": samples, "seed": seed, "batch_size": batch_size, **settings})
            args.precision = self.precision
            with tempfile.TemporaryDirectory() as folder:
                given = Given(subjects, files(image, Path(folder)), files(mask, Path(folder)))
                pictured, task, size = KINDS[self.kind].make(given, args, self.setup)
            items = image_items(args, pictured)
            check_amount(args, len(items), size, args.batch_size)
            args.batch_size = min(args.batch_size, len(items))
            engine = self._engine(args, task, size)
            if cut := what_is_cut(items, task, self.network):
                warnings.warn(cut, stacklevel=3)
            return Run(engine, items, args.batch_size)

    def _engine(self, args: argparse.Namespace, task: Task, size: tuple[int, int]) -> Engine:
        setup = self.setup
        recipe = make_recipe(args, size, setup)
        check_guidance(recipe, task)
        nodes = count_nodes(recipe, setup, task.start.strength)
        plan = make_plan(args, nodes, run_facts(setup, recipe.sampler))
        latents = tuple(self.sizes.whole(side) for side in size)
        if self._packed_for not in (None, latents):
            self.network, self._packed_for = setup.load(self.weights), None
        check_network(self.network, recipe, plan)
        engine = Engine(self.network, self.sizes, recipe, plan, task, autocast=uses_autocast(args, setup.device))
        if self._packed_for is None:
            engine.pack()
            self._packed_for = latents
        if not plan.plain and plan.parallel > 1:
            engine.plan = with_batches(engine, args.parallel, args.batch_size, setup)
        return engine


@dataclass(frozen=True)
class Run:
    """Pictures that are to be made.

    engine: how; its `plain_run` gives the denoiser, the solver and the starting latents of some items.
    items: what, one for each picture.
    batch: pictures at a time.
    """

    engine: Engine
    items: list[Item]
    batch: int

    def images(self) -> list[Image.Image]:
        with python_errors():
            return [
                image
                for first in range(0, len(self.items), self.batch)
                for image in self._batch(self.items[first : first + self.batch])
            ]

    def _batch(self, items: Sequence[Item]) -> list[Image.Image]:
        pictures = self.engine.decode(self.engine.latents(items))
        return to_pil(self.engine.task.start.finish(pictures, items))


# Which model


def load_by_name(
    name: str | Path | None,
    config: str | Path | None,
    ckpt: str | Path | None,
    device: str | torch.device,
    weights: str,
    precision: str | None,
) -> Model:
    """See `ldm.load`."""
    files = [Path(path) for path in (config, ckpt) if path is not None]
    if (name is None) == (not files):
        raise ValueError(f"give a model's name, or config and ckpt; got name {name}, config {config}, ckpt {ckpt}")
    for argument, value, accepted in (
        ("weights", weights, ("auto", "ema", "raw")),
        ("precision", precision, (None, "full", "autocast")),
    ):
        if value not in accepted:
            raise ValueError(f"{argument} must be one of {', '.join(map(str, accepted))}; got {value!r}")
    with python_errors():
        for path in files:
            if not path.exists():
                raise FileNotFoundError(f"{path}: no such file")
        given = argparse.Namespace(config=config, ckpt=ckpt)
        config_path, weights_path = model_files(given, None) if name is None else named_files(str(name))
        return Model(read_setup(config_path, weights_path, find_device(str(device))), weights, precision)


def named_files(name: str) -> Files:
    """Config and weights of a model that is named, or whose folder is.

    Raises:
        ValueError: there is no such model.
        FileNotFoundError: its weights are not here.
    """
    published = load_manifest()
    if name in published:
        entry = published[name]
        try:
            return PROJECT_ROOT / entry.config, find_file(entry.path)
        except FileNotFoundError:
            raise FileNotFoundError(
                f"{name}: its weights are not here, neither from {Path.cwd()} nor from {PROJECT_ROOT}; get them by "
                f"scripts/download_models.py {name}, or put {entry.urls[0]} at {entry.path}"
            ) from None
    folders = [
        place for place in (PROJECT_ROOT / "models" / "ldm" / name, Path(name)) if (place / "config.yaml").is_file()
    ]
    if not folders:
        raise ValueError(
            f"there is no model {name!r}; accepted: {EMOJI64[1].parent.name}, {', '.join(published)}, a "
            f"folder with config.yaml and weights, or config and ckpt"
        )
    found = [folders[0] / file for file in WEIGHTS if (folders[0] / file).is_file()]
    if not found:
        raise FileNotFoundError(f"{folders[0]} has a config.yaml but no weights; expected {' or '.join(WEIGHTS)}")
    return folders[0] / "config.yaml", found[0]


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
        "LatentUpscaleDiffusion": "upscaling",
    }
    if target in by_class:
        return by_class[target]
    if stage == "__is_unconditional__":
        return "nothing"
    if params.get("cond_stage_key") == Layout.stage_key:
        return "boxes"
    conditioner = "" if isinstance(stage, str) else name_of(stage.target)
    if conditioner in ("ClassEmbedder", "SpatialRescaler"):
        return "classes" if conditioner == "ClassEmbedder" else "labels"
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
    """A picture that was given, as a file; `remembered(role)` is how the item remembers it."""

    path: Path
    digest: str | None  # of its pixels, if it was given as an image

    def remembered(self, role: str) -> dict[str, str]:
        return named(self.path, role) if self.digest is None else {role: "image", f"{role}_sha256": self.digest}


@dataclass(frozen=True)
class Given:
    """The arguments that say what is pictured, as they were given; pictures as files."""

    subjects: Any
    images: list[File]
    masks: list[File]

    def prompts(self, count: int | None = None) -> list[str]:
        """The prompts; where a count is given, one for all or one for each."""
        prompts = [self.subjects] if isinstance(self.subjects, str) else list(self.subjects or ())
        if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
            raise ValueError(f"subjects must be one or more prompts for this model; got {self.subjects!r}")
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

    def image(self) -> File:
        if len(self.images) != 1:
            raise ValueError(f"image must be one picture here; got {len(self.images)}")
        return self.images[0]

    def pictures(self) -> torch.Tensor:
        """(N, 3, H, W) in [-1, 1]."""
        if not self.images:
            raise ValueError("image: needed by this model")
        return stacked({str(i): from_pil(open_image(file.path)) for i, file in enumerate(self.images)})

    def framed(self) -> tuple[list[dict[str, str]], torch.Tensor, torch.Tensor]:
        """Pictures with their masks, (N, 3, H, W) and (N, 1, H, W), and how they are remembered."""
        pictures = self.pictures()
        if len(self.masks) != len(self.images):
            raise ValueError(f"mask: expected one for each image, {len(self.images)}; got {len(self.masks)}")
        masks = stacked({str(i): open_mask(file.path) for i, file in enumerate(self.masks)})
        if masks.shape[-2:] != pictures.shape[-2:]:
            raise ValueError(
                f"mask must be as large as the image, {tuple(pictures.shape[-2:])}; got {tuple(masks.shape[-2:])}"
            )
        subjects = [
            image.remembered("image") | mask.remembered("mask")
            for image, mask in zip(self.images, self.masks, strict=True)
        ]
        return subjects, pictures, masks


def files(pictures: PictureLike | Sequence[PictureLike] | None, folder: Path) -> list[File]:
    """What was given as files; images are written into the folder, so that all are read in the same way."""
    if pictures is None:
        return []
    return [as_file(picture, folder) for picture in (pictures if isinstance(pictures, list | tuple) else [pictures])]


def as_file(picture: PictureLike, folder: Path) -> File:
    if isinstance(picture, str | Path):
        return File(Path(picture), None)
    if not isinstance(picture, Image.Image):
        raise TypeError(f"expected a PIL image or the path of a file; got a {type(picture).__name__}")
    content = repr((picture.mode, picture.size)).encode() + picture.tobytes()
    digest = hashlib.sha256(content).hexdigest()[:16]
    path = folder / f"{digest}.png"
    try:
        picture.save(path)
    except OSError as error:
        raise ValueError(f"a picture of mode {picture.mode}: {error}") from error
    return File(path, digest)


# The kinds of models: which arguments they take, and what they picture

Pictured = tuple[list[dict[str, Any]], Task, tuple[int, int]]  # subjects, task, height and width


@dataclass(frozen=True)
class Kind:
    """arguments: adds the kind's own to a parser. make: what a call pictures."""

    arguments: Callable[[Parser], object]
    make: Callable[[Given, argparse.Namespace, Setup], Pictured]


def text(given: Given, args: argparse.Namespace, setup: Setup) -> Pictured:
    given.only(subjects=True, images=True, masks=True)
    if given.masks:
        if args.strength is not None:
            raise ValueError("strength does not go with mask: what is masked is made anew")
        return text_inpainting(given, args, setup)
    prompts = [{"prompt": prompt} for prompt in given.prompts()]
    if not given.images:
        if args.strength is not None:
            raise ValueError("strength needs an image to begin with")
        return prompts, Task(Text(args.negative_prompt)), picture_size(args, setup.sizes)
    picture = in_size(open_image(given.image().path), args, setup.sizes)
    start = ImageStart(picture, 0.75 if args.strength is None else args.strength)
    return remembering(prompts, given.image()), Task(Text(args.negative_prompt), start), tuple(picture.shape[1:])


def remembering(subjects: list[dict[str, Any]], image: File) -> list[dict[str, Any]]:
    return [subject | image.remembered("init_img") for subject in subjects]


def text_inpainting_arguments(p: Parser) -> None:
    negative_argument(p)
    sampling_arguments(p)
    propagation_arguments(p, compare=False)


def text_arguments(p: Parser) -> None:
    text_inpainting_arguments(p)
    strength_argument(p, None)


def text_inpainting(given: Given, args: argparse.Namespace, setup: Setup) -> Pictured:
    given.only(subjects=True, images=True, masks=True)
    subjects, pictures, masks = given.framed()
    prompts = given.prompts(len(subjects))
    subjects = [subject | {"prompt": prompt} for subject, prompt in zip(subjects, prompts, strict=True)]
    return subjects, inpainting_task(setup, pictures, masks, True, args.negative_prompt), tuple(pictures.shape[-2:])


def unguided_arguments(p: Parser) -> None:
    sampling_arguments(p, guided=False)
    propagation_arguments(p, compare=False)


def inpainting(given: Given, args: argparse.Namespace, setup: Setup) -> Pictured:
    given.only(images=True, masks=True)
    subjects, pictures, masks = given.framed()
    return subjects, inpainting_task(setup, pictures, masks, False), tuple(pictures.shape[-2:])


def depth_arguments(p: Parser) -> None:
    negative_argument(p)
    sampling_arguments(p, scale=9.0)
    propagation_arguments(p, compare=False)
    strength_argument(p, 0.9)


def depth(given: Given, args: argparse.Namespace, setup: Setup) -> Pictured:
    given.only(subjects=True, images=True)
    picture = in_size(open_image(given.image().path), args, setup.sizes)
    subjects = remembering([{"prompt": prompt} for prompt in given.prompts()], given.image())
    return subjects, depth_task(setup, picture, args.strength, args.negative_prompt), tuple(picture.shape[1:])


def upscaling_arguments(p: Parser) -> None:
    negative_argument(p)
    sampling_arguments(p, None, None)
    propagation_arguments(p, compare=False)
    noise_level_argument(p)


def upscaling(given: Given, args: argparse.Namespace, setup: Setup) -> Pictured:
    given.only(subjects=True, images=True)
    pictures = given.pictures()
    args.prompt = given.subjects
    reads_text = settle_upscaling(args, setup)
    task, size = upscaling_task(args, setup, pictures, reads_text)
    subjects = [file.remembered("image") for file in given.images]
    if reads_text:
        prompts = [""] * len(subjects) if given.subjects is None else given.prompts(len(subjects))
        subjects = [subject | {"prompt": prompt} for subject, prompt in zip(subjects, prompts, strict=True)]
    return subjects, task, size


def class_arguments(p: Parser) -> None:
    sampling_arguments(p, 250, scale=1.5)
    propagation_arguments(p, "ldm250", 150.0, "update", compare=False)
    class_names_argument(p)
    uncond_class_argument(p)


def classes(given: Given, args: argparse.Namespace, setup: Setup) -> Pictured:
    given.only(subjects=True)
    subjects, task = class_task(args, setup, [str(one) for one in given.listed("classes")])
    return subjects, task, picture_size(args, setup.sizes)


def nothing_arguments(p: Parser) -> None:
    sampling_arguments(p, 50, eta=1.0, guided=False, eta_flags=("--eta",))
    propagation_arguments(p, compare=False)


def nothing(given: Given, args: argparse.Namespace, setup: Setup) -> Pictured:
    given.only()
    return [{}], Task(Condition(), Start()), picture_size(args, setup.sizes)


def box_arguments(p: Parser) -> None:
    unguided_arguments(p)
    class_names_argument(p)


def boxes(given: Given, args: argparse.Namespace, setup: Setup) -> Pictured:
    given.only(subjects=True)
    subjects, task = layout_task(setup, given.listed("pictures, each a list of boxes"), given_names(args))
    return subjects, task, picture_size(args, setup.sizes)


def labels(given: Given, args: argparse.Namespace, setup: Setup) -> Pictured:
    given.only(subjects=True)
    with tempfile.TemporaryDirectory() as folder:
        maps = files(given.subjects, Path(folder))
        if not maps:
            raise ValueError("subjects must be maps of labels for this model; got none")
        labelled = {str(i): open_labels(file.path) for i, file in enumerate(maps)}
        stacked(labelled)  # of one size
        subjects = [file.remembered("map") for file in maps]
    task, size = label_task(setup, labelled)
    return subjects, task, size


KINDS = {
    "text": Kind(text_arguments, text),
    "inpainting from text": Kind(text_inpainting_arguments, text_inpainting),
    "inpainting": Kind(unguided_arguments, inpainting),
    "depth": Kind(depth_arguments, depth),
    "upscaling": Kind(upscaling_arguments, upscaling),
    "classes": Kind(class_arguments, classes),
    "nothing": Kind(nothing_arguments, nothing),
    "boxes": Kind(box_arguments, boxes),
    "labels": Kind(unguided_arguments, labels),
}


# Arguments


def parsed(kind: Kind, given: dict[str, Any]) -> argparse.Namespace:
    """The values of a kind's arguments, checked as its script checks them; None stands for the default.

    Raises:
        TypeError: an argument that it does not have, or a value of another type.
        BadInput: a value that is not accepted.
    """
    parser = Parser(add_help=False)
    count_arguments(parser, 1, BATCH, "")
    size_arguments(parser)
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
    argv = []
    for name, value in given.items():
        action, flag = actions[name], actions[name].option_strings[0]
        if action.nargs == 0 and not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False; got {value!r}")
        if action.nargs != 0 and (
            isinstance(value, bool) or not isinstance(value, str | Path | Number | list | tuple | None)
        ):
            raise TypeError(f"{name} must be a text, a number, or a list of them; got {value!r}")
        if action.nargs == 0:
            argv += [flag] if value else []
        elif value is not None:
            argv.append(f"{flag}={','.join(map(str, value)) if isinstance(value, (list, tuple)) else value}")
    return parser.parse_args(argv)


@contextmanager
def python_errors() -> Iterator[None]:
    """What command lines say of a flag as a ValueError about the argument; also what stands where a file should."""
    try:
        yield
    except (FileNotFoundError, PermissionError):
        raise
    except OSError as error:  # a device, a folder, a name that no file can have
        raise ValueError(str(error)) from error
    except BadInput as error:

        def argument(match: re.Match) -> str:
            return match[1].replace("-", "_")

        raise ValueError(re.sub(r"--([a-zA-Z][\w-]*)(?:/--?[\w-]+)*", argument, str(error))) from error.__cause__
