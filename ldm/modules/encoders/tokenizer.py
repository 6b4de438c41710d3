"""Tokenizers of the `tokenizers` library: train, load, and turn text into token ids."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from string import punctuation

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
    """Of each text whether its end is cut off, because it is longer than what is encoded."""
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


def words_of(tokenizer: Tokenizer, text: str) -> Words:
    """The words of a text with their tokens; what stands between two spaces is a word."""
    encoding = tokenizer.encode(text)
    words, places = tuple(text.split(" ")), [[] for _ in range(text.count(" ") + 1)]
    for i, (special, (start, end)) in enumerate(zip(encoding.special_tokens_mask, encoding.offsets, strict=True)):
        if not special and end > start:
            places[text.count(" ", 0, start)].append(i)
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
    """A text in which each new token stands there with all the tokens that it stands for."""
    for name, count in added.items():
        if count > 1:
            pattern = rf"(?<!\w){re.escape(name)}(?!\w)"
            text = re.sub(pattern, lambda _, n=name, k=count: " ".join(token_names(n, k)), text, flags=re.IGNORECASE)
    return text


def check_ids(name: str, ids: Tensor, count: int) -> None:
    """Raises ValueError unless all ids are in 0..count-1."""
    if ids.numel() and not 0 <= ids.min().item() <= ids.max().item() < count:
        raise ValueError(f"{name} must be in 0..{count - 1}; got {ids.min().item()}..{ids.max().item()}")
