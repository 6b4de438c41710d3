"""What a controlled run is given: control images, made of images or as files, and control networks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from PIL import Image

from ldm.checkpoint import CheckpointError, fingerprint
from ldm.checkpoint.control import control_file, load_control
from ldm.checkpoint.detectors import load_hed, load_midas
from ldm.cli.arguments import EMOJI64, EMOJI64_EDGES
from ldm.cli.pipeline import SINGLE, MethodRun
from ldm.cli.setup import CONSTRUCTION, Setup, fault_of_file, image_size
from ldm.cli.tasks import TextSettings, file_reference, image_items, text_items
from ldm.data import conditions
from ldm.data.captions import captions_of_all
from ldm.io.errors import SettingError, did_you_mean, fault_of
from ldm.io.files import json_sha256, same_place
from ldm.io.images import files_below, fit, open_image, opened
from ldm.modules.diffusionmodules.controlnet import ControlNet
from ldm.sampling.control import ControlInput, ControlledBy, Hints
from ldm.sampling.generate import Item

KINDS = ("edges", "scribble", "depth")  # of control images that are made of an image
LONGEST = 8  # times the short side, the long side of an image whose shape results take
LATELY = 64  # control images that are kept, of each control
Size = tuple[int, int]  # height and width, in pixels


@dataclass(frozen=True)
class ControlSettings:
    """See `scripts/controlnet.py`.

    control: what each control network follows: one of KINDS, or a file.
    control_model, control_weight: files of the networks, and how much each counts; none = those that ship, 1 each.
    image: that the control images are made of, or a folder with a captioned image for each prompt; None = all are files
    hed, midas: weights of the networks that make scribbles and depth.
    canny: low and high threshold of the gradient.
    guess: see `ControlledBy`.
    control_at: "key" = at key timesteps, "every" = at every step.
    """

    control: Sequence[str] = ()
    control_model: Sequence[str] = ()
    control_weight: Sequence[float] = ()
    image: str | Path | None = None
    hed: str | None = None
    midas: str | None = None
    canny: tuple[float, float] = conditions.THRESHOLDS
    guess: bool = False
    control_at: str = "key"


def check_control(settings: ControlSettings) -> None:
    """Raise SettingError unless each control has its network, its weight, and what its control image is made of."""
    if (count := len(settings.control)) == 0:
        raise SettingError("control", "needed: what the images are to follow")
    for name, given in (("control_model", settings.control_model), ("control_weight", settings.control_weight)):
        if len(given) not in (0, count):
            raise SettingError(name, f"expected one for each control, {count}; got {len(given)}")
    for kind in settings.control:
        check_kind(kind)
    made = [kind for kind in settings.control if kind in KINDS]
    if made and settings.image is None:
        raise SettingError("image", f"needed for control {made[0]}: the image that it is made of")
    if not made and settings.image is not None:
        raise SettingError("image", f"only for control {', '.join(KINDS)}; the control images given are files")
    for kind, name, what in (("scribble", "hed", "HED"), ("depth", "midas", "MiDaS")):
        if kind in made and getattr(settings, name) is None:
            raise SettingError(name, f"needed for control {kind}: the weights of {what}")
    if settings.canny[0] > settings.canny[1]:
        raise SettingError("canny", f"expected LOW <= HIGH; got {settings.canny[0]:g},{settings.canny[1]:g}")


def check_kind(control: str) -> None:
    """Raise SettingError unless it is one of KINDS or a file that is there."""
    with fault_of("control", (OSError,)):  # a name that no file can have
        if control not in KINDS and not Path(control).exists():
            raise SettingError(
                "control",
                f"expected {', '.join(KINDS)} or the file of a control image; got {control}"
                f"{did_you_mean(control, KINDS)}",
            )


@dataclass(frozen=True)
class Source:
    """What control images are made of.

    files: of one image for all results, or of one for each prompt.
    facts: what identifies them, as JSON values.
    subjects: of a folder the caption of each image, which is its prompt, and what identifies the image; none = a file.
    """

    files: Sequence[Path]
    facts: dict[str, Any]
    subjects: Sequence[dict[str, str]] = ()

    def image(self, place: int) -> Image.Image:
        """The image there. Raises SettingError: it can't be read."""
        with fault_of("image"):
            return open_image(self.files[place])


def read_source(path: str | Path | None) -> Source | None:
    """The image of a file, or the images of a folder with their captions; None = none is given.

    Raises:
        SettingError: it can't be read, or an image in the folder has no caption.
    """
    with fault_of("image"):
        if path is None:
            return None
        if not Path(path).is_dir():
            open_image(path)
            return Source([Path(path)], file_reference(path, "image"))
        files = files_below(Path(path))
        for file in files:
            open_image(file)  # damaged ones are found out before anything slow; none is kept
        captions = captions_of_all(Path(path), files)
        subjects = [
            {"prompt": first} | file_reference(file, "image") for file, (first, *_) in zip(files, captions, strict=True)
        ]
        facts = {"image": Path(path).name, "image_sha256": json_sha256(subjects)[:16]}
        return Source(files, facts, subjects)


def controlled_items(source: Source | None, text: TextSettings, shown: Sequence[str]) -> list[Item]:
    """The images to make: of each prompt, or of each image of a folder.

    Raises:
        SettingError: see `text_items`; or there are prompts beside a folder's captions.
    """
    if source is None or not source.subjects:
        return text_items(text, shown)
    for name, given in (("prompt", text.prompt), ("from_file", text.from_file), ("repeat", text.repeat > 1)):
        if given:
            raise SettingError(
                name, "not with a folder as {image}: each of its images has one prompt, its caption", "image"
            )
    return image_items(
        source.subjects, text.n_iter, text.seed, text.seed_by_position, share_start=1 if text.fixed_code else None
    )


def result_size(setup: Setup, source: Source | None, height: int | None, width: int | None) -> Size:
    """Height and width of the results: as given, or the shape of the (first) image near the model's training size.

    Raises:
        SettingError: see `image_size`; or the image is so narrow that its shape is not meant for the results.
    """
    if source is None or (height and width):
        return image_size(setup.sizes, height, width)
    given = source.image(0).size
    usual = conditions.usual_size(given, setup.sizes.default, setup.sizes.multiple)
    if max(given) > LONGEST * min(given):
        raise SettingError(
            "image",
            f"{given[0]} x {given[1]} pixels, from which the results would have {usual[0]} x {usual[1]}; a side of "
            f"more than {LONGEST} times the other needs {{H}} and {{W}}",
            "H",
            "W",
        )
    return image_size(setup.sizes, height, width, usual[::-1])


def controlled(setup: Setup, settings: ControlSettings, source: Source | None, size: Size) -> ControlledBy:
    """The model's network with its control networks, each with its control images.

    Raises:
        SettingError: a file can't be read, a control image has another size, or a network is for another model.
    """
    images: list[tuple[Hints, dict[str, Any]]] = []  # of each control, and what identifies them
    for kind in settings.control:
        if kind in KINDS:
            images.append((Drawn(setup, settings, kind, source, size), made_of(settings, kind, source)))
        else:
            given, reference = given_image(kind, size)
            images.append((hints([given]), reference))
    weights = settings.control_weight or [1.0] * len(images)
    loaded = [network(setup, file) for file in settings.control_model or shipped(setup, settings.control)]
    followed = [
        ControlInput(one, given, weight, {"control": facts} | {"control_model": name})
        for (given, facts), (one, name), weight in zip(images, loaded, weights, strict=True)
    ]
    return ControlledBy(followed, settings.guess, settings.control_at == "every")


class Drawn:
    """Control images of one of KINDS, each made of its image when it is asked for; see `Hints`.

    The last LATELY are kept, since methods that are compared take turns, a batch each.

    Args:
        setup, settings, source, size: see `controlled`.
        kind: one of KINDS.

    Raises:
        SettingError: what makes such control images can't be read.
    """

    def __init__(self, setup: Setup, settings: ControlSettings, kind: str, source: Source, size: Size):
        self._count = len(source.files)
        self._made = lru_cache(LATELY)(lambda place: drawn(settings, kind, fitted(setup, source.image(place), size)))
        self._made(0)  # what is wrong is found out before anything slow; a single image is not read again

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, places: Sequence[int]) -> torch.Tensor:
        return hints([self._made(place) for place in places])


def fitted(setup: Setup, image: Image.Image, size: Size) -> Image.Image:
    """The image in the size of the results, resized as published where that gives this size."""
    if conditions.usual_size(image.size, setup.sizes.default, setup.sizes.multiple)[::-1] == size:
        return conditions.resized(image, setup.sizes.default, setup.sizes.multiple)
    return fit(image, *size)


def shipped(setup: Setup, kinds: Sequence[str]) -> list[Path]:
    """The control networks that ship: of edges, for the model that ships. Raises SettingError: others are asked for."""
    if not same_place(setup.ckpt, EMOJI64[1]) or {*kinds} != {"edges"}:
        raise SettingError("control_model", "needed, one for each control; only that of emoji64's edges ships")
    return [EMOJI64_EDGES] * len(kinds)


def hints(images: Sequence[Image.Image]) -> torch.Tensor:
    """Control images as control networks read them, (N, 3, H, W)."""
    return torch.stack([conditions.as_hint(image) for image in images])


def edges_followed(network: ControlledBy, runs: Sequence[MethodRun]) -> list[str]:
    """For each method, how well its images follow the edges that they were given; nothing if they were given none."""
    lines = []
    for one in network.inputs:
        if one.facts["control"].get("kind") == "edges":
            canny = one.facts["control"]["canny"]
            for run in runs:
                scores = [
                    conditions.edge_scores(one.of([prompt])[0, 0].numpy(), conditions.edges(image, *canny))
                    for prompt, image in run.each()
                ]
                label = "images" if run.label == SINGLE else run.label
                lines.append(f"{label}: edges followed, within a pixel: {in_words(np.array(scores))}")
    return lines


def in_words(scores: np.ndarray) -> str:
    """The means of `edge_scores` of images, (N, 3), with the 95 % interval of several F-scores."""
    precision, recall, both = scores.mean(0)
    interval = ""
    if len(scores) > 1:
        margin = 1.96 * scores[:, 2].std(ddof=1) / len(scores) ** 0.5
        interval = f" (95 % interval {both - margin:.3f} to {both + margin:.3f})"
    return f"F-score {both:.3f}{interval}, precision {precision:.3f}, recall {recall:.3f}"


def controlled_frames(setup: Setup, files: Sequence[str], model: str, size: Size) -> ControlledBy:
    """The model's network with a control network that follows a control image of its own for each frame.

    Raises:
        SettingError: see `controlled`.
    """
    images = [given_image(file, size) for file in files]
    loaded, name = network(setup, model)
    facts = {"control": [reference for _, reference in images], "control_model": name}
    return ControlledBy([ControlInput(loaded, hints([shown for shown, _ in images]), 1.0, facts)])


def network(setup: Setup, file: str | Path) -> tuple[ControlNet, str]:
    """A control network on the run's device, and what identifies it: the hash of its file."""
    unet = OmegaConf.to_container(setup.config.model.params.unet_config.params)
    with fault_of("control_model", CONSTRUCTION), fault_of_file("control_model", [file]):
        loaded = load_control(file, unet, setup.device)
        if loaded.reduction != setup.sizes.factor:
            raise ValueError(
                f"{file}: a control network for another base model: it reduces its control image {loaded.reduction} "
                f"times, this model's latents are {setup.sizes.factor} times smaller than the image"
            )
        return loaded, fingerprint(control_file(file))[:16]


def drawn(settings: ControlSettings, kind: str, image: Image.Image) -> Image.Image:
    """The control image of one of KINDS that is made of an image."""
    makers: dict[str, Callable[[], Image.Image]] = {
        "edges": lambda: conditions.edges(image, *settings.canny),
        "scribble": lambda: conditions.scribble(conditions.soft_edges(image, detector("hed", settings.hed))),
        "depth": lambda: conditions.depth(image, detector("midas", settings.midas)),
    }
    return makers[kind]()


def made_of(settings: ControlSettings, kind: str, source: Source) -> dict[str, Any]:
    """What identifies control images of one of KINDS, as JSON values: images, and what finds edges or depth in them."""
    facts = {"kind": kind} | source.facts
    if kind == "edges":
        return facts | {"canny": [*settings.canny]}
    name = "hed" if kind == "scribble" else "midas"
    return facts | file_reference(getattr(settings, name), name)


def given_image(file: str, size: Size) -> tuple[Image.Image, dict[str, str]]:
    """A control image from a file, and what identifies it, as JSON values."""
    with fault_of("control"):
        with opened(file) as header:
            mode, clear = header.mode, header.has_transparency_data
        if clear:
            raise ValueError(f"{file}: an image of mode {mode} with transparent parts; expected RGB or grey")
        shown = open_image(file)
        if (shown.height, shown.width) != size:
            raise ValueError(
                f"{file}: {shown.width} x {shown.height} pixels; expected {size[1]} x {size[0]}, the size of the "
                f"results (see H and W)"
            )
        return shown, file_reference(file, "picture")


@cache
def detector(setting: str, path: str) -> torch.nn.Module:
    """The network that makes control images: HED or MiDaS."""
    with fault_of(setting, (CheckpointError, *CONSTRUCTION)):
        return (load_hed if setting == "hed" else load_midas)(path)
