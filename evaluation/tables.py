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
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaluation.protocols.protocol import load_protocol
from evaluation.table.spec import COLUMNS, SHORT, WORLDS, Table, load_table, table_names
from ldm.cli.arguments import MOST, count
from ldm.cli.parser import GO_ON, Parser, run_command, whole
from ldm.io.errors import BadInput, blame

# What needs PyTorch is imported where it is used: --help must answer at once.
if TYPE_CHECKING:
    from evaluation.metrics.result import Result
    from evaluation.table.fill import Found
    from evaluation.table.job import Job
    from evaluation.table.render import Sheet

TIMED = 5
COUNTED = (
    "GFLOPs, the paper's word, are GMAC of the UNet in its count (fvcore's: one product of attention; norms and "
    "upsampling by element), two predictions a step where there is guidance; neither first stage nor text "
    "encoder. All other GMAC of this project are in the exact count; evaluation/cost.py prints both."
)
INSTEAD = ", other measures. Its Fréchet distance is not an FID and R@5 is no CLIP-score"


def parser() -> Parser:
    p = Parser(prog="tables.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("table", metavar="TABLE", help=f"{', '.join(table_names())}; or FILE.yaml")
    p.add_argument("--world", choices=WORLDS, required=True, help="which models and data")
    p.add_argument("--rows", metavar="N,N", type=row_numbers, help="only these rows, from 1, are made (default: all)")
    what = p.add_mutually_exclusive_group()
    what.add_argument("--gflops-only", action="store_true", help="only the GFLOPs, from the config; needs no weights")
    what.add_argument("--show", action="store_true", help="make nothing; print what is there")
    p.add_argument("--count", type=count, metavar="N", help="pictures of a row (default: as the protocol says)")
    p.add_argument(
        "--timed",
        type=whole(0, MOST),
        default=TIMED,
        metavar="N",
        help="pictures that are timed for a row, one at a time; 0 = none (default: %(default)s)",
    )
    files = p.add_argument_group("files")
    files.add_argument("--data", metavar="DIR", help="of the protocol (default: the protocol's)")
    files.add_argument("--config", metavar="YAML", help="the model's config (default: the protocol's)")
    files.add_argument("--ckpt", metavar="FILE", help="its weights (default: the protocol's)")
    files.add_argument(
        "--inception",
        metavar="PATH",
        help="weights of the network of Fréchet distances (default, of inception-2015: torch.hub's)",
    )
    files.add_argument("--clip", metavar="DIR", help="CLIP ViT-B/32, for the CLIP-score")
    files.add_argument("--runs", default="outputs/tables", metavar="DIR", help="(default: %(default)s)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: auto)")
    return p


def row_numbers(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"expected row numbers from 1, such as 1,2; got {text!r}")
    return [int(part) for part in parts]


def check(jobs: Sequence[Job], columns: Sequence[str]) -> None:
    """What the rows need must be there, their plans such as can be run, and what their folders hold of the same model
    and networks: found out before hours of work."""
    from evaluation.table.fill import counted, measured_alike, pictured, qualities, strange

    now = {}
    for name, job in {job.protocol.name: job for job in jobs}.items():
        judged = any(pictured(other, columns) for other in jobs if other.protocol.name == name)
        now[name] = check_files(job, qualities(columns) if judged else [])
    for job in jobs:
        counted(job)
        if pictured(job, columns):
            if why := strange(job):
                raise BadInput(f"--runs: {job.folder} holds pictures {why}; choose another folder")
            for measure, stated in now[job.protocol.name].items():
                measured_alike(job.folder / f"{measure}.json", stated)


def check_files(job: Job, wanted: list[str]) -> dict[str, dict[str, Any]]:
    """Model, data and networks of the job's protocol must be there, and enough to picture; returns what `Quality.now`
    does."""
    from evaluation.table.quality import LEAST, need
    from ldm.checkpoint.published import load_manifest

    if not job.ckpt.exists():
        names = [entry.name for entry in load_manifest().values() if entry.file().resolve() == job.ckpt.resolve()]
        how = f"python scripts/download_models.py {names[0]} fetches it" if names else "no such file"
        raise BadInput(f"--ckpt: {job.ckpt} is not there: {how}; --gflops-only needs no weights")
    if "file" in job.protocol.data:
        need(job.data / job.protocol.data["file"], job.quality())
    if wanted and "pictures" in job.protocol.data:
        need(job.data / job.protocol.data["pictures"], job.quality())
    now = job.quality().now(wanted, needed=True)
    n, least = len(job.prompts) * job.protocol.repeats, max((LEAST.get(measure, 1) for measure in now), default=1)
    if n < least:
        flag = f"TABLE: protocol {job.protocol.name}" if job.args.count is None else "--count"
        raise BadInput(f"{flag}: {', '.join(wanted)}: at least {least} pictures are needed; got {n}")
    return now


# The whole table


def compare(found: Sequence[Found]) -> None:
    """Rows of one protocol may stand in one table only if they are of one model and were measured alike."""
    from evaluation.metrics.result import ResultError, comparable
    from evaluation.table.cost import compare_timings

    for protocol in {row.job.protocol.name for row in found}:
        rows = {row.job.row.name: row for row in found if row.job.protocol.name == protocol}
        weights = {f"{name}: {stated[:SHORT]}": stated for name, row in rows.items() for stated in row.weights}
        if len({*weights.values()}) > 1:
            raise BadInput(
                f"--runs: rows of different weights ({', '.join(weights)}); with --ckpt and the file there "
                f"only those of its weights are shown"
            )
        compare_timings({name: row.timing for name, row in rows.items() if row.timing})
        with blame("--runs", (ResultError,)):
            for measure in {measure for row in rows.values() for measure in row.results}:
                comparable({name: row.results[measure] for name, row in rows.items() if measure in row.results})


def remarks(found: Sequence[Found], columns: Sequence[str], world: str, heads: Mapping[str, str]) -> list[str]:
    """What the numbers are of, in words."""
    said = [COUNTED] if "gflops" in columns else []
    said += [other_world([row.job for row in found])] if world == "emoji" else not_compared(found, columns, heads)
    for result in (result for row in found for result in row.results.values()):
        said.append(measured(result))
        said += [f"Warning: {warning}." for warning in result.warnings]
    said += [told(row.timing) for row in found if row.timing]
    return list(dict.fromkeys(said))


def other_world(jobs: Sequence[Job]) -> str:
    """What the emoji world's numbers are of; where only one measure is another the heads say it."""
    names = ", ".join(dict.fromkeys(job.protocol.name for job in jobs))
    measures = INSTEAD if any({"fid", "clip_score"} <= job.quality().heads().keys() for job in jobs) else ""
    return (
        f"World emoji: another model{measures}; a row that begins with its name was run with it in the place of "
        f"the paper's, at the guidance of {names}."
    )


def not_compared(found: Sequence[Found], columns: Sequence[str], heads: Mapping[str, str]) -> list[str]:
    """Why there is no difference from the paper's number, for each reason."""
    reasons: dict[str, list[str]] = {}
    for name in columns:
        for why in dict.fromkeys(row.unlike[name] for row in found if name in row.unlike):
            reasons.setdefault(why, []).append(heads.get(name, COLUMNS[name].head))
    return [f"No difference from the paper in {', '.join(names)}: {why}." for why, names in reasons.items()]


def measured(result: Result) -> str:
    by = ", ".join(result.protocol[name] for name in ("measure", "extractor", "resize") if name in result.protocol)
    made = result.samples
    intervals = any(name.endswith("_interval") for name in result.values)
    return (
        f"{by}: N = {result.protocol['n']} pictures of {made.get('ckpt')} ({made.get('weights', '')[:SHORT]}), "
        f"protocol {made.get('name')} ({(made.get('protocol_sha256') or '')[:SHORT]})"
        + ("; parentheses: 95 % intervals." if intervals else ".")
    )


def told(timing: Mapping[str, Any]) -> str:
    return (
        f"Seconds: median of {len(timing['seconds'])} pictures, one at a time, after two untimed; "
        f"{timing['machine']}, threads: {timing['threads']}, {timing['precision']} precision, {timing['date']}, "
        f"weights {timing['weights'][:SHORT]}."
    )


def heads_of(jobs: Sequence[Job]) -> dict[str, str]:
    """Of columns that are another measure than the paper's in some row."""
    found: dict[str, dict[str, None]] = {}
    for heads in (job.quality().heads() for job in jobs):
        for name, column in COLUMNS.items():
            found.setdefault(name, {})[heads.get(name, column.head)] = None
    return {name: " or ".join(of) for name, of in found.items()}


def write(sheet: Sheet, stem: Path) -> None:
    from evaluation.table.render import csv_text, latex, markdown
    from ldm.io.files import atomic_write

    print(markdown(sheet))
    with blame("--runs", (OSError,)):
        for suffix, text in ((".md", markdown(sheet)), (".csv", csv_text(sheet)), (".tex", latex(sheet))):
            with atomic_write(f"{stem}{suffix}") as temporary:
                temporary.write_text(text, encoding="utf-8")
    print(f"{stem}.md, {stem}.csv, {stem}.tex")


def jobs_of(table: Table, args: argparse.Namespace) -> list[Job]:
    from evaluation.table.job import Job

    rows = table.rows_in(args.world)
    if not rows:
        raise BadInput(f"--world: {table.name} is not in the {args.world} world")
    if args.rows and max(args.rows) > len(rows):
        raise BadInput(f"--rows: {table.name} has {len(rows)} rows in the {args.world} world; got {max(args.rows)}")
    with blame("TABLE"):
        named = [table.protocol_of(row, args.world) for row in rows]
        protocols = {name: load_protocol(name) for name in named}
    for name, protocol in protocols.items():
        if other := next((of for of, two in protocols.items() if two.name == protocol.name and two != protocol), None):
            raise BadInput(f"TABLE: {name} and {other} are two protocols of one name; expected each with its own")
    return [Job(row, name, protocols[name], args, table.apart) for row, name in zip(rows, named, strict=True)]


def run(args: argparse.Namespace) -> None:
    with blame("--runs", (OSError,)):  # a name that no file can have
        if Path(args.runs).is_file():
            raise BadInput(f"--runs: {args.runs} is a file; expected a directory")
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

    from evaluation.table.fill import fill
    from evaluation.table.job import few
    from evaluation.table.render import Sheet

    found = [fill(job, columns, job in made) for job in jobs]
    compare(found)
    if not any(row.done for row in found):
        reasons = "; ".join(dict.fromkeys(remark for row in found for remark in row.remarks))
        raise BadInput(f"TABLE: no row of {table.name} is finished in {args.runs}: {reasons}")
    heads = heads_of(jobs)
    notes = remarks(found, columns, args.world, heads)
    counted = "-gflops" if args.gflops_only else ""
    write(
        Sheet(table, args.world, columns, [row.filled() for row in found], notes, heads),
        Path(args.runs) / f"{table.name}-{args.world}{few(args)}{counted}",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return run_command(parser(), run, argv, GO_ON)


if __name__ == "__main__":
    sys.exit(main())
