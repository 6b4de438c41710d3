"""The UNet: golden numbers, the split into encoder and decoder, checkpointing, errors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ldm.modules.attention import CrossAttention
from ldm.modules.diffusionmodules.openaimodel import ResBlock, UNetModel
from ldm.modules.diffusionmodules.util import Features, GroupNorm32
from tests.helpers.goldens import assert_golden, from_recipe, load_case, recipe_weights
from tests.helpers.paths import GOLDENS
from tests.helpers.tiny_unet import TEXT_UNET

CASES = sorted(path.stem for path in GOLDENS.glob("unet_*.json"))
TIME_CASES = [name for name in CASES if name.startswith("unet_time_")]
SMALL = TEXT_UNET | {"attention_resolutions": [1, 2], "num_heads": 4, "context_dim": 24}


def small_unet(**changes) -> UNetModel:
    """A small network whose zero-initialised layers are not zero.

    Its second level has two channels in each normalisation group; with one, as in most goldens, the
    normalisation takes out what residual blocks add for the timestep.
    """
    return recipe_weights(UNetModel(**{**SMALL, **changes}), seed=1)


def inputs(batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(batch, 4, 8, 8), torch.rand(batch) * 999, torch.randn(batch, 5, 24)


def golden_unet(name: str):
    case, tensors = load_case(name)
    unet = from_recipe(UNetModel(**case["kwargs"]), case, tensors)
    return case, tensors, unet, (tensors["timesteps"], tensors.get("context"), tensors.get("y"))


@pytest.mark.parametrize("name", CASES)
def test_golden(name):
    case, tensors, unet, condition = golden_unet(name)
    assert [key for key, _ in unet.named_parameters()] == list(case["weights"])
    with torch.no_grad():
        features = unet.encode(tensors["x"], *condition)
        assert_golden(unet.decode(features, *condition), tensors["out"], case)
    assert_golden(features.hidden, tensors["mid"], case)
    assert len(features.skips) == sum(key.startswith("skip.") for key in tensors)
    for i, skip in enumerate(features.skips):
        assert_golden(skip, tensors[f"skip.{i}"], case)


@pytest.mark.parametrize("name", [name for name in CASES if name not in TIME_CASES])  # these don't record them
def test_golden_decoder_blocks(name):
    case, tensors, unet, condition = golden_unet(name)
    outputs = []
    for block in unet.output_blocks:
        block.register_forward_hook(lambda module, args, out: outputs.append(out))
    with torch.no_grad():
        unet(tensors["x"], *condition)
    for i, out in enumerate(outputs):
        expected = tensors[f"up.{i}"]
        assert_golden(out[: len(expected)], expected, case)


@pytest.mark.parametrize("name", TIME_CASES)
def test_time_and_label_reach_encoder_and_decoder_of_the_golden_networks(name):
    """So that the cases above see a wrong one; by as much as was recorded."""
    case, tensors, unet, (t, context, y) = golden_unet(name)
    with torch.no_grad():
        early, late = (unet(tensors["x"], torch.full_like(t, time), context, y) for time in (1, 981))
        change = case["max_abs_change_of_out_between_t_1_and_981"]
        assert (early - late).abs().max() == pytest.approx(change, abs=1e-3)
        features = unet.encode(tensors["x"], t, context, y)
        assert (unet.decode(features, t + 300, context, y) - tensors["out"]).abs().max() > 0.01
        if y is not None:
            assert (unet.decode(features, t, context, y.flip(0)) - tensors["out"]).abs().max() > 0.01


@pytest.mark.parametrize("name", CASES)
def test_forward_is_encode_then_decode(name):
    _, tensors, unet, condition = golden_unet(name)
    with torch.no_grad():
        split = unet.decode(unet.encode(tensors["x"], *condition), *condition)
        assert torch.equal(unet(tensors["x"], *condition), split)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(num_classes=7),
        dict(use_linear_in_transformer=True, transformer_depth=2),
        dict(use_scale_shift_norm=True, resblock_updown=True),
        dict(use_spatial_transformer=False, context_dim=None),
    ],
)
def test_tiled_features_decode_as_one_by_one(changes):
    unet, (x, key, context) = small_unet(**changes), inputs()
    context = None if unet.context_dim is None else context
    y = None if unet.num_classes is None else torch.tensor([1, 6])
    batch, steps = len(x), torch.tensor([900.0, 612.5, 3.0])
    with torch.no_grad():
        features = unet.encode(x, key, context, y)
        single = torch.cat([unet.decode(features, t.expand(batch), context, y) for t in steps])
        tiled = unet.decode(
            Features.cat([features] * 3),
            steps.repeat_interleave(batch),
            None if context is None else context.repeat(3, 1, 1),
            None if y is None else y.repeat(3),
        )
    assert (single[:batch] - single[batch : 2 * batch]).abs().max() > 1e-2
    torch.testing.assert_close(tiled, single, rtol=1e-5, atol=1e-5)


def test_decoder_uses_its_own_timestep_and_context():
    unet, (x, t, context) = small_unet(), inputs()
    with torch.no_grad():
        features = unet.encode(x, t, context)
        out = unet.decode(features, t, context)
        assert (unet.decode(features, t / 2, context) - out).abs().max() > 1e-3
        assert (unet.decode(features, t, -context) - out).abs().max() > 1e-3


@pytest.mark.parametrize("changes", [{}, {"disable_self_attentions": [True, True]}], ids=str)
def test_a_projected_context_predicts_as_its_tokens_do(changes):
    unet, (x, t, context) = small_unet(**changes), inputs(batch=2)
    projected = unet.project(context)
    expected = unet(x, t, context)
    assert torch.equal(unet(x, t, projected), expected)
    assert (unet(x, t, unet.project(context.flip(0))) - expected).abs().max() > 1e-4
    features = unet.encode(x, t, projected)
    three = unet.decode(Features.cat([features] * 3), t.repeat(3), projected.tile(3))
    torch.testing.assert_close(three, expected.repeat(3, 1, 1, 1), rtol=1e-5, atol=1e-5)
    last = slice(1, None)
    torch.testing.assert_close(unet(x[last], t[last], projected.images(last)), expected[last], rtol=1e-5, atol=1e-5)


def test_a_projected_context_of_another_batch_or_network_says_so():
    unet, (x, t, context) = small_unet(), inputs(batch=2)
    with pytest.raises(ValueError, match="context must be for 2 samples; got one projected for 6"):
        unet(x, t, unet.project(context).tile(3))
    with pytest.raises(ValueError, match="projected by another network"):
        unet(x, t, small_unet().project(context))
    with pytest.raises(ValueError, match="context must have shape"):
        unet.project(context[..., :-1])


def test_joined_features_are_step_major_and_keep_the_memory_format():
    hidden = torch.arange(2.0).view(2, 1, 1, 1)
    skip = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    features = Features(hidden, (skip,))
    tiled = Features.cat([features] * 3)
    assert tiled.hidden.flatten().tolist() == [0, 1, 0, 1, 0, 1]
    assert torch.equal(tiled.skips[0], torch.cat([skip] * 3))
    assert tiled.skips[0].is_contiguous(memory_format=torch.channels_last)
    assert Features.cat([features]) is features
    with pytest.raises(ValueError, match="at least one"):
        Features.cat([])


def test_some_images_of_joined_features_are_a_view():
    features = Features(torch.arange(4.0).view(4, 1, 1, 1), (torch.arange(8.0).view(4, 2, 1, 1),))
    some = features.images(slice(1, 3))
    assert some.hidden.flatten().tolist() == [1, 2] and some.skips[0].flatten().tolist() == [2, 3, 4, 5]
    assert some.hidden.data_ptr() == features.hidden[1:].data_ptr()


def test_an_advanced_decoder_ends_where_the_whole_one_does():
    """And the outermost blocks alone give the skips that the encoder gives."""
    unet, (x, t, context) = small_unet(), inputs()
    with torch.no_grad():
        features = unet.encode(x, t, context)
        out = unet.decode(features, t, context)
        for blocks in range(len(features.skips) + 1):
            part = unet.advance(features, t, context, blocks=blocks)
            assert len(part.skips) == blocks
            torch.testing.assert_close(unet.decode(part, t, context), out)
            if blocks:
                outer = unet.encode_outer(x, t, context, blocks=blocks)
                assert all(map(torch.equal, outer, features.skips[:blocks]))
                fresh = part.without_skips().with_outer(outer)
                torch.testing.assert_close(unet.decode(fresh, t, context), out)
        for blocks in (0, len(features.skips) + 1):
            with pytest.raises(ValueError, match=r"blocks must be 1\.\."):
                unet.encode_outer(x, t, context, blocks=blocks)
        with pytest.raises(ValueError, match="features must have 2"):
            unet.advance(unet.advance(features, t, context, blocks=1), t, context, blocks=2)


def gradients(unet: UNetModel) -> dict[str, Tensor]:
    x, t, context = (torch.linspace(-1, 1, value.numel()).view_as(value) for value in inputs())
    torch.manual_seed(3)  # of the dropout masks
    unet.train()(x, 500 + 400 * t, context).square().mean().backward()
    return {key: p.grad for key, p in unet.named_parameters()}


@pytest.mark.parametrize("spatial", [True, False])
def test_checkpointing_changes_no_gradient(spatial):
    changes = {} if spatial else dict(use_spatial_transformer=False, context_dim=None)

    def unet(use_checkpoint: bool) -> UNetModel:
        unet = small_unet(dropout=0.3, use_checkpoint=use_checkpoint, **changes)
        return unet if spatial else WithoutContext(unet)

    plain, recomputed = gradients(unet(False)), gradients(unet(True))
    assert plain.keys() == recomputed.keys()
    for key, gradient in plain.items():
        torch.testing.assert_close(recomputed[key], gradient, rtol=1e-5, atol=1e-7)
        assert gradient.abs().max() > 0, key


class WithoutContext(torch.nn.Module):
    def __init__(self, unet: UNetModel) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        return self.unet(x, t)


def bytes_saved_for_backward(unet: UNetModel, x: Tensor, t: Tensor, context: Tensor) -> int:
    """Bytes of the activations: parameters, which are there anyway, do not count."""
    parameters = {p.data_ptr() for p in unet.parameters()}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = unet(x, t, context)
    assert out.requires_grad
    return sum(saved.values())


def test_checkpointing_saves_memory_in_training_and_runs_once_in_sampling():
    args = inputs()
    unet = small_unet(use_checkpoint=True).train()
    assert bytes_saved_for_backward(unet, *args) < bytes_saved_for_backward(small_unet(), *args) / 3

    calls = []
    for module in unet.modules():
        if isinstance(module, CrossAttention):
            module.register_forward_hook(lambda *_: calls.append("attention"))
        elif isinstance(module, ResBlock):
            module.out_layers[0].register_forward_hook(lambda *_: calls.append("resblock"))
    with torch.no_grad():
        unet(*args)
    once = sorted(calls)
    calls.clear()
    unet(*args).sum().backward()
    assert sorted(calls) == sorted(once * 2)


def test_channels_last_gives_the_same_and_stays_channels_last():
    unet, (x, t, context) = small_unet(), inputs()
    with torch.no_grad():
        expected = unet(x, t, context)
        unet = unet.to(memory_format=torch.channels_last)
        x = x.to(memory_format=torch.channels_last)
        features = unet.encode(x, t, context)
        torch.testing.assert_close(unet.decode(features, t, context), expected, rtol=1e-4, atol=1e-5)
    assert all(f.is_contiguous(memory_format=torch.channels_last) for f in (features.hidden, *features.skips))


def test_computes_in_the_precision_of_its_weights():
    unet, (x, t, context) = small_unet(), inputs()
    with torch.no_grad():
        expected = unet(x, t, context)
        out = unet.to(torch.bfloat16)(x, t, context)
    assert out.dtype == torch.bfloat16
    assert (out.float() - expected).abs().max() < 0.1


def test_group_norm_upcasts_half_precision_only():
    norm = recipe_weights(GroupNorm32(2, 8), seed=1)
    x = 300 + torch.randn(2, 8, 64)
    exact = torch.nn.functional.group_norm(x.half().float(), 2, norm.weight, norm.bias, norm.eps)
    assert torch.equal(norm(x.half()), exact.half())
    assert norm(x).dtype == torch.float32


@pytest.mark.parametrize("dims, shape", [(1, (8,)), (3, (3, 8, 8))])
def test_other_dimensions(dims, shape):
    unet = small_unet(dims=dims, use_spatial_transformer=False, context_dim=None)
    with torch.no_grad():
        features = unet.encode(torch.randn(2, 4, *shape), torch.tensor([1, 2]))
        out = unet.decode(features, torch.tensor([1, 2]))
    assert out.shape == (2, 4, *shape)
    halved = (4,) if dims == 1 else (3, 4, 4)  # of 3-D data, only height and width
    assert features.hidden.shape == (2, 64, *halved)


def test_new_attention_order_is_a_permutation_of_the_weights():
    plain = dict(use_spatial_transformer=False, context_dim=None)
    legacy = small_unet(**plain)
    new = small_unet(**plain, use_new_attention_order=True)
    weights = legacy.state_dict()
    for key, value in weights.items():
        if ".qkv." in key:  # (heads, 3, d, ...) -> (3, heads, d, ...)
            weights[key] = value.unflatten(0, (4, 3, -1)).transpose(0, 1).flatten(0, 2)
    x, t, _ = inputs()
    with torch.no_grad():
        different = new(x, t)
        new.load_state_dict(weights)
        torch.testing.assert_close(new(x, t), legacy(x, t))
    assert (different - legacy(x, t)).abs().max() > 1e-3


@pytest.mark.parametrize(
    "changes, y, keys",
    [
        (dict(num_classes=7), torch.tensor([1, 6]), {"label_emb.weight"}),
        (dict(num_classes="continuous"), torch.tensor([[0.5], [2.0]]), {"label_emb.weight", "label_emb.bias"}),
        (
            dict(num_classes="sequential", adm_in_channels=6),
            torch.randn(2, 6),
            {f"label_emb.0.{i}.{name}" for i in (0, 2) for name in ("weight", "bias")},
        ),
    ],
)
def test_label_is_added_to_the_timestep_embedding(changes, y, keys):
    unet, (x, t, context) = small_unet(**changes), inputs()
    assert {key for key in unet.state_dict() if key.startswith("label_emb.")} == keys
    without = small_unet()
    with torch.no_grad():
        assert torch.equal(unet.embed(t, y, 2), without.embed(t, None, 2) + unet.label_emb(y))
        features = unet.encode(x, t, context, y)
        assert (features.hidden - unet.encode(x, t, context, y.flip(0)).hidden).abs().max() > 1e-3
        out = unet.decode(features, t, context, y)
        assert (out - unet.decode(features, t, context, y.flip(0))).abs().max() > 1e-3


@pytest.mark.parametrize(
    "changes, why",
    [
        (dict(num_heads=-1), "num_heads or num_head_channels"),
        (dict(num_heads=5), "num_heads must divide the 32 channels"),
        (dict(num_heads=-1, num_head_channels=24), "num_head_channels must divide the 32 channels"),
        (dict(context_dim=None), "context_dim"),
        (dict(use_spatial_transformer=False), "context_dim must be None"),
        (dict(dims=3), "dims must be"),
        (dict(dims=4, use_spatial_transformer=False, context_dim=None), "dims must be"),
        (dict(num_res_blocks=[1, 1, 1]), "num_res_blocks must have one entry for each of the 2 levels"),
        (dict(disable_self_attentions=[True]), "disable_self_attentions must have one entry"),
        (dict(num_attention_blocks=[2, 1]), "num_attention_blocks must not exceed"),
        (dict(num_classes="sequential"), "adm_in_channels"),
        (dict(num_classes="discrete"), "num_classes"),
        (dict(model_channels=40), "multiple of 32"),
    ],
)
def test_arguments_that_do_not_fit_say_why(changes, why):
    with pytest.raises(ValueError, match=why):
        UNetModel(**{**SMALL, **changes})


@pytest.mark.parametrize(
    "changes, why",
    [
        (dict(context=None), r"context must have shape \(2, L, 24\); got None"),
        (dict(context=torch.zeros(2, 5, 23)), r"got \(2, 5, 23\)"),
        (dict(context=torch.zeros(1, 5, 24)), r"got \(1, 5, 24\)"),
        (dict(y=torch.zeros(2)), "y must be None"),
        (dict(timesteps=torch.tensor(5)), r"timesteps must have shape \(2,\)"),
        (dict(timesteps=torch.tensor([5])), r"timesteps must have shape \(2,\)"),
        (dict(x=torch.zeros(2, 3, 8, 8)), r"x must have shape \(B, 4, ...\)"),
        (dict(x=torch.zeros(2, 4, 8, 9)), "multiples of 2"),
    ],
)
def test_bad_inputs_say_why(changes, why):
    x, t, context = inputs()
    with pytest.raises(ValueError, match=why):
        small_unet()(**{**dict(x=x, timesteps=t, context=context), **changes})


@pytest.mark.parametrize("y", [None, torch.zeros(1, dtype=torch.long), torch.zeros(2, 1, dtype=torch.long)])
def test_missing_or_misshaped_label(y):
    x, t, context = inputs()
    with pytest.raises(ValueError, match=r"y must have shape \(2,\) for num_classes=7"):
        small_unet(num_classes=7)(x, t, context, y=y)


def test_superfluous_context():
    x, t, context = inputs()
    with pytest.raises(ValueError, match="context must be None"):
        small_unet(use_spatial_transformer=False, context_dim=None)(x, t, context)


def test_features_of_another_network():
    x, t, context = inputs()
    features = small_unet(num_res_blocks=2).encode(x, t, context)
    with pytest.raises(ValueError, match="4 skips for this network; got 6"):
        small_unet().decode(features, t, context)
