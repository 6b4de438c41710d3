"""VideoFusion's network: the published numbers, both layouts, and trajectories plain and with propagation."""

from __future__ import annotations

import gzip
import json
from functools import cache

import pytest
import torch

from ldm.checkpoint.conversion import ConversionError, video_to_ldm
from ldm.checkpoint.model import load_config
from ldm.models.diffusion.ddpm import DDPM
from ldm.models.diffusion.loop import denoise
from ldm.models.diffusion.propagation.load import load_plan
from ldm.models.diffusion.propagation.plan import Plan
from ldm.models.diffusion.solvers.registry import solver
from ldm.modules.diffusionmodules.unet3d import VideoUNet, apart, together
from ldm.profiling.cost import unet_macs
from ldm.sampling.video import WholeVideos
from tests.helpers.goldens import assert_golden, load_case, recipe_tensor
from tests.helpers.paths import GOLDENS, ROOT

TINY = {
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 64,
    "num_res_blocks": 1,
    "channel_mult": [1, 1, 1],
    "context_dim": 24,
    "num_head_channels": 16,
}
CONFIG = ROOT / "configs/video/videofusion.yaml"


@cache
def weights() -> dict[str, torch.Tensor]:
    """By the recipe, whose keys are diffusers' names."""
    case, _ = load_case("videofusion_unet")
    return {
        key: recipe_tensor(key, tuple(shape), **case["weight_recipe"]) for key, (shape, _) in case["weights"].items()
    }


def test_one_prediction():
    case, tensors = load_case("videofusion_unet")
    network = VideoUNet(**TINY).eval()
    ours = video_to_ldm(weights())
    assert {key: list(value.shape) for key, value in ours.items()} == case["original_shapes"]
    for theirs, key in case["diffusers_to_original_keys"].items():
        assert torch.equal(ours[key].flatten(), weights()[theirs].flatten()), key
    network.load_state_dict(ours)
    with torch.no_grad():
        features = network.encode(tensors["x"], tensors["timesteps"], tensors["context"])
        assert_golden(features.hidden.flatten(0, 1), tensors["mid"], case)
        for i, skip in enumerate(features.skips):
            assert_golden(skip.flatten(0, 1), tensors[f"skip.{i}"], case)
        assert_golden(network.decode(features, tensors["timesteps"], tensors["context"]), tensors["out"], case)


def test_the_published_network():
    published = json.loads(gzip.decompress((GOLDENS / "state_dict_videofusion.json.gz").read_bytes()))
    with torch.device("meta"):
        ours = video_to_ldm({key: torch.empty(shape) for key, shape in published["shapes"].items()})
        network = VideoUNet(**load_config(CONFIG).model.params.unet_config.params)
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in network.state_dict().items()}
    assert [*ours] == [published["original"][key] for key in published["shapes"]]
    assert sum(parameter.numel() for parameter in network.parameters()) == 1_411_233_860


def test_another_network_is_refused():
    with pytest.raises(ConversionError, match=r"keys that VideoFusion's network does not have \(up_blocks.7.a"):
        video_to_ldm(weights() | {"up_blocks.7.a": torch.zeros(1)})
    network, t, context = VideoUNet(**TINY), torch.zeros(1), torch.zeros(1, 5, 24)
    for x, given, why in (
        (torch.zeros(1, 4, 3, 8, 6), context, r"H and W multiples of 4; got \(1, 4, 3, 8, 6\)"),
        (torch.zeros(1, 4, 3, 8, 8), torch.zeros(1, 5, 23), r"context must have shape \(1, L, 24\)"),
    ):
        with pytest.raises(ValueError, match=why):
            network(x, t, given)
    with pytest.raises(ValueError, match="merges no tokens; accepted: 0; got 0.5"):
        network.encode(torch.zeros(1, 4, 3, 8, 8), t, context, tome=0.5)


@cache
def model() -> DDPM:
    ddpm = DDPM(
        {"target": "ldm.modules.diffusionmodules.unet3d.VideoUNet", "params": TINY},
        linear_start=0.00085,
        linear_end=0.012,
        conditioning_key="crossattn",
        channels=4,
        use_ema=False,
    )
    ddpm.model.diffusion_model.load_state_dict(video_to_ldm(weights()))
    return ddpm.eval()


@pytest.mark.parametrize("name, keys", [("plain", "off"), ("propagated_50ls", "faster-diffusion")])
def test_the_recorded_trajectories(name, keys):
    """Frames are the images of a batch; the decoders of a group go three at a time."""
    case, tensors = load_case(f"videofusion_{name}")
    frames = case["frames"]
    uncond, cond = (part.repeat(frames, 1, 1) for part in tensors["prompt_embeds"].chunk(2))
    plan = load_plan(keys, 50, 3)
    assert list(plan.keys) == case.get("key_steps", [*range(50)])
    rule = solver("ddim", model().alphas_cumprod, 50)
    denoiser = model().denoiser(cond, uncond, case["guidance_scale"], network=WholeVideos(model().model, frames))
    x = [together(tensors["x_T"]), *(s.x for s in denoise(denoiser, rule, plan, together(tensors["x_T"])))]
    into = torch.stack([apart(x[i], frames) for i in tensors["step_idx"]])
    assert_golden(into, tensors["into_step"], case)
    assert_golden(apart(x[-1], frames), tensors["final"], case)


def test_outer_blocks_anew():
    """DeepCache's plan, with every step a key step, is plain."""
    case, tensors = load_case("videofusion_propagated_50ls")
    frames, x = case["frames"], together(tensors["x_T"])
    cond = tensors["prompt_embeds"][1:].repeat(frames, 1, 1)
    rule = solver("ddim", model().alphas_cumprod, 3)
    denoiser = model().denoiser(cond, network=WholeVideos(model().model, frames))
    finals = []
    for plan in (Plan(len(rule.nodes), tuple(range(len(rule.nodes)))), load_plan("deepcache:2", len(rule.nodes))):
        *_, last = denoise(denoiser, rule, plan, x)
        finals.append(last.x)
    assert finals[0].shape == finals[1].shape and not torch.equal(*finals)
    features = denoiser.encode(x, 500)
    anew = denoiser.refresh(features, x, 500, 2)
    for a, b in zip(features.tensors, anew.tensors, strict=True):
        torch.testing.assert_close(a, b)


def test_what_it_costs():
    """A frame in the paper's convention, beside the temporal attention among 16 frames."""
    unet = load_config(CONFIG).model.params.unet_config
    macs = unet_macs(unet, (32, 32), 2, 77, convention="paper")
    assert 16 * macs.whole / 1e9 == pytest.approx(4822.55, rel=2e-3)
    assert 16 * macs.encode / 1e9 == pytest.approx(1825.7, rel=2e-3)
