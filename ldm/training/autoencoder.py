"""Training of first stages, without a discriminator."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.checkpoint import load_weights
from ldm.io.files import AboveZero
from ldm.io.images import psnr
from ldm.models.autoencoder import AutoencoderKL, VQModel
from ldm.modules.losses.reconstruction import ReconstructionLoss
from ldm.training.datasets import entry_of
from ldm.training.optim import ClippedTraining, adamw
from ldm.util import instantiate_from_config

SAMPLE = 1024  # number of training images for the initialisation
INITIAL_LOGVAR = -6.0  # of the posterior; far below the latents' variance of about 1


@torch.no_grad()
def start_from_principal_components(model: AutoencoderKL, images: Tensor) -> None:
    """Initialise a first stage with linear shortcuts: the shortcuts as PCA, the deep paths as zero.

    From random weights, thousands of steps are needed until the colours alone are right.

    Args:
        images: (N, 3, H, W) in [-1, 1], a sample of the training images.
    """
    encoder, decoder, channels = model.encoder, model.decoder, model.embed_dim
    patches = F.pixel_unshuffle(images, encoder.factor).movedim(1, -1).flatten(0, -2)  # (N*h*w, 3*f*f)
    mean = patches.mean(0)
    components = torch.linalg.svd((patches - mean).T.cov()).U[:, :channels]  # (3*f*f, C)
    std = ((patches - mean) @ components).std()
    for deep in (encoder.conv_out, decoder.conv_out):
        deep.weight.zero_()
        deep.bias.zero_()
    into, back = encoder.shortcut, decoder.shortcut
    into.weight.zero_()
    into.weight[:channels] = components.T[..., None, None] / std
    into.bias.zero_()
    into.bias[:channels] = -components.T @ mean / std
    back.weight.copy_(components[..., None, None] * std)
    back.bias.copy_(mean)
    for conv in (model.quant_conv, model.post_quant_conv):
        conv.weight.copy_(torch.eye(len(conv.weight))[..., None, None])
        conv.bias.zero_()
    model.quant_conv.bias[channels:] = INITIAL_LOGVAR


class FirstStageTraining(ClippedTraining):
    """What the trainings of first stages share, on batches {image_key: (B, 3, H, W) in [-1, 1]}.

    The model starts from the weights of its ckpt_path, or, if it has linear shortcuts, from principal components.

    Args:
        learning_rate, scheduler_config: see `ldm.training.optim.adamw`.
        compile: encoder and decoder are compiled by torch.compile, which takes minutes at the first step.

    Raises:
        ValueError: the model's lossconfig names no loss of this training.
    """

    losses: Mapping[type[nn.Module], type[nn.Module]]  # of each kind of model that is trained

    def __init__(
        self,
        model: AutoencoderKL | VQModel,
        learning_rate: AboveZero,
        scheduler_config: Mapping[str, Any] | None = None,
        compile: bool = False,
    ):
        super().__init__()
        loss = self.loss_of(model)
        if model.ckpt_path:
            load_weights(model, model.ckpt_path)
        self.model, self.loss = model.to(memory_format=torch.channels_last), loss
        self.learning_rate, self.scheduler_config = learning_rate, scheduler_config
        if compile:
            model.encoder.compile()
            model.decoder.compile()

    def loss_of(self, model: nn.Module) -> nn.Module:
        """The loss that the model's lossconfig names.

        Raises:
            ValueError: this training has none for such a model, or it is another one.
        """
        accepted = next((loss for kind, loss in self.losses.items() if isinstance(model, kind)), None)
        if accepted is None:
            kinds = ", ".join(kind.__name__ for kind in self.losses)
            raise ValueError(f"model.target: {type(model).__name__} is not trained by this class; accepted: {kinds}")
        loss = instantiate_from_config(model.lossconfig) if model.lossconfig else None
        if not isinstance(loss, accepted):
            given = type(loss).__name__ if loss else "none"
            raise ValueError(f"model.params.lossconfig: {given} is not of this training; accepted: {accepted.__name__}")
        return loss

    def on_train_start(self) -> None:
        # Not in on_fit_start: there, global_step of a resumed run is still 0, and its weights would be lost.
        shortcut = self.model.encoder.shortcut is not None and not self.model.ckpt_path
        if shortcut and self.trainer.global_step == 0:
            train = self.trainer.datamodule.train
            spread = torch.linspace(0, len(train) - 1, min(len(train), SAMPLE)).long().tolist()
            images = torch.stack([entry_of(train[i], self.model.image_key) for i in spread]).to(self.device)
            start_from_principal_components(self.model, images)

    def images_of(self, batch: dict[str, Tensor]) -> Tensor:
        return entry_of(batch, self.model.image_key).contiguous(memory_format=torch.channels_last)

    @torch.no_grad()
    def images(self, batch: dict[str, Tensor]) -> Tensor:
        """The images of the sample grid, then their reconstructions, (2B, 3, H, W)."""
        images = self.images_of(batch)
        return torch.cat([images, reconstructed(self.model, images, sample=False)[0].clamp(-1, 1)])


def reconstructed(model: AutoencoderKL | VQModel, images: Tensor, sample: bool) -> tuple[Tensor, Any]:
    """Reconstructions, and the posterior or the codes that they come from; a posterior is sampled if `sample`."""
    return model(images, sample) if isinstance(model, AutoencoderKL) else model(images)


@torch.no_grad()
def mean_psnr(images: Tensor, reconstruction: Tensor) -> Tensor:
    return psnr(images, reconstruction.clamp(-1, 1)).mean()


class AutoencoderTraining(FirstStageTraining):
    """Trains `model` with a loss that needs no discriminator, see `ldm.modules.losses.reconstruction`."""

    losses = {AutoencoderKL: ReconstructionLoss}

    def step(self, batch: dict[str, Tensor], prefix: str, sample_posterior: bool) -> Tensor:
        images = self.images_of(batch)
        reconstruction, posterior = self.model(images, sample_posterior)
        losses = self.loss(images, reconstruction, posterior)
        losses["psnr"] = mean_psnr(images, reconstruction)
        logged = {f"{prefix}/{k}": v.detach() for k, v in losses.items()}
        self.log_dict(logged, prog_bar=prefix == "val", batch_size=len(images), sync_dist=prefix == "val")
        return losses["loss"]

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.step(batch, "train", sample_posterior=True)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.step(batch, "val", sample_posterior=False)

    def configure_optimizers(self) -> dict[str, Any]:
        return adamw(self.model.parameters(), self.learning_rate, self.scheduler_config)
