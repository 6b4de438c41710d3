"""The loss of the published VQ first stages."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ldm.modules.losses.adversarial import AdversarialLoss, Reconstruction
from ldm.modules.vectorquantize import Quantized, perplexity

PIXEL_LOSSES = ("l1", "l2")


class VQLPIPSWithDiscriminator(AdversarialLoss):
    """Mean error of the pixels and perceptual distance, with the codebook's loss and an adversarial term.

    Args:
        codebook_weight: of the codebook's loss.
        pixel_loss: l1 or l2.
        n_classes: accepted for published configs: the number of codes. How many of them are used is always logged.
        rest: see `AdversarialLoss`.
    """

    def __init__(
        self,
        disc_start: int,
        codebook_weight: float = 1.0,
        pixel_loss: str = "l1",
        n_classes: int | None = None,
        **rest: Any,
    ):
        super().__init__(disc_start, **rest)
        if pixel_loss not in PIXEL_LOSSES:
            raise ValueError(f"pixel_loss: {pixel_loss!r} is not one of {', '.join(PIXEL_LOSSES)}")
        self.codebook_weight, self.pixel_loss, self.n_classes = codebook_weight, pixel_loss, n_classes

    @property
    def always_balanced(self) -> bool:
        return True

    def reconstruction(
        self, error: Tensor, distance: Tensor, latent: Quantized, weights: Tensor | None
    ) -> Reconstruction:
        pixels = error.abs() if self.pixel_loss == "l1" else error.square()
        rec = pixels + self.perceptual_weight * distance
        nll, quant_loss = rec.mean(), latent.loss.mean()
        terms = {"quant_loss": quant_loss, "rec_loss": nll, "p_loss": distance.mean()}
        if latent.indices is not None:
            used = torch.unique(latent.indices)
            terms |= {
                "perplexity": perplexity(latent.indices, int(used.max()) + 1),
                "cluster_usage": error.new_tensor(len(used)),
            }
        return Reconstruction(nll, nll + self.codebook_weight * quant_loss, terms)

    def forward(
        self,
        codebook_loss: Tensor | None,
        inputs: Tensor,
        reconstructions: Tensor,
        optimizer_idx: int,
        global_step: int,
        last_layer: Tensor | None = None,
        cond: Tensor | None = None,
        split: str = "train",
        predicted_indices: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """As published, see `AdversarialLoss.published`; `global_step` counts batches."""
        codebook_loss = inputs.new_zeros(()) if codebook_loss is None else codebook_loss
        latent = Quantized(reconstructions, codebook_loss, predicted_indices)
        return self.published(inputs, reconstructions, latent, optimizer_idx, global_step, last_layer, cond, split)
