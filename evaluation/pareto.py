"""Quality against both costs, for plans and for fewer steps, on the model that ships.

    python evaluation/pareto.py --count 100 --out docs/pareto

Each row of --rows makes one picture of each of --count captions, from the same noise for all rows. Quality is the
distance from the plain run of the row's own sampler with 50 steps (latents, PSNR, SSIM, features), and, against the
dataset, the Fréchet distance and concept retrieval. Costs are the UNet's MACs, and those on the critical path (what
must be computed one after the other when decoders that share features run at the same time), as shares of the plain
run's.
Rows that are done are kept in OUT.json: a run that was stopped goes on. Writes OUT.json, OUT.md, OUT.svg and OUT.png.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.arguments import EMOJI64, count, seed_argument
from ldm.cli import BadInput, Parser, blame, command

# What needs PyTorch is imported where it is used: --help must answer at once.
if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from torch import Tensor

    from evaluation.recognition import Asked
    from evaluation.retrieval import RealSet
    from ldm.generate import Item
    from ldm.models.diffusion.ddpm import LatentDiffusion
    from ldm.sampling.engine import Engine

STEPS = 50      # of the plain runs that quality is measured against
BATCH = 25
LISTS = ("sampler", "steps", "plan", "propagate")       # what may be a list in a row: one row for each
# Okabe and Ito's colours and some markers, in the order of the families.
COLOURS = ("#000000", "#7F7F7F", "#D55E00", "#0072B2", "#56B4E9", "#009E73", "#CC79A7", "#E69F00", "#F0E442")
MARKERS = "osD^v<>PX"


@dataclass(frozen=True)
class Row:
    """One way to make pictures; see evaluation/pareto.yaml."""

    family: str
    sampler: str = "ddim"
    steps: int = STEPS
    plan: str = "off"
    propagate: str | None = None
    noise_weight: float = 0.0
    guidance_reuse: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.plan, str):
            raise TypeError(f"plan must be text, 'off' in quotes, which YAML takes for no; got {self.plan!r}")

    def __str__(self) -> str:
        parts = [f"{self.sampler} {self.steps}"] + [self.plan] * (self.plan != "off")
        parts += [self.propagate] * (self.propagate is not None) + ["guidance reused"] * self.guidance_reuse
        return ", ".join(parts + [f"prior noise {self.noise_weight}"] * (self.noise_weight > 0))


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="pareto.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--rows", default=str(Path(__file__).with_suffix(".yaml")), metavar="YAML",
                   help="the rows (default: evaluation/pareto.yaml)")
    p.add_argument("--data", default="data/emoji64", metavar="DIR", help="dataset of scripts/prepare_emoji.py")
    p.add_argument("--count", type=count, default=100, metavar="N", help="captions (default: %(default)s)")
    p.add_argument("--out", default="outputs/pareto", metavar="PATH", help="(default: %(default)s)")
    seed_argument(p)
    return p


def read_rows(path: str) -> list[Row]:
    """The rows of a file, lists taken apart.

    Raises:
        ValueError: it can't be read, or holds something else.
    """
    import yaml

    try:
        entries = yaml.safe_load(Path(path).read_text(encoding="utf-8"))["rows"]
        rows = []
        for entry in entries:
            lists = [entry[name] if isinstance(entry.get(name), list) else [entry[name]] for name in LISTS
                     if name in entry]
            names = [name for name in LISTS if name in entry]
            rows += [Row(**entry | dict(zip(names, values, strict=True))) for values in product(*lists)]
    except (OSError, yaml.YAMLError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: expected rows as in evaluation/pareto.yaml; {reason}") from None
    return rows


# Measuring

@dataclass(frozen=True)
class Bench:
    """What all rows share: the model, the captions with their noise, the real pictures."""

    model: LatentDiffusion
    config: Any
    items: Sequence[Item]
    asked: Asked
    real: RealSet
    weights: str

    def engine(self, row: Row) -> Engine:
        from ldm.models.diffusion.plans import RunFacts, load_plan
        from ldm.sampling.conditions import Text
        from ldm.sampling.engine import Engine, Recipe, Sizes, Task, num_nodes, usual_scale

        sizes = Sizes.of(self.config.model)
        recipe = Recipe(sizes.default, sizes.default, row.sampler, row.steps, scale=usual_scale(self.config),
                        guidance_reuse=row.guidance_reuse, noise_weight=row.noise_weight)
        run = RunFacts({"sampler": row.sampler, "weights": self.weights}, EMOJI64[1].parent / "calibration")
        plan = load_plan(row.plan, num_nodes(recipe), STEPS, row.propagate, run)
        return Engine(self.model, sizes, recipe, plan, Task(Text()))

    def made(self, row: Row) -> tuple[Tensor, Tensor, dict[str, float]]:
        """Latents, pictures (N, 3, H, W) in [-1, 1] as they are saved, and costs, MACs of one picture."""
        import torch

        from ldm.images import from_pil, to_pil

        engine, latents, macs, critical = self.engine(row), [], 0.0, 0.0
        for start in range(0, len(self.items), BATCH):
            part = self.items[start:start + BATCH]
            made, spent = engine.sampled(part)
            latents.append(made)
            macs += spent.macs * len(part) / len(self.items)
            critical += spent.critical * len(part) / len(self.items)
        x = torch.cat(latents)
        pictures = torch.stack([from_pil(image) for part in x.split(BATCH) for image in to_pil(engine.decode(part))])
        return x, pictures, {"macs": macs, "critical": critical}


def measure(bench: Bench, row: Row, plain: tuple[Tensor, Tensor]) -> dict[str, Any]:
    """All values of one row; `plain` are latents and pictures of its sampler's plain run."""
    import numpy as np

    from evaluation.distances import frechet
    from evaluation.moments import Moments
    from evaluation.paired import load_ssim
    from evaluation.retrieval import features_of
    from ldm.images import psnr, to_pil

    x, pictures, costs = bench.made(row)
    features = [features_of(some, bench.real.extract, BATCH, str(row)) for some in (pictures, plain[1])]
    fid = frechet(*(Moments.of(f.double().numpy()).gaussian() for f in (features[0], bench.real.raw)))
    verdict = bench.real.judge(to_pil(pictures), bench.asked.entries, str(row))
    ratio = psnr(pictures, plain[1]).numpy()
    return asdict(row) | costs | {
        "mse_latents": float((x - plain[0]).square().mean()),
        "psnr": float(np.mean(ratio)) if np.isfinite(ratio).all() else None,
        "ssim": float(load_ssim()(pictures, plain[1]).mean()),
        "feature_distance": float((features[0] - features[1]).norm(dim=1).mean()),
        "fid_real": fid, "R@5": float(np.mean(verdict.hits[5]))}


def results(bench: Bench, rows: Sequence[Row], kept: dict[str, dict[str, Any]], save: Path,
            head: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Every row's values; those that are not kept are measured, and the file is written after each."""
    from tqdm import tqdm

    from ldm.util import atomic_write

    plains: dict[str, tuple[Tensor, Tensor]] = {}
    for row in tqdm(rows, desc="rows", unit="row", disable=None):
        if str(row) not in kept:
            if row.sampler not in plains:
                plains[row.sampler] = bench.made(Row("plain", row.sampler))[:2]
            kept[str(row)] = measure(bench, row, plains[row.sampler])
            with blame("--out", (OSError,)), atomic_write(save) as part:
                part.write_text(json.dumps(head | {"rows": kept}, indent=1) + "\n", encoding="utf-8")
        yield kept[str(row)]


# Showing

COLUMNS = {"MACs": ("macs_share", "{:.0%}"), "critical path": ("critical_share", "{:.0%}"),
           "latents' MSE": ("mse_latents", "{:.5f}"), "PSNR": ("psnr", "{:.1f}"), "SSIM": ("ssim", "{:.3f}"),
           "feature distance": ("feature_distance", "{:.1f}"), "Fréchet distance": ("fid_real", "{:.1f}"),
           "R@5": ("R@5", "{:.2f}")}


def table(measured: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Markdown."""
    yield "| " + " | ".join(["how", *COLUMNS]) + " |"
    yield "|---" * (len(COLUMNS) + 1) + "|"
    for name, values in measured.items():
        cells = ("" if values[key] is None else form.format(values[key]) for key, form in COLUMNS.values())
        yield "| " + " | ".join([name, *cells]) + " |"


def plot(axes: Axes, measured: Sequence[Mapping[str, Any]], cost: str, label: str) -> None:
    families = list(dict.fromkeys(values["family"] for values in measured))
    for family, colour, marker in zip(families, COLOURS, MARKERS, strict=False):
        points = [values for values in measured if values["family"] == family and values["mse_latents"] > 0]
        points.sort(key=lambda values: values[cost])
        line = "-" if family != "the paper" else ""
        axes.plot([100 * p[cost] for p in points], [p["mse_latents"] for p in points], marker + line, color=colour,
                  label=family, markersize=4, linewidth=0.8)
    axes.set_yscale("log")
    axes.set_xlabel(label)
    axes.set_ylabel("latents' mean squared error to the plain run")
    axes.grid(True, which="major", linewidth=0.3)


def show(measured: dict[str, dict[str, Any]], out: str, caption: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.6), layout="constrained", sharey=True)
    rows = list(measured.values())
    plot(left, rows, "macs_share", "MACs of the UNet, % of the plain 50 steps")
    plot(right, rows, "critical_share", "MACs on the critical path, % of the plain 50 steps")
    right.set_ylabel("")
    figure.legend(*left.get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=8)
    figure.suptitle(caption, fontsize=8)
    with blame("--out", (OSError,)):
        for suffix in ("svg", "png"):
            figure.savefig(f"{out}.{suffix}", dpi=110, metadata={"Date": None} if suffix == "svg" else None)
        Path(f"{out}.md").write_text(f"{caption}\n\n" + "\n".join(table(measured)) + "\n", encoding="utf-8")
    print(f"{out}.json, {out}.md, {out}.svg, {out}.png")


def make_bench(args: argparse.Namespace) -> Bench:
    from evaluation.features import extractor
    from evaluation.recognition import Asked
    from evaluation.retrieval import SPLITS, RealSet
    from ldm.checkpoint import fingerprint, load_config, load_model
    from ldm.data.emoji import EmojiPictures
    from ldm.generate import prompt_items

    with blame("--data", (ValueError, OSError)):
        asked = Asked.of(EmojiPictures(args.data, split="train", max_tier=1), args.count, args.seed)
        real = [EmojiPictures(args.data, split=split, max_tier=2) for split in SPLITS]
    items, model = prompt_items(asked.captions, 1, args.seed), load_model(*EMOJI64, "cpu", "auto")
    return Bench(model, load_config(EMOJI64[0]), items, asked,
                 RealSet.of(real, extractor("efficientnet-lite0"), BATCH), fingerprint(EMOJI64[1])[:16])


def run(args: argparse.Namespace) -> None:
    from ldm.sampling.engine import usual_scale

    with blame("--rows"):
        rows = read_rows(args.rows)
    save = Path(f"{args.out}.json")
    bench = make_bench(args)
    head = {"weights": bench.weights, "count": len(bench.items), "seed": args.seed, "scale": usual_scale(bench.config)}
    kept: dict[str, dict[str, Any]] = {}
    if save.exists():
        found = json.loads(save.read_text(encoding="utf-8"))
        kept = found.pop("rows")
        if found != head:
            raise BadInput(f"--out: {save} is of another run ({found}); this one is {head}")
    with blame("--rows"):
        measured = dict(zip(map(str, rows), results(bench, rows, kept, save, head), strict=True))
    whole = bench.engine(Row("plain")).unit.plain(STEPS) * 2
    for values in measured.values():
        values |= {"macs_share": values["macs"] / whole, "critical_share": values["critical"] / whole}
    show(measured, args.out, f"emoji64 (weights {bench.weights}), {len(bench.items)} captions, seed {args.seed}, "
                             f"guidance {head['scale']:g}; distances from the plain {STEPS}-step run of the same "
                             "sampler")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return command("pareto.py", lambda: run(parser().parse_args(argv)), "stopped; the same command goes on from here")


if __name__ == "__main__":
    sys.exit(main())
