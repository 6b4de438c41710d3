"""The transformer of `BERTEmbedder` under its published names."""

from ldm.modules.encoders.modules import (
    AbsolutePositionalEmbedding,
    Attention,
    Encoder,
    FeedForward,
    TransformerWrapper,
)

__all__ = ["AbsolutePositionalEmbedding", "Attention", "Encoder", "FeedForward", "TransformerWrapper"]
