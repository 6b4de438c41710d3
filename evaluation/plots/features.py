"""Figures of the features of a network's blocks during a run: size, change from step to step, colours.

As in the paper, a block of a UNet is all layers of one resolution: E8 is the encoder's block at resolution 8, including
the layer that leads to the next resolution; B is the middle block; D8 is the decoder's block at resolution 8. Of a
diffusion transformer, E0 is the first block, and D18 the nineteenth, if it is one of the decoder's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from torch import Tensor, nn

from evaluation.plots.drawing import CELL, COLOURS, MARKERS, Drawing, image_grid, new_figure, note, thin_out
from evaluation.plots.experiment import Experiment
from ldm.io.errors import fault_of
from ldm.models.diffusion.denoiser import Denoiser
from ldm.models.diffusion.loop import Rule, denoise
from ldm.models.diffusion.propagation.load import load_plan
from ldm.models.diffusion.propagation.plan import Plan
from ldm.modules.diffusionmodules.dit import DiT

Outputs = dict[str, Tensor]  # name -> (B, C, h, w), in the order of the computation


def plain_outputs(model: Denoiser, rule: Rule, x: Tensor) -> Iterator[Outputs]:
    """Yield the blocks' outputs at every node of the plain run that starts from x, (B, C, H, W).

    With guidance, they are those of the conditional prediction, which is the second half of the batch.
    """
    nodes = rule.nodes
    plain = Plan(len(nodes), tuple(range(len(nodes))))
    states = denoise(model, rule, plan=plain, x=x)
    for node in nodes:
        yield {name: output[-len(x) :] for name, output in block_outputs(model, x, node.t).items()}
        x = next(states).x


@torch.no_grad()
def block_outputs(model: Denoiser, x: Tensor, t: float) -> Outputs:
    """The blocks' outputs of one prediction from x, (B, C, H, W), for the batch that the denoiser makes of it."""
    transformer = next((part for part in model.network.modules() if isinstance(part, DiT)), None)
    if transformer is not None:
        return token_maps(model, transformer, x, t)
    features = model.encode(x, t)
    sizes = [skip.shape[-1] for skip in features.skips]
    outputs = {f"E{size}": features.skips[i] for i, size in encoder_ends(sizes)}
    outputs["B"] = features.hidden
    for remaining, size in decoder_ends(sizes):
        (features,) = model.advance([features], [t], remaining)
        outputs[f"D{size}"] = features.hidden
    return outputs


def token_maps(model: Denoiser, transformer: DiT, x: Tensor, t: float) -> Outputs:
    """The same of a diffusion transformer: each token stands where the patch is that it was made of."""
    outputs: Outputs = {}
    side = transformer.input_size // transformer.patch_size

    def keep(block: nn.Module, inputs: tuple[Tensor, ...], tokens: Tensor) -> None:
        part = "E" if len(outputs) < transformer.encoder_blocks else "D"
        outputs[f"{part}{len(outputs)}"] = tokens.unflatten(1, (side, side)).movedim(-1, 1)

    hooks = [block.register_forward_hook(keep) for block in transformer.blocks]
    try:
        model.decode([model.encode(x, t)], [t])
    finally:
        for hook in hooks:
            hook.remove()
    return outputs


def encoder_ends(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Index of the last skip feature of each resolution, and that resolution; `sizes`: of all skip features."""
    down = [(i + 1, a) for i, (a, b) in enumerate(pairwise(sizes)) if a != b]
    return [*down, (len(sizes) - 1, sizes[-1])]


def decoder_ends(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Number of output blocks that remain after the decoder has finished each resolution, innermost first."""
    outer = [(i + 1, b) for i, (a, b) in enumerate(pairwise(sizes)) if a != b]
    return [*reversed(outer), (0, sizes[0])]


def change(now: Tensor, before: Tensor) -> np.ndarray:
    """Mean squared difference of two outputs (B, C, h, w) for each image, (B,). Source: the paper's eq. 2."""
    return (now - before).double().square().flatten(1).mean(1).cpu().numpy()


def frobenius(output: Tensor) -> np.ndarray:
    """Frobenius norm of the mean over the channels of (B, C, h, w), for each image, (B,)."""
    return output.double().mean(1).flatten(1).norm(dim=1).cpu().numpy()


@dataclass(frozen=True)
class Evolution:
    """How the outputs of every block, by name, develop during a run."""

    norm: dict[str, np.ndarray]  # `frobenius` at every node, (nodes, B)
    absolute: dict[str, np.ndarray]  # `change` at all nodes but the first, (nodes - 1, B), eq. 2; grows with the output
    relative: dict[str, np.ndarray]  # the same, divided by the output's mean square


def evolution(run: Iterator[Outputs]) -> Evolution:
    """Norms and changes of the blocks' outputs; no more than two nodes' outputs are in memory at a time. Raises
    ValueError: a run of one node."""
    norm, absolute, relative = ({} for _ in range(3))
    before: Outputs = {}
    for now in run:
        for name, output in now.items():
            norm.setdefault(name, []).append(frobenius(output))
            if before:
                changed, size = change(output, before[name]), change(output, torch.zeros_like(output))
                absolute.setdefault(name, []).append(changed)
                relative.setdefault(name, []).append(changed / np.maximum(size, 1e-30))
        before = now
    if not absolute:
        raise ValueError("a change from step to step needs at least 2 steps; got 1")
    return Evolution(
        *({name: np.stack(values) for name, values in found.items()} for found in (norm, absolute, relative))
    )


# Feature evolution: norms, and changes from step to step (figure 3 and eq. 2 of the paper)

BAND = (10, 90)  # percentiles over images
LINES = ("-", "--", "-.", ":")  # curves that overlap stay visible


def draw_evolution(experiment: Experiment, *, steps: int) -> Drawing:
    """Draw norms and changes of every block's output over `steps` DDIM steps."""
    engine = experiment.engine("ddim", steps)
    with fault_of("steps"):
        found = evolution(plain_outputs(*engine.plain_run(experiment.items)))
    figure = new_figure(8, 7.6)
    grid = figure.subplots(3, 2, sharey="row", sharex=True)
    styles, nodes = line_styles([*found.norm]), engine.plan.num_nodes
    for line, values, label in (
        (grid[0], found.norm, "Frobenius norm of\nthe channels' mean"),
        (grid[1], found.absolute, "mean squared change\nfrom step to step"),
        (grid[2], found.relative, "the same, relative to the\noutput's mean square"),
    ):
        for axes, sides in zip(line, ("EB", "D"), strict=True):
            curves(axes, values, {name: style for name, style in styles.items() if name[0] in sides}, nodes)
        line[0].set(yscale="log", ylabel=label)
    unet = "B" in styles
    for k, title in enumerate(("encoder (E) and middle (B)" if unet else "encoder (E)", "decoder (D)")):
        grid[0][k].set_title(title)
        grid[0][k].legend(ncols=2 if unet else 4)
        grid[2][k].set_xlabel(f"DDIM step of 0..{nodes - 1}, noisiest first")
    return Drawing(
        figure,
        f"The {'UNet' if unet else 'transformer'}'s blocks during a plain run of {nodes} DDIM steps, conditional "
        "prediction. Top: Frobenius norm of "
        "the output's mean over channels. Middle: mean squared change from step to step (eq. 2). Bottom: the same, "
        f"relative. {'A resolution has the same colour in both columns. ' if unet else ''}Lines: mean over the "
        f"images; bands: {BAND[0]}th to {BAND[1]}th percentile.",
        {
            name: {"mean": mean, "max": mean.max(), "variance": mean.var()}
            | {"relative": found.relative[name].mean(1), "norm": found.norm[name].mean(1)}
            for name, mean in ((name, values.mean(1)) for name, values in found.absolute.items())
        },
    )


def line_styles(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The style of each block's curve, finest resolution first: E8 and D8 share one; the middle block is black.

    Those of a transformer, which has no resolutions, go from dark to bright.
    """
    if "B" not in names:
        shades = colormaps["viridis"](np.linspace(0, 0.9, len(names)))
        return {name: {"color": shade} for name, shade in zip(names, shades, strict=True)}
    sizes = sorted({int(name[1:]) for name in names if name != "B"}, reverse=True)
    # Networks may have more resolutions than there are colours.
    by_size = {
        size: {"color": COLOURS[k % 6], "marker": MARKERS[k % 6], "linestyle": LINES[k % 4]}
        for k, size in enumerate(sizes)
    }
    middle = {"color": "black", "marker": "X", "linestyle": "-"}
    return {
        name: middle if name == "B" else by_size[int(name[1:])]
        for name in sorted(names, key=lambda name: -int(name[1:] or 0))
    }


def curves(axes: Axes, found: Mapping[str, np.ndarray], styles: Mapping[str, dict[str, Any]], nodes: int) -> None:
    """Draw the mean and the band over the images of each block's (n, B) values, at the last n of the run's nodes."""
    for k, (name, style) in enumerate(styles.items()):
        values = found[name]
        every = max(1, len(values) // 6)  # so that the curves' markers are at different nodes
        shown = np.arange(nodes - len(values), nodes)
        axes.fill_between(shown, *np.percentile(values, BAND, axis=1), color=style["color"], alpha=0.12, linewidth=0)
        axes.plot(shown, values.mean(1), **style, markersize=4, label=name, markevery=(k * every // len(styles), every))


# Size of the outputs, and how much it varies during a run (figures 3b and 3c)


def draw_norms(experiment: Experiment, *, steps: int) -> Drawing:
    """Draw the norms of every block's output over `steps` DDIM steps."""
    engine = experiment.engine("ddim", steps)
    with fault_of("steps"):
        norms = evolution(plain_outputs(*engine.plain_run(experiment.items))).norm
    found = {name: values.mean(1) for name, values in norms.items()}
    figure = new_figure(max(9, len(found)), 3.2)
    boxes, deviation, relative = figure.subplots(1, 3, width_ratios=[1.3, 1, 1])
    colours = [colour_of(name) for name in found]
    style = {"patch_artist": True, "medianprops": {"color": "black"}, "flierprops": {"markersize": 3}}
    drawn = boxes.boxplot([*found.values()], tick_labels=[*found], **style)
    for box, colour in zip(drawn["boxes"], colours, strict=True):
        box.set_facecolor(colour)
    boxes.set(yscale="log", ylabel="Frobenius norm of the channels' mean")
    points(deviation, {name: values.std() for name, values in found.items()})
    deviation.set_ylabel("its standard deviation over the steps")
    shares = {name: 100 * values.std() / values.mean() for name, values in found.items()}
    relative.bar([*shares], [*shares.values()], color=colours)
    relative.set_ylabel("standard deviation, % of the mean")
    relative.grid(False, axis="x")
    return Drawing(
        figure,
        "Frobenius norm of the mean over channels of each block's output, mean over the images, at the "
        f"{engine.plan.num_nodes} steps of a plain DDIM run. Boxes: quartiles "
        "over the steps; whiskers: 1.5 times the interquartile range. Blue: encoder; "
        f"{'green: middle; ' if 'B' in found else ''}orange: decoder.",
        {name: {"norm": values, "deviation": values.std(), "percent": shares[name]} for name, values in found.items()},
    )


def colour_of(name: str) -> str:
    """The colour of a block: by its part of the network (E, B or D)."""
    return {"E": COLOURS[0], "B": COLOURS[2], "D": COLOURS[4]}[name[0]]


def points(axes: Axes, heights: Mapping[str, float]) -> None:
    """Draw the heights as points on a logarithmic axis, on which a bar would have no lower end."""
    for name, height in heights.items():
        axes.plot(name, height, "o", color=colour_of(name), markeredgecolor="black", markeredgewidth=0.6)
        note(axes, f"{height:.2g}", (name, height), (0, 6), ha="center", fontsize=6.5)
    axes.set_yscale("log")
    axes.margins(x=0.1, y=0.1)


# Feature maps: their leading components as colours (figures 2 and 10)

COLUMNS = 10
EDGES = (0.01, 0.99)  # quantiles of a component that become the darkest and the brightest level


def draw_maps(experiment: Experiment, *, steps: int) -> Drawing:
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
