"""The published sampler class against recorded runs of the published code, and its own promises."""

from __future__ import annotations

import inspect

import pytest
import torch

from ldm.models.diffusion.ddim import DDIM, DDIMSampler
from ldm.models.diffusion.denoiser import Prediction
from ldm.models.diffusion.loop import denoise, inpainting, prior_noise
from ldm.models.diffusion.propagation.load import load_plan
from ldm.models.diffusion.propagation.plan import Plan
from ldm.models.diffusion.schedule import Node, ddim_nodes, ddim_timesteps
from tests.helpers.golden_sampler import SHAPE, model
from tests.helpers.goldens import assert_golden, load_case


def guidance(case, tensors):
    return {"unconditional_guidance_scale": case["cfg_scale"], "unconditional_conditioning": tensors["uc"]}


def assert_intermediates(actual, tensors, case):
    for name in ("x_inter", "pred_x0"):
        if name in tensors:
            assert_golden(torch.stack(actual[name]), tensors[name], case)


@pytest.mark.parametrize("name", ["eta0_cfg1", "eta0_cfg7.5", "vpred", "eta1_S10", "eta0.5_S10"])
def test_published_samples(name):
    case, tensors = load_case(f"sampler_ddim_{name}")
    samples, intermediates = DDIMSampler(model(case.get("parameterization", "eps"))).sample(
        case["S"],
        2,
        SHAPE,
        tensors["c"],
        eta=case["eta"],
        temperature=case.get("temperature", 1.0),
        x_T=tensors["x_T"],
        normals_sequence=tensors.get("noise"),
        log_every_t=1 if case["eta"] else 10,
        verbose=False,
        **guidance(case, tensors),
    )
    assert_golden(samples, tensors["final"], case)
    assert_intermediates(intermediates, tensors, case)


@pytest.mark.parametrize("name", ["eta0_cfg1", "eta0_cfg7.5", "vpred"])
def test_published_steps_one_by_one(name):
    case, tensors = load_case(f"sampler_ddim_{name}")
    sampler, x = DDIMSampler(model(case.get("parameterization", "eps"))), tensors["x_T"]
    sampler.make_schedule(case["S"], verbose=False)
    for index in reversed(range(case["S"])):
        t = torch.full((2,), sampler.ddim_timesteps[index])
        x, _ = sampler.p_sample_ddim(x, tensors["c"], t, index=index, **guidance(case, tensors))
    assert_golden(x, tensors["final"], case)


def test_steps_draw_noise_of_their_own():
    sampler, x = DDIMSampler(model()), torch.zeros(2, *SHAPE)
    sampler.make_schedule(10, ddim_eta=1.0, verbose=False)
    condition = load_case("sampler_ddim_eta0_cfg1")[1]["c"]
    (one, x0), (two, again) = (sampler.p_sample_ddim(x, condition, 901, 9) for _ in range(2))
    assert (one != two).any() and (one[0] != one[1]).any()
    assert torch.equal(x0, again)


def test_published_shortened_run():
    case, tensors = load_case("sampler_ddim_timesteps30")
    case["cfg_scale"] = 5.0  # missing from the case; found as the only round value that reproduces it
    sampler = DDIMSampler(model())
    sampler.make_schedule(case["S"], verbose=False)
    samples, intermediates = sampler.ddim_sampling(
        tensors["c"],
        (2, *SHAPE),
        tensors["x_T"],
        timesteps=30,
        log_every_t=10,
        verbose=False,
        **guidance(case, tensors),
    )
    assert_golden(samples, tensors["final"], case)
    assert_intermediates(intermediates, tensors, case)


def test_published_inpainting():
    case, tensors = load_case("sampler_ddim_inpaint")
    rule = DDIM(ddim_nodes(model().alphas_cumprod, ddim_timesteps(case["S"])))
    noise = dict(zip(rule.nodes, tensors["q_noise"], strict=True))
    keep = inpainting(tensors["x0"], tensors["mask"], lambda x, node: noise[node])
    samples, intermediates = DDIMSampler(model()).sample(
        case["S"],
        2,
        SHAPE,
        tensors["c"],
        x_T=tensors["x_T"],
        log_every_t=5,
        verbose=False,
        edits=[keep],
        **guidance(case, tensors),
    )
    assert_golden(samples, tensors["final"], case)
    assert_intermediates(intermediates, tensors, case)


def test_published_image_to_image():
    case, tensors = load_case("sampler_ddim_img2img")
    sampler = DDIMSampler(model())
    sampler.make_schedule(case["S"], verbose=False)
    encoded = sampler.stochastic_encode(tensors["x0"], torch.tensor([case["t_enc"]] * 2), noise=tensors["x_T"])
    assert_golden(encoded, tensors["encoded"], case)
    assert_golden(
        sampler.stochastic_encode(tensors["x0"], 700, True, tensors["x_T"]),
        tensors["encoded_original_steps_t700"],
        case,
    )
    decoded = sampler.decode(encoded, tensors["c"], case["t_enc"], case["cfg_scale"], tensors["uc"])
    assert_golden(decoded, tensors["final"], case)


def test_published_inversion():
    case, tensors = load_case("sampler_ddim_encode_inversion")
    sampler = DDIMSampler(model())
    sampler.make_schedule(case["S"], verbose=False)
    encoded, out = sampler.encode(tensors["x0"], tensors["c"], case["t_enc"], return_intermediates=5)
    assert_golden(encoded, tensors["encoded"], case)
    assert out["intermediate_steps"] == [0, 6, 12, 18, 24, 28, 29]
    assert torch.equal(out["intermediates"][-1], encoded) and torch.equal(out["x_encoded"], encoded)
    assert_golden(sampler.decode(encoded, tensors["c"], case["t_enc"]), tensors["final"], case)


def test_inversion_can_tell_the_network_true_timesteps():
    TimestepModel.seen.clear()
    sampler = DDIMSampler(TimestepModel())
    sampler.make_schedule(20, verbose=False)
    x0 = torch.randn(1, *SHAPE, dtype=torch.float64)
    encoded, _ = sampler.encode(x0, None, 12, true_timesteps=True)
    assert TimestepModel.seen == [0, *sampler.ddim_timesteps[:11]]
    quirky, _ = sampler.encode(x0, None, 12)
    assert TimestepModel.seen[12:] == list(range(12))
    assert not torch.allclose(encoded, quirky, atol=1e-3)


class TimestepModel:
    """A model whose noise estimate is its timestep / 1000 everywhere."""

    num_timesteps, device = 1000, torch.device("cpu")
    alphas_cumprod = torch.linspace(0.999, 0.005, 1000, dtype=torch.float64)
    network = torch.nn.Identity()
    seen: list[float] = []

    def denoiser(self, cond, uncond, scale):
        return self

    def encode(self, x, t):
        self.seen.append(t)
        return x

    def decode(self, features, ts, last):
        return [Prediction(torch.full_like(x, t / 1000)) for x, t in zip(features, ts, strict=True)]

    def to_eps(self, prediction, x, node):
        return prediction.out


def test_published_signatures():
    """Names, order and defaults that callers of the published class rely on; additions are keyword-only."""

    def positional(function):
        return {
            p.name: p.default
            for p in inspect.signature(function).parameters.values()
            if p.kind is p.POSITIONAL_OR_KEYWORD and p.name != "self"
        }

    none = dict.fromkeys
    empty = inspect.Parameter.empty
    assert positional(DDIMSampler.__init__) == {"model": empty, "schedule": "linear", "device": None}
    assert list(positional(DDIMSampler.make_schedule).items()) == [
        ("ddim_num_steps", empty),
        ("ddim_discretize", "uniform"),
        ("ddim_eta", 0.0),
        ("verbose", True),
    ]
    assert list(positional(DDIMSampler.sample).items()) == list(
        {
            "S": empty,
            "batch_size": empty,
            "shape": empty,
            **none(["conditioning", "callback", "normals_sequence", "img_callback"]),
            "quantize_x0": False,
            "eta": 0.0,
            "mask": None,
            "x0": None,
            "temperature": 1.0,
            "noise_dropout": 0.0,
            "score_corrector": None,
            "corrector_kwargs": None,
            "verbose": True,
            "x_T": None,
            "log_every_t": 100,
            "unconditional_guidance_scale": 1.0,
            "unconditional_conditioning": None,
            "dynamic_threshold": None,
            "ucg_schedule": None,
        }.items()
    )
    assert list(positional(DDIMSampler.p_sample_ddim)) == [
        "x",
        "c",
        "t",
        "index",
        "repeat_noise",
        "use_original_steps",
        "quantize_denoised",
        "temperature",
        "noise_dropout",
        "score_corrector",
        "corrector_kwargs",
        "unconditional_guidance_scale",
        "unconditional_conditioning",
        "dynamic_threshold",
    ]
    assert list(positional(DDIMSampler.stochastic_encode)) == ["x0", "t", "use_original_steps", "noise"]
    assert list(positional(DDIMSampler.decode)) == [
        "x_latent",
        "cond",
        "t_start",
        "unconditional_guidance_scale",
        "unconditional_conditioning",
        "use_original_steps",
        "callback",
    ]
    assert list(positional(DDIMSampler.encode)) == [
        "x0",
        "c",
        "t_enc",
        "use_original_steps",
        "return_intermediates",
        "unconditional_guidance_scale",
        "unconditional_conditioning",
        "callback",
    ]


def sample(sampler=None, batch=2, steps=5, **kwargs):
    _, tensors = load_case("sampler_ddim_eta0_cfg1")
    arguments = {"conditioning": tensors["c"][:batch], "verbose": False, **kwargs}
    return (sampler or DDIMSampler(model())).sample(steps, batch, SHAPE, **arguments)


def test_plan_and_edits_reach_the_loop():
    _, tensors = load_case("sampler_ddim_eta0_cfg1")
    x_T = tensors["x_T"]
    samples, _ = sample(x_T=x_T, steps=10, plan="faster-diffusion", parallel=4, edits=[prior_noise(x_T)])
    rule = DDIM(ddim_nodes(model().alphas_cumprod, ddim_timesteps(10)))
    *_, state = denoise(model().denoiser(tensors["c"]), rule, load_plan("0-3,5,7", 10), x_T, [prior_noise(x_T)])
    torch.testing.assert_close(samples, state.x, rtol=0, atol=1e-4)
    plain, _ = sample(x_T=x_T, steps=10)
    assert (samples - plain).abs().max() > 1e-3
    given, _ = sample(x_T=x_T, steps=10, plan=Plan(10, (0, 1, 2, 3, 5, 7)), edits=[prior_noise(x_T)])
    torch.testing.assert_close(samples, given, rtol=0, atol=1e-4)


def test_callbacks_count_up_from_the_noisiest_step():
    steps, images = [], []
    sample(callback=steps.append, img_callback=lambda x0, i: images.append((i, tuple(x0.shape))))
    assert steps == [0, 1, 2, 3, 4]
    assert images == [(i, (2, *SHAPE)) for i in range(5)]


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_drawn_noise_belongs_to_the_image(eta):
    """Batches of two and of one give the same images, whatever the global generator does."""
    together, _ = sample(eta=eta)
    sampler = DDIMSampler(model())
    _, tensors = load_case("sampler_ddim_eta0_cfg1")
    torch.manual_seed(123)
    alone = [sample(sampler, 1, eta=eta, conditioning=tensors["c"][b : b + 1])[0] for b in range(2)]
    torch.testing.assert_close(torch.cat(alone), together, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(together[0], together[1], atol=0.1)
    other, _ = sample(DDIMSampler(model(), seed=1), eta=eta)
    assert not torch.allclose(other, together, atol=0.1)


def test_mask_keeps_x0():
    """The last step leaves the kept region within that step's small noise of x0."""
    x0 = torch.full((2, *SHAPE), 0.5)
    mask = torch.zeros(2, 1, 8, 8)
    mask[..., :4] = 1
    free, _ = sample(steps=20)
    kept, _ = sample(steps=20, mask=mask, x0=x0)
    assert (kept - x0)[..., :4].abs().mean() < 0.2 < (free - x0)[..., :4].abs().mean()


@pytest.mark.parametrize("steps, nodes", [(333, 334), (1000, 1000)])
def test_steps_that_the_published_code_cannot_run(steps, nodes):
    TimestepModel.seen.clear()
    samples, _ = DDIMSampler(TimestepModel()).sample(steps, 1, SHAPE, verbose=False)
    assert torch.isfinite(samples).all()
    assert len(TimestepModel.seen) == nodes and TimestepModel.seen[0] == 999


def test_original_steps_run_every_timestep_to_the_clean_end():
    sampler = DDIMSampler(TimestepModel())
    TimestepModel.seen.clear()
    sampler.decode(torch.zeros(1, *SHAPE), None, 7, use_original_steps=True)
    assert TimestepModel.seen == [6, 5, 4, 3, 2, 1, 0]
    assert sampler._nodes(True)[-1].abar_next == 1.0


@pytest.mark.parametrize(
    "arguments, why",
    [
        ({"quantize_x0": True}, "quantize_x0 is not supported"),
        ({"noise_dropout": 0.1}, "noise_dropout"),
        ({"score_corrector": object()}, "score_corrector"),
        ({"corrector_kwargs": {"a": 1}}, "corrector_kwargs"),
        ({"dynamic_threshold": 0.9}, "dynamic_threshold"),
        ({"ucg_schedule": [1.0] * 5}, "ucg_schedule"),
        ({"mask": torch.ones(1)}, "mask and x0 belong together"),
        ({"x0": torch.ones(1)}, "mask and x0"),
        ({"x_T": torch.zeros(1, *SHAPE)}, r"x_T must have the shape \(2, 4, 8, 8\)"),
        ({"eta": -1.0}, "eta must be 0"),
        ({"eta": 1.5}, "eta must be 0"),
        ({"steps": 0}, "steps must be 1..1000"),
        ({"log_every_t": 0}, "log_every_t"),
        ({"plan": "fastest"}, "unknown plan"),
        ({"plan": "0,7"}, "past the last node 4"),
        ({"plan": Plan(6, (0,))}, "plan is for 6 nodes, the solver has 5"),
        ({"normals_sequence": []}, "for 5 steps; got 0"),
        ({"unconditional_guidance_scale": 2.0}, "uncond"),
    ],
)
def test_bad_arguments_say_why(arguments, why):
    with pytest.raises(ValueError, match=why):
        sample(**arguments)


def test_unknown_arguments_raise():
    with pytest.raises(TypeError, match="guidance_scal"):
        sample(guidance_scal=2.0)


def test_bad_ranges_say_why():
    sampler, x = DDIMSampler(model()), torch.zeros(2, *SHAPE)
    with pytest.raises(ValueError, match="make_schedule"):
        sampler.decode(x, None, 3)
    with pytest.raises(ValueError, match="make_schedule"):
        sampler.stochastic_encode(x, 3)
    sampler.make_schedule(10, verbose=False)
    for t in (10, -1):
        with pytest.raises(ValueError, match=r"t must be 0..9; got"):
            sampler.stochastic_encode(x, t)
    for index, t in ((10, 901), (-1, 901), (3, torch.tensor([1, 2]))):
        with pytest.raises(ValueError, match=r"index must be 0..9; got|t must be one timestep"):
            sampler.p_sample_ddim(x, None, t, index)
    for t_start in (0, 11):
        with pytest.raises(ValueError, match=r"t_start must leave 1..10 steps"):
            sampler.decode(x, None, t_start)
    with pytest.raises(ValueError, match="t_enc"):
        sampler.encode(x, None, 11)
    with pytest.raises(ValueError, match="return_intermediates must be 1..5"):
        sampler.encode(x, None, 5, return_intermediates=6)
    with pytest.raises(ValueError, match="schedule must be 'linear'"):
        DDIMSampler(model(), "cosine")
    with pytest.raises(ValueError, match="needs noise"):
        DDIM((Node(1, 0.5, 0.9),), eta=1.0)
