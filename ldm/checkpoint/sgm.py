"""The configuration of SDXL as its publisher writes it (`sgm.models.diffusion.DiffusionEngine`), in our own form.

Only what samples is read; what belongs to a training, a sampler or a loss is left out. Nothing of a config is run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ldm.util import ConfigError

ENGINE = "sgm.models.diffusion.DiffusionEngine"
NEEDED = ("network_config", "denoiser_config", "conditioner_config", "first_stage_config", "scale_factor")
# Of a training, of the publisher's sampler, and of logging.
UNUSED = (
    "sampler_config",
    "loss_fn_config",
    "optimizer_config",
    "scheduler_config",
    "network_wrapper",
    "ckpt_path",
    "use_ema",
    "ema_decay_rate",
    "input_key",
    "log_keys",
    "no_cond_log",
    "compile_model",
    "en_and_decode_n_samples_a_time",
)
PARAMETERIZATIONS = {"EpsScaling": "eps", "VScaling": "v"}
KERNELS = ("softmax", "softmax-xformers")  # of attention, for the same result
LATENT = 128  # height and width of the latents; published images have 1024 x 1024 pixels


def in_our_form(model: Mapping[str, Any]) -> dict[str, Any]:
    """The `model` part of the publisher's config, whose target is ENGINE.

    Raises:
        ConfigError: a part is missing, or asks for what is not here.
    """
    params = dict(model.get("params") or {})
    if missing := [name for name in NEEDED if name not in params]:
        raise ConfigError(f"{ENGINE} without {', '.join(missing)}")
    first_kept = "disable_first_stage_autocast"
    if unknown := set(params) - {*NEEDED, *UNUSED, first_kept}:
        raise ConfigError(
            f"params of {ENGINE}: {', '.join(sorted(unknown))}: unknown; accepted: {', '.join((*NEEDED, first_kept))}"
        )
    first_stage = _part(params["first_stage_config"], "first_stage_config")
    if "embed_dim" not in first_stage:
        raise ConfigError("first_stage_config without embed_dim")
    return {
        "target": "ldm.models.diffusion.ddpm.StableDiffusionXL",
        "params": {
            "linear_start": 0.00085,
            "linear_end": 0.012,
            "timesteps": 1000,
            "image_size": LATENT,
            "channels": first_stage["embed_dim"],
            "conditioning_key": "crossattn-adm",
            "cond_stage_key": "txt",
            "parameterization": _parameterization(_part(params["denoiser_config"], "denoiser_config")),
            "scale_factor": params["scale_factor"],
            "disable_first_stage_autocast": params.get(first_kept, False),
            "use_ema": False,
            "unet_config": _unet(params["network_config"]),
            "first_stage_config": params["first_stage_config"],
            "cond_stage_config": params["conditioner_config"],
        },
    }


def _part(config: Any, name: str) -> Mapping[str, Any]:
    """The params of a part."""
    params = config.get("params") if isinstance(config, Mapping) and "target" in config else None
    if not isinstance(params, Mapping):
        raise ConfigError(f"{name}: expected a mapping with 'target' and 'params'; got {config!r}")
    return params


def _name(config: Any) -> str:
    return str(config.get("target") if isinstance(config, Mapping) else config).rpartition(".")[2]


def _parameterization(denoiser: Mapping[str, Any]) -> str:
    """What the network predicts; its noise schedule is checked."""
    schedule = denoiser.get("discretization_config")
    if _name(schedule) != "LegacyDDPMDiscretization" or (schedule.get("params") or denoiser.get("num_idx") != 1000):
        raise ConfigError(
            f"denoiser_config: expected LegacyDDPMDiscretization with its usual values and num_idx 1000; "
            f"got {_name(schedule)} and {denoiser.get('num_idx')}"
        )
    scaling = _name(denoiser.get("scaling_config"))
    if scaling not in PARAMETERIZATIONS:
        raise ConfigError(f"denoiser_config: scaling must be {' or '.join(PARAMETERIZATIONS)}; got {scaling}")
    return PARAMETERIZATIONS[scaling]


def _unet(network: Any) -> dict[str, Any]:
    """The network with what its publisher's class takes for granted."""
    params = {**_part(network, "network_config")}
    kernel = params.pop("spatial_transformer_attn_type", KERNELS[0])
    if kernel not in KERNELS:
        raise ConfigError(f"spatial_transformer_attn_type must be {' or '.join(KERNELS)}; got {kernel!r}")
    widths = params.get("context_dim")
    if isinstance(widths, list):  # one for each block of a transformer
        if len(set(widths)) != 1:
            raise ConfigError(f"context_dim must be one width for all blocks; got {widths}")
        params["context_dim"] = widths[0]
    usual = {"image_size": LATENT, "use_spatial_transformer": True, "legacy": False}
    return {"target": network["target"], "params": usual | params}
