"""The images that a protocol asks for, made by one method of one model, in a folder that proves that they are there.

    run = generate.compute(load_protocol("emoji64"), Method(plan="faster-diffusion"), out="outputs/fast")

An image depends on the protocol, its prompt, the number of its repeat, the model and the method: not on the number of
processes, nor on where a run was stopped. The folder of a run has

    run.json          the run card: protocol, method, weights, versions
    prompts.jsonl     the prompts, in order
    samples/          ID-REPEAT.png
    journal/          a file for each process: a line for each image, with its SHA-256, written before the image
    manifest.jsonl    a line for each image, in order, with its SHA-256; written when all images are there

Any number of processes write into it without talking to each other: each makes its own share, and the one that finds
all images there writes the manifest.
"""

from __future__ import annotations

import hashlib
import json
import platform
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pydantic import ConfigDict
from tqdm import tqdm

from evaluation.protocols.protocol import Amount, Method, Prompt, Protocol, Side, chosen_prompts
from evaluation.runs.control import controlled
from evaluation.runs.images import reading
from evaluation.runs.models import ModelFiles, files_of, of_protocol, stages_of
from ldm.cli.cascade import Cascade, load_cascade
from ldm.cli.deepfloyd import StageSettings
from ldm.cli.parser import PACKAGE, installed
from ldm.cli.settings import SamplingSettings
from ldm.cli.setup import CONSTRUCTION, Setup, check_memory, find_device, make_plan, make_recipe, with_fixed_batches
from ldm.io.errors import SettingError, fault_of
from ldm.io.files import (
    Schema,
    Seed,
    atomic_write,
    clean,
    file_sha256,
    flat,
    json_sha256,
    parse,
    parse_json_lines,
    read_bytes,
    read_json,
    write_file,
    write_json,
)
from ldm.io.images import opened, png_bytes, read_png
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.diffusion.propagation.load import RunFacts
from ldm.models.diffusion.propagation.plan import AnyPlan, check_blocks
from ldm.sampling.engine import Engine, Recipe, Task, num_nodes
from ldm.sampling.generate import Item, Sample, append_line, fill, read_manifest
from ldm.sampling.task import Network, class_condition, text_for
from ldm.sampling.video import Motion, frames_task, whole_videos

BATCH = 16
# Last digits depend on how much is computed at a time, and by how many threads: on a CPU both are fixed, so that files
# do not depend on them. Larger batches gain nothing there, nor do threads where there can be processes.
CPU_BATCH, CPU_LATENTS, CPU_THREADS = 8, 512, 1  # most images, most positions of their latents
PACKAGES = (PACKAGE, "torch", "numpy", "pillow", "tokenizers")
CARD, PROMPTS, SAMPLES, JOURNAL, MANIFEST = "run.json", "prompts.jsonl", "samples", "journal", "manifest.jsonl"
NPZ = "samples.npz"
MAY_DIFFER = ("name", "metrics", "versions")  # in run cards of one run
SHOWN = 5  # of what differs or is wrong, how much a message names
Card = Mapping[str, Any]


@dataclass(frozen=True)
class OneModel:
    """Sampling by one model: the method for it, as recipe and plan; decoder batches are chosen when it runs."""

    recipe: Recipe
    plan: AnyPlan

    @property
    def measures(self) -> bool:
        """Whether an image's record says its own error."""
        return self.plan.measures

    def settings(self) -> dict[str, Any]:
        """What images depend on, as JSON values."""
        return self.recipe.settings() | self.plan.settings()

    def load(self, request: Request, device: torch.device, batch: int) -> Engine:
        """The model, ready to make the images, `batch` at a time.
        Raises SettingError: the files do not make a model, or it can't do what is asked."""
        files, recipe, plan, setup = request.model, self.recipe, self.plan, request.model.setup(device)
        model = setup.load()
        unet = model.model.diffusion_model
        with fault_of("tome"):
            unet.check_merging(recipe.tome)
        with fault_of("plan"):
            check_blocks(plan, len(unet.output_blocks))
        with fault_of("config", CONSTRUCTION):
            task = task_of(request, self, model, setup)
            engine = Engine(model, files.sizes, recipe, plan, task, setup.autocast)
        check_memory(engine, batch, device)
        engine.pack()
        return with_fixed_batches(engine, request.method.parallel, batch)


@dataclass(frozen=True)
class InStages:
    """Sampling by the stages of DeepFloyd-IF, one after the other."""

    stages: StageSettings

    measures = False

    def settings(self) -> dict[str, Any]:
        """What images depend on, as JSON values, but for the files."""
        kept = ("stages", "steps", "scales", "plans", "noise_levels", "sampler", "seed")
        return {name: value for name in kept if (value := getattr(self.stages, name))}

    def load(self, request: Request, device: torch.device, batch: int) -> Cascade:
        """The stages, ready to make the images. Raises SettingError: see `load_cascade`."""
        with of_protocol():
            return load_cascade(replace(self.stages, device=str(device)), device, batch)


@dataclass(frozen=True)
class Request:
    """What is to be made: all that is known before the model is loaded; `prepare` makes it."""

    protocol: Protocol
    prompts: Sequence[Prompt]
    method: Method
    model: ModelFiles
    way: OneModel | InStages
    data: Path  # the folder of the protocol's data

    @cached_property
    def asked(self) -> dict[str, Any]:
        """What the images have in common with those of other methods, as JSON values."""
        return self.protocol.asked() | {"prompts_sha256": prompts_sha256(self.prompts)}

    @cached_property
    def sha256(self) -> str:
        """Names the images: a hash of all that they depend on, but for the device and what is computed at a time."""
        model, others = self.model, [self.model.added_sha256] if self.model.added else []
        return json_sha256([self.asked, self.way.settings(), model.sha256, model.weights, model.precision, *others])


@dataclass(frozen=True)
class Process:
    """Process `rank` of 0..world_size-1."""

    rank: int
    world_size: int
    device: torch.device

    def __str__(self) -> str:
        return f"{self.rank}-of-{self.world_size}"


@dataclass(frozen=True)
class Run:
    """A run after this process has made its share."""

    folder: RunFolder
    made: int  # images, now
    found: int
    replaced: int  # of those made, how many took the place of a damaged file
    complete: bool  # all images of the run are there
    notes: Sequence[str] = ()  # what to bear in mind, in words

    @property
    def images(self) -> Path:
        return self.folder.path / SAMPLES


def compute(
    protocol: Protocol,
    method: Method | None = None,
    model: ModelFiles | None = None,
    *,
    out: str | Path,
    data: str | Path | None = None,
    batch_size: int | None = None,
    process: Process | None = None,
) -> Run:
    """Make the images of a protocol, or those that are missing in the folder.

    Args:
        method: None = the protocol's sampler and steps, without encoder propagation.
        model: None = the protocol's.
        out: folder of the run.
        data: folder of the protocol's data; None = its own.
        batch_size: images at a time on a GPU; None = as the folder says, or 16. On a CPU it is fixed.
        process: which share of the run this process makes, and where; None = all of it, on the best device.

    Raises SettingError: it names the argument, or the field of `method` or `model`, that can't be used.
    """
    if model is None:
        files = protocol.model()
        if files is None:
            raise SettingError("model", f"needed: protocol {protocol.name} names none")
        model = files_of(protocol, *files)
    model.check()
    request = prepare(protocol, method or protocol.method(), model, chosen_prompts(protocol, data), data)
    return make(request, Path(out), process or Process(0, 1, find_device("auto")), batch_size)


# Before the model is loaded


def prepare(
    protocol: Protocol, method: Method, model: ModelFiles, prompts: Sequence[Prompt], data: str | Path | None = None
) -> Request:
    """What is to be made; the weights need not be there. Raises SettingError: see `compute`."""
    if protocol.cascade:
        way = InStages(stages_of(protocol, method, model))
        return Request(protocol, prompts, method, model, way, protocol.folder(data))
    sizes = model.sizes
    if protocol.size % sizes.multiple:
        fitting = f"this model's must be a multiple of {sizes.multiple}"
        raise SettingError("protocol", f"its images have {protocol.size} px; {fitting}")
    recipe, timesteps = recipe_of(protocol, method), model.content.model.params.get("timesteps", 1000)
    plan = plan_of(recipe, method, model.ckpt, timesteps, video=protocol.video is True)
    return Request(protocol, prompts, method, model, OneModel(recipe, plan), protocol.folder(data))


def recipe_of(protocol: Protocol, method: Method) -> Recipe:
    """How images of the protocol are sampled. Raises SettingError: see `make_recipe`."""
    settings = SamplingSettings(**asdict(method), scale=protocol.guidance)
    return make_recipe(settings, (protocol.size, protocol.size))


def plan_of(recipe: Recipe, method: Method, ckpt: Path, timesteps: int = 1000, video: bool = False) -> AnyPlan:
    """The plan of a run. `ckpt`: the model's weights, beside which its calibrations lie; read only by a plan that names
    its model. `timesteps`: the model's. `video`: it is for the steps of all frames. Raises SettingError: a number of
    steps, or a plan, that can't be used."""
    with fault_of("steps" if recipe.timesteps_at is None else "timesteps_at"):
        nodes = num_nodes(recipe, timesteps)
        kept = nodes - Motion.of(nodes).first_node(nodes) if video else nodes
    facts = RunFacts.of(recipe.solver_name, ckpt, **recipe.facts(kept / nodes))
    return make_plan(SamplingSettings(**asdict(method)), kept, facts)


def task_of(request: Request, way: OneModel, model: LatentDiffusion, setup: Setup) -> Task:
    """What the model is conditioned on, and what its network follows. Raises SettingError: it has fewer classes than
    the protocol asks for; or see `controlled`."""
    protocol = request.protocol
    if protocol.data["kind"] != "classes":
        network = controlled(protocol, request.prompts, request.data, setup) if protocol.control else Network()
        nodes = num_nodes(way.recipe, model.num_timesteps)
        task = Task(text_for(model, (protocol.size, protocol.size)), network=network)
        if protocol.video == "whole":
            return whole_videos(task, model.model.diffusion_model, protocol.repeats)
        return frames_task(task, way.recipe, nodes, Motion.of(nodes)) if protocol.video else task
    # Where a model has one class more than the data, that class stands for none.
    classes, known = protocol.data["classes"], getattr(model.cond_stage_model, "n_classes", None)
    if known is not None and known < classes:
        raise SettingError("config", f"this model has {known} classes; {protocol.name} asks for {classes}")
    absent = classes if known == classes + 1 and protocol.guidance != 1 else None
    return Task(class_condition(model.cond_stage_model, absent))


# The run


def make(request: Request, out: Path, process: Process, batch_size: int | None = None) -> Run:
    """This process's share of the images, in the folder, which is new or is continued.
    Raises SettingError: see `compute`."""
    with fault_of("out"):
        if request.protocol.video:
            batch = request.protocol.repeats  # a video
        elif request.way.measures:
            batch = 1  # an image's record says its own error
        elif process.device.type == "cpu":  # fixed by the size of the latents
            side = request.protocol.size // request.model.sizes.factor
            batch = min(CPU_BATCH, max(1, CPU_LATENTS // side**2))
        else:
            batch = batch_size or (read_card(out)["batch"] if (out / CARD).is_file() else BATCH)
    with cpu_threads(process.device):
        engine = request.way.load(request, process.device, batch)
        card = run_card(request, engine, process.device, batch)
        with fault_of("out"):
            folder = RunFolder.open(out, card, request.prompts, str(process))
        try:
            with fault_of("precision" if engine.autocast else "ckpt", (ValueError,)):
                made, found, replaced = fill_share(folder, engine, process)
            complete = folder.finish()
        except OSError as error:
            problem = f"can't write to {out}: {error.strerror or error}; what is there stays, and the same run goes on"
            raise SettingError("out", problem) from error
    notes = []
    if cut := card["captions_cut"]:
        notes.append(f"{cut} of {len(request.prompts)} captions are longer than the model reads and cut off")
    if folder.card["versions"] != card["versions"]:
        notes.append(f"begun with other versions, so last digits may differ: {folder.card['versions']}")
    return Run(folder, made, found, replaced, complete, notes)


@contextmanager
def cpu_threads(device: torch.device) -> Iterator[None]:
    """As many threads inside the block as every run on a CPU has."""
    before = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(CPU_THREADS)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def fill_share(folder: RunFolder, engine: Engine | Cascade, process: Process) -> tuple[int, int, int]:
    """This process's images: how many were made and found, and how many took the place of a damaged file."""
    made = found = replaced = 0
    items, batch = folder.items, folder.card["batch"]

    def full(part: Sequence[Item]) -> tuple[list[Image.Image], dict[str, Any]]:
        # The last batch is filled up where last digits would depend on it, see above.
        more = -len(part) % batch if folder.card["device"] == "cpu" else 0
        images, run = engine([*part, *[part[-1]] * more])
        return images[: len(part)], run

    share = sum(len(items[k : k + batch]) for k in range(process.rank * batch, len(items), process.world_size * batch))
    with tqdm(total=share, desc=str(process), unit="image", disable=True if process.rank else None) as bar:
        for image in fill(folder, items, full, batch, process.rank, process.world_size):
            made, found, replaced = made + image.fresh, found + (not image.fresh), replaced + image.replaced
            bar.update()
    return made, found, replaced


def run_card(request: Request, engine: Engine | Cascade, device: torch.device, batch: int) -> dict[str, Any]:
    """All that the images depend on, and what they were made with, as JSON values."""
    protocol, files = request.protocol, request.model
    texts = [prompt.inputs["prompt"] for prompt in request.prompts if "prompt" in prompt.inputs]
    card = {"name": protocol.name, "protocol_sha256": json_sha256(request.asked), "protocol": request.asked}
    card |= {"pictures": len(request.prompts) * protocol.repeats, "seeds": [protocol.seed], "plan": request.method.plan}
    card |= {"method": engine.settings(), "ckpt": f"{files.ckpt.parent.name}/{files.ckpt.name}", **files.sha256}
    card |= {name: [sha256[:16] for sha256 in several] for name, several in files.added_sha256.items()}
    card |= {"averaged": files.weights, "captions_cut": engine.cut(texts), "device": device.type}
    card |= {"batch": batch, "parallel": engine.parallel, "metrics": dict(protocol.metrics)}
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    versions = {"python": platform.python_version(), **{package: installed(package) for package in PACKAGES}}
    return card | {"versions": versions | {"machine": machine}}


# The folder of a run


class FolderError(ValueError):
    """A folder that is not what it should be."""


class CardProtocol(Schema):
    """What is needed of a run card's protocol; there is more."""

    model_config = ConfigDict(extra="ignore")

    prompts_sha256: str
    seed: Seed
    repeats: Amount
    size: Side


class CardFields(Schema):
    """What is needed of a run card, for the run to be continued; there is more."""

    model_config = ConfigDict(extra="ignore")

    protocol: CardProtocol
    protocol_sha256: str
    plan: str
    method: dict[str, Any]
    weights: str
    batch: Amount


def make_items(lines: Sequence[Mapping[str, Any]], seed: int, repeats: int) -> list[Item]:
    """The images of a run. Noise comes from (seed, prompt's id, repeat), wherever the prompt stands in the list."""
    return [
        Item(index, repeat, line, (seed, line["id"], repeat), (seed, line["id"], repeat))
        for index, line in enumerate(lines)
        for repeat in range(repeats)
    ]


def file_name(item: Item) -> str:
    return f"{SAMPLES}/{item.inputs['id']:08d}-{item.sample:03d}.png"


def json_lines(entries: Iterable[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries).encode()


def prompt_lines(prompts: Sequence[Prompt]) -> bytes:
    """The content of prompts.jsonl."""
    return json_lines(prompt.line() for prompt in prompts)


def prompts_sha256(prompts: Sequence[Prompt]) -> str:
    return hashlib.sha256(prompt_lines(prompts)).hexdigest()


def decisive(card: Card) -> dict[str, Any]:
    """What the images depend on."""
    return {name: value for name, value in card.items() if name not in MAY_DIFFER}


def differences(there: Card, given: Card) -> list[str]:
    """The fields in which two run cards are of different runs, with both values."""
    a, b = (
        {key: json.dumps(value, ensure_ascii=False) for key, value in flat(decisive(card)).items()}
        for card in (there, given)
    )
    both = ((key, a.get(key, "nothing"), b.get(key, "nothing")) for key in dict.fromkeys([*a, *b]))
    return [f"{key} ({one} there, {other} given)" for key, one, other in both if one != other]


def some(names: Sequence[str]) -> str:
    return "; ".join(names[:SHOWN]) + (f"; and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def read_card(folder: Path) -> dict[str, Any]:
    """The run card of a folder. Raises FolderError: there is none, or it was changed."""
    path = folder / CARD
    with reading(path, "not a run card", FolderError):
        try:
            card = read_json(path)
        except OSError as error:
            raise FolderError(f"{path}: {error.strerror}; expected the folder of a run") from error
        parse(CardFields, card)
        if json_sha256(card["protocol"]) != card["protocol_sha256"]:
            raise FolderError(f"{path}: its protocol is not the one that its hash names; the file was changed")
        return card


class RunFolder:
    """The folder of a run, for one of its processes; a `Store` for `ldm.sampling.generate.fill`.
    Raises FolderError: no run card, or not one of ours; other prompts than the card's."""

    def __init__(self, path: Path, process: str = "0-of-1") -> None:
        self.path = path
        self.journal = path / JOURNAL / f"{process}.jsonl"
        self.card = read_card(path)
        try:
            content = read_bytes(path / PROMPTS)
        except OSError as error:
            raise FolderError(f"{path / PROMPTS}: {error.strerror}") from error
        if self.card["protocol"]["prompts_sha256"] != hashlib.sha256(content).hexdigest():
            raise FolderError(f"{path / PROMPTS}: not the prompts of {CARD}; the file was changed")
        lines = [line for _, line in parse_json_lines(content.decode())]
        self._refused: set[str] = set()
        self.items = make_items(lines, self.card["protocol"]["seed"], self.card["protocol"]["repeats"])
        self.names = [file_name(item) for item in self.items]
        self.settings = {"protocol": self.card["protocol_sha256"], "run": json_sha256(decisive(self.card))}
        self.settings |= {name: self.card[name] for name in ("weights", "plan")} | self.card["method"]

    @staticmethod
    def open(path: Path, card: Card, prompts: Sequence[Prompt], process: str = "0-of-1") -> RunFolder:
        """Begin a run, or go on with it. Raises FolderError: another run is there; the message names the fields that
        differ. Or images without a run card."""
        if not (path / CARD).is_file():
            if (path / SAMPLES).exists():
                strange = f"{path} has {SAMPLES}/ but no {CARD}: images that are not from an evaluation"
                raise FolderError(f"{strange}; choose another folder")
            write_file(path / PROMPTS, prompt_lines(prompts))
            write_json(path / CARD, card, keep=True)
        if differ := differences(read_card(path), card):
            raise FolderError(f"{path} holds another run; different: {some(differ)}; choose another folder")
        (path / JOURNAL).mkdir(exist_ok=True)
        found = RunFolder(path, process)
        found._clean()
        return found

    # Store

    def find(self, item: Item) -> Sample | None:
        name = file_name(item)
        path = self.path / name
        if self._proven(name):
            return Sample(item, None, path, False, {})
        self._refused |= {name} if path.exists() else set()
        return None

    def save(self, item: Item, image: Image.Image, run: Mapping[str, Any]) -> Sample:
        name = file_name(item)
        path = self.path / name
        # How long it took is not in the file: the same image must be the same bytes.
        content = png_bytes(image, item.settings() | self.settings)
        self._list(name, hashlib.sha256(content).hexdigest(), run)
        write_file(path, content)
        return Sample(item, image, path, True, run, name in self._refused)

    def _proven(self, name: str) -> str | None:
        """The hash of an image, if a process listed it when it made the image; else None."""
        if name not in self._listed or not (self.path / name).is_file():
            return None
        sha256 = file_sha256(self.path / name)
        return sha256 if sha256 in self._listed[name] else None

    @cached_property
    def _listed(self) -> dict[str, set[str]]:
        """For each file the hashes that processes have listed so far."""
        listed: dict[str, set[str]] = {}
        for journal in sorted((self.path / JOURNAL).glob("*.jsonl")):
            for entry in read_manifest(journal):
                listed.setdefault(entry["file"], set()).add(str(entry.get("sha256")))
        return listed

    def _list(self, name: str, sha256: str, run: Mapping[str, Any]) -> None:
        append_line(self.journal, {"file": name, "sha256": sha256, **run})
        self._listed.setdefault(name, set()).add(sha256)

    # The whole run

    def finish(self) -> bool:
        """Write the manifest if every image is there; returns whether it is."""
        self.__dict__.pop("_listed", None)  # the other processes' lines of the meantime
        hashes = [self._proven(name) for name in self.names] if {*self.names} <= self._listed.keys() else [None]
        if None in hashes:
            return False
        images = zip(self.names, hashes, self.items, strict=True)
        content = json_lines({"file": name, "sha256": sha256, **item.settings()} for name, sha256, item in images)
        if not (self.path / MANIFEST).is_file() or (self.path / MANIFEST).read_bytes() != content:
            write_file(self.path / MANIFEST, content)
        self._clean()
        return True

    def _clean(self) -> None:
        """Delete what killed processes left."""
        for folder in (self.path, self.path / SAMPLES):
            clean(folder)

    def unfinished(self) -> str:
        """How far a run is that is not finished, in words."""
        proven = {name for name in self.names if self._proven(name)}
        others = [name for name in self.names if name not in proven and (self.path / name).exists()]
        again = f"; not as they were made: {some(others)}; the part that made them makes them again"
        return f"{len(proven)} of {len(self.items)} images there{again if others else ''}"

    def faults(self) -> list[str]:
        """What is wrong with the folder, everything read again: nothing if each image is there, whole and once."""
        if not (self.path / MANIFEST).is_file():
            missing = sum(not (self.path / name).is_file() for name in self.names)
            return [f"unfinished: no {MANIFEST}, {missing} of {len(self.items)} images missing"]
        lines = read_manifest(self.path / MANIFEST)
        listed = {line.get("file"): line.get("sha256") for line in lines}
        same = [line.get("file") for line in lines] == self.names
        faults = [] if same else [f"{MANIFEST}: not a line for each image"]
        for item, name in zip(self.items, self.names, strict=True):
            path = self.path / name
            if not path.is_file():
                faults.append(f"{name}: missing")
            elif file_sha256(path) != listed.get(name):
                faults.append(f"{name}: not the file that {MANIFEST} lists")
            elif (found := read_png(path)) is None or found[1] != item.settings() | self.settings:
                faults.append(f"{name}: not a whole image of this run")
        if (self.path / NPZ).exists() and not self._npz_is_whole():
            faults.append(f"{NPZ}: not all images of this run; delete it, --npz writes it anew")
        there = (path for path in (self.path / SAMPLES).iterdir() if not (path.is_dir() and path.name.startswith(".")))
        strays = {f"{SAMPLES}/{path.name}" for path in there} - {*self.names}
        return faults + [f"{stray}: no image of this run" for stray in sorted(strays)]

    def write_npz(self) -> Path:
        """All images as `arr_0`, (N, H, W, 3) uint8, in the order of the manifest; one in memory at a time."""
        path = self.path / NPZ
        if self._npz_is_whole():
            return path
        side = self.card["protocol"]["size"]
        header = {"descr": "|u1", "fortran_order": False, "shape": (len(self.items), side, side, 3)}
        entry = zipfile.ZipInfo("arr_0.npy")
        with atomic_write(path) as temporary:
            with zipfile.ZipFile(temporary, "w") as archive, archive.open(entry, "w", force_zip64=True) as stream:
                np.lib.format.write_array_header_1_0(stream, header)
                for name in self.names:
                    with opened(self.path / name) as image:
                        stream.write(np.asarray(image).tobytes())
            self._list(self._npz_of(), file_sha256(temporary), {})
        return path

    def _npz_of(self) -> str:
        """The name of this array in the journals."""
        return f"{NPZ} of {file_sha256(self.path / MANIFEST)}"

    def _npz_is_whole(self) -> bool:
        path = self.path / NPZ
        return path.is_file() and file_sha256(path) in self._listed.get(self._npz_of(), ())
