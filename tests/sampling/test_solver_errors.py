"""Every deterministic solver on the trained model that ships: more steps come closer to a fine run.

The images are of 32 x 32 pixels, so that a step takes milliseconds. The solvers with fresh noise have no fine run to
come closer to, since each number of steps draws other noise; `tests/diffusion/test_convergence.py` holds that the
distribution of their samples comes closer to the data's.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from ldm.checkpoint import load_config, load_model
from ldm.models.diffusion.ddim import DDIM
from ldm.models.diffusion.loop import Rule, denoise
from ldm.models.diffusion.propagation.load import load_plan
from ldm.models.diffusion.schedule import CLEAN, Node
from ldm.models.diffusion.solvers.registry import SOLVERS, solver
from ldm.sampling.engine import Engine, Recipe, Sizes, Task
from ldm.sampling.generate import prompt_items
from ldm.sampling.task import Text
from tests.helpers.paths import ROOT

MODEL = ROOT / "models" / "ldm" / "emoji64"
PROMPTS = ["a dog face, twemoji style"]
STEPS = (5, 10, 15, 50)
# Below it counts what more steps do not change: where a published grid begins (t = 991 at 15 steps of ddim and plms,
# 981 at 50), and what the network says at timesteps between the trained ones.
FLOOR = 1e-4
NOISY = ("ddpm", "ddpm-learned", "euler-a")
PUBLISHED = [name for name in SOLVERS if name.endswith("-published")]
DETERMINISTIC = [name for name in SOLVERS if name not in (*NOISY, *PUBLISHED)]


class Runs:
    """A guided image, from the same noise by any rule."""

    def __init__(self) -> None:
        model = load_model(MODEL / "config.yaml", MODEL / "model.safetensors")
        sizes = Sizes.of(load_config(MODEL / "config.yaml").model)
        engine = Engine(model, sizes, Recipe(32, 32, scale=2.0), load_plan("off", 50), Task(Text()))
        self.denoiser, _, self.x = engine.plain_run(prompt_items(PROMPTS, 1, seed=0))
        self.abar = model.alphas_cumprod
        fine = solver("unipc", self.abar, 100)
        trained = self.final(fine)
        last = Node(0, fine.nodes[-1].abar_next, CLEAN.abar)
        # Where a run of 100 steps of order 3 ends, at the first training timestep; and one step on, at clean latents.
        self.fine = {False: trained, True: self.final(DDIM((last,)), trained)}

    def final(self, rule: Rule, x: Tensor | None = None) -> Tensor:
        with torch.inference_mode():
            *_, state = denoise(self.denoiser, rule, load_plan("off", len(rule.nodes)), self.x if x is None else x)
        return state.x

    def error(self, name: str, steps: int, **where) -> float:
        """Mean squared error of the latents to the fine run's."""
        made = self.final(solver(name, self.abar, steps, **where))
        return float((made - self.fine[SOLVERS[name].spacings.clean]).square().mean())


@pytest.fixture(scope="module")
def runs() -> Runs:
    return Runs()


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_more_steps_come_closer_to_a_fine_run(runs, name):
    errors = [runs.error(name, steps) for steps in STEPS]
    assert all(after < max(before, FLOOR) for before, after in pairwise(errors)), errors
    assert errors[-1] < errors[0] / 40, errors


def test_the_published_rule_gets_worse_between_14_and_15_steps(runs):
    """Without lower order at the end, where the last step in time is long in log-SNR."""
    fewer, more = (runs.error("dpm-solver++-published", steps) for steps in (14, 15))
    assert more > 1.5 * fewer
    assert runs.error("dpm-solver++", 15, spacing="time") < fewer


@pytest.mark.parametrize("name", [name for name, solver in SOLVERS.items() if solver.spacing])
def test_a_default_that_is_not_the_published_spacing_is_far_better(runs, name):
    assert runs.error(name, 15) < runs.error(name, 15, spacing="time") / 5
