from __future__ import annotations

import pytest
import torch

from ldm.checkpoint import diffusion_params
from ldm.models.diffusion.propagation.plan import Plan
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.profiling.cost import Macs, count_macs, unet_macs
from tests.helpers.paths import ROOT
from tests.helpers.published import SD_V1
from tests.helpers.tiny_unet import PLAIN_UNET

# Counted on the published network, guidance batch of 2, 64 x 64 latents, 77 tokens.
# Keys and values of 2 x 77 tokens of width 768, in the encoder with the middle block and in the decoder.
ENCODER_ONCE, DECODER_ONCE = (
    2 * 2 * 77 * 768 * width for width in (2 * 320 + 2 * 640 + 3 * 1280, 3 * 320 + 3 * 640 + 3 * 1280)
)
ENCODER, MIDDLE, DECODER, OUT, TIME = 249335971840, 12099584000, 541739417600, 94371840, 4096000
KEYS_50 = (0, 1, 2, 3, 5, 10, 15, 25, 35)


def test_stable_diffusion_v1_to_the_last_mac():
    macs = unet_macs(SD_V1, (64, 64), batch=2, context_length=77)
    assert macs.encode == ENCODER + MIDDLE + TIME - ENCODER_ONCE
    assert macs.decode == DECODER + OUT + TIME - DECODER_ONCE
    assert macs.once == ENCODER_ONCE + DECODER_ONCE
    assert round(ENCODER / 1e9 + MIDDLE / 1e9, 2) == 261.44
    assert round((macs.plain(1) - TIME) / 1e9, 2) == 803.27
    assert unet_macs(SD_V1, (64, 64), batch=1, context_length=77).whole * 2 == macs.whole


# Of each output block of Stable Diffusion v1: positions; channels that are computed once for a key timestep, which for
# the first block are all, and else those of whole groups of the skip; channels of its output.
SD_V1_SHARED = [
    *[(8 * 8, 2560, 1280), *[(8 * 8, 1280, 1280)] * 2],
    *[(16 * 16, 1280, 1280)] * 2,
    (16 * 16, 600, 1280),  # 1280 + 640 channels in groups of 60
    *[(32 * 32, 600, 640), (32 * 32, 640, 640), (32 * 32, 300, 640)],  # 640 + 320 channels in groups of 30
    *[(64 * 64, 300, 320), *[(64 * 64, 320, 320)] * 2],
]


def test_what_of_the_decoder_is_computed_once_for_a_key_timestep():
    macs = unet_macs(SD_V1, (64, 64), batch=2, context_length=77)
    assert macs.shared == sum(2 * positions * 10 * ins * outs for positions, ins, outs in SD_V1_SHARED)
    assert macs.shared / macs.decode == pytest.approx(0.137, abs=5e-4)
    emoji = unet_macs(diffusion_params(ROOT / "models/ldm/emoji64/config.yaml")["unet_config"], (8, 8), 2, 16)
    assert emoji.shared / emoji.decode == pytest.approx(0.155, abs=5e-4)
    plan = Plan(50, KEYS_50)
    assert macs.run(plan) == macs.once + 9 * macs.encode + 50 * macs.decode, "every decoder counts in full"


def test_a_run_pays_the_encoder_at_key_nodes_only():
    macs = Macs(encode=30, decode=70)
    assert macs.run(Plan(50, KEYS_50)) == 9 * 30 + 50 * 70
    assert macs.run(Plan(50, tuple(range(50)))) == 50 * macs.whole
    assert macs.run(Plan(50, KEYS_50, parallel=20)) == macs.run(Plan(50, KEYS_50))


def test_keys_and_values_are_paid_once_for_the_most_predictions_of_a_node():
    macs, plan = Macs(encode=30, decode=70, once=5), Plan(4, (0, 2))
    assert macs.run(plan) == 5 + 2 * 30 + 4 * 70 and macs.critical_path(plan) == 5 + 2 * 100
    assert macs.run(plan, images=[2, 1, 2, 1]) == 2 * 5 + 2 * 2 * 100 + 2 * 70
    assert macs.plain(4) == 5 + 4 * 100


def test_both_products_of_attention_are_counted():
    q, k = torch.zeros(2, 3, 10, 8, device="meta"), torch.zeros(2, 3, 7, 8, device="meta")
    attention = torch.nn.functional.scaled_dot_product_attention
    assert count_macs(lambda: attention(q, k, k)) == 2 * (2 * 3 * 10 * 7 * 8)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_spatial_transformer": True, "context_dim": 16},
        {"num_classes": 5},
        {"num_classes": "continuous"},
        {"num_classes": "sequential", "adm_in_channels": 6},
    ],
    ids=str,
)
def test_a_living_network_is_counted_as_its_config_and_left_alone(options):
    params = PLAIN_UNET | options
    unet = UNetModel(**params)
    before = {key: value.clone() for key, value in unet.state_dict().items()}
    length = 5 if "context_dim" in options else None
    macs = unet_macs(unet, (8, 8), batch=3, context_length=length)
    config = {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": params}
    assert macs == unet_macs(config, (8, 8), batch=3, context_length=length)
    assert all(torch.equal(value, before[key]) for key, value in unet.state_dict().items())
    x, t = torch.zeros(3, 4, 8, 8), torch.zeros(3)
    labels = {5: torch.zeros(3, dtype=torch.long), "continuous": torch.zeros(3, 1), "sequential": torch.zeros(3, 6)}
    y = labels.get(options.get("num_classes"))
    context = torch.zeros(3, 5, 16) if length else None
    with torch.no_grad():
        assert macs.plain(1) == count_macs(lambda: unet(x, t, context=context, y=y))
    assert unet_macs(unet, (8, 8), 3, length).run(Plan(4, (0, 2))) == macs.once + 2 * macs.encode + 4 * macs.decode


def test_stable_diffusion_xl_as_the_paper_counts():
    """A guidance batch of 2 at 1024 x 1024 pixels."""
    config = diffusion_params(ROOT / "configs/stable-diffusion/sd_xl_base.yaml")["unet_config"]
    with torch.device("meta"), torch.no_grad():
        unet = UNetModel(**config["params"])
        x, t, context, y = torch.zeros(2, 4, 128, 128), torch.zeros(2), torch.zeros(2, 77, 2048), torch.zeros(2, 2816)
        macs = count_macs(lambda: unet(x, t, context, y), convention="paper")
    assert macs / 1e9 == pytest.approx(6374.0, rel=1e-5)
