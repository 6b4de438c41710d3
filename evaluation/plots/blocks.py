"""The outputs of a UNet's blocks during a plain run, and how much they change from step to step.

As in the paper, a block is all layers of one resolution: E8 is the encoder's block at resolution 8, including the layer
that leads to the next resolution; B is the middle block; D8 is the decoder's block at resolution 8.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from ldm.models.diffusion.denoiser import Denoiser
from ldm.models.diffusion.loop import Rule, denoise
from ldm.models.diffusion.propagation.plan import Plan

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
    features = model.encode(x, t)
    sizes = [skip.shape[-1] for skip in features.skips]
    outputs = {f"E{size}": features.skips[i] for i, size in encoder_ends(sizes)}
    outputs["B"] = features.hidden
    for remaining, size in decoder_ends(sizes):
        (features,) = model.advance([features], [t], remaining)
        outputs[f"D{size}"] = features.hidden
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
    """How the outputs of every block, by name, develop during a run.

    norm:     `frobenius` at every node, (nodes, B).
    absolute: `change` at every node but the first, (nodes - 1, B), as in eq. 2; it grows with the output's size.
    relative: the same, divided by the output's mean square.
    """

    norm: dict[str, np.ndarray]
    absolute: dict[str, np.ndarray]
    relative: dict[str, np.ndarray]


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
