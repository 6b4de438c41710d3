"""What was made and what it cost: grids, comparisons, lines on the screen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm.cli.setup import Setup
from ldm.io.errors import fault_of
from ldm.io.files import atomic_write
from ldm.io.images import find_png, from_pil, grid, psnr, save_png, side_by_side
from ldm.models.diffusion.propagation.plan import Plan
from ldm.sampling.engine import Engine
from ldm.sampling.generate import Item, Sample, digest


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


@dataclass
class MethodRun:
    """The images of one method, made now or by an earlier run, and what they cost.

    settings: what all of it depends on beside the items.
    first_calls: seconds per image that the first batch of a process takes longer; None = not measured.
    count, macs: of all.
    replaced: images made in the place of files that were damaged or changed.
    fresh, spent_macs, seconds, seconds_unet: of what this run made.
    files: of the images that are saved.
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
    files: list[Path] = field(default_factory=list)
    _kept: dict[tuple[int, int], Image.Image] = field(default_factory=dict)

    def add(self, made: Sample, keep: bool) -> None:
        """One more; keep: its image is needed for a grid or a comparison."""
        if keep:
            self._kept[made.item.prompt_index, made.item.sample] = made.image
        self.count, self.macs = self.count + 1, self.macs + made.run["unet_macs"]
        self.files += [] if made.path is None else [made.path]
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
        """Billions of MACs of the UNet for one image."""
        return self.macs / self.count / 1e9

    def __str__(self) -> str:
        """The cost of one image."""
        time = (
            "reused, not timed"
            if self.fresh == 0
            else (f"{self.seconds / self.fresh:.2f} s, {self.seconds_unet / self.fresh:.2f} s of it UNet")
        )
        return f"{time}, {self.gmac:.2f} GMAC of the UNet"


def opening(plan: str, setup: Setup, engine: Engine) -> str:
    """What the run is to do, in one line: plan, sampler, parallel decoders, device, model."""
    recipe, nodes, parallel = engine.recipe, engine.plan.num_nodes, engine.plan.parallel
    keys = f"{len(engine.plan.keys)} key timesteps of {nodes}" if isinstance(engine.plan, Plan) else f"{nodes} steps"
    count = torch.get_num_threads()
    threads = f" ({count} thread{'s' * (count != 1)})" if setup.device.type == "cpu" else ""
    return (
        f"plan {plan} ({keys}), sampler {recipe.sampler}, scale {recipe.scale:g}, parallel {parallel}, "
        f"device {setup.device}{threads}, model {setup.ckpt.parent.name}/{setup.ckpt.name}"
    )


def save_sheet(
    kind: str, sheet: Image.Image, items: Sequence[Item], settings: Mapping[str, Any], outdir: str | Path
) -> Path:
    """Save a sheet of images under a name from all that it depends on; one that is there is kept."""
    settings = {**settings, "sheet": kind, "items": [item.settings() for item in items]}
    path = Path(outdir) / f"{kind}-{items[0].seed[0]}-{digest(settings)}.png"
    if find_png(path, settings) is None:
        save_png(path, sheet, settings)
    return path


def save_array(run: MethodRun, items: Sequence[Item], outdir: str | Path) -> Path:
    """Save all images as `arr_0`, (N, H, W, 3) uint8, under a name from all that they depend on.

    Raises:
        SettingError: it can't be written.
    """
    shape = "x".join(map(str, (len(items), run.settings["height"], run.settings["width"], 3)))
    path = Path(outdir) / f"{shape}-{items[0].seed[0]}-{digest(run.settings)}.npz"
    with fault_of("outdir", (OSError,)), atomic_write(path) as temporary:
        np.savez(temporary, np.stack([np.asarray(image) for image in run.images]))
    return path


def report(
    runs: Sequence[MethodRun], items: Sequence[Item], settings: Mapping[str, Any], output: OutputSettings, batch: int
) -> None:
    """Save and announce what shows the images together, and print what each cost.

    Args:
        settings: what the images of all methods depend on.
    """
    if output.compare:
        compare(runs, items, settings, output.outdir, batch)
        return
    print(f"each image: {runs[0]}")
    if output.grid:
        columns = output.columns or batch
        sheet = grid(runs[0].images, columns, [item.caption for item in items])
        print(f"grid: {save_sheet('grid', sheet, items, {**settings, 'columns': columns}, output.outdir)}")


def compare(
    runs: Sequence[MethodRun], items: Sequence[Item], settings: Mapping[str, Any], outdir: str | Path, batch: int
) -> None:
    """Plain and accelerated images side by side, with cost and distance; the first run is the plain one."""
    plain, *others = (torch.stack([from_pil(image) for image in run.images]) for run in runs)
    distances = [psnr(plain, other) for other in others]
    captions = [
        f"{' | '.join(f'{d:.1f}' for d in each)} dB  {item.caption}"
        for *each, item in zip(*distances, items, strict=True)
    ]
    sheet = side_by_side({f"{run.label}: {run.gmac:.1f} GMAC": run.images for run in runs}, captions)
    path = save_sheet("compare", sheet, items, settings, outdir)
    print("\n".join(comparison(runs, distances, min(batch, len(items)))))
    print(f"side by side: {path}")


def comparison(runs: Sequence[MethodRun], distances: Sequence[Tensor], batch: int) -> Iterator[str]:
    """The lines of a comparison: what each method costs, and the plain one as a multiple of the others.

    Args:
        runs: the plain one first.
        distances: PSNR of each image of the others to the plain one, in dB.
        batch: images in the first batch.
    """
    plain, *others = runs
    names = [*(run.label for run in runs), *(f"{plain.label} / {run.label}" for run in others)]
    width = max(map(len, names)) + 2
    first = "first" if batch == 1 else f"first {batch}"
    columns = "".join(f"{name:>10}" for name in (first, "further", "UNet", "GMAC"))
    yield f"{'seconds per image':{width}}{columns}  PSNR to plain: mean, lowest"
    for name, run, distance in zip(names, runs, (None, *distances), strict=False):
        found = "reused, not timed"
        times = f"{found:>30}" if run.fresh == 0 else "".join(f"{decimals(s, 3):>10}" for s in times_of(run))
        quality = "" if distance is None else f"  {distance.mean():.1f} dB, {distance.min():.1f} dB"
        yield f"{name:{width}}{times}{run.gmac:>10.2f}{quality}"
    for name, other in zip(names[len(runs) :], others, strict=True):
        ratios = [*map(ratio, times_of(plain), times_of(other)), plain.gmac / other.gmac]
        yield f"{name:{width}}" + "".join(f"{decimals(r, 2):>10}" for r in ratios)
    if any(run.fresh < run.count for run in runs):
        yield "images of an earlier run are reused and not timed; --again makes them again"


def decimals(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def times_of(run: MethodRun) -> tuple[float | None, float | None, float | None]:
    """Seconds per image: of the first batch of a process, of a further one, of its UNet; None = not measured."""
    if run.fresh == 0:
        return None, None, None
    further = run.seconds / run.fresh
    first = None if run.first_calls is None else further + run.first_calls
    return first, further, run.seconds_unet / run.fresh


def ratio(one: float | None, other: float | None) -> float | None:
    return None if one is None or not other else one / other
