"""What was made and what it cost: sheets of pictures, comparisons, lines on the screen."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

# PyTorch and what needs it are imported where they are used: --help must answer at once.
if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from ldm.cli.setup import Setup
    from ldm.sampling.engine import Engine
    from ldm.sampling.generate import Item, Sample


@dataclass
class Result:
    """What one method made, or found made by an earlier run.

    settings: what all of it depends on beside the items.
    first_calls: seconds per picture that the first batch of a process takes longer; None = not measured.
    count, macs: of all.
    replaced: pictures made in the place of files that were damaged or changed.
    fresh, spent_macs, seconds, seconds_unet: of what this run made.
    """

    label: str
    settings: dict[str, Any]
    first_calls: float | None = None
    replaced: int = 0
    count: int = 0
    macs: int = 0
    fresh: int = 0
    spent_macs: int = 0
    seconds: float = 0.0
    seconds_unet: float = 0.0
    _kept: dict[tuple[int, int], Image.Image] = field(default_factory=dict)

    def add(self, made: Sample, keep: bool) -> None:
        """One more; keep: its image is needed for a grid or a comparison."""
        if keep:
            self._kept[made.item.prompt_index, made.item.sample] = made.image
        self.count, self.macs = self.count + 1, self.macs + made.run["unet_macs"]
        if made.fresh:
            self.replaced += made.replaced
            self.fresh, self.spent_macs = self.fresh + 1, self.spent_macs + made.run["unet_macs"]
            self.seconds += made.run["seconds"]
            self.seconds_unet += made.run["seconds_unet"]

    @property
    def images(self) -> list[Image.Image]:
        """Those kept, in the order of the items: what is found comes before what is made."""
        return [self._kept[place] for place in sorted(self._kept)]

    @property
    def gmac(self) -> float:
        """Of the UNet, for one picture."""
        return self.macs / self.count / 1e9

    def __str__(self) -> str:
        """The cost of one picture."""
        time = (
            "found, not measured"
            if self.fresh == 0
            else (f"{self.seconds / self.fresh:.2f} s, {self.seconds_unet / self.fresh:.2f} s of it UNet")
        )
        return f"{time}, {self.gmac:.2f} GMAC of the UNet"


def opening(args: argparse.Namespace, setup: Setup, engine: Engine) -> str:
    """What the run is to do, in one line: plan, sampler, parallel decoders, device, model."""
    import torch

    from ldm.models.diffusion.propagation.plan import Plan

    plan, recipe = engine.plan, engine.recipe
    keys = f"{len(plan.keys)} key steps of {plan.num_nodes}" if isinstance(plan, Plan) else f"{plan.num_nodes} steps"
    count = torch.get_num_threads()
    threads = f" ({count} thread{'s' * (count != 1)})" if setup.device.type == "cpu" else ""
    return (
        f"plan {args.plan} ({keys}), sampler {recipe.sampler}, scale {recipe.scale:g}, parallel {plan.parallel}, "
        f"device {setup.device}{threads}, model {setup.ckpt.parent.name}/{setup.ckpt.name}"
    )


def save_sheet(
    kind: str, sheet: Image.Image, items: Sequence[Item], settings: dict[str, Any], args: argparse.Namespace
) -> Path:
    """Save a sheet of pictures under a name from all that it depends on; one that is there is kept."""
    from ldm.io.images import find_png, save_png
    from ldm.sampling.generate import digest

    settings = settings | {"sheet": kind, "items": [item.settings() for item in items]}
    path = Path(args.outdir) / f"{kind}-{args.seed}-{digest(settings)}.png"
    if find_png(path, settings) is None:
        save_png(path, sheet, settings)
    return path


def report(
    results: Sequence[Result], items: Sequence[Item], settings: dict[str, Any], args: argparse.Namespace, batch: int
) -> None:
    """Save and announce what shows the pictures together, and say what each cost."""
    if args.compare:
        compare(results, items, settings, args, batch)
        return
    print(f"each picture: {results[0]}")
    if not args.skip_grid:
        from ldm.io.images import grid

        columns = args.n_rows or batch
        sheet = grid(results[0].images, columns, [item.caption for item in items])
        print(f"grid: {save_sheet('grid', sheet, items, settings | {'columns': columns}, args)}")


def compare(
    results: Sequence[Result], items: Sequence[Item], settings: dict[str, Any], args: argparse.Namespace, batch: int
) -> None:
    """Plain and accelerated pictures side by side, with cost and distance; the first result is the plain one."""
    import torch

    from ldm.io.images import from_pil, psnr, side_by_side

    plain, *others = (torch.stack([from_pil(image) for image in result.images]) for result in results)
    distances = [psnr(plain, other) for other in others]
    captions = [
        f"{' | '.join(f'{d:.1f}' for d in each)} dB  {item.caption}"
        for *each, item in zip(*distances, items, strict=True)
    ]
    sheet = side_by_side({f"{r.label}: {r.gmac:.1f} GMAC": r.images for r in results}, captions)
    path = save_sheet("compare", sheet, items, settings, args)
    print("\n".join(comparison(results, distances, min(batch, len(items)))))
    print(f"side by side: {path}")


def comparison(results: Sequence[Result], distances: Sequence[Tensor], batch: int) -> Iterator[str]:
    """The lines of a comparison: what each method costs, and the plain one as a multiple of the others.

    Args:
        results: the plain one first.
        distances: PSNR of each picture of the others to the plain one, in dB.
        batch: pictures in the first batch.
    """
    plain, *others = results
    names = [*(r.label for r in results), *(f"{plain.label} / {r.label}" for r in others)]
    width = max(map(len, names)) + 2
    first = "first" if batch == 1 else f"first {batch}"
    columns = "".join(f"{name:>10}" for name in (first, "further", "UNet", "GMAC"))
    yield f"{'seconds per picture':{width}}{columns}  PSNR to plain: mean, lowest"
    for name, result, distance in zip(names, results, (None, *distances), strict=False):
        found = "found, not measured"
        times = (
            f"{found:>30}"
            if result.fresh == 0
            else "".join(f"{'' if s is None else f'{s:.3f}':>10}" for s in times_of(result))
        )
        quality = "" if distance is None else f"  {distance.mean():.1f} dB, {distance.min():.1f} dB"
        yield f"{name:{width}}{times}{result.gmac:>10.2f}{quality}"
    for name, other in zip(names[len(results) :], others, strict=True):
        ratios = [*map(ratio, times_of(plain), times_of(other)), plain.gmac / other.gmac]
        yield f"{name:{width}}" + "".join(f"{'' if r is None else f'{r:.2f}':>10}" for r in ratios)
    if any(result.fresh < result.count for result in results):
        yield "what an earlier run has made is not measured; --again makes it again"


def times_of(result: Result) -> tuple[float | None, float | None, float | None]:
    """Seconds per picture: of the first batch of a process, of a further one, of its UNet; None = not measured."""
    if result.fresh == 0:
        return None, None, None
    further = result.seconds / result.fresh
    first = None if result.first_calls is None else further + result.first_calls
    return first, further, result.seconds_unet / result.fresh


def ratio(one: float | None, other: float | None) -> float | None:
    return None if one is None or not other else one / other
