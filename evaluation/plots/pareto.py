"""Quality against both costs, for plans and for fewer steps.

Each row of --rows makes all pictures, from the same noise for all rows. Quality is the distance from the plain run of
the row's own sampler (latents, PSNR, SSIM) and, with a dataset (--data), what has real pictures to compare with:
features, Fréchet distance, concept retrieval. Costs are the UNet's MACs, and those on the critical path (what must be
computed one after the other when decoders that share features run at the same time), as shares of the plain run's.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import cycle, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor
from tqdm import tqdm

from evaluation.metrics.distances import frechet
from evaluation.metrics.retrieval import SPLITS, RealSet, features_of, load_extractor
from evaluation.metrics.statistics import Moments
from evaluation.paired import Measure, load_ssim
from evaluation.plots.drawing import MARKERS, Drawing, canvas
from evaluation.plots.scene import BATCH, Scene, uncalibrated
from evaluation.protocols.yaml_file import reading
from evaluation.recognition import Asked
from evaluation.runs.folder import differences, some
from evaluation.table.spec import ROW, TABLE
from ldm.checkpoint import fingerprint
from ldm.cli.arguments import PROPAGATE
from ldm.data.emoji import EmojiPictures
from ldm.io.errors import BadInput, blame
from ldm.io.files import atomic_write, file_sha256, read_json
from ldm.io.images import from_pil, psnr, to_pil
from ldm.io.kinds import MAPPING, NUMBER, TEXT, Kind, check, choice, known, optional
from ldm.models.diffusion.propagation.plan import AnyPlan
from ldm.sampling.engine import Spent
from ldm.sampling.generate import Item, digest, prompt_items

LISTS = ("sampler", "steps", "plan", "propagate")  # what may be a list in a row: one row for each
FIELDS = {name: ROW[name] for name in ("steps", "sampler", "plan", "noise_weight")} | {
    "family": TEXT,
    "propagate": optional(choice(*PROPAGATE)),
    "guidance_reuse": Kind("true or false", lambda value: type(value) is bool),
    "label": Kind("text", lambda value: isinstance(value, str)),
}
KEPT = {"resolved": MAPPING, "macs_share": NUMBER, "critical_share": NUMBER, "mse_latents": NUMBER} | dict.fromkeys(
    ("psnr", "ssim", "feature_distance", "fid_real", "R@5"), optional(NUMBER)
)  # what is read of a finished row
# Okabe and Ito's colours but the yellow, which is faint on paper.
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
Values = dict[str, Any]  # of a row: what it is, what it costs, how good it is


@dataclass(frozen=True)
class Row:
    """One way to make pictures; see evaluation/plots/pareto.yaml.

    label: beside the row's mark, with fields of the row in braces.

    Raises:
        ValueError: a value that is not what it should be.
    """

    family: str
    steps: int
    sampler: str = "ddim"
    plan: str = "off"
    propagate: str | None = None
    noise_weight: float = 0.0
    guidance_reuse: bool = False
    label: str = ""

    def __post_init__(self) -> None:
        check("", vars(self), FIELDS)
        try:
            self.label.format(**vars(self))
        except (LookupError, AttributeError, TypeError, ValueError):
            raise ValueError(f"label may have {', '.join(FIELDS)} in braces; got {self.label!r}") from None

    def __str__(self) -> str:
        parts = [f"{self.sampler} {self.steps}"] + [self.plan] * (self.plan != "off")
        parts += [self.propagate] * (self.propagate is not None) + ["guidance reused"] * self.guidance_reuse
        return ", ".join(parts + [f"prior noise {self.noise_weight}"] * (self.noise_weight > 0))


def make(scene: Scene, args: argparse.Namespace) -> Drawing:
    if args.data and scene.count < 2:
        raise BadInput(f"--count: a Fréchet distance (--data) needs at least 2 pictures; got {scene.count}")
    with blame("--rows"):
        plans, remark = plans_of(scene, read_rows(args.rows, args.steps))
    with blame("packages"):
        bench = Bench(scene, args.data, args.steps, load_ssim())
    kept = results(bench, plans, Path(f"{args.out}.json"))
    rows = {str(row): kept[str(row)] | asdict(row) for row in plans}
    figure = canvas(8, 9)
    panels = figure.subplots(2, 1, sharex=True, sharey=True)
    for axes, (cost, label) in zip(panels, COSTS.items(), strict=True):
        plot(axes, [*rows.values()], cost)
        axes.set_xlabel(f"{label}, % of the plain {args.steps} steps")
        axes.set_ylabel("latents' mean squared error\nto the plain run")
    panels[0].xaxis.set_tick_params(labelbottom=True)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    notes = (
        f"Error against what a run costs; mean over the pictures. The plain run is that of the same sampler with "
        f"{args.steps} steps. Lines join the rows of a family that no cheaper one of it equals."
        f"{' Pictures of captions of the dataset.' if args.data else ''}{remark}"
    )
    return Drawing(figure, notes, {"rows": kept | rows}, table="\n".join(table(rows)), of=bench.settings)


def read_rows(path: str, steps: int) -> list[Row]:
    """The rows of a file, lists taken apart; of `steps` where they do not say how many.

    Raises:
        ValueError: it can't be read, or holds something else.
    """
    with reading("file of rows as in evaluation/plots/pareto.yaml", Path(path)) as content:
        known("it", content, {"rows"}, set())
        check("", content, {"rows": TABLE["rows"]})
        rows = [row for k, entry in enumerate(content["rows"], 1) for row in rows_of(f"row {k}", entry, steps)]
        if twice := [name for name, number in Counter(map(str, rows)).items() if number > 1]:
            raise ValueError(f"two rows are {twice[0]!r}; expected each way to make pictures once")
    return rows


def rows_of(place: str, entry: Any, steps: int) -> list[Row]:
    """The rows of one entry; see `read_rows`."""
    known(place, entry, {"family"}, {*FIELDS})
    lists = {name: entry[name] if isinstance(entry[name], list) else [entry[name]] for name in LISTS if name in entry}
    if empty := [name for name, values in lists.items() if not values]:
        raise ValueError(f"{place}: {empty[0]} is an empty list; expected a value or more")
    return [
        Row(**{"steps": steps} | entry | dict(zip(lists, values, strict=True))) for values in product(*lists.values())
    ]


def plans_of(scene: Scene, rows: Sequence[Row]) -> tuple[dict[Row, AnyPlan], str]:
    """What each row runs, and a remark if some can't be made for want of a calibration.

    Raises:
        ValueError: see `Scene.plan`.
    """
    plans = {row: scene.plan_if_calibrated(row.plan, row.sampler, row.steps, row.propagate) for row in rows}
    there = {row: plan for row, plan in plans.items() if plan is not None}
    return there, uncalibrated(row.plan for row in plans if row not in there)


# Measuring


@dataclass(frozen=True)
class Bench:
    """What all rows share.

    data:  a dataset, whose captions are pictured; None = the scene's items, and no real pictures to compare with.
    steps: of the plain runs.
    ssim:  of pairs of pictures, see `load_ssim`.
    """

    scene: Scene
    data: str | None
    steps: int
    ssim: Measure

    @cached_property
    def asked(self) -> Asked:
        """The captions of the dataset that are pictured."""
        count = self.scene.count
        with blame("--data"):
            asked = Asked.of(EmojiPictures(self.data, split="train", max_tier=1), count, self.scene.seed)
        if len(asked.captions) < count:
            raise BadInput(f"--count: {self.data} has {len(asked.captions)} captions; got {count}")
        return asked

    @cached_property
    def real(self) -> RealSet:
        """The pictures of the dataset, with their features."""
        with blame("--data"):
            pictures = [EmojiPictures(self.data, split=split, max_tier=2) for split in SPLITS]
        return RealSet.of(pictures, load_extractor(), BATCH)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What the values depend on beside what the scene names, as JSON values."""
        scene, items = self.scene, digest([item.settings() for item in self.items])
        with blame("--data"):
            data = self.data and file_sha256(*(Path(self.data) / name for name in ("pictures.npy", "captions.json")))
        return {
            "config": fingerprint(scene.setup.config_path)[:16],
            "averaged": scene.averaged,
            "precision": "autocast" if scene.autocast else "full",
            "steps": self.steps,
            "data": data and data[:16],
            "items": items,
        }

    @cached_property
    def items(self) -> list[Item]:
        if not self.data:
            return self.scene.items
        return prompt_items(self.asked.captions, 1, self.scene.seed, by_position=True)

    def made(self, row: Row, plan: AnyPlan) -> tuple[Tensor, Tensor, Spent]:
        """Latents, pictures (N, 3, H, W) in [-1, 1] as they are saved, and the cost of one picture."""
        engine = self.scene.engine(row.sampler, row.steps, plan, row.noise_weight, row.guidance_reuse)
        parts = [engine.sampled(self.items[k : k + BATCH]) for k in range(0, len(self.items), BATCH)]
        x = torch.cat([latents for latents, _ in parts])
        pictures = torch.stack([from_pil(image) for image in to_pil(self.scene.decode(engine, x))])
        return x, pictures, Spent.mean([spent for (latents, spent) in parts for _ in latents])

    def plain(self, sampler: str) -> tuple[Tensor, Tensor, Spent]:
        return self.made(Row("plain", self.steps, sampler), self.scene.plan("off", sampler, self.steps))

    def measure(self, row: Row, plan: AnyPlan, plain: tuple[Tensor, Tensor, Spent]) -> Values:
        """All values of one row; `plain` is what its sampler's plain run made."""
        x, pictures, spent = self.made(row, plan)
        ratio = psnr(pictures, plain[1]).numpy()
        return (
            asdict(row)
            | {
                "resolved": plan.settings(),
                "macs": spent.macs,
                "critical": spent.critical,
                "macs_share": spent.macs / plain[2].macs,
                "critical_share": spent.critical / plain[2].critical,
                "mse_latents": float((x - plain[0]).square().mean()),
                "psnr": float(np.mean(ratio)) if np.isfinite(ratio).all() else None,
                "ssim": float(self.ssim(pictures, plain[1]).mean()),
            }
            | (self.against_real(row, pictures, plain[1]) if self.data else {})
        )

    def against_real(self, row: Row, pictures: Tensor, plain: Tensor) -> Values:
        """What the dataset's pictures and features say of pictures (N, 3, H, W) in [-1, 1]."""
        ours, plains = (features_of(some, self.real.extract, BATCH, str(row)) for some in (pictures, plain))
        fid = frechet(*(Moments.of(f.double().numpy()).gaussian() for f in (ours, self.real.raw)))
        verdict = self.real.judge(to_pil(pictures), self.asked.entries, str(row))
        return {
            "feature_distance": float((ours - plains).norm(dim=1).mean()),
            "fid_real": fid,
            "R@5": float(np.mean(verdict.hits[5])),
        }


def results(bench: Bench, plans: Mapping[Row, AnyPlan], save: Path) -> dict[str, Values]:
    """Values by the rows' names: of these rows and of all that the figure's file has; it is written after each row.

    A row of the file is measured again if its plan resolves to other nodes than it did.

    Raises:
        BadInput: the file is of another run, or can't be read or written.
    """
    head = bench.scene.settings() | bench.settings
    kept = kept_rows(save, head)
    plains: dict[str, tuple[Tensor, Tensor, Spent]] = {}
    for row, plan in tqdm(plans.items(), desc="rows", unit="row", disable=None):
        if str(row) in kept and kept[str(row)]["resolved"] == plan.settings():
            continue
        with blame(f"--rows: {row}", (ValueError,)):
            if row.sampler not in plains:
                plains[row.sampler] = bench.plain(row.sampler)
            kept[str(row)] = bench.measure(row, plan, plains[row.sampler])
        with blame("--out", (OSError,)), atomic_write(save) as part:
            part.write_text(json.dumps(head | {"values": {"rows": kept}}, indent=1) + "\n", encoding="utf-8")
    return kept


def kept_rows(save: Path, head: Mapping[str, Any]) -> dict[str, Values]:
    """The rows that a figure's file has, from a run that this one goes on with.

    Raises:
        BadInput: see `results`.
    """
    if not save.exists():
        return {}
    try:
        found = read_json(save)
        kept = found.pop("values")["rows"]
        found.pop("caption", None)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"--out: {save} is there and has no rows of this figure; expected another name") from error
    if differ := differences(found, head):
        raise BadInput(f"--out: {save} is of another run; different: {some(differ)}; expected another name")
    with blame(f"--out: {save}", (ValueError,)):
        check("", {"rows": kept}, {"rows": MAPPING})
        check("row ", kept, dict.fromkeys(kept, MAPPING))
        for name, values in kept.items():
            check(f"row {name}: ", {part: values.get(part) for part in KEPT}, KEPT)
    return kept


# Showing


def table(rows: Mapping[str, Values]) -> Iterator[str]:
    """Markdown, with a column for each measure that there is."""
    columns = {name: how for name, how in COLUMNS.items() if any(how[0] in values for values in rows.values())}
    yield "| " + " | ".join(["how", *columns]) + " |"
    yield "|---" * (len(columns) + 1) + "|"
    for name, values in rows.items():
        cells = ("" if values.get(key) is None else form.format(values[key]) for key, form in columns.values())
        yield "| " + " | ".join([name, *cells]) + " |"


def plot(axes: Axes, rows: Sequence[Values], cost: str) -> None:
    """Error against one of COSTS: a mark for each row that has an error, a line along each family's front."""
    families = dict.fromkeys(values["family"] for values in rows)
    for family, colour, marker in zip(families, cycle(COLOURS), cycle(MARKERS), strict=False):
        points = [
            (100 * values[cost], values["mse_latents"], values["label"].format(**values))
            for values in rows
            if values["family"] == family and values["mse_latents"] > 0
        ]  # the axis has no place for 0
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
    """The points (cost, error) that no cheaper one equals, by cost."""
    best: list[tuple[float, float]] = []
    for cost, error in sorted(points):
        if not best or error < best[-1][1]:
            best.append((cost, error))
    return best
