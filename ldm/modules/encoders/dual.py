"""Texts and images in one space: a small text transformer, and a projection of another network's features."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.functional import normalize

from ldm.modules.encoders.tokenizer import ReadsTexts, check_ids, cut, load_tokenizer, tokenize

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
        return normalize(self.of_text(mean_of(*self.states(tokens))), dim=-1)

    def states(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """What the transformer makes of tokens (B, L), (B, L, n_embed), and 1 where there is no padding, (B, L, 1)."""
        padding = tokens == self.tokenizer.token_to_id("[PAD]")
        x = self.transformer(self.token_emb(tokens) + self.pos_emb, src_key_padding_mask=padding)
        return x, (~padding)[..., None].float()

    def images(self, features: Tensor) -> Tensor:
        """Features (B, features) -> (B, width), of length 1."""
        return normalize(self.of_image(features), dim=-1)

    def cut(self, texts: Sequence[str]) -> list[bool]:
        """Whether the end of each text is cut off, because it has more than max_seq_len tokens."""
        return cut(self.tokenizer, texts)


def mean_of(states: Tensor, kept: Tensor) -> Tensor:
    """The mean over the tokens that are kept: (B, L, D), (B, L, 1) -> (B, D)."""
    return (states * kept).sum(1) / kept.sum(1)


class DualTextEmbedder(ReadsTexts, DualEncoder):
    """The texts of a dual encoder as conditioning: the text's own embedding, then one for each of its tokens.

    All lie in the space that texts share with images, so a network that was trained on embeddings of images (retrieval-
    augmented diffusion) understands the first at once. It takes the place of the first token, which starts every text
    and says nothing. Embeddings have length 1, those of padding are zeros.

    Args: see `DualEncoder`.
    """

    @property
    def token_table(self) -> nn.Embedding:
        return self.token_emb

    def forward(self, text: str | Sequence[str] | Tensor) -> Tensor:
        """Text (B strings), or token ids (B, max_seq_len), -> embeddings (B, max_seq_len, width).

        Raises:
            ValueError: an id outside of the vocabulary.
        """
        tokens = text if isinstance(text, Tensor) else self.tokenize(text)
        check_ids("tokens", tokens, self.token_emb.num_embeddings)
        states, kept = self.states(tokens.to(self.pos_emb.device))
        whole = self.of_text(mean_of(states, kept))[:, None]
        return normalize(torch.cat([whole, (self.of_text(states) * kept)[:, 1:]], dim=1), dim=-1)
