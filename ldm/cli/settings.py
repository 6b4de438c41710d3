"""What commands hand over: which model, how it samples, and what becomes of the images.

Their fields have the names of the arguments, see `settings_from`. Nothing here imports PyTorch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


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
class Method:
    """The sampling settings in which the methods of an evaluation may differ; see `ldm.cli.arguments`.

    eta: None = default_eta, or the protocol's, where the solver has a choice of it.
    plan, propagate: as `load_plan` takes them.
    error_budget: largest relative error of a forecast, see `BudgetPlan`; None = any.
    noise_weight: of prior noise injection; None = usual with a plan that skips encoders and not whole predictions.
    spacing: of the steps; None = the solver's default, or none with timesteps_at.
    timesteps_at: where the steps begin, in place of steps and spacing; other steps than the default must agree.
    parallel: most decoder steps in one batch, which changes time and memory only; None = as many as are fast and fit
        into memory.
    """

    sampler: str = "ddim"
    steps: int | None = 50
    eta: float | None = None
    plan: str = "off"
    propagate: str | None = None
    error_budget: float | None = None
    tome: float = 0.0
    noise_weight: float | None = None
    noise_below: float = 500.0
    noise_order: str = "before"
    spacing: str | None = None
    timesteps_at: tuple[int, ...] | None = None
    parallel: int | None = None


@dataclass(frozen=True)
class SamplingSettings(Method):
    """How images are sampled.

    scale: None = what the model's config recommends.
    """

    scale: float | None = None
    guidance_interval: tuple[float, float] | None = None
    guidance_reuse: bool | str = False
    default_eta: float | None = 0.0
    default_steps: int | None = 50


@dataclass(frozen=True)
class OutputSettings:
    """What becomes of the images; see `ldm.cli.arguments.output_arguments` and `propagation_arguments`.

    columns: of the grid; 0 = the batch size.
    tile: decode images in tiles of so many pixels a side, see `decode_tiled`; None = whole.
    """

    outdir: str | Path
    save: bool = True
    grid: bool = True
    columns: int = 0
    again: bool = False
    compare: bool = False
    list_plans: bool = False
    tile: int | None = None


@dataclass(frozen=True)
class RefinerSettings:
    """See `ldm.cli.arguments.refiner_arguments`.

    refiner: its weights; None = there is no refiner.
    """

    refiner: str | Path | None = None
    refiner_config: str | Path | None = None
    refiner_share: float | None = None
