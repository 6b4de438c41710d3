"""Protocols: what every method has to make alike, so that their results can be compared.

evaluation/protocols/NAME.yaml:

    about:      what is known of it, and what is our reading
    data:       where the prompts come from, by `kind`:
                captions (COCO's annotations): file; optional: pictures (the real images), where: {field: value or list}
                prompts (a prompt per line, or JSON lines): file
                classes: classes, how many there are
    select:     count (default: all), per_image (default: 1), captions: drawn or first, seed; see
                `evaluation.protocols.prompts`
    repeats:    images of each prompt (default: 1)
    seed:       of the images' noise (default: 0)
    size:       height and width in pixels
    guidance:   the guidance scale, 1 = none
    sampling:   sampler, steps, eta: what a method has unless it says otherwise
    metrics:    the variants that are reported: lists of EXTRACTOR/RESIZE for fid or adm, of names for clip_score;
                reference: a file of published statistics
    defaults:   config and ckpt of the model, data (a folder), noise_below, noise_order

`Protocol.asked` is what images of different methods must have in common to be compared. The sampler and its steps
are not in it, since they are what comparisons are about; nor are metrics, since each result names its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, StringConstraints, with_config
from typing_extensions import NotRequired, TypedDict

from evaluation.protocols.yaml_file import find_file, names_in, reading
from ldm.cli.arguments import LARGEST_SIDE, MOST, MOST_STEPS, NOISE_ORDERS, ROOT
from ldm.io.schema import Number, Schema, Seed, Share, Text, parse

PROTOCOL_DIR = Path(__file__).parent
MOST_CAPTIONS = 1000  # of one image
NOISE = ("noise_below", "noise_order")

Amount = Annotated[int, Field(ge=1, le=MOST)]
Side = Annotated[int, Field(ge=1, le=LARGEST_SIDE)]
Networks = Annotated[list[Annotated[str, StringConstraints(pattern="^[^/]+/[^/]+$")]], Field(min_length=1)]
Names = Annotated[list[Text], Field(min_length=1)]
Plain = str | bool | int | float
strictly = with_config(ConfigDict(strict=True, extra="forbid"))


@strictly
class Captions(TypedDict):
    kind: Literal["captions"]
    file: Text
    pictures: NotRequired[Text]
    where: NotRequired[dict[Text, Plain | list[Plain]]]


@strictly
class Prompts(TypedDict):
    kind: Literal["prompts"]
    file: Text


@strictly
class Classes(TypedDict):
    kind: Literal["classes"]
    classes: Amount


@strictly
class Metrics(TypedDict, total=False):
    fid: Networks
    adm: Networks
    clip_score: Names
    reference: Text


@strictly
class Defaults(TypedDict, total=False):
    config: Text
    ckpt: Text
    data: Text
    noise_below: Number
    noise_order: Literal[NOISE_ORDERS]


class Select(Schema):
    """Which prompts of the data are taken.

    count:     how many; None = all.
    per_image: most captions of one image.
    captions:  which captions of an image: `drawn` at random, or the `first` by id.
    seed:      of the draw.
    """

    count: Amount | None = None
    per_image: Annotated[int, Field(ge=1, le=MOST_CAPTIONS)] = 1
    captions: Literal["drawn", "first"] = "drawn"
    seed: Seed = 0


class Sampling(Schema):
    """The solver, its steps, and eta (None = the solver's own)."""

    sampler: Text = "ddim"
    steps: Annotated[int, Field(ge=1, le=MOST_STEPS)] = 50
    eta: Share | None = None


@dataclass(frozen=True)
class Method:
    """How images are sampled.

    sampler, steps: the solver and its number of steps.
    eta:          noise of DDIM, 0..1; None = 0.
    plan:         encoder propagation, see `load_plan`.
    propagate:    what the decoder gets between key timesteps; None = as the plan says.
    tome:         share of tokens merged, 0 = none.
    noise_weight: prior noise injection, 0 = none; None = the published weight, or 0 with the plan `off`.
    noise_below, noise_order: at which timesteps, and when in a step.
    parallel:     most decoder steps in one batch; None = as many as are fast. Changes time and memory only.
    """

    sampler: str = "ddim"
    steps: int = 50
    eta: float | None = None
    plan: str = "off"
    propagate: str | None = None
    tome: float = 0.0
    noise_weight: float | None = None
    noise_below: float = 500.0
    noise_order: str = "before"
    parallel: int | None = None


class Protocol(Schema):
    """The content of a protocol file; see above."""

    data: Annotated[Captions | Prompts | Classes, Field(discriminator="kind")]
    size: Side
    guidance: Number
    select: Select = Select()
    sampling: Sampling = Sampling()
    repeats: Amount = 1
    seed: Seed = 0
    metrics: Metrics = {}
    defaults: Defaults = {}
    about: str = ""
    name: str = ""

    def method(self, **given: Any) -> Method:
        """A method with these fields of `Method`; those that are None or missing are as the protocol says."""
        usual = dict(self.sampling) | {name: value for name, value in self.defaults.items() if name in NOISE}
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

    def folder(self, given: str | Path | None = None) -> Path:
        """The folder of its data: the one given, or its own; looked for here, else in the project."""
        folder = Path(given or self.defaults.get("data", "."))
        return folder if folder.is_absolute() or folder.exists() else ROOT / folder

    def asked(self) -> dict[str, Any]:
        """What images that can be compared have in common, as JSON values; see above."""
        return {
            "data": dict(self.data),
            "select": dict(self.select),
            "repeats": self.repeats,
            "seed": self.seed,
            "size": self.size,
            "guidance": float(self.guidance),
        }


def protocol_names() -> tuple[str, ...]:
    return tuple(sorted(names_in(PROTOCOL_DIR)))


def load_protocol(name: str) -> Protocol:
    """The protocol of a name in evaluation/protocols, or of a .yaml file. Raises ValueError: there is none, or it is
    not a protocol."""
    path = find_file("protocol", name, PROTOCOL_DIR, protocol_names())
    with reading("protocol", path) as content:
        return parse(Protocol, {**content, "name": path.stem})
