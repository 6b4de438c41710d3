"""Data modules for `main.py`: training and validation sets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset

from ldm.checkpoint import load_config, load_weights
from ldm.data.emoji import EmojiDataset, without_style
from ldm.io.files import Count, Seed, Share
from ldm.models.autoencoder import AutoencoderKL
from ldm.training.latents import files_sha256, kept
from ldm.training.order import TrainingBatches
from ldm.util import instantiate_from_config


class ImageBatches(Dataset):
    """Images of a dataset as {"image": (3, H, W) in [-1, 1]}; with `flip`, half of them are mirrored."""

    def __init__(self, dataset: EmojiDataset, indices: Sequence[int], flip: bool = False):
        self.dataset, self.indices, self.flip = dataset, indices, flip

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        image = self.dataset[self.indices[i]]
        mirrored = self.flip and torch.rand(()) < 0.5
        return {"image": image.flip(-1) if mirrored else image}


class TrainingData(pl.LightningDataModule):
    """Batches of the datasets `train` and `val`, which `setup` of a subclass makes.

    Args:
        batch_size: images per step and process.
        seed: of the order and of the datasets' random numbers.
    """

    train: Dataset
    val: Dataset
    workers = 0  # processes that read images

    def __init__(self, batch_size: Count, seed: Seed):
        super().__init__()
        self.batch_size, self.seed = batch_size, seed

    def train_dataloader(self) -> DataLoader:
        trainer = self.trainer
        rank, processes = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        return TrainingBatches(self.train, self.batch_size, self.seed, rank, processes, self.workers)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, self.batch_size)


class EmojiImagesData(TrainingData):
    """Images for training a first stage, validated on held-out images.

    Args:
        root: folder written by `scripts/prepare_emoji.py`.
        batch_size: images per step.
        val_split, max_val: split for validation, and the greatest number of images of it.
        max_tier: 3 = all concepts, 4 = skin tones too, see `ldm.data.emoji.EmojiDataset`.
        flip: mirror half of the training images.
        seed: of the images' order and mirroring.
    """

    def __init__(
        self,
        root: str,
        batch_size: Count,
        val_split: str = "heldout_concept",
        max_val: Count = 256,
        max_tier: int = 3,
        flip: bool = False,
        seed: Seed = 23,
    ):
        super().__init__(batch_size, seed)
        self.root = root
        self.val_split, self.max_val = val_split, max_val
        self.max_tier, self.flip = max_tier, flip

    def setup(self, stage: str) -> None:
        train = EmojiDataset(self.root, split="train", max_tier=self.max_tier)
        held_out = EmojiDataset(self.root, split=self.val_split, max_tier=self.max_tier)
        spread = torch.linspace(0, len(held_out) - 1, min(self.max_val, len(held_out))).long().tolist()
        self.train = ImageBatches(train, range(len(train)), self.flip)
        self.val = ImageBatches(held_out, spread)


EmojiPicturesData = EmojiImagesData  # its name in the configurations of older runs


@dataclass(frozen=True)
class CaptionShares:
    """How often each kind of caption is drawn for an image.

    name:  share of the image's name among captions of its concept; the rest are keywords.
    group: share of captions that name only a wider group ("a heart", "an animal"), for images that have any.
    style: share of captions that name the style.
    """

    name: float = 1.0
    group: float = 0.0
    style: float = 1.0

    def __post_init__(self) -> None:
        for field, share in vars(self).items():
            if not 0.0 <= share <= 1.0:
                raise ValueError(f"{field}_share must lie in [0, 1]; got {share}")

    def draw(self, captions: Sequence[str], groups: Sequence[str]) -> str:
        """Draw one of the captions (the name first, then keywords) or of the groups, with torch's global generator."""
        if groups and self.group and torch.rand(()) < self.group:
            chosen = groups[int(torch.randint(len(groups), ()))]
        elif len(captions) > 1 and torch.rand(()) >= self.name:
            chosen = captions[int(torch.randint(1, len(captions), ()))]
        else:
            chosen = captions[0]
        return without_style(chosen) if self.style < 1.0 and torch.rand(()) >= self.style else chosen


class CaptionedLatents(Dataset):
    """Latents with one of their captions, drawn at each access.

    Args:
        latents: (N, C, h, w), or (N, 2, C, h, w): of each image and of its mirror image, one of which is drawn.
    """

    def __init__(
        self,
        latents: torch.Tensor,
        captions: Sequence[Sequence[str]],
        groups: Sequence[Sequence[str]],
        shares: CaptionShares,
    ):
        self.latents, self.captions, self.groups, self.shares = latents, captions, groups, shares

    def __len__(self) -> int:
        return len(self.latents)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor | str]:
        return {"latent": drawn(self.latents[i]), "caption": self.shares.draw(self.captions[i], self.groups[i])}


class ClassedLatents(Dataset):
    """Latents with the number of their class.

    Args:
        latents: as of `CaptionedLatents`.
        classes: of each, (N,) integers.
    """

    def __init__(self, latents: torch.Tensor, classes: torch.Tensor):
        self.latents, self.classes = latents, classes

    def __len__(self) -> int:
        return len(self.latents)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"latent": drawn(self.latents[i]), "class": self.classes[i]}


def drawn(latent: torch.Tensor) -> torch.Tensor:
    """A latent (C, h, w), or one of those of an image and its mirror image, (2, C, h, w)."""
    return latent[int(torch.randint(len(latent), ()))] if latent.ndim == 4 else latent


class EmojiLatentsData(TrainingData):
    """Latents and captions for the diffusion model, validated on held-out pairs of concept and style.

    Args:
        root: folder written by `scripts/prepare_emoji.py`.
        first_stage: config file and weights of the first stage, which encodes the images once, when training starts.
        batch_size: latents per step.
        max_tier: 1 = the most concrete concepts only, 2 = all that have prompts, see `prepare_emoji.py`.
        name_share, group_share, style_share: of the training captions, see `CaptionShares`; validation uses names with
            their style.
        flip: mirror half of the training images, but none whose name says left or right.
        max_val: greatest number of latents for validation.
        seed: of the order and the captions.
        latents: folder where the latents are kept, see `ldm.training.latents.kept`; None = encoded at every start.

    Raises:
        ValueError: a share is not in [0, 1].
    """

    def __init__(
        self,
        root: str,
        first_stage: Mapping[str, str],
        batch_size: Count,
        max_tier: int = 2,
        name_share: Share = 0.7,
        group_share: Share = 0.0,
        style_share: Share = 1.0,
        flip: bool = False,
        max_val: Count = 128,
        seed: Seed = 23,
        latents: str | None = None,
    ):
        super().__init__(batch_size, seed)
        self.root, self.first_stage, self.flip = root, first_stage, flip
        self.folder = Path(latents) if latents else None
        self.max_tier, self.max_val = max_tier, max_val
        self.shares = CaptionShares(name_share, group_share, style_share)

    def setup(self, stage: str) -> None:
        model = instantiate_from_config(load_config(self.first_stage["config"]).model)
        load_weights(model, self.first_stage["ckpt"])
        self.train = self.encoded(model.eval(), "train")
        self.val = self.encoded(model, "heldout_pair", self.max_val)

    def encoded(self, first_stage: AutoencoderKL, split: str, limit: int | None = None) -> Dataset:
        dataset = EmojiDataset(self.root, split=split, max_tier=self.max_tier)
        chosen = self.chosen(dataset)[:limit]
        return self.described(self.latents(first_stage, dataset, chosen, split), dataset, chosen, split)

    def chosen(self, dataset: EmojiDataset) -> list[int]:
        """The images that are used, by their places."""
        return list(range(len(dataset)))

    @torch.no_grad()
    def latents(
        self, first_stage: AutoencoderKL, dataset: EmojiDataset, chosen: Sequence[int], split: str
    ) -> torch.Tensor:
        """As `CaptionedLatents` takes them."""
        latents = self.means(first_stage, dataset, chosen)
        if split == "train" and self.flip:
            mirrored = self.means(first_stage, dataset, chosen, mirrored=True)
            fixed = torch.tensor([bool({"left", "right"} & {*dataset.images[i]["name"].split()}) for i in chosen])
            latents = torch.stack([latents, torch.where(fixed[:, None, None, None], latents, mirrored)], 1)
        return latents

    def means(
        self, first_stage: AutoencoderKL, dataset: EmojiDataset, chosen: Sequence[int], mirrored: bool = False
    ) -> torch.Tensor:
        """The means (N, C, h, w) of what images, or their mirror images, are encoded to."""
        images = (x.flip(-1) if mirrored else x for x in in_batches(dataset, chosen))
        if self.folder is None:
            return torch.cat([first_stage.encode(x).mode() for x in images])
        rows = [dataset.images[i]["id"] for i in chosen]
        of = {"pictures": files_sha256([Path(self.root) / "pictures.npy"]), "rows": rows, "mirrored": mirrored}
        array = kept(self.folder, of, first_stage, images, len(chosen))
        return torch.from_numpy(array[:, : array.shape[1] // 2].copy())

    def described(self, latents: torch.Tensor, dataset: EmojiDataset, chosen: Sequence[int], split: str) -> Dataset:
        """The latents with what the model is conditioned on."""
        return CaptionedLatents(
            latents,
            [dataset.captions(i) for i in chosen],
            [dataset.groups(i) for i in chosen],
            self.shares if split == "train" else CaptionShares(),
        )


class EmojiClassesData(EmojiLatentsData):
    """Latents and the group of their concept as a class, for a class-conditional model.

    Args:
        classes: the groups, in the order of their numbers; images of others are left out. None = all of the dataset, in
            the order of their names.
        by: what a group is: a "category" of the dataset (Food & Drink), or a "subgroup" (food-fruit).
        root, first_stage, batch_size, max_tier, flip, max_val, seed, latents: as of `EmojiLatentsData`.

    Raises:
        ValueError: (in setup) a class without an image; a dataset that does not state subgroups.
    """

    def __init__(
        self,
        root: str,
        first_stage: Mapping[str, str],
        batch_size: Count,
        classes: Sequence[str] | None = None,
        by: Literal["category", "subgroup"] = "category",
        max_tier: int = 2,
        flip: bool = False,
        max_val: Count = 128,
        seed: Seed = 23,
        latents: str | None = None,
    ):
        super().__init__(
            root, first_stage, batch_size, max_tier, flip=flip, max_val=max_val, seed=seed, latents=latents
        )
        self.classes, self.by = list(classes or []), by

    def chosen(self, dataset: EmojiDataset) -> list[int]:
        self.classes = self.classes or dataset.groups_by(self.by)
        return [i for i, image in enumerate(dataset.images) if image[self.by] in self.classes]

    def described(self, latents: torch.Tensor, dataset: EmojiDataset, chosen: Sequence[int], split: str) -> Dataset:
        numbers = [self.classes.index(dataset.images[i][self.by]) for i in chosen]
        if split == "train" and (empty := [self.classes[n] for n in range(len(self.classes)) if n not in numbers]):
            raise ValueError(f"classes: {self.root} has no image of {', '.join(empty)}")
        left_out = len(dataset) - len(chosen)
        if split == "train" and left_out:
            print(f"{left_out} of {len(dataset)} images are left out: they are of none of the classes")
        return ClassedLatents(latents, torch.tensor(numbers))


def in_batches(dataset: EmojiDataset, indices: Sequence[int], size: int = 64) -> Iterator[torch.Tensor]:
    """The images at these indices, (at most `size`, 3, H, W) at a time."""
    for i in range(0, len(indices), size):
        yield torch.stack([dataset[j] for j in indices[i : i + size]])
