"""Protocols: what is asked of every method alike, so that their numbers can be set beside each other.

evaluation/protocols/NAME.yaml:

    about:      what is known of it, and what is our reading
    data:       what prompts are from, by `kind`:
                captions (COCO's annotations): file; optional: pictures (the real ones), where: {field: value or list}
                prompts (a prompt per line, or JSON lines): file
                classes: classes, how many there are
    select:     count (default: all), per_image (default: 1), captions: drawn or first, seed; see `evaluation.selection`
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

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from evaluation.yaml_file import find_file, finite, known, names_in, reading, whole, words
from ldm.arguments import NOISE_ORDERS, ROOT

PROTOCOL_DIR = Path(__file__).parent / "protocols"
DATA = {"captions": ({"file"}, {"pictures", "where"}), "prompts": ({"file"}, set()), "classes": ({"classes"}, set())}
VARIANTS = {"fid", "adm", "clip_score"}     # metrics that come in several
DEFAULTS = {"config", "ckpt", "data", "noise_below", "noise_order"}


def identity(content: Any) -> str:
    """SHA-256 of JSON values, whatever the order of their keys, hexadecimal."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


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
        whole("select.count", 1 if self.count is None else self.count, 1)
        whole("select.per_image", self.per_image, 1)
        whole("select.seed", self.seed)
        if self.captions not in ("drawn", "first"):
            raise ValueError(f"select.captions must be drawn or first; got {self.captions!r}")


@dataclass(frozen=True)
class Sampling:
    """The solver, its steps, and eta (None = the solver's own)."""

    sampler: str = "ddim"
    steps: int = 50
    eta: float | None = None

    def __post_init__(self) -> None:
        words("sampling.sampler", self.sampler)
        whole("sampling.steps", self.steps, 1)
        finite("sampling.eta", 0 if self.eta is None else self.eta)


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
        whole("size", self.size, 1)
        whole("repeats", self.repeats, 1)
        whole("seed", self.seed)
        finite("guidance", self.guidance)
        for name in ("data", "metrics"):
            if not isinstance(getattr(self, name), Mapping):
                raise ValueError(f"{name} must be a mapping; got {getattr(self, name)!r}")
        kind = self.data.get("kind")
        if kind not in DATA:
            raise ValueError(f"data.kind must be one of {', '.join(DATA)}; got {kind!r}")
        needed, optional = DATA[kind]
        known("data", self.data, {"kind"} | needed, optional)
        for name in {"file", "pictures"} & self.data.keys():
            words(f"data.{name}", self.data[name])
        if not isinstance(self.data.get("where", {}), Mapping):
            raise ValueError(f"data.where must be a mapping of fields to values; got {self.data['where']!r}")
        if "classes" in needed:
            whole("data.classes", self.data["classes"], 1)
        known("defaults", self.defaults, set(), DEFAULTS)
        for name in {"config", "ckpt", "data"} & self.defaults.keys():
            words(f"defaults.{name}", self.defaults[name])
        finite("defaults.noise_below", self.defaults.get("noise_below", 0))
        if (order := self.defaults.get("noise_order", NOISE_ORDERS[0])) not in NOISE_ORDERS:
            raise ValueError(f"defaults.noise_order must be one of {', '.join(NOISE_ORDERS)}; got {order!r}")
        self._check_metrics()

    def _check_metrics(self) -> None:
        known("metrics", self.metrics, set(), {*VARIANTS, "reference"})
        for name in VARIANTS & self.metrics.keys():
            if not isinstance(self.metrics[name], list) or not self.metrics[name]:
                raise ValueError(f"metrics.{name} must be a list of variants; got {self.metrics[name]!r}")
            for variant in self.metrics[name]:
                words(f"metrics.{name}", variant)
                if name != "clip_score" and variant.count("/") != 1:
                    raise ValueError(f"metrics.{name} must be EXTRACTOR/RESIZE; got {variant!r}")
        if "reference" in self.metrics:
            words("metrics.reference", self.metrics["reference"])

    def folder(self, given: str | Path | None) -> Path:
        """Of its data: the one that is given, or its own; looked for here, else where the project is."""
        folder = Path(given or self.defaults.get("data", "."))
        return folder if folder.is_absolute() or folder.exists() else ROOT / folder

    def asked(self) -> dict[str, Any]:
        """What pictures have in common that can be compared, as JSON values; see above."""
        return {"data": dict(self.data), "select": asdict(self.select), "repeats": self.repeats, "seed": self.seed,
                "size": self.size, "guidance": float(self.guidance)}


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
