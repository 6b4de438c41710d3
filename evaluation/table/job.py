"""One row in its place: its protocol, its files, the folder of its run, and whether its numbers may stand there.

Numbers of other weights than the row's are not the row's; numbers of something else than the paper's are not set
against those.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

from evaluation.generate import parse
from evaluation.protocols.prompts import Prompt
from evaluation.protocols.protocol import Protocol
from evaluation.runs.folder import differences, prompts_sha256, some
from evaluation.table.cost import plan_of
from evaluation.table.now import changed_at, content, prompts_of
from evaluation.table.quality import Quality, renamed
from evaluation.table.spec import COLUMNS, FTC, HOW, SHORT, Row
from ldm.cli.arguments import ROOT
from ldm.cli.parser import settings_from
from ldm.cli.settings import SamplingSettings, make_recipe
from ldm.io.errors import BadInput, blame
from ldm.io.files import json_sha256

GPU, PRECISION = "A40", "autocast"  # that the paper's seconds and memory are of, as PyTorch and we call them


@dataclass(frozen=True)
class Job:
    """One row to be filled, under its protocol; `named` is how the table names that, `apart` is the table's."""

    row: Row
    named: str
    protocol: Protocol
    args: argparse.Namespace
    apart: Mapping[str, str]

    @property
    def data(self) -> Path:
        return self.protocol.folder(self.args.data)

    @property
    def config(self) -> Path:
        return self._file("config")

    @property
    def ckpt(self) -> Path:
        return self._file("ckpt")

    def _file(self, name: str) -> Path:
        given, usual = getattr(self.args, name), self._usual(name)
        if given is None and usual is None:
            raise BadInput(f"--{name}: needed: protocol {self.protocol.name} names no model")
        return Path(given) if given is not None else usual

    def _usual(self, name: str) -> Path | None:
        default = self.protocol.defaults.get(name)
        return None if default is None else ROOT / default

    @property
    def shared(self) -> Path:
        return Path(self.args.runs) / f"{self.protocol.name}{few(self.args)}"

    @property
    def folder(self) -> Path:
        """Of the run: rows that make the same pictures have the same one."""
        parts = (
            value if name in ("sampler", "steps", "plan") else f"{name.replace('_', '-')}-{value}"
            for name, value in self.row.how().items()
        )
        return self.shared / "_".join(quote(part, safe=",+") for part in parts)

    @property
    def timing(self) -> Path:
        return self.folder / f"cost-{self.row.parallel or 'auto'}.json"

    def argv(self) -> list[str]:
        """Of evaluation/generate.py. `parallel` is not among them: it does not change the pictures."""
        model = ["--config", str(self.config), "--ckpt", str(self.ckpt), "--device", self.args.device]
        return [*self._what(), *self.row.flags(), *model, "--out", str(self.folder)]

    def command(self) -> str:
        """That command line, as a shell reads it."""
        return shlex.join(["python", "evaluation/generate.py", *self.argv()])

    def _what(self) -> list[str]:
        """Of that command line: what is pictured."""
        data = [] if self.protocol.data["kind"] == "classes" else ["--data", str(self.data)]
        first = [] if self.args.count is None else ["--count", str(self.args.count)]
        return ["--protocol", self.named, *data, *first]

    def renamed(self) -> AbstractContextManager[None]:
        """Errors of that command line name the row, or the flag of tables.py."""
        own = {f"--{name.replace('_', '-')}": f"TABLE: {self.row.name}: {name}" for name in HOW}
        return renamed(own | {"--out": "--runs", "--outdir": "--runs", "--protocol": "TABLE"})

    def quality(self) -> Quality:
        return Quality(
            self.protocol, self.named, self.data, self.shared, self.args.inception, self.args.clip, self.args.device
        )

    # Whose numbers

    @cached_property
    def prompts(self) -> list[Prompt] | None:
        """What is pictured; None if the data are not there.

        Raises:
            BadInput: the data are not what they should be, or too few.
        """
        file = None if self.protocol.data["kind"] == "classes" else self.data / self.protocol.data["file"]
        if file is not None and not file.is_file():
            return None
        with self.renamed():
            return prompts_of(tuple(self._what()), (json_sha256(self.protocol.asked()), changed_at(file)))

    @cached_property
    def stated(self) -> dict[str, Any]:
        """What a run card of this row says of protocol and method, as far as the files are there.

        Raises:
            BadInput, ValueError: the row can't be run.
        """
        args, protocol = parse(self.argv())
        asked = protocol.asked() | ({} if self.prompts is None else {"prompts_sha256": prompts_sha256(self.prompts)})
        sampling = settings_from(args, SamplingSettings)
        recipe, plan = make_recipe(sampling, (protocol.size,) * 2), plan_of(self.row, self.protocol, self.ckpt)
        return {"protocol": asked, "method": asdict(recipe) | plan.settings()}

    def others(self, made: Mapping[str, Any]) -> str:
        """In words, that what a run card or a timing tells of is not this row's weights, config, protocol or method;
        nothing if it is, or if the files are not there to tell."""
        for what, path in (("weights", self.ckpt), ("config", self.config)):
            with blame("--ckpt" if what == "weights" else "--config"):
                here = content(path)
            stated = made.get(what)
            if None not in (here, stated) and stated != here:
                return f"of other {what}: {stated[:SHORT]}, not {here[:SHORT]} ({path.name})"
        try:
            differ = [
                text
                for part in self.stated
                if isinstance(made.get(part), Mapping)
                for text in differences(*shared(part, made, self.stated))
            ]
        except (BadInput, ValueError) as error:
            return f"of a run that is no longer known: {error}"
        return f"of another run: {some(differ)}" if differ else ""

    def unlike(self, weights: str | None, timing: Mapping[str, Any] | None) -> dict[str, str]:
        """Columns in which ours is of something else than the paper's number, with why; all others are like for like.

        Args:
            weights: that pictures and timing are of. timing: of the row, if there is one.
        """
        if self.args.world != "coco":
            return dict.fromkeys(COLUMNS, "another model")
        config = self._other_config()
        model = config or self._other_weights(weights)
        why = {"quality": model or self._few(), "cost": model or other_machine(timing), "count": config}
        heads = self.quality().heads()
        found = {
            name: self.apart.get(name) or why.get(column.kind) or ("another measure" if name in heads else "")
            for name, column in COLUMNS.items()
        }
        found["ftc"] = found["ftc"] or next((found[part] for part in FTC if found[part]), "")
        return {name: reason for name, reason in found.items() if reason}

    def _few(self) -> str:
        usual = self.protocol.select.count
        if self.args.count in (None, usual):
            return ""
        return f"of {self.args.count} prompts, where {self.protocol.name} has {usual or 'all'}"

    def _other_config(self) -> str:
        usual = self._usual("config")
        same = self.args.config is None or (usual is not None and content(self.config) == content(usual))
        return "" if same else f"another config than {self.protocol.name}'s"

    def _other_weights(self, weights: str | None) -> str:
        """By content where it is known what the protocol's own have, else by whether others were asked for."""
        usual = self._usual("ckpt")
        expected = None if usual is None else published(usual) or content(usual)
        same = weights == expected if weights and expected else self.args.ckpt is None
        return "" if same else f"other weights than {self.protocol.name}'s"


def few(args: argparse.Namespace) -> str:
    """What the names of files and folders end in that are of fewer pictures than usual."""
    return "" if args.count is None else f"-{args.count}"


def shared(part: str, *cards: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The fields of a part that all cards have: a row alone does not tell the precision, say, nor its prompts."""
    names = set.intersection(*({*card[part]} for card in cards))
    return [{part: {name: card[part][name] for name in card[part] if name in names}} for card in cards]


@lru_cache
def published(path: Path) -> str | None:
    """Hash of the weights that are published for this place, if there are such and it is known."""
    from ldm.checkpoint.published import load_manifest

    return next((entry.sha256 for entry in load_manifest().values() if entry.file() == path), None)


def other_machine(timing: Mapping[str, Any] | None) -> str:
    if timing is None or (GPU in timing["machine"].split() and timing["precision"] == PRECISION):
        return ""
    return f"timed on {timing['machine']} in {timing['precision']} precision, the paper's on an {GPU} in half precision"
