"""A decoder in tiles gives the image of the whole; the memory that saves."""

from __future__ import annotations

import pytest
import torch
from omegaconf import OmegaConf

from ldm.checkpoint import load_model, load_weights
from ldm.modules.diffusionmodules import tiled
from ldm.modules.diffusionmodules.model import Decoder
from ldm.modules.diffusionmodules.tiled import decode_tiled
from ldm.profiling.cost import peak_bytes
from ldm.util import instantiate_from_config
from tests.helpers.goldens import recipe_weights
from tests.helpers.paths import ROOT

SMALL = dict(ch=32, out_ch=3, in_channels=3, resolution=64, z_channels=4, num_res_blocks=1, attn_resolutions=[])
KINDS = {
    "three levels": {"ch_mult": [1, 1, 2]},
    "attention at levels": {"ch_mult": [1, 2], "attn_resolutions": [32]},
    "attention at the last": {"ch_mult": [1, 2], "attn_resolutions": [64]},
    "patches, shortcut, tanh": {"ch_mult": [1, 1], "patch_size": 2, "linear_shortcut": True, "tanh_out": True},
    "without convolutions": {"ch_mult": [1, 1], "resamp_with_conv": False, "attn_type": "none"},
}
TOLERANCE = 1e-5  # measured: 6e-7 for the decoders that are here


def decoder(**changes) -> Decoder:
    return recipe_weights(Decoder(**SMALL | changes), seed=1)


def difference(network, z, tile: int) -> float:
    with torch.inference_mode():
        return (decode_tiled(network, z, tile) - network(z)).abs().max().item()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tile", [16, 27])
def test_the_image_is_that_of_the_whole(kind, tile):
    torch.manual_seed(0)
    assert difference(decoder(**KINDS[kind]), torch.randn(2, 4, 13, 10), tile) < TOLERANCE


@pytest.mark.parametrize("name", ["emoji64", "emoji128"])
def test_trained_decoders(name):
    torch.manual_seed(0)
    folder = ROOT / "models"
    if name == "emoji64":
        files = folder / "ldm/emoji64"
        first = load_model(files / "config.yaml", files / "model.safetensors").first_stage_model
    else:
        config = OmegaConf.load(ROOT / "configs/autoencoder/emoji128-kl-f8.yaml").model
        first = instantiate_from_config(config).eval()
        load_weights(first, folder / "first_stage_models/emoji128-kl-f8/model.safetensors")
    z = first.post_quant_conv(torch.randn(1, first.embed_dim, 12, 20))
    assert difference(first.decoder, z, 64) < TOLERANCE


@pytest.mark.parametrize("broken", ["margin", "statistics"])
def test_the_margin_and_the_statistics_are_needed(broken, monkeypatch):
    if broken == "margin":
        monkeypatch.setattr(tiled._Section, "margin", 1)
    else:
        monkeypatch.setattr(tiled, "normalized", lambda norm, x, statistics: norm(x))
    assert difference(decoder(ch_mult=[1, 1, 2]), torch.randn(1, 4, 13, 10), 16) > 1e-2


def test_tiles_take_less_memory():
    with torch.device("meta"):
        network, z = Decoder(**SMALL | {"ch_mult": [1, 1, 2]}), torch.zeros(1, 4, 64, 64)
        whole, tiles = peak_bytes(lambda: network(z)), peak_bytes(lambda: decode_tiled(network, z, 128))
    assert tiles < whole / 2


def test_bad_tiles():
    z = torch.zeros(1, 4, 8, 8)
    with pytest.raises(ValueError, match="tile must be at least 1 pixel; got 0"):
        decode_tiled(decoder(ch_mult=[1]), z, 0)
    with pytest.raises(ValueError, match="give_pre_end: features are not decoded in tiles"):
        decode_tiled(decoder(ch_mult=[1], give_pre_end=True), z, 8)
