"""The refiner of a run: which model finishes the images, and how many of the steps it runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from ldm.cli.setup import Setup, model_files, read_setup
from ldm.cli.tasks import is_framed, is_refiner
from ldm.io.errors import SettingError, fault_of
from ldm.models.diffusion.propagation.plan import AnyPlan, Plan
from ldm.sampling.engine import Engine
from ldm.sampling.refined import Refined

SHARE = 0.2  # as published


@dataclass(frozen=True)
class RefinerSettings:
    """See `ldm.cli.arguments.refiner_arguments`.

    refiner: its weights; None = there is no refiner.
    """

    refiner: str | Path | None = None
    refiner_config: str | Path | None = None
    refiner_share: float | None = None


@dataclass(frozen=True)
class Refiner:
    """The model that finishes the images, and the share of the steps, the last ones, that it runs."""

    setup: Setup
    share: float = SHARE

    @staticmethod
    def check(plans: Iterable[AnyPlan]) -> None:
        """Raise SettingError for a plan that a run with a refiner can't have."""
        if not all(isinstance(plan, Plan) for plan in plans):
            raise SettingError("plan", "a plan that decides during a run, or measures, does not go with a refiner")

    def finishing(self, engines: Mapping[str, Engine]) -> dict[str, Engine]:
        """The engines with the refiner behind each.

        Raises:
            SettingError: the files do not make a model, or it does not go with the number of steps.
        """
        with _named("refiner"):
            model = self.setup.load()
        with fault_of("refiner_share"):
            refined = {label: Refined(engine, model, self.share) for label, engine in engines.items()}
        next(iter(refined.values())).refiner.pack()  # they share the model
        return refined


def make_refiner(settings: RefinerSettings, base: Setup) -> Refiner | None:
    """The refiner that is asked for, on the base model's device.

    Raises:
        SettingError: its files are not there, or are not those of a refiner of that base model.
    """
    given = replace(settings, refiner=None)
    if settings.refiner is None:
        for name, value in vars(given).items():
            if value is not None:
                raise SettingError(name, "only with a refiner")
        return None
    with _named("refiner"):
        config, ckpt = model_files(settings.refiner_config, settings.refiner)
        setup = read_setup(config, ckpt, base.device, base.processes, base.weights, base.autocast)
    if not is_refiner(setup):
        raise SettingError("refiner", f"{config} is not the config of a refiner, which is told an aesthetic score")
    if not is_framed(base) or (setup.sizes.channels, setup.sizes.factor) != (base.sizes.channels, base.sizes.factor):
        raise SettingError("refiner", f"finishes images of a base model of SDXL; {base.config_path} is another model")
    return Refiner(setup, SHARE if settings.refiner_share is None else settings.refiner_share)


@contextmanager
def _named(setting: str) -> Iterator[None]:
    """A SettingError inside the block becomes one of this setting: the refiner's files have flags of their own."""
    try:
        yield
    except SettingError as error:
        raise SettingError(setting, error.problem) from error
