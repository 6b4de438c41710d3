"""Error against cost, for plans and for fewer steps.

Each row of the YAML file samples all images by one method, from the same noise as the other rows. The error is the
distance from the plain run of the row's sampler, or from a finer run: latents, PSNR, SSIM, and LPIPS where its weights
are, else features of EfficientNet-lite0. With a dataset and many images also the Fréchet distance from real images and
concept retrieval. The costs are the UNet's MACs, and those on the critical path (what must run in sequence if decoders
that share features run at the same time), relative to the plain run.
"""

from __future__ import annotations

import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import cycle, product
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from matplotlib.axes import Axes
from pydantic import Field, model_validator
from torch import Tensor
from tqdm import tqdm

from evaluation.metrics.extractors import load_extractor
from evaluation.metrics.frechet import distance, distance_interval, gaussian_of
from evaluation.metrics.paired import LPIPS_WEIGHTS, Measure, load_lpips, load_ssim
from evaluation.metrics.retrieval import Queries, RealImages, choose_queries, features_of, load_real_images, share
from evaluation.plots.drawing import MARKERS, Drawing, new_figure, note
from evaluation.plots.experiment import BATCH, Experiment
from evaluation.protocols.protocol import reading
from ldm.cli.arguments import SPACINGS
from ldm.cli.parser import MOST_STEPS
from ldm.data.emoji import EmojiDataset
from ldm.io.arrays import load_array
from ldm.io.errors import SettingError, fault_of, one_line
from ldm.io.files import NotNegative, Schema, Text, atomic_write, file_sha256, json_sha256, parse, read_json, write_json
from ldm.io.images import from_pil, psnr, to_pil
from ldm.models.diffusion.loop import State
from ldm.models.diffusion.propagation.plan import POLYNOMIALS, AnyPlan, ForecastName
from ldm.sampling.engine import Cost, Engine, Recipe
from ldm.sampling.generate import Item, digest, prompt_items

# Okabe and Ito's colours without the yellow, which is faint on paper.
COLOURS = ("#000000", "#7F7F7F", "#D55E00", "#0072B2", "#56B4E9", "#009E73", "#CC79A7", "#E69F00")
COSTS = {"macs_share": "MACs of the UNet", "critical_share": "MACs on the critical path"}
COLUMNS = {
    "MACs": ("macs_share", "{:.0%}"),
    "critical path": ("critical_share", "{:.0%}"),
    "latents' MSE": ("mse_latents", "{:.6f}"),
    "MSE to own plain run": ("mse_plain", "{:.6f}"),
    "PSNR": ("psnr", "{:.1f}"),
    "SSIM": ("ssim", "{:.3f}"),
    "LPIPS": ("lpips", "{:.4f}"),
    "EfficientNet-lite0 distance": ("feature_distance", "{:.2f}"),
    "Fréchet distance": ("fid_real", "{:.1f}"),
    "R@5": ("R@5", "{:.2f}"),
}
MANY = 1000  # images, from which on a Fréchet distance and retrieval are measured
MOST_VALUES = 2**31  # of kept latents
RESAMPLES = 20  # for the interval of a Fréchet distance


def draw_pareto(experiment: Experiment, *, steps: int, rows: str, data: str | None, cache: Path) -> Drawing:
    """Draw the rows of a YAML file, see `read_rows`. `steps`: of the plain runs. `data`, `cache`: see `Comparison`."""
    with fault_of("rows"):
        methods, reference = read_rows(rows, steps)
        how = {row: (row.plan, row.sampler, row.steps, row.propagate, row.spacing, row.eta) for row in methods}
        plans, remark = experiment.plans(how)
    comparison = Comparison(experiment, data, steps, reference, cache)
    measured_from = f"{reference} steps of DDIM" if reference else "the plain run"
    few = f" The Fréchet distance and retrieval are left out: they need {MANY} images."
    few *= bool(data) and experiment.count < MANY
    values = compare(comparison, plans)
    figure = new_figure(8, 9)
    panels = figure.subplots(2, 1, sharex=True, sharey=True)
    for axes, (cost, label) in zip(panels, COSTS.items(), strict=True):
        plot(axes, [*values.values()], cost)
        axes.set(xlabel=f"{label}, % of the plain {steps} steps")
        axes.set(ylabel=f"latents' mean squared error\nto {measured_from}")
    panels[0].xaxis.set_tick_params(labelbottom=True)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    caption = (
        f"Error, to {measured_from}, against the cost of a run; mean over the images. The plain run is that of the "
        f"same sampler with {steps} steps. Lines join the rows of a family that no cheaper row of it equals; no others "
        f"have labels."
        f"{' The prompts are captions of the dataset.' if data else ''}{few}{remark}"
    )
    return Drawing(figure, caption, {"rows": values}, settings=comparison.settings, table="\n".join(table(values)))


def table(rows: Mapping[str, Values]) -> Iterator[str]:
    """Lines of a Markdown table, with a column for each measure that some row has."""
    columns = {name: how for name, how in COLUMNS.items() if any(how[0] in values for values in rows.values())}
    yield "| " + " | ".join(["method", *columns]) + " |"
    yield "|---" * (len(columns) + 1) + "|"
    for name, values in rows.items():
        cells = (cell(values, key, form) for key, form in columns.values())
        yield "| " + " | ".join([name, *cells]) + " |"


def cell(values: Values, key: str, form: str) -> str:
    """A value, with its 95 % interval if it has one."""
    if values.get(key) is None:
        return ""
    interval = values.get(f"{key}_interval")
    return form.format(values[key]) + (f" ({' to '.join(map(form.format, interval))})" if interval else "")


def plot(axes: Axes, rows: Sequence[Values], cost: str) -> None:
    """Draw the error against one of COSTS: a marker per row that has an error, a line along each family's front, with
    the labels of the rows there."""
    families = dict.fromkeys(values["family"] for values in rows)  # 8 colours and 7 markers: 56 look different
    for family, colour, marker in zip(families, cycle(COLOURS), cycle(MARKERS[:7]), strict=False):
        labels = {
            (100 * values[cost], values["mse_latents"]): values["label"].format(**values)
            for values in rows
            if values["family"] == family and values["mse_latents"]
        }  # a logarithmic axis has no 0
        # Markers stand above the labels.
        look = {"color": colour, "label": family, "markersize": 4.5, "zorder": 4}
        axes.plot([x for x, _ in labels], [y for _, y in labels], marker, **look)
        best = front([*labels])
        axes.plot(*zip(*best, strict=True), color=colour, linewidth=0.8)
        style = {"facecolor": "white", "alpha": 0.7, "linewidth": 0, "pad": 0.3}
        for point in best:
            note(axes, labels[point], point, (5, 0), va="center", fontsize=6.5, color=colour, bbox=style)
    axes.set_yscale("log")
    axes.set_xlim(0, 105 * max([1.0, *(values[cost] for values in rows)]))


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points (cost, error) that no cheaper point is as good as, by cost."""
    best: list[tuple[float, float]] = []
    for cost, error in sorted(points):
        if not best or error < best[-1][1]:
            best.append((cost, error))
    return best


# Methods of sampling, from a YAML file such as evaluation/plots/pareto.yaml: the error and the cost of each.

Values = dict[str, Any]  # of a row: its costs and errors, JSON values
LISTS = ("sampler", "steps", "plan", "propagate", "spacing")  # fields that may be lists: one row for each value


class Row(Schema):
    """A method of sampling, see `ldm.sampling.engine.Recipe` and `load_plan`."""

    family: Text  # rows of a family are drawn alike
    steps: Annotated[int, Field(ge=1, le=MOST_STEPS)]
    sampler: Text = "ddim"
    plan: Text = "off"
    propagate: ForecastName | None = None
    eta: NotNegative = 0.0
    noise_weight: NotNegative = 0.0
    guidance_reuse: bool | Literal[POLYNOMIALS] = False
    spacing: Literal[SPACINGS] | None = None
    label: str = ""  # text beside the row's marker; may name fields of the row in braces

    @model_validator(mode="after")
    def _has_a_label_of_its_fields(self) -> Row:
        try:
            self.label.format(**dict(self))
        except (LookupError, AttributeError, TypeError, ValueError):
            raise ValueError(f"label may have {', '.join(Row.model_fields)} in braces; got {self.label!r}") from None
        return self

    def __str__(self) -> str:
        parts = [" ".join([self.sampler, str(self.steps)] + [self.spacing] * (self.spacing is not None))]
        parts += [f"eta {self.eta:g}"] * (self.eta > 0) + [self.plan] * (self.plan != "off")
        parts += [self.propagate] * (self.propagate is not None) + ["guidance reused"] * (self.guidance_reuse is True)
        parts += [f"guidance {self.guidance_reuse}"] * isinstance(self.guidance_reuse, str)
        return ", ".join(parts + [f"prior noise {self.noise_weight}"] * (self.noise_weight > 0))


class _File(Schema):
    rows: Annotated[list[dict[str, Any]], Field(min_length=1)]
    reference: Annotated[int, Field(ge=1, le=MOST_STEPS)] | None = None


def read_rows(path: str, steps: int) -> tuple[list[Row], int | None]:
    """The rows of a file, with lists expanded, and the steps of the reference, see `Comparison`. `steps`: of rows that
    do not state their number of steps. Raises ValueError: the file can't be read, or has other content."""
    with reading("file of rows as in evaluation/plots/pareto.yaml", Path(path)) as content:
        file = parse(_File, content)
        rows = [row for k, entry in enumerate(file.rows, 1) for row in expanded(f"row {k}", entry, steps)]
        if twice := [name for name, number in Counter(map(str, rows)).items() if number > 1]:
            raise ValueError(f"two rows are {twice[0]!r}; expected each method once")
    return rows, file.reference


def expanded(place: str, entry: dict[str, Any], steps: int) -> list[Row]:
    """The rows of one entry; `place` names it in messages. See `read_rows`."""
    lists = {name: entry[name] if isinstance(entry[name], list) else [entry[name]] for name in LISTS if name in entry}
    if empty := [name for name, values in lists.items() if not values]:
        raise ValueError(f"{place}: {empty[0]} is an empty list; expected a value or more")
    chosen = (dict(zip(lists, values, strict=True)) for values in product(*lists.values()))
    return [parse(Row, {"steps": steps} | entry | values, place) for values in chosen]


# The comparison


@dataclass(frozen=True)
class Sampled:
    """The images of one method."""

    latents: Tensor  # (N, C, h, w)
    images: Tensor  # (N, 3, H, W) in [-1, 1], with the 256 levels that files have
    cost: Cost  # of one image


@dataclass(frozen=True)
class Comparison:
    """What all rows have in common.

    reference: steps of the DDIM run whose distance is the error; None = the plain run of the row's sampler.
    data: a dataset whose captions are the prompts, and whose images the samples are compared with; None = the
           experiment's items, and no comparison with real images.
    cache: folder of what is measured, and of the latents of each batch, so that a stopped run loses one at most. A file
           is named by the hash of everything that its content depends on.
    """

    experiment: Experiment
    data: str | None
    steps: int  # of the plain runs, which cost 100 %
    reference: int | None
    cache: Path

    @cached_property
    def queries(self) -> Queries:
        """The dataset's captions that are the prompts."""
        count = self.experiment.count
        with fault_of("data"):
            found = choose_queries(EmojiDataset(self.data, split="train", max_tier=1), count, self.experiment.seed)
        if len(found.captions) < count:
            raise SettingError("count", f"{self.data} has {len(found.captions)} captions; got {count}")
        return found

    @cached_property
    def real(self) -> RealImages:
        """The dataset's images, with their features."""
        return load_real_images(self.data, batch_size=BATCH)

    @cached_property
    def items(self) -> list[Item]:
        """The images to sample."""
        if not self.data:
            return self.experiment.items
        return prompt_items(self.queries.captions, 1, self.experiment.seed, by_position=True)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What the values depend on, beside the experiment's own settings and the row, as JSON values."""
        experiment = self.experiment
        with fault_of("data"):
            data = self.data and file_sha256(*(Path(self.data) / name for name in ("pictures.npy", "captions.json")))
        found = experiment.loading | {"steps": self.steps, "data": data and data[:16]}
        found["items"] = digest([item.settings() for item in self.items])
        return found | ({} if self.reference is None else {"reference": self.reference})

    def sample(self, row: Row, plan: AnyPlan) -> Sampled:
        """The images of a row."""
        engine, firsts = self.engine(row, plan), range(0, len(self.items), BATCH)
        parts = [self.batch(engine, self.file(row, plan, f"{first}.npz"), first) for first in firsts]
        latents = torch.cat([latents for latents, _ in parts])
        cost = Cost.mean([cost for part, cost in parts for _ in part])
        images = torch.stack([from_pil(image) for image in to_pil(self.experiment.decode(engine, latents))])
        return Sampled(latents, images, cost)

    def batch(self, engine: Engine, path: Path, first: int) -> tuple[Tensor, Cost]:
        """The latents of a batch, and the cost of an image; kept in the file `path`."""
        if (kept := read_latents(path)) is None:
            latents, cost = engine.sampled(self.items[first : first + BATCH])
            kept = latents.cpu(), cost
            write_latents(path, *kept)
        return kept

    def engine(self, row: Row, plan: AnyPlan) -> Engine:
        fields = {"eta": row.eta, "guidance_reuse": row.guidance_reuse, "spacing": row.spacing}
        return self.experiment.engine(row.sampler, row.steps, plan, row.noise_weight, **fields)

    def file(self, row: Row, plan: AnyPlan, suffix: str) -> Path:
        return self.cache / f"{json_sha256(depends_on(self, row, plan))[:24]}.{suffix}"

    @cached_property
    def plain(self) -> Callable[..., Sampled]:
        """The images of a plain run, each made once: sampler, spacing, steps and eta -> images."""

        @cache
        def run(sampler: str, spacing: str | None, steps: int, eta: float) -> Sampled:
            row = Row(family="plain", steps=steps, sampler=sampler, spacing=spacing, eta=eta)
            return self.sample(row, self.experiment.plan("off", sampler, steps, spacing=spacing))

        return run

    def values(self, row: Row, plan: AnyPlan) -> Values:
        """All values of a row.

        Fresh noise is that of the plain run at each of its steps. So a run with eta is measured from it alone, and has
        no error with another number of steps.
        """
        own, found = self.plain(row.sampler, row.spacing, self.steps, row.eta), self.sample(row, plan)
        values: Values = {"macs": found.cost.macs, "critical": found.cost.critical}
        values |= {f"{name}_share": value / getattr(own.cost, name) for name, value in values.items()}
        values["mse_latents"] = None
        if not row.eta:
            reference = self.plain("ddim", None, self.reference, 0.0) if self.reference else own
            values |= self.distances(found, reference)
        elif row.steps == self.steps:
            values |= self.distances(found, own)
        if self.reference and row.steps == self.steps:
            values["mse_plain"] = mse(found, own)
        return values | (self.of_many(found, str(row)) if self.data and self.experiment.count >= MANY else {})

    def distances(self, found: Sampled, reference: Sampled) -> Values:
        """How far the images are from those of another run."""
        ratio = psnr(found.images, reference.images).numpy()
        name, distance_of = self.perceptual
        pairs = zip(found.images.split(BATCH), reference.images.split(BATCH), strict=True)
        return {
            "mse_latents": mse(found, reference),
            "psnr": float(np.mean(ratio)) if np.isfinite(ratio).all() else None,
            "ssim": float(load_ssim()(found.images, reference.images).mean()),
            name: float(torch.cat([distance_of(*pair) for pair in pairs]).mean()),
        }

    @cached_property
    def perceptual(self) -> tuple[str, Measure]:
        """The name and measure of a perceptual distance: LPIPS where its weights are."""
        with fault_of("packages"):
            if (Path(torch.hub.get_dir()) / "checkpoints" / LPIPS_WEIGHTS).is_file():
                return "lpips", load_lpips(torch.device("cpu"))
            network = load_extractor("efficientnet-lite0", device="cpu")
        return "feature_distance", lambda a, b: (network(a) - network(b)).norm(dim=1)

    def of_many(self, found: Sampled, label: str) -> Values:
        """Values of the images as a set: the Fréchet distance from the real images, and retrieval, with intervals."""
        features = features_of(found.images, self.real.extractor, BATCH, label)
        samples, real = features.double().numpy(), gaussian_of(self.real.features.double().numpy())
        fid = distance(gaussian_of(samples), real)
        interval = distance_interval(fid, samples, real, RESAMPLES, self.experiment.seed)
        retrieved = share(self.real.nearest_to(features, self.queries.entries).hits[5])
        retrieved = {"R@5": retrieved["share"], "R@5_interval": retrieved["interval"]}
        return {"fid_real": fid, "fid_real_interval": interval, **retrieved}


def mse(one: Sampled, other: Sampled) -> float:
    """Mean squared difference of the latents."""
    return float((one.latents - other.latents).square().mean())


def write_latents(path: Path, latents: Tensor, cost: Cost) -> None:
    """Keep a batch's latents and cost in an npz file. Raises SettingError: `out`: it can't be written."""
    with fault_of("out", (OSError,)), atomic_write(path) as part, part.open("wb") as stream:
        np.savez(stream, latents=latents.numpy(), cost=np.array([cost.macs, cost.critical]))


def read_latents(path: Path) -> tuple[Tensor, Cost] | None:
    """What `write_latents` kept; None if there is no file, or a damaged one."""
    try:
        latents, cost = (load_array(path, name, MOST_VALUES) for name in ("latents", "cost"))
        return torch.from_numpy(latents), Cost(*map(int, cost))
    except (OSError, ValueError, TypeError, zipfile.BadZipFile):
        return None


def compare(comparison: Comparison, plans: Mapping[Row, AnyPlan]) -> dict[str, Values]:
    """The values of all rows, by their names; plans: of the rows. Raises SettingError: `rows`: a row can't be sampled;
    `data`, `count`: see `Comparison`; `out`: the cache can't be written."""
    with fault_of("packages"):
        load_ssim()
    rows = {}
    for row, plan in tqdm(plans.items(), desc="rows", unit="row", disable=None):
        try:
            path = comparison.file(row, plan, "json")
            if (values := cached(path)) is None:
                values = comparison.values(row, plan)
                with fault_of("out", (OSError,)):
                    write_json(path, {"of": depends_on(comparison, row, plan), "values": values})
        except SettingError:
            raise
        except ValueError as error:
            raise SettingError("rows", f"{row}: {one_line(error)}") from error
        rows[str(row)] = dict(row) | {"resolved": plan.settings()} | values
    return rows


def depends_on(comparison: Comparison, row: Row, plan: AnyPlan) -> dict[str, Any]:
    """Everything that a row's values depend on, as JSON values."""
    experiment = comparison.experiment
    method = row.model_dump(include={"sampler", "steps", "spacing", "eta", "noise_weight", "guidance_reuse"})
    recipes = [experiment.recipe(row.sampler, steps, spacing=row.spacing) for steps in (row.steps, comparison.steps)]
    method["rules"] = [rule_digest(recipe, experiment.timesteps) for recipe in recipes]
    return experiment.settings() | comparison.settings | {"row": method | {"plan": plan.settings()}}


def rule_digest(recipe: Recipe, timesteps: int) -> str:
    """What the solver does now: where it takes a number in a run on a known problem, in eight digits."""
    alphas_cumprod = torch.linspace(0.999, 0.001, timesteps, dtype=torch.float64)
    rule = recipe.rule(alphas_cumprod, lambda i, x: torch.ones_like(x))
    state = State(torch.ones(1, 1, 1, 1, dtype=torch.float64))
    for i in range(len(rule.nodes)):
        state = rule.step(state, i, state.x.sin())
    return f"{state.x.item():.8e}"


def cached(path: Path) -> Values | None:
    """The values in a file; None if there is none, or a damaged one."""
    try:
        return dict(read_json(path)["values"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
