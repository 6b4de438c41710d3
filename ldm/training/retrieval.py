"""Data modules for retrieval: images' features with captions, and latents with the embeddings of neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset

from ldm.data.emoji import EmojiDataset
from ldm.io.files import Count, Seed, Share
from ldm.modules.efficientnet import EfficientNetFeatures
from ldm.retrieval.embedders import Emoji, load_dual_encoder
from ldm.retrieval.search import nearest_others
from ldm.training.data import CaptionShares, EmojiLatentsData, TrainingData, drawn, in_batches
from ldm.training.latents import files_sha256, kept

SIDE = Emoji.side
HELD_OUT = ("heldout_pair", "heldout_concept")


def features_of(dataset: EmojiDataset, chosen: Sequence[int], root: str, folder: Path) -> Tensor:
    """Features of images by EfficientNet-lite0, (N, D), which the folder keeps."""
    of = {"pictures": files_sha256([Path(root) / "pictures.npy"]), "rows": [dataset.images[i]["id"] for i in chosen]}
    images = (F.interpolate(x, (SIDE, SIDE), mode="bilinear", antialias=True) for x in in_batches(dataset, chosen))
    array = kept(folder, of, EfficientNetFeatures(), images, len(chosen))
    return torch.from_numpy(array.copy())


class CaptionedFeatures(Dataset):
    """Features of the images of a dataset, each with one of its captions, drawn at each access.

    shown: the examples also have the image, its concept and its split.
    """

    def __init__(self, dataset: EmojiDataset, features: Tensor, shares: CaptionShares, shown: str | None = None):
        self.dataset, self.features, self.shares, self.shown = dataset, features, shares, shown

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, i: int) -> dict[str, Any]:
        caption = self.shares.draw(self.dataset.captions(i), self.dataset.groups(i))
        example = {"features": self.features[i], "caption": caption}
        if self.shown is None:
            return example
        return example | {"image": self.dataset[i], "concept": self.dataset.images[i]["concept"], "split": self.shown}


class EmojiFeaturesData(TrainingData):
    """Features and captions for an encoder of both, validated on the names of all held-out images.

    Args:
        root: folder written by `scripts/prepare_emoji.py`.
        features: folder where features are kept, see `ldm.training.latents.kept`.
        batch_size: images per step.
        max_tier, name_share, group_share, style_share: as of `EmojiLatentsData`.
        seed: of the order and the captions.
    """

    def __init__(
        self,
        root: str,
        features: str,
        batch_size: Count,
        max_tier: int = 2,
        name_share: Share = 0.7,
        group_share: Share = 0.0,
        style_share: Share = 1.0,
        seed: Seed = 23,
    ):
        super().__init__(batch_size, seed)
        self.root, self.folder, self.max_tier = root, Path(features), max_tier
        self.shares = CaptionShares(name_share, group_share, style_share)

    def setup(self, stage: str) -> None:
        self.train = self.of_split("train", self.shares)
        self.val = ConcatDataset([self.of_split(split, CaptionShares(), split) for split in HELD_OUT])

    def of_split(self, split: str, shares: CaptionShares, shown: str | None = None) -> CaptionedFeatures:
        dataset = EmojiDataset(self.root, split=split, max_tier=self.max_tier)
        features = features_of(dataset, range(len(dataset)), self.root, self.folder)
        return CaptionedFeatures(dataset, features, shares, shown)


class LatentsWithNeighbours(Dataset):
    """Latents, each with the embeddings of its neighbours, nearest first.

    Args:
        latents: see `ldm.training.data.drawn`.
        embeddings: of all rows that can be neighbours, (M, D), of length 1.
        neighbours: rows of each latent, (N, k).
    """

    def __init__(self, latents: Tensor, embeddings: Tensor, neighbours: Tensor):
        self.latents, self.embeddings, self.neighbours = latents, embeddings, neighbours

    def __len__(self) -> int:
        return len(self.latents)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"latent": drawn(self.latents[i]), "nn_embeddings": self.embeddings[self.neighbours[i]]}


class EmojiNeighboursData(EmojiLatentsData):
    """Latents and the embeddings of their k nearest training images, for retrieval-augmented diffusion.

    A training image is never its own neighbour. Embeddings are a dual encoder's.

    Args:
        encoder: config file and weights of the dual encoder.
        k: neighbours of each image.
        features: folder where features are kept, see `ldm.training.latents.kept`.
        without_styles: styles that are neither trained on nor neighbours.
        root, first_stage, batch_size, max_tier, flip, max_val, seed, latents: as of `EmojiLatentsData`.
    """

    def __init__(
        self,
        root: str,
        first_stage: dict[str, str],
        encoder: dict[str, str],
        features: str,
        batch_size: Count,
        k: Count = 4,
        without_styles: Sequence[str] = (),
        max_tier: int = 2,
        flip: bool = False,
        max_val: Count = 128,
        seed: Seed = 23,
        latents: str | None = None,
    ):
        super().__init__(
            root, first_stage, batch_size, max_tier, flip=flip, max_val=max_val, seed=seed, latents=latents
        )
        self.encoder, self.features, self.k = encoder, Path(features), k
        self.without_styles = list(without_styles)

    def setup(self, stage: str) -> None:
        train = EmojiDataset(self.root, split="train", max_tier=self.max_tier)
        if unknown := {*self.without_styles} - {image["style"] for image in train.images}:
            raise ValueError(f"without_styles: {self.root} has no style {min(unknown)!r}")
        self.rows = self.embedded(train, self.chosen(train))
        super().setup(stage)

    def chosen(self, dataset: EmojiDataset) -> list[int]:
        found = [i for i, image in enumerate(dataset.images) if image["style"] not in self.without_styles]
        if not found:
            raise ValueError(f"without_styles: none of the {len(dataset)} images of a split is left")
        return found

    @torch.no_grad()
    def embedded(self, dataset: EmojiDataset, chosen: Sequence[int]) -> Tensor:
        encoder = load_dual_encoder(Path(self.encoder["config"]), Path(self.encoder["ckpt"]))
        return encoder.images(features_of(dataset, chosen, self.root, self.features))

    def described(self, latents: Tensor, dataset: EmojiDataset, chosen: Sequence[int], split: str) -> Dataset:
        train = split == "train"
        queries = self.rows if train else self.embedded(dataset, chosen)
        own = torch.arange(len(self.rows)) if train else None
        return LatentsWithNeighbours(latents, self.rows, nearest_others(queries, self.rows, self.k, own))
