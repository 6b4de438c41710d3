"""A tiny CLIP of the transformers library in a folder, as its users have it, with a vocabulary."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import CLIPConfig, CLIPModel

from tests.helpers.clip_vocabulary import lines
from tests.helpers.tiny_clip import TINY_TEXT, TINY_VISION


def write_clip(folder: Path) -> Path:
    """Embeddings are 8 wide."""
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=TINY_TEXT, vision_config=TINY_VISION, projection_dim=8)).save_pretrained(folder)
    (folder / "merges.txt").write_text("\n".join(lines()), encoding="utf-8")
    return folder
