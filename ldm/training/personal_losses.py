"""Losses of the trainings that teach a model a few images: DreamBooth, Custom Diffusion, ReVersion.

Sources: Ruiz et al. (arXiv 2208.12242), Kumari et al. (arXiv 2212.04488), Huang et al. (arXiv 2303.13495).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import pi

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.modules.attention import ProjectedContext


def preserved_losses(
    prediction: Tensor,
    target: Tensor,
    instances: int,
    prior_weight: float = 1.0,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
) -> dict[str, Tensor]:
    """instance + prior_weight * prior, of a batch of images of the thing and, behind them, images of its class.

    Args:
        prediction, target: (B, C, H, W).
        instances: how many are of the thing.
        mask: where the loss counts, 1 or 0, (n, 1, H, W), of the first n images; their loss is the sum over all
            channels divided by the sum of the mask, so C times a mean, as published. The others' is the mean.
        weights: of the loss of each image of the thing, (instances,), such as min-SNR.

    Returns:
        scalars "loss", "loss_instance", and with images of the class "loss_prior".
    """
    error = (prediction - target).square()
    each = error.flatten(1).mean(1)
    if mask is not None:
        masked = (mask * error[: len(mask)]).flatten(1).sum(1) / mask.flatten(1).sum(1)
        each = torch.cat([masked, each[len(mask) :]])
    own = each[:instances] if weights is None else weights * each[:instances]
    losses = {"loss": own.mean(), "loss_instance": own.mean()}
    if len(each) > instances:
        prior = each[instances:].mean()
        losses |= {"loss": own.mean() + prior_weight * prior, "loss_prior": prior}
    return losses


def without_gradient_of_first(context: ProjectedContext) -> ProjectedContext:
    """The same keys and values, those of the first token without gradients (Custom Diffusion)."""

    def part(x: Tensor) -> Tensor:
        return torch.cat([x[:, :, :1].detach(), x[:, :, 1:]], dim=2)  # (B, heads, L, dim_head)

    return replace(context, keys_values={layer: (part(k), part(v)) for layer, (k, v) in context.keys_values.items()})


def steering_loss(
    table: Tensor, token: int, positives: Sequence[int], negatives: Sequence[int], temperature: float = 0.07
) -> Tensor:
    """Draws a token's vector to those of words of relations, and away from those of what images show (ReVersion).

    -log(sum over positives of exp(cos / temperature) / sum over both); repeated tokens count as often as they come.

    Args:
        table: vectors of all tokens, (N, D); only the token's own gets a gradient.
        token, positives, negatives: rows of it.
    """
    own = F.normalize(table[token], dim=0)
    others = F.normalize(table[[*positives, *negatives]].detach(), dim=1)  # (P + N, D)
    logits = (others * own).sum(1) / temperature  # as a product of matrices autocast would round it
    return logits.logsumexp(0) - logits[: len(positives)].logsumexp(0)


def importance(timesteps: int, alpha: float) -> Tensor:
    """How likely each timestep is drawn, (T,), float64: (1 - alpha cos(pi t / T)) / T, normalised (ReVersion).

    The loss is not divided by it, as published.
    """
    t = torch.arange(timesteps, dtype=torch.float64)
    shares = (1 - alpha * torch.cos(pi * t / timesteps)) / timesteps
    return shares / shares.sum()
