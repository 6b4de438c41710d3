"""Training of first stages with a discriminator."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ldm.checkpoint import read_checkpoint
from ldm.io.files import AboveZero, Count
from ldm.models.autoencoder import AutoencoderKL, VQModel
from ldm.modules.losses import LPIPSWithDiscriminator, VQLPIPSWithDiscriminator
from ldm.training.autoencoder import FirstStageTraining, mean_psnr, reconstructed
from ldm.training.optim import scheduled

BETAS = (0.5, 0.9)  # of both published optimizers


class AdversarialTraining(FirstStageTraining):
    """Trains a KL or VQ first stage, and a discriminator against it, with the loss that the model's lossconfig names.

    For each batch the first stage makes a step, then the discriminator, as published: Adam for both, and a forward pass
    for each. A step of the trainer is a step of the first stage; disc_start counts batches.

    Args:
        learning_rate, scheduler_config: of both, see `ldm.training.optim.adamw`.
        compile: see `FirstStageTraining`.
        decoder_only: what makes the latents (encoder, quant_conv, codebook) keeps its weights, so latents that were
            encoded before stay valid.
        reuse_forward: the discriminator sees the reconstruction that the first stage's step began with, instead of
            one of the new weights: a forward pass less.
        accumulate_grad_batches, gradient_clip_val: as the trainer's settings, which Lightning refuses where there are
            two optimizers; `main.py` hands the trainer's on. Clipped is the first stage's gradient only.
    """

    manages = ("accumulate_grad_batches", "gradient_clip_val")
    losses = {AutoencoderKL: LPIPSWithDiscriminator, VQModel: VQLPIPSWithDiscriminator}
    watched = "train/nll_loss"  # the adversarial term may be of any size
    strategy = "ddp_find_unused_parameters_true"  # each backward pass is of one of the two networks
    seen = 0  # batches before the state that is read; where only a validation is made, the trainer does not know them

    def __init__(
        self,
        model: AutoencoderKL | VQModel,
        learning_rate: AboveZero,
        scheduler_config: Mapping[str, Any] | None = None,
        decoder_only: bool = False,
        reuse_forward: bool = False,
        accumulate_grad_batches: Count = 1,
        gradient_clip_val: AboveZero | None = None,
        compile: bool = False,
    ):
        super().__init__(model, learning_rate, scheduler_config, compile)
        self.automatic_optimization = False
        self.reuse_forward = reuse_forward
        self.accumulate, self.clip = accumulate_grad_batches, gradient_clip_val
        if decoder_only:
            for part in (model.encoder, model.quant_conv, *([model.quantize] if isinstance(model, VQModel) else [])):
                part.requires_grad_(False)

    def on_train_start(self) -> None:
        super().on_train_start()
        if self.model.ckpt_path and self.batches < 0:
            self.take_discriminator(self.model.ckpt_path)

    def take_discriminator(self, path: str) -> None:
        """Go on with the discriminator of a first stage's file, as published code does; without one it begins anew."""
        own, prefix = self.loss.discriminator.state_dict(), "loss.discriminator."
        kept = {k.removeprefix(prefix): v for k, v in read_checkpoint(path).items() if k.startswith(prefix)}
        if {k: v.shape for k, v in kept.items()} == {k: v.shape for k, v in own.items()}:
            self.loss.discriminator.load_state_dict(kept)
            print(f"the discriminator goes on from {path}")
        else:
            print(f"a new discriminator: {path} has " + ("one of another shape" if kept else "none"))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.seen = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["ready"]

    @property
    def batches(self) -> int:
        """Batches that were trained on before this one, in all epochs."""
        return max(self.trainer.fit_loop.epoch_loop.total_batch_idx, self.seen - 1)

    def configure_optimizers(self) -> tuple[list[torch.optim.Optimizer], list[Any]]:
        made = [
            scheduled(torch.optim.Adam(trained(module), self.learning_rate, BETAS), self.scheduler_config)
            for module in (self.model, self.loss.discriminator)
        ]
        return [one["optimizer"] for one in made], [one["lr_scheduler"] for one in made if "lr_scheduler" in one]

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        images = self.images_of(batch)
        step = (batch_idx + 1) % self.accumulate == 0 or self.trainer.is_last_batch
        first_stage, discriminator = self.optimizers()

        self.toggle_optimizer(first_stage)
        reconstruction, latent = reconstructed(self.model, images, sample=True)
        terms = self.loss.generator(images, reconstruction, latent, self.batches, self.model.decoder.last_layer)
        self.manual_backward(terms["total_loss"] / self.accumulate)
        if step:
            self.step_first_stage(first_stage)
        self.untoggle_optimizer(first_stage)

        self.toggle_optimizer(discriminator)
        if not self.reuse_forward:
            reconstruction = reconstructed(self.model, images, sample=True)[0]
        disc_terms = self.loss.disc_terms(images, reconstruction.detach(), self.batches)
        self.manual_backward(disc_terms["disc_loss"] / self.accumulate)
        if step:
            self.step_discriminator(discriminator.optimizer)
        self.untoggle_optimizer(discriminator)
        self.log_terms("train", images, reconstruction, terms | disc_terms)
        return terms["total_loss"].detach()

    def step_first_stage(self, optimizer: Any) -> None:
        optimizer.step()
        optimizer.zero_grad()
        self.step_schedule(0)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        # Only here gradients have their own scale if the precision is fp16.
        if optimizer is self.trainer.optimizers[0]:  # not the discriminator's
            self.configure_gradient_clipping(optimizer, self.clip, self.trainer.gradient_clip_algorithm)

    def step_discriminator(self, optimizer: torch.optim.Optimizer) -> None:
        # By the strategy, as Lightning's own optimizer does it, but not counted as a step of the trainer.
        self.trainer.strategy.optimizer_step(optimizer, lambda: None, model=self)
        optimizer.zero_grad()
        self.step_schedule(1)

    def step_schedule(self, optimizer: int) -> None:
        """The next learning rate of the first stage (0) or the discriminator (1), after its step."""
        if schedules := as_list(self.lr_schedulers()):
            schedules[optimizer].step()

    def log_terms(self, split: str, images: Tensor, reconstruction: Tensor, terms: Mapping[str, Tensor]) -> None:
        terms = {**terms, "psnr": mean_psnr(images, reconstruction)}
        logged = {f"{split}/{name}": value.detach() for name, value in terms.items()}
        self.log_dict(logged, prog_bar=split == "val", batch_size=len(images), sync_dist=split == "val")

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        images = self.images_of(batch)
        reconstruction, latent = reconstructed(self.model, images, sample=False)
        terms = self.loss.generator(images, reconstruction, latent, self.batches)
        self.log_terms(
            "val", images, reconstruction, terms | self.loss.disc_terms(images, reconstruction, self.batches)
        )


def trained(module: nn.Module) -> Iterable[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


def as_list(schedules: Any) -> list[Any]:
    """What Lightning has of learning-rate schedules: none, one, or a list of them."""
    return schedules if isinstance(schedules, list) else [] if schedules is None else [schedules]
