"""Latents that are encoded once, and latents that are normalized channel by channel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from torch.utils.data import default_collate

from ldm.checkpoint import load_model, save_weights
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.training.latents import weights_sha256
from ldm.training.run import fit
from ldm.util import instantiate_from_config
from main import main
from tests.helpers.measures import disk_with_room_for
from tests.helpers.paths import ROOT
from tests.helpers.scripts import load_script
from tests.helpers.tiny_data import write_data
from tests.helpers.tiny_models import FIRST_STAGE, tiny_params
from tests.training.test_training import LIGHTNING

SIDE, COUNT = 16, 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Images in folders of classes, and the weights of a first stage whose channels differ."""
    folder = tmp_path_factory.mktemp("latents")
    random = np.random.default_rng(0)
    for i in range(COUNT):
        path = folder / "images" / f"class{i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).save(path)
    torch.manual_seed(0)
    first_stage = AutoencoderKL(**FIRST_STAGE["params"])
    first_stage.quant_conv.bias.data += torch.tensor([5.0, -3.0, 0.0, 1.0, 0, 0, 0, 0])
    save_weights(folder / "first.safetensors", first_stage.state_dict())
    return folder


def configuration(folder: Path, **data: Any) -> DictConfig:
    params = tiny_params(folder)
    params["first_stage_config"] = OmegaConf.merge(
        FIRST_STAGE, {"params": {"ckpt_path": str(folder / "first.safetensors")}}
    )
    params["cond_stage_config"] = {
        "target": "ldm.modules.encoders.modules.ClassEmbedder",
        "params": {"embed_dim": 16, "n_classes": 3, "key": "class_label"},
    }
    params |= {"cond_stage_key": "class_label", "cond_stage_trainable": True}
    train = {
        "target": "ldm.data.folder.ClassFolders",
        "params": {"root": str(folder / "images"), "size": SIDE, "flip": 0.5},
    }
    return OmegaConf.create(
        {
            "model": {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": params},
            "training": {
                "target": "ldm.training.diffusion.DiffusionTraining",
                "params": {"learning_rate": 1e-3, "unconditional": 2, "sample_steps": 2},
            },
            "data": {
                "target": "main.DataModuleFromConfig",
                "params": {"batch_size": 2, "num_workers": 0, "train": train, "validation": train, **data},
            },
            "lightning": LIGHTNING,
        }
    )


def unmeasured(config: DictConfig) -> DictConfig:
    """Without validation."""
    config.lightning.trainer.limit_val_batches = 0
    return config


def test_a_training_on_kept_latents_is_the_training_on_images(folder, tmp_path, capsys):
    kept = tmp_path / "kept"
    plain = fit(unmeasured(configuration(folder)), tmp_path / "plain")
    first = fit(unmeasured(configuration(folder, latents=str(kept))), tmp_path / "first")
    files = {path: path.stat().st_mtime_ns for path in kept.iterdir()}
    assert len(files) == 2  # of the images and of their mirror images; validation has the same
    again = fit(unmeasured(configuration(folder, latents=str(kept))), tmp_path / "again")
    assert {path: path.stat().st_mtime_ns for path in kept.iterdir()} == files
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(first.state_dict()[name], value, rtol=1e-4, atol=1e-6, msg=name)
        assert torch.equal(first.state_dict()[name], again.state_dict()[name])


def test_the_key_of_kept_latents_sees_every_weight():
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2).bfloat16())
    before = weights_sha256(module)
    module[1].bias.data[1] += 1
    assert weights_sha256(module) != before


@pytest.mark.parametrize("latents", [None, "kept"])
def test_normalized_latents_have_mean_0_and_deviation_1_in_every_channel(latents, folder, tmp_path):
    config = configuration(folder, latents=latents and str(tmp_path / latents))
    config.model.params.normalize_latents = True
    config.lightning.trainer.max_steps = 1
    module = fit(config, tmp_path / "run")
    examples = default_collate([module.trainer.datamodule.train[i] for i in range(COUNT)])
    z = module.latents(examples)
    assert z.mean((0, 2, 3)).abs().max() < 0.15 and (z.std((0, 2, 3)) - 1).abs().max() < 0.15  # others are drawn
    # What sampling loads encodes as the training did, and decodes as the first stage does.
    out = tmp_path / "model.safetensors"
    assert load_script("export_model").main([str(tmp_path / "run"), "--out", str(out)]) == 0
    model = load_model(tmp_path / "run" / "config.yaml", out)
    torch.testing.assert_close(model.latent_mean, module.model.latent_mean)
    assert model.latent_mean.flatten()[0] > 3
    images = torch.rand(2, 3, SIDE, SIDE) * 2 - 1
    posterior = model.encode_first_stage(images)
    noise = torch.zeros_like(posterior.mean)
    torch.testing.assert_close(
        model.decode_first_stage(model.get_first_stage_encoding(posterior, noise)),
        model.first_stage_model.decode(posterior.mean),
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize(
    "settings, why",
    [
        (
            ["data.params.train.params.random_crop=true"],
            "data.params.train: latents: those of random crops can't be kept",
        ),
        (
            ["data.params.train.target=ldm.data.inpainting.InpaintingFolder", "data.params.train.params.root=ROOT"],
            "latents: those of InpaintingFolder can't be kept; accepted: datasets of image files",
        ),
        (["model.params.normalize_latents=true", "model.params.scale_factor=0.5"], "takes the place of scale_by_std"),
    ],
)
def test_refused(settings, why, folder, tmp_path, capsys):
    OmegaConf.save(configuration(folder, latents=str(tmp_path / "kept")), tmp_path / "c.yaml")
    settings = [text.replace("ROOT", str(folder / "images")) for text in settings]
    size = ["data.params.train.params.size=16"]
    assert main(["-b", str(tmp_path / "c.yaml"), "-t", "-l", str(tmp_path), *settings, *size]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert why in line


def test_a_full_disk_leaves_no_latents(folder, tmp_path):
    config = configuration(folder, latents=str(tmp_path / "kept"))
    with disk_with_room_for(4096), pytest.raises(ValueError, match="data.params.train: .*File too large"):
        fit(config, tmp_path / "run")
    assert [*(tmp_path / "kept").iterdir()] == [] and not (tmp_path / "run").exists()


def test_classes_are_the_subgroups(folder, tmp_path):
    """The classes are those of configs/latent-diffusion/emoji128-class.yaml, on tiny data."""
    (tmp_path / "data").mkdir()
    write_data(tmp_path / "data")
    section = {
        "target": "ldm.training.data.EmojiClassesData",
        "params": {
            "root": str(tmp_path / "data"),
            "first_stage": {"config": str(tmp_path / "first.yaml"), "ckpt": str(folder / "first.safetensors")},
            "batch_size": 4,
            "max_tier": 1,
            "by": "subgroup",
            "flip": True,
            "latents": str(tmp_path / "kept"),
        },
    }
    OmegaConf.save({"model": FIRST_STAGE}, tmp_path / "first.yaml")
    kept, encoded = instantiate_from_config(section), instantiate_from_config(section)
    encoded.folder = None
    for data in (kept, encoded):
        data.setup("fit")
    assert [kept.train[i]["class"] for i in (0, 5, 10)] == [0, 1, 0]
    assert torch.equal(kept.train.latents, encoded.train.latents) and kept.train.latents.ndim == 5
    assert torch.equal(kept.val.latents, encoded.val.latents)


@pytest.mark.parametrize("name", ["emoji128", "emoji128-class"])
def test_the_model_that_ships_is_the_one_that_is_trained(name):
    trained = OmegaConf.load(ROOT / "configs" / "latent-diffusion" / f"{name}.yaml").model
    shipped = OmegaConf.load(ROOT / "models" / "ldm" / name / "config.yaml").model
    trained.params.unet_config.params.pop("dropout", None)
    del trained.params.first_stage_config.params.ckpt_path
    assert shipped == trained


def test_the_model_of_classes_is_small_enough_to_ship():
    config = OmegaConf.load(ROOT / "configs" / "latent-diffusion" / "emoji128-class.yaml")
    assert config.training.params.unconditional == config.model.params.cond_stage_config.params.n_classes - 1
    with torch.device("meta"):
        model = instantiate_from_config(config.model)
    assert isinstance(model, LatentDiffusion)
    weights = sum(p.numel() for part in (model.model, model.cond_stage_model) for p in part.parameters())
    assert 10e6 < weights < 12.5e6  # beside the first stage, in half precision: 25 MB at most
