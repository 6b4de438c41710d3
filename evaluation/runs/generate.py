"""The images that a protocol asks for, made by one method of one model, in a folder that proves that they are there.

    run = generate.compute(load_protocol("emoji64"), Method(plan="faster-diffusion"), out="outputs/fast")

An image depends on the protocol, its prompt, the number of its repeat, the model and the method: not on the number of
processes, nor on where a run was stopped.
"""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from tqdm import tqdm

from evaluation.protocols.protocol import Method, Prompt, Protocol, chosen_prompts
from evaluation.runs.control import controlled
from evaluation.runs.folder import CARD, SAMPLES, RunFolder, prompts_sha256, read_card
from ldm.checkpoint import fingerprint, load_config
from ldm.checkpoint.published import published_sha256
from ldm.cli.parser import stated
from ldm.cli.setup import (
    ALONE,
    CONSTRUCTION,
    CPU_POSITIONS,
    ModelSettings,
    SamplingSettings,
    Setup,
    check_memory,
    find_device,
    make_plan,
    make_recipe,
    make_setup,
    read_setup,
    uses_autocast,
)
from ldm.io.errors import SettingError, fault_of
from ldm.io.files import json_sha256
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.diffusion.propagation.load import RunFacts
from ldm.models.diffusion.propagation.plan import AnyPlan, check_blocks
from ldm.modules.encoders.modules import ClassLabels
from ldm.sampling.engine import Engine, Recipe, Sizes, Task, num_nodes
from ldm.sampling.generate import Item, fill
from ldm.sampling.task import Classes, Labels, Network, prompts_cut, text_for
from ldm.sampling.video import Motion, frames_task

BATCH = 16
# Last digits depend on how much is computed at a time, and by how many threads: on a CPU both are fixed, so that files
# do not depend on them. Larger batches gain nothing there, nor do threads where there can be processes.
CPU_BATCH, CPU_LATENTS, CPU_THREADS = 8, 512, 1  # most images, most positions of their latents
PACKAGES = ("faster-diffusion-ldm", "torch", "numpy", "pillow", "tokenizers")


@dataclass(frozen=True)
class ModelFiles:
    """The files of a model, what they say being read when it is asked for, once; `weights` as for `load_model`;
    precision: full or autocast, None = autocast on a GPU; added: the files beside its own, see `ADDED`."""

    config: Path
    ckpt: Path
    weights: str = "auto"
    precision: str | None = None
    added: Mapping[str, Sequence[Path]] = field(default_factory=dict)

    @cached_property
    def content(self) -> Any:
        """The config. Raises SettingError: `config`: it is not there, or not of a latent diffusion model."""
        with fault_of("config"):
            content = load_config(self.config)
            Sizes.of(content.model)
            return content

    @cached_property
    def sizes(self) -> Sizes:
        return Sizes.of(self.content.model)

    @cached_property
    def sha256(self) -> dict[str, str]:
        """The hashes of weights and config; of published weights that are not here the published hash. Raises
        SettingError: a file is not there."""
        weights = fingerprint(self.ckpt) if self.ckpt.exists() else published_sha256(self.ckpt)
        if weights is None:
            raise SettingError("ckpt", f"{self.ckpt}: no such file")
        with fault_of("config"):
            return {"weights": weights, "config": fingerprint(self.config)}

    def setup(self, device: torch.device) -> Setup:
        """All files together. Raises SettingError: the weights are not there, or do not belong to the config, as far as
        their heads tell; `protocol`: a file that is added is not there."""
        if missing := [path for paths in self.added.values() for path in paths if not path.exists()]:
            raise SettingError("protocol", f"needs {missing[0]}, which is not there")
        setup = read_setup(self.config, self.ckpt, device, ALONE, self.weights, uses_autocast(self.precision, device))
        lora, *others = (tuple(map(str, self.added.get(name, ()))) for name in ("lora", "embedding", "delta"))
        return replace(setup, lora=[(path, 1.0) for path in lora], embedding=others[0], delta=others[1])

    def check(self) -> None:
        """Raise SettingError for files that `setup` refuses."""
        self.setup(torch.device("cpu"))


def model_files(settings: ModelSettings, protocol: Protocol) -> ModelFiles:
    """The model that the settings name, or else the protocol's.

    Raises:
        SettingError, BadInput: see `make_setup`.
    """
    setup = make_setup(settings, protocol.model(), ALONE)
    return ModelFiles(setup.config_path, setup.ckpt, settings.weights, settings.precision, protocol.added())


@dataclass(frozen=True)
class Request:
    """What is to be made: all that is known before the model is loaded; `prepare` makes it.

    recipe, plan: the method for this model; decoder batches of the plan are chosen when it runs.
    data: the folder of the protocol's data.
    """

    protocol: Protocol
    prompts: Sequence[Prompt]
    method: Method
    model: ModelFiles
    recipe: Recipe
    plan: AnyPlan
    data: Path

    @cached_property
    def asked(self) -> dict[str, Any]:
        """What the images have in common with those of other methods, as JSON values."""
        return self.protocol.asked() | {"prompts_sha256": prompts_sha256(self.prompts)}

    @cached_property
    def sha256(self) -> str:
        """Names the images: a hash of all that they depend on, but for the device and what is computed at a time."""
        method = self.recipe.settings() | self.plan.settings()
        model, added = self.model, self.model.added
        others = [{name: [fingerprint(path) for path in paths] for name, paths in added.items()}] if added else []
        return json_sha256([self.asked, method, model.sha256, model.weights, model.precision, *others])


@dataclass(frozen=True)
class Run:
    """A run after this process has made its share: how many images were made now, found, and, of those made, took the
    place of a damaged file; whether all images of the run are there; and what to bear in mind, in words."""

    folder: RunFolder
    made: int
    found: int
    replaced: int
    complete: bool
    notes: Sequence[str] = ()

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
        model = ModelFiles(*files, added=protocol.added())
    model.check()
    request = prepare(protocol, method or protocol.method(), model, chosen_prompts(protocol, data), data)
    return make(request, Path(out), process or Process(0, 1, find_device("auto")), batch_size)


# Before the model is loaded


def prepare(
    protocol: Protocol, method: Method, model: ModelFiles, prompts: Sequence[Prompt], data: str | Path | None = None
) -> Request:
    """What is to be made; the weights need not be there. Raises SettingError: see `compute`."""
    sizes = model.sizes
    if protocol.size % sizes.multiple:
        raise SettingError(
            "protocol", f"its images have {protocol.size} px; this model's must be a multiple of {sizes.multiple}"
        )
    recipe, timesteps = recipe_of(protocol, method), model.content.model.params.get("timesteps", 1000)
    plan = plan_of(recipe, method, model.ckpt, timesteps, video=protocol.video)
    return Request(protocol, prompts, method, model, recipe, plan, protocol.folder(data))


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


def task_of(request: Request, model: LatentDiffusion, setup: Setup) -> Task:
    """What the model is conditioned on, and what its network follows. Raises SettingError: it has fewer classes than
    the protocol asks for; or see `controlled`."""
    protocol = request.protocol
    if protocol.data["kind"] != "classes":
        network = controlled(protocol, request.prompts, request.data, setup) if protocol.control else Network()
        nodes = num_nodes(request.recipe, model.num_timesteps)
        task = Task(text_for(model, (protocol.size, protocol.size)), network=network)
        return frames_task(task, request.recipe, nodes, Motion.of(nodes)) if protocol.video else task
    # Where a model has one class more than the data, that class stands for none.
    classes, known = protocol.data["classes"], getattr(model.cond_stage_model, "n_classes", None)
    if known is not None and known < classes:
        raise SettingError("config", f"this model has {known} classes; {protocol.name} asks for {classes}")
    condition = Labels if isinstance(model.cond_stage_model, ClassLabels) else Classes
    return Task(condition(classes if known == classes + 1 and protocol.guidance != 1 else None))


# The run


def make(request: Request, out: Path, process: Process, batch_size: int | None = None) -> Run:
    """This process's share of the images, in the folder, which is new or is continued.
    Raises SettingError: see `compute`."""
    with fault_of("out"):
        if request.protocol.video:
            batch = request.protocol.repeats  # a video
        elif request.plan.measures:
            batch = 1  # an image's record says its own error
        elif process.device.type == "cpu":  # fixed by the size of the latents
            side = request.protocol.size // request.model.sizes.factor
            batch = min(CPU_BATCH, max(1, CPU_LATENTS // side**2))
        else:
            batch = batch_size or (read_card(out)["batch"] if (out / CARD).is_file() else BATCH)
    with cpu_threads(process.device):
        engine = load_engine(request, process.device, batch)
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


def load_engine(request: Request, device: torch.device, batch: int) -> Engine:
    """The model, ready to make the images, `batch` at a time.
    Raises SettingError: the files do not make a model, or it can't do what is asked."""
    files, recipe, plan, setup = request.model, request.recipe, request.plan, request.model.setup(device)
    model = setup.load()
    unet = model.model.diffusion_model
    with fault_of("tome"):
        unet.check_merging(recipe.tome)
    with fault_of("plan"):
        check_blocks(plan, len(unet.output_blocks))
    if request.method.parallel is None and device.type == "cpu":  # not by free memory: last digits depend on it
        latents = batch * (1 if recipe.scale == 1.0 else 2)
        positions = latents * math.prod(side // files.sizes.factor for side in (recipe.height, recipe.width))
        plan = replace(plan, parallel=max(1, CPU_POSITIONS // positions))
    with fault_of("config", CONSTRUCTION):
        engine = Engine(model, files.sizes, recipe, plan, task_of(request, model, setup), setup.autocast)
    check_memory(engine, batch, device)
    engine.pack()
    return engine


def fill_share(folder: RunFolder, engine: Engine, process: Process) -> tuple[int, int, int]:
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


def run_card(request: Request, engine: Engine, device: torch.device, batch: int) -> dict[str, Any]:
    """All that the images depend on, and what they were made with, as JSON values."""
    protocol, files = request.protocol, request.model
    texts = [prompt.inputs["prompt"] for prompt in request.prompts if "prompt" in prompt.inputs]
    return {
        "name": protocol.name,
        "protocol_sha256": json_sha256(request.asked),
        "protocol": request.asked,
        "pictures": len(request.prompts) * protocol.repeats,
        "seeds": [protocol.seed],
        "plan": request.method.plan,
        "method": engine.settings(),
        "ckpt": f"{files.ckpt.parent.name}/{files.ckpt.name}",
        **files.sha256,
        **{name: [fingerprint(path)[:16] for path in paths] for name, paths in files.added.items()},
        "averaged": files.weights,
        "captions_cut": prompts_cut(engine.model, texts),
        "device": device.type,
        "batch": batch,
        "parallel": engine.plan.parallel,
        "metrics": dict(protocol.metrics),
        "versions": versions(device),
    }


def versions(device: torch.device) -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return found | {"machine": gpu or platform.machine()}


# The processes of a run, on one machine or many. Lightning Fabric starts them, or takes those that torchrun or SLURM
# started. They meet once, at the beginning, and exchange nothing.


if TYPE_CHECKING:
    from lightning_fabric import Fabric


@dataclass(frozen=True)
class Process:
    """Process `rank` of 0..world_size-1."""

    rank: int
    world_size: int
    device: torch.device

    def __str__(self) -> str:
        return f"{self.rank}-of-{self.world_size}"


def launched(env: Mapping[str, str]) -> tuple[int, int] | None:
    """Processes on each machine, and machines, as torchrun or SLURM started them; None = they did not.
    Raises BadInput: an environment variable that can't be right."""
    if "TORCHELASTIC_RUN_ID" in env:
        local = stated(env, "LOCAL_WORLD_SIZE", 1, 1)
        return local, stated(env, "WORLD_SIZE", local, local) // local
    if "SLURM_NTASKS" in env and env.get("SLURM_JOB_NAME") not in ("bash", "interactive"):
        nodes = stated(env, "SLURM_NNODES", 1, 1)
        tasks = stated(env, "SLURM_NTASKS", nodes, nodes)
        return stated(env, "SLURM_NTASKS_PER_NODE", tasks // nodes, 1), nodes
    return None


def join(
    device: str = "auto",
    devices: int | None = None,
    num_nodes: int | None = None,
    strategy: str = "auto",
    part: tuple[int, int] = (0, 1),
) -> Process:
    """Take this process's place among those of the run.

    May start the other processes of this machine, which run the same command line.

    Args:
        device: name of a device.
        devices, num_nodes: processes on each machine, and machines; None = as torchrun or SLURM says, or 1.
        strategy: auto (Fabric only for several processes) or ddp.
        part: which part of how many of the run these processes make, (0..parts-1, parts).

    Raises:
        SettingError: no such device, more processes than cores, or one device for several processes.
        BadInput: environment variables of torchrun or SLURM that can't be right.
    """
    found = find_device(device)
    cores = os.cpu_count() or 1
    if found.type == "cpu" and (devices or 1) > cores:
        raise SettingError("devices", f"this machine has {cores} cores; got {devices}")
    stated_devices, stated_nodes = launched(os.environ) or (1, 1)
    each, nodes = devices or stated_devices, num_nodes or stated_nodes
    if each * nodes == 1 and strategy == "auto":
        return Process(*part, found)
    if found.index is not None and device not in ("auto", "cuda"):
        raise SettingError("device", f"{device} is one device; with --devices {each} expected auto, cpu or cuda")
    # Ranks and addresses in the environment are read by Fabric, and checked by nobody.
    suspect = "devices" if devices else "environment variables of torchrun or SLURM"
    with fault_of(suspect, (ValueError, RuntimeError, TypeError, LookupError)):
        fabric = launch(found.type, each, nodes)
    rank, world_size = part[0] * fabric.world_size + fabric.global_rank, part[1] * fabric.world_size
    return Process(rank, world_size, fabric.device)


def launch(accelerator: str, devices: int, num_nodes: int) -> Fabric:
    """The processes, started. Fabric is slow to import, and one process needs none."""
    import lightning_fabric

    # Gloo, since nothing is exchanged: NCCL would keep a GPU's memory for it.
    strategy = lightning_fabric.strategies.DDPStrategy(process_group_backend="gloo")
    fabric = lightning_fabric.Fabric(accelerator=accelerator, devices=devices, num_nodes=num_nodes, strategy=strategy)
    fabric.launch()
    return fabric
