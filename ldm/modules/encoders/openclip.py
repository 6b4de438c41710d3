"""The text and image encoders of OpenCLIP, as Stable Diffusion 2 and SDXL use them.

The towers are here and not taken from the open_clip package, because that imports torchvision, which not every
PyTorch has. Their state-dict keys are the published ones, and the weights come from the model's checkpoint.
Source: CLIP (arXiv 2103.00020), OpenCLIP (arXiv 2212.07143).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.modules.encoders.clip import clip_pixels
from ldm.modules.encoders.clip_tokenizer import ClipConditioner, ClipTokenizer

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "ViT-H-14": {
        "embed_dim": 1024,
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 1024, "heads": 16, "layers": 24},
        "vision_cfg": {"image_size": 224, "patch_size": 14, "width": 1280, "head_width": 80, "layers": 32},
    },
    "ViT-bigG-14": {
        "embed_dim": 1280,
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 1280, "heads": 20, "layers": 32},
    },
}
TOWERS = {"text": ("text",), "vision": ("vision",), "both": ("text", "vision")}
SKIPPED = {"last": 0, "penultimate": 1}  # blocks at the end of the text transformer that are left out


def architecture(arch: str | Mapping[str, Any]) -> Mapping[str, Any]:
    """Hyper-parameters of a known architecture, or those given: embed_dim, text_cfg, vision_cfg.

    Raises:
        ValueError: unknown architecture.
    """
    if isinstance(arch, Mapping):
        return arch
    if arch not in ARCHITECTURES:
        raise ValueError(f"arch must be one of {', '.join(ARCHITECTURES)}, or its hyper-parameters; got {arch!r}")
    return ARCHITECTURES[arch]


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), with which OpenAI's models were trained."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class ResidualBlock(nn.Module):
    """Pre-norm attention and perceptron, (B, L, width) -> (B, L, width).

    Args:
        width, heads: of the attention.
        mlp_ratio: width of the perceptron's hidden layer, relative to `width`.
        quick_gelu: its activation, see `QuickGELU`.
    """

    def __init__(self, width: int, heads: int, mlp_ratio: float = 4.0, quick_gelu: bool = False) -> None:
        super().__init__()
        hidden = int(width * mlp_ratio)
        self.ln_1 = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            OrderedDict(
                c_fc=nn.Linear(width, hidden),
                gelu=QuickGELU() if quick_gelu else nn.GELU(),
                c_proj=nn.Linear(hidden, width),
            )
        )

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        h = self.ln_1(x)
        x = x + self.attn(h, h, h, attn_mask=mask, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """Residual blocks one after the other, (B, L, width) -> (B, L, width)."""

    def __init__(self, width: int, heads: int, layers: int, mlp_ratio: float = 4.0, quick_gelu: bool = False) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(ResidualBlock(width, heads, mlp_ratio, quick_gelu) for _ in range(layers))

    def forward(self, x: Tensor, mask: Tensor | None = None, skip_last: int = 0) -> Tensor:
        for block in self.resblocks[: len(self.resblocks) - skip_last]:
            x = block(x, mask)
        return x


class Vision(nn.Module):
    """Vision transformer.

    Args:
        embed_dim: width of the embedding.
        image_size, patch_size: in pixels.
        width, layers: of the transformer.
        head_width: of one attention head.
        mlp_ratio, quick_gelu: see `ResidualBlock`.
    """

    def __init__(
        self,
        embed_dim: int,
        image_size: int,
        patch_size: int,
        width: int,
        layers: int,
        head_width: int = 64,
        mlp_ratio: float = 4.0,
        quick_gelu: bool = False,
    ) -> None:
        super().__init__()
        self.image_size = image_size
        std = width**-0.5
        self.class_embedding = nn.Parameter(std * torch.randn(width))
        self.positional_embedding = nn.Parameter(std * torch.randn((image_size // patch_size) ** 2 + 1, width))
        self.proj = nn.Parameter(std * torch.randn(width, embed_dim))
        self.conv1 = nn.Conv2d(3, width, patch_size, stride=patch_size, bias=False)
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, width // head_width, layers, mlp_ratio, quick_gelu)
        self.ln_post = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """Normalised images (B, 3, image_size, image_size) -> embeddings (B, embed_dim)."""
        x = self.conv1(x).flatten(2).transpose(1, 2)  # (B, patches, width)
        first = self.class_embedding.expand(len(x), 1, -1)
        x = torch.cat([first, x], dim=1) + self.positional_embedding
        x = self.transformer(self.ln_pre(x))
        return self.ln_post(x[:, 0]) @ self.proj


class OpenCLIP(nn.Module):
    """The parts of an OpenCLIP model that a published checkpoint holds.

    The embeddings of the text, its final norm and the scale are in every one of them, used or not.

    Args:
        embed_dim, text_cfg, vision_cfg: hyper-parameters, see `ARCHITECTURES`.
        tower: "text", "vision" or "both": the transformers that are there.
        quick_gelu: see `ResidualBlock`.
    """

    def __init__(
        self,
        tower: str,
        embed_dim: int,
        text_cfg: Mapping[str, int],
        vision_cfg: Mapping[str, Any] | None = None,
        quick_gelu: bool = False,
    ) -> None:
        super().__init__()
        width = text_cfg["width"]
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(text_cfg["context_length"], width))
        self.text_projection = nn.Parameter(width**-0.5 * torch.randn(width, embed_dim))
        self.logit_scale = nn.Parameter(torch.tensor(100.0).log())
        self.token_embedding = nn.Embedding(text_cfg["vocab_size"], width)
        self.ln_final = nn.LayerNorm(width)
        if "text" in TOWERS[tower]:
            self.transformer = Transformer(width, text_cfg["heads"], text_cfg["layers"], quick_gelu=quick_gelu)
        if "vision" in TOWERS[tower]:
            self.visual = Vision(embed_dim, **vision_cfg, quick_gelu=quick_gelu)

    def hidden(self, tokens: Tensor, skip_last: int) -> Tensor:
        """Token ids (B, L) -> (B, L, width), before the final norm, from all blocks but the last `skip_last`."""
        x = self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]
        return self.transformer(x, causal_mask(tokens), skip_last)

    def text(self, tokens: Tensor, skip_last: int) -> Tensor:
        """Token ids (B, L) -> (B, L, width), normalised, from all blocks but the last `skip_last`."""
        return self.ln_final(self.hidden(tokens, skip_last))

    def pooled(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """The output of the last block, (B, L, width), at the end token, of the highest id -> (B, embed_dim)."""
        return self.ln_final(hidden)[torch.arange(len(tokens)), tokens.argmax(1)] @ self.text_projection

    def embed_text(self, tokens: Tensor) -> Tensor:
        """Token ids (B, L) -> embeddings (B, embed_dim): what the end token has gathered."""
        return self.pooled(self.hidden(tokens, skip_last=0), tokens)


def causal_mask(tokens: Tensor) -> Tensor:
    """For token ids (B, L): which tokens each of them does not see, (L, L), those behind it."""
    length = tokens.shape[1]
    return torch.ones(length, length, dtype=torch.bool, device=tokens.device).triu(1)


class FrozenOpenCLIPEmbedder(ClipConditioner):
    """OpenCLIP's text encoder: a vector for every token (Stable Diffusion 2).

    Args:
        arch: name of the architecture (ViT-H-14), or its hyper-parameters, see `ARCHITECTURES`.
        device: where to put the weights; None = leave them where they are made.
        max_length: tokens of a text, padded with 0 or cut.
        freeze: take no gradients.
        layer: "last", or "penultimate" to leave out the last block.
        vocabulary: see `find_vocabulary`.

    Raises:
        ValueError: unknown arch or layer, or a vocabulary is named that is not there.
    """

    def __init__(
        self,
        arch: str | Mapping[str, Any] = "ViT-H-14",
        device: str | None = None,
        max_length: int = 77,
        freeze: bool = True,
        layer: str = "last",
        vocabulary: str | Path | None = None,
    ) -> None:
        if layer not in SKIPPED:
            raise ValueError(f"layer must be one of {', '.join(SKIPPED)}; got {layer!r}")
        settings = architecture(arch)
        text = settings["text_cfg"]
        super().__init__(ClipTokenizer(vocabulary, max_length, padding=0), text["vocab_size"], text["context_length"])
        self.model = OpenCLIP("text", **settings)
        self.layer = layer
        self.settle(device, freeze)

    @property
    def token_table(self) -> nn.Embedding:
        return self.model.token_embedding

    def forward(self, text: str | Sequence[str] | Tensor) -> Tensor:
        """Text (B strings), or token ids (B, L), -> (B, L, width)."""
        return self.model.text(self.tokens(text), SKIPPED[self.layer])


class FrozenOpenCLIPEmbedder2(ClipConditioner):
    """OpenCLIP's text encoder as SDXL uses it: a vector for every token, not normalised, and one for the whole text.

    Args:
        arch: name of the architecture (ViT-bigG-14), or its hyper-parameters, see `ARCHITECTURES`.
        version: which training the weights are of; they come from the model's checkpoint, so it is not used.
        device, max_length, freeze, vocabulary: see `FrozenOpenCLIPEmbedder`.
        layer: must be "penultimate": the last block is left out of the tokens' vectors.
        always_return_pooled: must be true; legacy: must be false (true would normalise the tokens' vectors).

    Raises:
        ValueError: unknown arch, another setting than these, or a vocabulary is named that is not there.

    Source: SDXL (arXiv 2307.01952), section 2.1.
    """

    def __init__(
        self,
        arch: str | Mapping[str, Any] = "ViT-bigG-14",
        version: str = "laion2b_s39b_b160k",
        device: str | None = None,
        max_length: int = 77,
        freeze: bool = True,
        layer: str = "penultimate",
        always_return_pooled: bool = True,
        legacy: bool = False,
        vocabulary: str | Path | None = None,
    ) -> None:
        if (layer, always_return_pooled, legacy) != ("penultimate", True, False):
            raise ValueError(
                f"layer, always_return_pooled and legacy must be penultimate, true and false, as in SDXL; "
                f"got {layer}, {always_return_pooled} and {legacy}"
            )
        settings = architecture(arch)
        text = settings["text_cfg"]
        super().__init__(ClipTokenizer(vocabulary, max_length, padding=0), text["vocab_size"], text["context_length"])
        self.model = OpenCLIP("text", **settings)
        self.settle(device, freeze)

    def forward(self, text: str | Sequence[str] | Tensor) -> tuple[Tensor, Tensor]:
        """Text (B strings), or token ids (B, L), -> tokens' vectors (B, L, width), and the text's (B, embed_dim)."""
        tokens = self.tokens(text)
        hidden = self.model.hidden(tokens, SKIPPED["penultimate"])  # (B, L, width)
        last = self.model.transformer.resblocks[-1](hidden, causal_mask(tokens))
        return hidden, self.model.pooled(last, tokens)


class FrozenOpenCLIPImageEmbedder(nn.Module):
    """OpenCLIP's image encoder: one vector for an image (Stable unCLIP).

    Args:
        arch, device, freeze: see `FrozenOpenCLIPEmbedder`.
        antialias: see `clip_pixels`.
    """

    def __init__(
        self,
        arch: str | Mapping[str, Any] = "ViT-H-14",
        device: str | None = None,
        freeze: bool = True,
        antialias: bool = True,
    ) -> None:
        super().__init__()
        self.model = OpenCLIP("vision", **architecture(arch))
        self.antialias = antialias
        if freeze:
            self.eval().requires_grad_(False)
        if device is not None:
            self.to(device)

    def forward(self, image: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> (B, embed_dim)."""
        return self.model.visual(clip_pixels(image, self.model.visual.image_size, self.antialias))

    def encode(self, image: Tensor) -> Tensor:
        """The same as calling it."""
        return self(image)
