"""One figure from its kind: sample, draw, save."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from evaluation.plots.drawing import style
from evaluation.plots.experiment import Experiment
from ldm.cli.arguments import EMOJI64
from ldm.cli.inputs import prompts_in
from ldm.cli.setup import ModelSettings, Setup, make_setup
from ldm.io.errors import fault_of
from ldm.models.diffusion.loop import NonFiniteLatents


def experiment_inputs(model: ModelSettings, prompts: str) -> tuple[Setup, list[str]]:
    """What all figures have in common: the model, which is emoji64 unless another is named, and the prompts of a file.
    Raises SettingError: a file can't be used."""
    return make_setup(model, EMOJI64), prompts_in(prompts, "prompts")


def make_figure(kind: str, experiment: Experiment, out: Path, options: Mapping[str, Any]) -> list[str]:
    """Draw a figure and save it as KIND.svg, KIND.png and KIND.json.

    Args:
        kind: of the figure: `make` of the module evaluation.plots.KIND draws it.
        out: the folder.
        options: the other arguments of `make`.

    Returns:
        The files' names.

    Raises SettingError: an option or a setting of the experiment can't be used; or the files can't be written (`out`).
    """
    module = import_module(f"evaluation.plots.{kind.replace('-', '_')}")
    with style():
        with fault_of("ckpt", (NonFiniteLatents,)):
            drawing = module.make(experiment, **options)
        with fault_of("out", (OSError,)):
            return drawing.save(out / kind, experiment.caption(drawing.sampled), experiment.settings(drawing.sampled))
