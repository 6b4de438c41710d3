"""The small networks whose samples by the published samplers are recorded.

The one of `sampler_unet` does not depend on the time: its normalisation takes out what the residual blocks add for it.
The one of `sampler_time_dpm_ms2_x0` does.
"""

from __future__ import annotations

from functools import cache

from ldm.models.diffusion.ddpm import DDPM
from tests.helpers.goldens import from_recipe, load_case

SHAPE = (4, 8, 8)  # of a latent


@cache
def model(parameterization: str = "eps", network: str = "sampler_unet") -> DDPM:
    """The model of the case that lists the network's weights."""
    case, tensors = load_case(network)
    kwargs = case.get("kwargs") or case["unet_kwargs"]
    ddpm = DDPM(
        {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": kwargs},
        linear_start=0.00085,
        linear_end=0.012,
        use_ema=False,
        conditioning_key="crossattn",
        parameterization=parameterization,
    )
    from_recipe(ddpm.model.diffusion_model, case, tensors)
    return ddpm
