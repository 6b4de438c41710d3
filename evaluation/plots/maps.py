"""Feature maps of each block over a run as colours: their three leading components (the paper's figures 2 and 10)."""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from evaluation.plots.blocks import plain_outputs
from evaluation.plots.drawing import CELL, Drawing, canvas, picture_rows, thin_out
from evaluation.plots.scene import Scene
from ldm.models.diffusion.loop import denoise
from ldm.models.diffusion.propagation.load import load_plan

COLUMNS = 10
EDGES = (0.01, 0.99)  # quantiles of a component that become its darkest and brightest


def make(scene: Scene, args: argparse.Namespace) -> Drawing:
    engine = scene.engine("ddim", args.steps)
    shown = thin_out(range(engine.plan.num_nodes), COLUMNS)
    found: dict[str, list[Tensor]] = {}
    for i, outputs in enumerate(plain_outputs(*engine.plain_run(scene.items[:1]))):
        if i in shown:
            for name, output in outputs.items():
                found.setdefault(name, []).append(output[0].float().cpu())
    rows, explained = {}, {}
    for name, maps in found.items():
        rows[f"{name} ({maps[0].shape[-1]} × {maps[0].shape[-2]})"], explained[name] = colours(torch.stack(maps))
    model, rule, x = engine.plain_run(scene.items[:1])
    states = denoise(model, rule, load_plan("off", len(rule.nodes)), x)
    clean = torch.cat([state.x0 for i, state in enumerate(states) if i in shown])
    rows["picture expected"] = scene.decode(engine, clean)
    figure = canvas(1.3 + CELL * len(shown) * 0.8, 0.5 + CELL * 0.8 * len(rows))
    picture_rows(figure, [*rows.values()], [f"step {i}" for i in shown], [*rows])
    share = ", ".join(f"{name} {100 * part:.0f} %" for name, part in explained.items())
    return Drawing(
        figure,
        f"The three leading principal components of each block's output as red, green and blue, one "
        f"basis for all steps of a row; size of the maps in brackets. “{scene.names[0]}”, plain run "
        f"of {args.steps} DDIM steps, conditional prediction. Variance shown: {share}.",
        {"variance_shown": explained, "steps": shown},
    )


def colours(maps: Tensor) -> tuple[Tensor, float]:
    """Maps of several steps (T, C, h, w) -> pictures (T, 3, h, w) in -1..1, and the share of the variance they show.

    The sign of a component is fixed by its largest weight being positive.
    """
    steps, channels, height, width = maps.shape
    flat = maps.movedim(1, -1).reshape(-1, channels).double()  # (T*h*w, C)
    centred = flat - flat.mean(0)
    _, sizes, axes = torch.linalg.svd(centred, full_matrices=False)  # axes: (K, C)
    axes = axes[:3] * axes[:3].gather(1, axes[:3].abs().argmax(1, keepdim=True)).sign()
    parts = centred @ axes.T  # (T*h*w, 3)
    low, high = torch.quantile(parts, torch.tensor(EDGES, dtype=parts.dtype), dim=0)
    shown = ((parts - low) / (high - low).clamp(min=1e-12)).clamp(0, 1) * 2 - 1
    energy = sizes.square()
    share = float(energy[:3].sum() / energy.sum()) if energy.sum() > 0 else 1.0
    return shown.view(steps, height, width, 3).movedim(-1, 1).float(), share
