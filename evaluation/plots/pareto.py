"""Error against cost, for plans and for fewer steps.

Each row of the YAML file samples all images by one method, from the same noise as the other rows. The error is the
distance from the plain run of the row's sampler, or from a finer run (latents, PSNR, SSIM); with a dataset, also
feature distances, the Fréchet distance from real images, and concept retrieval. The costs are the UNet's MACs, and
those on the critical path (what must run in sequence if decoders that share features run in parallel), relative to the
plain run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle
from pathlib import Path

from matplotlib.axes import Axes

from evaluation.plots.comparison import Comparison, Row, Values, compare, read_rows
from evaluation.plots.drawing import MARKERS, Drawing, new_figure
from evaluation.plots.experiment import Experiment, uncalibrated
from ldm.io.errors import SettingError, fault_of
from ldm.models.diffusion.propagation.plan import AnyPlan

# Okabe and Ito's colours without the yellow, which is faint on paper.
COLOURS = ("#000000", "#7F7F7F", "#D55E00", "#0072B2", "#56B4E9", "#009E73", "#CC79A7", "#E69F00")
COSTS = {"macs_share": "MACs of the UNet", "critical_share": "MACs on the critical path"}
COLUMNS = {
    "MACs": ("macs_share", "{:.0%}"),
    "critical path": ("critical_share", "{:.0%}"),
    "latents' MSE": ("mse_latents", "{:.5f}"),
    "PSNR": ("psnr", "{:.1f}"),
    "SSIM": ("ssim", "{:.3f}"),
    "feature distance": ("feature_distance", "{:.1f}"),
    "Fréchet distance": ("fid_real", "{:.1f}"),
    "R@5": ("R@5", "{:.2f}"),
}


def draw_pareto(experiment: Experiment, *, steps: int, rows: str, data: str | None, cache: Path) -> Drawing:
    """Draw the rows of a YAML file, see `read_rows`. `steps`: of the plain runs. `data`, `cache`: see `Comparison` and
    `compare`."""
    if data and experiment.count < 2:
        raise SettingError(
            "count", f"a Fréchet distance from a dataset needs at least 2 images; got {experiment.count}"
        )
    with fault_of("rows"):
        methods, reference = read_rows(rows, steps)
        plans, remark = plans_of(experiment, methods)
    comparison = Comparison(experiment, data, steps, reference)
    measured_from = f"{reference} steps of DDIM" if reference else "the plain run"
    values = compare(comparison, plans, cache)
    figure = new_figure(8, 9)
    panels = figure.subplots(2, 1, sharex=True, sharey=True)
    for axes, (cost, label) in zip(panels, COSTS.items(), strict=True):
        plot(axes, [*values.values()], cost)
        axes.set_xlabel(f"{label}, % of the plain {steps} steps")
        axes.set_ylabel(f"latents' mean squared error\nto {measured_from}")
    panels[0].xaxis.set_tick_params(labelbottom=True)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    caption = (
        f"Error, to {measured_from}, against the cost of a run; mean over the images. The plain run is that of the "
        f"same sampler with {steps} steps. Lines join the rows of a family that no cheaper row of it equals."
        f"{' The prompts are captions of the dataset.' if data else ''}{remark}"
    )
    return Drawing(figure, caption, {"rows": values}, settings=comparison.settings, table="\n".join(table(values)))


def plans_of(experiment: Experiment, rows: Sequence[Row]) -> tuple[dict[Row, AnyPlan], str]:
    """The plan of each row, and a sentence for the caption if some need a calibration that is not there. Raises
    ValueError: see `Experiment.plan`."""
    plans = {
        row: experiment.plan_if_calibrated(row.plan, row.sampler, row.steps, row.propagate, row.spacing) for row in rows
    }
    there = {row: plan for row, plan in plans.items() if plan is not None}
    return there, uncalibrated(row.plan for row in plans if row not in there)


def table(rows: Mapping[str, Values]) -> Iterator[str]:
    """Lines of a Markdown table, with a column for each measure that some row has."""
    columns = {name: how for name, how in COLUMNS.items() if any(how[0] in values for values in rows.values())}
    yield "| " + " | ".join(["method", *columns]) + " |"
    yield "|---" * (len(columns) + 1) + "|"
    for name, values in rows.items():
        cells = ("" if values.get(key) is None else form.format(values[key]) for key, form in columns.values())
        yield "| " + " | ".join([name, *cells]) + " |"


def plot(axes: Axes, rows: Sequence[Values], cost: str) -> None:
    """Draw the error against one of COSTS: a marker per row that has an error, a line along each family's front."""
    families = dict.fromkeys(values["family"] for values in rows)
    for family, colour, marker in zip(families, cycle(COLOURS), cycle(MARKERS), strict=False):
        points = [
            (100 * values[cost], values["mse_latents"], values["label"].format(**values))
            for values in rows
            if values["family"] == family and values["mse_latents"] > 0
        ]  # a logarithmic axis has no 0
        axes.plot(
            [x for x, *_ in points],
            [y for _, y, _ in points],
            marker,
            color=colour,
            label=family,
            markersize=4.5,
            zorder=4,
        )  # above the labels
        axes.plot(*zip(*front([point[:2] for point in points]), strict=True), color=colour, linewidth=0.8)
        for x, y, label in points:
            axes.annotate(
                label,
                (x, y),
                xytext=(5, 0),
                textcoords="offset points",
                va="center",
                fontsize=6.5,
                color=colour,
                bbox={"facecolor": "white", "alpha": 0.7, "linewidth": 0, "pad": 0.3},
            )
    axes.set_yscale("log")
    axes.set_xlim(0, 105 * max([1.0, *(values[cost] for values in rows)]))


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points (cost, error) that no cheaper point is as good as, by cost."""
    best: list[tuple[float, float]] = []
    for cost, error in sorted(points):
        if not best or error < best[-1][1]:
            best.append((cost, error))
    return best
