"""Training of a control network (ControlNet) on a model that stays as it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ldm.checkpoint.control import control_params
from ldm.data.conditions import as_hint, edges
from ldm.data.emoji import EmojiDataset
from ldm.io.files import AboveZero, Count, Seed, Share
from ldm.io.images import to_pil
from ldm.models.diffusion.control import Control, Controlled
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.diffusionmodules.controlnet import HINT_WIDTHS, ControlNet
from ldm.modules.ema import LitEma
from ldm.training.data import CaptionShares, TrainingData
from ldm.training.datasets import entry_of
from ldm.training.diffusion import DiffusionTraining


class ControlTraining(DiffusionTraining):
    """Trains a control network: it begins as the copy of the model's encoder, its outputs as zeros.

    A batch holds, beside what `DiffusionTraining` says, the control image, (B, C, H, W) in [0, 1].

    Args:
        model: with starting weights (ckpt_path); its network, conditioner and first stage are frozen.
        control_key: of the control images in a batch.
        hint_channels, hint_widths: see `ControlNet`.
        rest: see `DiffusionTraining`.

    Raises:
        ValueError: the model has no starting weights, or no control network is for such a UNet.

    Source: Zhang et al. (arXiv 2302.05543).
    """

    def __init__(
        self,
        model: LatentDiffusion,
        learning_rate: AboveZero,
        control_key: str = "hint",
        hint_channels: int = 3,
        hint_widths: Sequence[int] = HINT_WIDTHS,
        ema_decay: float = 0.9999,
        **rest: Any,
    ) -> None:
        if not model.ckpt_path:
            raise ValueError("model.params.ckpt_path must be given: the weights of the model that is to be controlled")
        model.cond_stage_trainable = False
        super().__init__(model, learning_rate, ema_decay=ema_decay, **rest)
        unet = model.model.diffusion_model
        params = control_params(model.model.config["params"], hint_channels, hint_widths)
        self.control_key, self.control = control_key, ControlNet(**params)
        own = self.control.state_dict()
        self.control.load_state_dict(own | {key: value for key, value in unet.state_dict().items() if key in own})
        self.network_ema = LitEma(self.control, ema_decay)
        model.requires_grad_(False)

    @property
    def trained(self) -> nn.Module:
        return self.control

    def train(self, mode: bool = True) -> ControlTraining:
        """The model stays in evaluation mode."""
        super().train(mode)
        self.model.eval()
        return self

    def predicting(self, batch: dict[str, Any]) -> Controlled:
        return Controlled(self.model.model, [Control.of(self.control, entry_of(batch, self.control_key))])


# Emoji and their edges


class CaptionedEdges(Dataset):
    """Images with one of their captions, drawn at each access, and their edges as a control network reads them.

    flip: the share that is mirrored: the edges, not the caption alone, then say what is drawn.
    """

    def __init__(self, dataset: EmojiDataset, count: int, shares: CaptionShares, flip: float = 0.0):
        self.dataset, self.count, self.shares, self.flip = dataset, count, shares, flip

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> dict[str, Tensor | str]:
        image = self.dataset[i]  # (3, H, W)
        image = image.flip(-1) if torch.rand(()) < self.flip else image
        caption = self.shares.draw(self.dataset.captions(i), self.dataset.groups(i))
        return {"image": image, "caption": caption, "hint": as_hint(edges(to_pil(image[None])[0]))}


class EmojiEdgesData(TrainingData):
    """Images, captions and edges for a control network, validated on held-out pairs of concept and style.

    Args:
        root, batch_size, name_share, max_val, seed: see `ldm.training.data.EmojiLatentsData`.
        max_tier: of the training images; validated are those of tiers 1 and 2.
        flip: the share of the training images that is mirrored.
    """

    def __init__(
        self,
        root: str,
        batch_size: Count,
        max_tier: int = 2,
        name_share: Share = 0.7,
        max_val: Count = 128,
        flip: Share = 0.0,
        seed: Seed = 23,
    ):
        super().__init__(batch_size, seed)
        self.root, self.max_tier, self.max_val, self.flip = root, max_tier, max_val, flip
        self.shares = CaptionShares(name_share)

    def setup(self, stage: str) -> None:
        train = EmojiDataset(self.root, split="train", max_tier=self.max_tier)
        held_out = EmojiDataset(self.root, split="heldout_pair", max_tier=min(2, self.max_tier))
        self.train = CaptionedEdges(train, len(train), self.shares, self.flip)
        self.val = CaptionedEdges(held_out, min(self.max_val, len(held_out)), CaptionShares())
