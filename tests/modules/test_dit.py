"""The diffusion transformer: the published numbers, the authors' trajectories, and what its split promises."""

from __future__ import annotations

import json
import zlib
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

from ldm.models.diffusion.ddpm import DDPM
from ldm.models.diffusion.denoiser import Conditional, Conditioning, Guidance, Guided, Prediction
from ldm.models.diffusion.loop import Edit, Rule, denoise, prior_noise
from ldm.models.diffusion.propagation.load import load_plan
from ldm.models.diffusion.propagation.plan import Plan, check_blocks
from ldm.models.diffusion.schedule import Node
from ldm.models.diffusion.solvers.ancestral import log_variance
from ldm.models.diffusion.solvers.registry import solver
from ldm.modules.diffusionmodules.dit import DiT, position_embedding
from ldm.modules.diffusionmodules.util import Features
from ldm.profiling.cost import unet_macs
from tests.helpers.goldens import assert_golden, from_recipe, load_case, recipe_weights
from tests.helpers.paths import GOLDENS

XL = {"target": "ldm.modules.diffusionmodules.dit.DiT", "params": {}}  # of 256 x 256 images


# One prediction


def test_the_published_numbers():
    case, tensors = load_case("dit")
    network = from_recipe(DiT(**case["kwargs"], encoder_blocks=1), case, tensors)
    torch.testing.assert_close(position_embedding(4, 32), tensors["w.pos_embed"], rtol=0, atol=1e-7)
    x, t, y = tensors["x"], tensors["t"], tensors["y"]
    with torch.no_grad():
        assert_golden(network.embed(t, y, 2), tensors["c"], case)
        features = network.encode(x, t, y=y)
        assert_golden(features.hidden, tensors["block.0"], case)
        assert_golden(network.decode(features, t, y=y), tensors["out"], case)
        pair, times, labels = x[:1].repeat(2, 1, 1, 1), torch.tensor([500, 500]), torch.tensor([10, 3])
        uncond, cond = network(pair, times, y=labels).chunk(2)
    assert_golden(Guidance(4.0, channels=3).guided(uncond, cond), tensors["cfg_out"][:1], case)


def test_the_published_names_and_shapes():
    with torch.device("meta"):
        ours = {key: [list(v.shape), "float32"] for key, v in DiT().state_dict().items()}
    published = json.loads((GOLDENS / "state_dict_dit_xl_2_256.json").read_text())["keys"]
    assert ours == {key: [shape, dtype] for key, (shape, dtype, _) in published.items()}


def test_before_training_blocks_are_the_identity_and_nothing_is_predicted():
    network = tiny()
    x = torch.randn(2, 4, 8, 8)
    out = network(x, torch.tensor([5, 900]), y=torch.tensor([0, 10]))
    assert out.shape == (2, 8, 8, 8) and not out.any()
    features = network.encode(x, torch.tensor([5, 900]), y=torch.tensor([0, 10]))
    torch.testing.assert_close(features.hidden, network.x_embedder(x) + network.pos_embed)


def tiny(**changes) -> DiT:
    sizes = {"input_size": 8, "hidden_size": 32, "depth": 3, "num_heads": 4, "num_classes": 10, "encoder_blocks": 2}
    return DiT(**sizes | changes)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"input_size": 9}, "multiple of patch_size 2; got 9"),
        ({"num_heads": 5}, "multiple of num_heads 5; got 32"),
        ({"hidden_size": 36, "num_heads": 4, "encoder_blocks": 3}, "must be 1..2 of 3 blocks; got 3"),
        ({"hidden_size": 6, "num_heads": 2}, "hidden_size must be a multiple of 4; got 6"),
    ],
)
def test_sizes_that_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny(**changes)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda net: net(torch.zeros(1, 4, 16, 16), ZERO, y=ZERO), r"\('B', 4, 8, 8\).*got \(1, 4, 16, 16\)"),
        (lambda net: net(X, ZERO), r"y must have shape \(1,\), a class; got None"),
        (lambda net: net(X, torch.zeros(2), y=ZERO), r"timesteps must have shape \(1,\).*got \(2,\)"),
        (lambda net: net(X, ZERO, X, ZERO), "context must be None"),
        (lambda net: net.encode(X, ZERO, y=ZERO, tome=0.5), "merges no tokens; accepted: 0; got 0.5"),
        (lambda net: net.decode(Features(X, ()), ZERO, y=ZERO), r"tokens \(B, 16, 32\)"),
        (lambda net: check_blocks(load_plan("deepcache:2", 4), len(net.output_blocks)), "this network has 0"),
    ],
)
def test_what_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(tiny())


X, ZERO = torch.zeros(1, 4, 8, 8), torch.zeros(1, dtype=torch.long)


# Costs


def test_what_the_paper_s_network_costs():
    """A block: qkv, both products of attention, projection, MLP, and the modulation of one vector."""
    macs, d, tokens = unet_macs(XL, (32, 32)), 1152, 256
    block = tokens * 12 * d * d + 2 * tokens * tokens * d + 6 * d * d
    time = (256 + d) * d
    assert macs.encode == 18 * block + tokens * 16 * d + time
    assert macs.decode == 10 * block + tokens * d * 32 + 2 * d * d + time
    assert round(macs.whole / 1e9, 1) == 118.6  # published: 118.6 Gflops, with a multiply-accumulate as one
    plan = load_plan("dit250", 250)
    assert len(plan.keys) == 113
    assert macs.run(plan) / macs.plain(250) == pytest.approx(0.648, abs=1e-3)


# Trajectories of the authors


@cache
def model() -> DDPM:
    """As in the published code, with random weights; in these runs the embedding of places had half precision."""
    case, _ = load_case("dit_trajectory_plain_25")
    ddpm = DDPM(
        {"target": XL["target"], "params": case["kwargs"]},
        beta_schedule="sqrt_linear",
        channels=4,
        conditioning_key="adm",
        use_ema=False,
        guided_channels=3,
    )
    network = ddpm.model.diffusion_model
    recipe_weights(network, **case["weight_recipe"], stored={"pos_embed": network.pos_embed.half()})
    return ddpm


def step_noise(i: int, x: Tensor) -> Tensor:
    random = np.random.RandomState(zlib.crc32(f"451:noise.{i}".encode()))
    return torch.from_numpy(random.standard_normal(x.shape).astype(np.float16)).float()


def of_case(name: str) -> tuple[dict, dict[str, Tensor], Rule, Plan]:
    case, tensors = load_case(name)
    rule = solver("ddpm-learned", model().alphas_cumprod, case["S"], noise=step_noise)
    assert [node.t for node in rule.nodes] == case["timesteps"]
    keys = tuple(case.get("key_steps", range(case["S"])))
    return case, tensors, rule, Plan(case["S"], tuple(key for key in keys if key < case["S"]))


def denoiser(case: dict) -> Guided:
    cond, uncond = torch.tensor(case["y"]), torch.tensor([case["null_class"]])
    return model().denoiser(cond, uncond, case["cfg_scale"], variance=True)


@pytest.mark.parametrize("name", ["plain_25", "propagated_25", "plain_250", "serial_k113"])
def test_trajectories(name):
    """Latents of every step, of 15 where there are 250; plain, with 7 key timesteps, and with the authors' 113."""
    case, tensors, rule, plan = of_case(f"dit_trajectory_{name}")
    x = [tensors["z"], *(state.x for state in denoise(denoiser(case), rule, plan, tensors["z"]))]
    assert_golden(torch.stack([x[i] for i in tensors["step_idx"]]), tensors["into_step"], case)
    assert_golden(x[-1], tensors["final"], case)


def as_released(x_T: Tensor, rule: Rule, plan: Plan) -> Edit:
    """Prior noise that the last step of each group goes without."""
    inject, stops = prior_noise(x_T, 0.003, 300, "update"), {*plan.keys[1:], plan.num_nodes}
    last = {rule.nodes[stop - 1] for stop in stops}
    return Edit(lambda x, node: x if node in last else inject(x, node), "update")


def test_the_authors_parallel_run_with_their_list_and_their_noise():
    case, tensors, rule, plan = of_case("dit_trajectory_parallel_k113_noise")
    assert plan.keys == load_plan("dit250", 250).keys
    batched = Plan(250, plan.keys, parallel=250)
    *_, last = denoise(denoiser(case), rule, batched, tensors["z"], [as_released(tensors["z"], rule, plan)])
    assert_golden(last.x, tensors["final"], case)


class WrongLabels(Conditional):
    """The labels of a group in the order of the release: they alternate, while its features lie half by half."""

    def decode(self, features, ts, last=None):
        uncond, cond = self.cond.y.tolist()
        order = [cond, uncond] * len(ts)  # for [cond of every node | uncond of every node]
        y = torch.tensor([label for pair in zip(order[len(ts) :], order[: len(ts)], strict=True) for label in pair])
        out = self.network.decode(Features.cat(features), self._times(features[0].hidden, ts), Conditioning(y=y))
        return [Prediction(part) for part in out.chunk(len(ts))]


def test_the_release_mixes_up_its_labels():
    """What it made is reproduced by that mistake, and not without it."""
    case, tensors, rule, plan = of_case("dit_trajectory_parallel_k113")
    both = Conditioning(y=torch.tensor([case["null_class"], *case["y"]]))
    wrong = Guided(WrongLabels(model().model, both, variance=True), Guidance(case["cfg_scale"], channels=3))
    *_, last = denoise(wrong, rule, Plan(250, plan.keys, parallel=250), tensors["z"])
    assert_golden(last.x, tensors["final_as_released"], case)
    assert (tensors["final"] - tensors["final_as_released"]).abs().max() > 100


def test_parallel_is_serial():
    case, tensors, rule, plan = of_case("dit_trajectory_propagated_25")
    batched = Plan(25, plan.keys, parallel=5)
    *_, last = denoise(denoiser(case), rule, batched, tensors["z"])
    assert_golden(last.x, tensors["final"], case)


# Guidance and the variance


@pytest.mark.parametrize("reuse", [True, "linear"])
def test_an_offset_used_again_leaves_the_other_channels_alone(reuse):
    """With every node a key node it is the plain guidance."""
    case, tensors, rule, _ = of_case("dit_trajectory_plain_25")
    cond, uncond = torch.tensor(case["y"]), torch.tensor([case["null_class"]])
    again = model().denoiser(cond, uncond, Guidance(4.0, reuse=reuse), variance=True)
    features = again.encode(tensors["z"], 999)
    first = again.decode([features], [999])[0]
    second = again.decode([features], [957], first)[0].out
    alone = again.conditional.decode([features.images(slice(1, None))], [957])[0].out
    torch.testing.assert_close(second[:, 3:], alone[:, 3:], rtol=0, atol=1e-6)
    assert (second[:, :3] - alone[:, :3]).abs().max() > 0.1
    torch.testing.assert_close(first.out, denoiser(case).decode([features], [999])[0].out)


def test_the_variance_lies_between_its_bounds():
    node = Node(500, 0.3, 0.5)
    lower, upper = (1 - 0.5) / (1 - 0.3) * (1 - 0.3 / 0.5), 1 - 0.3 / 0.5
    v = torch.tensor([-1.0, 1.0, 0.0])
    expected = torch.tensor([lower, upper, (lower * upper) ** 0.5])
    torch.testing.assert_close(log_variance(v, node).exp(), expected)


def test_solvers_that_take_no_variance_get_none():
    case, tensors, _, plan = of_case("dit_trajectory_plain_25")
    rule = solver("ddim", model().alphas_cumprod, 25)
    cond, uncond = torch.tensor(case["y"]), torch.tensor([case["null_class"]])
    *_, last = denoise(model().denoiser(cond, uncond, 4.0), rule, plan, tensors["z"])
    assert last.x.shape == (1, 4, 8, 8)
    learned = solver("ddpm-learned", model().alphas_cumprod, 25, noise=step_noise)
    with pytest.raises(ValueError, match="needs 8 channels; the network gives 4"):
        next(denoise(model().denoiser(cond, uncond, 4.0), learned, plan, tensors["z"]))


# Training


def test_the_variance_is_trained_by_the_bound_alone():
    """As in the published loss the bound teaches the variance, and nothing else."""
    ddpm = model()
    x, t, noise = torch.randn(3, 4, 8, 8), torch.tensor([0, 1, 700]), torch.randn(3, 4, 8, 8)
    prediction = torch.randn(3, 4, 8, 8, requires_grad=True)
    v = torch.zeros(3, 4, 8, 8, requires_grad=True)
    x_t = ddpm.q_sample(x, t, noise)
    bound = ddpm.variance_bound(x, x_t, t, prediction.detach(), v)
    bound.sum().backward()
    assert bound.shape == (3,) and (bound[1:] > 0).all() and prediction.grad is None
    assert v.grad.flatten(1).any(1).all()
    losses = ddpm.p_losses(x, torch.tensor([1, 2, 3]), t, noise)
    torch.testing.assert_close(losses["loss"], losses["loss_simple"] + losses["loss_variance"])


def test_weights_of_images_leave_the_bound_as_it_is():
    ddpm = model()
    x, t, c, noise = (
        torch.randn(3, 4, 8, 8),
        torch.tensor([0, 1, 700]),
        torch.tensor([1, 2, 3]),
        torch.randn(3, 4, 8, 8),
    )
    alone = [ddpm.p_losses(*(value[i : i + 1] for value in (x, c, t, noise))) for i in range(3)]
    weights = torch.tensor([0.0, 0.5, 2.0])
    losses = ddpm.p_losses(x, c, t, noise, weights=weights)
    expected = sum(w * one["loss_simple"] + one["loss_variance"] for w, one in zip(weights, alone, strict=True)) / 3
    torch.testing.assert_close(losses["loss"], expected)


def test_the_bound_is_least_where_the_variance_is_that_of_the_posterior():
    """With the right mean, the divergence from the posterior vanishes at its own variance, v = -1."""
    ddpm = model()
    x, t, noise = torch.randn(1, 4, 8, 8), torch.tensor([3]), torch.randn(1, 4, 8, 8)
    x_t = ddpm.q_sample(x, t, noise)
    bounds = [ddpm.variance_bound(x, x_t, t, noise, torch.full_like(x, v)).item() for v in (-1.0, 0.0, 1.0)]
    assert bounds[0] == pytest.approx(0, abs=1e-5) and bounds[0] < bounds[1] < bounds[2]
