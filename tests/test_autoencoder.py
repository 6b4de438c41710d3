"""First stages against the published implementation, and the laws of their parts."""

from __future__ import annotations

import pytest
import torch

from ldm.models.autoencoder import AutoencoderKL, IdentityFirstStage, VQModelInterface
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.vectorquantize import VectorQuantizer, perplexity
from ldm.training.export import fold
from tests.helpers.goldens import load_case, recipe_weights


def tiny_kl(**ddconfig) -> AutoencoderKL:
    config = dict(
        double_z=True,
        z_channels=4,
        resolution=32,
        in_channels=3,
        out_ch=3,
        ch=32,
        ch_mult=(1, 2),
        num_res_blocks=1,
        attn_resolutions=[],
    )
    return AutoencoderKL(config | ddconfig, embed_dim=4).eval()


def fill(model, case, golden) -> None:
    stored = {k.removeprefix("w."): v for k, v in golden.items() if k.startswith("w.")}
    recipe_weights(model, **case["weight_recipe"], stored=stored, sums=case["weights"])


@pytest.mark.parametrize("name", ["vae_kl_sdlike", "vae_kl_f8_4level"])
def test_kl_golden(name):
    case, golden = load_case(name)
    model = AutoencoderKL(**case["kwargs"]).eval()
    fill(model, case, golden)
    close = dict(rtol=case["tolerance"]["rtol"], atol=case["tolerance"]["atol"])
    with torch.no_grad():
        posterior = model.encode(golden["x"])
        for part in ("mean", "logvar", "std"):
            torch.testing.assert_close(getattr(posterior, part), golden[part], **close)
        sample = posterior.sample(golden["noise"])
        torch.testing.assert_close(sample, golden["sample"], **close)
        torch.testing.assert_close(posterior.mode(), golden["mode"], **close)
        torch.testing.assert_close(posterior.kl(), golden["kl"], **close)
        torch.testing.assert_close(posterior.nll(golden["sample"]), golden["nll"], **close)
        torch.testing.assert_close(model.decode(golden["mode"]), golden["dec"], **close)
        torch.testing.assert_close(model.decode(golden["z_rand"]), golden["dec_rand"], **close)


@pytest.mark.parametrize("name", ["vae_vq_f2", "vae_vq_noattn"])
def test_vq_golden(name):
    case, golden = load_case(name)
    model = VQModelInterface(**case["kwargs"]).eval()
    fill(model, case, golden)
    close = dict(rtol=case["tolerance"]["rtol"], atol=case["tolerance"]["atol"])
    with torch.no_grad():
        torch.testing.assert_close(model.encode(golden["x"]), golden["h"], **close)
        for z, suffix in ((golden["h"], ""), (golden["z_rand"], "_rand")):
            quantized = model.quantize(z)
            assert torch.equal(quantized.indices, golden["indices" + suffix])
            torch.testing.assert_close(quantized.z, golden["quant" + suffix], **close)
            torch.testing.assert_close(quantized.loss.view(1), golden["loss" + suffix], **close)
            torch.testing.assert_close(model.decode(z), golden["dec" + suffix], **close)
        unquantized = model.decode(golden["h"], force_not_quantize=True)
        torch.testing.assert_close(unquantized, golden["dec_force_not_quantize"], **close)
        size = (len(golden["h"]), *golden["h"].shape[2:])
        codes = model.quantize.codes(golden["indices"], size)
        torch.testing.assert_close(codes, golden["codebook_entry"], **close)


def test_quantizer_passes_gradients_straight_through():
    quantizer = VectorQuantizer(8, 4)
    z = torch.randn(2, 4, 3, 3, requires_grad=True)
    quantizer(z).z.sum().backward()
    torch.testing.assert_close(z.grad, torch.ones_like(z))


def test_quantizing_a_code_gives_itself():
    quantizer = VectorQuantizer(8, 4)
    indices = torch.arange(8)
    quantized = quantizer(quantizer.codes(indices, (1, 2, 4)))
    assert torch.equal(quantized.indices, indices) and quantized.loss == 0


def test_perplexity_counts_the_codes_in_use():
    assert perplexity(torch.tensor([3, 3, 3]), 8) == pytest.approx(1.0)
    assert perplexity(torch.arange(8), 8) == pytest.approx(8.0)


def test_kl_between_gaussians_is_zero_only_for_equals():
    p = DiagonalGaussianDistribution(torch.randn(2, 8, 3, 3))
    q = DiagonalGaussianDistribution(torch.randn(2, 8, 3, 3))
    torch.testing.assert_close(p.kl(p), torch.zeros(2))
    assert (p.kl(q) > 0).all()


@pytest.mark.parametrize("patch_size, factor", [(1, 2), (2, 4)])
def test_patches_multiply_the_downsampling_factor(patch_size, factor):
    model = tiny_kl(patch_size=patch_size)
    x = torch.randn(1, 3, 32, 16)
    z = model.encode(x).mode()
    assert z.shape == (1, 4, 32 // factor, 16 // factor)
    assert model.decode(z).shape == x.shape


def test_folding_statistics_normalizes_latents_and_keeps_reconstructions():
    model, x = tiny_kl(), torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        model.quant_conv.bias.uniform_(-3, 3)
        before, posterior = model(x, sample_posterior=False)
        mean, std = posterior.mean.mean((0, 2, 3)), posterior.mean.std((0, 2, 3))
        fold(model, mean, std)
        after, normalized = model(x, sample_posterior=False)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(normalized.mean.mean((0, 2, 3)), torch.zeros(4), rtol=0, atol=1e-4)
    torch.testing.assert_close(normalized.mean.std((0, 2, 3)), torch.ones(4), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(normalized.std * std.view(1, -1, 1, 1), posterior.std, rtol=1e-4, atol=1e-6)


def test_identity_first_stage_gives_back_what_it_gets():
    x = torch.randn(1, 3, 8, 8)
    model = IdentityFirstStage()
    assert model.decode(model.encode(x)) is x


@pytest.mark.parametrize("change, why", [({"double_z": False}, "double_z"), ({"attn_type": "linear"}, "attn_type")])
def test_wrong_ddconfig_says_why(change, why):
    with pytest.raises(ValueError, match=why):
        tiny_kl(**change)


def test_the_nearest_code_is_the_same_under_autocast():
    torch.manual_seed(0)
    quantizer = VectorQuantizer(4096, 4)
    torch.nn.init.normal_(quantizer.embedding.weight)
    z = torch.randn(1, 4, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        indices = quantizer(z).indices
    assert torch.equal(indices, quantizer(z).indices)
