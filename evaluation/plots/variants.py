"""What is propagated between key steps: the encoder's features, the decoder's, both, or nothing (the paper's figure 16,
table 14). The paper does not say how the variants are computed; what is done here is at each of them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from evaluation.plots.drawing import CELL, Drawing, canvas, picture_rows
from evaluation.plots.scene import Scene
from ldm.images import psnr
from ldm.models.diffusion.denoiser import Prediction, Wrapper
from ldm.models.diffusion.loop import denoise
from ldm.models.diffusion.plan import Plan
from ldm.modules.diffusionmodules.features import Features


class KeyNodesOnly(Wrapper):
    """A denoiser that uses another one at key nodes; what it predicts between them is for its kinds to say."""

    def decode(self, features: Sequence[Features], ts: Sequence[float],
               last: Prediction | None = None) -> list[Prediction]:
        if last is not None:
            return self.between(features, ts, last)
        first = self.inner.decode(features[:1], ts[:1])
        return first + (self.between(features[1:], ts[1:], first[0]) if ts[1:] else [])

    def between(self, features: Sequence[Features], ts: Sequence[float], last: Prediction) -> list[Prediction]:
        """The predictions at nodes that are no key nodes, from the key node's features and the prediction before."""
        raise NotImplementedError


class Both(KeyNodesOnly):
    """Encoder and decoder propagated: the key node's prediction is used again."""

    def between(self, features: Sequence[Features], ts: Sequence[float], last: Prediction) -> list[Prediction]:
        return [last] * len(ts)


class Dropping(KeyNodesOnly):
    """Nothing propagated: the decoder gets zeros for all that the encoder would have left."""

    def between(self, features: Sequence[Features], ts: Sequence[float], last: Prediction) -> list[Prediction]:
        return self.inner.decode([Features.of([torch.zeros_like(t) for t in f.tensors]) for f in features], ts)


def decoder_plan(plan: Plan, skips: Sequence[Tensor]) -> Plan:
    """Decoder propagated: between key nodes the encoder runs, and of the decoder only its finest resolution.

    That is what DeepCache does; the encoder's inner blocks would run for nothing, so they do not.
    """
    finest = sum(skip.shape[-1] == skips[0].shape[-1] for skip in skips)
    others = tuple(i for i in range(plan.num_nodes) if i not in plan.keys)
    return replace(plan, shallow=others, branch=finest if others else 0)


def make(scene: Scene, args: argparse.Namespace) -> Drawing:
    engine = scene.engine("ddim", args.steps, "faster-diffusion")
    plan, plain = engine.plan, Plan(engine.plan.num_nodes, tuple(range(engine.plan.num_nodes)))
    model, rule, x = engine.plain_run(scene.items)
    decoder = decoder_plan(plan, model.encode(x, rule.nodes[0].t).skips)
    runs = {"plain": (model, plain), "encoder (the paper)": (model, plan), "decoder": (model, decoder),
            "both": (Both(model), plan), "neither (zeros)": (Dropping(model), plan)}
    pictures = {}
    for name, (denoiser, how) in runs.items():
        *_, state = denoise(denoiser, rule, how, x)
        pictures[name] = scene.decode(engine, state.x)
    distance = {name: psnr(made, pictures["plain"]).mean() for name, made in pictures.items() if name != "plain"}
    figure = canvas(1.5 + CELL * len(pictures), 0.5 + CELL * scene.count)
    columns = [name + (f"\n{distance[name]:.1f} dB" if name in distance else "\n") for name in pictures]
    picture_rows(figure, [*zip(*pictures.values(), strict=True)], columns, scene.names)
    return Drawing(figure, f"What is propagated from the key steps {', '.join(map(str, plan.keys))} of {args.steps} "
                           "DDIM steps, without prior noise. Numbers: PSNR to the plain run, mean over the pictures. "
                           "Decoder: only its finest resolution runs at the other steps; both: the key step's "
                           "prediction is used again; neither: the decoder gets zeros.", {"psnr": distance})
