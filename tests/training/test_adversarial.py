"""Training of first stages with a discriminator: published numbers, what is trained, what counts as a step."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf
from torch import Tensor

from ldm.models.autoencoder import AutoencoderKL, VQModel
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.losses.lpips import LPIPS
from ldm.training.adversarial import AdversarialTraining
from ldm.training.callbacks import KeptState
from ldm.training.run import fit
from ldm.training.state import read_state
from ldm.util import instantiate_from_config
from tests.helpers.goldens import load_case, recipe_tensor
from tests.helpers.processes import Child
from tests.helpers.tiny_data import SIDE, write_data
from tests.modules.test_losses import fill_loss

LOSSES = {
    "kl": "ldm.modules.losses.LPIPSWithDiscriminator",
    "vq": "taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator",
}


# Adam moves a weight of the discriminator whose gradient is nearly 0 by its rounding, which processors do differently.
OF_DISCRIMINATOR, OF_ROUNDING = {"grad_norm", "d_weight", "g_loss", "logits_real", "logits_fake"}, 5e-3


class Watch(pl.Callback):
    """Terms of each batch, and the gradient's norm at each optimizer step."""

    def __init__(self) -> None:
        self.terms: list[dict[str, Tensor]] = []
        self.norms: list[float] = []

    def on_before_optimizer_step(self, trainer: pl.Trainer, module: pl.LightningModule, optimizer: Any) -> None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        self.norms.append(torch.stack([g.norm() for g in gradients]).norm().item())

    def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
        self.terms.append({k.removeprefix("train/"): v.clone() for k, v in trainer.callback_metrics.items()})


def train(module: pl.LightningModule, batches: list[dict[str, Tensor]], **settings: Any) -> Watch:
    watch = Watch()
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = pl.Trainer(accelerator="cpu", logger=False, max_epochs=1, callbacks=[watch], **quiet, **settings)
    trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))
    return watch


def model_of_case(case: Mapping[str, Any]) -> AutoencoderKL | VQModel:
    kwargs, seed = case["kwargs"], case["weight_recipe"]["seed"]
    perceptual = LPIPS(case["lpips_width"])
    lossconfig = {"target": LOSSES[case["kind"]], "params": kwargs["lossparams"] | {"perceptual": perceptual}}
    if case["kind"] == "kl":
        model = AutoencoderKL(kwargs["dd"], kwargs["embed"], lossconfig)
    else:
        model = VQModel(kwargs["dd"], kwargs["embed"], kwargs["ncode"], lossconfig)
    weights = {k: recipe_tensor(k, tuple(p.shape), seed, 1.0) for k, p in model.named_parameters()}
    model.load_state_dict(weights)
    return model


@pytest.mark.parametrize("name", ("fit_autoencoder_kl", "fit_vq"))
def test_training_golden(name, monkeypatch):
    case, tensors = load_case(name)
    module = AdversarialTraining(model_of_case(case), case["kwargs"]["lr"])
    fill_loss(module.loss, case["weight_recipe"]["seed"], "loss.")
    if case["kind"] == "kl":
        drawn: Iterator[Tensor] = iter(tensors["posterior_noise"].flatten(0, 1))
        sample = DiagonalGaussianDistribution.sample
        monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self: sample(self, next(drawn)))
    images = [{"image": batch.movedim(-1, 1)} for batch in tensors["images"]]
    watch = train(module, images)

    rtol = case["tolerance"]["loss_rtol"]
    assert len(watch.norms) == len(case["losses"]) == 2 * len(watch.terms)
    for place, expected in enumerate(case["losses"]):
        terms = watch.terms[expected["step"]] | {"grad_norm": torch.tensor(watch.norms[place])}
        for term in expected.keys() - {"step", "optimizer_idx", "loss"}:
            rel = OF_ROUNDING if expected["step"] and term in OF_DISCRIMINATOR else rtol
            assert terms[term].item() == pytest.approx(expected[term], rel=rel, abs=1e-5), term
    state = {k.removeprefix("model."): v for k, v in module.state_dict().items()}
    for key in (key for key in tensors if key.startswith("after.")):
        torch.testing.assert_close(
            state[key.removeprefix("after.")], tensors[key], rtol=0, atol=case["tolerance"]["after_atol"]
        )
    for part, network in (("autoencoder", module.model), ("discriminator", module.loss.discriminator)):
        l2 = torch.stack([v.norm() for v in network.state_dict().values() if v.is_floating_point()]).norm().item()
        assert l2 == pytest.approx(case["final_weights"][part]["l2"], rel=case["tolerance"]["checksum_l2_rtol"])


def test_each_optimizer_steps_at_the_rate_of_its_step():
    """The discriminator's schedule goes on after the discriminator's step, not after the first stage's."""
    rates = []

    class Noted(AdversarialTraining):
        def configure_optimizers(self) -> Any:
            optimizers, schedules = super().configure_optimizers()
            for name, optimizer in zip("gd", optimizers, strict=True):
                optimizer.register_step_pre_hook(lambda o, *_, name=name: rates.append((name, o.param_groups[0]["lr"])))
            return optimizers, schedules

    case, tensors = load_case("fit_vq")
    params = dict(warm_up_steps=[10], f_min=[1.0], f_max=[1.0], f_start=[0.1], cycle_lengths=[100])
    schedule = {"target": "ldm.lr_scheduler.LambdaLinearScheduler", "params": params}
    batches = [{"image": batch.movedim(-1, 1)} for batch in tensors["images"][:2]]
    train(Noted(model_of_case(case), 1.0, schedule), batches)
    assert rates == [(name, pytest.approx(rate)) for rate in (0.1, 0.19) for name in "gd"]


# A tiny first stage through main.py


def tiny_config(data: Path, kind: str = "kl", **loss: Any) -> dict:
    ddconfig = dict(
        double_z=kind == "kl", z_channels=4, resolution=SIDE, in_channels=3, out_ch=3, ch=32, ch_mult=[1, 2]
    )
    params: dict[str, Any] = {"embed_dim": 4, "ddconfig": ddconfig | {"num_res_blocks": 1, "attn_resolutions": []}}
    if kind == "vq":
        params["n_embed"] = 8
    few = {"disc_start": 1, "disc_num_layers": 1, "perceptual": "none"}
    params["lossconfig"] = {"target": LOSSES[kind], "params": few | loss}
    return {
        "model": {
            "target": f"ldm.models.autoencoder.{'AutoencoderKL' if kind == 'kl' else 'VQModel'}",
            "params": params,
        },
        "training": {"target": "ldm.training.adversarial.AdversarialTraining", "params": {"learning_rate": 1e-3}},
        "data": {
            "target": "ldm.training.data.EmojiImagesData",
            "params": {"root": str(data), "batch_size": 4, "val_split": "heldout_pair"},
        },
        "lightning": {
            "trainer": {
                "accelerator": "cpu",
                "max_steps": 3,
                "val_check_interval": 3,
                "log_every_n_steps": 1,
                "check_val_every_n_epoch": None,
                "enable_progress_bar": False,
            }
        },
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


def weights_of(folder: Path) -> dict[str, Tensor]:
    return read_state(folder / "last.ckpt")["state_dict"]


def metrics(folder: Path) -> dict[str, list[str]]:
    header, *rows = next(folder.glob("metrics/*/metrics.csv")).read_text().splitlines()
    columns = zip(*(row.split(",") for row in rows), strict=True)
    return {name: [v for v in values if v] for name, values in zip(header.split(","), columns, strict=True)}


@pytest.mark.parametrize("kind", ("kl", "vq"))
def test_a_run_counts_batches_and_measures(data, tmp_path, kind):
    fit(OmegaConf.create(tiny_config(data, kind)), tmp_path / kind)
    state, seen = read_state(tmp_path / kind / "last.ckpt"), metrics(tmp_path / kind)
    assert state["global_step"] == 3 and len(state["optimizer_states"]) == 2
    assert [float(v) for v in seen["train/disc_factor"]] == [0, 1, 1]
    assert {"val/rec_loss", "val/psnr"} <= seen.keys()
    assert (tmp_path / kind / "samples" / "00000003.png").is_file()
    alone = fit(OmegaConf.create(tiny_config(data, kind)), tmp_path / kind, train=False)
    assert alone.trainer.callback_metrics["val/disc_factor"] == 1


def test_decoder_only_keeps_what_makes_the_latents(data, tmp_path):
    for kind, kept in (("kl", ("encoder.", "quant_conv.")), ("vq", ("encoder.", "quant_conv.", "quantize."))):
        config = tiny_config(data, kind)
        config["training"]["params"]["decoder_only"] = True
        first = instantiate_from_config(config["model"])
        torch.save({"state_dict": first.state_dict()}, tmp_path / f"{kind}.ckpt")
        config["model"]["params"]["ckpt_path"] = str(tmp_path / f"{kind}.ckpt")
        fit(OmegaConf.create(config), tmp_path / kind)
        after = weights_of(tmp_path / kind)
        for name, before in first.state_dict().items():
            assert torch.equal(before, after[f"model.{name}"]) == name.startswith(kept), name


def test_a_stopped_run_ends_with_the_same_weights(data, tmp_path):
    config = tiny_config(data, disc_start=2)
    config["lightning"]["trainer"]["max_steps"] = 5
    fit(OmegaConf.create(config), tmp_path / "whole")
    for steps in (3, 5):
        config["lightning"]["trainer"]["max_steps"] = steps
        fit(OmegaConf.create(config), tmp_path / "parts")
    whole, parts = weights_of(tmp_path / "whole"), weights_of(tmp_path / "parts")
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())


def test_the_trainers_accumulation_and_clipping_hold_for_the_first_stage(data, tmp_path):
    config = tiny_config(data, disc_start=100)
    config["lightning"]["trainer"] |= {"accumulate_grad_batches": 2, "gradient_clip_val": 1e-30, "max_steps": 2}
    before = instantiate_from_config(config["model"])
    torch.save(before.state_dict(), tmp_path / "first.ckpt")
    config["model"]["params"]["ckpt_path"] = str(tmp_path / "first.ckpt")
    fit(OmegaConf.create(config), tmp_path / "run")
    assert (
        read_state(tmp_path / "run" / "last.ckpt")["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["ready"]
        == 4
    )
    after = weights_of(tmp_path / "run")
    for name, value in before.state_dict().items():  # a gradient of 1e-30 is below Adam's epsilon
        torch.testing.assert_close(value, after[f"model.{name}"], rtol=0, atol=1e-12)


@pytest.mark.parametrize("clip, algorithm", [(1e-4, "norm"), (1e-4, "value"), (0.0, None)])
def test_gradients_are_clipped_as_the_trainer_says(data, tmp_path, monkeypatch, clip, algorithm):
    seen: list[list[Tensor]] = []
    before = AdversarialTraining.on_before_optimizer_step

    def watched(self, optimizer):
        before(self, optimizer)
        seen.append([p.grad.clone() for p in self.model.parameters() if p.grad is not None])

    monkeypatch.setattr(AdversarialTraining, "on_before_optimizer_step", watched)
    config = tiny_config(data, disc_start=100)
    config["lightning"]["trainer"] |= {"max_steps": 1, "gradient_clip_val": clip, "gradient_clip_algorithm": algorithm}
    fit(OmegaConf.create(config), tmp_path / "run")
    gradients = torch.cat([g.flatten() for g in seen[0]])  # the first stage's; the second step is the discriminator's
    if algorithm == "value":
        assert gradients.abs().max().item() == pytest.approx(clip) and gradients.norm() > 2 * clip
    elif algorithm == "norm":
        assert gradients.norm().item() == pytest.approx(clip, rel=1e-2)
    else:
        assert gradients.norm() > 1e-2


@pytest.mark.parametrize(
    "kind, training, loss, message",
    [
        ("kl", "adversarial.AdversarialTraining", "reconstruction.ReconstructionLoss", "ReconstructionLoss is not of"),
        ("vq", "adversarial.AdversarialTraining", "LPIPSWithDiscriminator", "LPIPSWithDiscriminator is not of"),
        ("kl", "adversarial.AdversarialTraining", None, "none is not of"),
        ("kl", "autoencoder.AutoencoderTraining", "LPIPSWithDiscriminator", "accepted: ReconstructionLoss"),
        ("vq", "autoencoder.AutoencoderTraining", None, "model.target: VQModel is not trained by this class; accepted"),
    ],
)
def test_a_loss_of_another_training_is_refused(data, tmp_path, kind, training, loss, message):
    config = tiny_config(data, kind)
    config["training"]["target"] = f"ldm.training.{training}"
    params = {"disc_start": 1, "perceptual": "none"} if loss == "LPIPSWithDiscriminator" else {}
    lossconfig = {"target": f"ldm.modules.losses.{loss}", "params": params} if loss else None
    config["model"]["params"]["lossconfig"] = lossconfig
    with pytest.raises(ValueError, match=f"^training: .*{message}"):
        fit(OmegaConf.create(config), tmp_path / "run")


def test_a_discriminator_goes_on_from_the_checkpoint_of_its_first_stage(data, tmp_path, capsys):
    config = tiny_config(data, disc_start=100)  # until then its weights stay
    first = AdversarialTraining(instantiate_from_config(config["model"]), 1e-3)
    state = first.model.state_dict() | {f"loss.{k}": v for k, v in first.loss.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "model.ckpt")
    config["model"]["params"]["ckpt_path"] = str(tmp_path / "model.ckpt")
    config["lightning"]["trainer"]["max_steps"] = 1
    fit(OmegaConf.create(config), tmp_path / "run")
    after = weights_of(tmp_path / "run")
    for name, before in first.loss.discriminator.named_parameters():
        assert torch.equal(before, after[f"loss.discriminator.{name}"]), name
    assert "the discriminator goes on from" in capsys.readouterr().out
    config["model"]["params"]["lossconfig"]["params"]["disc_num_layers"] = 2
    fit(OmegaConf.create(config), tmp_path / "other")
    assert "a new discriminator: " in capsys.readouterr().out


@pytest.mark.parametrize("reuse", (True, False))
def test_reuse_forward_shows_the_discriminator_the_first_reconstruction(reuse):
    torch.manual_seed(0)
    model = instantiate_from_config(tiny_config(Path(), disc_start=0)["model"])
    module = AdversarialTraining(model, 0.1, reuse_forward=reuse)
    before = module.loss.discriminator.main[0].weight.clone()
    judged: list[Tensor] = []
    module.loss.discriminator.register_forward_pre_hook(lambda _, given: judged.append(given[0]))
    train(module, [{"image": torch.rand(2, 3, SIDE, SIDE) * 2 - 1}])
    assert not torch.equal(before, module.loss.discriminator.main[0].weight)
    generated, _real, shown = judged
    assert torch.equal(generated, shown) == reuse


def test_a_state_is_saved_between_steps_only_and_when_a_signal_asks_for_it(data, tmp_path, monkeypatch):
    saved: list[tuple[int, int]] = []
    save = KeptState.save

    def watched(self, trainer):
        saved.append((trainer.fit_loop.epoch_loop.total_batch_idx + 1, trainer.global_step))
        save(self, trainer)

    def signalled(self, batch, batch_idx):
        if self.trainer.fit_loop.epoch_loop.total_batch_idx == 2:  # the first batch of the second step
            os.kill(os.getpid(), signal.SIGUSR1)

    monkeypatch.setattr(KeptState, "save", watched)
    monkeypatch.setattr(AdversarialTraining, "on_train_batch_start", signalled)
    config = tiny_config(data)
    config["lightning"]["trainer"] |= {"accumulate_grad_batches": 2, "val_check_interval": 4}
    fit(OmegaConf.create(config), tmp_path / "run")
    assert saved == [(4, 2), (6, 3)]


def test_several_processes_train_the_same_two_networks(data, tmp_path):
    """Each has other images, so their weights are the same only if both networks' gradients are averaged."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = tiny_config(data)
    config["lightning"]["trainer"] |= {"devices": 2, "max_steps": 2, "limit_val_batches": 0}
    env = {"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0"}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}

    def work() -> int:
        module = fit(OmegaConf.create(config), tmp_path / "run")
        sums = [sum(p.double().sum().item() for p in n.parameters()) for n in (module.model, module.loss.discriminator)]
        print(f"sums: {sums}")
        return 0

    logs = [tmp_path / f"log{rank}" for rank in range(2)]
    children = [Child(work, log, {**env, "RANK": str(r), "LOCAL_RANK": str(r)}) for r, log in enumerate(logs)]
    assert [child.end() for child in children] == [0, 0], "".join(log.read_text() for log in logs)
    first, second = (log.read_text().partition("sums: ")[2].splitlines()[0] for log in logs)
    assert first == second != ""
