"""What output blocks compute of a key timestep's features alone: with it the decoder predicts the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ldm.modules.diffusionmodules.openaimodel import ResBlock, UNetModel
from ldm.modules.diffusionmodules.util import Features
from ldm.modules.packed import PackedParts, convolution_shapes, pack_layers
from ldm.profiling.cost import count_macs
from tests.helpers.goldens import recipe_weights
from tests.helpers.tiny_unet import PLAIN_UNET

SMALL = PLAIN_UNET | {"attention_resolutions": [1, 2], "num_heads": 4}
SIZES = {1: (8,), 2: (8, 16), 3: (3, 8, 8)}
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
STEPS = (900.0, 612.5, 3.0)


def small_unet(**options: Any) -> UNetModel:
    return recipe_weights(UNetModel(**SMALL | options), seed=1).eval().requires_grad_(False)


def encoded(unet: UNetModel, batch: int = 2) -> tuple[Features, dict[str, Tensor | None]]:
    """Features of a key timestep, and what the decoder takes beside."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(batch, 4, *SIZES[unet.dims], generator=generator)
    context = None if unet.context_dim is None else torch.randn(batch, 5, unet.context_dim, generator=generator)
    rest = {"context": context, "y": None if unet.num_classes is None else torch.arange(batch)}
    return unet.encode(x, torch.full((batch,), 950.0), **rest), rest


def decoded(
    unet: UNetModel, features: Features, rest: dict[str, Tensor | None], nodes: int, tome: float = 0.0
) -> Tensor:
    """The predictions at the first of STEPS, (nodes*B, C, H, W), as one batch."""
    t = torch.tensor(STEPS[:nodes]).repeat_interleave(len(features))
    tiled = {name: p if p is None else p.repeat(nodes, *[1] * (p.ndim - 1)) for name, p in rest.items()}
    return unet.decode(features if features.shared else Features.cat([features] * nodes), t, **tiled, tome=tome)


@pytest.mark.parametrize("nodes", [1, 3])
@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(model_channels=64, channel_mult=[1, 1, 2]),
        dict(use_scale_shift_norm=True, resblock_updown=True),
        dict(dims=1),
        dict(dims=3),
        dict(num_classes=7),
        dict(n_embed=6),
        dict(use_spatial_transformer=True, context_dim=24),
        dict(use_checkpoint=True),
    ],
    ids=str,
)
def test_shared_features_decode_to_the_same(options, nodes):
    unet = small_unet(**options)
    features, rest = encoded(unet)
    shared, expected = unet.share(features), decoded(unet, features, rest, nodes)
    assert len(shared.shared) == len(features.skips) and len(shared) == len(features)
    assert expected.std() > 0.01
    torch.testing.assert_close(decoded(unet, shared, rest, nodes), expected, **CLOSE)


def test_channels_of_a_mixed_group_are_left_and_others_are_not():
    """32 groups of 3 channels: a skip of 32 behind 64 others begins in the middle of a group."""
    unet = small_unet()
    features, _ = encoded(unet)
    # Outermost first: 32 + 32 channels in groups of 2, twice 64 + 32 in groups of 3, and all of the first block.
    assert [part.rest.shape[1] for part in unet.share(features).shared] == [0, 2, 2, 0]
    assert {*unet.shared_from().values()} == {32, 66}


def test_merged_tokens_are_those_of_each_node():
    unet = small_unet(use_spatial_transformer=True, context_dim=24)
    features, rest = encoded(unet)
    expected = decoded(unet, features, rest, 3, tome=0.5)
    assert (expected - decoded(unet, features, rest, 3)).abs().max() > 1e-4
    torch.testing.assert_close(decoded(unet, unet.share(features), rest, 3, tome=0.5), expected, **CLOSE)


@pytest.mark.parametrize("out_channels", [96, 64])
@pytest.mark.parametrize("nodes", [1, 2])
@pytest.mark.parametrize("resample", [{}, {"up": True}, {"down": True}], ids=str)
def test_a_block_without_a_residual_convolution_shares_too(out_channels, nodes, resample):
    block = recipe_weights(ResBlock(96, 16, 0.0, out_channels, **resample), seed=2).eval()
    assert isinstance(block.skip_connection, nn.Identity) == (out_channels == 96)
    x, skip, emb = torch.randn(2 * nodes, 64, 6, 6), torch.randn(2, 32, 6, 6), torch.randn(2 * nodes, 16)
    with torch.no_grad():
        expected = block(torch.cat([x, skip.repeat(nodes, 1, 1, 1)], dim=1), emb)
        torch.testing.assert_close(block(x, emb, block.share(skip)), expected, **CLOSE)


def test_nothing_shared_is_computed_again():
    unet = small_unet()
    features, rest = encoded(unet)
    counts = [count_macs(lambda n=n: decoded(unet, features, rest, n)) for n in (1, 3)]
    shared = []
    once = count_macs(lambda: shared.append(unet.share(features)))
    assert 0 < once < counts[0] / 2
    for count, nodes in zip(counts, (1, 3), strict=True):
        assert count_macs(lambda n=nodes: decoded(unet, shared[0], rest, n)) == count - nodes * once


def test_of_some_images_and_of_a_decoder_that_has_begun():
    unet = small_unet()
    features, rest = encoded(unet)
    shared = unet.share(features)
    expected = decoded(unet, features, rest, 3)
    torch.testing.assert_close(decoded(unet, shared.images(slice(1, 2)), rest, 3), expected[1::2], **CLOSE)
    t = torch.full((2,), 400.0)
    inner = unet.advance(shared, t, blocks=2)
    assert not inner.shared and torch.equal(inner.hidden, unet.advance(features, t, blocks=2).hidden)
    whole = unet.decode(features, t)
    torch.testing.assert_close(unet.decode(unet.share(inner), t), whole, **CLOSE)
    last = unet.advance(features, t, blocks=0)
    assert unet.share(last) is last, "no block is left to share anything"


def test_a_batch_of_nodes_takes_the_same_features_once():
    unet = small_unet()
    one, other = (unet.share(encoded(unet, batch)[0]) for batch in (2, 2))
    assert Features.for_nodes([one] * 3) is one
    for parts in ([one, other], [one, one, other]):
        joined = Features.for_nodes(parts)
        assert len(joined) == 2 * len(parts) and not joined.shared


def test_what_can_not_be_taken_apart_is_not_shared():
    with torch.device("meta"):
        unet = UNetModel(**SMALL | {"channel_mult": [1, 40]})  # 1280 + 32 channels in groups of 41
        features = unet.encode(torch.zeros(2, 4, 8, 8), torch.zeros(2))
        assert unet.share(features) is features
        block = ResBlock(1312, 16, 0.0, 64)
        assert not block.shares(40) and block.shares(41) and block.shares(1312)

    class Scaled(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    unet = small_unet()
    features, rest = encoded(unet)
    block = unet.output_blocks[1][0]
    conv = block.in_layers[2]
    block.in_layers[2] = Scaled(conv.in_channels, conv.out_channels, 3, padding=1)
    assert unet.share(features) is features, "a layer of somebody else's computes what it computes"
    with pytest.raises(ValueError, match="1..4 skips for this network; got 6"):
        small_unet().share(encoded(small_unet(num_res_blocks=2))[0])


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="layers are packed by oneDNN")
def test_packed_layers_share_too():
    plain, packed = (small_unet(use_spatial_transformer=True, context_dim=24) for _ in range(2))
    shapes, cuts = convolution_shapes(packed, (8, 16), 5), packed.shared_from()
    pack_layers(packed, shapes, cuts)
    assert sum(isinstance(layer, PackedParts) for layer in packed.modules()) == len(cuts) == 6
    assert not [name for name, parameter in packed.named_parameters() if parameter.ndim > 1]
    features, rest = encoded(plain)
    expected = decoded(plain, features, rest, 3)
    shared = packed.share(features)
    assert shared.shared
    torch.testing.assert_close(decoded(packed, shared, rest, 3), expected, **CLOSE)
    torch.testing.assert_close(decoded(packed, features, rest, 3), expected, **CLOSE)
    assert count_macs(lambda: packed.share(features)) == count_macs(lambda: plain.share(features))
    without = small_unet(use_spatial_transformer=True, context_dim=24)
    pack_layers(without, shapes)
    assert without.share(features) is features, "packed as a whole, a convolution has no parts"


def test_in_lower_precision_normalisation_stays_in_float32():
    unet = small_unet()
    features, rest = encoded(unet)
    expected = decoded(unet, features, rest, 3)
    with torch.autocast("cpu", torch.bfloat16):
        unshared, shared = (decoded(unet, f, rest, 3).float() for f in (features, unet.share(features)))
    rounding = (unshared - expected).abs().max()
    assert 0 < (shared - expected).abs().max() < 2 * rounding
