"""Texts to tokens, as CLIP reads them: byte pairs of lower-case text (Radford et al. 2021, section 2.4).

The names are those of openai-clip's `clip.simple_tokenizer`, for code that imports it. The error for a name that is not
here says what has it.
"""

from __future__ import annotations

import gzip
import html
import re
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import extras
from .errors import no_attribute
from .towers.text import VOCABULARY

_MERGES_FILE = Path(__file__).parent / "assets" / "vocabulary" / "bpe_simple_vocab_16e6.txt.gz"
_MERGE_COUNT = VOCABULARY - 2 * 256 - 2
_START, _END = "<|startoftext|>", "<|endoftext|>"
# As clip's pattern finds words, regardless of case, where neither of these two stands: a long s counts as an s behind
# an apostrophe, and U+0345, an accent whose capital is a letter, belongs to no word.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|\p{L}+|\p{N}|[^\s\p{L}\p{N}\x{345}]+"


def tokenize(texts: str | list[str], context_length: int = 77, truncate: bool = False) -> Tensor:
    """Texts as `TextEncoder` takes them: start, tokens, end, and zeros to `context_length`, as `clip.tokenize`.

    Args:
        texts: one text or several.
        context_length: tokens that a text may have, start and end included.
        truncate: cut texts that are too long.

    Returns:
        (B, context_length), int32.

    Raises:
        RuntimeError: a text is too long and `truncate` is false.
        ModuleNotFoundError: the extra `text` is not installed: `pip install "clip_fast[text]"`.
    """
    texts = [texts] if isinstance(texts, str) else list(texts)
    tokenizer = SimpleTokenizer()
    result = torch.zeros(len(texts), context_length, dtype=torch.int32)
    for row, text in zip(result, texts, strict=True):
        tokens = [tokenizer.encoder[_START], *tokenizer.encode(text), tokenizer.encoder[_END]]
        if len(tokens) > context_length:
            if not truncate:
                raise too_long(text, len(tokens), context_length)
            tokens = [*tokens[: context_length - 1], tokens[-1]]
        row[: len(tokens)] = torch.tensor(tokens)
    return result


def too_long(text: str, tokens: int, context_length: int) -> RuntimeError:
    """The error for a text that has too many tokens."""
    return RuntimeError(
        f"a text may have {context_length} tokens, start and end included, and {text!r} has {tokens}: "
        "shorten it, or pass truncate=True"
    )


class SimpleTokenizer:
    """A text to the numbers of its tokens and back, without start and end, as `clip`'s tokenizer of this name.

    `encoder` has the number of each token, and `decoder` the token of each number; `byte_encoder` the character of each
    byte, and `byte_decoder` the byte of each character; `bpe_ranks` the place of each merge.

    Raises:
        ModuleNotFoundError: the extra `text` is not installed: `pip install "clip_fast[text]"`.
    """

    def __init__(self) -> None:
        self._byte_pairs = _tokenizer()
        self.encoder = _vocabulary()
        self.decoder = _tokens()
        self.byte_encoder, self.byte_decoder = bytes_to_unicode(), _byte_symbols()
        self.bpe_ranks = _ranks()

    def __getattr__(self, name: str) -> Any:
        raise no_attribute(f"{type(self).__name__!r} object", name)

    def bpe(self, token: str) -> str:
        """A word, given in the characters of its bytes, as the symbols that its byte pairs are merged to."""
        if token in (_START, _END):
            return token
        return " ".join(each.value for each in self._byte_pairs.model.tokenize(token))

    def encode(self, text: str) -> list[int]:
        text = clean(text).lower()
        if _START not in text and _END not in text:
            return self._byte_pairs.encode(text).ids
        words = [word for word, _ in _words().pre_tokenize_str(text)]  # a token behind punctuation is no word
        ids = [[self.encoder[word]] if word in (_START, _END) else self._byte_pairs.encode(word).ids for word in words]
        return list(chain.from_iterable(ids))

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of tokens, lower-case, with a space behind each word."""
        symbols = "".join(self.decoder[int(token)] for token in tokens)
        return bytes(map(_byte_symbols().__getitem__, symbols)).decode("utf-8", errors="replace").replace("</w>", " ")


def clean(text: str) -> str:
    """Mended, unescaped and with single spaces, as CLIP was trained."""
    return whitespace_clean(basic_clean(text))


def basic_clean(text: str) -> str:
    """Mended, and unescaped twice."""
    return html.unescape(html.unescape(extras.ftfy().fix_text(text))).strip()


def whitespace_clean(text: str) -> str:
    """With single spaces."""
    return " ".join(text.split())


def default_bpe() -> str:
    """The path of the vocabulary's file."""
    return str(_MERGES_FILE)


def get_pairs(word: Sequence[str]) -> set[tuple[str, str]]:
    """The pairs of neighbouring symbols."""
    return set(pairwise(word))


@cache
def bytes_to_unicode() -> dict[int, str]:
    """The printable character of each byte."""
    return {byte: symbol for symbol, byte in _byte_symbols().items()}


def __getattr__(name: str) -> Any:
    raise no_attribute(f"module {__name__!r}", name)


@cache
def _merges() -> list[tuple[str, str]]:
    lines = gzip.decompress(_MERGES_FILE.read_bytes()).decode().split("\n")
    return [(first, second) for first, second in (line.split() for line in lines[1 : 1 + _MERGE_COUNT])]


@cache
def _ranks() -> dict[tuple[str, str], int]:
    return {pair: rank for rank, pair in enumerate(_merges())}


@cache
def _vocabulary() -> dict[str, int]:
    """The number of each token."""
    symbols = _byte_symbols()
    words = [*symbols, *(f"{symbol}</w>" for symbol in symbols), *map("".join, _merges()), _START, _END]
    return {word: number for number, word in enumerate(words)}


@cache
def _tokens() -> dict[int, str]:
    """The token of each number."""
    return {number: word for word, number in _vocabulary().items()}


@cache
def _words() -> Any:
    """Takes a text apart into words, among them start and end."""
    tokenizers = extras.tokenizers()
    tokens = "|".join(map(re.escape, (_START, _END)))
    return tokenizers.pre_tokenizers.Split(tokenizers.Regex(f"{tokens}|{_WORDS}"), behavior="removed", invert=True)


@cache
def _tokenizer() -> Any:
    tokenizers = extras.tokenizers()
    models, pre_tokenizers = tokenizers.models, tokenizers.pre_tokenizers
    byte_pairs = models.BPE(_vocabulary(), _merges(), end_of_word_suffix="</w>", fuse_unk=False)
    tokenizer = tokenizers.Tokenizer(byte_pairs)
    byte_symbols = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([_words(), byte_symbols])
    return tokenizer


@cache
def _byte_symbols() -> dict[str, int]:
    """A printable character for every byte, in the order of the vocabulary (Radford et al. 2019, section 2.2).

    Bytes that are printable in Latin-1 stand for themselves and come first; the others follow, moved beyond 255.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
