"""OpenAI's CLIP through the transformers library, as Stable Diffusion 1 and retrieval-augmented diffusion use it.

Nothing is fetched: an encoder is built from its hyper-parameters and filled from the diffusion model's checkpoint,
or read from a folder. Source: CLIP (arXiv 2103.00020).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.modules.encoders.clip_tokenizer import ClipConditioner, ClipTokenizer

TEXT_MODELS: dict[str, dict[str, Any]] = {
    "openai/clip-vit-large-patch14": {
        "vocab_size": 49408,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "projection_dim": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": 77,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "bos_token_id": 49406,
        "eos_token_id": 49407,
        "pad_token_id": 49407,
    }
}


def transformers() -> ModuleType:
    """The library, which takes seconds to import.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import transformers as library
    except ModuleNotFoundError as error:
        raise ValueError(
            "the CLIP text encoder of Stable Diffusion 1 needs the transformers library, which is not "
            "installed: pip install -e '.[text]'"
        ) from error
    return library


class FrozenCLIPEmbedder(ClipConditioner):
    """CLIP's text encoder: a vector for every token (Stable Diffusion 1, and one of the two of SDXL).

    Args:
        version: name of the model (openai/clip-vit-large-patch14), or its hyper-parameters as transformers'
            CLIPTextConfig takes them.
        device: where to put the weights; None = leave them where they are made.
        max_length: tokens of a text, padded with the end token or cut.
        freeze: take no gradients.
        vocabulary: see `find_vocabulary`.
        layer: "last" = after the last block and the final norm; "hidden" = what block `layer_idx` gets, without a norm.
        layer_idx: 0 (the embedded tokens) .. number of blocks; only with layer "hidden".

    Raises:
        ValueError: unknown version or layer, transformers is missing, or a vocabulary is named that is not there.
    """

    def __init__(
        self,
        version: str | Mapping[str, Any] = "openai/clip-vit-large-patch14",
        device: str | None = None,
        max_length: int = 77,
        freeze: bool = True,
        vocabulary: str | Path | None = None,
        layer: str = "last",
        layer_idx: int | None = None,
    ) -> None:
        if isinstance(version, str) and version not in TEXT_MODELS:
            raise ValueError(f"version must be one of {', '.join(TEXT_MODELS)}, or hyper-parameters; got {version!r}")
        settings = dict(TEXT_MODELS[version] if isinstance(version, str) else version)
        self._check_layer(layer, layer_idx, settings["num_hidden_layers"])
        super().__init__(
            ClipTokenizer(vocabulary, max_length), settings["vocab_size"], settings["max_position_embeddings"]
        )
        library = transformers()
        # CLIPTextModel dropped the prefix "text_model." of its keys in version 5; inside this class it never had one.
        tower = library.CLIPTextModelWithProjection(library.CLIPTextConfig(**settings)).text_model
        self.transformer = nn.ModuleDict({"text_model": tower})
        self.layer_idx = layer_idx
        self.settle(device, freeze)

    @property
    def token_table(self) -> nn.Embedding:
        return self.transformer["text_model"].embeddings.token_embedding

    @staticmethod
    def _check_layer(layer: str, layer_idx: int | None, blocks: int) -> None:
        if layer not in ("last", "hidden"):
            raise ValueError(f"layer must be last or hidden; got {layer!r}")
        if (layer == "hidden") != (layer_idx is not None) or not 0 <= (layer_idx or 0) <= blocks:
            raise ValueError(
                f"layer_idx must be 0..{blocks} with layer hidden, and left out with last; got {layer_idx} with {layer}"
            )

    def forward(self, text: str | Sequence[str] | Tensor) -> Tensor:
        """Text (B strings), or token ids (B, L), -> (B, L, hidden_size)."""
        tower, tokens = self.transformer["text_model"], self.tokens(text)
        if self.layer_idx is None:
            return tower(input_ids=tokens).last_hidden_state
        return tower(input_ids=tokens, output_hidden_states=True).hidden_states[self.layer_idx]


def from_folder(name: str, weights: str | Path | None) -> nn.Module:
    """A transformers model, with its weights, from a folder with config.json and model.safetensors.

    Raises:
        ValueError: no such folder, or not such a model.
    """
    if weights is None or not Path(weights).is_dir():
        raise ValueError(
            f"weights: {weights}: no such folder; the diffusion model's checkpoint does not hold this "
            f"encoder: download config.json and model.safetensors of openai/clip-vit-large-patch14 "
            f"into a folder and set weights to it"
        )
    library = transformers()
    library.utils.logging.disable_progress_bar()  # it is quick, and the bar would go into files too
    library.utils.logging.set_verbosity_error()  # a folder of both encoders has more than one of them; see below
    try:
        model, info = getattr(library, name).from_pretrained(
            weights, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except (OSError, RuntimeError) as error:
        raise ValueError(f"weights: {weights}: not a {name} of transformers: {' '.join(str(error).split())}") from error
    missing = [key for key in info["missing_keys"] if not key.endswith("position_ids")]
    if missing:
        raise ValueError(f"weights: {weights}: {len(missing)} weights of {name} are missing, such as {missing[0]}")
    return model


class FrozenCLIPTextEmbedder(ClipConditioner):
    """CLIP's embedding of a text, one vector beside those of retrieved images (retrieval-augmented diffusion).

    Args:
        weights: folder of the CLIP model, see `from_folder`.
        device, max_length, vocabulary: see `FrozenCLIPEmbedder`.
        n_repeat: how often the vector is given.
        normalize: make it unit length.

    Raises:
        ValueError: see `from_folder`.

    Source: arXiv 2204.11824.
    """

    def __init__(
        self,
        weights: str | Path | None = None,
        device: str | None = None,
        max_length: int = 77,
        n_repeat: int = 1,
        normalize: bool = True,
        vocabulary: str | Path | None = None,
    ) -> None:
        model = from_folder("CLIPTextModelWithProjection", weights)
        super().__init__(
            ClipTokenizer(vocabulary, max_length), model.config.vocab_size, model.config.max_position_embeddings
        )
        self.model, self.n_repeat, self.normalize = model, n_repeat, normalize
        self.settle(device, freeze=True)

    def forward(self, text: str | Sequence[str] | Tensor) -> Tensor:
        """Text (B strings), or token ids (B, L), -> (B, n_repeat, D)."""
        z = self.model(input_ids=self.tokens(text)).text_embeds
        z = z / z.norm(dim=1, keepdim=True) if self.normalize else z
        return z[:, None].expand(-1, self.n_repeat, -1)


class FrozenClipImageEmbedder(nn.Module):
    """CLIP's embedding of an image, not normalised (retrieval-augmented diffusion, arXiv 2204.11824).

    Args:
        weights: folder of the CLIP model, see `from_folder`.
        device: where to put the weights; None = leave them where they are made.
        antialias: see `clip_pixels`.

    Raises:
        ValueError: see `from_folder`.
    """

    def __init__(self, weights: str | Path | None = None, device: str | None = None, antialias: bool = False) -> None:
        super().__init__()
        self.model = from_folder("CLIPVisionModelWithProjection", weights).eval().requires_grad_(False)
        self.antialias = antialias
        if device is not None:
            self.to(device)

    def forward(self, image: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> (B, D)."""
        return self.model(pixel_values=clip_pixels(image, self.model.config.image_size, self.antialias)).image_embeds

    def encode(self, image: Tensor) -> Tensor:
        """The same as calling it."""
        return self(image)


MEAN = (0.48145466, 0.4578275, 0.40821073)  # of red, green, blue in the images CLIP was trained on, 0..1
STD = (0.26862954, 0.26130258, 0.27577711)


def clip_pixels(x: Tensor, size: int, antialias: bool) -> Tensor:
    """Images (B, 3, H, W) in [-1, 1] -> (B, 3, size, size), normalised as CLIP expects; stretched, not cropped.

    antialias: smooth before shrinking. PyTorch's filter does that here, the published models were trained with
    another (a Gaussian blur); without it the resize is the published one.

    Raises:
        ValueError: x is not three channels.
    """
    if x.ndim != 4 or x.shape[1] != 3:
        raise ValueError(f"images must have the shape (B, 3, H, W); got {tuple(x.shape)}")
    corners = None if antialias else True
    x = F.interpolate(x, size=(size, size), mode="bicubic", align_corners=corners, antialias=antialias)
    mean, std = (torch.tensor(v, dtype=x.dtype, device=x.device).view(3, 1, 1) for v in (MEAN, STD))
    return ((x + 1) / 2 - mean) / std
