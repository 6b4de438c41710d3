"""What the blocks of a UNet put out along a plain run, and how much that changes from step to step.

A block is all of one resolution, as in the paper: E8 is the encoder's at resolution 8 with the layer that leaves for
the next one, B the middle block, D8 the decoder's at resolution 8.
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
    """The blocks' outputs at every node of the plain run from x, (B, C, H, W).

    With guidance they are those of the conditional prediction, which are the last half of its batch.
    """
    nodes = rule.nodes
    plain = Plan(len(nodes), tuple(range(len(nodes))))
    states = denoise(model, rule, plan=plain, x=x)
    for node in nodes:
        yield {name: output[-len(x) :] for name, output in block_outputs(model, x, node.t).items()}
        x = next(states).x


@torch.no_grad()
def block_outputs(model: Denoiser, x: Tensor, t: float) -> Outputs:
    """Of one prediction, for the batch that the denoiser makes of x."""
    features = model.encode(x, t)
    sizes = [skip.shape[-1] for skip in features.skips]
    outputs = {f"E{size}": features.skips[i] for i, size in encoder_ends(sizes)}
    outputs["B"] = features.hidden
    for remaining, size in decoder_ends(sizes):
        (features,) = model.advance([features], [t], remaining)
        outputs[f"D{size}"] = features.hidden
    return outputs


def encoder_ends(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Index of the skip that leaves each resolution, with that resolution; `sizes` are the skips'."""
    down = [(i + 1, a) for i, (a, b) in enumerate(pairwise(sizes)) if a != b]
    return [*down, (len(sizes) - 1, sizes[-1])]


def decoder_ends(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """How many output blocks remain when the decoder has done each resolution, innermost first."""
    outer = [(i + 1, b) for i, (a, b) in enumerate(pairwise(sizes)) if a != b]
    return [*reversed(outer), (0, sizes[0])]


def change(now: Tensor, before: Tensor) -> np.ndarray:
    """Mean squared difference of two outputs (B, C, h, w) for each picture, (B,). Source: the paper's eq. 2."""
    return (now - before).double().square().flatten(1).mean(1).cpu().numpy()


def frobenius(output: Tensor) -> np.ndarray:
    """Frobenius norm of the mean over the channels of (B, C, h, w), for each picture, (B,)."""
    return output.double().mean(1).flatten(1).norm(dim=1).cpu().numpy()


@dataclass(frozen=True)
class Evolution:
    """Of every block along a run, by name.

    norm:     `frobenius` at every node, (nodes, B).
    absolute: `change` at every node but the first, as in eq. 2, which grows with the size of a block's output,
              (nodes - 1, B).
    relative: the same over the output's mean square.
    """

    norm: dict[str, np.ndarray]
    absolute: dict[str, np.ndarray]
    relative: dict[str, np.ndarray]


def evolution(run: Iterator[Outputs]) -> Evolution:
    """What the blocks' outputs do from node to node of a run; no more than two nodes' are kept at a time.

    Raises:
        ValueError: a run of one node, in which nothing changes.
    """
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
