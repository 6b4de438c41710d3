"""Protocols: what is asked of every method alike, so that their numbers can be set beside each other.

evaluation/protocols/NAME.yaml:

    about:      what is known of it, and what is our reading
    data:       what prompts are from, by `kind`:
                captions (COCO's annotations): file; optional: pictures (the real ones), where: {field: value or list}
                prompts (a prompt per line, or JSON lines): file
                classes: classes, how many there are
    select:     count (default: all), per_image (default: 1), captions: drawn or first, seed; see
                `evaluation.protocols.prompts`
    repeats:    pictures of each prompt (default: 1)
    seed:       of the pictures' noise (default: 0)
    size:       height and width in pixels
    guidance:   its scale
    sampling:   sampler, steps, eta: what a run does unless it is told otherwise
    metrics:    the variants that are reported: lists of EXTRACTOR/RESIZE for fid or adm, of names for clip_score;
                reference: a file of published statistics
    defaults:   of the command line: config, ckpt, data (a folder), noise_below, noise_order

What pictures of different methods must have in common to be compared is `Protocol.asked`. The sampler and its steps
are not in it, since they are what comparisons are about; nor are metrics, since each result names its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from evaluation.protocols.yaml_file import find_file, names_in, reading
from ldm.cli.arguments import LARGEST_SIDE, MOST, MOST_STEPS, NOISE_ORDERS, ROOT
from ldm.io.kinds import MAPPING, NUMBER, SHARE, TEXT, Kind, check, choice, is_text, known, optional, whole

PROTOCOL_DIR = Path(__file__).parent
DATA = {"captions": ({"file"}, {"pictures", "where"}), "prompts": ({"file"}, set()), "classes": ({"classes"}, set())}
MOST_CAPTIONS = 1000  # of one image
DEFAULTS = {"config": TEXT, "ckpt": TEXT, "data": TEXT, "noise_below": NUMBER, "noise_order": choice(*NOISE_ORDERS)}


def is_where(value: Any) -> bool:
    def plain(item: Any) -> bool:
        return isinstance(item, (str, int, float, bool))

    return (
        isinstance(value, Mapping)
        and all(map(is_text, value))
        and all(all(map(plain, item)) if isinstance(item, list) else plain(item) for item in value.values())
    )


def variants(words: str, holds: Callable[[Any], bool]) -> Kind:
    return Kind(f"a list of {words}", lambda value: isinstance(value, list) and bool(value) and all(map(holds, value)))


NETWORKS = variants("EXTRACTOR/RESIZE", lambda value: isinstance(value, str) and value.count("/") == 1)
METRICS = {"fid": NETWORKS, "adm": NETWORKS, "clip_score": variants("names", is_text), "reference": TEXT}


@dataclass(frozen=True)
class Select:
    """Which of the data's prompts are taken.

    count:     how many; None = all that there are.
    per_image: most captions of one image.
    captions:  which of an image's: `drawn` at random, or the `first` by id.
    seed:      of what is drawn.
    """

    count: int | None = None
    per_image: int = 1
    captions: str = "drawn"
    seed: int = 0

    def __post_init__(self) -> None:
        check(
            "select.",
            vars(self),
            {
                "count": optional(whole(1, MOST)),
                "per_image": whole(1, MOST_CAPTIONS),
                "seed": whole(0),
                "captions": choice("drawn", "first"),
            },
        )


@dataclass(frozen=True)
class Sampling:
    """The solver, its steps, and eta (None = the solver's own)."""

    sampler: str = "ddim"
    steps: int = 50
    eta: float | None = None

    def __post_init__(self) -> None:
        check("sampling.", vars(self), {"sampler": TEXT, "steps": whole(1, MOST_STEPS), "eta": optional(SHARE)})


@dataclass(frozen=True)
class Protocol:
    """A named file's content; see above.

    Raises:
        ValueError: a value that is not what it should be.
    """

    data: Mapping[str, Any]
    size: int
    guidance: float
    select: Select = Select()
    sampling: Sampling = Sampling()
    repeats: int = 1
    seed: int = 0
    metrics: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    about: str = ""
    name: str = ""

    def __post_init__(self) -> None:
        check(
            "",
            vars(self),
            {
                "size": whole(1, LARGEST_SIDE),
                "repeats": whole(1, MOST),
                "seed": whole(0),
                "guidance": NUMBER,
                "data": MAPPING,
                "metrics": MAPPING,
            },
        )
        check(
            "data.",
            {"kind": None, **self.data},
            {
                "kind": choice(*DATA),
                "file": TEXT,
                "pictures": TEXT,
                "classes": whole(1, MOST),
                "where": Kind("a mapping of fields to texts, numbers, or lists of them", is_where),
            },
        )
        needed, more = DATA[self.data["kind"]]
        known("data", self.data, {"kind"} | needed, more)
        known("defaults", self.defaults, set(), {*DEFAULTS})
        check("defaults.", self.defaults, DEFAULTS)
        known("metrics", self.metrics, set(), {*METRICS})
        check("metrics.", self.metrics, METRICS)

    def folder(self, given: str | Path | None) -> Path:
        """Of its data: the one that is given, or its own; looked for here, else where the project is."""
        folder = Path(given or self.defaults.get("data", "."))
        return folder if folder.is_absolute() or folder.exists() else ROOT / folder

    def asked(self) -> dict[str, Any]:
        """What pictures have in common that can be compared, as JSON values; see above."""
        return {
            "data": dict(self.data),
            "select": asdict(self.select),
            "repeats": self.repeats,
            "seed": self.seed,
            "size": self.size,
            "guidance": float(self.guidance),
        }


def protocol_names() -> tuple[str, ...]:
    return tuple(sorted(names_in(PROTOCOL_DIR)))


def load_protocol(name: str) -> Protocol:
    """The protocol of a name in evaluation/protocols, or of a .yaml file.

    Raises:
        ValueError: there is none, or it is not a protocol.
    """
    path = find_file("protocol", name, PROTOCOL_DIR, protocol_names())
    with reading("protocol", path) as content:
        known("the file", content, {"data", "size", "guidance"}, {f.name for f in fields(Protocol)} - {"name"})
        for part, kind in (("select", Select), ("sampling", Sampling)):
            known(part, content.get(part, {}), set(), {f.name for f in fields(kind)})
            content[part] = kind(**content.get(part, {}))
        return Protocol(**content, name=path.stem)
