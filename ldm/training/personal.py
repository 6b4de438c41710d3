"""Trainings that teach a model a few images: DreamBooth, Custom Diffusion, textual inversion, ReVersion, LoRA."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ldm.io.files import AboveZero, Count, NotNegative, Share
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.attention import BasicTransformerBlock
from ldm.modules.ema import LitEma
from ldm.modules.low_rank import with_low_rank
from ldm.training.diffusion import DiffusionTraining
from ldm.training.optim import scheduled
from ldm.training.personal_losses import importance, preserved_losses, steering_loss, without_gradient_of_first

TRAINED = ("all", "crossattn-kv", "crossattn", "lora", "tokens")


class Personalization(DiffusionTraining):
    """Trains a part of a model, and new tokens of its text encoder, on a few images of a thing.

    A batch holds images of the thing with captions under the model's keys; for the prior that is to be preserved images
    of the class with their captions under class_KEY; and, where the loss counts, masks (B, 1, h, w) under "mask".

    Args:
        model: with starting weights (ckpt_path), where they are to be had.
        what: of the network that is trained: all (DreamBooth); crossattn-kv, the keys and values of the text, or
            crossattn, all cross-attention (Custom Diffusion), both with the first token's left as they are; lora, a
            low-rank change of all attention; tokens, nothing but the new tokens (textual inversion).
        text_encoder: train it too, with all.
        new_tokens: for each of them the word whose vector it begins as.
        vectors: of each new token.
        rank: of lora.
        prior_loss_weight: of the loss of the class.
        masked_prior: the class's loss is scaled as the masked one of the thing, as in the CompVis code.
        importance_alpha: draw noisier timesteps more often, see `importance`; None = all alike.
        relations, stop_words: words of relations, to which the first new token is drawn, and words that do not count as
            what the images show; none = no steering, see `steering_loss`.
        steering_weight, temperature, positives: of that loss; words of relations that are drawn for each image.
        rest: see `DiffusionTraining`.

    Raises:
        ValueError: what is none of these, nothing is trained, or a setting does not go with the others.
    """

    def __init__(
        self,
        model: LatentDiffusion,
        learning_rate: AboveZero,
        what: str = "all",
        text_encoder: bool = False,
        new_tokens: Mapping[str, str] | None = None,
        vectors: Count = 1,
        rank: Count = 4,
        prior_loss_weight: NotNegative = 1.0,
        masked_prior: bool = False,
        importance_alpha: Share | None = None,
        relations: Sequence[str] = (),
        stop_words: Sequence[str] = (),
        steering_weight: NotNegative = 0.01,
        temperature: AboveZero = 0.07,
        positives: Count = 4,
        ema_decay: Share = 0.0,
        condition_dropout: Share = 0.0,
        **rest: Any,
    ) -> None:
        if what not in TRAINED:
            raise ValueError(f"what must be one of {', '.join(TRAINED)}; got {what!r}")
        if model.predicts_variance:
            raise ValueError("model: not one whose network predicts a variance, which these losses do not train")
        if rest.get("compile"):
            raise ValueError("compile: not with the losses of this training; leave it out")
        if what == "tokens" and not new_tokens:
            raise ValueError("new_tokens: needed where nothing else is trained; expected {TOKEN: WORD}")
        if new_tokens and what in ("all", "lora"):
            raise ValueError(f"new_tokens: not with {what}, whose file has no place for them")
        model.cond_stage_trainable = bool(text_encoder or new_tokens)
        super().__init__(model, learning_rate, ema_decay=ema_decay, condition_dropout=condition_dropout, **rest)
        self.what, self.prior_loss_weight, self.masked_prior = what, prior_loss_weight, masked_prior
        self.register_buffer("first_token", torch.tensor(0))  # row of the first new token
        model.requires_grad_(False)
        for parameter in trained_of(model, what, rank, text_encoder):
            parameter.requires_grad_(True)
        if new_tokens:
            self.first_token += add_tokens(model.cond_stage_model, new_tokens, vectors)
        self.new_tokens = len(new_tokens or ()) * vectors
        self.importance = None if importance_alpha is None else importance(model.num_timesteps, importance_alpha)
        self.relations, self.stop_words = [*relations], [*stop_words]
        self.steering_weight, self.temperature, self.positives = steering_weight, temperature, positives
        self.network_ema = LitEma(model.model, ema_decay)
        self.conditioner_ema = LitEma(model.cond_stage_model, ema_decay) if model.cond_stage_trainable else None

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW with PyTorch's defaults, as all of these were published; new tokens do not decay, nor do the old."""
        tokens = [self.model.cond_stage_model.token_table.weight] if self.new_tokens else []
        others = [p for p in self.model.parameters() if p.requires_grad and not any(p is one for one in tokens)]
        groups = [{"params": others}, {"params": tokens, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW([group for group in groups if group["params"]], self.learning_rate)
        return scheduled(optimizer, self.scheduler_config)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        return super().training_step(self.joined(batch), batch_idx)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        super().validation_step(self.joined(batch), batch_idx)

    def joined(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The images of the thing and, behind them, those of the class, as one batch; `instances` of the thing."""
        image, caption = self.model.first_stage_key, self.model.cond_stage_key
        both = {**batch, "instances": len(batch[caption])}
        if f"class_{image}" not in batch:
            return both
        mask = batch.get("mask")
        if mask is not None and self.masked_prior:
            both["mask"] = torch.cat([mask, torch.ones_like(mask)])
        both[image] = torch.cat([batch[image], batch[f"class_{image}"]])
        both[caption] = [*batch[caption], *batch[f"class_{caption}"]]
        return both

    def timesteps_and_noise(self, z: Tensor) -> tuple[Tensor, Tensor]:
        if self.importance is None:
            return super().timesteps_and_noise(z)
        return torch.multinomial(self.importance, len(z), replacement=True).to(z.device), torch.randn_like(z)

    def losses(self, z: Tensor, batch: dict[str, Any], t: Tensor, noise: Tensor) -> dict[str, Tensor]:
        model, cond = self.model, self.model.conditioning(self.conditioning(batch))
        if self.what.startswith("crossattn"):
            cond = model.model.project(cond)
            cond = replace(cond, context=without_gradient_of_first(cond.context))
        prediction = model.apply_model(model.q_sample(z, t, noise), t, cond)
        instances = batch["instances"]
        weights = self.timestep_weights(t[:instances]) if self.weighted else None
        target = model.prediction_target(z, noise, t)
        losses = preserved_losses(
            prediction, target, instances, self.prior_loss_weight, self._mask(batch, z.shape[-2:]), weights
        )
        if self.relations:
            losses["loss_steering"] = self.steering(batch[model.cond_stage_key])
            losses["loss"] = losses["loss"] + self.steering_weight * losses["loss_steering"]
        return losses

    @staticmethod
    def _mask(batch: Mapping[str, Any], size: Sequence[int]) -> Tensor | None:
        return nn.functional.interpolate(batch["mask"], size=size) if "mask" in batch else None

    def steering(self, captions: Sequence[str]) -> Tensor:
        """The steering loss of a batch; words of relations are drawn for each caption."""
        encoder = self.model.cond_stage_model
        drawn = [
            self.relations[i] for _ in captions for i in torch.randperm(len(self.relations))[: self.positives].tolist()
        ]
        first, words = int(self.first_token), [*self.relations, *self.stop_words]
        negatives = shown_tokens(encoder, captions, words, first)
        positives = body(encoder, " ".join(drawn))
        return steering_loss(encoder.token_table.weight, first, positives, negatives, self.temperature)

    def on_after_backward(self) -> None:
        """Only the vectors of the new tokens change."""
        if self.new_tokens:
            gradient = self.model.cond_stage_model.token_table.weight.grad
            if gradient is not None:
                gradient[: int(self.first_token)] = 0.0


def trained_of(model: LatentDiffusion, what: str, rank: int, text_encoder: bool) -> list[nn.Parameter]:
    """The parameters that are trained, beside new tokens; for lora the layers are exchanged first."""
    unet = model.model.diffusion_model
    blocks = [block for block in unet.modules() if isinstance(block, BasicTransformerBlock)]
    if what == "lora":
        with_low_rank(unet, rank)
        chosen = [p for name, p in unet.named_parameters() if name.endswith((".down", ".up"))]
    elif what == "all":
        chosen = [*unet.parameters()]
    elif what == "crossattn":
        chosen = [p for block in blocks for p in block.attn2.parameters()]
    else:
        chosen = [layer.weight for block in blocks for layer in (block.attn2.to_k, block.attn2.to_v)]
    chosen = [] if what == "tokens" else chosen
    return [*chosen, *(model.cond_stage_model.parameters() if text_encoder else ())]


def add_tokens(encoder: nn.Module, new_tokens: Mapping[str, str], vectors: int) -> int:
    """Give a text encoder new tokens that begin as vectors of words; the row of the first."""
    for token, word in new_tokens.items():
        rows = encoder.token_table.weight.detach()[body(encoder, word)]  # of the word's tokens
        if not len(rows):
            raise ValueError(f"new_tokens: {token}: {word!r} is no word to begin with")
        encoder.add_token(token, rows.mean(0, keepdim=True).repeat(vectors, 1))
    encoder.token_table.weight.requires_grad_(True)
    return body(encoder, next(iter(new_tokens)))[0]


def shown_tokens(encoder: nn.Module, captions: Sequence[str], left_out: Sequence[str], first: int) -> list[int]:
    """The tokens of captions, as often as they come, without those of some words and those from `first` on."""
    ignored = {*body(encoder, " ".join(left_out))}
    return [i for caption in captions for i in body(encoder, caption) if i < first and i not in ignored]


def body(encoder: nn.Module, text: str) -> list[int]:
    """The token ids of a text, without those that frame it; each word is read alone, so no text is too long."""
    ids = []
    for word in text.split():
        words = encoder.words(word)
        ids += [words.ids[i] for places in words.positions for i in places]
    return ids
