"""Measures while a model is trained: they are those of the evaluation's commands, of the same images."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from evaluation.metrics import frechet
from evaluation.metrics.training import CaptionMeasures
from ldm.checkpoint import save_weights
from ldm.data.emoji import EmojiDataset
from ldm.io.images import to_pil
from ldm.models.autoencoder import AutoencoderKL
from ldm.modules.encoders.tokenizer import train_tokenizer
from ldm.training.diffusion import start_noise
from ldm.training.published import completed
from ldm.training.run import fit
from ldm.training.state import read_state
from main import main
from tests.helpers.paths import ROOT
from tests.helpers.tiny_data import write_data
from tests.training.test_training import DDCONFIG, diffusion_config, first_stage_config

MEASURES = "evaluation.metrics.training"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("measures")
    (folder / "data").mkdir()
    write_data(folder / "data")
    train_tokenizer(["a thing 0, noto style"], 60, 8).save(str(folder / "tokenizer.json"))
    OmegaConf.save(OmegaConf.create(first_stage_config(folder / "data")), folder / "first.yaml")
    save_weights(folder / "first.safetensors", AutoencoderKL(DDCONFIG, embed_dim=4).state_dict())
    return folder


def codebook_config(folder: Path) -> Any:
    """The config of a VQ first stage that is measured on the images that it is trained on."""
    config = OmegaConf.create(first_stage_config(folder / "data"))
    loss = {"target": "ldm.modules.losses.vqperceptual.VQLPIPSWithDiscriminator"}
    loss["params"] = {"disc_start": 1, "disc_ndf": 8, "disc_num_layers": 2, "perceptual": "none"}
    plain = {key: value for key, value in DDCONFIG.items() if key not in ("patch_size", "linear_shortcut")}
    ddconfig = plain | {"double_z": False, "z_channels": 3, "ch_mult": [1, 1]}
    params = {"embed_dim": 3, "n_embed": 16, "ddconfig": ddconfig, "lossconfig": loss, "monitor": "val/rfid"}
    config.model = {"target": "ldm.models.autoencoder.VQModel", "params": params}
    config.training.target = "ldm.training.adversarial.AdversarialTraining"
    config.data.params.val_split = "train"
    config.lightning.trainer.update(max_steps=1, val_check_interval=1)
    config.lightning.callbacks = {"measures": {"target": f"{MEASURES}.FirstStageMeasures", "params": {}}}
    return config


def measured(logdir: Path) -> dict[str, float]:
    with (logdir / "metrics" / "00000000" / "metrics.csv").open() as stream:
        return {key: float(value) for row in csv.DictReader(stream) for key, value in row.items() if value}


def saved(path: Path, images: torch.Tensor) -> Path:
    np.save(path, np.stack([np.asarray(image) for image in to_pil(images)]))
    return path


def test_of_a_first_stage(folder, tmp_path, capsys):
    module = fit(codebook_config(folder), tmp_path / "run")
    said, found = capsys.readouterr().out, measured(tmp_path / "run")
    assert "val/rfid: efficientnet-lite0, pooled" in said and "best.ckpt by the least val/rfid" in said
    best = read_state(tmp_path / "run" / "best.ckpt")["callbacks"]["KeptState"]["best"]
    assert best["value"] == pytest.approx(found["val/rfid"], rel=1e-4)
    data = EmojiDataset(folder / "data")
    images = data.batch(np.arange(len(data)))
    with torch.no_grad():
        made, latent = module.model.eval()(images)
    used = len(latent.indices.unique())
    assert found["val/codebook_used"] == pytest.approx(used / 16) and 1 <= found["val/codebook_perplexity"] <= used
    paths = saved(tmp_path / "made.npy", made.clamp(-1, 1)), saved(tmp_path / "real.npy", images)
    expected = frechet.compute(*paths, extractor="efficientnet-lite0").values["fid_real"]
    assert found["val/rfid"] == pytest.approx(expected, rel=1e-3)
    assert ("val/lpips" in found) is ("val/lpips is not measured" not in said)


def test_only_measures_and_allowed_callbacks_are_named(folder, tmp_path, capsys):
    run = ["-b", str(folder / "first.yaml"), "-t", "-l", str(tmp_path)]
    for target, why in (
        ("pytorch_lightning.callbacks.Timer", "outside the allowed packages (ldm, torch.nn, torch.optim, evaluation)"),
        ("evaluation.metrics.retrieval.RealImages", "is not a callback of Lightning"),
        (f"{MEASURES}.SampleMeasures", "missing a required argument: 'every'"),
    ):
        assert main([*run, f"lightning.callbacks.mine.target={target}"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "lightning.callbacks.mine: " in line and why in line
    wrong = [f"lightning.callbacks.mine.{key}" for key in (f"target={MEASURES}.SampleMeasures", "params.every=1")]
    assert main([*run, *wrong]) == 2
    assert "is for trainings of diffusion models; got AutoencoderTraining" in capsys.readouterr().err


def test_published_callbacks_have_no_effect_and_measures_and_allowed_ones_have_one():
    published = {"image_logger": {"target": "main.ImageLogger", "params": {"batch_frequency": 5000}}}
    ours = {"fid": {"target": f"{MEASURES}.SampleMeasures", "params": {"every": 1000}}}
    base = OmegaConf.load(ROOT / "models" / "ldm" / "ffhq256" / "config.yaml")
    mine = {"mine": {"target": "my_package.parts.Mine"}}
    for callbacks, kept, allow in (
        (published | ours, ours, ()),
        (ours, ours, ()),
        (published, {}, ()),
        (mine, {}, ("my_pack",)),
        (mine | ours, mine | ours, ("my_package",)),
    ):
        merged = OmegaConf.merge(base, {"lightning": {"callbacks": callbacks}})
        config, lines = completed(merged, allow=allow)
        assert ("lightning.callbacks: without effect" in "".join(lines)) is (kept != callbacks)
        assert config.lightning.get("callbacks", {}) == kept


def test_of_samples_by_caption(folder, tmp_path, capsys):
    params = {"data": str(folder / "data"), "every": 2, "count": 4, "batch_size": 3, "tier": 1}
    config = OmegaConf.create(diffusion_config(folder / "data", folder))
    config.lightning.trainer.update(max_steps=3, val_check_interval=1)
    config.lightning.callbacks = {"measures": {"target": f"{MEASURES}.CaptionMeasures", "params": params}}
    module = fit(config, tmp_path / "run")
    with (tmp_path / "run" / "metrics" / "00000000" / "metrics.csv").open() as stream:
        rows = [row for row in csv.DictReader(stream) if row["val/loss"]]
    assert [bool(row["val/R@5"]) for row in rows] == [False, True, False]  # the first validation after two steps
    assert 0 <= float(rows[1]["val/R@1"]) <= float(rows[1]["val/R@5"]) <= 1
    assert "val/fid: 4 samples, every 2 steps" in capsys.readouterr().out
    # The same captions and noise as one batch, for the averaged weights of step 2.
    state = read_state(tmp_path / "run" / "previous.ckpt")
    module.load_state_dict(state["state_dict"])
    measure = CaptionMeasures(**params)
    images = module.eval().samples({"caption": measure.queries.captions}, start_noise(0, 4, 4, 8, 8))
    made, real = saved(tmp_path / "made.npy", images), folder / "data" / "pictures.npy"
    expected = frechet.compute(made, real, extractor="efficientnet-lite0").values["fid_real"]
    assert float(rows[1]["val/fid"]) == pytest.approx(expected, rel=1e-3)
