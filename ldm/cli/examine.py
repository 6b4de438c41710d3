"""What this machine can run, which published models are here, and whether a config and a checkpoint belong together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from omegaconf import DictConfig
from torch import nn

from ldm.checkpoint import CheckpointError, load_config, load_model, read_checkpoint
from ldm.checkpoint.deepfloyd import find_stage, load_stage
from ldm.checkpoint.diagnosis import Facts, differences, facts_of_config, facts_of_weights, measured_prediction, summary
from ldm.checkpoint.file import stated_prediction
from ldm.checkpoint.model import check_whole
from ldm.checkpoint.published import Published, load_manifest
from ldm.cli.installation import Finding
from ldm.cli.setup import CONSTRUCTION, fitting_configs
from ldm.io.errors import fault_of, some
from ldm.io.files import PROJECT_ROOT
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.encoders.t5 import find_parts
from ldm.profiling.cost import context_tokens, free_bytes

DTYPES = ("float32", "bfloat16", "float16")
MEASURE = 32  # largest height and width of the latents for the measured prediction


# The machine


def machine(verify: bool) -> Iterator[Finding]:
    """What this machine computes with, and which published models are here; `verify`: check their SHA-256.

    Raises:
        SettingError: the list of published models can't be read.
    """
    with fault_of("models/published.yaml"):
        models = load_manifest().values()
    yield from devices()
    yield from published(models, verify)


def devices() -> Iterator[Finding]:
    yield Finding("ok", f"cpu, {torch.get_num_threads()} threads: {computes(torch.device('cpu'))}")
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        about = torch.cuda.get_device_properties(i)
        yield Finding(
            "ok", f"cuda:{i}, {about.name}, {about.total_memory / 1e9:.1f} GB: {computes(torch.device('cuda', i))}"
        )
    if torch.backends.mps.is_available():
        yield Finding("ok", f"mps: {computes(torch.device('mps'))}")


def computes(device: torch.device) -> str:
    """The number formats in which the device runs what the networks are made of; tried, not looked up."""
    works = []
    for name in DTYPES:
        x = torch.ones(1, 4, 8, 8, dtype=getattr(torch, name), device=device)
        try:
            torch.nn.functional.conv2d(x, x.repeat(4, 1, 1, 1)[..., :3, :3])
            torch.nn.functional.scaled_dot_product_attention(x, x, x).sum().item()
        except (RuntimeError, TypeError):
            continue
        works.append(name)
    return f"computes in {', '.join(works)}"


def published(models: Iterable[Published], verify: bool, root: Path = PROJECT_ROOT) -> Iterator[Finding]:
    absent = []
    for model in models:
        status = model.status(root, verify)
        if status == "absent":
            absent.append(model.name)
        elif status == "wrong":
            yield Finding(
                "FAULT",
                f"{model.name}: {model.path} is not the published file",
                f"delete it, then python scripts/download_models.py {model.name}",
            )
        else:
            said = {
                "present": "here, not verified (--verify)",
                "verified": "here, as published",
                "unverifiable": "here and readable; no published SHA-256 to hold it to",
            }[status]
            yield Finding("ok", f"{model.name}: {said}; {model.config}")
    if absent:
        yield Finding(
            "note",
            f"{len(absent)} published models are not here: {', '.join(absent[:4])}, ...; "
            f"python scripts/download_models.py --list",
        )


# A config and a checkpoint


def examine(config_path: Path, ckpt: Path) -> Iterator[Finding]:
    """Whether the two belong together."""
    with fault_of("config"):
        config = load_config(config_path)
        stated = facts_of_config(config.model)
    with fault_of("ckpt"):
        state = read_checkpoint(ckpt)
        check_whole(ckpt, state)
    weights, averages = facts_of_weights(state), sum(key.startswith("model_ema.") for key in state)
    held = f", {averages} of them averages, which --weights auto takes" if averages else ""
    yield Finding("ok", f"{ckpt}: {len(state)} tensors{held}")
    del state

    if faults := differences(stated, weights):
        for fault in faults:
            yield Finding("FAULT", str(fault))
        yield Finding("note", f"the checkpoint {advice(weights)}")
        return
    yield Finding("ok", f"{config_path}: states what the checkpoint is ({summary(stated)})")
    try:
        model = load_model(config_path, ckpt)
    except CheckpointError as error:
        yield Finding("FAULT", str(error), f"the checkpoint {advice(weights)}")
        return
    except CONSTRUCTION as error:
        yield Finding("FAULT", f"the config does not build a model: {' '.join(str(error).split())}")
        return
    findings = [*placed(model)]
    yield from findings
    if stated.channels is not None and findings[-1].kind == "ok":
        yield from prediction(config, model, ckpt)


# A stage of DeepFloyd-IF, whose folder is config and checkpoint together


def is_stage(folder: Path) -> bool:
    """Whether it looks like one: a network in either layout, without the first stage of Stable Diffusion."""
    described = (folder / "unet" / "config.json").is_file() or (folder / "config.yml").is_file()
    return described and not (folder / "vae").is_dir()


def examine_stage(folder: Path) -> Iterator[Finding]:
    """Whether its weights are those that its description says, and whether T5 is beside them."""
    cpu = torch.device("cpu")
    with fault_of("ckpt"):
        stage = find_stage(folder)
    params = stage.model["params"]["unet_config"]["params"]
    widths = ", ".join(str(params["model_channels"] * factor) for factor in params["channel_mult"])
    yield Finding(
        "ok",
        f"{folder}: stage {2 if params['noise_level'] else 1} of DeepFloyd-IF, images of {params['image_size']} x "
        f"{params['image_size']} pixels, channels {widths}; it reads states of width {params['encoder_dim']}",
    )
    try:
        model = load_stage(stage, cpu, free_bytes(cpu))
    except ValueError as error:
        yield Finding("FAULT", str(error), f"expected the weights that {stage.described} describes")
        return
    yield from placed(model)
    try:
        yield Finding("ok", f"T5 is beside it: {find_parts(folder)[0]}")
    except ValueError:
        yield Finding("note", "no T5 beside it; scripts/if2img.py takes its folder as --t5")


def placed(model: nn.Module) -> Iterator[Finding]:
    """That all weights were found, and whether they are finite."""
    yield Finding("ok", "every weight has its place")
    if broken := not_finite(model):
        yield Finding(
            "FAULT",
            f"{len(broken)} weights hold NaN or infinite numbers{some(broken)}",
            "a training that diverged, or a damaged file: take an earlier checkpoint, or download it again",
        )


def not_finite(model: nn.Module) -> list[str]:
    """Names of the weights in which a number is NaN or infinite."""
    return [name for name, weight in model.named_parameters() if not weight.isfinite().all()]


def advice(weights: Facts) -> str:
    """Which of the published configs would fit."""
    if found := fitting_configs(weights):
        return f"fits --config {' or '.join(found)}"
    return f"fits no published config; it is: {summary(weights)}"


def prediction(config: DictConfig, model: LatentDiffusion, ckpt: Path) -> Iterator[Finding]:
    """Whether the network predicts what the config says; names and shapes do not tell."""
    params = config.model.params
    says = params.get("parameterization", "eps")
    source, found = "the folder's scheduler states", stated_prediction(ckpt)
    if found is None:
        source, found = "one prediction on pure noise looks like", measured(model, context_tokens(params))
    if found is None:
        yield Finding("note", f"the config says parameterization {says}; the checkpoint does not tell")
    elif found == says:
        yield Finding("ok", f"parameterization {says}: {source} {found}")
    else:
        yield Finding(
            "FAULT",
            f"parameterization {says} in the config, but {source} {found}",
            f"set parameterization: {found} in the config's model.params{which_prediction(config)}",
        )


def which_prediction(config: DictConfig) -> str:
    """What helps to choose: of Stable Diffusion 2 both were published; of any other, weights may be untrained."""
    facts = facts_of_config(config.model)
    if facts.conditioner != "OpenCLIP" or facts.video:
        return ", if the network is trained: an untrained one looks like v, whatever it is to predict"
    return (
        " (Stable Diffusion 2 at 768 x 768: v, configs/stable-diffusion/v2-inference-v.yaml; at 512 x 512: eps, "
        "v2-inference.yaml)"
    )


def measured(model: LatentDiffusion, tokens: int | None) -> str | None:
    """See `measured_prediction`, for a context of so many tokens; None for a network that needs more than that."""
    unet, t = model.model.diffusion_model, torch.tensor([model.num_timesteps - 1])
    if model.model.conditioning_key not in (None, "crossattn") or unet.num_classes is not None:
        return None
    context = None if unet.context_dim is None else torch.zeros(1, tokens, unet.context_dim)
    side = min(MEASURE, model.image_size)
    return measured_prediction(lambda x: unet(x, t, context), (1, unet.in_channels, side, side))
