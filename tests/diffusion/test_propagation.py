"""Encoder propagation against recorded trajectories of the released code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from ldm.models.diffusion.ddim import DDIM
from ldm.models.diffusion.ddpm import DDPM
from ldm.models.diffusion.denoiser import Denoiser, Guided, Prediction
from ldm.models.diffusion.loop import Edit, State, denoise, prior_noise
from ldm.models.diffusion.propagation.load import load_plan
from ldm.models.diffusion.propagation.plan import Plan
from ldm.models.diffusion.schedule import Node, ddim_nodes, ddim_timesteps
from ldm.modules.diffusionmodules.util import Features
from tests.helpers.goldens import assert_golden, from_recipe, load_case
from tests.helpers.paths import GOLDENS

SD_CASES = {
    "full_ddim50": "off",
    "full_ddim50_noise": "off",
    "serial_50ls": "faster-diffusion",
    "serial_50ls_noise": "faster-diffusion",
    "serial_50ls_nocfg": "faster-diffusion",
    "serial_50ls_alpha1": "faster-diffusion",
    "parallel_50ls": "faster-diffusion",
    "parallel_50ls_noise": "faster-diffusion",
    "parallel_50ls_alpha1": "faster-diffusion",
    "serial_mod4": "uniform:4",
    "serial_mod4_noise": "uniform:4",
    "parallel_mod4_noise": "uniform:4",
}


@cache
def model(name: str) -> DDPM:
    case, tensors = load_case(name)
    kwargs = case.get("kwargs") or case["unet_kwargs"]
    schedule = case.get("schedule", {"linear_start": 0.00085, "linear_end": 0.012})
    ddpm = DDPM(
        {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": kwargs},
        linear_start=schedule["linear_start"],
        linear_end=schedule["linear_end"],
        use_ema=False,
        conditioning_key="crossattn",
    )
    sums = {key: value for key, value in case["weights"].items() if not key.startswith("cond_stage_model.")}
    from_recipe(ddpm.model.diffusion_model, {**case, "weights": sums}, tensors)
    return ddpm


@dataclass(frozen=True)
class Run:
    """What was recorded of a run.

    final: the latents after the last node.
    into:  per node, the latents that entered the update.
    left:  per node, the latents that left it, before any edit of them.
    eps:   per node, the guided noise that the update used.
    nodes: of the solver.
    """

    final: Tensor
    into: list[Tensor]
    left: list[Tensor]
    eps: list[Tensor]
    nodes: tuple[Node, ...]


@dataclass(frozen=True)
class Recording:
    """A rule that keeps what goes through another one."""

    rule: DDIM
    run: Run

    @property
    def nodes(self) -> tuple[Node, ...]:
        return self.rule.nodes

    def step(self, state: State, i: int, eps: Tensor) -> State:
        after = self.rule.step(state, i, eps)
        for record, value in ((self.run.into, state.x), (self.run.left, after.x), (self.run.eps, eps)):
            record.append(value)
        return after


def recorded_run(name: str, denoiser: Denoiser, steps: int, plan: Plan, x_T: Tensor, edits: Sequence[Edit] = ()) -> Run:
    """A DDIM run on the schedule of the named model."""
    nodes = ddim_nodes(model(name).alphas_cumprod, ddim_timesteps(steps))
    run = Run(x_T, [], [], [], nodes)
    *_, state = denoise(denoiser, Recording(DDIM(nodes), run), plan, x_T, edits)
    return replace(run, final=state.x)


@pytest.mark.parametrize(
    "name, parallel",
    [(name, parallel) for name, plan in SD_CASES.items() for parallel in ((1,) if plan == "off" else (1, 50))]
    + [("serial_50ls_noise", 4), ("parallel_mod4_noise", 4)],
)
def test_released_trajectories(name, parallel):
    case, tensors = load_case(f"propagation_{name}")
    x_T = tensors["latents"]
    order = "after" if case["mode"] == "parallel" else "before"
    denoiser = model("propagation_unet").denoiser(
        tensors["prompt_embeds"], tensors["negative_prompt_embeds"], case["guidance_scale"]
    )
    run = recorded_run(
        "propagation_unet",
        denoiser,
        case["S"],
        load_plan(SD_CASES[name], 50, parallel),
        x_T,
        [prior_noise(x_T, case["noise_alpha"], when=order)],
    )
    assert [node.t for node in run.nodes] == tensors["scheduler_timesteps"].tolist()
    for j, i in enumerate(tensors["step_idx"].tolist()):
        assert_golden(run.into[i], tensors["into_step"][j], case)
        assert_golden(run.left[i], tensors["after_step"][j], case)
        torch.testing.assert_close(run.eps[i], tensors["guided_eps"][j], rtol=1e-4, atol=2e-3)
    assert_golden(run.final, tensors["final"], case)


TIME_CASES = sorted(path.stem for path in GOLDENS.glob("propagation_time_*.json"))


def timed_run(case, tensors, parallel: int, change=lambda denoiser: denoiser) -> Run:
    """A run of the network that depends on the time; `change` wraps its denoiser."""
    x_T = tensors["x_T"]
    timed = model("propagation_time_plain")
    denoiser = timed.denoiser(tensors["prompt_embeds"], tensors["negative_prompt_embeds"], case["guidance_scale"])
    edits = [prior_noise(x_T, case["noise_alpha"], when=case["noise_order"])] if case["noise_order"] else []
    plan = Plan(case["S"], tuple(case["key_steps"]), parallel)
    return recorded_run("propagation_time_plain", change(denoiser), case["S"], plan, x_T, edits)


@pytest.mark.parametrize("parallel", [1, 50])
@pytest.mark.parametrize("name", TIME_CASES)
def test_trajectories_of_a_network_that_depends_on_the_time(name, parallel):
    case, tensors = load_case(name)
    run = timed_run(case, tensors, parallel)
    assert [node.t for node in run.nodes] == case["timesteps"]
    for j, i in enumerate(tensors["step_idx"].tolist()):
        assert_golden(run.into[i], tensors["into_step"][j], case)
        torch.testing.assert_close(run.eps[i], tensors["guided_eps"][j], rtol=1e-4, atol=2e-3)
    assert_golden(run.final, tensors["final"], case)


class KeysTime:
    """A denoiser whose decoder is given the time of the key node that it goes on from."""

    def __init__(self, denoiser: Denoiser):
        self.denoiser, self.share, self.to_eps = denoiser, denoiser.share, denoiser.to_eps

    def encode(self, x: Tensor, t: float) -> Features:
        self.key = t
        return self.denoiser.encode(x, t)

    def decode(self, features: Sequence[Features], ts: Sequence[float], last: Prediction | None) -> list[Prediction]:
        return self.denoiser.decode(features, [self.key] * len(ts), last)


@pytest.mark.parametrize("name", [name for name in TIME_CASES if name != "propagation_time_plain"])
def test_the_cases_see_a_decoder_with_the_keys_time(name):
    case, tensors = load_case(name)
    off = (timed_run(case, tensors, 50, KeysTime).final - tensors["final"]).abs().max()
    assert off == pytest.approx(case["max_abs_change_with_key_step_time"], abs=2 * case["tolerance"]["atol"])


FORK_PLANS = {"k48": "ldm250", "k19": "ldm250-demo"}  # as the cases name the key lists
FORK_CASES = sorted(path.stem for path in GOLDENS.glob("fork_*_cfg*.json"))


@cache
def fork_start() -> dict[str, Tensor]:
    """The latents `x_T` and the conditioning, `c` and `uc`, that all cases share."""
    return load_case("fork_plain_cfg1.5")[1]


def fork_denoiser(scale):
    return model("fork_model").denoiser(fork_start()["c"], fork_start()["uc"], scale)


def fork_plan(case, parallel):
    return load_plan(FORK_PLANS[case["key_list"]] if "key_list" in case else "off", 250, parallel)


def run_fork(denoiser: Denoiser, plan: Plan, weight: float) -> Run:
    x_T = fork_start()["x_T"]
    return recorded_run("fork_model", denoiser, 250, plan, x_T, [prior_noise(x_T, weight, below=150, when="update")])


@cache
def fork_run(scale: float, plan: Plan, weight: float) -> Run:
    """A run that several cases are of."""
    return run_fork(fork_denoiser(scale), plan, weight)


# One serial case is computed one decoder at a time, as all were recorded; batches give the same.
@pytest.mark.parametrize("name, parallel", [(name, 1 if "_serial_k19_" in name else 250) for name in FORK_CASES])
def test_latent_diffusion_fork_trajectories(name, parallel):
    """`final` of a parallel case is the fork with the order of its conditioning corrected."""
    case, tensors = load_case(name)
    assert all(torch.equal(tensors[what], fork_start()[what]) for what in ("c", "uc", "x_T")) and case["S"] == 250
    weight = case.get("noise_coefficient") or 0.0
    run = fork_run(case["cfg_scale"], fork_plan(case, parallel), weight)
    for j, i in enumerate(tensors["step_idx"].tolist()):
        assert_golden(run.into[i], tensors["x_in"][j], case)
        assert_golden(run.eps[i], tensors["guided_eps"][j], {"tolerance": case["tolerance"]["guided_eps"]})
    assert_golden(run.final, tensors["final"], case)


@pytest.mark.parametrize("name", [name for name in FORK_CASES if "_serial_" in name])
def test_prior_noise_in_a_serial_run_of_the_fork(name):
    """The fork's serial mode ignores its noise flag; ours injects as its parallel mode does."""
    case, tensors = load_case(name)
    assert torch.equal(tensors["final_noise_flag_on"], tensors["final"])
    run = fork_run(case["cfg_scale"], fork_plan(case, 250), 0.003)
    assert_golden(run.final, tensors["final_injected"], case)


class MisorderedContext:
    """The fork's released parallel mode, for two images with guidance.

    Its features go through the decoder as [uncond x n | cond x n], its context as [uncond, cond] x n: most
    predictions of a group of n nodes see the wrong condition.
    """

    def __init__(self, guided: Guided):
        self.guided, self.network = guided, guided.network
        self.encode, self.to_eps = guided.encode, guided.to_eps

    def share(self, features: Features) -> Features:
        return features

    def decode(self, features: Sequence[Features], ts: Sequence[float], last: Prediction | None) -> list[Prediction]:
        n, cond = len(ts), self.guided.both.cond
        images = len(features[0]) // 2
        halves = [half for node in features for half in node.chunk(2)]
        ordered = Features.cat([*halves[::2], *halves[1::2]])
        t = torch.tensor(ts).repeat_interleave(images).repeat(2)
        uncond, cond = self.network.decode(ordered, t, cond.tile(n)).chunk(2)
        return [Prediction(out) for out in (uncond + self.guided.guidance.scale * (cond - uncond)).chunk(n)]


@pytest.mark.parametrize("name", ["fork_parallel_k48_noise0_cfg6.0", "fork_parallel_k19_noise1_cfg1.5"])
def test_what_the_forks_parallel_mode_does_differently(name):
    """The released numbers are ours with the conditioning mis-ordered, and far from ours without."""
    case, tensors = load_case(name)
    weight, released = case.get("noise_coefficient") or 0.0, tensors["final_as_released"]
    run = run_fork(MisorderedContext(fork_denoiser(case["cfg_scale"])), fork_plan(case, 250), weight)
    assert_golden(run.final, released, case)
    assert (released - tensors["final"]).abs().max() > 1000 * case["tolerance"]["atol"]


def test_the_two_orders_of_prior_noise_differ():
    (_, before), (_, after) = (load_case(f"propagation_{mode}_50ls_alpha1") for mode in ("serial", "parallel"))
    assert (before["final"] - after["final"]).abs().max() > 0.1, "so the cases above tell them apart"


def test_a_longer_hold_moves_further_from_the_plain_sampler():
    _, tensors = load_case("propagation_full_ddim50")
    plans = ["off", "uniform:2", "uniform:5", "0"]
    denoiser = model("propagation_unet").denoiser(tensors["prompt_embeds"], tensors["negative_prompt_embeds"], 7.5)
    finals = [
        recorded_run("propagation_unet", denoiser, 20, load_plan(plan, 20, 20), tensors["latents"]).final
        for plan in plans
    ]
    distance = [(final - finals[0]).pow(2).mean().sqrt() for final in finals]
    assert all(near < far for near, far in pairwise(distance))


def test_an_image_does_not_depend_on_its_place_in_the_batch():
    case, tensors = load_case("propagation_full_ddim50")

    def run(index):
        denoiser = model("propagation_unet").denoiser(
            tensors["prompt_embeds"][index], tensors["negative_prompt_embeds"][index], 7.5
        )
        plan = load_plan("faster-diffusion", 10, 4)
        return recorded_run("propagation_unet", denoiser, 10, plan, tensors["latents"][index]).final

    together = run([0, 1])
    assert_golden(run([1, 0]), together[[1, 0]], case)
    assert_golden(run([1]), together[[1]], case)
