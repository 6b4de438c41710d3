"""The paper's tables: makes what is missing, and prints ours beside the paper's numbers.

    python evaluation/tables.py table1 --world emoji
    python evaluation/tables.py table1 --world coco --data COCO --clip CLIP-VIT-B-32
    python evaluation/tables.py table1 --world coco --gflops-only

World coco: the published models on the paper's data. World emoji: the model that ships; FID is a Fréchet distance of
EfficientNet-lite0's features from the dataset, and concept retrieval R@5 stands for the CLIP-score, so only changes
against the plain row can be set beside the paper's. Rows that are done are kept in --runs: the same command goes on
after any stop, and tables share the rows that they have in common.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaluation.protocol import Protocol, load_protocol
from evaluation.table_file import COLUMNS, WORLDS, Cell, Row, Table, load_table, table_names
from ldm.arguments import ROOT, count
from ldm.cli import BadInput, Parser, blame, command, number
from ldm.script import GO_ON

# What needs PyTorch is imported where it is used: --help must answer at once.
if TYPE_CHECKING:
    from evaluation.results import Result
    from evaluation.table_quality import Quality
    from evaluation.table_text import Filled, Sheet

TIMED = 5
NOT_RUN = "not run"
COUNTED = ("GFLOPs are MACs of the UNet in the paper's count (fvcore's: one product of attention; norms and upsampling "
           "by element), two predictions a step where there is guidance; neither first stage nor text encoder.")
INSTEAD = ("World emoji: another model, other measures. Its Fréchet distance is not an FID and R@5 is no CLIP-score; "
           "rows are named as in the paper, each run with emoji64 at its own guidance.")


def parser() -> Parser:
    p = Parser(prog="tables.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("table", metavar="TABLE", help=f"{', '.join(table_names())}; or FILE.yaml")
    p.add_argument("--world", choices=WORLDS, required=True, help="which models and data")
    p.add_argument("--rows", metavar="N,N", type=row_numbers, help="only these rows, from 1, are made (default: all)")
    what = p.add_mutually_exclusive_group()
    what.add_argument("--gflops-only", action="store_true", help="only the GFLOPs, from the config; needs no weights")
    what.add_argument("--show", action="store_true", help="make nothing; print what is there")
    p.add_argument("--count", type=count, metavar="N", help="pictures of a row (default: as the protocol says)")
    p.add_argument("--timed", type=number(int, 0, math.inf, "a whole number >= 0"), default=TIMED, metavar="N",
                   help="pictures that are timed for a row, one at a time; 0 = none (default: %(default)s)")
    files = p.add_argument_group("files")
    files.add_argument("--data", metavar="DIR", help="of the protocol (default: the protocol's)")
    files.add_argument("--config", metavar="YAML", help="the model's config (default: the protocol's)")
    files.add_argument("--ckpt", metavar="FILE", help="its weights (default: the protocol's)")
    files.add_argument("--inception", metavar="PATH", help="weights of inception-2015 (default: torch.hub's)")
    files.add_argument("--clip", metavar="DIR", help="CLIP ViT-B/32, for the CLIP-score")
    files.add_argument("--runs", default="outputs/tables", metavar="DIR", help="(default: %(default)s)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: auto)")
    return p


def row_numbers(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"expected row numbers from 1, such as 1,2; got {text!r}")
    return [int(part) for part in parts]


# A row's place, and how it is made

@dataclass(frozen=True)
class Job:
    """One row to be filled, under its protocol; `named` is how the table names that."""

    row: Row
    named: str
    protocol: Protocol
    args: argparse.Namespace

    @property
    def data(self) -> Path:
        folder = Path(self.args.data or self.protocol.defaults.get("data", f"data/{self.protocol.name}"))
        return folder if folder.is_absolute() or folder.exists() else ROOT / folder

    @property
    def config(self) -> Path:
        return self._file("config")

    @property
    def ckpt(self) -> Path:
        return self._file("ckpt")

    def _file(self, name: str) -> Path:
        given, default = getattr(self.args, name), self.protocol.defaults.get(name)
        if given is None and default is None:
            raise BadInput(f"--{name}: needed: protocol {self.protocol.name} names no model")
        return Path(given) if given is not None else ROOT / default

    @property
    def shared(self) -> Path:
        few = "" if self.args.count is None else f"-{self.args.count}"
        return Path(self.args.runs) / f"{self.protocol.name}{few}"

    @property
    def folder(self) -> Path:
        """Of the run: rows that make the same pictures have the same one."""
        flags = self.row.flags()
        parts = (value if flag in ("--sampler", "--steps", "--plan") else f"{flag.strip('-')}-{value}"
                 for flag, value in zip(flags[::2], flags[1::2], strict=True))
        return self.shared / "_".join(part.replace(":", "-").replace("/", "-") for part in parts)

    @property
    def timing(self) -> Path:
        return self.folder / f"cost-{self.row.parallel or 'auto'}.json"

    def argv(self) -> list[str]:
        """Of evaluation/generate.py. `parallel` is not among them: it does not change the pictures."""
        given = {"--data": self.data if self.protocol.data["kind"] != "classes" else None, "--count": self.args.count,
                 "--config": self.config, "--ckpt": self.ckpt, "--device": self.args.device}
        options = [str(part) for flag, value in given.items() if value is not None for part in (flag, value)]
        return ["--protocol", self.named, *self.row.flags(), *options, "--out", str(self.folder)]

    def quality(self) -> Quality:
        from evaluation.table_quality import Quality

        return Quality(self.protocol, self.named, self.data, self.shared, self.args.inception, self.args.clip,
                       self.args.device)


def check(jobs: Sequence[Job], columns: Sequence[str]) -> None:
    """What the rows need must be there, found out before hours of work."""
    from evaluation.table_quality import need
    from ldm.published import load_manifest

    for job in {job.protocol.name: job for job in jobs}.values():
        pictured = any(not other.row.costs_only for other in jobs if other.protocol.name == job.protocol.name)
        wanted = qualities(columns) if pictured else []
        if not job.ckpt.exists():
            names = [entry.name for entry in load_manifest().values() if entry.file().resolve() == job.ckpt.resolve()]
            how = f"python scripts/download_models.py {names[0]} fetches it" if names else "no such file"
            raise BadInput(f"--ckpt: {job.ckpt} is not there: {how}; --gflops-only needs no weights")
        if "file" in job.protocol.data:
            need(job.data / job.protocol.data["file"], job.quality())
        if wanted and "pictures" in job.protocol.data:
            need(job.data / job.protocol.data["pictures"], job.quality())
        job.quality().check(wanted)


def qualities(columns: Sequence[str]) -> list[str]:
    return [name for name in columns if COLUMNS[name].kind == "quality"]


def make(job: Job) -> None:
    """The row's pictures, if they are not all there with these weights."""
    from evaluation import generate
    from evaluation.run_folder import CARD, MANIFEST, read_card
    from evaluation.table_quality import quietly, renamed
    from ldm.checkpoint import fingerprint

    if (job.folder / MANIFEST).is_file() and (job.folder / CARD).is_file() and (
            read_card(job.folder)["weights"] == fingerprint(job.ckpt)):
        return
    print(f"{job.row.name}: python evaluation/generate.py {' '.join(job.argv())}", file=sys.stderr)
    with quietly(), renamed({"--out": "--runs"}):
        generate.run(job.argv())


# Filling the table

def fill(job: Job, columns: Sequence[str], make_it: bool) -> tuple[Filled, dict[str, Result]]:
    """The row with all that is there, made first if it is to be made."""
    from evaluation.table_text import Filled

    row = job.row
    if row.missing:
        return Filled(row, remark=row.missing), {}
    cells = counted(job) if "gflops" in columns else {}
    if job.args.gflops_only:
        return Filled(row, cells, row.costs_only or ""), {}
    quality, results = judged(job, columns, make_it)
    cells |= quality | timed_cells(job, columns, make_it)
    if {"fid", "clip_score", "seconds"} <= cells.keys() and "ftc" in columns and cells["clip_score"][0]:
        cells["ftc"] = (cells["fid"][0] * cells["seconds"][0] / cells["clip_score"][0], None)
    ran = any(COLUMNS[name].kind != "count" for name in cells)
    return Filled(row, cells, row.costs_only or ("" if ran else NOT_RUN)), results


def counted(job: Job) -> dict[str, Cell]:
    from evaluation.table_cost import gflops

    with blame("TABLE" if job.args.config is None else "--config", (ValueError, OSError, KeyError, TypeError)):
        macs = gflops(job.row, job.protocol, job.config, job.ckpt)
    return {} if macs is None else {"gflops": (macs, None)}


def judged(job: Job, columns: Sequence[str], make_it: bool) -> tuple[dict[str, Cell], dict[str, Result]]:
    from evaluation.run_folder import MANIFEST

    wanted = [] if job.row.costs_only else qualities(columns)
    if wanted and make_it:
        make(job)
    there = wanted and (job.folder / MANIFEST).is_file()
    return job.quality().cells(wanted, job.folder, make_it) if there else ({}, {})


def timed_cells(job: Job, columns: Sequence[str], make_it: bool) -> dict[str, Cell]:
    from evaluation.table_cost import costs, timed

    wanted = [name for name in columns if COLUMNS[name].kind == "cost"]
    if not wanted or not (job.timing.is_file() or (make_it and job.args.timed)):
        return {}
    flags = [] if job.row.parallel is None else ["--parallel", str(job.row.parallel)]
    found = costs(timed([*job.argv(), *flags], job.args.timed if make_it else 0, job.timing))
    return {name: (found[name], None) for name in wanted if name in found}


def compare(results: dict[str, dict[str, Result]], jobs: Sequence[Job], columns: Sequence[str]) -> None:
    """Rows of one protocol may stand in one table only if they were measured alike."""
    from evaluation.results import ResultError, comparable
    from evaluation.table_cost import compare_timings, read_timing

    protocols = {job.protocol.name for job in jobs}
    if any(COLUMNS[name].kind == "cost" for name in columns):
        for protocol in protocols:
            compare_timings({job.row.name: read_timing(job.timing) for job in jobs
                             if job.protocol.name == protocol and job.timing.is_file()})
    with blame("--runs", (ResultError,)):
        for protocol in protocols:
            for measure in {name for found in results.values() for name in found}:
                comparable({job.row.name: results[job.row.name][measure] for job in jobs
                            if job.protocol.name == protocol and measure in results[job.row.name]})


def remarks(jobs: Sequence[Job], results: dict[str, dict[str, Result]], columns: Sequence[str],
            world: str) -> list[str]:
    """What the numbers are of, in words."""
    said = [COUNTED] if "gflops" in columns else []
    said += [INSTEAD] if world == "emoji" else []
    for result in (result for found in results.values() for result in found.values()):
        said.append(measured(result))
        said += [f"Warning: {warning}." for warning in result.warnings]
    for job in jobs:
        if any(COLUMNS[name].kind == "cost" for name in columns) and job.timing.is_file():
            said.append(told(json.loads(job.timing.read_text(encoding="utf-8"))))
    return list(dict.fromkeys(said))


def measured(result: Result) -> str:
    by = ", ".join(result.protocol[name] for name in ("measure", "extractor", "resize") if name in result.protocol)
    made = result.samples
    intervals = any(name.endswith("_interval") for name in result.values)
    return (f"{by}: N = {result.protocol['n']} pictures of {made.get('ckpt')} ({made.get('weights', '')[:8]}), "
            f"protocol {made.get('name')} ({(made.get('protocol_sha256') or '')[:8]})"
            + ("; parentheses: 95 % intervals." if intervals else "."))


def told(timing: dict[str, Any]) -> str:
    return (f"Seconds: median of {len(timing['seconds'])} pictures, one at a time, after two untimed; "
            f"{timing['machine']}, threads: {timing['threads']}, {timing['precision']} precision, {timing['date']}, "
            f"weights {timing['weights'][:8]}.")


def write(sheet: Sheet, stem: Path) -> None:
    from evaluation.table_text import csv_text, latex, markdown
    from ldm.util import atomic_write

    print(markdown(sheet))
    with blame("--runs", (OSError,)):
        for suffix, text in ((".md", markdown(sheet)), (".csv", csv_text(sheet)), (".tex", latex(sheet))):
            with atomic_write(stem.with_suffix(suffix)) as temporary:
                temporary.write_text(text, encoding="utf-8")
    print(f"{stem}.md, {stem}.csv, {stem}.tex")


def jobs_of(table: Table, args: argparse.Namespace) -> list[Job]:
    rows = table.rows_in(args.world)
    if not rows:
        raise BadInput(f"--world: {table.name} is not in the {args.world} world")
    if args.rows and max(args.rows) > len(rows):
        raise BadInput(f"--rows: {table.name} has {len(rows)} rows in the {args.world} world; got {max(args.rows)}")
    with blame("TABLE"):
        named = [table.protocol_of(row, args.world) for row in rows]
        return [Job(row, name, load_protocol(name), args) for row, name in zip(rows, named, strict=True)]


def run(args: argparse.Namespace) -> None:
    with blame("TABLE"):
        table = load_table(args.table)
    jobs, columns = jobs_of(table, args), list(table.columns)
    if args.gflops_only:
        columns = [name for name in columns if name == "gflops"]
        if not columns:
            raise BadInput(f"--gflops-only: {table.name} has no GFLOPs; it has {', '.join(table.columns)}")
    chosen = [job for number, job in enumerate(jobs, 1) if not args.rows or number in args.rows]
    made = [job for job in chosen if not (job.row.missing or args.show or args.gflops_only)]
    check(made, columns)

    from evaluation.table_text import Sheet

    rows, results = [], {}
    for job in jobs:
        filled, results[job.row.name] = fill(job, columns, job in made)
        rows.append(filled)
    compare(results, jobs, columns)
    if not any(filled.cells and filled.remark != NOT_RUN for filled in rows):
        reasons = "; ".join(dict.fromkeys(filled.remark for filled in rows))
        raise BadInput(f"TABLE: no row of {table.name} is finished in {args.runs}: {reasons}")
    write(Sheet(table, args.world, columns, rows, remarks(jobs, results, columns, args.world)),
          Path(args.runs) / f"{table.name}-{args.world}{'-gflops' if args.gflops_only else ''}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return command("tables.py", lambda: run(parser().parse_args(argv)), GO_ON)


if __name__ == "__main__":
    sys.exit(main())
