"""The depth network against an independent implementation, and the model that it conditions."""

from __future__ import annotations

import pytest
import torch

from ldm.modules.midas.api import MiDaSInference, near_side
from tests.helpers.goldens import recipe_weights
from tests.helpers.tiny_models import TINY_DEPTH

NAMES = {  # parts of a key, ours -> transformers', in this order
    "pretrained.model.patch_embed.backbone.stem.conv": "dpt.embeddings.backbone.bit.embedder.convolution",
    "pretrained.model.patch_embed.backbone.stem": "dpt.embeddings.backbone.bit.embedder",
    "pretrained.model.patch_embed.backbone": "dpt.embeddings.backbone.bit.encoder",
    "pretrained.model.patch_embed.proj": "dpt.embeddings.projection",
    "pretrained.model.cls_token": "dpt.embeddings.cls_token",
    "pretrained.model.pos_embed": "dpt.embeddings.position_embeddings",
    "pretrained.model.blocks": "dpt.encoder.layer",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
    "pretrained.act_postprocess3.0.project": "neck.reassemble_stage.readout_projects.2",
    "pretrained.act_postprocess4.0.project": "neck.reassemble_stage.readout_projects.3",
    "pretrained.act_postprocess3.3": "neck.reassemble_stage.layers.2.projection",
    "pretrained.act_postprocess4.3": "neck.reassemble_stage.layers.3.projection",
    "pretrained.act_postprocess4.4": "neck.reassemble_stage.layers.3.resize",
    "scratch.output_conv": "head.head",
    "out_conv": "projection",
    "resConfUnit": "residual_layer",
    **{f"scratch.layer{i}_rn": f"neck.convs.{i - 1}" for i in range(1, 5)},
    **{f"scratch.refinenet{i}": f"neck.fusion_stage.layers.{4 - i}" for i in range(1, 5)},
}


def their_weights(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our weights under transformers' names, without the classifier's."""
    named = {}
    for key, value in state.items():
        if key.startswith(("pretrained.model.norm", "pretrained.model.head")):
            continue
        name = key
        for ours, theirs in NAMES.items():
            name = name.replace(ours, theirs)
        if "backbone" in name:
            name = name.replace(".blocks.", ".layers.")
        elif "encoder.layer" in name:
            name = name.replace("norm1", "layernorm_before").replace("norm2", "layernorm_after")
        else:
            name = name.replace("conv1", "convolution1").replace("conv2", "convolution2")
        if "attn.qkv" in name:
            for part, rows in zip(("query", "key", "value"), value.chunk(3), strict=True):
                named[name.replace("attn.qkv", f"attention.attention.{part}")] = rows
        else:
            named[name] = value
    return named


@torch.no_grad()
def test_depth_is_that_of_transformers():
    from transformers import BitConfig, DPTConfig, DPTForDepthEstimation

    ours = recipe_weights(MiDaSInference(settings=TINY_DEPTH), seed=2).model.double()
    backbone = BitConfig(
        hidden_sizes=[256, 512, 1024],
        depths=list(TINY_DEPTH["stages"]),
        embedding_size=64,
        layer_type="bottleneck",
        global_padding="same",
        embedding_dynamic_padding=True,
        out_features=["stage1", "stage2", "stage3"],
    )
    theirs = (
        DPTForDepthEstimation(
            DPTConfig(
                is_hybrid=True,
                backbone_config=backbone,
                hidden_size=64,
                num_hidden_layers=4,
                num_attention_heads=4,
                intermediate_size=256,
                backbone_out_indices=[0, 1, 1, 3],
                image_size=64,
                backbone_featmap_shape=[1, 1024, 4, 4],
                neck_hidden_sizes=[256, 512, 64, 64],
                fusion_hidden_size=32,
                readout_type="project",
                reassemble_factors=[1, 1, 1, 0.5],
                neck_ignore_stages=[0, 1],
                layer_norm_eps=1e-6,
            )
        )
        .eval()
        .double()
    )
    missing, unexpected = theirs.load_state_dict(their_weights(ours.state_dict()), strict=False)
    assert set(missing) <= {"dpt.layernorm.weight", "dpt.layernorm.bias"} and not unexpected
    image = torch.rand(2, 3, 64, 64, dtype=torch.float64) * 2 - 1
    depth = ours(image)
    assert depth.shape == (2, 1, 64, 64) and (depth > 0).any()
    torch.testing.assert_close(depth[:, 0], theirs(image).predicted_depth, rtol=1e-8, atol=1e-8)


def test_positions_fit_their_own_grid_and_stretch_to_others():
    network = MiDaSInference(settings=TINY_DEPTH).model.pretrained.model
    torch.testing.assert_close(network.positions(4, 4), network.pos_embed)
    with torch.no_grad():  # a value for each column
        network.pos_embed[0, 1:] = torch.arange(4.0).repeat(4)[:, None]
    stretched = network.positions(2, 8)[0, 1:, 0].view(2, 8)
    assert torch.equal(stretched[0], stretched[1])
    assert stretched[0, 0] == 0 and stretched[0, -1] == 3 and stretched[0].diff().ge(0).all()


@pytest.mark.parametrize(
    "size, at",
    [
        ((384, 384), (384, 384)),
        ((512, 512), (384, 384)),
        ((512, 768), (384, 576)),
        ((768, 512), (576, 384)),
        ((16, 16), (384, 384)),
        ((300, 600), (384, 768)),
        ((200, 300), (256, 384)),
    ],
)
def test_size_of_the_estimate(size, at):
    """The side that is nearer to 384 becomes 384: 300 x 600 by 1.28 or 0.64, 200 x 300 by 1.92 or 1.28."""
    assert near_side(*size) == at


def test_published_settings_that_no_shape_shows():
    with torch.device("meta"):
        network = MiDaSInference().model
    assert network.pretrained.taps == (8, 11)
    assert network.pretrained.model.blocks[0].attn.heads == 12


def test_bad_input_says_why():
    with pytest.raises(ValueError, match="model_type must be 'dpt_hybrid'"):
        MiDaSInference("dpt_large")
    with pytest.raises(ValueError, match="multiple of 32"):
        MiDaSInference(settings=TINY_DEPTH).model(torch.zeros(1, 3, 48, 64))
