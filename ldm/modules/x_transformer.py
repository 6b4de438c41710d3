"""A BERT-style text encoder under the state-dict keys of the published text-to-image models."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
