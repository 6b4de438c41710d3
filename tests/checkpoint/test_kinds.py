"""A file of weights that is given under the flag of another kind is named, with the flag that takes it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

import ldm
from ldm.checkpoint import read_checkpoint, save_weights
from ldm.checkpoint.delta import save_delta
from ldm.checkpoint.embeddings import save_embeddings
from ldm.checkpoint.kinds import DELTA, LORA, MODEL, NETWORK, STATE, WORDS, kinds_in
from ldm.modules.diffusionmodules.controlnet import ControlNet
from tests.helpers.scripts import Script
from tests.helpers.tiny_models import write_model
from tests.helpers.tiny_unet import TEXT_UNET

ATTENTION = "middle_block.1.transformer_blocks.0.attn2.to_k"
EXPORT = "; python scripts/export_model.py FOLDER --out FILE makes what is used of it"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A file of each kind, in every layout that is read."""
    folder = tmp_path_factory.mktemp("kinds")
    state = read_checkpoint(write_model(folder)[1])
    torch.save({"state_dict": state}, folder / "model.ckpt")
    encoder = {key: value for key, value in TEXT_UNET.items() if key != "out_channels"} | {"legacy": False}
    network = ControlNet(**encoder | {"hint_channels": 3, "hint_widths": (8, 16)}).state_dict()
    save_weights(folder / "control.safetensors", network)
    save_weights(folder / "merged.safetensors", state | {f"control_model.{key}": v for key, v in network.items()})
    (folder / "library").mkdir()
    save_weights(
        folder / "library/diffusion_pytorch_model.safetensors",
        {"controlnet_cond_embedding.conv_in.weight": torch.ones(1, 3, 3, 3)},
    )
    for name, layer, ends in (
        ("lora", f"lora_unet_{ATTENTION.replace('.', '_')}", (".lora_down.weight", ".lora_up.weight")),
        ("peft", f"unet.{ATTENTION}", (".lora_A.weight", ".lora_B.weight")),
    ):
        save_weights(folder / f"{name}.safetensors", {layer + end: torch.ones(1, 1) for end in ends})
    for name in ("delta.bin", "delta.ckpt"):
        save_delta(folder / name, {f"{ATTENTION}.weight": torch.ones(1, 1)}, {"<x>": torch.ones(1, 16)})
    save_delta(folder / "wordless.ckpt", {f"{ATTENTION}.weight": torch.ones(1, 1)}, {})
    save_embeddings(folder / "word.safetensors", {"<x>": torch.ones(1, 16)})
    torch.save({"string_to_token": {"*": 265}, "string_to_param": {"*": torch.ones(1, 16)}}, folder / "word.pt")
    trained = {f"model.{key}": value for key, value in state.items()} | {"first_token": torch.tensor(0)}
    torch.save({"epoch": 2, "state_dict": trained}, folder / "taught.ckpt")
    controlling = {f"control.{key}": value for key, value in network.items()}
    torch.save({"epoch": 2, "state_dict": controlling}, folder / "controlling.ckpt")
    save_weights(folder / "other.safetensors", {"features.0.weight": torch.ones(1)})
    (folder / "page.safetensors").write_text("<html>")
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(folder / "image.png")
    return folder


@pytest.mark.parametrize(
    "name, kinds",
    [
        ("model.safetensors", {MODEL}),
        ("model.ckpt", {MODEL}),
        ("control.safetensors", {NETWORK}),
        ("library", {NETWORK}),
        ("merged.safetensors", {MODEL, NETWORK}),
        ("lora.safetensors", {LORA}),
        ("peft.safetensors", {LORA}),
        ("delta.bin", {DELTA}),
        ("delta.ckpt", {DELTA}),
        ("wordless.ckpt", {DELTA}),
        ("word.safetensors", {WORDS}),
        ("word.pt", {WORDS}),
        ("taught.ckpt", {STATE}),
        ("controlling.ckpt", {STATE}),
        ("other.safetensors", set()),
        ("page.safetensors", set()),
        ("nowhere.safetensors", set()),
    ],
)
def test_a_file_is_told_by_its_names(folder, name, kinds):
    assert kinds_in(folder / name) == kinds


FILES = {
    "model.safetensors": "a model, which --ckpt takes",
    "control.safetensors": "a control network, which --control-model takes",
    "lora.safetensors": "a LoRA, which --lora takes",
    "delta.bin": "a delta of Custom Diffusion, which --delta takes",
    "delta.ckpt": "a delta of Custom Diffusion, which --delta takes",
    "word.safetensors": "an embedding, which --embedding takes",
    "taught.ckpt": f"the state of a training{EXPORT}",
}


@pytest.mark.parametrize("flag", ["--ckpt", "--control-model", "--lora", "--delta", "--embedding"])
def test_each_flag_refuses_the_files_of_the_others(folder, tmp_path, capsys, flag):
    usual = {"--config": "config.yaml", "--ckpt": "model.safetensors", "--control-model": "control.safetensors"}
    for name, what in FILES.items():
        if f"which {flag} takes" not in what:
            given = {option: str(folder / file) for option, file in (usual | {flag: name}).items()}
            script = Script("controlnet", tmp_path, "--prompt=an owl", "--steps=2", "--control=edges")
            script.common += [f"--image={folder}/image.png", *(f"{option}={file}" for option, file in given.items())]
            assert script.refusal(capsys) == f"{flag}: {folder / name}: this is {what}"


def test_weights_without_a_config_are_told_too(folder, tmp_path, capsys):
    """Before a config is looked for that fits them."""
    script = Script("txt2img", tmp_path, "--prompt=an owl", f"--ckpt={tmp_path}/lora.safetensors")
    (tmp_path / "lora.safetensors").write_bytes((folder / "lora.safetensors").read_bytes())
    assert script.refusal(capsys) == f"--ckpt: {tmp_path}/lora.safetensors: this is a LoRA, which --lora takes"


def test_python_names_its_argument(folder):
    with pytest.raises(ValueError, match="^delta: .*lora.safetensors: this is a LoRA, which lora takes$"):
        files = {"config": folder / "config.yaml", "ckpt": folder / "model.safetensors"}
        ldm.load(**files, delta=folder / "lora.safetensors").images("an owl", steps=2)
