"""Where a run computes and with which model: all that can be known of both before a slow load."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ldm.checkpoint import (
    Bounded,
    CheckpointError,
    check_weights,
    fingerprint,
    load_config,
    load_model,
    read_checkpoint,
)
from ldm.checkpoint.delta import add_words, apply_deltas
from ldm.checkpoint.diagnosis import Facts, facts_of_config, facts_of_weights, fitting, summary
from ldm.checkpoint.embeddings import add_embeddings
from ldm.checkpoint.file import stated_prediction
from ldm.checkpoint.lora import merge_lora
from ldm.checkpoint.published import Published, load_manifest
from ldm.cli.arguments import EMOJI64, Files
from ldm.cli.parser import torchrun_ranks
from ldm.io.errors import BadInput, SettingError, fault_of
from ldm.io.files import PROJECT_ROOT, same_place
from ldm.io.images import MOST_PIXELS
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.sampling.engine import Sizes
from ldm.util import instantiate_from_config

# A config that does not build a model may fail in any way that a constructor can.
CONSTRUCTION = (ValueError, OSError, TypeError, KeyError)


# Where: the device, and the processes that share the work, as torchrun starts them. The first process leads: it alone
# looks for images, prints and writes, and tells the others what to compute with it.


@dataclass(frozen=True)
class Processes:
    """This process among those of the run.

    rank:  0..size-1; 0 leads.
    local: rank among those of this machine, which names its GPU.
    """

    rank: int = 0
    size: int = 1
    local: int = 0

    @staticmethod
    def from_environment() -> Processes:
        """As torchrun says in the environment; without it, one alone.

        Raises:
            BadInput: there it says what can't be.
        """
        return Processes(*torchrun_ranks())

    @property
    def several(self) -> bool:
        return self.size > 1

    @property
    def leads(self) -> bool:
        return self.rank == 0

    @contextmanager
    def joined(self, device: torch.device) -> Iterator[None]:
        """They can talk to each other inside the block; over NCCL between GPUs, else over gloo."""
        if not self.several:
            yield
            return
        if device.type == "cuda":
            torch.cuda.set_device(device)
        with fault_of(f"environment variable WORLD_SIZE: {self.size} processes can't meet", (ValueError, RuntimeError)):
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", rank=self.rank, world_size=self.size)
        try:
            yield
        finally:
            dist.destroy_process_group()

    def least(self, value: int) -> int:
        """The smallest of all processes' values."""
        if not self.several:
            return value
        values = [value] * self.size
        dist.all_gather_object(values, value)
        return min(values)

    def tell(self, order: Any) -> None:
        """The leader's order to all others; None = there is nothing more to do."""
        if self.several:
            dist.broadcast_object_list([order])

    def orders(self) -> Iterator[Any]:
        """What the leader tells, until there is nothing more to do."""
        while True:
            order = [None]
            try:
                dist.broadcast_object_list(order)
            except RuntimeError as error:
                raise BadInput(f"process {self.rank}: the leading process has ended ({error})") from error
            if order[0] is None:
                return
            yield order[0]


ALONE = Processes()


def find_device(name: str, processes: Processes = ALONE) -> torch.device:
    """The device of that name, or the best one for auto.

    Raises:
        SettingError: it is not on this machine.
    """
    if processes.several:
        return _own_device(name, processes)
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    present = [*gpus, *(["mps"] if torch.backends.mps.is_available() else []), "cpu"]
    if name == "auto":
        return torch.device(present[0])
    if name not in (*present, *(["cuda"] if gpus else [])):
        raise SettingError("device", f"{name} is not there; on this machine: auto, {', '.join(present)}")
    return torch.device(name)


def _own_device(name: str, processes: Processes) -> torch.device:
    """This process's, where there are several: the CPU for all, or a GPU for each."""
    if name not in ("auto", "cuda", "cpu"):
        raise SettingError(
            "device", f"{name} is one device, and there are {processes.size} processes; accepted: auto, cuda, cpu"
        )
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu" or (name == "auto" and gpus == 0):
        return torch.device("cpu")
    if processes.local >= gpus:
        raise SettingError("device", f"process {processes.rank} has no GPU of its own; this machine has {gpus}")
    return torch.device("cuda", processes.local)


# With which model


@dataclass(frozen=True)
class ModelSettings:
    """Which model, and where and how it runs; see `ldm.cli.arguments.model_arguments`."""

    config: str | Path | None = None
    ckpt: str | Path | None = None
    weights: str = "auto"
    channels: int | None = None
    factor: int | None = None
    device: str = "auto"
    precision: str | None = None
    lora: Sequence[tuple[str, float]] = ()
    embedding: Sequence[str] = ()
    delta: Sequence[str] = ()


@dataclass(frozen=True)
class Setup:
    """The model to use, from its files' names and its config: all that can be known before it is loaded.

    weights:  averaged or last, as `load_model` takes them.
    autocast: run the networks in the device's lower precision.
    lora: files that change the weights, and how strongly.
    embedding: files of new tokens.
    delta: files of Custom Diffusion.
    """

    config_path: Path
    ckpt: Path
    config: Any
    sizes: Sizes
    device: torch.device
    processes: Processes = ALONE
    weights: str = "auto"
    autocast: bool = False
    lora: Sequence[tuple[str, float]] = ()
    embedding: Sequence[str] = ()
    delta: Sequence[str] = ()

    def load(self) -> LatentDiffusion:
        """The model on the run's device.

        Raises:
            SettingError: the files do not make a model.
        """
        with fault_of("config", CONSTRUCTION), fault_of("ckpt", (CheckpointError,)):
            model = load_model(self.config_path, self.ckpt, self.device, self.weights)
        if self.delta:
            with fault_of("delta", (CheckpointError, OSError)):
                apply_deltas(model, self.delta)
        with fault_of("lora", (CheckpointError, OSError)):
            for path, weight in self.lora:
                if unmatched := merge_lora(model, path, weight):
                    print(f"warning: --lora: {path}: not in this model: {', '.join(unmatched)}", file=sys.stderr)
        self.read_embeddings(model.cond_stage_model)
        return model

    def read_embeddings(self, encoder: nn.Module | None) -> None:
        """Give the model's text encoder the new tokens."""
        with fault_of("embedding", (CheckpointError, OSError)):
            for path in self.embedding:
                add_embeddings(encoder, path)

    def read_words(self, encoder: nn.Module) -> None:
        """Give a text encoder all new tokens, without the weights that come with them."""
        with fault_of("delta", (CheckpointError, OSError)):
            for path in self.delta:
                add_words(encoder, path)
        self.read_embeddings(encoder)

    def adapters(self) -> dict[str, list[Any]]:
        """What is recorded with an image of the files beside the model's own; nothing where there are none."""
        lora_files = [path for path, _ in self.lora]
        for name, paths in (("lora", lora_files), ("embedding", self.embedding), ("delta", self.delta)):
            with fault_of(name, (OSError,)):  # a name that no file can have
                if missing := [path for path in paths if not Path(path).is_file()]:
                    raise SettingError(name, f"{missing[0]}: no such file")
        lora = [[Path(path).name, fingerprint(path)[:16], weight] for path, weight in self.lora]
        embedding, delta = (
            [[Path(path).name, fingerprint(path)[:16]] for path in paths] for paths in (self.embedding, self.delta)
        )
        return {name: files for name, files in (("lora", lora), ("embedding", embedding), ("delta", delta)) if files}

    @property
    def suspect(self) -> str:
        """The argument at fault if the networks compute NaN or infinite numbers."""
        return "precision" if self.autocast else "ckpt"


def make_setup(settings: ModelSettings, default: Files | None = None, processes: Processes | None = None) -> Setup:
    """What is quick to check comes before what is slow to load.

    Args:
        default: config and weights of the model that needs no argument.
        processes: that make each image together; None = those that torchrun has started.

    Raises:
        SettingError: the files are not there, or are not those of such a model; or there is no such device.
    """
    config_path, ckpt = model_files(settings.config, settings.ckpt, default)
    processes = Processes.from_environment() if processes is None else processes
    device = find_device(settings.device, processes)
    autocast = uses_autocast(settings.precision, device)
    setup = read_setup(config_path, ckpt, device, processes, settings.weights, autocast)
    setup = replace(setup, lora=tuple(settings.lora), embedding=tuple(settings.embedding), delta=tuple(settings.delta))
    setup.adapters()  # reads the files
    for name, given, real in (
        ("channels", settings.channels, setup.sizes.channels),
        ("factor", settings.factor, setup.sizes.factor),
    ):
        if given not in (None, real):
            raise SettingError(name, f"this model's is {real}; got {given}")
    return setup


def read_setup(
    config_path: Path,
    ckpt: Path,
    device: torch.device,
    processes: Processes = ALONE,
    weights: str = "auto",
    autocast: bool = False,
) -> Setup:
    """What the files say.

    Raises:
        SettingError: they are not those of a latent diffusion model.
    """
    with fault_of("config"):
        config = load_config(config_path)
        sizes = Sizes.of(config.model)
    says, stated = config.model.params.get("parameterization", "eps"), stated_prediction(ckpt)
    if stated not in (None, says):
        raise SettingError(
            "config", f"its parameterization is {says}; the network in {ckpt} predicts {stated}, its scheduler says"
        )
    with fault_of("ckpt"):
        check_weights(ckpt)
    return Setup(config_path, ckpt, config, sizes, device, processes, weights, autocast)


def uses_autocast(precision: str | None, device: torch.device) -> bool:
    """Whether the networks run in the device's lower precision; None = where that is usual, on a GPU of NVIDIA."""
    return (precision or ("autocast" if device.type == "cuda" else "full")) == "autocast"


def image_size(
    sizes: Sizes, height: int | None, width: int | None, default: tuple[int, int] | None = None
) -> tuple[int, int]:
    """Height and width of the images in pixels, as given or by default, which is the model's.

    Raises:
        SettingError: the model can't make images of that height or width, or nothing can.
    """
    usual = default or (sizes.default, sizes.default)
    height, width = height or usual[0], width or usual[1]
    for name, value in (("H", height), ("W", width)):
        if value % sizes.multiple:
            raise SettingError(name, f"must be a multiple of {sizes.multiple} for this model; got {value}")
    if height * width > MOST_PIXELS:  # said here, before an image is enlarged to that size
        raise SettingError("H", f"{width} x {height} pixels are more than {MOST_PIXELS}, the most of one image")
    return height, width


def conditioner(setup: Setup) -> nn.Module:
    """The model's conditioner without its weights, to see what it takes."""
    config = setup.config.model.params.get("cond_stage_config")
    if isinstance(config, str):
        raise SettingError("config", f"a model without a conditioner of its own: its cond_stage_config is {config}")
    return without_weights(config)


def without_weights(config: Any) -> nn.Module:
    """The model, or a part of it, built from its part of the config."""
    with fault_of("config", CONSTRUCTION), torch.device("meta"), Bounded():
        return instantiate_from_config(config)


# The model's files: those given, one of them found from the other, or the script's own


def model_files(config: str | Path | None, ckpt: str | Path | None, default: Files | None = None) -> Files:
    """Config and weights; where neither is given the default. Both may be the folder of a run of main.py.

    Raises:
        SettingError: a file is not there, or there is not exactly one that belongs to the one given.
    """
    if config is None and ckpt is None:
        if default is None:
            raise SettingError("config", "needed, together with ckpt: the files of the model")
        config, ckpt = default
    config, ckpt = in_run(config, "config.yaml"), in_run(ckpt, "last.ckpt")
    with fault_of("config", (OSError,)):  # a name that no file can have
        if config is not None and not Path(config).is_file():
            raise SettingError("config", f"{config}: no such file")
    ckpt = weights_for(Path(config)) if ckpt is None else Path(ckpt)
    with fault_of("ckpt", (OSError,)):
        found = ckpt.exists()
    if not found:
        raise SettingError("ckpt", f"{ckpt}: no such file, nor a diffusers folder{download_hint(ckpt)}")
    return config_for(ckpt) if config is None else Path(config), ckpt


def in_run(path: str | Path | None, file: str) -> str | Path | None:
    """The file in the folder of a run of main.py, or the path as it is if it is none."""
    with fault_of("config" if file.endswith(".yaml") else "ckpt", (OSError,)):
        found = path is not None and (Path(path) / "last.ckpt").is_file()
    return Path(path) / file if found else path


def download_hint(ckpt: Path) -> str:
    """The end of an error message about weights that are not here: what fetches them, if they are published."""
    models = list(_published())
    if names := [model.name for model in models if same_place(model.file(), ckpt)]:
        return f"; python scripts/download_models.py {names[0]} fetches it"
    beside = [model for model in models if same_place(model.file().parent, ckpt.parent)]
    if len(beside) != 1:
        return ""
    name, file, about = beside[0].name, beside[0].file().name, beside[0].about
    return f"; python scripts/download_models.py {name} fetches {file} ({about})"


def weights_for(config: Path) -> Path:
    """Where the one published checkpoint lies, or is to lie, that belongs to a config."""
    if same_place(config, EMOJI64[0]):
        return EMOJI64[1]
    models = [model for model in _published() if same_place(PROJECT_ROOT / model.config, config)]
    if len(models) != 1:
        names = ", ".join(model.name for model in models)
        why = f"several published models have it: {names}" if models else "no published model has it"
        raise SettingError("ckpt", f"needed together with config {config}, since {why}")
    return models[0].file()


def config_for(ckpt: Path) -> Path:
    """config.yaml beside the weights, or the one published config that states what they are."""
    beside = (ckpt if ckpt.is_dir() else ckpt.parent) / "config.yaml"
    if beside.is_file():
        return beside
    with fault_of("ckpt", (CheckpointError, ValueError, OSError)):
        facts = facts_of_weights(read_checkpoint(ckpt))
    found = fitting_configs(facts)
    if len(found) == 1:
        return PROJECT_ROOT / found[0]
    fits = " and ".join(found) if found else f"no published config; it is: {summary(facts)}"
    raise SettingError("config", f"needed together with ckpt {ckpt}, which fits {fits}")


def fitting_configs(weights: Facts) -> Sequence[str]:
    """Published configs that state what a checkpoint is, as paths in the project."""
    paths = dict.fromkeys(model.config for model in _published())
    return fitting(weights, [(path, facts_of_config(load_config(PROJECT_ROOT / path).model)) for path in paths])


def _published() -> Sequence[Published]:
    with fault_of("models/published.yaml"):
        return [*load_manifest().values()]
