"""Control networks in every published layout."""

from __future__ import annotations

import gzip
import json

import pytest
import torch
from safetensors.torch import save_file

from ldm.checkpoint import CheckpointError, load_model, save_weights
from ldm.checkpoint.control import load_control, read_control
from ldm.checkpoint.conversion import control_to_ldm
from ldm.modules.diffusionmodules.controlnet import ControlNet
from tests.helpers.goldens import assert_golden, from_recipe, load_case
from tests.helpers.paths import GOLDENS
from tests.helpers.tiny_models import write_model
from tests.helpers.tiny_unet import TEXT_UNET

PUBLISHED = json.loads(gzip.decompress((GOLDENS / "controlnet_state_dicts.json.gz").read_bytes()))


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_key_has_its_place_in_both_layouts(name):
    model = PUBLISHED[name]
    with torch.device("meta"):
        network = ControlNet(**model["params"])
    ours = {key: list(value.shape) for key, value in network.state_dict().items()}
    assert ours == model["keys"] and [*ours] == [*model["keys"]]
    theirs = {key: torch.full((1,), float(i)) for i, key in enumerate(model["diffusers"])}
    converted = control_to_ldm(theirs)
    assert {key: int(value) for key, value in converted.items()} == {
        model["map"][key]: i for i, key in enumerate(theirs)
    }


@pytest.fixture(scope="module")
def case():
    return load_case("controlnet")


@pytest.mark.parametrize("layout", ["merged", "alone", "folder"])
def test_the_same_numbers_from_every_layout(case, layout, tmp_path):
    facts, tensors = case
    network = from_recipe(ControlNet(**facts["kwargs"]), facts, tensors)
    state, path = network.state_dict(), tmp_path / "control.safetensors"
    if layout == "merged":
        save_file({f"control_model.{key}": value for key, value in state.items()} | {"model.x": torch.ones(1)}, path)
    elif layout == "alone":
        save_file(state, path)
    else:
        names = load_case("controlnet_layouts")[0]["diffusers_to_compvis_keys"]
        path = tmp_path
        save_file({name: state[ours] for name, ours in names.items()}, path / "diffusion_pytorch_model.safetensors")
    loaded = load_control(path, facts["unet_kwargs"])
    out = loaded(*(tensors[key].float() for key in ("x", "hint", "timesteps", "context")))
    for i, residual in enumerate(out):
        assert_golden(residual, tensors[f"control.{i}"], facts)


def test_what_is_no_control_network_for_this_model_is_refused(case, tmp_path):
    facts, _ = case
    unet, path = facts["unet_kwargs"], tmp_path / "control.safetensors"
    save_file(ControlNet(**facts["kwargs"]).state_dict(), path)
    for changes, why in (
        ({"context_dim": 32}, "another base model: 24 numbers of each token of the text, this model's UNet has 32"),
        ({"in_channels": 8}, "another base model: 4 channels of latents, this model's UNet has 8"),
        ({"channel_mult": [1, 2]}, "for another base model[?] .* of another shape"),
        ({"num_classes": 3}, "takes a label"),
    ):
        with pytest.raises(CheckpointError, match=why):
            load_control(path, unet | changes)
    with pytest.raises(CheckpointError, match="the model's network is no UNet"):
        load_control(path, {"input_size": 8, "patch_size": 2, "in_channels": 4})
    flat = {"input_blocks.0.0.weight": torch.ones(3), "input_hint_block.0.weight": torch.ones(3)}
    for state in ({"a": torch.ones(1)}, {"control_model.a": torch.ones(1)}, flat):
        save_file(state, path)
        with pytest.raises(CheckpointError, match="no control network"):
            read_control(path)
    save_file({"controlnet_cond_embedding.conv_in.weight": torch.ones(1), "up_blocks.0.x": torch.ones(1)}, path)
    with pytest.raises(CheckpointError, match="control network: keys .* do not have .up_blocks.0.x"):
        read_control(path)
    with pytest.raises(CheckpointError, match="a folder without diffusion_pytorch_model.safetensors"):
        read_control(tmp_path)


def test_a_merged_file_is_also_its_base_model(tmp_path):
    """And the model is as it would be from a file without the control network."""
    config, ckpt = write_model(tmp_path)
    model = load_model(config, ckpt)
    control = ControlNet(**{k: v for k, v in TEXT_UNET.items() if k != "out_channels"}, legacy=False, hint_channels=3)
    merged = model.state_dict() | {f"control_model.{key}": value for key, value in control.state_dict().items()}
    save_weights(tmp_path / "merged.safetensors", merged)
    again = load_model(config, tmp_path / "merged.safetensors").state_dict()
    assert again.keys() == model.state_dict().keys()
    assert all(torch.equal(again[key], value) for key, value in model.state_dict().items())
    unet = TEXT_UNET | {"legacy": False}
    assert load_control(tmp_path / "merged.safetensors", unet).residuals == control.residuals
