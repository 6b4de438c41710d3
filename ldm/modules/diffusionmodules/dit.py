"""The diffusion transformer (DiT), split after one of its blocks into an encoder and a decoder."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.modules.diffusionmodules.util import Features, Unshared, timestep_embedding, zero_module

TIME_WIDTH = 256  # of the sinusoidal embedding
EPS = 1e-6  # of the layer normalisations


def position_embedding(side: int, width: int) -> Tensor:
    """Fixed embedding of the places of a square grid, row by row, (1, side * side, width), float32.

    The first half of the channels is of the column, the second of the row, each [sin | cos].

    Raises:
        ValueError: width is not a multiple of 4.
    """
    if width % 4:
        raise ValueError(f"hidden_size must be a multiple of 4; got {width}")
    rates = 10000.0 ** -(np.arange(width // 4, dtype=np.float64) / (width / 4))
    angles = np.outer(np.arange(side, dtype=np.float64), rates)  # (side, width / 4)
    line = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)  # (side, width / 2)
    of_columns, of_rows = np.tile(line, (side, 1)), line.repeat(side, axis=0)
    return torch.tensor(np.concatenate([of_columns, of_rows], axis=1)[None], dtype=torch.float32)


def _normalised(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Layer normalisation of (B, T, D) with the shift and scale, (B, D), that the condition gives."""
    return torch.addcmul(shift[:, None], F.layer_norm(x, x.shape[-1:], eps=EPS), 1 + scale[:, None])


class _Modulation(nn.Sequential):
    """(B, D) -> `parts` tensors (B, D); all zero before training, so that a block begins as the identity."""

    def __init__(self, width: int, parts: int) -> None:
        super().__init__(nn.SiLU(), zero_module(nn.Linear(width, parts * width)))
        self.parts = parts

    def forward(self, c: Tensor) -> tuple[Tensor, ...]:
        return super().forward(c).chunk(self.parts, dim=1)


class GELULinear(nn.Linear):
    """A linear layer and, of its result, GELU as approximated by tanh."""

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(super().forward(x), approximate="tanh")


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, heads, T, D / heads)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class _MLP(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = GELULinear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x))


class Block(nn.Module):
    """A transformer block whose normalisations take shift, scale and gate from the condition (adaLN-Zero)."""

    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.attn = _Attention(width, heads)
        self.mlp = _MLP(width, int(width * mlp_ratio))
        self.adaLN_modulation = _Modulation(width, 6)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """(B, T, D), (B, D) -> (B, T, D)."""
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.adaLN_modulation(c)
        x = torch.addcmul(x, gate[:, None], self.attn(_normalised(x, shift, scale)))
        return torch.addcmul(x, mlp_gate[:, None], self.mlp(_normalised(x, mlp_shift, mlp_scale)))


class _FinalLayer(nn.Module):
    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.linear = zero_module(nn.Linear(width, out))
        self.adaLN_modulation = _Modulation(width, 2)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return self.linear(_normalised(x, *self.adaLN_modulation(c)))


class _PatchEmbedding(nn.Module):
    def __init__(self, channels: int, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)  # (B, T, D), row by row


class _TimeEmbedding(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(TIME_WIDTH, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        return self.mlp(timestep_embedding(t, TIME_WIDTH).to(self.mlp[0].weight.dtype))


class _LabelEmbedding(nn.Module):
    def __init__(self, labels: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(labels, width)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)


class DiT(Unshared):
    """Diffusion transformer for square latents, conditioned on the timestep and a class.

    Args:
        input_size: height and width of the latents, a multiple of patch_size; no other size is taken.
        patch_size: side of the squares of latents that become one token.
        in_channels: channels of the latents.
        hidden_size: width of the tokens.
        depth: blocks.
        num_heads: of attention.
        mlp_ratio: width of the blocks' hidden layer, as a multiple of hidden_size.
        class_dropout_prob: above 0 there is one class more, which stands for none. Which images of a training get it
            is not decided here.
        num_classes: classes, without that one.
        learn_sigma: the network predicts, beside each channel, where its variance lies between the two bounds.
        encoder_blocks: blocks before the split; those after it and the final layer are the decoder.

    Raises:
        ValueError: sizes that do not divide, or no block on one side of the split.

    Source: Peebles and Xie (arXiv 2212.09748), with the published names of weights; the split: Faster Diffusion (arXiv
    2312.09608), whose encoder is the first 18 of 28 blocks.
    """

    context_dim = None
    input_blocks: Sequence[nn.Module] = ()  # a transformer has no skips, so no outer blocks that could run alone
    output_blocks: Sequence[nn.Module] = ()

    def __init__(
        self,
        input_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1,
        num_classes: int = 1000,
        learn_sigma: bool = True,
        encoder_blocks: int = 18,
    ) -> None:
        super().__init__()
        if input_size % patch_size:
            raise ValueError(f"input_size must be a multiple of patch_size {patch_size}; got {input_size}")
        if hidden_size % num_heads:
            raise ValueError(f"hidden_size must be a multiple of num_heads {num_heads}; got {hidden_size}")
        if not 1 <= encoder_blocks < depth:
            raise ValueError(f"encoder_blocks must be 1..{depth - 1} of {depth} blocks; got {encoder_blocks}")
        self.input_size, self.patch_size = input_size, patch_size
        self.in_channels = in_channels
        self.out_channels = 2 * in_channels if learn_sigma else in_channels
        self.encoder_blocks = encoder_blocks
        self.num_classes = num_classes + (class_dropout_prob > 0)

        self.x_embedder = _PatchEmbedding(in_channels, hidden_size, patch_size)
        self.t_embedder = _TimeEmbedding(hidden_size)
        self.y_embedder = _LabelEmbedding(self.num_classes, hidden_size)
        self.register_buffer("pos_embed", position_embedding(input_size // patch_size, hidden_size))
        self.blocks = nn.ModuleList(Block(hidden_size, num_heads, mlp_ratio) for _ in range(depth))
        self.final_layer = _FinalLayer(hidden_size, patch_size**2 * self.out_channels)
        self._initialise()

    def _initialise(self) -> None:
        """Weights as published; what is zero stays zero."""
        for block in self.blocks:
            for layer in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))
        nn.init.zeros_(self.x_embedder.proj.bias)
        for layer in (self.y_embedder.embedding_table, self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(layer.weight, std=0.02)

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the weights, to which inputs are cast."""
        return self.pos_embed.dtype

    def encode(
        self, x: Tensor, timesteps: Tensor, context: None = None, y: Tensor | None = None, tome: float = 0.0
    ) -> Features:
        """The part that encoder propagation skips: patch embedding and the blocks before the split.

        Args:
            x: (B, in_channels, input_size, input_size).
            timesteps: (B,), training timesteps 0..T-1, integer or fractional.
            context: None; there is no cross-attention.
            y: (B,) class index.
            tome: 0; there is no merging of tokens.

        Returns:
            the tokens, (B, T, hidden_size), and no skips.

        Raises:
            ValueError: a shape that does not fit, y missing, or a context.
        """
        expected = (self.in_channels, self.input_size, self.input_size)
        if x.shape[1:] != expected:
            raise ValueError(f"x must have shape {('B', *expected)} for this network; got {tuple(x.shape)}")
        self.check_merging(tome)
        c = self._condition(timesteps, context, y, len(x))
        h = self.x_embedder(x.to(self.dtype)) + self.pos_embed  # (B, T, D)
        for block in self.blocks[: self.encoder_blocks]:
            h = block(h, c)
        return Features(h, ())

    def decode(
        self, features: Features, timesteps: Tensor, context: None = None, y: Tensor | None = None, tome: float = 0.0
    ) -> Tensor:
        """The prediction (B, out_channels, H, W) at `timesteps` from features of the same or an earlier step.

        Args:
            features: of this network, of batch B.
            timesteps, context, y, tome: as for `encode`, of this step, not of the key step.

        Raises:
            ValueError: as `encode`, or features of another network.
        """
        h = features.hidden
        if h.shape[1:] != self.pos_embed.shape[1:] or features.skips:
            raise ValueError(
                f"features must be tokens (B, {self.pos_embed.shape[1]}, {self.pos_embed.shape[2]}) without skips for "
                f"this network; got {tuple(h.shape)} and {len(features.skips)} skips"
            )
        self.check_merging(tome)
        c = self._condition(timesteps, context, y, len(h))
        for block in self.blocks[self.encoder_blocks :]:
            h = block(h, c)
        return self._unpatched(self.final_layer(h, c))

    def forward(self, x: Tensor, timesteps: Tensor, context: None = None, y: Tensor | None = None) -> Tensor:
        """`encode` and `decode` at the same timesteps: (B, in_channels, H, W) -> (B, out_channels, H, W)."""
        return self.decode(self.encode(x, timesteps, context, y), timesteps, context, y)

    def embed_time(self, timesteps: Tensor) -> Tensor:
        """Embedding of timesteps alone, (B,) -> (B, hidden_size)."""
        return self.t_embedder(timesteps)

    def embed(self, timesteps: Tensor, y: Tensor | None, batch: int) -> Tensor:
        """Embedding (B, hidden_size) of timesteps and class, which every block takes."""
        if timesteps.shape != (batch,):
            raise ValueError(f"timesteps must have shape ({batch},), one for each sample; got {tuple(timesteps.shape)}")
        if y is None or y.shape != (batch,):
            raise ValueError(f"y must have shape ({batch},), a class; got {None if y is None else tuple(y.shape)}")
        return self.embed_time(timesteps) + self.y_embedder(y)

    def check_merging(self, tome: float) -> None:
        """Raise ValueError unless tome is 0."""
        if tome:
            raise ValueError(f"a diffusion transformer merges no tokens; accepted: 0; got {tome:g}")

    def _condition(self, timesteps: Tensor, context: None, y: Tensor | None, batch: int) -> Tensor:
        if context is not None:
            raise ValueError("context must be None: this network has no cross-attention")
        return self.embed(timesteps, y, batch)

    def _unpatched(self, tokens: Tensor) -> Tensor:
        """(B, T, patch_size^2 * C) -> (B, C, H, W)."""
        side, patch = self.input_size // self.patch_size, self.patch_size
        x = tokens.unflatten(2, (patch, patch, self.out_channels)).unflatten(1, (side, side))
        return x.permute(0, 5, 1, 3, 2, 4).reshape(len(x), self.out_channels, self.input_size, self.input_size)
