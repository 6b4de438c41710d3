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

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, StringConstraints, with_config
from typing_extensions import NotRequired, TypedDict

from ldm.cli.arguments import LARGEST_SIDE, MOST, MOST_STEPS, NOISE_ORDERS, ROOT
from ldm.io.errors import did_you_mean
from ldm.io.files import read_yaml
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
    """Which prompts of the data are taken: how many (None = all), how many captions of one image at most, and which of
    them (`drawn` at random by the seed, or the `first` by id)."""

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
    """How images are sampled: the fields of `ldm.cli.settings.SamplingSettings` of which methods may differ.

    `parallel` changes time and memory only.
    """

    sampler: str = "ddim"
    steps: int = 50
    eta: float | None = None
    plan: str = "off"
    propagate: str | None = None
    error_budget: float | None = None
    tome: float = 0.0
    noise_weight: float | None = None
    noise_below: float = 500.0
    noise_order: str = "before"
    spacing: str | None = None
    timesteps_at: tuple[int, ...] | None = None
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
    """The protocol of a name in evaluation/protocols, or of a .yaml file.
    Raises ValueError: there is none, or it is not a protocol."""
    path = find_file("protocol", name, PROTOCOL_DIR, protocol_names())
    with reading("protocol", path) as content:
        return parse(Protocol, {**content, "name": path.stem})


# YAML files that are named by their stem, such as protocols and tables


def names_in(folder: Path) -> list[str]:
    return [path.stem for path in folder.glob("*.yaml")]


def find_file(kind: str, name: str, folder: Path, names: tuple[str, ...]) -> Path:
    """The file of one of the names in the folder, or the .yaml file of that path.
    Raises ValueError: neither; `kind` says of what."""
    path = folder / f"{name}.yaml" if name in names else Path(name)
    if path.suffix not in (".yaml", ".yml"):
        raise ValueError(
            f"unknown {kind} {name!r}; accepted: {', '.join(names)}, or FILE.yaml{did_you_mean(name, names)}"
        )
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
        raise ValueError(f"{path}: not a {kind}: {' '.join(str(error).split())}") from None
