"""The files of a model that an evaluation runs, or of the stages of DeepFloyd-IF."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from evaluation.protocols.protocol import NOISE, Method, Protocol
from ldm.checkpoint import fingerprint, load_config
from ldm.checkpoint.published import published_sha256
from ldm.cli.deepfloyd import StageSettings, digest_of_files
from ldm.cli.settings import ModelSettings
from ldm.cli.setup import ALONE, Setup, make_setup, read_setup, uses_autocast
from ldm.io.errors import SettingError, fault_of
from ldm.sampling.engine import Sizes

ARGUMENTS = {"stage1": "ckpt", "plans": "plan"}
ARGUMENTS |= dict.fromkeys(("stage2", "stage3", "t5", "scales", "noise_levels"), "protocol")
TAKEN = ("sampler", "steps", "plan", "parallel", *NOISE)  # of a method, by a cascade; there is no noise to inject
PUBLISHED_PLAN = "faster-diffusion"  # of a cascade: the published key timesteps of each stage


@dataclass(frozen=True)
class ModelFiles:
    """The files of a model, what they say being read when it is asked for, once."""

    config: Path
    ckpt: Path
    weights: str = "auto"  # as for `load_model`
    precision: str | None = None  # full or autocast; None = autocast on a GPU
    added: Mapping[str, Sequence[Path]] = field(default_factory=dict)  # files beside its own, see `ADDED`

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
        weights = self.fingerprint(self.ckpt) if self.ckpt.exists() else published_sha256(self.ckpt)
        if weights is None:
            raise SettingError("ckpt", f"{self.ckpt}: no such file")
        with fault_of("config"):
            return {"weights": weights, "config": fingerprint(self.config)}

    @cached_property
    def added_sha256(self) -> dict[str, list[str]]:
        """The hashes of the files that are added, by what they are."""
        return {name: [*map(self.fingerprint, paths)] for name, paths in self.added.items()}

    def fingerprint(self, path: Path) -> str:
        """What identifies a file, or the weights of a folder."""
        return fingerprint(path)

    @property
    def missing(self) -> list[Path]:
        """Files beside the model's own that are not there."""
        return [path for paths in self.added.values() for path in paths if not path.exists()]

    def setup(self, device: torch.device) -> Setup:
        """All files together. Raises SettingError: the weights are not there, or do not belong to the config, as far as
        their heads tell; `protocol`: a file that is added is not there."""
        if self.missing:
            raise SettingError("protocol", f"needs {self.missing[0]}, which is not there")
        setup = read_setup(self.config, self.ckpt, device, ALONE, self.weights, uses_autocast(self.precision, device))
        lora, *others = (tuple(map(str, self.added.get(name, ()))) for name in ("lora", "embedding", "delta"))
        return replace(setup, lora=[(path, 1.0) for path in lora], embedding=others[0], delta=others[1])

    def check(self) -> None:
        """Raise SettingError for files that `setup` refuses."""
        self.setup(torch.device("cpu"))


@dataclass(frozen=True)
class StageFiles(ModelFiles):
    """The folder of the first stage of DeepFloyd-IF, which may hold T5, and beside it `stage2`, `stage3` and `t5`, see
    `ADDED`; the config describes the first stage where its folder is not here."""

    def fingerprint(self, path: Path) -> str:
        """Of a folder by names, sizes and ends of its files."""
        return digest_of_files([*path.rglob("*")]) if path.is_dir() else fingerprint(path)

    @property
    def missing(self) -> list[Path]:
        return [path for path in (self.ckpt,) if not path.exists()] + super().missing

    def check(self) -> None:
        """Raise SettingError for files that can't be used."""
        if self.missing:
            raise SettingError("ckpt", f"{self.missing[0]}: no such file")


def stages_of(protocol: Protocol, method: Method, files: ModelFiles) -> StageSettings:
    """How the stages of a protocol's cascade sample by a method: the sum of their steps names the steps of each.
    Raises SettingError: no cascade samples so."""
    cascade = protocol.cascade
    for own in fields(Method):
        if own.name not in TAKEN and (value := getattr(method, own.name)) not in (own.default, 0.0):
            raise SettingError(own.name, f"the stages of DeepFloyd-IF do not take it; got {value}")
    if method.steps not in cascade["steps"]:
        known = ", ".join(f"{total} ({'+'.join(map(str, each))})" for total, each in cascade["steps"].items())
        raise SettingError("steps", f"expected the steps of all stages together, one of {known}; got {method.steps}")
    steps = cascade["steps"][method.steps]
    count, added = len(steps), {name: str(paths[0]) for name, paths in files.added.items()}
    return StageSettings(
        stages=tuple(range(1, count + 1)),
        stage1=str(files.ckpt),
        **{name: added.get(name) for name in ("stage2", "stage3", "t5")},
        steps=steps,
        scales=[float(protocol.guidance), *cascade["scales"]],
        plans=cascade["plans"] if method.plan == PUBLISHED_PLAN else [method.plan] * count,
        noise_levels=cascade["noise_levels"],
        sampler=method.sampler,
        seed=protocol.seed,
        device="auto",
        precision=files.precision,
        parallel=method.parallel,
    )


@contextmanager
def of_protocol() -> Iterator[None]:
    """Errors inside, of the stages, name the arguments of an evaluation."""
    try:
        yield
    except SettingError as error:
        raise error.moved(ARGUMENTS.get(error.setting, error.setting)) from error


def files_of(
    protocol: Protocol, config: Path, ckpt: Path, weights: str = "auto", precision: str | None = None
) -> ModelFiles:
    """The files of a protocol's model, or of its stages."""
    return (StageFiles if protocol.cascade else ModelFiles)(config, ckpt, weights, precision, protocol.added())


def model_files(settings: ModelSettings, protocol: Protocol) -> ModelFiles:
    """The model that the settings name, or else the protocol's. Raises SettingError, BadInput: see `make_setup`."""
    if protocol.cascade:
        usual = protocol.model()
        config, ckpt = (Path(given or own) for given, own in zip((settings.config, settings.ckpt), usual, strict=True))
        return files_of(protocol, config, ckpt, precision=settings.precision)
    setup = make_setup(settings, protocol.model(), ALONE)
    return files_of(protocol, setup.config_path, setup.ckpt, settings.weights, settings.precision)
