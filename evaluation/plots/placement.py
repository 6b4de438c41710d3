"""Where the key steps are, and how many: the strategies of table 5 (figure 9), and calibrated ones."""

from __future__ import annotations

import argparse

import numpy as np
from matplotlib.axes import Axes

from evaluation.plots.drawing import CELL, COLOURS, Drawing, canvas, picture_rows
from evaluation.plots.scene import Scene
from ldm.images import psnr

STRATEGIES = {"uniform-1": "uniform I", "uniform-2": "uniform II", "uniform-3": "uniform III",
              "nonuniform-1": "non-uniform I", "nonuniform-2": "non-uniform II", "nonuniform-3": "non-uniform III",
              "nonuniform-4": "non-uniform IV"}        # by plan, as table 5 calls them
UNIFORM = ("uniform:2", "uniform:3", "uniform:4", "uniform:6", "uniform:8", "uniform:12")
CALIBRATED = ("auto:5", "auto:7", "auto:9", "auto:13", "auto:18", "auto:25")
SHOWN = 3       # pictures beside the curves


def make(scene: Scene, args: argparse.Namespace) -> Drawing:
    plain = scene.latents(engine := scene.engine("ddim", args.steps))
    pictures = scene.decode(engine, plain)
    found: dict[str, dict[str, object]] = {}
    rows = {"plain": list(pictures[:SHOWN])}
    calibrated, missing = usable(scene, args.steps)
    for spec in (*STRATEGIES, *UNIFORM, *calibrated):
        latents = scene.latents(engine := scene.engine("ddim", args.steps, spec))
        made = scene.decode(engine, latents)
        error = (latents - plain).square().flatten(1).mean(1).cpu().numpy()
        found[spec] = {"keys": len(engine.plan.keys), "mse": error, "psnr": psnr(made, pictures).mean()}
        if spec in STRATEGIES:
            rows[f"{STRATEGIES[spec]}\n{found[spec]['psnr']:.1f} dB"] = list(made[:SHOWN])
    figure = canvas(5.4 + CELL * 0.85 * min(SHOWN, scene.count), 0.5 + CELL * 0.72 * len(rows))
    left, right = figure.subfigures(1, 2, width_ratios=[4.3, 1.2 + CELL * 0.85 * min(SHOWN, scene.count)])
    axes = left.subplots()
    chart(axes, found, calibrated)
    share = engine.unit.encode / engine.unit.whole
    above = axes.secondary_xaxis("top", functions=(lambda k: 100 * (1 - share * (1 - k / args.steps)),
                                                   lambda m: args.steps * (1 - (1 - m / 100) / share)))
    above.set_xlabel("MACs of the UNet, % of the plain run")
    picture_rows(right, [*rows.values()], [""] * min(SHOWN, scene.count), [*rows])
    shown = "”, “".join(scene.names[:SHOWN])
    return Drawing(figure, f"Strategies for the key steps of {args.steps} DDIM steps, without prior noise; labels are "
                           "those of the paper's table 5 (u: uniform, n: non-uniform); n IV is its own. Marks: mean "
                           f"over the pictures; bars: its 95 % interval.{missing} Pictures: “{shown}”, with the mean "
                           "PSNR to the plain run.", found)


def usable(scene: Scene, steps: int) -> tuple[tuple[str, ...], str]:
    """The calibrated plans if the model has a calibration of such a run, and a remark if not."""
    try:
        specs = tuple(spec for spec in CALIBRATED if int(spec.partition(":")[2]) <= steps)
        for spec in specs:
            scene.plan(spec, "ddim", steps)
    except ValueError:
        return (), " These weights have no calibration for such runs, so there are no calibrated plans."
    return specs, ""


def chart(axes: Axes, found: dict[str, dict[str, object]], calibrated: tuple[str, ...]) -> None:
    for specs, label, colour, marker in ((UNIFORM, "every n-th step", COLOURS[0], "o-"),
                                         (calibrated, "calibrated (auto)", COLOURS[2], "s-"),
                                         (STRATEGIES, "table 5", COLOURS[1], "D")):
        if not specs:
            continue
        points = sorted(specs, key=lambda spec: found[spec]["keys"])
        means = [np.mean(found[spec]["mse"]) for spec in points]
        errors = [1.96 * np.std(found[spec]["mse"]) / np.sqrt(len(found[spec]["mse"])) for spec in points]
        keys = [found[spec]["keys"] for spec in points]
        lower = np.minimum(errors, 0.9 * np.asarray(means))     # the axis has no place for 0
        axes.errorbar(keys, means, yerr=[lower, errors], fmt=marker, color=colour, label=label, markersize=4,
                      elinewidth=0.7)
    for spec, label in STRATEGIES.items():
        place = found[spec]["keys"], np.mean(found[spec]["mse"])
        axes.annotate(f"{label[0]} {label.rpartition(' ')[2]}", place, xytext=(5, 3), textcoords="offset points",
                      fontsize=7)
    axes.set_yscale("log")
    axes.set_xlabel("key steps")
    axes.set_ylabel("latents' mean squared error to the plain run")
    axes.legend()
