"""The conditioner of SDXL: text encoders side by side, and numbers that say how the image is framed.

Source: SDXL (arXiv 2307.01952), sections 2.1 and 2.2. Names, order and weights follow the published configuration.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ldm.modules.diffusionmodules.util import timestep_embedding
from ldm.modules.encoders.tokenizer import AS_PUBLISHED, Reading, Rows, Span, read
from ldm.util import instantiate_from_config

TEXT = "txt"  # the input key of text encoders; all others are numbers
# What each key of numbers holds: of one image, (n,).
NUMBERS = {
    "original_size_as_tuple": 2,  # height and width of the original image, before it was cropped
    "crop_coords_top_left": 2,  # where the crop begins, in pixels
    "target_size_as_tuple": 2,  # height and width that are to be made
    "aesthetic_score": 1,  # 0..10, how much people like it
}
ENTRY = {"is_trainable", "input_key", "ucg_rate", "legacy_ucg_value", "target", "params"}  # of one embedder in a config


class ConcatTimestepEmbedderND(nn.Module):
    """Numbers as sinusoids, each of them on its own.

    Args:
        outdim: width for one number.
    """

    def __init__(self, outdim: int) -> None:
        super().__init__()
        self.outdim = outdim

    def forward(self, x: Tensor) -> Tensor:
        """(B, n) -> (B, n * outdim), cosines first for each number."""
        return timestep_embedding(x.flatten(), self.outdim).unflatten(0, x.shape).flatten(1)


class GeneralConditioner(nn.Module):
    """Prompts and numbers to a context (B, L, D) and a vector (B, V).

    The context is the tokens' vectors of all text encoders, joined along the width. The vector is the text's own, by
    the encoders that give one, and after it the numbers'.

    Args:
        emb_models: one mapping for each embedder: `target` and `params` as everywhere, and `input_key`, "txt" or one of
            NUMBERS. Text encoders come first. `is_trainable`, `ucg_rate` and `legacy_ucg_value` are for a training.

    Raises:
        ValueError: no text encoder, or none that gives the text's own vector, text encoders that read texts of
            different lengths, or an entry that is none of these.
    """

    def __init__(self, emb_models: Sequence[Mapping[str, Any]]) -> None:
        super().__init__()
        for entry in emb_models:
            key = entry.get("input_key")
            if unknown := set(entry) - ENTRY or (key not in (TEXT, *NUMBERS) and {f"input_key {key!r}"}):
                raise ValueError(
                    f"emb_models: {', '.join(sorted(unknown))}: unknown; accepted: {', '.join(sorted(ENTRY))}, with "
                    f"input_key {', '.join((TEXT, *NUMBERS))}"
                )
        self.inputs = [entry["input_key"] for entry in emb_models]
        if self.inputs[:1] != [TEXT] or sorted(self.inputs, key=lambda key: key != TEXT) != self.inputs:
            raise ValueError(
                f"emb_models: expected text encoders ({TEXT}) first; got {', '.join(self.inputs) or 'none'}"
            )
        self.embedders = nn.ModuleList(
            instantiate_from_config({"target": entry["target"], "params": entry.get("params") or {}})
            for entry in emb_models
        )
        lengths = {encoder.tokenizer.max_length for encoder in self.text_encoders}
        if len(lengths) != 1:
            raise ValueError(f"emb_models: text encoders must read texts of one length; got {sorted(lengths)} tokens")

    @property
    def text_encoders(self) -> list[nn.Module]:
        return [embedder for key, embedder in zip(self.inputs, self.embedders, strict=True) if key == TEXT]

    @property
    def numbers(self) -> list[str]:
        """The keys of the numbers that are taken, in order."""
        return [key for key in self.inputs if key != TEXT]

    @property
    def max_length(self) -> int:
        """Tokens of a text, L."""
        return self.text_encoders[0].tokenizer.max_length

    def cut(self, texts: Sequence[str]) -> list[bool]:
        """See `ClipTokenizer.cut`."""
        return self.text_encoders[0].cut(texts)

    def rows(self, spans: Sequence[Span], chunks: int) -> Rows:
        """See `ClipTokenizer.rows`; of the first text encoder, as the others differ in their padding only."""
        return self.text_encoders[0].rows(spans, chunks)

    def encode_text(self, texts: Sequence[str], reading: Reading = AS_PUBLISHED) -> tuple[Tensor, Tensor]:
        """B texts -> the context (B, chunks * L, D), and the texts' own vector (B, P).

        Args:
            reading: how the texts are read, see `read`.

        Raises:
            ValueError: no text encoder gives the latter; or see `read`.
        """
        tokens, pooled = [], []
        for encoder in self.text_encoders:
            result = encoder(texts) if reading.plain else read(encoder, texts, reading)
            one, *own = result if isinstance(result, tuple) else (result,)
            tokens.append(one)
            pooled += own
        if not pooled:
            raise ValueError("emb_models: no text encoder gives one vector for a text; FrozenOpenCLIPEmbedder2 does")
        return torch.cat(tokens, dim=2), torch.cat(pooled, dim=1)

    def vector(self, pooled: Tensor, numbers: Mapping[str, Tensor]) -> Tensor:
        """The texts' own vector (B, P) and numbers -> (B, V).

        Args:
            numbers: for each key of `numbers`, (B, n); see NUMBERS.

        Raises:
            ValueError: a key is missing, superfluous, or of another shape.
        """
        if set(numbers) != set(self.numbers):
            raise ValueError(f"numbers must be {', '.join(self.numbers)}; got {', '.join(numbers) or 'none'}")
        parts = [pooled]
        for key, embedder in zip(self.inputs, self.embedders, strict=True):
            if key == TEXT:
                continue
            if numbers[key].shape != (len(pooled), NUMBERS[key]):
                raise ValueError(
                    f"{key} must have the shape {(len(pooled), NUMBERS[key])}; got {tuple(numbers[key].shape)}"
                )
            parts.append(embedder(numbers[key].to(pooled.device)).to(pooled.dtype))
        return torch.cat(parts, dim=1)

    def forward(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Texts under "txt" and numbers under their keys -> context (B, L, D) and vector (B, V)."""
        context, pooled = self.encode_text(batch[TEXT])
        return context, self.vector(pooled, {key: value for key, value in batch.items() if key != TEXT})
