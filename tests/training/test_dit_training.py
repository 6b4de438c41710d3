"""configs/dit/emoji128.yaml: two steps of a narrow DiT on the first stage that ships, and samples of what was saved."""

from __future__ import annotations

import torch

from ldm.training.state import read_state
from main import main
from tests.helpers.paths import ROOT
from tests.helpers.tiny_data import write_data

NARROW = [
    *["model.params.image_size=8", "model.params.unet_config.params.input_size=8"],
    *["model.params.unet_config.params.hidden_size=36", "model.params.unet_config.params.num_classes=2"],
    *["model.params.unet_config.params.depth=2", "model.params.unet_config.params.encoder_blocks=1"],
    *["model.params.cond_stage_config.params.n_classes=3", "training.params.unconditional=2"],
    *["training.params.sample_steps=2", "data.params.batch_size=4", "data.params.classes=[even,odd]"],
    "data.params.latents=null",  # nothing is kept
    *["lightning.trainer.val_check_interval=2", "lightning.trainer.enable_progress_bar=false"],
]


def test_two_steps_and_samples(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    data = tmp_path / "data"
    data.mkdir()
    write_data(data, side=64)
    config = str(ROOT / "configs/dit/emoji128.yaml")
    run = ["-b", config, "-t", "-n", "run", "--steps", "2", "-l", str(tmp_path), f"data.params.root={data}", *NARROW]
    assert main(run) == 0, capsys.readouterr().err
    state = read_state(tmp_path / "run" / "last.ckpt")
    assert state["global_step"] == 2
    weights = state["state_dict"]
    assert all(value.isfinite().all() for value in weights.values() if torch.is_tensor(value))
    final = next(value for key, value in weights.items() if key.endswith("diffusion_model.final_layer.linear.weight"))
    noise, variance = final.unflatten(0, (4, 16)).split(8, dim=1)  # rows: places of a patch, channels
    assert noise.any() and variance.any(), "both are zero before training, and both are trained"
    assert list((tmp_path / "run").rglob("*.png")), "samples are drawn at the validation"


def test_a_class_without_an_image_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    data = tmp_path / "data"
    data.mkdir()
    write_data(data, side=64)
    config = str(ROOT / "configs/dit/emoji128.yaml")
    settings = [*NARROW, "data.params.classes=[even,round]", f"data.params.root={data}"]
    assert main(["-b", config, "-t", "-n", "run", "--steps", "2", "-l", str(tmp_path), *settings]) != 0
    assert "classes: " in (err := capsys.readouterr().err) and "has no image of round" in err
