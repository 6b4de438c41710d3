"""CLIP's two encoders from a folder on this machine: images and texts to unit vectors of one space.

Source: CLIP (arXiv 2103.00020), OpenCLIP (arXiv 2212.07143).
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from evaluation.metrics import ModelError
from ldm.io.errors import one_line
from ldm.io.files import read_json
from ldm.modules.encoders.clip import MEAN, STD, from_folder
from ldm.modules.encoders.clip_tokenizer import ClipTokenizer
from ldm.modules.encoders.openclip import OpenCLIP, Vision

OPEN_CONFIG = "open_clip_config.json"
OPEN_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")
EXPECTED = (
    "expected a folder with config.json and model.safetensors of a CLIP model (such as "
    "openai/clip-vit-base-patch32), or with open_clip_config.json and open_clip_model.safetensors (or "
    "open_clip_pytorch_model.bin)"
)
TEXT_KEYS = {"context_length", "vocab_size", "width", "heads", "layers"}


class ClipModel(nn.Module, ABC):
    """Images and texts to unit vectors.

    weights: the file of the weights.
    size:    side of the vision encoder's input in pixels.
    shape:   its patch size, width and layers.
    """

    weights: Path
    size: int
    shape: tuple[int, int, int]

    def __init__(self, tokenizer: ClipTokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    @torch.no_grad()
    def embed_images(self, prepared: Tensor) -> Tensor:
        """Images (B, 3, size, size) in [-1, 1] -> (B, D), unit length."""
        mean, std = (torch.tensor(v).view(3, 1, 1).to(prepared) for v in (MEAN, STD))
        return F.normalize(self.image_features(((prepared + 1) / 2 - mean) / std))

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """B texts -> (B, D), unit length; what is too long loses its end, see `ClipTokenizer.cut`.
        Raises ValueError: the vocabulary is missing."""
        return F.normalize(self.text_features(self.tokenizer(texts).to(next(self.parameters()).device)))

    @torch.no_grad()
    def agreement(self, prepared: Tensor, texts: Sequence[str]) -> Tensor:
        """How well images, see `embed_images`, and as many texts agree: cosines at the model's own scale, (B,). That of
        PickScore is a score of preference (arXiv 2305.01569)."""
        return self.model.logit_scale.exp() * (self.embed_images(prepared) * self.embed_texts(texts)).sum(1)

    @abstractmethod
    def image_features(self, pixels: Tensor) -> Tensor:
        """Prepared images (B, 3, size, size) -> (B, D)."""

    @abstractmethod
    def text_features(self, tokens: Tensor) -> Tensor:
        """Tokens (B, L) -> (B, D)."""


class TransformersClip(ClipModel):
    """A CLIPModel of the transformers library."""

    def __init__(self, folder: Path, vocabulary: Path | None) -> None:
        super().__init__(ClipTokenizer(vocabulary))
        self.model = from_folder("CLIPModel", folder)
        config = self.model.config.vision_config
        self.weights, self.size = folder / "model.safetensors", config.image_size
        self.shape = config.patch_size, config.hidden_size, config.num_hidden_layers

    def image_features(self, pixels: Tensor) -> Tensor:
        return self.model.visual_projection(self.model.vision_model(pixel_values=pixels).pooler_output)

    def text_features(self, tokens: Tensor) -> Tensor:
        return self.model.text_projection(self.model.text_model(input_ids=tokens).pooler_output)


class OpenClip(ClipModel):
    """A vision transformer with CLIP's text encoder, as the open_clip library stores it."""

    def __init__(self, folder: Path, vocabulary: Path | None) -> None:
        settings = open_clip_settings(folder / OPEN_CONFIG)
        super().__init__(ClipTokenizer(vocabulary, settings["text_cfg"]["context_length"], padding=0))
        self.weights = next((folder / name for name in OPEN_WEIGHTS if (folder / name).is_file()), None)
        if self.weights is None:
            raise ModelError(f"{folder}: none of {', '.join(OPEN_WEIGHTS)} is there")
        vision = settings["vision_cfg"]
        self.size, self.shape = vision["image_size"], (vision["patch_size"], vision["width"], vision["layers"])
        try:
            self.model = OpenCLIP("both", **settings)
        except Exception as error:  # numbers that are none, or that don't fit each other, can fail in any way
            raise ModelError(f"{folder / OPEN_CONFIG}: no such model can be built: {one_line(error)[:200]}") from error
        try:
            self.model.load_state_dict(read_tensors(self.weights))
        except Exception as error:  # a file that is damaged or another network's can fail in any way
            raise ModelError(
                f"{self.weights}: not the weights of its {OPEN_CONFIG}: {one_line(error)[:200]}"
            ) from error

    def image_features(self, pixels: Tensor) -> Tensor:
        return self.model.visual(pixels)

    def text_features(self, tokens: Tensor) -> Tensor:
        return self.model.embed_text(tokens)


def read_tensors(path: Path) -> Mapping[str, Tensor]:
    if path.suffix == ".safetensors":
        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def open_clip_settings(path: Path) -> dict[str, Any]:
    """The arguments of `OpenCLIP` that a configuration of open_clip asks for.
    Raises ModelError: not such a file, or a model that has more than a vision transformer and CLIP's text encoder."""
    try:
        config = read_json(path)["model_cfg"]
        text, vision = dict(config["text_cfg"]), dict(config["vision_cfg"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path}: not a configuration of open_clip: {one_line(error)}") from error
    known = {*inspect.signature(Vision).parameters} - {"embed_dim", "quick_gelu"}
    whole = {"embed_dim", "text_cfg", "vision_cfg"}
    unknown = ({*vision} - known) | ({*text} - TEXT_KEYS) | ({*config} - whole - {"quick_gelu"})
    needed = {"image_size", "patch_size", "width", "layers"}
    lacking = (TEXT_KEYS - {*text}) | (needed - {*vision}) | (whole - {*config})
    if unknown or lacking:
        raise ModelError(
            f"{path}: only plain vision transformers with CLIP's text encoder are known here; "
            f"unknown: {', '.join(sorted(unknown)) or 'none'}; missing: "
            f"{', '.join(sorted(lacking)) or 'none'}"
        )
    return {
        "embed_dim": config["embed_dim"],
        "text_cfg": text,
        "vision_cfg": vision,
        "quick_gelu": bool(config.get("quick_gelu")),
    }


def load_clip(folder: str | Path | None, vocabulary: str | Path | None = None) -> ClipModel:
    """The model in a folder, in eval mode; nothing is fetched.

    Args:
        folder: of the transformers or the open_clip library, told apart by its files.
        vocabulary: see `find_vocabulary`; None = the folder's merges.txt, or that of an installed package.

    Raises ModelError: no such folder, or not such a model.
    """
    if folder is None:
        raise ModelError(f"clip: no weights are named; {EXPECTED}")
    folder = Path(folder)
    files = {"config.json": TransformersClip, OPEN_CONFIG: OpenClip}
    kind = next((kind for name, kind in reversed(files.items()) if (folder / name).is_file()), None)
    if kind is None:
        raise ModelError(f"clip: {folder}: no such model; {EXPECTED}")
    if vocabulary is None and (folder / "merges.txt").is_file():
        vocabulary = folder / "merges.txt"
    try:
        return kind(folder, vocabulary).eval().requires_grad_(False)
    except ModelError:
        raise
    except ValueError as error:
        raise ModelError(f"clip: {one_line(error)}") from error
