"""LPIPS, the discriminator and the losses of first stages, held to published numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from ldm.io.files import FileError
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.losses import LPIPSWithDiscriminator, VQLPIPSWithDiscriminator
from ldm.modules.losses import lpips as of_lpips
from ldm.modules.losses.discriminator import ActNorm, NLayerDiscriminator
from ldm.modules.losses.lpips import LPIPS, SLICES, EfficientNetDistance, lpips, normalized, perceptual
from ldm.modules.vectorquantize import Quantized
from ldm.util import instantiate_from_config
from tests.helpers.goldens import assert_golden, from_recipe, load_case, recipe_tensor
from tests.helpers.processes import Child

KL = ("after_disc", "before_disc", "actnorm_cond", "clamped_d_weight", "no_gan_no_lpips", "vanilla_logvar_weights")
VQ = ("hinge_l1", "vanilla_l2", "before_disc_no_codebook")
SMALL = (8, 12, 16, 24, 24)


def fill_lpips(network: LPIPS, seed: int, prefix: str = "") -> LPIPS:
    """By the recipe; the weights of channels are made positive, as the published ones are."""
    weights = {k: recipe_tensor(prefix + k, tuple(p.shape), seed, 1.4) for k, p in network.named_parameters()}
    network.load_state_dict(network.state_dict() | {k: w.abs() if "lin" in k else w for k, w in weights.items()})
    return network


def fill_loss(loss: nn.Module, seed: int, prefix: str = "") -> None:
    """By the recipe of a loss: perceptual distance and discriminator; logvar keeps its value."""
    if loss.perceptual_loss is not None:
        fill_lpips(loss.perceptual_loss, seed, f"{prefix}perceptual_loss.")
    weights = {
        k: recipe_tensor(f"{prefix}discriminator.{k}", tuple(p.shape), seed, 1.0)
        for k, p in loss.discriminator.named_parameters()
    }
    loss.discriminator.load_state_dict(loss.discriminator.state_dict() | weights)


@pytest.mark.parametrize("name", ("lpips_small", "lpips_full_width"))
def test_lpips_golden(name):
    case, tensors = load_case(name)
    network = fill_lpips(LPIPS(case["width"]), case["weight_recipe"]["seed"])
    assert {k: list(p.shape) for k, p in network.named_parameters()} == {k: s for k, (s, _) in case["weights"].items()}
    x, y = (tensors[k].clone().requires_grad_() for k in "xy")
    out = network(x, y)
    out.sum().backward()
    assert_golden(out, tensors["out"], case)
    assert_golden(network.per_layer(x, y), tensors["per_layer"].squeeze(), case)
    for i, feature in enumerate(network.features(x)):
        assert_golden(feature.mean((2, 3)), tensors[f"feature_mean.{i}"], case)
    assert_golden(x.grad, tensors["grad.x"], case)
    assert_golden(y.grad, tensors["grad.y"], case)


@pytest.mark.parametrize("name", ("disc_batchnorm", "disc_batchnorm_n2", "disc_actnorm"))
def test_discriminator_golden(name):
    case, tensors = load_case(name)
    network = from_recipe(NLayerDiscriminator(**case["kwargs"]), case, tensors)
    assert {k: list(v.shape) for k, v in network.state_dict().items()} == case["state_dict_keys"]
    network.train()
    assert_golden(network(tensors["x"]), tensors["train.out"], case)
    assert_golden(network(tensors["x2"]), tensors["train.out2"], case)
    state = network.state_dict()
    for key in (key for key in tensors if key.startswith("after2.")):
        assert_golden(state[key.removeprefix("after2.")], tensors[key], case)
    assert_golden(network.eval()(tensors["x"]), tensors["eval.out"], case)
    x = tensors["x"].clone().requires_grad_()
    network.train()(x).mean().backward()
    assert_golden(x.grad, tensors["grad.x"], case)
    for key, parameter in network.named_parameters():
        if f"grad.{key}" in tensors:
            assert_golden(parameter.grad, tensors[f"grad.{key}"], case)


def assert_near(actual: Tensor, expected: Tensor, case: dict) -> None:
    """Relative to the largest element."""
    tolerance = case["tolerance"]
    atol = tolerance["rtol"] * expected.abs().max().item() + tolerance["atol"]
    torch.testing.assert_close(actual.float().reshape(expected.shape), expected, rtol=0.0, atol=atol)


def norm_of_gradients(module: nn.Module) -> Tensor:
    return torch.stack([p.grad.norm() for p in module.parameters() if p.grad is not None]).norm()


def loss_of_case(case: dict) -> nn.Module:
    kind = LPIPSWithDiscriminator if case["kind"] == "kl" else VQLPIPSWithDiscriminator
    loss = kind(**case["kwargs"], perceptual=LPIPS(case["lpips_width"]))
    fill_loss(loss, case["weight_recipe"]["seed"])
    if case["discriminator_zeroed"]:
        for parameter in loss.discriminator.parameters():
            nn.init.zeros_(parameter)
    return loss.train()


def call(loss: nn.Module, case: dict, tensors: dict, leaves: dict, index: int) -> tuple[Tensor, dict]:
    reconstruction = F.conv2d(leaves["h"], leaves["last_layer"], padding=1)
    rest = {"last_layer": leaves["last_layer"], "cond": tensors.get("cond")}
    if case["kind"] == "kl":
        posterior = DiagonalGaussianDistribution(leaves["moments"])
        return loss(
            tensors["x"], reconstruction, posterior, index, case["global_step"], weights=tensors.get("weights"), **rest
        )
    rest["predicted_indices"] = tensors.get("predicted_indices")
    return loss(leaves.get("codebook_loss"), tensors["x"], reconstruction, index, case["global_step"], **rest)


@pytest.mark.parametrize("name", (*(f"loss_kl_{n}" for n in KL), *(f"loss_vq_{n}" for n in VQ)))
def test_loss_golden(name):
    case, tensors = load_case(name)
    loss = loss_of_case(case)
    names = ("h", "last_layer", "moments", "codebook_loss")
    for index in (0, 1):
        loss.zero_grad()
        leaves = {k: tensors[k].clone().requires_grad_() for k in names if k in tensors}
        value, log = call(loss, case, tensors, leaves, index)
        value.backward()
        start = f"opt{index}."
        assert_near(value, tensors[f"{start}loss"], case)
        for key in (k for k in tensors if k.startswith(f"{start}log.")):
            assert_near(log[f"train/{key.removeprefix(f'{start}log.')}"], tensors[key], case)
        for key in (k for k in tensors if k.startswith(f"{start}grad.") and "disc." not in k and "logvar" not in k):
            assert_near(leaves[key.removeprefix(f"{start}grad.")].grad, tensors[key], case)
        if f"{start}grad.logvar" in tensors:
            assert_near(loss.logvar.grad, tensors[f"{start}grad.logvar"], case)
        if index == 1 or case["kwargs"].get("disc_factor", 1.0):
            norm = norm_of_gradients(loss.discriminator)
            assert_near(norm, tensors[f"{start}grad_norm.discriminator"], case)
            if f"{start}grad.disc.main.0.weight" in tensors:
                assert_near(loss.discriminator.main[0].weight.grad, tensors[f"{start}grad.disc.main.0.weight"], case)


@pytest.mark.parametrize(
    "target, kind",
    [
        ("ldm.modules.losses.LPIPSWithDiscriminator", LPIPSWithDiscriminator),
        ("ldm.modules.losses.contperceptual.LPIPSWithDiscriminator", LPIPSWithDiscriminator),
        ("ldm.modules.losses.vqperceptual.VQLPIPSWithDiscriminator", VQLPIPSWithDiscriminator),
        ("taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator", VQLPIPSWithDiscriminator),
    ],
)
def test_published_names(target, kind):
    built = instantiate_from_config({"target": target, "params": {"disc_start": 1, "perceptual": "none"}})
    assert type(built) is kind and built.perceptual_loss is None


# Weights of the perceptual distances


def images(seed: int) -> Tensor:
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_lpips_reads_the_published_layout_and_first_stages(tmp_path):
    network = fill_lpips(LPIPS(SMALL), seed=1)
    torch.save(network.state_dict(), tmp_path / "lpips.pth")
    first_stage = {f"loss.perceptual_loss.{k}": v for k, v in network.state_dict().items()} | {"x": torch.ones(1)}
    torch.save({"state_dict": first_stage}, tmp_path / "model.ckpt")
    expected = network(images(0), images(1))
    for file in ("lpips.pth", "model.ckpt"):
        assert torch.equal(lpips(tmp_path / file)(images(0), images(1)), expected)


def test_lpips_reads_vgg16_of_torchvision_and_takes_the_published_weights_of_channels(tmp_path, monkeypatch):
    width = (64, 128, 256, 512, 512)
    state, before = {}, 3
    for kernels, channels in zip(SLICES, width, strict=True):
        for index in kernels:
            state[f"features.{index}.weight"] = torch.full((channels, before, 3, 3), 0.01)
            state[f"features.{index}.bias"] = torch.zeros(channels)
            before = channels
    (tmp_path / "checkpoints").mkdir()
    torch.save(state | {"classifier.0.bias": torch.ones(2)}, tmp_path / "checkpoints" / of_lpips.VGG16)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    network = perceptual("vgg16")
    assert network.net.slice5[1].weight.unique().item() == pytest.approx(0.01)
    weights = network.lin0.model[1].weight
    assert weights.min() >= 0 and weights.max() > 0.1  # learned ones: a fresh convolution has negative ones


def test_without_vgg16_the_error_names_the_alternatives(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(ValueError, match="download_models.py vgg16 .* efficientnet-lite0 .* none"):
        LPIPSWithDiscriminator(disc_start=1)
    with pytest.raises(ValueError, match="no file .*none.pth; .*efficientnet-lite0"):
        LPIPSWithDiscriminator(disc_start=1, perceptual_weights=str(tmp_path / "none.pth"))
    torch.save({"a": torch.ones(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="other.pth: neither VGG16 nor LPIPS"):
        lpips(tmp_path / "other.pth")
    with pytest.raises(ValueError, match="'vgg' is not one of vgg16, efficientnet-lite0, none"):
        LPIPSWithDiscriminator(disc_start=1, perceptual="vgg")


def test_efficientnet_distance_grows_with_the_difference_and_never_changes():
    distance = EfficientNetDistance().train()
    x, noise = images(0), images(1)
    same, near, far = (distance(x, x + a * noise) for a in (0.0, 0.05, 0.5))
    assert same.abs().max() == 0 and (near > 0).all() and (far > 2 * near).all() and far.shape == (2, 1, 1, 1)
    assert not distance.training and not any(p.requires_grad for p in distance.parameters())
    blurred = F.avg_pool2d(x, 2).repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert (distance(x, blurred) > near).all()


def test_lpips_needs_all_of_its_weights(tmp_path):
    """Weights of VGG19, which has other layers, and a file with the first kernels only, are refused."""
    state = {f"features.{i}.weight": torch.ones(4, 3 if i == 0 else 4, 3, 3) for i in (0, 5, 10, 16, 17, 24)}
    torch.save(state, tmp_path / "some.pth")
    with pytest.raises(FileError, match=r"some.pth: not the weights .*: it has no net.slice1.0.bias"):
        lpips(tmp_path / "some.pth")


def test_the_perceptual_distance_is_logged_as_it_is_and_weighted_in_the_loss():
    loss = VQLPIPSWithDiscriminator(1, perceptual=fill_lpips(LPIPS(SMALL), seed=1), perceptual_weight=0.5, disc_ndf=8)
    x, y = images(0), images(1)
    terms = loss.generator(x, y, Quantized(y, torch.zeros(()), None), batches=0)
    assert terms["p_loss"].item() == pytest.approx(loss.perceptual_loss(x, y).mean().item())
    assert terms["nll_loss"].item() == pytest.approx(((x - y).abs().mean() + 0.5 * terms["p_loss"]).item())


def test_features_are_normalized_in_half_precision():
    large, black = (torch.full((1, 4, 1, 1), value, dtype=torch.float16) for value in (300.0, 0.0))
    assert normalized(large).norm().item() == pytest.approx(1.0) and normalized(black).abs().max() == 0


def test_actnorm_is_set_by_the_batches_of_all_processes(tmp_path):
    x = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0)) * 2 + 1

    def work(rank: int) -> int:
        distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=rank, world_size=2)
        layer = ActNorm(3)
        layer(x[2 * rank : 2 * rank + 2])
        torch.save(layer.state_dict(), tmp_path / f"{rank}.pt")
        return 0

    children = [Child(lambda rank=rank: work(rank), tmp_path / f"log{rank}") for rank in range(2)]
    assert [child.end() for child in children] == [0, 0], (tmp_path / "log0").read_text()
    whole = ActNorm(3)
    whole(x)
    for rank in range(2):
        state = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name, value in whole.state_dict().items():
            torch.testing.assert_close(state[name], value)
