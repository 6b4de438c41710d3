"""Text2Video-Zero against the published pipeline: motion, attention between frames, whole runs."""

from __future__ import annotations

from functools import cache
from itertools import islice

import pytest
import torch
from torch import Tensor

from ldm.checkpoint import load_model
from ldm.models.diffusion.control import CrossFrame
from ldm.models.diffusion.ddim import DDIM
from ldm.models.diffusion.ddpm import DDPM
from ldm.models.diffusion.denoiser import Conditioning
from ldm.models.diffusion.loop import denoise
from ldm.models.diffusion.motion import moved
from ldm.models.diffusion.propagation.plan import Plan
from ldm.models.diffusion.schedule import ImageNoise, ddim_nodes, ddim_timesteps
from ldm.sampling.engine import Recipe
from ldm.sampling.generate import make_items
from ldm.sampling.task import Text
from ldm.sampling.video import Motion, MovedFrames, first_frame, frames_of
from tests.helpers.goldens import assert_golden, from_recipe, load_case
from tests.helpers.tiny_models import write_model
from tests.helpers.tiny_unet import TARGET


@cache
def model() -> DDPM:
    case, tensors = load_case("t2v_unet")
    ddpm = DDPM(
        {"target": TARGET, "params": case["kwargs"]},
        linear_start=0.00085,
        linear_end=0.012,
        use_ema=False,
        conditioning_key="crossattn",
    )
    from_recipe(ddpm.model.diffusion_model, case, tensors)
    return ddpm


def test_motion_is_exactly_the_published_one():
    case, tensors = load_case("t2v_motion")
    for one in case["cases"]:
        strength = one["motion_field_strength_x"], one["motion_field_strength_y"]
        key = one["key"]
        assert torch.equal(moved(tensors[f"{key}.latents"], one["frame_ids"], strength), tensors[f"{key}.warped"])


def test_frames_attend_to_the_first():
    case, tensors = load_case("t2v_unet")
    x, t, cond = tensors["x"], tensors["timesteps"], Conditioning(tensors["context"])
    network = CrossFrame(model().model, case["frames"])
    with torch.no_grad():
        projected = network.project(cond)
        features = network.encode(x, t, projected)
        for i, skip in enumerate(features.skips):
            assert_golden(skip, tensors[f"skip.{i}"], case)
        assert_golden(features.hidden, tensors["mid"], case)
        assert_golden(network.decode(features, t, projected), tensors["out"], case)
        # Decoders of two steps in one batch, and one half of the batch alone.
        half = projected.images(slice(4, None))
        alone = network.decode(network.encode(x[4:], t[4:], half), t[4:], half)
        assert_golden(alone, tensors["out"][4:], case)
        twice = network.decode(features.cat([features] * 2), t.repeat(2), projected.tile(2))
        assert_golden(twice[8:], tensors["out"], case)
        plain = model().model
        assert_golden(plain.decode(plain.encode(x, t, cond), t, cond), tensors["out_ordinary_attention"], case)


def run(plan: Plan, case, tensors, frames: slice = slice(None), steps: int = 48) -> list[Tensor]:
    """The latents of the frames that enter the first so many steps of all of them, and those after the last."""
    ddpm, embeds = model(), tensors["prompt_embeds"]
    motion = Motion((case["motion_field_strength_x"], case["motion_field_strength_y"]), case["t1"], case["t0"])
    nodes, scale = ddim_nodes(ddpm.alphas_cumprod, ddim_timesteps(50)), case["guidance_scale"]

    def denoiser(count: int):
        uncond, cond = (part[None].expand(count, -1, -1) for part in embeds)
        return ddpm.denoiser(cond, uncond, scale, network=CrossFrame(ddpm.model, count))

    numbers = [*range(case["frames"])][frames]
    with torch.no_grad():
        first = first_frame(denoiser(1), DDIM(nodes), tensors["x_T"], motion)
        noise = torch.cat([tensors["x_T"], tensors["forward_noise"]])[frames]
        x = frames_of(first, noise, numbers, nodes, ddpm.alphas_cumprod, motion)
    rule = DDIM(nodes[motion.first_node(50) :])
    return [x, *(state.x for state in islice(denoise(denoiser(len(numbers)), rule, plan, x), steps))]


@pytest.mark.parametrize(
    "name, parallel, steps", [("t2v_plain", 1, 12), ("t2v_propagated_9", 1, 16), ("t2v_propagated_10", 48, 48)]
)
def test_runs_are_the_published_ones(name, parallel, steps):
    """Plain, one decoder at a time, and in batches: the two laws, with recorded numbers."""
    case, tensors = load_case(name)
    keys = case.get("key_steps_of_third_loop", range(48))
    latents = run(Plan(48, tuple(keys), parallel), case, tensors, steps=steps)
    recorded = [(j, i) for j, i in enumerate(tensors["step_idx"].tolist()) if i <= steps]
    assert len(recorded) >= 4
    for j, i in recorded:
        assert_golden(latents[i], tensors["into_step"][j], case)
    if steps == 48:
        assert_golden(latents[-1], tensors["final"], case)


def test_a_frame_does_not_depend_on_the_others():
    """So a chunk of frames, with the first one, makes the same frames."""
    case, tensors = load_case("t2v_plain")
    plan = Plan(48, (0, 6), 6)
    whole, part = (run(plan, case, tensors, frames, 12) for frames in (slice(None), slice(0, 4, 3)))
    torch.testing.assert_close(part[-1], whole[-1][::3], rtol=0, atol=case["tolerance"]["atol"])


def test_motion_says_where_it_begins():
    assert Motion().first_node(50) == 2
    for t0, t1 in ((44, 44), (-1, 3), (3, 50)):
        with pytest.raises(ValueError, match="expected 0 <= t0 < t1 < 50"):
            Motion(t0=t0, t1=t1).first_node(50)


def test_the_first_frame_gets_other_noise_alone_than_among_all(tmp_path):
    drawn = []

    class Recording(Recipe):
        def rule(self, alphas_cumprod, noise, strength=1.0):
            drawn.append(noise)
            return super().rule(alphas_cumprod, noise, strength)

    motion, recipe = Motion(t1=3, t0=1), Recording(16, 16, "ddpm", steps=5, scale=1.0)
    (first,) = make_items([{"prompt": "an owl", "frame": 0}], 1, 42)
    start, x = MovedFrames(motion, 0.8, first, recipe, Text()), torch.zeros(1, 4, 8, 8)
    latents = start.latents(load_model(*write_model(tmp_path)), [first], x, None)
    assert latents.shape == x.shape
    among_all = [ImageNoise([first.seed]).node(i, x) for i in range(4)]
    assert not any(torch.equal(drawn[0](i, x), one) for i in range(5) for one in among_all)
