"""Training of an encoder of texts and images, by telling which text belongs to which image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.io.files import AboveZero
from ldm.modules.encoders.dual import DualEncoder
from ldm.training.optim import ClippedTraining, adamw

LARGEST_SCALE = 100.0  # of the cosines, as in CLIP
RANK = 5


class ContrastiveTraining(ClippedTraining):
    """Trains a `DualEncoder` on batches with "features" (B, D) and a "caption" of each; see `contrastive_loss`.

    Validation images also have "image" (B, 3, H, W), "concept" and "split". It logs, for each split, the share of
    captions that have their own image, or one of their concept, among the RANK nearest of the split. Of several
    processes each compares its own images, and what they find is averaged.

    Args:
        learning_rate, scheduler_config: see `ldm.training.optim.adamw`.
    """

    def __init__(self, model: DualEncoder, learning_rate: AboveZero, scheduler_config: Mapping[str, Any] | None = None):
        super().__init__()
        self.model = model
        self.learning_rate, self.scheduler_config = learning_rate, scheduler_config
        self.seen: list[tuple[Tensor, Tensor, Sequence[str], Sequence[str]]] = []

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        texts, images = self.model.texts(batch["caption"]), self.model.images(batch["features"])
        scale = self.model.log_scale.exp().clamp(max=LARGEST_SCALE)
        loss = contrastive_loss(texts, images, batch["caption"], scale)
        self.log("train/loss", loss.detach(), batch_size=len(texts))
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        texts, images = self.model.texts(batch["caption"]), self.model.images(batch["features"])
        self.seen.append((texts, images, batch["concept"], batch["split"]))

    def on_validation_epoch_end(self) -> None:
        texts, images = (torch.cat(parts) for parts in list(zip(*self.seen, strict=True))[:2])
        concepts, splits = ([one for step in self.seen for one in step[place]] for place in (2, 3))
        self.seen.clear()
        for split in sorted({*splits}):
            rows = [row for row, its in enumerate(splits) if its == split]
            own, same = recall(texts[rows], images[rows], [concepts[row] for row in rows], RANK)
            measured = {f"val/{split}_R@{RANK}": own, f"val/{split}_concept_R@{RANK}": same}
            self.log_dict(measured, prog_bar=True, sync_dist=True)

    def configure_optimizers(self) -> dict[str, Any]:
        return adamw(self.model.parameters(), self.learning_rate, self.scheduler_config)

    @torch.no_grad()
    def images(self, batch: dict[str, Any]) -> Tensor:
        """For each caption of the batch the image of the batch that it finds, (B, 3, H, W)."""
        found = self.model.texts(batch["caption"]) @ self.model.images(batch["features"]).T
        return batch["image"][found.argmax(1)]


def contrastive_loss(texts: Tensor, images: Tensor, captions: Sequence[str], scale: Tensor) -> Tensor:
    """Cross-entropy of which image a text belongs to, and which text an image, in the mean.

    Images with the same caption are all right for it, with equal shares.

    Args:
        texts, images: embeddings of length 1, (B, D).
        captions: B texts.
        scale: of the cosines.

    Source: CLIP (arXiv 2103.00020).
    """
    number = {caption: i for i, caption in enumerate(dict.fromkeys(captions))}
    ids = torch.tensor([number[caption] for caption in captions], device=texts.device)
    right = (ids[:, None] == ids).float()
    right = right / right.sum(1, keepdim=True)  # (B, B), symmetric
    cosines = scale * texts @ images.T
    return (F.cross_entropy(cosines, right) + F.cross_entropy(cosines.T, right)) / 2


def recall(texts: Tensor, images: Tensor, concepts: Sequence[str], rank: int) -> tuple[float, float]:
    """Shares of the texts that have their own image, and any of their concept, among the nearest `rank`.

    Args:
        texts, images: embeddings of length 1, (N, D); a text belongs to the image at its place.
        concepts: of the images.
    """
    nearest = (texts @ images.T).topk(min(rank, len(images))).indices.tolist()
    own = [row in found for row, found in enumerate(nearest)]
    same = [concepts[row] in {concepts[k] for k in found} for row, found in enumerate(nearest)]
    return sum(own) / len(own), sum(same) / len(same)
