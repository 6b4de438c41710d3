"""What a run under control is given: pictures to follow, made of an image or as files, and control networks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from PIL import Image

from ldm.checkpoint import CheckpointError, fingerprint
from ldm.checkpoint.control import control_file, load_control
from ldm.checkpoint.detectors import load_hed, load_midas
from ldm.cli.pipeline import MethodRun
from ldm.cli.setup import CONSTRUCTION, Setup, image_size
from ldm.cli.tasks import file_reference
from ldm.data import conditions
from ldm.io.errors import SettingError, did_you_mean, fault_of
from ldm.io.images import fit, open_image, opened
from ldm.modules.diffusionmodules.controlnet import ControlNet
from ldm.sampling.control import ControlledBy, Picture

KINDS = ("edges", "scribble", "depth")  # of pictures that are made of an image
Size = tuple[int, int]  # height and width, in pixels


@dataclass(frozen=True)
class ControlSettings:
    """See `scripts/controlnet.py`.

    control: what each control network follows: one of KINDS, or a file.
    control_model, control_weight: files of the networks, and how much each counts; no weights = 1 each.
    image: that the pictures are made of; None = they are all files.
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
    """Raise SettingError unless each control has its network, its weight, and what its picture is made of."""
    if (count := len(settings.control)) == 0:
        raise SettingError("control", "needed: what the images are to follow")
    for name, given in (("control_model", settings.control_model), ("control_weight", settings.control_weight)):
        if len(given) != count and (given or name == "control_model"):
            raise SettingError(name, f"expected one for each control, {count}; got {len(given)}")
    made = [kind for kind in settings.control if kind in KINDS]
    if made and settings.image is None:
        raise SettingError("image", f"needed for control {made[0]}: the image that it is made of")
    if not made and settings.image is not None:
        raise SettingError("image", f"only for control {', '.join(KINDS)}; the pictures given are files")
    for kind, name, what in (("scribble", "hed", "HED"), ("depth", "midas", "MiDaS")):
        if kind in made and getattr(settings, name) is None:
            raise SettingError(name, f"needed for control {kind}: the weights of {what}")
    if settings.canny[0] > settings.canny[1]:
        raise SettingError("canny", f"expected LOW <= HIGH; got {settings.canny[0]:g},{settings.canny[1]:g}")


def read_image(settings: ControlSettings) -> Image.Image | None:
    """The image that pictures are made of."""
    with fault_of("image"):
        return None if settings.image is None else open_image(settings.image)


def result_size(setup: Setup, image: Image.Image | None, height: int | None, width: int | None) -> Size:
    """Of the images to be made: as given, or the image's shape near the size of the model's training, as published."""
    if image is None or (height and width):
        return image_size(setup.sizes, height, width)
    usual = conditions.resized(image, setup.sizes.default, setup.sizes.multiple)
    return image_size(setup.sizes, height, width, (usual.height, usual.width))


def controlled(setup: Setup, settings: ControlSettings, image: Image.Image | None, size: Size) -> ControlledBy:
    """The model's network with its control networks, each with its picture.

    Raises:
        SettingError: a file can't be read, a picture has another size, or a network is for another model.
    """
    if image is not None:
        usual = conditions.resized(image, setup.sizes.default, setup.sizes.multiple)
        image = usual if (usual.height, usual.width) == size else fit(image, *size)
    pictures = [picture(settings, kind, image, size) for kind in settings.control]
    weights = settings.control_weight or [1.0] * len(pictures)
    loaded = [network(setup, file) for file in settings.control_model]
    followed = [
        Picture(one, conditions.as_hint(shown)[None], weight, {"control": facts} | {"control_model": name})
        for (shown, facts), (one, name), weight in zip(pictures, loaded, weights, strict=True)
    ]
    return ControlledBy(followed, settings.guess, settings.control_at == "every")


def edges_followed(network: ControlledBy, runs: Sequence[MethodRun]) -> list[str]:
    """For each method, how well its images follow the edges that they were given; nothing if they were given none."""
    lines = []
    for followed in network.pictures:
        if followed.facts["control"].get("kind") == "edges":
            low, high = followed.facts["control"]["canny"]
            given = followed.hints[0, 0].numpy()
            for run in runs:
                scores = [conditions.edge_scores(given, conditions.edges(image, low, high)) for image in run.images]
                precision, recall, both = (sum(part) / len(scores) for part in zip(*scores, strict=True))
                lines.append(
                    f"{run.label}: edges followed, within a pixel: F-score {both:.2f}, precision {precision:.2f}, "
                    f"recall {recall:.2f}"
                )
    return lines


def controlled_frames(setup: Setup, files: Sequence[str], model: str, size: Size) -> ControlledBy:
    """The model's network with a control network that follows a picture of its own for each frame.

    Raises:
        SettingError: see `controlled`.
    """
    pictures = [given_picture(file, size) for file in files]
    loaded, name = network(setup, model)
    hints = torch.stack([conditions.as_hint(shown) for shown, _ in pictures])  # (F, 3, H, W)
    facts = {"control": [reference for _, reference in pictures], "control_model": name}
    return ControlledBy([Picture(loaded, hints, 1.0, facts)])


def network(setup: Setup, file: str) -> tuple[ControlNet, str]:
    """A control network on the run's device, and what tells it: the hash of its file."""
    unet = OmegaConf.to_container(setup.config.model.params.unet_config.params)
    with fault_of("control_model", (CheckpointError, *CONSTRUCTION)):
        loaded = load_control(file, unet, setup.device)
        if loaded.reduction != setup.sizes.factor:
            raise ValueError(
                f"{file}: a control network for another base model: it reduces its picture {loaded.reduction} times, "
                f"this model's latents are {setup.sizes.factor} times smaller than the image"
            )
        return loaded, fingerprint(control_file(file))[:16]


def picture(settings: ControlSettings, kind: str, image: Image.Image | None, size: Size) -> tuple[Image.Image, Any]:
    """What one control network follows, and what tells it, as JSON values."""
    return (drawn(settings, kind, image), made_of(settings, kind)) if kind in KINDS else given_picture(kind, size)


def drawn(settings: ControlSettings, kind: str, image: Image.Image) -> Image.Image:
    """The picture of one of KINDS that is made of an image."""
    makers: dict[str, Callable[[], Image.Image]] = {
        "edges": lambda: conditions.edges(image, *settings.canny),
        "scribble": lambda: conditions.scribble(conditions.soft_edges(image, detector("hed", settings.hed))),
        "depth": lambda: conditions.depth(image, detector("midas", settings.midas)),
    }
    return makers[kind]()


def made_of(settings: ControlSettings, kind: str) -> dict[str, Any]:
    """What tells a picture of one of KINDS, as JSON values: the image, and what finds the edges or the depth in it."""
    facts = {"kind": kind} | file_reference(settings.image, "image")
    if kind == "edges":
        return facts | {"canny": [*settings.canny]}
    name = "hed" if kind == "scribble" else "midas"
    return facts | file_reference(getattr(settings, name), name)


def given_picture(file: str, size: Size) -> tuple[Image.Image, dict[str, str]]:
    """A picture as it is, and what tells it, as JSON values."""
    with fault_of("control"):
        if not Path(file).exists():
            raise ValueError(
                f"expected {', '.join(KINDS)} or the file of a picture; got {file}{did_you_mean(file, KINDS)}"
            )
        with opened(file) as header:
            mode, clear = header.mode, header.has_transparency_data
        if clear:
            raise ValueError(f"{file}: a picture of mode {mode} with transparent parts; expected RGB or grey")
        shown = open_image(file)
        if (shown.height, shown.width) != size:
            raise ValueError(
                f"{file}: {shown.width} x {shown.height} pixels; expected {size[1]} x {size[0]}, the size of the "
                f"results (see H and W)"
            )
        return shown, file_reference(file, "picture")


@cache
def detector(setting: str, path: str) -> torch.nn.Module:
    """The network that makes a picture."""
    with fault_of(setting, (CheckpointError, *CONSTRUCTION)):
        return (load_hed if setting == "hed" else load_midas)(path)
