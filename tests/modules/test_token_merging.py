"""Token merging (ToMe) in the transformers of the UNet's finest level."""

from __future__ import annotations

import pytest
import torch

from ldm.models.diffusion.ddim import DDIM
from ldm.models.diffusion.ddpm import DiffusionWrapper
from ldm.models.diffusion.denoiser import Conditional, Conditioning
from ldm.models.diffusion.propagation.plan import Plan
from ldm.models.diffusion.schedule import ddim_nodes, ddim_timesteps
from ldm.modules.attention import SpatialTransformer
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.modules.token_merging import Merging
from ldm.profiling.cost import unet_macs
from tests.helpers.goldens import recipe_weights
from tests.helpers.published import SD_V1
from tests.helpers.tiny_unet import TEXT_UNET, unet_config
from tests.helpers.toy import ABAR, final

UNET = TEXT_UNET | {"attention_resolutions": [1, 2]}
CLOSE = dict(rtol=1e-5, atol=1e-5)


def small_unet(**params) -> UNetModel:
    return recipe_weights(UNetModel(**UNET | params), seed=1, gain=0.6).requires_grad_(False)


def test_the_most_similar_tokens_are_merged_into_what_they_resemble():
    """By hand: a map of 2 x 4, whose tokens 0 and 2 stay; the angles of the others to them are 40, 30, 20, 10, ..."""
    angles = torch.tensor([[0.0, 30.0, 90.0, 100.0], [-40.0, 45.5, 70.0, 150.0]]).flatten().deg2rad()
    length = torch.tensor([1.0, 2.0, 1.0, 5.0, 1.0, 1.0, 3.0, 1.0])  # no part of the cosine
    tokens = torch.stack([angles.cos() * length, angles.sin() * length], dim=-1)[None]
    merging = Merging.of(tokens, (2, 4), 0.4)  # 3 of 8: tokens 3 and 6 into 2, 1 into 0
    assert merging.count == 5
    same = merging.place[0][:, None] == merging.place[0]
    groups = {tuple(row.nonzero().flatten().tolist()) for row in same}
    assert groups == {(0, 1), (2, 3, 6), (4,), (5,), (7,)}
    merged = merging.merge(tokens)[0]
    torch.testing.assert_close(merged[merging.place[0, 2]], (tokens[0, 2] + tokens[0, 3] + tokens[0, 6]) / 3)
    assert torch.equal(merging.unmerge(merging.merge(tokens))[0, 7], tokens[0, 7]), "what is not merged is kept"


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (5, 1), (3, 3), (5, 7), (4, 6), (8, 8)])
@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.5, 0.75])
def test_every_size_and_share(size, ratio):
    height, width = size
    tokens = torch.randn(2, height * width, 6)
    merging = Merging.of(tokens, size, ratio)
    stay = -(-height // 2) * -(-width // 2)
    assert merging.count == max(height * width - int(ratio * height * width), stay)
    merged = merging.merge(tokens)
    assert merged.shape == (2, merging.count, 6) and merging.unmerge(merged).shape == tokens.shape
    for place in merging.place:
        assert place.unique().tolist() == [*range(merging.count)], "every merged token is made of some"
    if ratio == 0:
        assert torch.equal(merging.unmerge(merged), tokens)


def test_identical_tokens_merge_without_loss():
    """Where every cell is of one colour, three quarters of the tokens can go: softmax does not see equal counts."""
    torch.manual_seed(3)
    small = torch.randn(2, 32, 3, 4, dtype=torch.float64)
    x = small.repeat_interleave(2, 2).repeat_interleave(2, 3)  # (2, 32, 6, 8)
    transformer = recipe_weights(SpatialTransformer(32, 2, 16, depth=2, context_dim=16), seed=1, gain=0.6).double()
    context = torch.randn(2, 5, 16, dtype=torch.float64)
    with torch.no_grad():
        plain, merged = transformer(x, context), transformer(x, context, 0.75)
        cells = x.clone()
        cells[0, :, 0, 1] += 1
        changed = transformer(cells, context, 0.75) - transformer(cells, context)
    torch.testing.assert_close(merged, plain, rtol=0, atol=1e-12)
    assert (plain - x).abs().max() > 1e-2 and changed[0].abs().max() > 1e-4
    tokens = x.flatten(2).mT
    assert torch.equal(Merging.of(tokens, (6, 8), 0.75).unmerge(Merging.of(tokens, (6, 8), 0.75).merge(tokens)), tokens)


def inputs(batch: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(4)
    return (
        torch.randn(batch, 4, 8, 8, generator=g),
        torch.full((batch,), 500.0),
        torch.randn(batch, 5, 16, generator=g),
    )


def test_share_0_is_plain_to_the_last_bit_and_others_are_not():
    unet, (x, t, context) = small_unet(), inputs(2)
    plain, features = unet(x, t, context), unet.encode(x, t, context)
    assert torch.equal(unet.decode(unet.encode(x, t, context, tome=0.0), t, context, tome=0.0), plain)
    merged = unet.encode(x, t, context, tome=0.5)
    assert torch.equal(merged.skips[0], features.skips[0]) and not torch.equal(merged.skips[1], features.skips[1])
    assert not torch.equal(unet.decode(features, t, context, tome=0.5), plain)
    assert torch.equal(unet.encode_outer(x, t, context, blocks=2, tome=0.5)[1], merged.skips[1])
    finest = unet.advance(features, t, context, blocks=unet.finest, tome=0.5)
    assert torch.equal(finest.hidden, unet.advance(features, t, context, blocks=unet.finest).hidden)


def test_an_image_does_not_depend_on_its_batch():
    unet, (x, t, context) = small_unet(), inputs(3)
    together = unet.decode(unet.encode(x, t, context, tome=0.5), t, context, tome=0.5)
    for b in ([1], [2, 0]):
        alone = unet.decode(unet.encode(x[b], t[b], context[b], tome=0.5), t[b], context[b], tome=0.5)
        torch.testing.assert_close(alone, together[b], **CLOSE)


def test_merging_goes_with_every_kind_of_node_and_with_parallel_decoders():
    network = DiffusionWrapper(unet_config(**UNET), "crossattn")
    recipe_weights(network, seed=1, gain=0.6).requires_grad_(False)
    x, _, context = inputs(1)
    rule = DDIM(ddim_nodes(ABAR, ddim_timesteps(5)))
    plans = [Plan(5, (0, 2), parallel, (4,), 1, "linear") for parallel in (1, 3)] + [Plan(5, (0, 2), refresh=1)]
    model = Conditional(network, Conditioning(context), tome=0.5)
    serial, parallel, refreshed = (final(model, rule, plan, x) for plan in plans)
    torch.testing.assert_close(parallel, serial, rtol=1e-4, atol=1e-4)
    plain = final(Conditional(network, Conditioning(context)), rule, plans[0], x)
    assert (plain - serial).abs().max() > 1e-3 and torch.isfinite(refreshed).all()


def test_the_cost_is_that_of_fewer_tokens_and_of_finding_them():
    """Five transformers of 320 channels on 4096 tokens, of which half are merged."""
    plain, merged = (unet_macs(SD_V1, (64, 64), 1, 77, tome) for tome in (0.0, 0.5))
    projections, products = 4 * 2048 * 320**2, 2 * 320 * (4096**2 - 2048**2)
    saved = projections + products - 3072 * 1024 * 320
    assert plain.encode - merged.encode == 2 * saved and plain.decode - merged.decode == 3 * saved
    # The paper counts without the product of queries and keys; its rows for 50 guided steps, plain and accelerated:
    paper = projections + products // 2 - 3072 * 1024 * 320
    assert 37050 - 2 * 50 * 5 * paper / 1e9 == pytest.approx(35123, rel=1e-3)
    assert 27350 - 2 * (9 * 2 + 50 * 3) * paper / 1e9 == pytest.approx(26053, rel=1e-3)


@pytest.mark.parametrize(
    "params",
    [
        {"attention_resolutions": [2]},
        {"disable_self_attentions": [True, False]},
        {"use_spatial_transformer": False, "context_dim": None},
    ],
    ids=str,
)
def test_a_network_without_such_tokens_says_so(params):
    unet, (x, t, context) = small_unet(**params), inputs(1)
    with pytest.raises(ValueError, match="no tokens to merge; accepted: 0; got 0.5"):
        unet.encode(x, t, context if unet.context_dim else None, tome=0.5)
    with pytest.raises(ValueError, match="must be 0..0.75; got 0.8"):
        small_unet().encode(x, t, context, tome=0.8)
