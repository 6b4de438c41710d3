"""Number and placement of the key timesteps: the strategies of table 5 and figure 9, and calibrated ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from evaluation.plots.drawing import CELL, COLOURS, Drawing, image_grid, new_figure
from evaluation.plots.experiment import Experiment
from ldm.io.images import psnr
from ldm.models.diffusion.propagation.plan import AnyPlan
from ldm.sampling.engine import Engine

Points = dict[str, dict[str, Any]]  # plan -> the values of its point, see `errors`

# By plan, as table 5 calls them.
STRATEGIES = {f"uniform-{k}": f"uniform {numeral}" for k, numeral in enumerate(("I", "II", "III"), 1)}
STRATEGIES |= {f"nonuniform-{k}": f"non-uniform {numeral}" for k, numeral in enumerate(("I", "II", "III", "IV"), 1)}
UNIFORM = ("uniform:2", "uniform:3", "uniform:4", "uniform:6", "uniform:8", "uniform:12")
CALIBRATED = ("auto:5", "auto:7", "auto:9", "auto:13", "auto:18", "auto:25")
# Label of each series -> plans, propagation, colour and marker.
SERIES = {
    "every n-th step, held": (UNIFORM, "hold", COLOURS[0], "o-"),
    "every n-th step, quadratic": (UNIFORM, "quadratic", COLOURS[0], "o--"),
    "calibrated (auto), held": (CALIBRATED, "hold", COLOURS[2], "s-"),
    "calibrated (auto), quadratic": (CALIBRATED, "quadratic", COLOURS[2], "s--"),
    "table 5, held": ((*STRATEGIES,), "hold", COLOURS[1], "D"),
}
SHOWN = 3  # images beside the curves


def draw_placement(experiment: Experiment, *, steps: int) -> Drawing:
    """Draw the error of each plan over `steps` DDIM steps against its number of key timesteps."""
    plans, remark = experiment.plans(
        {(label, spec): (spec, "ddim", steps, how) for label, (specs, how, *_) in SERIES.items() for spec in specs}
    )
    engine = experiment.engine("ddim", steps)
    found, rows = errors(experiment, engine, plans)
    columns = min(SHOWN, experiment.count)
    figure = new_figure(5.4 + CELL * 0.85 * columns, 0.5 + CELL * 0.72 * len(rows))
    left, right = figure.subfigures(1, 2, width_ratios=[4.3, 1.2 + CELL * 0.85 * columns])
    axes = left.subplots()
    chart(axes, found)
    share, nodes = engine.unit.encode / engine.unit.whole, engine.plan.num_nodes
    above = axes.secondary_xaxis(
        "top", functions=(lambda k: 100 * (1 - share * (1 - k / nodes)), lambda m: nodes * (1 - (1 - m / 100) / share))
    )
    above.set_xlabel("MACs of the UNet, % of the plain run")
    image_grid(right, [*rows.values()], [""] * columns, [*rows])
    shown = "”, “".join(experiment.labels[:SHOWN])
    return Drawing(
        figure,
        f"Strategies for the key timesteps of {steps} DDIM steps, without prior noise; labels are "
        "those of the paper's table 5 (u: uniform, n: non-uniform); n IV is its own. Between key "
        "timesteps the features are held, or extrapolated from the last three (quadratic). Markers: mean "
        f"over the images; bars: two standard errors.{remark} Images: “{shown}”, with the mean "
        "PSNR to the plain run over all images.",
        found,
    )


def errors(
    experiment: Experiment, engine: Engine, plans: Mapping[tuple[str, str], AnyPlan]
) -> tuple[dict[str, Points], dict[str, list[Tensor]]]:
    """The distance of each plan from the plain run, by series and plan; and rows of images for the strategies.
    `engine`: of the plain run. `plans`: by series and name."""
    plain = experiment.latents(engine)
    plain_images = experiment.decode(engine, plain)
    found: dict[str, Points] = {label: {} for label in SERIES}
    rows = {"plain": list(plain_images[:SHOWN])}
    for (label, spec), plan in plans.items():
        engine = experiment.engine("ddim", engine.recipe.steps, plan)
        images = experiment.decode(engine, latents := experiment.latents(engine))
        error = (latents - plain).square().flatten(1).mean(1).cpu().numpy()
        found[label][spec] = {
            "keys": len(plan.keys),
            "mean": error.mean(),
            "standard_error": standard_error(error),
            "mse": error,
            "psnr": psnr(images, plain_images).mean(),
        }
        if spec in STRATEGIES:
            rows[f"{STRATEGIES[spec]}\n{found[label][spec]['psnr']:.1f} dB"] = list(images[:SHOWN])
    return found, rows


def standard_error(values: np.ndarray) -> np.floating:
    """The standard error of the mean of (N,) values; 0 for a single value, whose error is unknown."""
    return values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.float64(0)


def chart(axes: Axes, found: Mapping[str, Points]) -> None:
    """Draw the error against the number of key timesteps, a curve for each series that has points."""
    for label, (_, propagate, colour, marker) in SERIES.items():
        points = sorted(found[label].values(), key=lambda point: point["keys"])
        if not points:
            continue
        means, errors = (np.array([point[name] for point in points]) for name in ("mean", "standard_error"))
        lower = np.minimum(2 * errors, 0.9 * means)  # a logarithmic axis has no 0
        axes.errorbar(
            [point["keys"] for point in points],
            means,
            yerr=[lower, 2 * errors],
            fmt=marker,
            color=colour,
            label=label,
            markersize=4,
            elinewidth=0.7,
            markerfacecolor=colour if propagate == "hold" else "white",
        )
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.margins(x=0.08)
    for spec, point in found["table 5, held"].items():
        kind, _, numeral = STRATEGIES[spec].rpartition(" ")
        axes.annotate(
            f"{kind[0]} {numeral}",
            (point["keys"], point["mean"]),
            xytext=(6, 1),
            textcoords="offset points",
            fontsize=7,
        )
    axes.set_xlabel("key timesteps")
    axes.set_ylabel("latents' mean squared error to the plain run")
    axes.legend()
