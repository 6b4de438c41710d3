"""What is propagated between key steps: the encoder's features, the decoder's, both, or nothing (the paper's figure 16,
table 14). The paper does not say how the variants are computed; what is done here stands at `VARIANTS`.
"""

from __future__ import annotations

import argparse

from evaluation.plots.drawing import CELL, Drawing, canvas, picture_rows
from evaluation.plots.scene import Scene
from ldm.io.images import psnr
from ldm.models.diffusion.loop import denoise
from ldm.models.diffusion.propagation.load import load_plan

# Plan and --propagate. Decoder: all but its outermost block is kept, as DeepCache does; both: the prediction is used
# again; neither: the decoder gets zeros.
VARIANTS = {
    "encoder (the paper)": ("faster-diffusion", "hold"),
    "decoder": ("deepcache:faster-diffusion", "hold"),
    "both": ("deepcache:faster-diffusion:0", "hold"),
    "neither (zeros)": ("faster-diffusion", "zeros"),
}


def make(scene: Scene, args: argparse.Namespace) -> Drawing:
    engine = scene.engine("ddim", args.steps, "faster-diffusion")
    nodes, keys = engine.plan.num_nodes, engine.plan.keys
    runs = {"plain": load_plan("off", nodes)} | {
        name: load_plan(plan, nodes, nodes, propagate) for name, (plan, propagate) in VARIANTS.items()
    }
    model, rule, x = engine.plain_run(scene.items)
    pictures = {}
    for name, plan in runs.items():
        *_, state = denoise(model, rule, plan, x)
        pictures[name] = scene.decode(engine, state.x)
    distance = {name: psnr(made, pictures["plain"]).mean() for name, made in pictures.items() if name != "plain"}
    figure = canvas(1.5 + CELL * len(pictures), 0.5 + CELL * scene.count)
    columns = [name + (f"\n{distance[name]:.1f} dB" if name in distance else "\n") for name in pictures]
    picture_rows(figure, [*zip(*pictures.values(), strict=True)], columns, scene.names)
    return Drawing(
        figure,
        f"What is propagated from the key steps {', '.join(map(str, keys))} of {args.steps} "
        "DDIM steps, without prior noise. Numbers: PSNR to the plain run, mean over the pictures. "
        "Decoder: only its outermost block runs at the other steps; both: the key step's "
        "prediction is used again; neither: the decoder gets zeros.",
        {"psnr": distance},
    )
