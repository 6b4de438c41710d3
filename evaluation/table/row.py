"""One row of a table: its images, results and costs, found in files or made.

Files are named by a hash of what they depend on: a run by protocol, prompts, model and method; a result by the images
and the measure with its networks and real images. So what is found is the row's own; other numbers are in other files.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

from evaluation.metrics import adm, clip_score, frechet, preference, retrieval
from evaluation.metrics.extractors import EXTRACTORS, RECIPES, load_extractor, network_fields
from evaluation.metrics.preference import MODELS
from evaluation.metrics.result import Result, ResultError, read_result
from evaluation.metrics.statistics import load_reference
from evaluation.protocols.protocol import Prompt, Protocol, chosen_prompts
from evaluation.runs.folder import CARD, MANIFEST
from evaluation.runs.generate import ModelFiles, Process, Request, make, prepare
from evaluation.runs.images import open_images, reference_images
from evaluation.table.cost import Timing, cost_values, gflops, read_timing, timed
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
        return prepare(bench.protocol, self.row.method(bench.protocol), bench.model, bench.prompts, bench.data)

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
    def missing(self) -> str | None:
        """Why the row can't be run; None = it can."""
        files = [path for paths in self.bench.model.added.values() for path in paths if not path.exists()]
        return self.row.missing or (f"not run: needs {files[0].name}" if files else None)

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
    if job.row.missing and not job.row.steps:
        return {}, ""
    try:
        with job.faults():
            macs = gflops(bench.protocol, job.row, bench.model.config, bench.model.ckpt)
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
    found = list(dict.fromkeys(filter(None, (job.missing or row.costs_only, why, *remarks))))
    return RowResult(row, job.bench, cells, results, timing, found or ([] if done else [NOT_RUN]), done)


# The measures of a protocol: the columns that they fill, what their results depend on, and how they are computed.


PAPERS_NETWORK, PAPERS_SCORE = "inception-2015", "hessel-b32"
SPELT = {"efficientnet-lite0": "EfficientNet-lite0"}
OTHER_HEADS = {
    "fid": "Fréchet distance",
    "sfid": "spatial Fréchet distance",
    "inception_score": "class score",
    "precision": "precision",
    "recall": "recall",
}  # names of columns that are measured with another network
ADM = ("sfid", "inception_score", "precision", "recall")  # columns that only the ADM suite has
RESAMPLES = 100  # for intervals of Fréchet distances
REAL_TIER, RANK = 2, 5
BATCH = 50


@dataclass(frozen=True)
class Sources:
    """Where models, data and networks are; None = as the protocol says, or as is usual.

    config, ckpt: the model's files. data: the folder of the protocol's data.
    inception:    weights of the network of Fréchet distances. clip: folder of the CLIP model.
    image_reward, pick_score: see `evaluation.metrics.preference.MODELS`.
    device:       name of a device.
    """

    data: str | None = None
    config: str | None = None
    ckpt: str | None = None
    inception: str | None = None
    clip: str | None = None
    image_reward: str | None = None
    pick_score: str | None = None
    device: str = "auto"


@dataclass(frozen=True)
class Measure:
    """One measure, ready to be computed.

    name:    names its result's file.
    columns: column -> name of its value in a result.
    depends: what results depend on beside the images, JSON values.
    least:   how many images it needs.
    compute: folder of a run -> result.
    """

    name: str
    columns: Mapping[str, str]
    depends: Mapping[str, Any]
    least: int
    compute: Callable[[Path], Result]


def measures_of(protocol: Protocol, data: Path, columns: Sequence[str], sources: Sources, cache: Path) -> list[Measure]:
    """The measures that fill these columns under a protocol.

    Args:
        data: the folder of the protocol's data.
        cache: folder that keeps statistics of reference images.

    Raises SettingError: `metrics`: the protocol does not say how to measure; `data`, `inception` or `clip`: what a
    measure needs is not there, or can't be used.
    """
    found = []
    if any(name in columns for name in ("fid", *ADM)):
        found.append(distance_measure(protocol, data, sources, cache, suite=any(name in columns for name in ADM)))
    found += [preference_measure(model, sources) for model in MODELS if model.replace("-", "_") in columns]
    if "clip_score" in columns:
        scored = "clip_score" in protocol.metrics
        found.append(score_measure(protocol, sources) if scored else retrieval_measure(protocol, data))
    return found


def distance_measure(protocol: Protocol, data: Path, sources: Sources, statistics: Path, suite: bool) -> Measure:
    """The Fréchet distance from the protocol's real images, or with `suite` all of the ADM suite."""
    name, resize = network_of(protocol)
    if not name:
        raise SettingError("metrics", "needs fid or adm, which say the network of Fréchet distances")
    for kind, given, accepted in (("extractor", name, EXTRACTORS), ("resize", resize, RECIPES)):
        if given not in accepted:
            raise SettingError("metrics", f"there is no {kind} {given!r}; accepted: {', '.join(accepted)}")
    need(protocol, data, protocol.metrics.get("reference", protocol.data.get("pictures")))
    with fault_of("inception"):
        extractor = load_extractor(name, sources.inception, resize, sources.device)
    with fault_of("data"):
        source = reference_images(protocol, data)
        if isinstance(source, Path) and source.suffix == ".npz":
            sha256 = file_sha256(source)
        else:
            sha256 = (open_images(source) if isinstance(source, Path) else source).sha256()

    @cache
    def reference() -> Any:
        with fault_of("data"):
            if suite:
                return adm.suite_reference(source, extractor, BATCH)
            return load_reference(source, extractor, batch_size=BATCH, cache=statistics)

    def compute(run: Path) -> Result:
        measure = adm.compute if suite else frechet.compute
        return measure(run / "samples", reference(), extractor=extractor, batch_size=BATCH, bootstrap=RESAMPLES)

    columns = {"fid": "fid_real"} | ({"sfid": "sfid_real", **{name: name for name in ADM[1:]}} if suite else {})
    depends = network_fields(extractor) | {"reference": sha256}
    return Measure("adm" if suite else "fid", columns, depends, adm.NEIGHBOURS + 1 if suite else 2, compute)


def score_measure(protocol: Protocol, sources: Sources) -> Measure:
    """The CLIP-score of the protocol's first variant."""
    variant = protocol.metrics["clip_score"][0]
    published = clip_score.find_variant(variant).model
    if sources.clip is None:
        raise SettingError(
            "clip", f"needed for CLIP-score: a folder with config.json and weights of {published}, from huggingface.co"
        )
    model = clip_score.load_variant(variant, sources.clip, device=sources.device)
    name = f"clip_score_{variant}"
    depends = {"measure": name, "features_sha256": file_sha256(model.weights)}

    def compute(run: Path) -> Result:
        return clip_score.compute(run / "samples", variant=variant, weights=model, batch_size=BATCH)

    return Measure("clip_score", {"clip_score": name}, depends, 1, compute)


def preference_measure(model: str, sources: Sources) -> Measure:
    """A model's mean score of preference; its column is called as its field of the sources."""
    name = model.replace("-", "_")
    try:
        scorer = preference.load_scorer(model, getattr(sources, name))
    except SettingError as error:
        raise SettingError(name, error.problem) from error
    depends = {"measure": name, "features_sha256": file_sha256(scorer.file)}
    compute = partial(preference.compute, model=model, weights=scorer)
    return Measure(name, {name: name}, depends, 1, lambda run: compute(run / "samples"))


def retrieval_measure(protocol: Protocol, data: Path) -> Measure:
    """Concept retrieval against the real images of tiers 1 and 2."""
    if "pictures" not in protocol.data:
        raise SettingError("metrics", "needs clip_score, or data with images in which concepts can be found")
    files = [protocol.data[name] for name in ("pictures", "file")]
    for file in files:
        need(protocol, data, file)
    extractor = load_extractor(retrieval.FEATURES, device="cpu")

    @cache
    def real() -> retrieval.RealImages:
        return retrieval.load_real_images(data, tier=REAL_TIER, extractor=extractor, batch_size=BATCH)

    def compute(run: Path) -> Result:
        return retrieval.compute(run, real(), rank=RANK)

    depends = network_fields(extractor) | {"real": file_sha256(*(data / file for file in files)), "tier": REAL_TIER}
    return Measure("retrieval", {"clip_score": f"R@{RANK}"}, depends, 1, compute)


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


# The data

HOW_TO_GET = {
    "val2017": "val2017.zip of https://cocodataset.org/#download, unpacked there",
    "val2014": "val2014.zip of https://cocodataset.org/#download, unpacked there",
    "captions_val2017.json": "annotations_trainval2017.zip of https://cocodataset.org/#download, unpacked there",
    "captions_val2014.json": "annotations_trainval2014.zip of https://cocodataset.org/#download, unpacked there",
    "VIRTUAL_imagenet256_labeled.npz": "the reference batch of ImageNet 256 x 256 that is published with "
    "github.com/openai/guided-diffusion",
    "captions.json": "python scripts/prepare_emoji.py --out data/emoji64 makes it",
    "pictures.npy": "python scripts/prepare_emoji.py --out data/emoji64 makes it",
}


def need(protocol: Protocol, data: Path, name: str | None) -> None:
    """Check that a file or folder of the data is there.
    Raises SettingError: `data`: it is not there; the message says how to get it."""
    if name is not None and not (data / name).exists():
        how = HOW_TO_GET.get((data / name).name, "named by the protocol")
        raise SettingError("data", f"{data / name} is not there, which {protocol.name} needs: {how}")
