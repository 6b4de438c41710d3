"""A whole table: its rows in one world, made or found, with what they can be compared with, ready to be shown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from evaluation.metrics.result import Result, ResultError, comparable
from evaluation.protocols.protocol import Protocol, load_protocol
from evaluation.runs.generate import ModelFiles
from evaluation.table.cost import Timing, compare_timings
from evaluation.table.render import RenderedRow, RenderedTable
from evaluation.table.row import Bench, Job, RowResult, Sources, find, heads, make_row, row_result
from evaluation.table.spec import COLUMNS, FTC, SHORT, Table
from ldm.checkpoint import fingerprint
from ldm.checkpoint.published import published_sha256
from ldm.io.errors import SettingError, fault_of


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
    columns = ["gflops"] if gflops_only else table.columns
    if columns[0] not in table.columns:
        raise SettingError("gflops_only", f"{table.name} has no GFLOPs; it has {', '.join(table.columns)}")
    jobs = jobs_of(table, world, Path(runs), sources or Sources(), count, columns)
    if numbers and max(numbers) > len(jobs):
        raise SettingError("rows", f"{table.name} has {len(jobs)} rows in the {world} world; got {max(numbers)}")
    chosen = [job for number, job in enumerate(jobs, 1) if not job.missing and number in (numbers or [number])]
    to_make = [] if gflops_only or show else chosen
    for job in to_make:
        job.check()
    rows = []
    for job in jobs:
        if job.missing or gflops_only:
            rows.append(row_result(job, {}, None, [], needed=True))
        elif job in to_make:
            if job.measured and not job.finished:
                say(f"{job.row.name}: {job.command()}")
            rows.append(make_row(job, timed))
        else:
            rows.append(find(job))
    check_comparable(rows)
    can_run = [row for job, row in zip(jobs, rows, strict=True) if not job.missing]
    if can_run and not any(row.done for row in can_run):
        reasons = "; ".join(dict.fromkeys(remark for row in rows for remark in row.remarks))
        raise SettingError("table", f"no row of {table.name} is finished in {runs}: {reasons}")
    stem = f"{table.name}-{world}{'' if count is None else f'-{count}'}{'-gflops' if gflops_only else ''}"
    shown = [rendered_row(row, table, world) for row in rows]
    below = notes(rows, table, world, columns)
    return RenderedTable(table, world, columns, shown, below, column_heads([row.bench for row in rows]), stem)


def jobs_of(
    table: Table, world: str, runs: Path, sources: Sources, count: int | None, columns: Sequence[str]
) -> list[Job]:
    """The rows of a table in one world, for these of its columns; see `build_table`."""
    with fault_of("runs", (OSError,)):  # a name that no file can have
        if runs.is_file():
            raise SettingError("runs", f"{runs} is a file; expected a directory")
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
    return Bench(protocol, name, count, ModelFiles(*map(Path, files), added=protocol.added()), columns, sources, folder)


def check_comparable(rows: Sequence[RowResult]) -> None:
    """Rows of one protocol may stand in one table only if they were measured and timed alike.
    Raises SettingError: `runs`: they were not."""
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


# Where our numbers and the paper's are of something else

GPU, PRECISION = "A40", "autocast"  # the paper's seconds and memory, as PyTorch and we name them
COUNTED = (
    "GFLOPs, the paper's word, are GMAC of the UNet in its count (fvcore's: one product of attention; norms and "
    "upsampling by element), two predictions a step where there is guidance; neither first stage nor text "
    "encoder. All other GMAC of this project are in the exact count; evaluation/cost.py prints both."
)
INSTEAD = ", other measures. Its Fréchet distance is not an FID and R@5 is no CLIP-score"


def unlike(row: RowResult, table: Table, world: str) -> dict[str, str]:
    """Columns with a number of ours and one of the paper's that are not of the same thing, with the reason."""
    reasons = reasons_unlike(row.bench, table, world, row.weights, row.timing)
    return {name: why for name, why in reasons.items() if name in row.cells and name in row.row.paper}


def reasons_unlike(
    bench: Bench, table: Table, world: str, weights: str | None, timing: Timing | None
) -> dict[str, str]:
    """Columns in which ours is of something else than the paper's number, with the reason. `weights`: hash of the
    model's; None = no images and no timing. `timing`: of the row, if there is one."""
    if world != "coco":
        return dict.fromkeys(COLUMNS, "another model")
    config, model = other_model(bench, weights)
    usual, count, machine = bench.usual.select.count, "", ""
    if bench.count not in (None, usual):
        count = f"of {bench.count} prompts, where {bench.protocol.name} has {usual or 'all'}"
    if timing and not (GPU in timing.machine.split() and timing.precision == PRECISION):
        how = f"on {timing.machine} in {timing.precision} precision"
        machine = f"timed {how}, the paper's on an {GPU} in half precision"
    why = {"quality": model or count, "cost": model or machine, "count": config}
    other_measures = heads(bench.protocol)
    found = {
        name: table.apart.get(name) or why.get(column.kind) or ("another measure" if name in other_measures else "")
        for name, column in COLUMNS.items()
    }
    found["ftc"] = found["ftc"] or next((found[part] for part in FTC if found[part]), "")
    return {name: reason for name, reason in found.items() if reason}


def other_model(bench: Bench, weights: str | None) -> tuple[str, str]:
    """How config, and config or weights, differ from the protocol's: by content where that is known, else by path."""
    usual, name = bench.protocol.model(), bench.protocol.name
    if usual is None:
        return (f"another config than {name}'s",) * 2
    config, ckpt = usual
    if bench.model.config != config and content(bench.model.config) != content(config):
        return (f"another config than {name}'s",) * 2
    expected = published_sha256(ckpt) or content(ckpt)
    same = weights == expected if weights and expected else bench.model.ckpt == ckpt
    return "", "" if same else f"other weights than {name}'s"


def content(path: Path) -> str | None:
    """Hash of a file's content; None if it is not there."""
    return fingerprint(path) if path.exists() else None


# Notes


def notes(rows: Sequence[RowResult], table: Table, world: str, columns: Sequence[str]) -> list[str]:
    """What the numbers are of, in words."""
    found = [COUNTED] if "gflops" in columns else []
    if world == "emoji":
        found.append(other_world([row.bench for row in rows]))
    else:
        found += not_compared(rows, table, columns)
    for result in (result for row in rows for result in row.results.values()):
        found.append(measured(result))
        found += [f"Warning: {warning}." for warning in result.warnings]
    found += [timed(row.timing) for row in rows if row.timing]
    return list(dict.fromkeys(found))


def other_world(benches: Sequence[Bench]) -> str:
    """What the emoji world's numbers are of; where only one measure is another the heads say it."""
    names = ", ".join(dict.fromkeys(bench.protocol.name for bench in benches))
    measures = INSTEAD if any({"fid", "clip_score"} <= heads(bench.protocol).keys() for bench in benches) else ""
    return (
        f"World emoji: another model{measures}; a row that begins with its name was run with it in the place of "
        f"the paper's, at the guidance of {names}."
    )


def not_compared(rows: Sequence[RowResult], table: Table, columns: Sequence[str]) -> list[str]:
    """Why there is no difference from the paper's number, for each reason."""
    names = column_heads([row.bench for row in rows])
    differ = [unlike(row, table, "coco") for row in rows]
    reasons: dict[str, list[str]] = {}
    for column in columns:
        for why in dict.fromkeys(found[column] for found in differ if column in found):
            reasons.setdefault(why, []).append(names[column])
    return [f"No difference from the paper in {', '.join(found)}: {why}." for why, found in reasons.items()]


def column_heads(benches: Sequence[Bench]) -> dict[str, str]:
    """The names of columns; of one that is another measure in some row, all its names."""
    found: dict[str, dict[str, None]] = {}
    for other in (heads(bench.protocol) for bench in benches):
        for name, column in COLUMNS.items():
            found.setdefault(name, {})[other.get(name, column.head)] = None
    return {name: " or ".join(names) for name, names in found.items()}


def measured(result: Result) -> str:
    by = ", ".join(result.protocol[name] for name in ("measure", "extractor", "resize") if name in result.protocol)
    made = result.samples
    intervals = any(name.endswith("_interval") for name in result.values)
    return (
        f"{by}: N = {result.protocol['n']} images of {made.get('ckpt')} ({made.get('weights', '')[:SHORT]}), "
        f"protocol {made.get('name')} ({(made.get('protocol_sha256') or '')[:SHORT]})"
        + ("; parentheses: 95 % intervals." if intervals else ".")
    )


def timed(timing: Timing) -> str:
    return (
        f"Seconds: median of {len(timing.seconds)} images, one at a time, after two untimed; "
        f"{timing.machine}, threads: {timing.threads}, {timing.precision} precision, {timing.date}, "
        f"weights {timing.weights[:SHORT]}."
    )
