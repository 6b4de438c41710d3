"""The rows of a table: their images, results and costs, found in files or made; and what they can be compared with.

Files are named by a hash of what they depend on: a run by protocol, prompts, model and method; a result by the images
and the measure with its networks and real images. So what is found is the row's own; other numbers are in other files.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

from evaluation.metrics import clip_score, frechet, preference, retrieval
from evaluation.metrics.extractors import EXTRACTORS, RECIPES, load_extractor, network_fields
from evaluation.metrics.result import Result, ResultError, comparable, read_result
from evaluation.protocols.protocol import Prompt, Protocol, chosen_prompts, load_protocol
from evaluation.runs.generate import CARD, MANIFEST, SAMPLES, Process, Request, make, prepare
from evaluation.runs.images import open_images, reference_images
from evaluation.runs.models import ModelFiles, files_of
from evaluation.table.cost import Timing, compare_timings, cost_values, gflops, read_timing, timed
from evaluation.table.spec import COLUMNS, FTC, HOW, SHORT, Cell, RenderedRow, RenderedTable, Row, Table
from ldm.checkpoint.published import published_sha256
from ldm.cli.setup import download_hint, find_device, in_run
from ldm.io.errors import SettingError, fault_of
from ldm.io.files import file_sha256, json_sha256

NOT_RUN = "not run"
# Arguments of the generation and of the measures, and where tables have them.
PLACES = {"out": "runs", "samples": "runs", "reference": "data", "variant": "metrics", "weights": "clip"}
PLACES |= {"forecast": "propagate"}
BATCH = 50


@dataclass(frozen=True)
class Sources:
    """Where models, data and networks are; None = as the protocol says, or as is usual."""

    data: str | None = None  # the folder of the protocol's data
    config: str | None = None  # the model's files
    ckpt: str | None = None
    inception: str | None = None  # weights of the network of Fréchet distances
    clip: str | None = None  # folder of the CLIP model
    image_reward: str | None = None  # see `evaluation.metrics.preference.MODELS`
    pick_score: str | None = None
    device: str = "auto"


@dataclass(frozen=True)
class Bench:
    """What the rows of one protocol in a table share."""

    table: Table
    world: str
    usual: Protocol
    named: str  # the protocol's name or file
    count: int | None  # how many of its prompts are taken; None = all
    model: ModelFiles
    columns: Sequence[str]  # those of the table that are filled
    sources: Sources
    runs: Path  # folder of the runs

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
        self.need(self.protocol.data.get("file"))
        return chosen_prompts(self.protocol, self.data)

    @cached_property
    def measures(self) -> list[Measure]:
        """The measures that fill the columns. Raises SettingError: `metrics`: the protocol does not say how to measure;
        `data`, `inception` or `clip`: what a measure needs is not there, or can't be used."""
        found = []
        if {"fid", *ADM} & {*self.columns}:
            found.append(distance_measure(self, suite=bool({*ADM} & {*self.columns})))
        models = [model for model in preference.MODELS if model.replace("-", "_") in self.columns]
        found += [preference_measure(self, model) for model in models]
        if "clip_score" in self.columns:
            found.append((score_measure if "clip_score" in self.protocol.metrics else retrieval_measure)(self))
        return found

    def has(self, kind: str) -> bool:
        """Whether there are columns of this kind, see `Column`."""
        return any(COLUMNS[name].kind == kind for name in self.columns)

    def need(self, name: str | None) -> None:
        """Check that a file or folder of the data is there.
        Raises SettingError: `data`: it is not there; the message says how to get it."""
        if name is not None and not (path := self.data / name).exists():
            how = HOW_TO_GET.get(path.name, "named by the protocol")
            raise SettingError("data", f"{path} is not there, which {self.protocol.name} needs: {how}")


@dataclass(frozen=True, kw_only=True)
class RowResult(RenderedRow):
    """What there is of a row."""

    bench: Bench
    results: Mapping[str, Result]  # by measure, of which its quality is
    timing: Timing | None
    remarks: Sequence[str]  # why cells are empty
    done: bool  # there is something of what the row is run for


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
            setting, protocol = PLACES.get(error.setting, error.setting), f"protocol {self.bench.protocol.name}"
            if setting in HOW:
                raise error.moved("table", f"{self.row.name}: {setting}: ") from error
            if setting == "metrics":
                raise error.moved("table", f"{protocol}: metrics: ") from error
            if setting == "protocol" or (setting == "count" and self.bench.count is None):
                raise error.moved("table", f"{protocol}: ") from error
            raise error.moved(setting) from error

    @cached_property
    def request(self) -> Request:
        """The images of the row. Raises SettingError: the row can't be run, or a file is not there."""
        bench = self.bench
        return prepare(bench.protocol, self.row.method(bench.protocol), bench.model, bench.prompts, bench.data)

    @cached_property
    def folder(self) -> Path:
        """The folder of the run, which rows that make the same images share."""
        how = self.row.how()
        if self.row.timesteps_at:  # more than a name holds
            how["timesteps_at"] = len(self.row.timesteps_at)
        words = (f"{'' if name in ('sampler', 'steps', 'plan') else f'{name}-'}{value}" for name, value in how.items())
        return self.bench.runs / f"{'_'.join(quote(word, safe=',+') for word in words)}-{self.request.sha256[:SHORT]}"

    @property
    def missing(self) -> str | None:
        """Why the row can't be run; None = it can. One that is not in the paper does not ask for a model of its own."""
        files = self.bench.model.missing
        if self.alone and not self.bench.model.ckpt.exists():
            return "not run: no weights here"
        return self.row.missing or (f"not run: needs {files[0].name}" if files else None)

    @property
    def alone(self) -> bool:
        """Whether its protocol is another than the table's, and the paper has no row of it."""
        table, world, own = self.bench.table, self.bench.world, self.bench.named
        mates = [row for row in table.rows_in(world) if table.protocol_of(row, world) == own]
        return own != table.protocol.get(world) and not any(row.paper for row in mates)

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
        bench, ckpt = self.bench, self.bench.model.ckpt
        with self.faults():
            if not ckpt.exists():
                why = f"{ckpt}: no such file{download_hint(ckpt)}; {{gflops_only}} needs no weights"
                raise SettingError("ckpt", why, "gflops_only")
            bench.need(bench.protocol.data.get("file"))
            measures = bench.measures if self.measured else []
            n = len(bench.prompts) * bench.protocol.repeats
            for measure in measures:
                if n < measure.least:
                    columns = ", ".join(name for name in bench.columns if name in measure.columns)
                    raise SettingError("count", f"{columns}: at least {measure.least} images are needed; got {n}")
            self.gflops(needed=True)
            bench.model.check()
            _ = self.folder

    def find(self) -> RowResult:
        """The row with all that is there; if it can't be run, a remark says why.
        Raises SettingError: `runs`: a file that is there is damaged."""
        results, timing, remarks = {}, None, []
        try:
            with self.faults():
                timing = read_timing(self.timing) if self.bench.has("cost") else None
                results = self.results() if self.measured and self.finished else {}
        except SettingError as error:
            if error.setting == "runs":
                raise
            remarks.append(remark(error))
        return self.result(results, timing, remarks, needed=False)

    def make(self, timed_images: int) -> RowResult:
        """The row; what is missing is made. `timed_images`: how many images are to be timed, at least.
        Raises SettingError: the row can't be made."""
        results, timing, device = {}, None, self.bench.sources.device
        with self.faults(), fault_of("runs", (OSError,)):
            if self.measured:
                if not self.finished:
                    make(self.request, self.folder, Process(0, 1, find_device(device)))
                results = self.results()
                for measure in self.bench.measures:
                    if measure.name not in results:
                        results[measure.name] = measure.compute(self.folder)
                        results[measure.name].write(self.result_file(measure))
            if self.bench.has("cost"):
                timing = read_timing(self.timing)
                if timed_images > (len(timing.seconds) if timing else 0):
                    timing = timed(self.request, device, timed_images, self.timing)
        return self.result(results, timing, [], needed=True)

    def result_file(self, measure: Measure) -> Path:
        """The file of a measure's result; the images must be there."""
        digest = json_sha256([measure.depends, file_sha256(self.folder / MANIFEST)])[:SHORT]
        return self.folder / f"{measure.name}-{digest}.json"

    def results(self) -> dict[str, Result]:
        """The results that are there, by measure; the images must be. Raises SettingError: `runs`: a damaged file."""
        files = {measure.name: self.result_file(measure) for measure in self.bench.measures}
        with fault_of("runs", (ResultError,)):
            return {name: read_result(file) for name, file in files.items() if file.is_file()}

    def gflops(self, needed: bool) -> tuple[dict[str, Cell], str]:
        """The GFLOPs, and what is missing of them. Raises SettingError: they are needed, and the row can't be run."""
        if self.row.missing and not self.row.steps:
            return {}, ""
        try:
            with self.faults():
                macs, why = gflops(self.bench.protocol, self.row, self.bench.model)
        except SettingError as error:
            if needed:
                raise
            return {}, remark(error)
        return {} if macs is None else {"gflops": (macs, None)}, why

    def result(
        self, results: Mapping[str, Result], timing: Timing | None, remarks: Sequence[str], needed: bool
    ) -> RowResult:
        """The row of these results; `needed`: a row that can't be run is an error."""
        row, bench = self.row, self.bench
        counted, why = self.gflops(needed) if "gflops" in bench.columns else ({}, "")
        cells = counted | self.measured_cells(results, timing)
        if "ftc" in bench.columns and {*FTC} <= cells.keys() and cells["clip_score"][0]:
            fid, score, each = (cells[name][0] for name in FTC)
            cells["ftc"] = (fid * each / score, None)
        done = bool(results or timing or (cells and (row.costs_only or bench.columns == ["gflops"])))
        remarks = list(dict.fromkeys(filter(None, (self.missing or row.costs_only, why, *remarks))))
        remarks = remarks or ([] if done else [NOT_RUN])
        made = [result.samples.get("weights") for result in results.values()]
        weights = next(filter(None, made), timing and timing.weights)
        about = {"weights": weights, "protocol": bench.protocol.name if cells else None}
        for result in [*results.values()][:1]:
            about |= {"n": result.protocol["n"], "protocol_sha256": result.samples.get("protocol_sha256")}
        reasons = reasons_unlike(bench, weights, timing)
        if counted and why:  # only a part is counted
            reasons["gflops"] = why
        unlike = {name: why for name, why in reasons.items() if name in cells and name in row.paper}
        model = bench.model.ckpt.parent.name if cells and bench.world != "coco" else ""
        more = {"bench": bench, "results": results, "timing": timing, "remarks": remarks, "done": done}
        return RowResult(row, cells, "; ".join(remarks), unlike, about, model, **more)

    def measured_cells(self, results: Mapping[str, Result], timing: Timing | None) -> dict[str, Cell]:
        """What results and timing say of the columns."""
        cells = {}
        for measure in self.bench.measures if results else []:
            values = results[measure.name].values if measure.name in results else {}
            for column, name in measure.columns.items():
                if values.get(name) is not None:
                    cells[column] = values[name], values.get(f"{name}_interval")
        cells |= {name: (value, None) for name, value in (cost_values(timing) if timing else {}).items()}
        return {name: cell for name, cell in cells.items() if name in self.bench.columns}


def remark(error: SettingError) -> str:
    return error.problem if error.setting == "table" else str(error)


# The measures of a protocol: the columns that they fill, what their results depend on, and how they are computed.

PAPERS_NETWORK, PAPERS_SCORE = "inception-2015", "hessel-b32"
SPELT = {"efficientnet-lite0": "EfficientNet-lite0"}
# Names of columns that are measured with another network.
OTHER_HEADS = {"fid": "Fréchet distance", "sfid": "spatial Fréchet distance", "inception_score": "class score"}
OTHER_HEADS |= {name: name for name in ("precision", "recall")}
ADM = ("sfid", "inception_score", "precision", "recall")  # columns that only the ADM suite has
RESAMPLES = 100  # for intervals of Fréchet distances
REAL_TIER, RANK = 2, 5
COCO, EMOJI = "https://cocodataset.org/#download, unpacked there", "python scripts/prepare_emoji.py --out data/emoji64"
HOW_TO_GET = {
    "val2017": f"val2017.zip of {COCO}",
    "val2014": f"val2014.zip of {COCO}",
    "captions_val2017.json": f"annotations_trainval2017.zip of {COCO}",
    "captions_val2014.json": f"annotations_trainval2014.zip of {COCO}",
    "VIRTUAL_imagenet256_labeled.npz": "the reference batch of ImageNet 256 x 256 that is published with "
    "github.com/openai/guided-diffusion",
    "captions.json": f"{EMOJI} makes it",
    "pictures.npy": f"{EMOJI} makes it",
}


@dataclass(frozen=True)
class Measure:
    """One measure, ready to be computed."""

    name: str  # names its result's file
    columns: Mapping[str, str]  # column -> name of its value in a result
    depends: Mapping[str, Any]  # what results depend on beside the images, JSON values
    least: int  # how many images it needs
    compute: Callable[[Path], Result]  # folder of a run -> result


def distance_measure(bench: Bench, suite: bool) -> Measure:
    """The Fréchet distance from the protocol's real images, or with `suite` all of the ADM suite."""
    protocol, (name, resize) = bench.protocol, network_of(bench.protocol)
    if not name:
        raise SettingError("metrics", "needs fid or adm, which say the network of Fréchet distances")
    for kind, given, accepted in (("extractor", name, EXTRACTORS), ("resize", resize, RECIPES)):
        if given not in accepted:
            raise SettingError("metrics", f"there is no {kind} {given!r}; accepted: {', '.join(accepted)}")
    bench.need(protocol.metrics.get("reference", protocol.data.get("pictures")))
    with fault_of("inception"):
        extractor = load_extractor(name, bench.sources.inception, resize, bench.sources.device)
    with fault_of("data"):
        source = reference_images(protocol, bench.data)
        statistics = isinstance(source, Path) and source.suffix == ".npz"
        images = open_images(source) if isinstance(source, Path) and not statistics else source
        sha256 = file_sha256(source) if statistics else images.sha256()

    @cache
    def reference() -> frechet.Reference:
        more = {"keep": True, "spatial": True} if suite else {"cache": bench.runs}
        with fault_of("data"):
            return frechet.load_reference(source, extractor, batch_size=BATCH, **more)

    def compute(run: Path) -> Result:
        how = {"extractor": extractor, "batch_size": BATCH, "bootstrap": RESAMPLES}
        return frechet.compute(run / SAMPLES, reference(), suite=suite, **how)

    columns = {"fid": "fid_real"} | ({"sfid": "sfid_real", **{name: name for name in ADM[1:]}} if suite else {})
    depends = network_fields(extractor) | {"reference": sha256}
    return Measure("adm" if suite else "fid", columns, depends, frechet.NEIGHBOURS + 1 if suite else 2, compute)


def score_measure(bench: Bench) -> Measure:
    """The CLIP-score of the protocol's first variant."""
    variant = bench.protocol.metrics["clip_score"][0]
    published, name = clip_score.find_variant(variant).model, f"clip_score_{variant}"
    if bench.sources.clip is None:
        needed = f"a folder with config.json and weights of {published}, from huggingface.co"
        raise SettingError("clip", f"needed for CLIP-score: {needed}")
    model = clip_score.load_variant(variant, bench.sources.clip, device=bench.sources.device)
    depends = {"measure": name, "features_sha256": file_sha256(model.weights)}
    compute = partial(clip_score.compute, variant=variant, weights=model, batch_size=BATCH)
    return Measure("clip_score", {"clip_score": name}, depends, 1, lambda run: compute(run / SAMPLES))


def preference_measure(bench: Bench, model: str) -> Measure:
    """A model's mean score of preference; its column is called as its field of the sources."""
    name = model.replace("-", "_")
    try:
        scorer = preference.load_scorer(model, getattr(bench.sources, name))
    except SettingError as error:
        raise error.moved(name) from error
    depends = {"measure": name, "features_sha256": file_sha256(scorer.file)}
    compute = partial(preference.compute, model=model, weights=scorer)
    return Measure(name, {name: name}, depends, 1, lambda run: compute(run / SAMPLES))


def retrieval_measure(bench: Bench) -> Measure:
    """Concept retrieval against the real images of tiers 1 and 2."""
    if "pictures" not in bench.protocol.data:
        raise SettingError("metrics", "needs clip_score, or data with images in which concepts can be found")
    files = [bench.protocol.data[name] for name in ("pictures", "file")]
    for file in files:
        bench.need(file)
    extractor = load_extractor(retrieval.FEATURES, device="cpu")
    how = {"tier": REAL_TIER, "extractor": extractor, "batch_size": BATCH}
    real = cache(partial(retrieval.load_real_images, bench.data, **how))
    depends = network_fields(extractor) | {"real": file_sha256(*(bench.data / file for file in files))}
    columns, depends = {"clip_score": f"R@{RANK}"}, depends | {"tier": REAL_TIER}
    return Measure("retrieval", columns, depends, 1, lambda run: retrieval.compute(run, real(), rank=RANK))


def network_of(protocol: Protocol) -> tuple[str, str]:
    """The network of Fréchet distances and its resize; of a protocol that has none, two empty texts."""
    metrics = protocol.metrics
    extractor, _, resize = (metrics.get("adm") or metrics.get("fid") or [""])[0].partition("/")
    return extractor, resize


def heads(protocol: Protocol) -> dict[str, str]:
    """Columns that are another measure here than in the paper, with their names."""
    network, found = network_of(protocol)[0], {}
    scored = protocol.metrics.get("clip_score")
    if network not in ("", PAPERS_NETWORK):
        found = {name: f"{head} ({SPELT.get(network, network)})" for name, head in OTHER_HEADS.items()}
    if not scored:
        found["clip_score"] = f"concept retrieval R@{RANK}"
    elif scored[0] != PAPERS_SCORE:
        found["clip_score"] = f"CLIP-score ({scored[0]})"
    if found:
        found["ftc"] = f"distance × s / {'CLIP' if scored else f'R@{RANK}'}"
    return found


# A whole table


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
        count: prompts of each row; None = all of the protocol's. timed: images of each row that are timed.
        gflops_only: only the GFLOPs, which need no weights. show: make nothing.
        say: told of each row before it is made.

    Raises SettingError: it names an argument, or a field of `sources`, that can't be used.
    """
    columns = ["gflops"] if gflops_only else table.columns
    if columns[0] not in table.columns:
        raise SettingError("gflops_only", f"{table.name} has no GFLOPs; it has {', '.join(table.columns)}")
    if numbers and (gflops_only or show):
        raise SettingError("rows", "they say which rows are made; none is where rows are only counted or shown")
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
            rows.append(job.result({}, None, [], needed=True))
        elif job in to_make:
            if job.measured and not job.finished:
                say(f"{job.row.name}: {job.command()}")
            rows.append(job.make(timed))
        else:
            rows.append(job.find())
    check_comparable(rows)
    can_run = [row for job, row in zip(jobs, rows, strict=True) if not job.missing]
    if can_run and not any(row.done for row in can_run):
        reasons = "; ".join(dict.fromkeys(remark for row in can_run for remark in row.remarks))
        raise SettingError("table", f"no row of {table.name} is finished in {runs}: {reasons}")
    stem = f"{table.name}-{world}{'' if count is None else f'-{count}'}{'-gflops' if gflops_only else ''}"
    below = notes(rows, world, columns)
    return RenderedTable(table, world, columns, rows, below, column_heads([row.bench for row in rows]), stem)


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
    benches = {}
    for name, protocol in protocols.items():
        if other := next((of for of, two in protocols.items() if two.name == protocol.name and two != protocol), None):
            raise SettingError("table", f"{name} and {other} are two protocols of one name; expected each with its own")
        files = dict(zip(("config", "ckpt"), protocol.model() or (None, None), strict=True))
        if not protocol.cascade:  # its stages are files of the protocol
            files = {setting: getattr(sources, setting) or file for setting, file in files.items()}
        if needed := [setting for setting, file in files.items() if file is None]:
            raise SettingError(needed[0], f"needed: protocol {protocol.name} names no model")
        folder = runs / f"{protocol.name}{'' if count is None else f'-{count}'}"
        config, ckpt = in_run(files["config"], "config.yaml"), in_run(files["ckpt"], "last.ckpt")
        model = files_of(protocol, Path(config), Path(ckpt))
        benches[name] = Bench(table, world, protocol, name, count, model, columns, sources, folder)
    return [Job(row, benches[name]) for row, name in zip(rows, named, strict=True)]


def check_comparable(rows: Sequence[RowResult]) -> None:
    """Rows of one protocol may stand in one table only if they were measured and timed alike.
    Raises SettingError: `runs`: they were not."""
    for bench in {id(row.bench): row.bench for row in rows}.values():
        own = {row.spec.name: row for row in rows if row.bench is bench}
        compare_timings({name: row.timing for name, row in own.items() if row.timing})
        with fault_of("runs", (ResultError,)):
            for measure in {measure for row in own.values() for measure in row.results}:
                comparable({name: row.results[measure] for name, row in own.items() if measure in row.results})


# Where our numbers and the paper's are of something else

GPU, PRECISION = "A40", "autocast"  # the paper's seconds and memory, as PyTorch and we name them
COUNTED = (
    "GFLOPs, the paper's word, are GMAC of the UNet in its count (fvcore's: one product of attention; norms and "
    "upsampling by element), two predictions a step where there is guidance; neither first stage nor text "
    "encoder. All other GMAC of this project are in the exact count; evaluation/cost.py prints both."
)
INSTEAD = ", other measures. Its Fréchet distance is not an FID and R@5 is no CLIP-score"


def reasons_unlike(bench: Bench, weights: str | None, timing: Timing | None) -> dict[str, str]:
    """Columns in which ours is of something else than the paper's number, with the reason. `weights`: hash of the
    model's; None = no images and no timing. `timing`: of the row, if there is one."""
    if bench.world != "coco":
        return dict.fromkeys(COLUMNS, "another model")
    config, model = other_model(bench, weights)
    usual, count, machine = bench.usual.select.count, "", ""
    if bench.count not in (None, usual):
        count = f"of {bench.count} prompts, where {bench.protocol.name} has {usual or 'all'}"
    if timing and not (GPU in timing.machine.split() and timing.precision == PRECISION):
        how = f"on {timing.machine} in {timing.precision} precision"
        machine = f"timed {how}, the paper's on an {GPU} in half precision"
    why = {"quality": model or count, "cost": model or machine, "count": config}
    other = dict.fromkeys(heads(bench.protocol), "another measure")
    found = {
        name: bench.table.apart.get(name) or why.get(column.kind) or other.get(name, "")
        for name, column in COLUMNS.items()
    }
    found["ftc"] = found["ftc"] or next((found[part] for part in FTC if found[part]), "")
    return {name: reason for name, reason in found.items() if reason}


def other_model(bench: Bench, weights: str | None) -> tuple[str, str]:
    """How config, and config or weights, differ from the protocol's: by content where that is known, else by path."""

    def content(path: Path) -> str | None:
        return model.fingerprint(path) if path.exists() else None

    usual, name, model = bench.protocol.model(), bench.protocol.name, bench.model
    if usual is None or (model.config != usual[0] and content(model.config) != content(usual[0])):
        return (f"another config than {name}'s",) * 2
    expected = published_sha256(usual[1]) or content(usual[1])
    same = weights == expected if weights and expected else model.ckpt == usual[1]
    return "", "" if same else f"other weights than {name}'s"


def notes(rows: Sequence[RowResult], world: str, columns: Sequence[str]) -> list[str]:
    """What the numbers are of, in words."""
    found = [COUNTED] if "gflops" in columns else []
    if world == "emoji":
        found.append(other_world([row.bench for row in rows]))
    else:  # why there is no difference from the paper's number, for each reason
        names, reasons = column_heads([row.bench for row in rows]), {}
        for column in columns:
            for why in dict.fromkeys(row.unlike[column] for row in rows if column in row.unlike):
                reasons.setdefault(why, []).append(names[column])
        found += [f"No difference from the paper in {', '.join(of)}: {why}." for why, of in reasons.items()]
    for result in (result for row in rows for result in row.results.values()):
        found += [measured(result), *(f"Warning: {warning}." for warning in result.warnings)]
    found += [timed_how(row.timing) for row in rows if row.timing]
    return list(dict.fromkeys(found))


def other_world(benches: Sequence[Bench]) -> str:
    """What the emoji world's numbers are of; where only one measure is another the heads say it."""
    names = ", ".join(dict.fromkeys(bench.protocol.name for bench in benches))
    measures = INSTEAD if any({"fid", "clip_score"} <= heads(bench.protocol).keys() for bench in benches) else ""
    return (
        f"World emoji: another model{measures}; a row that begins with its name was run with it in the place of "
        f"the paper's, at the guidance of {names}."
    )


def column_heads(benches: Sequence[Bench]) -> dict[str, str]:
    """The names of columns; of one that is another measure in some row, all its names."""
    others = [heads(bench.protocol) for bench in benches]
    return {
        name: " or ".join(dict.fromkeys(other.get(name, column.head) for other in others))
        for name, column in COLUMNS.items()
    }


def measured(result: Result) -> str:
    by = ", ".join(result.protocol[name] for name in ("measure", "extractor", "resize") if name in result.protocol)
    made, n = result.samples, result.protocol["n"]
    model = f"{made.get('ckpt')} ({made.get('weights', '')[:SHORT]})"
    protocol = f"{made.get('name')} ({(made.get('protocol_sha256') or '')[:SHORT]})"
    intervals = any(name.endswith("_interval") for name in result.values)
    end = "; parentheses: 95 % intervals." if intervals else "."
    return f"{by}: N = {n} images of {model}, protocol {protocol}{end}"


def timed_how(timing: Timing) -> str:
    return (
        f"Seconds: median of {len(timing.seconds)} images, one at a time, after two untimed; "
        f"{timing.machine}, threads: {timing.threads}, {timing.precision} precision, {timing.date}, "
        f"weights {timing.weights[:SHORT]}."
    )
