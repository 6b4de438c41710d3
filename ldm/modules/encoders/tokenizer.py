"""How a prompt is read: tokenizers of the `tokenizers` library, new tokens, and, beyond the published way, weights.

Prompts become token ids with weights of words, in more tokens than the text encoder takes at once. Nothing here changes
an encoder: embeddings are functions of the encoder's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from string import punctuation
from typing import Any, NamedTuple, Protocol

import torch
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn

from ldm.io.files import find_file, read_text

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")  # in the order of their ids: [PAD] is 0


def train_tokenizer(captions: Iterable[str], vocab_size: int, max_length: int) -> Tokenizer:
    """A lower-casing BPE tokenizer learned from captions; the same captions always give the same one.

    Args:
        captions: the training text.
        vocab_size: most entries of the vocabulary, the four special tokens included.
        max_length: length L of every encoded caption: [CLS] caption [SEP] [PAD]..., cut if need be.

    Returns:
        A tokenizer; `save(path)` writes the JSON file that BERTEmbedder takes.

    Raises:
        ValueError: no captions, or no room for the special tokens.
    """
    captions = list(captions)
    if not captions:
        raise ValueError("captions must hold at least one caption; got none")
    if vocab_size <= len(SPECIAL_TOKENS):
        raise ValueError(f"vocab_size must exceed the {len(SPECIAL_TOKENS)} special tokens; got {vocab_size}")
    # WordPiece would number its letters in another order at every training.
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=list(SPECIAL_TOKENS), show_progress=False)
    tokenizer.train_from_iterator(captions, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    )
    return of_length(tokenizer, max_length)


def load_tokenizer(tokenizer: str | Tokenizer, max_length: int) -> Tokenizer:
    """A tokenizer from its JSON file (see `find_file`) or a given one; encodes to exactly max_length ids.

    Raises:
        ValueError: the file is missing or not a tokenizer.
    """
    if isinstance(tokenizer, Tokenizer):
        return of_length(tokenizer, max_length)
    try:
        text = read_text(find_file(tokenizer))
    except FileNotFoundError as error:
        raise ValueError(f"tokenizer: {error}; expected a JSON file of the tokenizers library") from error
    try:
        loaded = Tokenizer.from_str(text)
    except Exception as error:  # tokenizers raises bare Exception for a file that it cannot read
        raise ValueError(f"tokenizer: {tokenizer} is not a tokenizers JSON file: {error}") from error
    return of_length(loaded, max_length)


def of_length(tokenizer: Tokenizer, max_length: int) -> Tokenizer:
    """A copy that pads and cuts every text to exactly max_length ids.

    Raises:
        ValueError: no room for text between the special tokens, or no [PAD] token.
    """
    added = tokenizer.num_special_tokens_to_add(is_pair=False)
    if max_length <= added:
        raise ValueError(f"max_length must exceed the {added} tokens that frame each text; got {max_length}")
    pad = tokenizer.token_to_id("[PAD]")
    if pad is None:
        raise ValueError("tokenizer: its vocabulary must have a [PAD] token")
    copy = type(tokenizer).from_str(tokenizer.to_str())
    copy.enable_truncation(max_length)
    copy.enable_padding(length=max_length, pad_id=pad, pad_token="[PAD]")
    return copy


def tokenize(tokenizer: Tokenizer, texts: Sequence[str]) -> Tensor:
    """Token ids (B, L), int64, of B texts; the empty text is one, too."""
    return torch.tensor([encoding.ids for encoding in tokenizer.encode_batch(list(texts))], dtype=torch.long)


def cut(tokenizer: Tokenizer, texts: Sequence[str]) -> list[bool]:
    """Whether the end of each text is cut off, because it is longer than what is encoded."""
    return [bool(encoding.overflowing) for encoding in tokenizer.encode_batch(list(texts))]


@dataclass(frozen=True)
class Words:
    """A text as a text encoder reads it.

    ids:       of its tokens, those that frame it among them, without padding.
    length:    L, of the encoded text with its padding.
    words:     of the text, split at spaces.
    positions: of each word's tokens among the L; none for what is cut off.
    """

    ids: tuple[int, ...]
    length: int
    words: tuple[str, ...]
    positions: tuple[tuple[int, ...], ...]

    def of(self, word: str) -> tuple[int, ...]:
        """The positions of a word, in any case, wherever it stands in the text; none if it is not there.

        Punctuation around it belongs to it.
        """
        pairs = zip(self.words, self.positions, strict=True)
        return tuple(i for own, places in pairs if word.lower() in (own, own.strip(punctuation)) for i in places)


def words_of(tokenizer: Tokenizer, text: str, added: Mapping[str, int]) -> Words:
    """The words of a text with their tokens; what stands between two spaces is a word.

    added: new tokens, and of how many each is made; these all belong to its word.
    """
    words = tuple(text.split(" "))
    spoken = [with_all_vectors(word, added) for word in words]
    owner = [i for i, one in enumerate(spoken) for _ in one.split(" ")]  # the word of each part
    read, places = " ".join(spoken), [[] for _ in words]
    encoding = tokenizer.encode(read)
    for i, (special, (start, end)) in enumerate(zip(encoding.special_tokens_mask, encoding.offsets, strict=True)):
        if not special and end > start:
            places[owner[read.count(" ", 0, start)]].append(i)
    return Words(
        tuple(one for one, real in zip(encoding.ids, encoding.attention_mask, strict=True) if real),
        len(encoding.ids),
        words,
        tuple(map(tuple, places)),
    )


# New tokens


def add_token(tokenizer: Tokenizer, table: nn.Embedding, name: str, vectors: Tensor) -> None:
    """Give a tokenizer a new token, which may stand for several, and the table their vectors.

    Args:
        table: of the encoder; it gets as many rows more as there are vectors.
        name: as it stands in prompts, lower case; of several vectors the others are NAME_1, NAME_2, ...
        vectors: (k, D).

    Raises:
        ValueError: the name is empty, has spaces, or is a token already.
    """
    names = token_names(name, len(vectors))
    if not name or " " in name:
        raise ValueError(f"a new token must be one word; got {name!r}")
    if known := [one for one in names if tokenizer.token_to_id(one) is not None]:
        raise ValueError(f"{known[0]!r} is a token of this model already; give the new one another name")
    whole = name.replace("_", "").replace("-", "").isalnum()  # not a part of a longer word
    tokenizer.add_tokens([AddedToken(one, single_word=whole, normalized=False) for one in names])
    ids = [tokenizer.token_to_id(one) for one in names]
    grown = torch.zeros(max(table.num_embeddings, ids[-1] + 1), table.embedding_dim).to(table.weight)
    grown[: table.num_embeddings] = table.weight.detach()
    grown[ids] = vectors.to(grown)
    trained = table.weight.requires_grad
    table.weight, table.num_embeddings = nn.Parameter(grown, requires_grad=trained), len(grown)


def token_names(name: str, count: int) -> list[str]:
    return [name, *(f"{name}_{i}" for i in range(1, count))]


def with_all_vectors(text: str, added: Mapping[str, int]) -> str:
    """A text in which each new token, in any case, stands there by its name, with all the tokens that it stands for."""
    for name, count in added.items():
        pattern = rf"(?<!\w){re.escape(name)}(?!\w)"
        text = re.sub(pattern, lambda _, n=name, k=count: " ".join(token_names(n, k)), text, flags=re.IGNORECASE)
    return text


def check_ids(name: str, ids: Tensor, count: int) -> None:
    """Raises ValueError unless all ids are in 0..count-1."""
    if ids.numel() and not 0 <= ids.min().item() <= ids.max().item() < count:
        raise ValueError(f"{name} must be in 0..{count - 1}; got {ids.min().item()}..{ids.max().item()}")


# Weights of words, and more tokens than the text encoder takes at once

STEP = 1.1  # the weight of one pair of brackets
MOST_WEIGHT = 10.0
PARTS = re.compile(
    r"\\(?P<literal>[()\[\]\\:])|:\s*(?P<weight>[+-]?(\d+\.?\d*|\.\d+))\s*\)|(?P<bracket>[()\[\]])"
    r"|(?P<almost>[:\uff1a]\s*([+-]?[.,\d][^()\[\]\\]*)?(?=[)\]]))|.",  # a weight but for a comma, the bracket, ...
    re.S,
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
    bracket or a colon is text: \(.

    Raises:
        ValueError: a bracket without its partner or without text, a weight out of range, or what only looks like one.
    """
    spans: list[Span] = []
    opened: list[tuple[str, int, int]] = []  # bracket, its place in the prompt, the spans before it
    for part in PARTS.finditer(prompt):
        bracket = part["bracket"] or (")" if part["weight"] else None)
        if part["almost"] and opened:
            raise ValueError(
                f"{part[0]!r} at character {part.start() + 1} is no weight, in {prompt!r}; expected a number in round "
                f"brackets, (word:1.3), or \\: for the colon itself"
            )
        if bracket is None:
            spans.append(Span(part["literal"] or part[0], 1.0))
        elif bracket in "([":
            opened.append((bracket, part.start(), len(spans)))
        else:
            if not opened or opened[-1][0] != CLOSING[bracket]:
                raise ValueError(_unbalanced(prompt, part.end() - 1))
            _, place, first = opened.pop()
            if first == len(spans):
                raise ValueError(f"brackets without text at character {place + 1}, in {prompt!r}")
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
    """The ids of a text, neither framed nor cut nor padded."""
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


# Text encoders with a tokenizer of the tokenizers library


class ReadsTexts:
    """What such an encoder offers beside its embeddings: token ids, weights of words, places of words, new tokens.

    tokenizer:   cuts and pads to one length; None = only token ids can be encoded.
    token_table: the vectors of the tokens.
    """

    tokenizer: Tokenizer | None
    token_table: nn.Embedding

    @cached_property
    def added(self) -> dict[str, int]:
        """New tokens, and of how many each is made."""
        return {}

    def tokenize(self, text: str | Sequence[str]) -> Tensor:
        """Token ids (B, max_seq_len) of B texts, padded or cut; one string is B = 1.

        Raises:
            ValueError: there is no tokenizer, or text is not strings.
        """
        texts = [text] if isinstance(text, str) else list(text)
        if not texts or not all(isinstance(t, str) for t in texts):
            raise ValueError(f"text must be a string or a list of strings; got {text!r}")
        return tokenize(self._tokenizer(), [with_all_vectors(text, self.added) for text in texts])

    def cut(self, texts: Sequence[str]) -> list[bool]:
        """Whether the end of each text is cut off, because it has more than max_seq_len tokens.

        Raises:
            ValueError: there is no tokenizer.
        """
        return cut(self._tokenizer(), [with_all_vectors(text, self.added) for text in texts])

    def rows(self, spans: Sequence[Span], chunks: int) -> Rows:
        """Parts of a text as several rows of token ids, see `rows_of`.

        Raises:
            ValueError: there is no tokenizer.
        """
        given = [Span(with_all_vectors(text, self.added), weight) for text, weight in spans]
        return rows_of(self._tokenizer(), given, chunks)

    def words(self, text: str) -> Words:
        """The words of a text, in lower case, with their tokens.

        Raises:
            ValueError: there is no tokenizer.
        """
        return words_of(self._tokenizer(), " ".join(text.lower().split()), self.added)

    def add_token(self, name: str, vectors: Tensor) -> None:
        """Give the encoder a new token of one vector or several, (k, D); see `add_token`.

        Raises:
            ValueError: there is no tokenizer, the name is taken, or is not one word.
        """
        add_token(self._tokenizer(), self.token_table, name.lower(), vectors)
        self.added[name.lower()] = len(vectors)

    def _tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise ValueError(
                "text needs a tokenizer, which this model was built without: set tokenizer to a "
                "JSON file of the tokenizers library (for the published BERT models: the "
                "tokenizer.json of bert-base-uncased), or pass token ids"
            )
        return self.tokenizer
