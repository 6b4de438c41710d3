"""Every kind of plan goes with every task that changes what a model of images makes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.checkpoint import load_model, save_weights
from ldm.checkpoint.embeddings import save_embeddings
from ldm.modules.diffusionmodules.controlnet import ControlNet
from tests.helpers.goldens import recipe_weights
from tests.helpers.scripts import Script
from tests.helpers.tiny_models import write_model
from tests.helpers.tiny_unet import TEXT_UNET

# One of each: the decoder runs, a few of its blocks, nothing, all but cross-attention, and blocks of the encoder too;
# steps of two kinds, a forecast, and what is decided on the way, for all images alike.
PLANS = ("uniform:3", "deepcache:3", "skip:3", "tgate:3", "encoder:3:1", "uniform:3+skip:4", "online:time:2")
FORECAST = ("uniform:3", "--forecast=linear")
ATTENTION = "middle_block.1.transformer_blocks.0.attn2.to_v"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, a control network, an image, a LoRA and a word."""
    folder = tmp_path_factory.mktemp("tasks")
    config, ckpt = write_model(folder)
    encoder = {key: value for key, value in TEXT_UNET.items() if key != "out_channels"} | {"legacy": False}
    network = ControlNet(**encoder | {"hint_channels": 3, "hint_widths": (8, 16)})
    save_weights(folder / "control.safetensors", recipe_weights(network, seed=2, gain=1.0).state_dict())
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[4:12, 5:11] = 255
    Image.fromarray(pixels).save(folder / "image.png")
    outs, ins = load_model(config, ckpt).get_parameter(f"model.diffusion_model.{ATTENTION}.weight").shape
    name = f"lora_unet_{ATTENTION.replace('.', '_')}"
    lora = {f"{name}.lora_down.weight": torch.ones(1, ins), f"{name}.lora_up.weight": torch.ones(outs, 1)}
    save_weights(folder / "lora.safetensors", lora)
    save_embeddings(folder / "word.safetensors", {"<x>": torch.ones(1, 16)})
    return folder


TASKS = {
    "controlnet": ["--control=edges", "--image=FOLDER/image.png", "--control-model=FOLDER/control.safetensors"],
    "prompt2prompt": ["--edit=a red <x>", "--lora=FOLDER/lora.safetensors", "--embedding=FOLDER/word.safetensors"],
    "text2video": ["--frames=2", "--t0=2", "--t1=7", "--format=frames"],
    "txt2img": ["--lora=FOLDER/lora.safetensors", "--embedding=FOLDER/word.safetensors"],
}


@pytest.mark.parametrize("task", TASKS)
def test_every_kind_of_plan(folder, tmp_path, task):
    common = [f"--config={folder}/config.yaml", f"--ckpt={folder}/model.safetensors", "--prompt=a big <x>"]
    more = [argument.replace("FOLDER", str(folder)) for argument in TASKS[task]]
    several = [] if task == "text2video" else ["--n_samples=1", "--skip_grid", "--noise-weight=0"]
    script = Script(task, tmp_path, *common, *more, *several, "--steps=8", "--scale=8")
    *_, plain = script("--plan=off")
    for plan, *forecast in [*((plan,) for plan in PLANS), FORECAST]:
        *_, fast = script(f"--plan={plan}", *forecast)
        assert fast["unet_macs"] < plain["unet_macs"], plan
        assert (script.pixels(fast) != script.pixels(plain)).any(), plan
