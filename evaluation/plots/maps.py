"""Feature maps of each block during a run: their leading components as colours (figures 2 and 10 of the paper)."""

from __future__ import annotations

import torch
from torch import Tensor

from evaluation.plots.blocks import plain_outputs
from evaluation.plots.drawing import CELL, Drawing, image_grid, new_figure, thin_out
from evaluation.plots.experiment import Experiment
from ldm.models.diffusion.loop import denoise
from ldm.models.diffusion.propagation.load import load_plan

COLUMNS = 10
EDGES = (0.01, 0.99)  # quantiles of a component that become the darkest and the brightest level


def make(experiment: Experiment, *, steps: int) -> Drawing:
    """Draw the feature maps of the first image at up to COLUMNS of `steps` DDIM steps."""
    engine = experiment.engine("ddim", steps)
    shown = thin_out(range(engine.plan.num_nodes), COLUMNS)
    found: dict[str, list[Tensor]] = {}
    for i, outputs in enumerate(plain_outputs(*engine.plain_run(experiment.items[:1]))):
        if i in shown:
            for name, output in outputs.items():
                found.setdefault(name, []).append(output[0].float().cpu())
    rows, explained = {}, {}
    for name, maps in found.items():
        rows[f"{name} ({maps[0].shape[-1]} × {maps[0].shape[-2]})"], explained[name] = colours(torch.stack(maps))
    model, rule, x = engine.plain_run(experiment.items[:1])
    states = denoise(model, rule, load_plan("off", len(rule.nodes)), x)
    clean = torch.cat([state.x0 for i, state in enumerate(states) if i in shown])
    rows["predicted image"] = experiment.decode(engine, clean)
    figure = new_figure(1.3 + CELL * len(shown) * 0.8, 0.5 + CELL * 0.8 * len(rows))
    image_grid(figure, [*rows.values()], [f"step {i}" for i in shown], [*rows])
    share = ", ".join(f"{name} {100 * part:.0f} %" for name, part in explained.items())
    return Drawing(
        figure,
        "The three leading principal components of each block's output as red, green and blue, with one "
        f"basis per row; size of the maps in brackets. “{experiment.labels[0]}”, plain run "
        f"of {steps} DDIM steps, conditional prediction. Share of the variance: {share}.",
        {"variance_shown": explained, "steps": shown},
    )


def colours(maps: Tensor) -> tuple[Tensor, float]:
    """Feature maps of T steps (T, C, h, w) -> images (T, 3, h, w) in [-1, 1], and their share of the variance.

    The sign of a component is such that its largest weight is positive.
    """
    count, channels, height, width = maps.shape
    flat = maps.movedim(1, -1).reshape(-1, channels).double()  # (T*h*w, C)
    centred = flat - flat.mean(0)
    _, sizes, axes = torch.linalg.svd(centred, full_matrices=False)  # axes: (K, C)
    axes = axes[:3] * axes[:3].gather(1, axes[:3].abs().argmax(1, keepdim=True)).sign()
    parts = centred @ axes.T  # (T*h*w, 3)
    low, high = torch.quantile(parts, torch.tensor(EDGES, dtype=parts.dtype), dim=0)
    shown = ((parts - low) / (high - low).clamp(min=1e-12)).clamp(0, 1) * 2 - 1
    energy = sizes.square()
    share = float(energy[:3].sum() / energy.sum()) if energy.sum() > 0 else 1.0
    return shown.view(count, height, width, 3).movedim(-1, 1).float(), share
