"""Training of the KL first stage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.io.schema import AboveZero
from ldm.models.autoencoder import AutoencoderKL
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


class AutoencoderTraining(ClippedTraining):
    """Trains `model` on batches {image_key: (B, 3, H, W) in [-1, 1]} with the loss its lossconfig names.

    Args:
        learning_rate, scheduler_config: see `ldm.training.optim.adamw`.
    """

    def __init__(
        self, model: AutoencoderKL, learning_rate: AboveZero, scheduler_config: Mapping[str, Any] | None = None
    ):
        super().__init__()
        self.model = model.to(memory_format=torch.channels_last)
        self.loss = instantiate_from_config(model.lossconfig)
        self.learning_rate, self.scheduler_config = learning_rate, scheduler_config

    def on_train_start(self) -> None:
        # Not in on_fit_start: there, global_step of a resumed run is still 0, and its weights would be lost.
        if self.model.encoder.shortcut is not None and self.trainer.global_step == 0:
            train = self.trainer.datamodule.train
            spread = torch.linspace(0, len(train) - 1, min(len(train), SAMPLE)).long().tolist()
            images = torch.stack([train[i][self.model.image_key] for i in spread]).to(self.device)
            start_from_principal_components(self.model, images)

    def step(self, batch: dict[str, Tensor], prefix: str, sample_posterior: bool) -> Tensor:
        images = batch[self.model.image_key].contiguous(memory_format=torch.channels_last)
        reconstruction, posterior = self.model(images, sample_posterior)
        losses = self.loss(images, reconstruction, posterior)
        error = (reconstruction.clamp(-1, 1) - images).square().flatten(1).mean(1)
        losses["psnr"] = (10 * torch.log10(4.0 / error)).mean()  # peak to peak is 2
        self.log_dict(
            {f"{prefix}/{k}": v.detach() for k, v in losses.items()}, prog_bar=prefix == "val", batch_size=len(images)
        )
        return losses["loss"]

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.step(batch, "train", sample_posterior=True)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.step(batch, "val", sample_posterior=False)

    def configure_optimizers(self) -> dict[str, Any]:
        return adamw(self.model.parameters(), self.learning_rate, self.scheduler_config)

    @torch.no_grad()
    def images(self, batch: dict[str, Tensor]) -> Tensor:
        """The images of the sample grid, then their reconstructions, (2B, 3, H, W)."""
        images = batch[self.model.image_key]
        return torch.cat([images, self.model(images, sample_posterior=False)[0].clamp(-1, 1)])
