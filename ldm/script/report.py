"""What was made and what it cost: sheets of pictures, comparisons, lines on the screen."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

# PyTorch and what needs it are imported where they are used: --help must answer at once.
if TYPE_CHECKING:
    from PIL import Image

    from ldm.generate import Item, Made
    from ldm.sampling.engine import Engine
    from ldm.script.setup import Setup


@dataclass
class Result:
    """What one method made, or found made by an earlier run.

    settings: what all of it depends on beside the items.
    images: kept only where a grid or a comparison needs them.
    fresh, spent_macs: of what this run made.
    count, seconds, seconds_unet, macs: of all.
    """

    label: str
    settings: dict[str, Any]
    images: list[Image.Image] = field(default_factory=list)
    fresh: int = 0
    count: int = 0
    seconds: float = 0.0
    seconds_unet: float = 0.0
    macs: int = 0
    spent_macs: int = 0

    def add(self, made: Made, keep: bool) -> None:
        self.images += [made.image] if keep else []
        self.fresh, self.count = self.fresh + made.fresh, self.count + 1
        self.spent_macs += made.run["unet_macs"] if made.fresh else 0
        self.seconds += made.run["seconds"]
        self.seconds_unet += made.run["seconds_unet"]
        self.macs += made.run["unet_macs"]

    def __str__(self) -> str:
        """The cost of one picture."""
        return (f"{self.seconds / self.count:.2f} s, {self.seconds_unet / self.count:.2f} s of it UNet, "
                f"{self.macs / self.count / 1e9:.2f} GMAC of the UNet")


def opening(args: argparse.Namespace, setup: Setup, engine: Engine) -> str:
    """What the run is to do, in one line: plan, sampler, parallel decoders, device, model."""
    import torch

    from ldm.models.diffusion.plan import Plan

    plan, recipe = engine.plan, engine.recipe
    keys = f"{len(plan.keys)} key steps of {plan.num_nodes}" if isinstance(plan, Plan) else f"{plan.num_nodes} steps"
    count = torch.get_num_threads()
    threads = f" ({count} thread{'s' * (count != 1)})" if setup.device.type == "cpu" else ""
    return (f"plan {args.plan} ({keys}), sampler {recipe.sampler}, scale {recipe.scale:g}, parallel {plan.parallel}, "
            f"device {setup.device}{threads}, model {setup.ckpt.parent.name}/{setup.ckpt.name}")


def save_sheet(kind: str, sheet: Image.Image, items: Sequence[Item], settings: dict[str, Any],
               args: argparse.Namespace) -> Path:
    """Save a sheet of pictures under a name from all that it depends on; one that is there is kept."""
    from ldm.generate import digest
    from ldm.images import read_png, save_png

    settings = settings | {"sheet": kind, "items": [item.settings() for item in items]}
    path = Path(args.outdir) / f"{kind}-{args.seed}-{digest(settings)}.png"
    if (found := read_png(path)) is None or found[1] != settings:
        save_png(path, sheet, settings)
    return path


def report(results: Sequence[Result], items: Sequence[Item], settings: dict[str, Any],
           args: argparse.Namespace, batch: int) -> None:
    """Save and announce what shows the pictures together, and say what each cost."""
    if args.compare:
        compare(*results, items, settings, args)
        return
    print(f"each picture: {results[0]}")
    if not args.skip_grid:
        from ldm.images import grid

        columns = args.n_rows or batch
        sheet = grid(results[0].images, columns, [item.caption for item in items])
        print(f"grid: {save_sheet('grid', sheet, items, settings | {'columns': columns}, args)}")


def compare(plain: Result, fast: Result, items: Sequence[Item], settings: dict[str, Any],
            args: argparse.Namespace) -> None:
    """Plain and accelerated pictures side by side, with cost and distance."""
    import torch

    from ldm.images import from_pil, psnr, side_by_side

    distance = psnr(*(torch.stack([from_pil(image) for image in r.images]) for r in (plain, fast)))
    columns = {f"{r.label}: {r.seconds / r.count:.2f} s": r.images for r in (plain, fast)}
    sheet = side_by_side(columns, [f"{d:.1f} dB  {i.caption}" for d, i in zip(distance, items, strict=True)])
    path = save_sheet("compare", sheet, items, settings, args)
    for result in (plain, fast):
        print(f"{result.label}, each picture: {result}")
    print(f"plain / {fast.label}: time {plain.seconds / fast.seconds:.2f}, UNet time "
          f"{plain.seconds_unet / fast.seconds_unet:.2f}, UNet MACs {plain.macs / fast.macs:.2f}")
    print(f"PSNR between the two: mean {distance.mean():.1f} dB, lowest {distance.min():.1f} dB")
    print(f"side by side: {path}")
