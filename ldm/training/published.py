"""Configurations of the published trainings: what they leave to the published code is filled in."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from omegaconf import DictConfig, OmegaConf

from ldm.io.errors import shown
from ldm.io.files import AboveZero, Count, parse
from ldm.util import inside

FIRST_STAGES = ("AutoencoderKL", "VQModel")
DIFFUSIONS = ("LatentDiffusion", "Layout2ImgDiffusion", "MinimalRETRODiffusion")
HIGH_RATE = 1e-3
NEW_WORDS = ("ucd", "pll", "ktn")  # what new words of Custom Diffusion begin as, the last first
NOT_SCALED = "--scale_lr: without effect; the rate is training.params.learning_rate"
EVERY = ("auto", "-1", "None")  # words for all devices
MEASURES = ("evaluation",)  # packages whose callbacks a configuration may name
# Sections of `lightning` that have no effect here, and what is done instead.
INSTEAD = {
    "callbacks": "images are saved after each validation",
    "modelcheckpoint": "the newest state is kept, every lightning.checkpoint_every_minutes, and the best by "
    "model.params.monitor",
    "logger": "numbers go to CSV and TensorBoard",
}


def completed(config: DictConfig, scale_lr: bool = False, allow: Sequence[str] = ()) -> tuple[DictConfig, list[str]]:
    """A configuration with the four sections of a training, from a published one, and lines that say what was done.

    A configuration whose section `training` has a target is returned as it is; params without a target are kept.

    Args:
        scale_lr: multiply model.base_learning_rate with the images per step, as the published code does by default.
        allow: packages of one's own, whose callbacks are kept, as our measures are.

    Raises:
        ValueError: a section is no mapping; no learning rate, or not a number; a model that is not trained here.
    """
    given = mapping(config, "training")
    if "target" in given or config.get("model") is None:
        return config, [NOT_SCALED] if scale_lr else []
    config = config.copy()
    if str(config.model.get("target")).endswith(".CustomDiffusion"):
        config = of_custom_diffusion(config)
        given = mapping(config, "training")
    for name in ("model", "data", "data.params"):
        mapping(config, name)
    for name in ("model.params", "lightning", "lightning.trainer"):
        OmegaConf.update(config, name, mapping(config, name), merge=False)
    model, lightning = config.model, config.lightning
    kept = kept_callbacks(lightning, (*MEASURES, *allow))
    lines = [f"lightning.{name}: without effect; {INSTEAD[name]}" for name in INSTEAD if name in lightning]
    for name in INSTEAD:
        lightning.pop(name, None)
    if kept:
        lightning.callbacks = kept
    if model.get("base_learning_rate") is None:
        raise ValueError("model.base_learning_rate: not given; expected a number, or a section training")
    rate, line = learning_rate(config, scale_lr)
    del model.base_learning_rate
    taught = "what" in mapping(config, "training.params")
    target = "ldm.training.personal.Personalization" if taught else training_of(str(model.get("target")))
    config.training = {"target": target, "params": {"learning_rate": rate}}
    if target.endswith(("DiffusionTraining", "Personalization")):
        config.training.params |= {"published_optimizer": True, "condition_dropout": 0.0}
        if "ucg_training" in model.params:
            config.training.params.ucg_training = model.params.pop("ucg_training")
        model.params.use_ema = False  # the training keeps the averages
    config.training = OmegaConf.merge(config.training, given)
    return config, [line, *lines]


def kept_callbacks(lightning: DictConfig, packages: Sequence[str]) -> DictConfig:
    """Take the callbacks of these packages out of the section; nothing is left of it if all are."""
    callbacks = mapping(lightning, "callbacks")
    names = [k for k in callbacks if inside(str(OmegaConf.select(callbacks, f"{k}.target")), packages)]
    kept = OmegaConf.masked_copy(callbacks, names)
    if names and len(names) == len(callbacks):
        del lightning.callbacks
    return kept


def of_custom_diffusion(config: DictConfig) -> DictConfig:
    """A configuration of Custom Diffusion's release in the words of this project.

    What its command line says is said in the sections: data.params.train.params.datapath and caption of the thing,
    data.params.train2.params.datapath and caption of its class.
    """
    params, given = config.model.params, mapping(config, "training")
    stage, tokens = params.cond_stage_config, []
    if stage.target.endswith(".FrozenCLIPEmbedderWrapper"):
        stage.target = "ldm.modules.encoders.modules.FrozenCLIPEmbedder"
        tokens = str(stage.params.pop("modifier_token")).split("+")
    config.model.target = "ldm.models.diffusion.ddpm.LatentDiffusion"
    params.pop("add_token", None)
    own = {
        "what": params.pop("freeze_model", "crossattn-kv"),
        "new_tokens": dict(zip(tokens, NEW_WORDS[-len(tokens) :], strict=False)),
        "masked_prior": True,
    }
    config.training = {"params": own | dict(given.get("params") or {})}
    thing, kind = (mapping(config, f"data.params.{name}.params") for name in ("train", "train2"))
    subject = {
        "root": thing.get("datapath"),
        "prompt": thing.get("caption"),
        "class_root": kind.get("datapath"),
        "class_prompt": kind.get("caption"),
        "size": thing.get("size"),
        "augment": thing.get("aug", True),
    }
    batch = {name: config.data.params[name] for name in ("batch_size", "num_workers") if name in config.data.params}
    train = {"target": "ldm.data.personal.Subject", "params": subject}
    config.data = {"target": "ldm.training.datasets.DataModuleFromConfig", "params": batch | {"train": train}}
    return config


def mapping(config: DictConfig, name: str) -> DictConfig:
    """A section of a configuration; an empty one where there is none.

    Raises:
        ValueError: it is something else.
    """
    section = OmegaConf.select(config, name)
    if section is None:
        return OmegaConf.create()
    if not OmegaConf.is_dict(section):
        raise ValueError(f"{name} should be a mapping; got {shown(section)}")
    return section


def training_of(target: str) -> str:
    """The class that trains a model of this target."""
    name = target.rpartition(".")[2]
    if name in FIRST_STAGES:
        return "ldm.training.adversarial.AdversarialTraining"
    if name in DIFFUSIONS:
        return "ldm.training.diffusion.DiffusionTraining"
    known = ", ".join((*FIRST_STAGES, *DIFFUSIONS))
    raise ValueError(f"model.target: {target!r} is not trained here; accepted: {known}, or a section training")


def learning_rate(config: DictConfig, scale_lr: bool) -> tuple[float, str]:
    """The rate, and a line that says what it is and what it could be."""
    base, batch, accumulated = (
        parse(kind, OmegaConf.select(config, name, default=default), name)
        for name, kind, default in (
            ("model.base_learning_rate", AboveZero, None),
            ("data.params.batch_size", Count, 1),
            ("lightning.trainer.accumulate_grad_batches", Count | None, None),
        )
    )
    devices, accumulated = devices_of(config.lightning.trainer), accumulated or 1
    scaled = accumulated * devices * batch * base
    by = f"{accumulated} accumulated x {devices} devices x batch size {batch}"
    if not scale_lr:
        could = f"published scaling ({by}) would make it {scaled:.3g}: --scale_lr"
        return base, f"learning rate {base:.3g}, as given; {could}"
    high = f"; above {HIGH_RATE:g}, trainings of published models diverged" if scaled > HIGH_RATE else ""
    return scaled, f"learning rate {scaled:.3g} = {base:.3g} x {by} (--scale_lr){high}"


def devices_of(trainer: DictConfig) -> int:
    """How many devices a step is shared by; all that there are, if the configuration does not say."""
    devices = trainer.get("devices", "auto")
    if OmegaConf.is_list(devices):
        return len(devices)
    if str(devices) in EVERY:
        return 1 if trainer.get("accelerator") == "cpu" else max(torch.cuda.device_count(), 1)
    return int(devices) if str(devices).isdecimal() else 1
