"""main.py trains a control network on a model that stays as it is; what is exported makes images."""

from __future__ import annotations

import pytest
import torch
from omegaconf import OmegaConf

from ldm.checkpoint import load_model, read_checkpoint
from ldm.checkpoint.control import load_control
from ldm.training.control import ControlTraining
from ldm.training.export import export
from ldm.training.state import read_state
from ldm.util import instantiate_from_config
from main import main
from tests.helpers.paths import ROOT
from tests.helpers.tiny_data import write_data
from tests.helpers.tiny_models import write_model

TRAINER = {"accelerator": "cpu", "max_steps": 2, "val_check_interval": 2, "log_every_n_steps": 1}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A base model, and the state after two steps through main.py."""
    folder = tmp_path_factory.mktemp("control")
    config, ckpt = write_model(folder)
    write_data(folder)
    model = OmegaConf.to_container(OmegaConf.load(config).model)
    model["params"]["ckpt_path"] = str(ckpt)
    training = {"learning_rate": 1e-2, "hint_widths": [8, 16], "sample_steps": 2, "ema_decay": 0.0}
    settings = {
        "model": model,
        "training": {"target": "ldm.training.control.ControlTraining", "params": training},
        "data": {"target": "ldm.training.control.EmojiEdgesData", "params": {"root": str(folder), "batch_size": 4}},
        "lightning": {
            "checkpoint_every_minutes": 0.0,
            "trainer": TRAINER | {"check_val_every_n_epoch": None, "enable_progress_bar": False},
        },
    }
    OmegaConf.save(OmegaConf.create(settings), folder / "train.yaml")
    assert main(["--base", str(folder / "train.yaml"), "-t", "-n", "edges", "--logdir", str(folder / "logs")]) == 0
    (state,) = (folder / "logs").rglob("last.ckpt")
    return folder, settings, state


def test_only_the_control_network_learns(run):
    folder, settings, state = run
    weights, base = read_state(state)["state_dict"], read_checkpoint(folder / "model.safetensors")
    assert all(torch.equal(weights[f"model.{key}"], value) for key, value in base.items() if f"model.{key}" in weights)
    assert any(f"model.{key}" in weights for key in base)
    zero = [value for key, value in weights.items() if key.startswith("control.zero_convs.")]
    assert zero and all(value.abs().max() > 0 for value in zero)


def test_it_begins_as_a_copy_that_adds_nothing(run):
    folder, settings, _ = run
    model = instantiate_from_config(OmegaConf.create(settings["model"]))
    training = ControlTraining(model, 1e-3, hint_widths=[8, 16])
    unet = model.model.diffusion_model.state_dict()
    own = training.control.state_dict()
    same = [key for key in own if key in unet]
    assert len(same) > 50 and all(torch.equal(own[key], unet[key]) for key in same)
    z, t = torch.randn(2, 4, 8, 8), torch.tensor([10, 900])
    batch = {"caption": ["an owl", ""], "hint": torch.rand(2, 3, 16, 16)}
    cond = training.conditioning(batch)
    under = model.apply_model(z, t, cond, training.predicting(batch))
    assert torch.equal(under, model.apply_model(z, t, cond))
    assert not training.train().model.training and training.control.training
    model.ckpt_path = None
    with pytest.raises(ValueError, match="ckpt_path must be given"):
        ControlTraining(model, 1e-3)


def test_what_is_exported_is_a_control_network_of_the_model(run, tmp_path):
    folder, settings, state = run
    export(state, tmp_path / "edges.safetensors")
    loaded = load_control(tmp_path / "edges.safetensors", settings["model"]["params"]["unet_config"]["params"])
    weights = read_state(state)["state_dict"]
    for key, value in loaded.state_dict().items():  # an average of decay 0 is the last weight
        torch.testing.assert_close(value, weights[f"control.{key}"])
    assert load_model(folder / "config.yaml", folder / "model.safetensors").model.config


def test_the_shipped_configuration_is_for_the_model_that_ships():
    config, shipped = (
        OmegaConf.to_container(OmegaConf.load(ROOT / path).model.params.unet_config)
        for path in ("configs/latent-diffusion/emoji64-edges.yaml", "models/ldm/emoji64/config.yaml")
    )
    assert config == shipped
