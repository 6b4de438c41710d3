"""Cross-attention and the spatial transformer of the UNet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch.nn.functional as F
from torch import Tensor, nn

from ldm.compatibility import Normalize  # noqa: F401  (published name of this module)
from ldm.modules.attention_control import AttentionControl
from ldm.modules.diffusionmodules.util import checkpoint, normalization, weighted_sum, zero_module
from ldm.modules.token_merging import Merging


class GEGLU(nn.Module):
    """Linear layer gated by the exact GELU of its second half (arXiv 2002.05202)."""

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim_in, 2 * dim_out)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """Gated two-layer perceptron, (B, L, dim) -> (B, L, dim)."""

    def __init__(self, dim: int, mult: int = 4, dropout: float = 0.0) -> None:
        super().__init__()
        self.net = nn.Sequential(GEGLU(dim, mult * dim), nn.Dropout(dropout), nn.Linear(mult * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class CrossAttention(nn.Module):
    """Multi-head attention from tokens to a context, or to themselves if there is none.

    Args:
        query_dim: width of the tokens.
        context_dim: width of the context; None = query_dim.
        heads: number of heads.
        dim_head: width of one head.
        dropout: of the output.
    """

    def __init__(
        self, query_dim: int, context_dim: int | None = None, heads: int = 8, dim_head: int = 64, dropout: float = 0.0
    ) -> None:
        super().__init__()
        inner_dim = heads * dim_head
        self.heads = heads
        self.to_q = nn.Linear(query_dim, inner_dim, bias=False)
        self.to_k = nn.Linear(context_dim or query_dim, inner_dim, bias=False)
        self.to_v = nn.Linear(context_dim or query_dim, inner_dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(inner_dim, query_dim), nn.Dropout(dropout))

    def _split(self, x: Tensor) -> Tensor:
        """(B, L, heads * dim_head) -> (B, heads, L, dim_head), a view."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def keys_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """(B, L, context_dim) -> keys and values, both (B, heads, L, dim_head)."""
        k, v = self._split(self.to_k(context)), self._split(self.to_v(context))
        if context.device.type == "cpu":
            # Its kernel reads keys and values once for every block of queries, faster head by head.
            k, v = k.contiguous(), v.contiguous()
        return k, v

    def forward(
        self,
        x: Tensor,
        context: Context | None = None,
        control: AttentionControl | None = None,
        seen: Tensor | None = None,
    ) -> Tensor:
        """(B, N, query_dim), (B, L, context_dim) -> (B, N, query_dim).

        control: changes the maps of attention.
        seen:    without a context, the tokens that are attended to in the place of x, (B / n, N', query_dim): each row
            by n rows of x.
        """
        if isinstance(context, ProjectedContext) and (kept := context.output_of(self)) is not None:
            return kept
        q = self._split(self.to_q(x))  # (B, heads, N, dim_head)
        if isinstance(context, ProjectedContext):
            k, v = context.of(self)  # (B, heads, L, dim_head)
        else:
            k, v = self.keys_values(next(tokens for tokens in (context, seen, x) if tokens is not None))
        if seen is not None:
            k, v = (part.repeat_interleave(len(x) // len(seen), dim=0) for part in (k, v))
        cross = context is not None
        if control is None or not control.changes(x.shape[1], cross):
            attended = F.scaled_dot_product_attention(q, k, v)  # (B, heads, N, dim_head)
        else:
            maps = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)  # (B, heads, N, L)
            attended = control.edited(self, maps, cross) @ v
        out = self.to_out(attended.transpose(1, 2).flatten(2))
        if isinstance(context, ProjectedContext) and context.record is not None:
            context.record[self] = out
        return out


MemoryEfficientCrossAttention = CrossAttention  # published as another kernel for the same result


class BasicTransformerBlock(nn.Module):
    """Self-attention, cross-attention, feed-forward; each after a LayerNorm and with a residual.

    Args:
        dim: width of the tokens.
        n_heads: number of heads.
        d_head: width of one head.
        dropout: of each branch's output.
        context_dim: width of the context; None = the second attention is self-attention too.
        checkpoint: recompute the activations in the backward pass.
        disable_self_attn: the first attention attends to the context as well.
    """

    def __init__(
        self,
        dim: int,
        n_heads: int,
        d_head: int,
        dropout: float = 0.0,
        context_dim: int | None = None,
        checkpoint: bool = False,
        disable_self_attn: bool = False,
    ) -> None:
        super().__init__()
        self.disable_self_attn = disable_self_attn
        self.checkpoint = checkpoint
        self.attn1 = CrossAttention(dim, context_dim if disable_self_attn else None, n_heads, d_head, dropout)
        self.ff = FeedForward(dim, dropout=dropout)
        self.attn2 = CrossAttention(dim, context_dim, n_heads, d_head, dropout)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)

    def forward(self, x: Tensor, context: Context | None = None, merging: Merging | None = None) -> Tensor:
        """(B, N, dim), (B, L, context_dim) -> (B, N, dim); with `tome`, self-attention is among merged tokens."""
        return checkpoint(self._forward, x, context, merging, enabled=self.checkpoint)

    def projections(self, context: Tensor) -> dict[nn.Module, tuple[Tensor, Tensor]]:
        """Keys and values of the layers that attend to the context, by layer; see `ProjectedContext`."""
        layers = [self.attn1, self.attn2] if self.disable_self_attn else [self.attn2]
        return {layer: layer.keys_values(context) for layer in layers}

    def _forward(self, x: Tensor, context: Context | None, merging: Merging | None) -> Tensor:
        control = context.control if isinstance(context, ProjectedContext) else None
        tokens = self.norm1(x)
        if self.disable_self_attn:
            x = x + self.attn1(tokens, context, control)
        elif merging is None:
            x = x + self.attn1(tokens, None, control, first_frames(tokens, context))
        else:
            tokens = merging.merge(tokens)
            x = x + merging.unmerge(self.attn1(tokens, seen=first_frames(tokens, context)))
        x = x + self.attn2(self.norm2(x), context, control)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer over the pixels of a feature map, with a residual around it.

    Args:
        in_channels: channels of the map, a multiple of 32.
        n_heads: number of heads.
        d_head: width of one head.
        depth: number of transformer blocks.
        dropout: of each branch's output.
        context_dim: width of the context; None = self-attention only.
        disable_self_attn: see BasicTransformerBlock.
        use_linear: project tokens by linear layers, not the map by 1x1 convolutions (other weight shapes).
        use_checkpoint: recompute the activations of each block in the backward pass.
    """

    def __init__(
        self,
        in_channels: int,
        n_heads: int,
        d_head: int,
        depth: int = 1,
        dropout: float = 0.0,
        context_dim: int | None = None,
        disable_self_attn: bool = False,
        use_linear: bool = False,
        use_checkpoint: bool = False,
    ) -> None:
        super().__init__()
        inner_dim = n_heads * d_head
        self.use_linear = use_linear
        self.norm = normalization(in_channels, eps=1e-6)
        self.proj_in = nn.Linear(in_channels, inner_dim) if use_linear else nn.Conv2d(in_channels, inner_dim, 1)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(inner_dim, n_heads, d_head, dropout, context_dim, use_checkpoint, disable_self_attn)
            for _ in range(depth)
        )
        self.proj_out = zero_module(
            nn.Linear(inner_dim, in_channels) if use_linear else nn.Conv2d(inner_dim, in_channels, 1)
        )

    def forward(self, x: Tensor, context: Context | None = None, tome: float = 0.0) -> Tensor:
        """(B, C, H, W), (B, L, context_dim) -> (B, C, H, W); tome: share of tokens to merge for self-attention."""
        h = self.norm(x)  # (B, C, H, W)
        if self.use_linear:
            h = self.proj_in(to_tokens(h))  # (B, H * W, inner)
        else:
            h = to_tokens(self.proj_in(h))  # (B, H * W, inner)
        for block in self.transformer_blocks:
            h = block(h, context, Merging.of(h, x.shape[2:], tome) if tome else None)
        if self.use_linear:
            return x + to_map(self.proj_out(h), x)
        return x + self.proj_out(to_map(h, x))


def to_tokens(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H * W, C); a view if x is channels_last."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def to_map(tokens: Tensor, like: Tensor) -> Tensor:
    """(B, H * W, C) -> (B, C, H, W) with the size of `like`; a view with channels_last strides."""
    return tokens.unflatten(1, like.shape[2:]).permute(0, 3, 1, 2)


# The context of cross-attention, as tokens or made into keys and values once for all steps of a run


@dataclass(frozen=True, eq=False)
class AttentionOutputs:
    """What layers of cross-attention gave at one node, to be given again at others.

    layers: by layer, (batch, N, D).
    """

    layers: Mapping[nn.Module, Tensor]

    def __len__(self) -> int:
        """The batch size; 0 without layers."""
        return max(map(len, self.layers.values()), default=0)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(self.layers.values())

    def of_images(self, batch: int | None) -> AttentionOutputs:
        """For so many images: where there are twice as many, the mean of unconditional and conditional halves.

        Source: T-GATE (arXiv 2404.02747), section 3.
        """
        means = {layer: sum(out.chunk(2)) / 2 for layer, out in self.layers.items() if len(out) == 2 * (batch or 0)}
        return AttentionOutputs({**self.layers, **means})

    @staticmethod
    def combine(parts: Sequence[AttentionOutputs], weights: Sequence[float]) -> AttentionOutputs:
        """The weighted sum of outputs of the same layers."""
        layers = parts[-1].layers
        return AttentionOutputs({layer: weighted_sum([p.layers[layer] for p in parts], weights) for layer in layers})


@dataclass(frozen=True, eq=False)
class ProjectedContext:
    """What the attention layers of one network make of a context, computed once for all steps of a run.

    keys_values: by layer, both (B, heads, L, dim_head).
    batch:       B.
    copies:      how often the batch is repeated; each layer repeats its own where it uses them, to save memory.
    control:     what images take of each other's attention; None = nothing.
    frames:      how many images in a row are one video: in self-attention they all attend to the first of them
        (cross-frame attention of Text2Video-Zero, arXiv 2303.13439).
    outputs:     what layers give in the place of attending; None = all attend.
    record:      where layers put what they give; None = nowhere.
    """

    keys_values: Mapping[nn.Module, tuple[Tensor, Tensor]]
    batch: int
    copies: int = 1
    control: AttentionControl | None = None
    frames: int = 1
    outputs: AttentionOutputs | None = None
    record: dict[nn.Module, Tensor] | None = None

    def __len__(self) -> int:
        return self.batch * self.copies

    def tile(self, n: int) -> ProjectedContext:
        """Repeat for n decoder steps, step-major: B -> n*B."""
        return replace(self, copies=n * self.copies)

    def at(self, ts: Sequence[float]) -> ProjectedContext:
        """Repeat for one step at each of these timesteps, of which the control is told."""
        return replace(self.tile(len(ts)), control=None if self.control is None else self.control.at(ts))

    def images(self, which: slice) -> ProjectedContext:
        """The context of some images of a batch that is not repeated."""
        chosen = {layer: (k[which], v[which]) for layer, (k, v) in self.keys_values.items()}
        return replace(self, keys_values=chosen, batch=len(range(self.batch)[which]))

    def output_of(self, layer: nn.Module) -> Tensor | None:
        """What the layer is to give without attending, (copies*B, N, D); None = it attends."""
        kept = None if self.outputs is None else self.outputs.layers.get(layer)
        return kept if kept is None or self.copies == 1 else kept.repeat(self.copies, 1, 1)

    def of(self, layer: nn.Module) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer, (copies*B, heads, L, dim_head).

        Raises:
            ValueError: the context was projected by another network.
        """
        if layer not in self.keys_values:
            raise ValueError("context was projected by another network than the one that it is given to")
        k, v = self.keys_values[layer]
        return (k, v) if self.copies == 1 else (k.repeat(self.copies, 1, 1, 1), v.repeat(self.copies, 1, 1, 1))


def first_frames(tokens: Tensor, context: Context | None) -> Tensor | None:
    """The tokens of the first frame of each video, of (videos * frames, N, D); None = no videos."""
    frames = context.frames if isinstance(context, ProjectedContext) else 1
    return tokens[::frames] if frames > 1 else None


Context = Tensor | ProjectedContext  # (B, L, context_dim), or made into keys and values
