"""Texts to token ids for the CLIP text encoders, with a vocabulary on this machine."""

from __future__ import annotations

import gzip
import html
from collections.abc import Sequence
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn

from ldm.io.files import find_file, read_bytes
from ldm.modules.encoders.tokenizer import (
    Rows,
    Span,
    Words,
    add_token,
    check_ids,
    cut,
    rows_of,
    with_all_vectors,
    words_of,
)

try:
    import ftfy
except ModuleNotFoundError:  # only texts need it
    ftfy = None

MERGES = 48894  # then, with 512 single bytes and 2 special tokens, the vocabulary has 49408 entries
START, END = "<|startoftext|>", "<|endoftext|>"
VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"
PACKAGES = ("open_clip", "clip")  # that bring the vocabulary along
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"


def find_vocabulary(path: str | Path | None = None) -> Path:
    """The vocabulary: the file or folder given, or else that of an installed package, which is not imported.

    Args:
        path: `bpe_simple_vocab_16e6.txt.gz` of OpenAI's CLIP, a `merges.txt` of transformers, or a folder
            with one of them; looked for by `ldm.io.files.find_file`.

    Raises:
        ValueError: there is none.
    """
    if path is None:
        specs = [spec for spec in map(find_spec, PACKAGES) if spec is not None]
        folders = [Path(folder) for spec in specs for folder in spec.submodule_search_locations or ()]
        found = [folder / VOCABULARY for folder in folders if (folder / VOCABULARY).is_file()]
        if found:
            return found[0]
        raise ValueError(
            f"text needs CLIP's vocabulary, {VOCABULARY}, which no installed package has: "
            f"'pip install --no-deps open-clip-torch' brings it, or set the conditioner's vocabulary "
            f"to that file or to a transformers folder of a CLIP tokenizer (merges.txt)"
        )
    for name in (".", VOCABULARY, "merges.txt", f"tokenizer/{VOCABULARY}", "tokenizer/merges.txt"):
        try:
            return find_file(Path(path) / name)
        except FileNotFoundError:
            continue
    raise ValueError(f"vocabulary: {path}: neither a file nor a folder with {VOCABULARY} or merges.txt")


def read_merges(path: Path) -> list[tuple[str, str]]:
    """The byte pairs of a vocabulary file, in the order in which they are merged.

    Raises:
        ValueError: not such a file.
    """
    try:
        raw = read_bytes(path)
        text = (gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).decode("utf-8")
    except (OSError, EOFError, ValueError) as error:
        raise ValueError(f"vocabulary: {path}: cannot be read: {error}") from error
    pairs = [tuple(line.split()) for line in text.split("\n")[1 : MERGES + 1]]  # the first line is a comment
    if len(pairs) < MERGES or any(len(pair) != 2 for pair in pairs):
        raise ValueError(f"vocabulary: {path}: expected a comment line and at least {MERGES} lines of two symbols")
    return pairs


def byte_symbols() -> list[str]:
    """The letters that stand for the 256 bytes, in the order of their token ids: first those that can be seen."""
    seen = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(byte) for byte in seen] + [chr(256 + i) for i in range(256 - len(seen))]


class ClipTokenizer:
    """Texts to token ids of CLIP, without a network.

    The texts are mended first (`clean`). Special tokens that somebody writes in a prompt are text.

    Args:
        vocabulary: see `find_vocabulary`; read when the first text comes.
        max_length: ids of each text: start, text cut if need be, end, padding.
        padding: the id to fill up with; None = that of the end token, as SD v1 does (SD v2: 0).

    Raises:
        ValueError: a vocabulary is named that is not there.
    """

    def __init__(self, vocabulary: str | Path | None = None, max_length: int = 77, padding: int | None = None):
        self.vocabulary = None if vocabulary is None else find_vocabulary(vocabulary)
        self.max_length, self.padding = max_length, padding
        self.added: dict[str, int] = {}  # new tokens, and of how many each is made

    @cached_property
    def bpe(self) -> Tokenizer:
        merges = read_merges(self.vocabulary or find_vocabulary())
        symbols = byte_symbols()
        words = symbols + [symbol + "</w>" for symbol in symbols] + ["".join(pair) for pair in merges] + [START, END]
        ids = {word: i for i, word in enumerate(words)}
        bpe = Tokenizer(models.BPE(ids, merges, end_of_word_suffix="</w>"))
        bpe.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        bpe.post_processor = processors.TemplateProcessing(
            single=f"{START} $A {END}", special_tokens=[(token, ids[token]) for token in (START, END)]
        )
        bpe.enable_truncation(self.max_length)
        bpe.enable_padding(
            length=self.max_length, pad_id=ids[END] if self.padding is None else self.padding, pad_token=END
        )
        return bpe

    def __call__(self, text: str | Sequence[str]) -> Tensor:
        """Token ids (B, max_length), int64, of B texts; one string is B = 1.

        Raises:
            ValueError: text is not strings, or the vocabulary or the library that mends texts is missing.
        """
        texts = [text] if isinstance(text, str) else list(text)
        if not texts or not all(isinstance(t, str) for t in texts):
            raise ValueError(f"text must be a string or a list of strings; got {text!r}")
        return torch.tensor([encoding.ids for encoding in self.bpe.encode_batch([self._read(t) for t in texts])])

    def cut(self, texts: Sequence[str]) -> list[bool]:
        """Whether the end of each text is cut off, because it has more than max_length tokens.

        Raises:
            ValueError: see `__call__`.
        """
        return cut(self.bpe, [self._read(text) for text in texts])

    def words(self, text: str) -> Words:
        """The words of a text, mended and in lower case, with their tokens.

        Raises:
            ValueError: see `__call__`.
        """
        return words_of(self.bpe, clean(text), self.added)

    def rows(self, spans: Sequence[Span], chunks: int) -> Rows:
        """Parts of a text as several rows of token ids, see `rows_of`."""
        return rows_of(self.bpe, [Span(self._read(text), weight) for text, weight in spans], chunks)

    def _read(self, text: str) -> str:
        return with_all_vectors(clean(text), self.added)


def clean(text: str) -> str:
    """Broken encodings and HTML entities mended, white space collapsed, lower case; as CLIP was trained.

    Raises:
        ValueError: the ftfy library is missing. Without it some prompts would give other images.
    """
    if ftfy is None:
        raise ValueError("text needs the ftfy library, which is not installed: pip install -e '.[text]'")
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split()).lower()


class ClipConditioner(nn.Module):
    """What the conditioners on CLIP's tokens share.

    Args:
        tokenizer: of the texts.
        vocab_size: token ids that the encoder knows.
        context_length: most tokens that it takes.
    """

    def __init__(self, tokenizer: ClipTokenizer, vocab_size: int, context_length: int) -> None:
        super().__init__()
        if not 2 < tokenizer.max_length <= context_length:
            raise ValueError(f"max_length must be in 3..{context_length}; got {tokenizer.max_length}")
        self.tokenizer, self.vocab_size, self.context_length = tokenizer, vocab_size, context_length

    @property
    def added(self) -> dict[str, int]:
        """New tokens, and of how many each is made."""
        return self.tokenizer.added

    @property
    def token_table(self) -> nn.Embedding:
        """The vectors of the tokens; of an encoder that takes new ones.

        Raises:
            ValueError: it does not.
        """
        raise ValueError(f"{type(self).__name__} takes no new tokens")

    def add_token(self, name: str, vectors: Tensor) -> None:
        """Give the encoder a new token of one vector or several, (k, D); see `ldm.modules.encoders.tokenizer`.

        Raises:
            ValueError: the name is taken, or is not one word.
        """
        add_token(self.tokenizer.bpe, self.token_table, name.lower(), vectors)
        self.tokenizer.added[name.lower()] = len(vectors)
        self.vocab_size = self.token_table.num_embeddings

    def settle(self, device: str | None, freeze: bool) -> None:
        """Move the weights to a device, if one is named, and freeze them if asked to."""
        if freeze:
            self.eval().requires_grad_(False)
        if device is not None:
            self.to(device)

    def tokens(self, text: str | Sequence[str] | Tensor) -> Tensor:
        """Token ids (B, L) on the encoder's device, of texts or as given.

        Raises:
            ValueError: see `ClipTokenizer`; or ids of another shape or type, out of range, or too many.
        """
        tokens = text if isinstance(text, Tensor) else self.tokenizer(text)
        if tokens.ndim != 2 or tokens.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"tokens must be integers of shape (B, L); got {tokens.dtype} {tuple(tokens.shape)}")
        if tokens.shape[1] > self.context_length:
            raise ValueError(f"tokens must be at most {self.context_length} long; got {tokens.shape[1]}")
        check_ids("tokens", tokens, self.vocab_size)
        return tokens.to(next(self.parameters()).device)

    def cut(self, texts: Sequence[str]) -> list[bool]:
        """See `ClipTokenizer.cut`."""
        return self.tokenizer.cut(texts)

    def rows(self, spans: Sequence[Span], chunks: int) -> Rows:
        """See `ClipTokenizer.rows`."""
        return self.tokenizer.rows(spans, chunks)

    def words(self, text: str) -> Words:
        """See `ClipTokenizer.words`."""
        return self.tokenizer.words(text)

    def encode(self, text: str | Sequence[str] | Tensor) -> Tensor:
        """The same as calling it."""
        return self(text)
