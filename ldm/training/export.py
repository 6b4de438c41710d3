"""Convert the state of a training run to weights for sampling."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from ldm.checkpoint import load_config, read_checkpoint, save_weights
from ldm.checkpoint.delta import save_delta
from ldm.checkpoint.embeddings import save_embeddings
from ldm.io.errors import SettingError, fault_of
from ldm.models.autoencoder import AutoencoderKL
from ldm.modules.ema import ema_name
from ldm.training.datasets import data_of
from ldm.training.state import LAST, read_state
from ldm.util import instantiate_from_config

SEED = 23  # of the order of the images over which statistics are taken
# Averages that a training keeps, and the part of the model that each follows.
CONTROL = "control."  # what a control network's weights are named in a training's state
NETWORK = "model.model.diffusion_model."  # what a network's weights are named there
AVERAGES = {"network_ema.": "model.", "conditioner_ema.": "cond_stage_model."}


def export(
    source: str | Path, out: str | Path, part: str | None = None, normalize: bool = False, dtype: str = "float32"
) -> int:
    """Write the weights of a training run, as sampling loads them, or one part of a model file; how many tensors.

    Args:
        source: log folder of a training run (its newest state is taken), or a state in it; with `part` a model file.
        out: file to write.
        part: name of the part, such as first_stage_model.
        normalize: see `normalized_first_stage`.
        dtype: of the weights, a name of PyTorch's.

    Raises:
        SettingError: a file can't be read or written, or has no such part.
    """
    with fault_of("source"):
        if part is None and (taught := taught_by(Path(source))):
            with fault_of("out"):
                return write_taught(out, rounded(taught[0], dtype), taught[1])
        state = part_of(Path(source), part) if part else weights_of_run(Path(source), normalize)
    with fault_of("out"):
        save_weights(out, rounded(state, dtype))
    return len(state)


def rounded(state: Mapping[str, Tensor], dtype: str) -> dict[str, Tensor]:
    """The weights in that precision; but the schedule's buffers, which have no dot in their names, stay exact.

    Rounded, they would change every sample.
    """
    precision = getattr(torch, dtype)
    return {k: v.to(precision) if v.is_floating_point() and "." in k else v for k, v in state.items()}


def taught_by(source: Path) -> tuple[dict[str, Tensor], DictConfig] | None:
    """The state and the settings of a `Personalization` that keeps less than a whole model; None for other runs."""
    file = source if source.suffix == ".ckpt" else source / LAST
    training = load_config(file.with_name("config.yaml")).get("training") or {}
    if not str(training.get("target")).endswith(".Personalization") or training.params.get("what", "all") == "all":
        return None
    return read_state(file)["state_dict"], training.params


def write_taught(out: str | Path, state: Mapping[str, Tensor], params: Mapping[str, Any]) -> int:
    """Write what such a training taught: new tokens, a LoRA, or a delta of Custom Diffusion; how many tensors.

    Raises:
        ValueError: see `save_delta`.
    """
    unet = {k.removeprefix(NETWORK): v for k, v in state.items() if k.startswith(NETWORK)}
    if params["what"] == "lora":
        factors = {k: v for k, v in unet.items() if k.endswith((".down", ".up"))}
        lora = {
            f"lora_unet_{key.rpartition('.')[0].replace('.', '_')}.lora_{key.rpartition('.')[2]}.weight": value
            for key, value in factors.items()
        }
        save_weights(out, lora)
        return len(lora)
    rows, count = tokens_in(state), params.get("vectors", 1)
    names, first = list(params.get("new_tokens") or ()), int(state["first_token"])
    tokens = {name: rows[first + i * count : first + (i + 1) * count] for i, name in enumerate(names)}
    if params["what"] == "tokens":
        save_embeddings(out, tokens)
        return len(tokens)
    kept = (".to_k.weight", ".to_v.weight") if params["what"] == "crossattn-kv" else (".weight", ".bias")
    chosen = {k: v for k, v in unet.items() if ".attn2." not in k or k.endswith(kept)}
    save_delta(out, chosen, tokens)
    return len(tokens) + sum(".attn2." in key for key in chosen)


def tokens_in(state: Mapping[str, Tensor]) -> Tensor:
    """The vectors of the text encoder's tokens in a training's state."""
    ends = ("token_embedding.weight", "token_emb.weight")
    return next(v for k, v in state.items() if k.startswith("model.cond_stage_model.") and k.endswith(ends))


def part_of(file: Path, part: str) -> dict[str, Tensor]:
    """The weights of one part of a model file."""
    prefix = f"{part}."
    state = {k.removeprefix(prefix): v for k, v in read_checkpoint(file).items() if k.startswith(prefix)}
    if not state:
        raise SettingError("part", f"{file} has no weights named {prefix}*")
    return state


def weights_of_run(source: Path, normalize: bool) -> dict[str, Tensor]:
    """The weights of a training run, from its folder or from one of its states."""
    file = source if source.suffix == ".ckpt" else source / LAST
    weights = sampling_weights(read_state(file)["state_dict"])
    return normalized_first_stage(load_config(file.with_name("config.yaml")), weights) if normalize else weights


def sampling_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of the model in a Lightning module's state, replaced by their moving averages.

    Of a `ControlTraining` those of the control network alone, under the published names.
    """
    if control := {k.removeprefix(CONTROL): v for k, v in state.items() if k.startswith(CONTROL)}:
        return {f"control_model.{k}": state.get(f"network_ema.{ema_name(k)}", v) for k, v in control.items()}
    weights = {k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")}
    for ema_prefix, part in AVERAGES.items():
        for key in [k for k in weights if k.startswith(part)]:
            average = state.get(ema_prefix + ema_name(key.removeprefix(part)))
            if average is not None:
                weights[key] = average
    return weights


def normalized_first_stage(config: DictConfig, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a KL first stage, changed so that latents have mean 0 in every channel and variance 1 in total.

    Statistics over the training images of `config` are folded into the two 1x1 convolutions around the latents, so
    reconstructions stay the same. Each channel is divided by the geometric mean of its own and the average standard
    deviation: channels of fine detail stay smaller than those of shape and colour, but less so than before.
    """
    model = instantiate_from_config(config.model)
    model.load_state_dict(dict(weights))
    data = data_of(config.data, SEED)
    data.setup("fit")
    means = latent_means(model.eval(), data.train_dataloader())
    std = means.std((0, 2, 3))
    fold(model, means.mean((0, 2, 3)), (std * std.mean()).sqrt())
    return model.state_dict()


@torch.no_grad()
def latent_means(model: AutoencoderKL, batches: Iterable[Mapping[str, Tensor]]) -> Tensor:
    return torch.cat([model.encode(batch[model.image_key]).mean for batch in batches])


@torch.no_grad()
def fold(model: AutoencoderKL, mean: Tensor, scale: Tensor) -> None:
    """Change `model` in place: it then encodes to (z - mean) / scale, per channel, and decodes from that."""
    into, back = model.quant_conv, model.post_quant_conv
    channels = model.embed_dim
    into.bias[:channels] = (into.bias[:channels] - mean) / scale
    into.weight[:channels] /= scale.view(-1, 1, 1, 1)
    into.bias[channels:] -= 2.0 * scale.log()
    back.bias += back.weight[:, :, 0, 0] @ mean
    back.weight *= scale.view(1, -1, 1, 1)
