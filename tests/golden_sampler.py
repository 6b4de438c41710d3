"""The small network whose samples by the published samplers are recorded."""

from __future__ import annotations

from functools import cache

from contracts import from_recipe, load_case

from ldm.models.diffusion.ddpm import DDPM

SHAPE = (4, 8, 8)       # of a latent


@cache
def model(parameterization: str = "eps") -> DDPM:
    case, tensors = load_case("sampler_unet")
    ddpm = DDPM(
        {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": case["kwargs"]},
        linear_start=0.00085,
        linear_end=0.012,
        use_ema=False,
        conditioning_key="crossattn",
        parameterization=parameterization,
    )
    from_recipe(ddpm.model.diffusion_model, case, tensors)
    return ddpm
