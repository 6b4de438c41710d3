"""How a prompt is read beyond the published way: weights of words, and more tokens than the text encoder takes at once.

Nothing here changes an encoder: prompts become token ids with weights, and embeddings are functions of the encoder's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from tokenizers import Tokenizer
from torch import Tensor

STEP = 1.1  # the weight of one pair of brackets
MOST_WEIGHT = 10.0
PARTS = re.compile(
    r"\\(?P<literal>[()\[\]\\])|:\s*(?P<weight>[+-]?(\d+\.?\d*|\.\d+))\s*\)|(?P<bracket>[()\[\]])|.", re.S
)
CLOSING = {")": "(", "]": "["}


class Span(NamedTuple):
    """A part of a prompt, and its weight."""

    text: str
    weight: float


class Rows(NamedTuple):
    """A prompt as what an encoder takes at once, several times.

    ids, weights: of every token, (chunks, L); special tokens have weight 1.
    left_out:     how many tokens are past the last chunk.
    """

    ids: Tensor
    weights: Tensor
    left_out: int


@dataclass(frozen=True)
class Reading:
    """How prompts are read. By default as published: no weights, and as many tokens as the encoder takes.

    weights: (word:1.3) has the weight 1.3, (word) 1.1, [word] 1 / 1.1; see `parse_weights`.
    chunks:  how often the encoder is called, each time with as many tokens as it takes; prompts that are shorter are
        filled up with empty ones, so that an image does not depend on the other prompts of a run.
    """

    weights: bool = False
    chunks: int = 1

    @property
    def plain(self) -> bool:
        return not self.weights and self.chunks == 1

    def settings(self) -> dict[str, Any]:
        """What is recorded with an image; nothing if prompts are read as published."""
        weights = {"prompt_weights": True} if self.weights else {}
        return weights | ({"prompt_chunks": self.chunks} if self.chunks > 1 else {})

    def spans(self, prompt: str) -> list[Span]:
        """Raises ValueError: see `parse_weights`."""
        return parse_weights(prompt) if self.weights else [Span(prompt, 1.0)]


AS_PUBLISHED = Reading()


def parse_weights(prompt: str) -> list[Span]:
    r"""The parts of a prompt with their weights, in order; weights of nested brackets are multiplied.

    (text) is 1.1, [text] 1 / 1.1, (text:1.3) the number, 0..10, as is the product. With a backslash before it, a
    bracket is text: \(.

    Raises:
        ValueError: a bracket without its partner, or a weight out of range.
    """
    spans: list[Span] = []
    opened: list[tuple[str, int, int]] = []  # bracket, its place in the prompt, the spans before it
    for part in PARTS.finditer(prompt):
        bracket = part["bracket"] or (")" if part["weight"] else None)
        if bracket is None:
            spans.append(Span(part["literal"] or part[0], 1.0))
        elif bracket in "([":
            opened.append((bracket, part.start(), len(spans)))
        else:
            if not opened or opened[-1][0] != CLOSING[bracket]:
                raise ValueError(_unbalanced(prompt, part.end() - 1))
            first = opened.pop()[2]
            factor = _factor(part["weight"], bracket)
            spans[first:] = [Span(text, weight * factor) for text, weight in spans[first:]]
    if opened:
        raise ValueError(_unbalanced(prompt, opened[-1][1]))
    joined = _joined(spans)
    for text, weight in joined:
        if weight > MOST_WEIGHT:
            raise ValueError(f"a weight must be 0..{MOST_WEIGHT:g}; brackets in brackets give {text!r} {weight:g}")
    return joined


def _factor(weight: str | None, bracket: str) -> float:
    if weight is None:
        return STEP if bracket == ")" else 1 / STEP
    if not 0 <= float(weight) <= MOST_WEIGHT:
        raise ValueError(f"a weight must be 0..{MOST_WEIGHT:g}; got {weight}")
    return float(weight)


def _unbalanced(prompt: str, place: int) -> str:
    return (
        f"{prompt[place]!r} at character {place + 1} has no partner, in {prompt!r}; expected (word:1.3), (word) or "
        f"[word], or \\{prompt[place]} for the bracket itself"
    )


def _joined(spans: Sequence[Span]) -> list[Span]:
    """Neighbours of the same weight as one."""
    joined: list[Span] = []
    for span in spans:
        if joined and joined[-1].weight == span.weight:
            joined[-1] = Span(joined[-1].text + span.text, span.weight)
        else:
            joined.append(span)
    return joined


def rows_of(tokenizer: Tokenizer, spans: Sequence[Span], chunks: int) -> Rows:
    """Parts of a prompt as framed rows of token ids; a tokenizer that cuts and pads to one length L."""
    frame = tokenizer.encode("").ids
    start, end, padding = frame[:3]
    room = len(frame) - 2
    tokens = [(i, span.weight) for span in spans for i in _bare_ids(tokenizer, span.text)]
    ids, weights = [], []
    for chunk in range(chunks):
        own = tokens[chunk * room : (chunk + 1) * room]
        rest = room - len(own)
        ids.append([start, *(i for i, _ in own), end, *[padding] * rest])
        weights.append([1.0, *(weight for _, weight in own), 1.0, *[1.0] * rest])
    return Rows(torch.tensor(ids), torch.tensor(weights), max(0, len(tokens) - chunks * room))


def _bare_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Of a text, neither framed nor cut nor padded."""
    encoding = tokenizer.encode(text, add_special_tokens=False)
    parts = [encoding, *encoding.overflowing]
    return [i for part in parts for i, seen in zip(part.ids, part.attention_mask, strict=True) if seen]


def weighted(embeddings: Tensor, empty: Tensor, weights: Tensor) -> Tensor:
    """Embeddings moved away from those of the empty text, or towards them: empty + weight (embedding - empty).

    Args:
        embeddings: of tokens, (N, L, D).
        empty: of the empty text's tokens at the same places, (1, L, D).
        weights: (N, L), at least 0; 1 leaves an embedding as it is, to the bit, and 0 gives the empty text's.
    """
    factor = weights[..., None].to(embeddings)
    return torch.where(factor == 1, embeddings, empty + factor * (embeddings - empty))


class ReadsRows(Protocol):
    """What a text encoder offers for this: `rows`, and to be called with token ids."""

    def rows(self, spans: Sequence[Span], chunks: int) -> Rows: ...

    __call__: Callable[..., Any]


def read(encoder: ReadsRows, prompts: Sequence[str], reading: Reading) -> tuple[Tensor, ...]:
    """The prompts' embeddings, (B, chunks * L, D), and if the encoder gives one vector for a text, that of the first
    chunk, without weights, (B, P).

    Raises:
        ValueError: see `parse_weights`; or the encoder can't be called in this way.
    """
    if not hasattr(encoder, "rows"):
        raise ValueError(f"{type(encoder).__name__} reads prompts in the published way only: no weights, one chunk")
    read_as = [encoder.rows(reading.spans(prompt), reading.chunks) for prompt in prompts]
    ids, weights = (torch.cat(parts) for parts in list(zip(*read_as, strict=True))[:2])  # (B * chunks, L)
    embeddings, *own = _as_tuple(encoder(ids))
    if (weights != 1).any():
        empty = _as_tuple(encoder(encoder.rows([], 1).ids))[0]
        embeddings = weighted(embeddings, empty, weights)
    joined = embeddings.unflatten(0, (len(prompts), reading.chunks)).flatten(1, 2)
    return joined, *(vector[:: reading.chunks] for vector in own)


def _as_tuple(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)
