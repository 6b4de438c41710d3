"""Where our numbers and the paper's are of something else, and the notes below a table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from evaluation.metrics.result import Result
from evaluation.table.measures import heads
from evaluation.table.row import Bench, RowResult
from evaluation.table.spec import COLUMNS, FTC, SHORT, Table
from evaluation.table.timing import Timing
from ldm.checkpoint import fingerprint
from ldm.checkpoint.published import published_sha256

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
    """Columns in which ours is of something else than the paper's number, with the reason.

    Args:
        weights: hash of the model's; None = no images and no timing. timing: of the row, if there is one.
    """
    if world != "coco":
        return dict.fromkeys(COLUMNS, "another model")
    config = other_config(bench)
    model = config or other_weights(bench, weights)
    why = {"quality": model or other_count(bench), "cost": model or other_machine(timing), "count": config}
    other_measures = heads(bench.protocol)
    found = {
        name: table.apart.get(name) or why.get(column.kind) or ("another measure" if name in other_measures else "")
        for name, column in COLUMNS.items()
    }
    found["ftc"] = found["ftc"] or next((found[part] for part in FTC if found[part]), "")
    return {name: reason for name, reason in found.items() if reason}


def other_count(bench: Bench) -> str:
    usual = bench.usual.select.count
    if bench.count in (None, usual):
        return ""
    return f"of {bench.count} prompts, where {bench.protocol.name} has {usual or 'all'}"


def other_config(bench: Bench) -> str:
    usual = bench.protocol.model()
    same = usual and (bench.model.config == usual[0] or content(bench.model.config) == content(usual[0]))
    return "" if same else f"another config than {bench.protocol.name}'s"


def other_weights(bench: Bench, weights: str | None) -> str:
    """By content where the content of the protocol's own weights is known, else by their path."""
    usual = bench.protocol.model()
    expected = None if usual is None else published_sha256(usual[1]) or content(usual[1])
    same = weights == expected if weights and expected else usual is not None and bench.model.ckpt == usual[1]
    return "" if same else f"other weights than {bench.protocol.name}'s"


def other_machine(timing: Timing | None) -> str:
    if timing is None or (GPU in timing.machine.split() and timing.precision == PRECISION):
        return ""
    return f"timed on {timing.machine} in {timing.precision} precision, the paper's on an {GPU} in half precision"


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
