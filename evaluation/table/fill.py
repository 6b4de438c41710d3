"""A row filled with all that there is of it: pictures and times are made first, if they are to be made."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from evaluation import generate
from evaluation.metrics.result import Result, ResultError, read_result
from evaluation.runs.folder import CARD, MANIFEST, FolderError, read_card
from evaluation.table.cost import costs, gflops, plan_of, read_timing, timed
from evaluation.table.job import Job
from evaluation.table.quality import otherwise, quietly
from evaluation.table.render import Filled
from evaluation.table.spec import COLUMNS, FTC, Cell
from ldm.io.errors import BadInput, blame

NOT_RUN = "not run"


@dataclass(frozen=True)
class Found:
    """What there is of a row.

    cells:   values by column; results and timing: what they are of.
    remarks: why some are empty.
    done:    there is something of what it is run for.
    """

    job: Job
    cells: Mapping[str, Cell] = field(default_factory=dict)
    results: Mapping[str, Result] = field(default_factory=dict)
    timing: Mapping[str, Any] | None = None
    remarks: Sequence[str] = ()
    done: bool = False

    @property
    def weights(self) -> list[str]:
        """Of the pictures and of the timing."""
        stated = [*(result.samples for result in self.results.values()), self.timing or {}]
        return list(dict.fromkeys(weights for of in stated if (weights := of.get("weights"))))

    @cached_property
    def unlike(self) -> dict[str, str]:
        """Columns with a number that can't be set against the paper's, with why."""
        reasons = self.job.unlike(next(iter(self.weights), None), self.timing)
        return {name: why for name, why in reasons.items() if name in self.cells and name in self.job.row.paper}

    def filled(self) -> Filled:
        result = next(iter(self.results.values()), None)
        of = {"weights": next(iter(self.weights), None), "protocol": self.job.protocol.name if self.cells else None}
        if result is not None:
            of |= {"n": result.protocol["n"], "protocol_sha256": result.samples.get("protocol_sha256")}
        model = self.job.ckpt.parent.name if self.cells and self.job.args.world != "coco" else ""
        return Filled(self.job.row, self.cells, "; ".join(self.remarks), self.unlike, of, model)


def fill(job: Job, columns: Sequence[str], make_it: bool) -> Found:
    """The row with all that is there, made first if it is to be made."""
    row, only = job.row, job.args.gflops_only
    if row.missing:
        return Found(job, remarks=[row.missing])
    cells, uncounted = gflops_of(job, needed=make_it or only) if "gflops" in columns else ({}, "")
    if only:
        return Found(job, cells, remarks=said(row.costs_only, uncounted), done=bool(cells))
    quality, results, others = judged(job, columns, make_it)
    timing, old = timing_of(job, columns, make_it)
    spent = costs(timing) if timing else {}
    cells |= quality | {name: (spent[name], None) for name in columns if name in spent}
    if "ftc" in columns and {*FTC} <= cells.keys() and cells["clip_score"][0]:
        fid, score, seconds = (cells[name][0] for name in FTC)
        cells["ftc"] = (fid * seconds / score, None)
    done = bool(results or timing or (row.costs_only and cells))
    remarks = said(row.costs_only, uncounted, others, old)
    return Found(job, cells, results, timing, remarks or ([] if done else [NOT_RUN]), done)


def said(*reasons: str | None) -> list[str]:
    return [reason for reason in reasons if reason]


def gflops_of(job: Job, needed: bool) -> tuple[dict[str, Cell], str]:
    """GFLOPs, or why there are none; a row that can't be run does not hide the others, unless its are needed."""
    try:
        return counted(job)
    except BadInput as error:
        if needed:
            raise
        return {}, str(error)


def counted(job: Job) -> tuple[dict[str, Cell], str]:
    """GFLOPs, or why this plan has none.

    Raises:
        BadInput: the row can't be run.
    """
    with blame(f"TABLE: {job.row.name}"):
        plan_of(job.row, job.protocol, job.ckpt)
    flag = "TABLE" if job.args.config is None else "--config"
    with blame(f"{flag}: {job.row.name}", (ValueError, OSError, KeyError, TypeError)):
        macs = gflops(job.row, job.protocol, job.config, job.ckpt)
    if macs is None:
        return {}, f"{job.row.plan} decides during a run: its GFLOPs are not known before"
    return {"gflops": (macs, None)}, ""


def qualities(columns: Sequence[str]) -> list[str]:
    return [name for name in columns if COLUMNS[name].kind == "quality"]


def pictured(job: Job, columns: Sequence[str]) -> bool:
    """Whether there are pictures of the row to be judged."""
    return bool(qualities(columns)) and not job.row.costs_only


def judged(job: Job, columns: Sequence[str], make_it: bool) -> tuple[dict[str, Cell], dict[str, Result], str]:
    """Values and what they are of; or why those that are there are not this row's."""
    if make_it and pictured(job, columns):
        make(job)
    if not pictured(job, columns) or not (job.folder / MANIFEST).is_file():
        return {}, {}, ""
    cells, results = job.quality().cells(qualities(columns), job.folder, make_it)
    now = job.quality().now(qualities(columns), needed=False) if results else {}
    why = next(
        filter(
            None,
            [
                strange(job),
                *(job.others(result.samples) for result in results.values()),
                *(otherwise(result, now[name]) for name, result in results.items()),
            ],
        ),
        "",
    )
    return ({}, {}, f"results {why}") if why else (cells, results, "")


def timing_of(job: Job, columns: Sequence[str], make_it: bool) -> tuple[dict[str, Any] | None, str]:
    """The row's timing, made if too few pictures of its model were timed; or why one that is there is not its own."""
    if not any(COLUMNS[name].kind == "cost" for name in columns):
        return None, ""
    kept = read_timing(job.timing)
    why = job.others(kept) if kept else ""
    there = len(kept["seconds"]) if kept and not why else 0
    if make_it and job.args.timed > there:
        flags = [] if job.row.parallel is None else ["--parallel", str(job.row.parallel)]
        with job.renamed():
            return timed([*job.argv(), *flags], job.args.timed, job.timing), ""
    return (None, f"seconds {why}") if why else (kept, "")


def make(job: Job) -> None:
    """The row's pictures, if they are not all there."""
    if (job.folder / MANIFEST).is_file() and (job.folder / CARD).is_file():
        return
    print(f"{job.row.name}: {job.command()}", file=sys.stderr)
    with quietly(), job.renamed():
        generate.run(job.argv())


def measured_alike(path: Path, now: Mapping[str, Any]) -> None:
    """Raise BadInput if a result that is kept there is not as it would be measured now; see `Quality.now`."""
    if not path.is_file():
        return
    with blame("--runs", (ResultError,)):
        why = otherwise(read_result(path), now)
    if why:
        raise BadInput(f"--runs: {path} was {why}; without the file it is measured again")


def strange(job: Job) -> str:
    """Why the pictures that are there, finished or not, are not this row's; nothing if they are, or there are none."""
    if not (job.folder / CARD).is_file():
        return ""
    with blame("--runs", (FolderError,)):
        return job.others(read_card(job.folder))
