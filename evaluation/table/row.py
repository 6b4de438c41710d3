"""One row of a table: its images, results and costs, found in files or made.

Files are named by a hash of what they depend on: a run by protocol, prompts, model and method; a result by the images
and the measure with its networks and real images. So what is found is the row's own; other numbers are in other files.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from urllib.parse import quote

from evaluation.metrics.result import Result, ResultError, read_result
from evaluation.protocols.protocol import Prompt, Protocol, chosen_prompts
from evaluation.runs.folder import CARD, MANIFEST
from evaluation.runs.generate import ModelFiles, Process, Request, make, prepare
from evaluation.table.cost import Timing, cost_values, gflops, read_timing, timed
from evaluation.table.measures import Measure, Sources, measures_of, need
from evaluation.table.spec import COLUMNS, FTC, HOW, Cell, Row
from ldm.cli.setup import download_hint, find_device
from ldm.io.errors import SettingError, fault_of
from ldm.io.files import file_sha256, json_sha256

NOT_RUN = "not run"
# Arguments of the generation and of the measures, and where tables have them.
PLACES = {
    "out": "runs",
    "samples": "runs",
    "reference": "data",
    "variant": "metrics",
    "weights": "clip",
    "forecast": "propagate",
}
DIGITS = 8  # of the hashes in names


@dataclass(frozen=True)
class Bench:
    """What the rows of one protocol share.

    usual:   the protocol; `named`: its name or file; `count`: how many of its prompts are taken, None = all.
    columns: of the table.
    runs:    folder of the runs.
    """

    usual: Protocol
    named: str
    count: int | None
    model: ModelFiles
    columns: Sequence[str]
    sources: Sources
    runs: Path

    @cached_property
    def protocol(self) -> Protocol:
        """The protocol of the prompts that are taken."""
        return self.usual.first(self.count)

    @property
    def data(self) -> Path:
        """The folder of the protocol's data."""
        return self.usual.folder(self.sources.data)

    @cached_property
    def prompts(self) -> list[Prompt]:
        need(self.protocol, self.data, self.protocol.data.get("file"))
        return chosen_prompts(self.protocol, self.data)

    @cached_property
    def measures(self) -> list[Measure]:
        return measures_of(self.protocol, self.data, self.columns, self.sources, cache=self.runs)

    def has(self, kind: str) -> bool:
        """Whether there are columns of this kind, see `Column`."""
        return any(COLUMNS[name].kind == kind for name in self.columns)


@dataclass(frozen=True)
class RowResult:
    """What there is of a row.

    cells:   values by column; results and timing: where they come from.
    remarks: why cells are empty.
    done:    there is something of what the row is run for.
    """

    row: Row
    bench: Bench
    cells: Mapping[str, Cell] = field(default_factory=dict)
    results: Mapping[str, Result] = field(default_factory=dict)
    timing: Timing | None = None
    remarks: Sequence[str] = ()
    done: bool = False

    @property
    def weights(self) -> str | None:
        """Hash of the model's weights, if there is a result or a timing."""
        made = [result.samples.get("weights") for result in self.results.values()]
        return next(filter(None, made), self.timing and self.timing.weights)


@dataclass(frozen=True)
class Job:
    """One row under its protocol."""

    row: Row
    bench: Bench

    @contextmanager
    def faults(self) -> Iterator[None]:
        """Faults of the row's fields and of its protocol become faults of the `table`, others keep their place."""
        try:
            yield
        except SettingError as error:
            setting, problem = PLACES.get(error.setting, error.setting), error.problem
            if setting in HOW:
                setting, problem = "table", f"{self.row.name}: {setting}: {problem}"
            elif setting == "metrics":
                setting, problem = "table", f"protocol {self.bench.protocol.name}: metrics: {problem}"
            elif setting == "protocol" or (setting == "count" and self.bench.count is None):
                setting, problem = "table", f"protocol {self.bench.protocol.name}: {problem}"
            raise SettingError(setting, problem) from error

    @cached_property
    def request(self) -> Request:
        """The images of the row. Raises SettingError: the row can't be run, or a file is not there."""
        bench = self.bench
        return prepare(bench.protocol, self.row.method(bench.protocol), bench.model, bench.prompts)

    @cached_property
    def folder(self) -> Path:
        """The folder of the run, which rows that make the same images share."""
        how = self.row.how()
        if self.row.timesteps_at:  # more than a name holds
            how["timesteps_at"] = len(self.row.timesteps_at)
        words = "_".join(
            quote(str(value) if name in ("sampler", "steps", "plan") else f"{name}-{value}", safe=",+")
            for name, value in how.items()
        )
        return self.bench.runs / f"{words}-{self.request.sha256[:DIGITS]}"

    @property
    def timing(self) -> Path:
        return self.folder / f"cost-{self.row.parallel or 'auto'}.json"

    @property
    def measured(self) -> bool:
        """Whether images of the row are measured."""
        return self.bench.has("quality") and not self.row.costs_only

    @property
    def finished(self) -> bool:
        """Whether all images of the row are there."""
        return (self.folder / MANIFEST).is_file() and (self.folder / CARD).is_file()

    def result_file(self, measure: Measure) -> Path:
        """The file of a measure's result; the images must be there."""
        digest = json_sha256([measure.depends, file_sha256(self.folder / MANIFEST)])[:DIGITS]
        return self.folder / f"{measure.name}-{digest}.json"

    def command(self) -> str:
        """The command line that makes the images, as a shell reads it."""
        bench, model = self.bench, self.bench.model
        data = [] if bench.protocol.data["kind"] == "classes" else ["--data", str(bench.data)]
        first = [] if bench.count is None else ["--count", str(bench.count)]
        files = ["--config", str(model.config), "--ckpt", str(model.ckpt), "--device", bench.sources.device]
        what = ["--protocol", bench.named, *data, *first, *self.row.flags()]
        return shlex.join(["python", "evaluation/generate.py", *what, *files, "--out", str(self.folder)])

    def check(self) -> None:
        """All that the row needs must be there; found out before hours of work. Raises SettingError: it is not."""
        ckpt = self.bench.model.ckpt
        with self.faults():
            if not ckpt.exists():
                why = f"{ckpt}: no such file{download_hint(ckpt)}; --gflops-only needs no weights"
                raise SettingError("ckpt", why)
            need(self.bench.protocol, self.bench.data, self.bench.protocol.data.get("file"))
            measures = self.bench.measures if self.measured else []
            n = len(self.bench.prompts) * self.bench.protocol.repeats
            for measure in measures:
                if n < measure.least:
                    columns = ", ".join(name for name in self.bench.columns if name in measure.columns)
                    raise SettingError("count", f"{columns}: at least {measure.least} images are needed; got {n}")
            gflops_cell(self, needed=True)
            self.bench.model.check()
            _ = self.folder


def find(job: Job) -> RowResult:
    """The row with all that is there; if it can't be run, a remark says why.
    Raises SettingError: `runs`: a file that is there is damaged."""
    results: dict[str, Result] = {}
    timing, remarks = None, []
    try:
        with job.faults():
            timing = read_timing(job.timing) if job.bench.has("cost") else None
            results = find_results(job) if job.measured and job.finished else {}
    except SettingError as error:
        if error.setting == "runs":
            raise
        remarks.append(error.problem if error.setting == "table" else str(error))
    return row_result(job, results, timing, remarks, needed=False)


def make_row(job: Job, timed_images: int) -> RowResult:
    """The row; what is missing is made. `timed_images`: how many images are to be timed, at least.
    Raises SettingError: the row can't be made."""
    results: dict[str, Result] = {}
    timing = None
    with job.faults(), fault_of("runs", (OSError,)):
        if job.measured:
            if not job.finished:
                make(job.request, job.folder, Process(0, 1, find_device(job.bench.sources.device)))
            results = find_results(job)
            for measure in job.bench.measures:
                if measure.name not in results:
                    results[measure.name] = measure.compute(job.folder)
                    results[measure.name].write(job.result_file(measure))
        if job.bench.has("cost"):
            timing = read_timing(job.timing)
            if timed_images > (len(timing.seconds) if timing else 0):
                timing = timed(job.request, job.bench.sources.device, timed_images, job.timing)
    return row_result(job, results, timing, [], needed=True)


def find_results(job: Job) -> dict[str, Result]:
    """The results that are there, by measure; the images must be there. Raises SettingError: `runs`: a damaged file."""
    files = {measure.name: job.result_file(measure) for measure in job.bench.measures}
    with fault_of("runs", (ResultError,)):
        return {name: read_result(file) for name, file in files.items() if file.is_file()}


def gflops_cell(job: Job, needed: bool) -> tuple[dict[str, Cell], str]:
    """The GFLOPs, or why there are none. Raises SettingError: they are needed, and the row can't be run."""
    bench = job.bench
    try:
        with job.faults():
            macs = gflops(bench.protocol, job.row.method(bench.protocol), bench.model.config, bench.model.ckpt)
    except SettingError as error:
        if needed:
            raise
        return {}, error.problem if error.setting == "table" else str(error)
    if macs is None:
        return {}, f"{job.row.plan} decides during a run: its GFLOPs are not known before"
    return {"gflops": (macs, None)}, ""


def row_result(
    job: Job, results: Mapping[str, Result], timing: Timing | None, remarks: Sequence[str], needed: bool
) -> RowResult:
    """The row of these results; `needed`: a row that can't be run is an error."""
    row, columns = job.row, job.bench.columns
    cells, why = gflops_cell(job, needed) if "gflops" in columns else ({}, "")
    for measure in job.bench.measures if results else []:
        values = results[measure.name].values if measure.name in results else {}
        for column, name in measure.columns.items():
            if column in columns and values.get(name) is not None:
                cells[column] = values[name], values.get(f"{name}_interval")
    seconds = cost_values(timing) if timing else {}
    cells |= {name: (seconds[name], None) for name in columns if name in seconds}
    if "ftc" in columns and {*FTC} <= cells.keys() and cells["clip_score"][0]:
        fid, score, each = (cells[name][0] for name in FTC)
        cells["ftc"] = (fid * each / score, None)
    done = bool(results or timing or (cells and (row.costs_only or columns == ["gflops"])))
    found = list(dict.fromkeys(filter(None, (row.costs_only, why, *remarks))))
    return RowResult(row, job.bench, cells, results, timing, found or ([] if done else [NOT_RUN]), done)
