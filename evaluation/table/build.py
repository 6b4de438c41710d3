"""A whole table: its rows in one world, made or found, ready to be shown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from evaluation.metrics.result import ResultError, comparable
from evaluation.protocols.protocol import Protocol, load_protocol
from evaluation.runs.generate import ModelFiles
from evaluation.table.measures import Networks
from evaluation.table.paper import column_heads, notes, unlike
from evaluation.table.render import RenderedRow, RenderedTable
from evaluation.table.row import Bench, Job, RowResult, count_only, find, make_row
from evaluation.table.spec import Table
from evaluation.table.timing import compare_timings
from ldm.io.errors import SettingError, fault_of


@dataclass(frozen=True)
class Sources:
    """Where models, data and networks are; None = as the protocol says, or as is usual.

    config, ckpt:    the model's files. data: the folder of the protocol's data.
    inception, clip: see `Networks`.
    device:          name of a device.
    """

    data: str | None = None
    config: str | None = None
    ckpt: str | None = None
    inception: str | None = None
    clip: str | None = None
    device: str = "auto"


def build_table(
    table: Table,
    world: str,
    runs: str | Path,
    sources: Sources | None = None,
    *,
    numbers: Sequence[int] | None = None,
    count: int | None = None,
    timed: int = 0,
    gflops_only: bool = False,
    show: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> RenderedTable:
    """The rows of a table in one world; what is missing is made first.

    Args:
        runs: folder of the runs. sources: None = what is usual.
        numbers: only these rows are made, counted from 1; None = all.
        count: prompts of each row; None = all of the protocol's.
        timed: images of each row that are timed.
        gflops_only: only the GFLOPs, which need no weights. show: make nothing.
        say: told of each row before it is made.

    Raises SettingError: it names an argument, or a field of `sources`, that can't be used.
    """
    check_folder(Path(runs))
    columns = ["gflops"] if gflops_only else table.columns
    if columns[0] not in table.columns:
        raise SettingError("gflops_only", f"{table.name} has no GFLOPs; it has {', '.join(table.columns)}")
    jobs = jobs_of(table, world, Path(runs), sources or Sources(), count, columns)
    if numbers and max(numbers) > len(jobs):
        raise SettingError("rows", f"{table.name} has {len(jobs)} rows in the {world} world; got {max(numbers)}")
    chosen = [job for number, job in enumerate(jobs, 1) if not job.row.missing and number in (numbers or [number])]
    to_make = [] if gflops_only or show else chosen
    for job in to_make:
        job.check()
    rows = []
    for job in jobs:
        if job.row.missing:
            rows.append(RowResult(job.row, job.bench, remarks=[job.row.missing]))
        elif gflops_only:
            rows.append(count_only(job, needed=True))
        elif job in to_make:
            if job.measured and not job.finished:
                say(f"{job.row.name}: {job.command()}")
            rows.append(make_row(job, timed))
        else:
            rows.append(find(job))
    check_comparable(rows)
    if not any(row.done for row in rows):
        reasons = "; ".join(dict.fromkeys(remark for row in rows for remark in row.remarks))
        raise SettingError("table", f"no row of {table.name} is finished in {runs}: {reasons}")
    stem = f"{table.name}-{world}{'' if count is None else f'-{count}'}{'-gflops' if gflops_only else ''}"
    shown = [rendered_row(row, table, world) for row in rows]
    below = notes(rows, table, world, columns)
    return RenderedTable(table, world, columns, shown, below, column_heads([row.bench for row in rows]), stem)


def check_folder(runs: Path) -> None:
    with fault_of("runs", (OSError,)):  # a name that no file can have
        if runs.is_file():
            raise SettingError("runs", f"{runs} is a file; expected a directory")


def jobs_of(
    table: Table, world: str, runs: Path, sources: Sources, count: int | None, columns: Sequence[str]
) -> list[Job]:
    """The rows of a table in one world, for these of its columns; see `build_table`."""
    rows = table.rows_in(world)
    if not rows:
        raise SettingError("world", f"{table.name} is not in the {world} world")
    named = [table.protocol_of(row, world) for row in rows]
    with fault_of("table"):
        protocols = {name: load_protocol(name) for name in named}
    for name, protocol in protocols.items():
        if other := next((of for of, two in protocols.items() if two.name == protocol.name and two != protocol), None):
            raise SettingError("table", f"{name} and {other} are two protocols of one name; expected each with its own")
    benches = {name: bench_of(name, protocol, runs, sources, count, columns) for name, protocol in protocols.items()}
    return [Job(row, benches[name]) for row, name in zip(rows, named, strict=True)]


def bench_of(
    name: str, protocol: Protocol, runs: Path, sources: Sources, count: int | None, columns: Sequence[str]
) -> Bench:
    usual = protocol.model() or (None, None)
    files = [given or own for given, own in zip((sources.config, sources.ckpt), usual, strict=True)]
    for setting, file in zip(("config", "ckpt"), files, strict=True):
        if file is None:
            raise SettingError(setting, f"needed: protocol {protocol.name} names no model")
    folder = runs / f"{protocol.name}{'' if count is None else f'-{count}'}"
    networks = Networks(sources.inception, sources.clip, sources.device, cache=folder)
    model = ModelFiles(*map(Path, files))
    return Bench(protocol, name, count, protocol.folder(sources.data), model, columns, networks, folder)


def check_comparable(rows: Sequence[RowResult]) -> None:
    """Rows of one protocol may stand in one table only if they were measured and timed alike. Raises SettingError:
    `runs`: they were not."""
    for bench in {id(row.bench): row.bench for row in rows}.values():
        own = {row.row.name: row for row in rows if row.bench is bench}
        compare_timings({name: row.timing for name, row in own.items() if row.timing})
        with fault_of("runs", (ResultError,)):
            for measure in {measure for row in own.values() for measure in row.results}:
                comparable({name: row.results[measure] for name, row in own.items() if measure in row.results})


def rendered_row(row: RowResult, table: Table, world: str) -> RenderedRow:
    result = next(iter(row.results.values()), None)
    about = {"weights": row.weights, "protocol": row.bench.protocol.name if row.cells else None}
    if result is not None:
        about |= {"n": result.protocol["n"], "protocol_sha256": result.samples.get("protocol_sha256")}
    model = row.bench.model.ckpt.parent.name if row.cells and world != "coco" else ""
    return RenderedRow(row.row, row.cells, "; ".join(row.remarks), unlike(row, table, world), about, model)
