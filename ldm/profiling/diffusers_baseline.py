"""The same run by the diffusers library: the same weights, scheduler and precision."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from diffusers.models import attention_processor
from torch import Tensor, nn

from ldm.checkpoint.conversion import diffusers_unet
from ldm.models.diffusion.parallel import Backend, compiled
from ldm.profiling.workload import SCALE, Workload

FORMATS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}
PROCESSORS = {"fused attention": "AttnProcessor2_0", "plain attention": "AttnProcessor"}


@dataclass(frozen=True)
class Peer:
    """A diffusers UNet, as it is fastest: `setting` says how."""

    unet: Callable[..., Any]
    setting: str

    def compiled(self, backend: Backend = "inductor") -> Peer:
        """The same, compiled by PyTorch as ours is."""
        return Peer(compiled(self.unet, backend), self.setting)

    @torch.inference_mode()
    def run(self, workload: Workload) -> Tensor:
        """What `Workload.run` does with the plain plan."""
        p = workload.params
        prediction = {"eps": "epsilon", "v": "v_prediction"}[p.get("parameterization", "eps")]
        scheduler = diffusers.DDIMScheduler(
            beta_start=p["linear_start"],
            beta_end=p["linear_end"],
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
            prediction_type=prediction,
        )
        scheduler.set_timesteps(workload.steps)
        x = workload.x
        for t in scheduler.timesteps:
            uncond, cond = self.unet(torch.cat([x, x]), t, encoder_hidden_states=workload.context).sample.chunk(2)
            x = scheduler.step(uncond + SCALE * (cond - uncond), t, x).prev_sample
        return x


def diffusers_peer(params: dict[str, Any], network: nn.Module) -> nn.Module:
    """diffusers' UNet with the network's weights, which are shared.

    Raises:
        ValueError: the network is not one of Stable Diffusion 1 or 2.
    """
    config, weights = diffusers_unet(params, network.diffusion_model.state_dict())
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel.from_config(config)
    unet.load_state_dict(weights, assign=True)
    return unet.eval().requires_grad_(False)


def fastest(unet: nn.Module, workload: Workload) -> Peer:
    """Try its attention processors and memory formats on one evaluation each, and keep the fastest."""
    latents, best, kept = torch.cat([workload.x, workload.x]), float("inf"), ("", "")

    def setting(processor: str, memory: str) -> None:
        unet.set_attn_processor(getattr(attention_processor, PROCESSORS[processor])())
        unet.to(memory_format=FORMATS[memory])

    for memory in FORMATS:
        for processor in PROCESSORS:
            setting(processor, memory)
            with torch.inference_mode():
                seconds = _second_time(lambda: unet(latents, 500, encoder_hidden_states=workload.context))
            if seconds < best:
                best, kept = seconds, (processor, memory)
    setting(*kept)
    return Peer(unet, ", ".join(kept))


def _second_time(call: Callable[[], Any]) -> float:
    call()
    began = time.perf_counter()
    call()
    return time.perf_counter() - began
