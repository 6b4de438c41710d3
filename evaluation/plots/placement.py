"""Where the key steps are, and how many: the strategies of table 5 (figure 9), and calibrated ones."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from evaluation.plots.drawing import CELL, COLOURS, Drawing, canvas, picture_rows
from evaluation.plots.scene import Scene, uncalibrated
from ldm.io.images import psnr
from ldm.models.diffusion.propagation.plan import AnyPlan

STRATEGIES = {
    "uniform-1": "uniform I",
    "uniform-2": "uniform II",
    "uniform-3": "uniform III",
    "nonuniform-1": "non-uniform I",
    "nonuniform-2": "non-uniform II",
    "nonuniform-3": "non-uniform III",
    "nonuniform-4": "non-uniform IV",
}  # by plan, as table 5 calls them
UNIFORM = ("uniform:2", "uniform:3", "uniform:4", "uniform:6", "uniform:8", "uniform:12")
CALIBRATED = ("auto:5", "auto:7", "auto:9", "auto:13", "auto:18", "auto:25")
# What is drawn as one series: plans, what the decoder gets between key steps, colour and mark.
SERIES = {
    "every n-th step, held": (UNIFORM, "hold", COLOURS[0], "o-"),
    "every n-th step, quadratic": (UNIFORM, "quadratic", COLOURS[0], "o--"),
    "calibrated (auto), held": (CALIBRATED, "hold", COLOURS[2], "s-"),
    "calibrated (auto), quadratic": (CALIBRATED, "quadratic", COLOURS[2], "s--"),
    "table 5, held": ((*STRATEGIES,), "hold", COLOURS[1], "D"),
}
SHOWN = 3  # pictures beside the curves


def make(scene: Scene, args: argparse.Namespace) -> Drawing:
    plain = scene.latents(engine := scene.engine("ddim", args.steps))
    pictures = scene.decode(engine, plain)
    found: dict[str, dict[str, dict[str, Any]]] = {label: {} for label in SERIES}
    rows = {"plain": list(pictures[:SHOWN])}
    plans, remark = plans_of(scene, args.steps)
    for label, some in plans.items():
        for spec, plan in some.items():
            engine = scene.engine("ddim", args.steps, plan)
            made = scene.decode(engine, latents := scene.latents(engine))
            error = (latents - plain).square().flatten(1).mean(1).cpu().numpy()
            found[label][spec] = {
                "keys": len(plan.keys),
                "mean": error.mean(),
                "standard_error": standard_error(error),
                "mse": error,
                "psnr": psnr(made, pictures).mean(),
            }
            if spec in STRATEGIES:
                rows[f"{STRATEGIES[spec]}\n{found[label][spec]['psnr']:.1f} dB"] = list(made[:SHOWN])
    figure = canvas(5.4 + CELL * 0.85 * min(SHOWN, scene.count), 0.5 + CELL * 0.72 * len(rows))
    left, right = figure.subfigures(1, 2, width_ratios=[4.3, 1.2 + CELL * 0.85 * min(SHOWN, scene.count)])
    axes = left.subplots()
    chart(axes, found)
    share, nodes = engine.unit.encode / engine.unit.whole, engine.plan.num_nodes
    above = axes.secondary_xaxis(
        "top", functions=(lambda k: 100 * (1 - share * (1 - k / nodes)), lambda m: nodes * (1 - (1 - m / 100) / share))
    )
    above.set_xlabel("MACs of the UNet, % of the plain run")
    picture_rows(right, [*rows.values()], [""] * min(SHOWN, scene.count), [*rows])
    shown = "”, “".join(scene.names[:SHOWN])
    return Drawing(
        figure,
        f"Strategies for the key steps of {args.steps} DDIM steps, without prior noise; labels are "
        "those of the paper's table 5 (u: uniform, n: non-uniform); n IV is its own. Between key "
        "steps features are held, or those of the last three extrapolated (quadratic). Marks: mean "
        f"over the pictures; bars: two standard errors.{remark} Pictures: “{shown}”, with the mean "
        "PSNR to the plain run over all.",
        found,
    )


def plans_of(scene: Scene, steps: int) -> tuple[dict[str, dict[str, AnyPlan]], str]:
    """The plans of each series by name, and a remark if some can't be made for want of a calibration."""
    plans = {
        label: {spec: scene.plan_if_calibrated(spec, "ddim", steps, propagate) for spec in specs}
        for label, (specs, propagate, *_) in SERIES.items()
    }
    there = {label: {spec: plan for spec, plan in some.items() if plan is not None} for label, some in plans.items()}
    return there, uncalibrated(spec for label, some in plans.items() for spec in some if spec not in there[label])


def standard_error(values: np.ndarray) -> np.floating:
    """Of the mean of (N,); of one value nothing is known, which is drawn as 0."""
    return values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.float64(0)


def chart(axes: Axes, found: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> None:
    """Error against the number of key steps, one curve for each series (see `make`) that has points."""
    for label, (_, propagate, colour, marker) in SERIES.items():
        points = sorted(found[label].values(), key=lambda point: point["keys"])
        if not points:
            continue
        means, errors = (np.array([point[name] for point in points]) for name in ("mean", "standard_error"))
        lower = np.minimum(2 * errors, 0.9 * means)  # the axis has no place for 0
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
    axes.set_xlabel("key steps")
    axes.set_ylabel("latents' mean squared error to the plain run")
    axes.legend()
