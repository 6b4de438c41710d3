"""Data modules for `main.py`: what a training sees and what it is validated on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset

from ldm.checkpoint import load_weights
from ldm.data.emoji import EmojiPictures
from ldm.files import read_config
from ldm.models.autoencoder import AutoencoderKL
from ldm.util import instantiate_from_config


class PictureBatches(Dataset):
    """A picture dataset as {"image": (3, H, W) in [-1, 1]}; with `flip`, half of them mirrored."""

    def __init__(self, pictures: EmojiPictures, indices: Sequence[int], flip: bool = False):
        self.pictures, self.indices, self.flip = pictures, indices, flip

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        picture = self.pictures[self.indices[i]]
        mirrored = self.flip and torch.rand(()) < 0.5
        return {"image": picture.flip(-1) if mirrored else picture}


class EmojiPicturesData(pl.LightningDataModule):
    """Pictures alone, for a first stage, validated on held-out ones.

    Args:
        root: folder written by `scripts/prepare_emoji.py`.
        batch_size: pictures per step.
        val_split, max_val: what to validate on, and the most pictures of it.
        max_tier: 3 = all concepts, 4 = skin tones too, see `ldm.data.emoji.EmojiPictures`.
        flip: mirror half of the training pictures.
    """

    def __init__(self, root: str, batch_size: int, val_split: str = "heldout_concept", max_val: int = 256,
                 max_tier: int = 3, flip: bool = False):
        super().__init__()
        self.root, self.batch_size = root, batch_size
        self.val_split, self.max_val = val_split, max_val
        self.max_tier, self.flip = max_tier, flip

    def setup(self, stage: str) -> None:
        train = EmojiPictures(self.root, split="train", max_tier=self.max_tier)
        held_out = EmojiPictures(self.root, split=self.val_split, max_tier=self.max_tier)
        spread = torch.linspace(0, len(held_out) - 1, min(self.max_val, len(held_out))).long().tolist()
        self.train = PictureBatches(train, range(len(train)), self.flip)
        self.val = PictureBatches(held_out, spread)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, self.batch_size)


class CaptionedLatents(Dataset):
    """Latents with one of their captions at random: the first (the name) in `name_share` of the draws."""

    def __init__(self, latents: torch.Tensor, captions: Sequence[Sequence[str]], name_share: float):
        self.latents, self.captions, self.name_share = latents, captions, name_share

    def __len__(self) -> int:
        return len(self.latents)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor | str]:
        captions = self.captions[i]
        keyword = len(captions) > 1 and torch.rand(()) >= self.name_share
        chosen = captions[int(torch.randint(1, len(captions), ()))] if keyword else captions[0]
        return {"latent": self.latents[i], "caption": chosen}


class EmojiLatentsData(pl.LightningDataModule):
    """Latents and captions for the diffusion model; validated on the held-out concept x style pairs.

    Args:
        root: folder written by `scripts/prepare_emoji.py`.
        first_stage: config file and weights that encode the pictures, once, when training starts.
        batch_size: latents per step.
        max_tier: 1 = the most concrete concepts only, 2 = all that have prompts, see `prepare_emoji.py`.
        name_share: share of captions that are the picture's name; the rest are keywords.
        max_val: most latents to validate on.
    """

    def __init__(self, root: str, first_stage: Mapping[str, str], batch_size: int, max_tier: int = 2,
                 name_share: float = 0.7, max_val: int = 128):
        super().__init__()
        self.root, self.first_stage, self.batch_size = root, first_stage, batch_size
        self.max_tier, self.name_share, self.max_val = max_tier, name_share, max_val

    def setup(self, stage: str) -> None:
        model = instantiate_from_config(read_config(self.first_stage["config"]).model)
        load_weights(model, self.first_stage["ckpt"])
        self.train = self.encoded(model.eval(), "train")
        self.val = self.encoded(model, "heldout_pair", self.max_val)

    @torch.no_grad()
    def encoded(self, first_stage: AutoencoderKL, split: str, limit: int | None = None) -> CaptionedLatents:
        pictures = EmojiPictures(self.root, split=split, max_tier=self.max_tier)
        chosen = list(range(len(pictures)))[:limit]
        latents = [first_stage.encode(torch.stack([pictures[i] for i in part])).mode()
                   for part in (chosen[i:i + 64] for i in range(0, len(chosen), 64))]
        name_share = self.name_share if split == "train" else 1.0
        return CaptionedLatents(torch.cat(latents), [pictures.captions(i) for i in chosen], name_share)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, self.batch_size)
