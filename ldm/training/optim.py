"""The optimizer of all trainings, and gradient clipping for it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins import MixedPrecision
from torch import nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

from ldm.util import instantiate_from_config


def adamw(
    parameters: Iterable[nn.Parameter], learning_rate: float, scheduler_config: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """AdamW with weight decay for matrices and kernels only, and a learning-rate factor per step.

    Args:
        learning_rate: base rate, multiplied with the scheduler's factor.
        scheduler_config: `target:` of a function step -> factor (`ldm.lr_scheduler`); None = constant.

    Returns:
        what a Lightning module's `configure_optimizers` returns.
    """
    trained = [p for p in parameters if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": 0.01},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return scheduled(torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.99), fused=True), scheduler_config)


def scheduled(optimizer: torch.optim.Optimizer, scheduler_config: Mapping[str, Any] | None) -> dict[str, Any]:
    """The optimizer with a learning-rate factor per step, as `configure_optimizers` returns it; see `adamw`."""
    if scheduler_config is None:
        return {"optimizer": optimizer}
    factor = instantiate_from_config(scheduler_config)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_lambda=lambda step: factor(step))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class ClippedTraining(pl.LightningModule):
    """Clips the gradients of `model` as the trainer's gradient_clip_val and gradient_clip_algorithm say.

    Lightning itself refuses to do so for a fused optimizer with mixed precision, because of the scale of the loss,
    which bf16 does not have and which is taken out here for fp16.
    """

    model: nn.Module
    manages: tuple[str, ...] = ()  # settings of the trainer that the module has arguments for
    watched = "train/loss"  # the loss that ends a training when it explodes
    strategy = "auto"  # Lightning's, for several processes, unless the configuration names one

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        if not gradient_clip_val:  # 0 is Lightning's word for none, too
            return
        precision = self.trainer.precision_plugin
        if isinstance(precision, MixedPrecision) and precision.scaler and optimizer.defaults.get("fused"):
            precision.scaler.unscale_(optimizer)  # which is left to the step of a fused optimizer otherwise
        clip = clip_grad_value_ if gradient_clip_algorithm == "value" else clip_grad_norm_
        clip(self.model.parameters(), gradient_clip_val)
