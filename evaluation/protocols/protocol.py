"""Protocols: what every method has to make alike, so that their results can be compared.

evaluation/protocols/NAME.yaml has the fields of `Protocol`; `like` names another protocol, of which it has all that it
does not say itself.

`Protocol.asked` is what images of different methods must have in common to be compared. The sampler and its steps
are not in it, since they are what comparisons are about; nor are metrics, since each result names its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, StringConstraints, model_validator, with_config
from typing_extensions import NotRequired, TypedDict

from ldm.cli.arguments import NOISE_ORDERS, ROOT
from ldm.cli.parser import LARGEST_SIDE, MOST, MOST_STEPS
from ldm.cli.settings import Method
from ldm.io.errors import did_you_mean, fault_of, one_line, shown
from ldm.io.files import (
    Number,
    Schema,
    Seed,
    Share,
    Text,
    parse,
    parse_json,
    parse_json_lines,
    read_text,
    read_yaml,
    split_lines,
)

PROTOCOL_DIR = Path(__file__).parent
MOST_CAPTIONS = 1000  # of one image
NOISE = ("noise_below", "noise_order")
CONTROLLED_BY = {"edges": ("control_model",), "scribble": ("control_model", "hed")}  # files that a control needs
ADDED = ("control_model", "hed", "lora", "embedding", "delta", "stage2", "stage3", "t5")

Amount = Annotated[int, Field(ge=1, le=MOST)]
Side = Annotated[int, Field(ge=1, le=LARGEST_SIDE)]
Networks = Annotated[list[Annotated[str, StringConstraints(pattern="^[^/]+/[^/]+$")]], Field(min_length=1)]
Names = Annotated[list[Text], Field(min_length=1)]
Plain = str | bool | int | float
strictly = with_config(ConfigDict(strict=True, extra="forbid"))


@strictly
class Captions(TypedDict):
    kind: Literal["captions"]
    file: Text  # COCO's annotations
    pictures: NotRequired[Text]  # the real images
    where: NotRequired[dict[Text, Plain | list[Plain]]]  # of the images, fields and their value, or list of values


@strictly
class Prompts(TypedDict):
    kind: Literal["prompts"]
    file: Text  # a prompt per line, or JSON lines


@strictly
class Classes(TypedDict):
    kind: Literal["classes"]
    classes: Amount  # how many there are
    file: NotRequired[Text]  # as of captions; here for the real images alone
    pictures: NotRequired[Text]
    where: NotRequired[dict[Text, Plain | list[Plain]]]


@strictly
class Metrics(TypedDict, total=False):
    fid: Networks  # EXTRACTOR/RESIZE
    adm: Networks
    clip_score: Names
    reference: Text  # a file of published statistics


@strictly
class Defaults(TypedDict, total=False):
    config: Text
    ckpt: Text
    data: Text  # a folder
    noise_below: Number
    noise_order: Literal[NOISE_ORDERS]
    control_model: Names  # this and the following: files beside the model's own, `ADDED`
    hed: Names
    lora: Names
    embedding: Names
    delta: Names
    stage2: Names  # of a cascade; its first stage is `ckpt`
    stage3: Names
    t5: Names


Whole = Annotated[int, Field(ge=0, le=MOST_STEPS)]


@strictly
class Cascade(TypedDict):
    """The stages of DeepFloyd-IF: what beside the protocol's guidance they sample with, which is the first stage's."""

    steps: dict[Amount, list[Annotated[int, Field(ge=1, le=MOST_STEPS)]]]  # by their sum, which a method names
    plans: Names  # what the plan faster-diffusion stands for, in each stage
    scales: list[Number]  # guidance scales from stage 2 on
    noise_levels: list[Whole]  # of the smaller images, from stage 2 on


class Select(Schema):
    """Which prompts of the data are taken, see `choose`."""

    count: Amount | None = None  # None = all
    per_image: Annotated[int, Field(ge=1, le=MOST_CAPTIONS)] = 1  # most captions of an image
    captions: Literal["drawn", "first"] = "drawn"  # at random by the seed, or by id
    seed: Seed = 0


class Sampling(Schema):
    """What a method has unless it says otherwise."""

    sampler: Text = "ddim"
    steps: Annotated[int, Field(ge=1, le=MOST_STEPS)] = 50
    eta: Share | None = None  # None = the solver's own


class Protocol(Schema):
    """The content of a protocol file."""

    data: Annotated[Captions | Prompts | Classes, Field(discriminator="kind")]  # where the prompts come from
    size: Side  # height and width in pixels
    guidance: Number  # the guidance scale, 1 = none
    select: Select = Select()
    sampling: Sampling = Sampling()
    repeats: Amount = 1  # images of each prompt
    seed: Seed = 0  # of the images' noise
    control: Literal["edges", "scribble"] | None = None  # a control network reads those of the image with the caption
    # The images of a prompt are the frames of a video: by Text2Video-Zero, or whole, by a network of videos.
    video: bool | Literal["whole"] = False
    cascade: Cascade | None = None  # the images are made in stages
    metrics: Metrics = {}  # the variants that are reported
    defaults: Defaults = {}
    about: str = ""  # what is known of it, and what is our reading
    name: str = ""

    @model_validator(mode="after")
    def _is_consistent(self) -> Protocol:
        kind = self.data["kind"]
        if self.control and kind != "captions":
            raise ValueError(f"control: follows the images of captions; got data of kind {kind}")
        if self.control and self.video == "whole":
            raise ValueError("control: no control network is known for networks of videos; got video whole")
        if self.video and kind == "classes":
            raise ValueError("video: expected data of kind captions or prompts; got classes")
        if self.cascade:
            self._check_cascade()
        for name in CONTROLLED_BY.get(self.control, ()):
            if len(self.defaults.get(name, ())) != 1:
                got = self.defaults.get(name, "none")
                raise ValueError(f"defaults.{name}: control {self.control} needs one file; got {got}")
        return self

    def _check_cascade(self) -> None:
        """Raise ValueError for stages that do not go together, or with the rest."""
        stages, kind = len(self.cascade["plans"]), self.data["kind"]
        if kind == "classes" or self.control or self.video:
            raise ValueError("cascade: made from captions or prompts alone")
        if stages not in (2, 3):
            raise ValueError(f"cascade.plans: expected one for each of 2 or 3 stages; got {stages}")
        for name in ("scales", "noise_levels"):
            if len(self.cascade[name]) != stages - 1:
                raise ValueError(f"cascade.{name}: expected {stages - 1}, from stage 2 on; got {self.cascade[name]}")
        for total, steps in self.cascade["steps"].items():
            if len(steps) != stages or sum(steps) != total:
                raise ValueError(f"cascade.steps: expected {stages} numbers whose sum is {total}; got {steps}")
        files = ("ckpt", *(f"stage{number}" for number in range(2, stages + 1)))
        if missing := [name for name in ("config", *files) if name not in self.defaults]:
            raise ValueError(f"defaults.{missing[0]}: needed by the cascade")

    def method(self, **given: Any) -> Method:
        """A method with these fields of `Method`; those that are None or missing are as the protocol says, but for the
        steps beside timesteps_at, which are as many."""
        usual = dict(self.sampling) | {name: value for name, value in self.defaults.items() if name in NOISE}
        if at := given.get("timesteps_at"):
            usual["steps"] = len(at)
        return Method(**usual | {name: value for name, value in given.items() if value is not None})

    def first(self, count: int | None) -> Protocol:
        """The protocol of its first `count` prompts; None = of all."""
        if count is None:
            return self
        return self.model_copy(update={"select": self.select.model_copy(update={"count": count})})

    def model(self) -> tuple[Path, Path] | None:
        """Config and weights of its model; None = it names none."""
        files = [self.defaults.get(name) for name in ("config", "ckpt")]
        return None if None in files else (ROOT / files[0], ROOT / files[1])

    def added(self) -> dict[str, tuple[Path, ...]]:
        """The files that are added to the model, by what they are."""
        return {name: tuple(ROOT / file for file in self.defaults[name]) for name in ADDED if name in self.defaults}

    def folder(self, given: str | Path | None = None) -> Path:
        """The folder of its data: the one given, or its own; looked for here, else in the project."""
        folder = Path(given or self.defaults.get("data", "."))
        return folder if folder.is_absolute() or folder.exists() else ROOT / folder

    def asked(self) -> dict[str, Any]:
        """What images that can be compared have in common, as JSON values; see above."""
        found = {"data": dict(self.data), "select": dict(self.select), "repeats": self.repeats, "seed": self.seed}
        found |= {"size": self.size, "guidance": float(self.guidance)}
        found |= {name: value for name in ("control", "video") if (value := getattr(self, name))}
        if self.cascade:
            found["cascade"] = {name: self.cascade[name] for name in ("scales", "noise_levels")}
        return found


def protocol_names() -> tuple[str, ...]:
    return tuple(sorted(names_in(PROTOCOL_DIR)))


def load_protocol(name: str) -> Protocol:
    """The protocol of a name in evaluation/protocols, or of a .yaml file.
    Raises ValueError: there is none, or it is not a protocol."""
    path = find_file("protocol", name, PROTOCOL_DIR, protocol_names())
    with reading("protocol", path) as content:
        if "like" in content:
            if content["like"] not in protocol_names():
                raise ValueError(f"like: expected one of {', '.join(protocol_names())}; got {shown(content['like'])}")
            usual = load_protocol(content.pop("like")).model_dump(exclude_unset=True)
            content = usual | content | {"defaults": usual.get("defaults", {}) | content.get("defaults", {})}
        return parse(Protocol, {**content, "name": path.stem})


# YAML files that are named by their stem, such as protocols and tables


def names_in(folder: Path) -> list[str]:
    return [path.stem for path in folder.glob("*.yaml")]


def find_file(kind: str, name: str, folder: Path, names: tuple[str, ...]) -> Path:
    """The file of one of the names in the folder, or the .yaml file of that path.
    Raises ValueError: neither; `kind` says of what."""
    path = folder / f"{name}.yaml" if name in names else Path(name)
    if path.suffix not in (".yaml", ".yml"):
        accepted = f"{', '.join(names)}, or FILE.yaml{did_you_mean(name, names)}"
        raise ValueError(f"unknown {kind} {name!r}; accepted: {accepted}")
    return path


@contextmanager
def reading(kind: str, path: Path) -> Iterator[dict[str, Any]]:
    """The file's content; errors inside the block become a ValueError that names the file.
    Raises ValueError: it can't be read, or is not of the kind."""
    try:
        content = read_yaml(path)
        if not isinstance(content, dict):
            raise ValueError(f"the file should be a mapping; got {type(content).__name__}")
        yield content
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: not a {kind}: {one_line(error)}") from None


# The prompts of a protocol: read from its data, chosen by a seeded rule


@dataclass(frozen=True)
class Prompt:
    """One prompt."""

    id: int  # tells it from all others of its data; with the protocol's seed it names the noise
    image: int  # the image that it is a caption of: prompts of one image share this number
    inputs: Mapping[str, Any]  # what the model is conditioned on, see `ldm.sampling.generate.Item`

    def line(self) -> dict[str, Any]:
        """As JSON values."""
        return {**self.inputs, "id": self.id}


def chosen_prompts(protocol: Protocol, data: str | Path | None = None) -> list[Prompt]:
    """The prompts of a protocol, in its order. `data`: the folder of its data; None = the protocol's. Raises
    SettingError: `data` is not what it should be, or has fewer prompts than `count`."""
    with fault_of("data"):
        prompts = read_prompts(protocol, protocol.folder(data))
    with fault_of("count"):
        return choose(prompts, protocol.select)


def read_prompts(protocol: Protocol, folder: Path) -> list[Prompt]:
    """All prompts of the protocol's data, in this folder.
    Raises FileNotFoundError: there is no such file. ValueError: the file is not what it should be."""
    data = protocol.data
    if data["kind"] == "classes":
        return [Prompt(number, number, {"class": number}) for number in range(data["classes"])]
    path = folder / data["file"]
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; {protocol.name} reads {data['file']} in the folder of its data")
    text = read_text(path)
    try:
        if data["kind"] == "captions":
            prompts = list(coco_prompts(parse_json(text), data.get("where", {})))
        elif path.suffix == ".jsonl":
            prompts = list(json_prompts(text))
        else:  # empty lines are skipped; the id is the line's number, from 0
            lines = enumerate(map(str.strip, split_lines(text)))
            prompts = [Prompt(number, number, {"prompt": line}) for number, line in lines if line]
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not prompts:
        raise ValueError(f"{path}: has no prompts that {protocol.name} could take")
    if len({prompt.id for prompt in prompts}) < len(prompts):
        raise ValueError(f"{path}: has two prompts of one id")
    return prompts


described = with_config(ConfigDict(strict=True, extra="allow"))


@described
class CocoImage(TypedDict):
    id: Seed


@described
class CocoNote(TypedDict):
    id: Seed
    image_id: Seed
    caption: Text


@described
class Coco(TypedDict):
    images: list[CocoImage]
    annotations: NotRequired[list[CocoNote]]


@described
class Line(TypedDict):
    id: NotRequired[Seed]
    prompt: NotRequired[Text]
    caption: NotRequired[Text]


def coco_images(content: Any, *fields: str) -> dict[int, Mapping[str, Any]]:
    """The images in COCO's annotations, by id. Raises ValueError: there are none, or one lacks some of the fields."""
    images = parse(Coco, content)["images"]
    for number, image in enumerate(images):
        if missing := [name for name in fields if name not in image]:
            raise ValueError(f"images.{number}.{missing[0]} is missing")
    return {image["id"]: image for image in images}


def coco_prompts(content: Any, where: Mapping[str, Any]) -> Iterator[Prompt]:
    """The captions in COCO's annotations of images that fit `where`."""
    images = coco_images(content, *where)
    if "annotations" not in content:
        raise ValueError("annotations is missing")
    for number, note in enumerate(content["annotations"]):
        if (image := note["image_id"]) not in images:
            raise ValueError(f"annotations.{number} is of image {image}, which is not among the images")
        if fits(images[image], where):
            yield Prompt(note["id"], image, {"prompt": " ".join(note["caption"].split()), "image_id": image})


def fits(image: Mapping[str, Any], where: Mapping[str, Any]) -> bool:
    """Whether each field that `where` names has its value, or one of the values if it is a list."""
    return all(image[name] in (value if isinstance(value, list) else [value]) for name, value in where.items())


def json_prompts(text: str) -> Iterator[Prompt]:
    """JSON lines with `prompt` or `caption`, and an `id` (default: the line's number, from 0)."""
    for number, entry in parse_json_lines(text):
        line = parse(Line, entry, f"line {number + 1}")
        if (caption := line.get("prompt", line.get("caption"))) is None:
            raise ValueError(f"line {number + 1} has no prompt or caption; got {shown(entry)}")
        own = line.get("id", number)
        yield Prompt(own, own, {"prompt": " ".join(caption.split())})


def choose(prompts: Sequence[Prompt], select: Select) -> list[Prompt]:
    """The prompts that a protocol takes, in its order. Raises ValueError: there are none, or fewer than asked for.

    The rule needs no random generator, so it can be repeated in any language. Images are ordered by
    SHA-256("SEED/IMAGE"), the captions of an image by SHA-256("SEED/IMAGE/CAPTION") or, for `first`, by id. Each image
    in turn gives one caption, then each a second, until there are enough. So the order of the file does not matter, and
    the first N of a selection are the selection of N.
    """
    by_image: dict[int, list[Prompt]] = {}
    for prompt in prompts:
        by_image.setdefault(prompt.image, []).append(prompt)

    def place(*numbers: int) -> str:
        return hashlib.sha256("/".join(map(str, numbers)).encode()).hexdigest()

    def turn(prompt: Prompt) -> tuple[str, int]:
        return place(select.seed, prompt.image, prompt.id) if select.captions == "drawn" else "", prompt.id

    images = sorted(by_image, key=lambda image: (place(select.seed, image), image))
    queues = [sorted(by_image[image], key=turn) for image in images]
    rounds = [queue[turn] for turn in range(select.per_image) for queue in queues if turn < len(queue)]
    count = len(rounds) if select.count is None else select.count
    if not rounds:
        raise ValueError("there are no prompts to choose from")
    if count > len(rounds):
        there = f"{len(rounds)} such (of {len(prompts)} prompts of {len(by_image)} images)"
        raise ValueError(f"{count} prompts are asked for, at most {select.per_image} of an image; there are {there}")
    return rounds[:count]
