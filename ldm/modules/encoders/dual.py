"""Texts and images in one space: a small text transformer, and a projection of another network's features."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.functional import normalize

from ldm.modules.encoders.tokenizer import cut, load_tokenizer, tokenize

FIRST_TEMPERATURE = 0.07


class DualEncoder(nn.Module):
    """Embeds texts, and images by their features, so that a text lies near the images that it describes.

    Args:
        features: width of an image's features.
        width: of the embeddings.
        n_embed, n_layer, n_head: width, layers and attention heads of the text transformer.
        max_seq_len: most tokens of a text.
        tokenizer: a JSON file of the tokenizers library, see `load_tokenizer`, or such a tokenizer.
        dropout: of the text transformer, and of the features, in training.

    Source: CLIP (arXiv 2103.00020), with a frozen image network.
    """

    def __init__(
        self,
        tokenizer: str | Tokenizer,
        features: int = 1280,
        width: int = 192,
        n_embed: int = 128,
        n_layer: int = 2,
        n_head: int = 4,
        max_seq_len: int = 16,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.tokenizer, self.width = load_tokenizer(tokenizer, max_seq_len), width
        self.token_emb = nn.Embedding(self.tokenizer.get_vocab_size(), n_embed)
        self.pos_emb = nn.Parameter(0.02 * torch.randn(max_seq_len, n_embed))
        layer = nn.TransformerEncoderLayer(
            n_embed, n_head, 4 * n_embed, dropout, "gelu", batch_first=True, norm_first=True
        )
        self.transformer = nn.TransformerEncoder(layer, n_layer, nn.LayerNorm(n_embed), enable_nested_tensor=False)
        self.of_text = nn.Linear(n_embed, width, bias=False)
        self.of_image = nn.Sequential(nn.LayerNorm(features), nn.Dropout(dropout), nn.Linear(features, width))
        self.log_scale = nn.Parameter(torch.tensor(-math.log(FIRST_TEMPERATURE)))

    def texts(self, texts: Sequence[str]) -> Tensor:
        """B texts -> (B, width), of length 1."""
        return self.of_tokens(tokenize(self.tokenizer, texts).to(self.pos_emb.device))

    def of_tokens(self, tokens: Tensor) -> Tensor:
        """Texts as their tokens (B, L) -> (B, width), of length 1."""
        padding = tokens == self.tokenizer.token_to_id("[PAD]")
        x = self.transformer(self.token_emb(tokens) + self.pos_emb, src_key_padding_mask=padding)  # (B, L, n_embed)
        kept = (~padding)[..., None].float()
        return normalize(self.of_text((x * kept).sum(1) / kept.sum(1)), dim=-1)

    def images(self, features: Tensor) -> Tensor:
        """Features (B, features) -> (B, width), of length 1."""
        return normalize(self.of_image(features), dim=-1)

    def cut(self, texts: Sequence[str]) -> list[bool]:
        """Of each text whether its end is cut off, because it has more than max_seq_len tokens."""
        return cut(self.tokenizer, texts)
