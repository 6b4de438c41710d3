"""Propagation of the encoder's features, the decoder's, both or neither (figure 16 and table 14 of the paper).

The paper does not say how the variants are computed; `VARIANTS` says how they are computed here.
"""

from __future__ import annotations

from evaluation.plots.drawing import CELL, Drawing, image_grid, new_figure
from evaluation.plots.experiment import Experiment
from ldm.io.images import psnr
from ldm.models.diffusion.loop import denoise
from ldm.models.diffusion.propagation.load import load_plan

# Plan and propagation. Decoder: all but its outermost block is reused, as in DeepCache; both: the prediction is reused;
# neither: the decoder gets zeros.
VARIANTS = {
    "encoder (the paper)": ("faster-diffusion", "hold"),
    "decoder": ("deepcache:faster-diffusion", "hold"),
    "both": ("deepcache:faster-diffusion:0", "hold"),
    "neither (zeros)": ("faster-diffusion", "zeros"),
}


def make(experiment: Experiment, *, steps: int) -> Drawing:
    """Draw the images of every variant over `steps` DDIM steps."""
    engine = experiment.engine("ddim", steps, "faster-diffusion")
    nodes, keys = engine.plan.num_nodes, engine.plan.keys
    runs = {"plain": load_plan("off", nodes)} | {
        name: load_plan(plan, nodes, nodes, propagate) for name, (plan, propagate) in VARIANTS.items()
    }
    model, rule, x = engine.plain_run(experiment.items)
    images = {}
    for name, plan in runs.items():
        *_, state = denoise(model, rule, plan, x)
        images[name] = experiment.decode(engine, state.x)
    distance = {name: psnr(of, images["plain"]).mean() for name, of in images.items() if name != "plain"}
    figure = new_figure(1.5 + CELL * len(images), 0.5 + CELL * experiment.count)
    columns = [name + (f"\n{distance[name]:.1f} dB" if name in distance else "\n") for name in images]
    image_grid(figure, [*zip(*images.values(), strict=True)], columns, experiment.labels)
    return Drawing(
        figure,
        f"Propagation from the key timesteps {', '.join(map(str, keys))} of {steps} "
        "DDIM steps, without prior noise. Numbers: PSNR to the plain run, mean over the images. "
        "Decoder: only its outermost block runs at the other timesteps; both: the key timestep's "
        "prediction is reused; neither: the decoder gets zeros.",
        {"psnr": distance},
    )
