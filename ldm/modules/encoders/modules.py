"""Conditioners: what turns a class, a text or a map into what the UNet takes.

Published configs name all conditioners in this module; those on CLIP are in neighbours of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.compatibility import AbstractEncoder
from ldm.modules.diffusionmodules.upscaling import CLIPEmbeddingNoiseAugmentation
from ldm.modules.encoders.clip import FrozenCLIPEmbedder, FrozenClipImageEmbedder, FrozenCLIPTextEmbedder
from ldm.modules.encoders.general import ConcatTimestepEmbedderND, GeneralConditioner
from ldm.modules.encoders.openclip import FrozenOpenCLIPEmbedder, FrozenOpenCLIPEmbedder2, FrozenOpenCLIPImageEmbedder
from ldm.modules.encoders.tokenizer import ReadsTexts, check_ids, load_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = [
    "AbstractEncoder",
    "BERTEmbedder",
    "CLIPEmbeddingNoiseAugmentation",
    "ClassEmbedder",
    "ClassLabels",
    "ConcatTimestepEmbedderND",
    "FrozenCLIPEmbedder",
    "FrozenCLIPTextEmbedder",
    "FrozenClipImageEmbedder",
    "FrozenOpenCLIPEmbedder",
    "FrozenOpenCLIPEmbedder2",
    "FrozenOpenCLIPImageEmbedder",
    "GeneralConditioner",
    "SpatialRescaler",
    "TransformerEmbedder",
]
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "area")


def class_indices(batch: Tensor | Mapping[str, Tensor], key: str, n_classes: int) -> Tensor:
    """Class indices (B,), from themselves or from the batch that holds them under `key`.

    Raises:
        ValueError: no such entry, another shape, or an index out of range.
    """
    if isinstance(batch, Mapping) and key not in batch:
        raise ValueError(f"batch must have the entry {key!r}; got {sorted(map(str, batch))}")
    classes = batch[key] if isinstance(batch, Mapping) else batch
    if classes.ndim != 1 or classes.is_floating_point():
        raise ValueError(f"{key} must be integers of shape (B,); got {classes.dtype} {tuple(classes.shape)}")
    check_ids(key, classes, n_classes)
    return classes


class ClassLabels(nn.Module):
    """The classes themselves, for a network that has an embedding of them.

    Args:
        n_classes: number of classes, the one that stands for none included.
        key: entry of a batch that holds the class indices.
    """

    def __init__(self, n_classes: int, key: str = "class") -> None:
        super().__init__()
        self.n_classes, self.key = n_classes, key

    def forward(self, batch: Tensor | Mapping[str, Tensor]) -> Tensor:
        """Class indices (B,), as `class_indices` takes them."""
        return class_indices(batch, self.key, self.n_classes)


class ClassEmbedder(nn.Module):
    """One learned token for each class.

    Args:
        embed_dim: width of the token.
        n_classes: number of classes, any unconditional one included.
        key: entry of a batch that holds the class indices.
        ucg_rate: share of classes that are replaced by the last one in training, for guidance. Stability's code does so
            while sampling too.
    """

    def __init__(self, embed_dim: int, n_classes: int = 1000, key: str = "class", ucg_rate: float = 0.0) -> None:
        super().__init__()
        self.key, self.ucg_rate = key, ucg_rate
        self.n_classes = n_classes
        self.embedding = nn.Embedding(n_classes, embed_dim)

    def forward(self, batch: Tensor | Mapping[str, Tensor], disable_dropout: bool = False) -> Tensor:
        """Class indices (B,), or a batch that holds them under `key`, -> (B, 1, embed_dim).

        disable_dropout: no class is replaced.

        Raises:
            ValueError: no such entry, another shape, or an index out of range.
        """
        classes = class_indices(batch, self.key, self.n_classes)
        if self.ucg_rate > 0.0 and self.training and not disable_dropout:
            dropped = torch.bernoulli(torch.full((len(classes), 1), self.ucg_rate, device=classes.device))[:, 0] > 0
            classes = torch.where(dropped, self.n_classes - 1, classes)
        return self.embedding(classes.to(self.embedding.weight.device))[:, None]


class TransformerEmbedder(nn.Module):
    """Transformer over token ids.

    Args:
        n_embed: width D of the embedding.
        n_layer: attention layers, and feed-forward layers.
        vocab_size: number of token ids.
        max_seq_len: most tokens in a text.
        device: where to put the weights; None = leave them where they are made.
        embedding_dropout: dropout of the embedded tokens in training.
    """

    def __init__(
        self,
        n_embed: int,
        n_layer: int,
        vocab_size: int,
        max_seq_len: int = 77,
        device: str | None = None,
        embedding_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        layers = Encoder(n_embed, n_layer)
        self.transformer = TransformerWrapper(vocab_size, max_seq_len, layers, embedding_dropout)
        if device is not None:
            self.to(device)

    def forward(self, tokens: Tensor) -> Tensor:
        """Token ids (B, L), L at most max_seq_len, -> embeddings (B, L, D).

        Raises:
            ValueError: another shape or type, or an id outside of the vocabulary.
        """
        check_ids("tokens", tokens, self.transformer.num_tokens)
        tokens = tokens.to(self.transformer.token_emb.weight.device)
        return self.transformer(tokens, return_embeddings=True)

    def encode(self, tokens: Tensor) -> Tensor:
        """The same as calling it."""
        return self(tokens)


class BERTEmbedder(ReadsTexts, TransformerEmbedder):
    """Transformer over text, with the tokenizer that belongs to its weights.

    Args:
        n_embed, n_layer, max_seq_len, device, embedding_dropout: see TransformerEmbedder.
        vocab_size: number of token ids, at least those of the tokenizer.
        use_tokenizer: whether text is accepted; token ids always are.
        tokenizer: a JSON file of the tokenizers library (looked for by `ldm.io.files.find_file`), or such a
            tokenizer; None = only token ids can be encoded.

    Raises:
        ValueError: the tokenizer is missing, broken, unwanted, or larger than vocab_size.
    """

    def __init__(
        self,
        n_embed: int,
        n_layer: int,
        vocab_size: int = 30522,
        max_seq_len: int = 77,
        device: str | None = None,
        use_tokenizer: bool = True,
        embedding_dropout: float = 0.0,
        tokenizer: str | Tokenizer | None = None,
    ) -> None:
        super().__init__(n_embed, n_layer, vocab_size, max_seq_len, device, embedding_dropout)
        self.tokenizer = None
        if tokenizer is None:
            return
        if not use_tokenizer:
            raise ValueError("tokenizer must be None with use_tokenizer=False, which takes token ids only")
        self.tokenizer = load_tokenizer(tokenizer, max_seq_len)
        needed = self.tokenizer.get_vocab_size()
        if needed > vocab_size:
            raise ValueError(f"vocab_size must be at least the tokenizer's {needed}; got {vocab_size}")

    @property
    def token_table(self) -> nn.Embedding:
        return self.transformer.token_emb

    def add_token(self, name: str, vectors: Tensor) -> None:
        super().add_token(name, vectors)
        self.transformer.num_tokens = self.token_table.num_embeddings

    def forward(self, text: str | Sequence[str] | Tensor) -> Tensor:
        """Text (B strings), or token ids (B, L), -> embeddings (B, L, D)."""
        return super().forward(text if isinstance(text, Tensor) else self.tokenize(text))


class SpatialRescaler(nn.Module):
    """Resize a map, several times over if need be, and map its channels linearly.

    Args:
        n_stages: how often to resize; 0 = not at all.
        method: nearest, bilinear, bicubic or area.
        multiplier: factor of one resize.
        in_channels: channels of the input, if they are mapped.
        out_channels: channels to map to; None = keep the input's.
        bias: of that mapping.

    Raises:
        ValueError: unknown method, negative n_stages.
    """

    def __init__(
        self,
        n_stages: int = 1,
        method: str = "bilinear",
        multiplier: float = 0.5,
        in_channels: int = 3,
        out_channels: int | None = None,
        bias: bool = False,
    ) -> None:
        super().__init__()
        if n_stages < 0:
            raise ValueError(f"n_stages must not be negative; got {n_stages}")
        if method not in INTERPOLATIONS:
            raise ValueError(f"method must be one of {', '.join(INTERPOLATIONS)}; got {method!r}")
        self.n_stages = n_stages
        self.method = method
        self.multiplier = multiplier
        self.channel_mapper = None
        if out_channels is not None:
            self.channel_mapper = nn.Conv2d(in_channels, out_channels, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C_out, H * multiplier ** n_stages, W * multiplier ** n_stages)."""
        for _ in range(self.n_stages):
            x = F.interpolate(x, scale_factor=self.multiplier, mode=self.method)
        return x if self.channel_mapper is None else self.channel_mapper(x)

    def encode(self, x: Tensor) -> Tensor:
        """The same as calling it."""
        return self(x)


# The transformer of the text encoders above, under the state-dict keys of the published text-to-image models


class Attention(nn.Module):
    """Multi-head self-attention, (B, L, dim) -> (B, L, dim)."""

    def __init__(self, dim: int, heads: int, dim_head: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_k = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_v = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_out = nn.Linear(heads * dim_head, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for project in (self.to_q, self.to_k, self.to_v)
        )  # (B, heads, L, dim_head)
        return self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Two-layer perceptron with GELU, (B, L, dim) -> (B, L, dim)."""

    def __init__(self, dim: int, mult: int = 4) -> None:
        super().__init__()
        # The published keys are net.0.0 and net.2.
        self.net = nn.Sequential(
            nn.Sequential(nn.Linear(dim, mult * dim), nn.GELU()), nn.Identity(), nn.Linear(mult * dim, dim)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Encoder(nn.Module):
    """Pre-norm transformer: attention and feed-forward in turn, each after a LayerNorm and with a residual.

    Args:
        dim: width of the tokens.
        depth: number of attention layers, and of feed-forward layers.
        heads, dim_head: number and width of the attention heads, whatever dim is.
    """

    def __init__(self, dim: int, depth: int, heads: int = 8, dim_head: int = 64) -> None:
        super().__init__()
        self.dim = dim
        self.layers = nn.ModuleList(
            nn.ModuleList((nn.LayerNorm(dim), layer))
            for _ in range(depth)
            for layer in (Attention(dim, heads, dim_head), FeedForward(dim))
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, dim) -> (B, L, dim), not normalised at the end."""
        for norm, layer in self.layers:
            x = x + layer(norm(x))
        return x


class AbsolutePositionalEmbedding(nn.Module):
    """A learned vector for each position, (1, L, dim)."""

    def __init__(self, dim: int, max_seq_len: int) -> None:
        super().__init__()
        self.emb = nn.Embedding(max_seq_len, dim)

    def forward(self, length: int) -> Tensor:
        return self.emb.weight[None, :length]


class TransformerWrapper(nn.Module):
    """Token and position embeddings, an encoder and the final LayerNorm.

    Args:
        num_tokens: size of the vocabulary.
        max_seq_len: number of positions.
        attn_layers: the encoder.
        emb_dropout: dropout of the embedded input.
    """

    def __init__(self, num_tokens: int, max_seq_len: int, attn_layers: Encoder, emb_dropout: float = 0.0) -> None:
        super().__init__()
        dim = attn_layers.dim
        self.num_tokens = num_tokens
        self.max_seq_len = max_seq_len
        self.token_emb = nn.Embedding(num_tokens, dim)
        self.pos_emb = AbsolutePositionalEmbedding(dim, max_seq_len)
        self.emb_dropout = nn.Dropout(emb_dropout)
        self.attn_layers = attn_layers
        self.norm = nn.LayerNorm(dim)
        # Published checkpoints hold it, though conditioning uses the embeddings only.
        self.to_logits = nn.Linear(dim, num_tokens)
        nn.init.normal_(self.token_emb.weight, std=0.02)
        nn.init.normal_(self.pos_emb.emb.weight, std=0.02)

    def forward(self, tokens: Tensor, return_embeddings: bool = False) -> Tensor:
        """Embeddings (B, L, dim), or token logits (B, L, num_tokens), of token ids.

        Args:
            tokens: (B, L), integers 0..num_tokens-1, L at most max_seq_len.
            return_embeddings: the normalised embeddings, not the logits.

        Raises:
            ValueError: tokens of another shape or type, or too many of them.
        """
        if tokens.ndim != 2 or tokens.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"tokens must be integers of shape (B, L); got {tokens.dtype} {tuple(tokens.shape)}")
        if tokens.shape[1] > self.max_seq_len:
            raise ValueError(f"tokens must be at most max_seq_len = {self.max_seq_len} long; got {tokens.shape[1]}")
        x = self.token_emb(tokens) + self.pos_emb(tokens.shape[1])  # (B, L, dim)
        x = self.norm(self.attn_layers(self.emb_dropout(x)))  # (B, L, dim)
        return x if return_embeddings else self.to_logits(x)
