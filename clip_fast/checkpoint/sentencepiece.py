"""The tokenizer in a SentencePiece model of the unigram kind, for the tokenizers library, which reads no such file.

Sources: Kudo & Richardson, "SentencePiece" (2018), and its `sentencepiece_model.proto`; Kudo, "Subword Regularization"
(2018), section 3.2, for the unigram model; `darts_clone` for the trie in which the file has its normalisation.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

from .. import extras

_UNIGRAM = 1  # ModelProto.trainer_spec.model_type
_NO_WORDS = (2, 3, 5)  # SentencePiece.type: unknown, control and unused pieces, which no text is made of
_END = "</s>"


class SentencePiece:
    """A SentencePiece model: `normalized` is what it makes of a text first, and `tokenizer` reads that.

    `numbers` are those of its pieces.

    The tokenizer puts the model's end behind every text, and takes its words apart at spaces, however many.

    Raises:
        ValueError, IndexError, struct.error: it is no such model, or damaged.
    """

    def __init__(self, model: bytes) -> None:
        package = extras.tokenizers()
        pieces: list[tuple[str, float]] = []
        self.numbers: dict[str, int] = {}
        trainer: dict[int, Any] = {}
        normalizer: dict[int, Any] = {}
        for number, value in _fields(model):
            if number == 1:
                piece = dict(_fields(value))
                word = piece[1].decode()
                self.numbers.setdefault(word, len(pieces))
                found = f" {word}" if piece.get(3) in _NO_WORDS else word  # words have no space
                pieces.append((found, struct.unpack("<f", piece.get(2, bytes(4)))[0]))
            elif number == 2:
                trainer = dict(_fields(value))
            elif number == 3:
                normalizer = dict(_fields(value))
        if trainer.get(3, _UNIGRAM) != _UNIGRAM:
            raise ValueError("it is no unigram model")
        self.normalized = _Normalizer(normalizer.get(2, b""))
        self.tokenizer: Any = package.Tokenizer(
            package.models.Unigram(pieces, trainer.get(40, 0), bool(trainer.get(35, 0)))
        )
        words = package.pre_tokenizers
        self.tokenizer.pre_tokenizer = words.Sequence([words.WhitespaceSplit(), words.Metaspace()])
        if _END not in self.numbers:
            raise ValueError(f"it has no piece {_END!r}")
        self.tokenizer.post_processor = package.processors.TemplateProcessing(
            single=f"$A {_END}", special_tokens=[(_END, self.numbers[_END])]
        )


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of a protocol buffer: their numbers, and integers or bytes."""
    place = 0

    def integer() -> int:
        nonlocal place
        value, shift = 0, 0
        while True:
            byte = message[place]
            place += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while place < len(message):
        number, kind = divmod(integer(), 8)
        if kind == 0:
            yield number, integer()
            continue
        size = {1: 8, 5: 4}[kind] if kind != 2 else integer()
        if place + size > len(message):
            raise ValueError("it is cut off")
        yield number, message[place : place + size]
        place += size


class _Normalizer:
    """Replaces, from the left on, the longest sequences of characters that a model's table has.

    The table is a double array: the child of a node for a byte stands at the node's offset, xor the byte. Behind it
    are the replacements, each up to a zero.
    """

    def __init__(self, table: bytes) -> None:
        (size,) = struct.unpack_from("<I", table) if table else (0,)
        self._units = struct.unpack_from(f"<{size // 4}I", table, 4) if table else ()
        self._replacements = table[4 + size :]

    def __call__(self, text: str) -> str:
        data, place = text.encode(errors="replace"), 0
        parts: list[bytes] = []
        while place < len(data):
            length, replacement = self._longest(data, place)
            if not length:
                length = next(n for n in range(1, 5) if n + place == len(data) or data[place + n] & 0xC0 != 0x80)
                replacement = data[place : place + length]
            parts.append(replacement)
            place += length
        return b"".join(parts).decode()

    def _longest(self, data: bytes, start: int) -> tuple[int, bytes]:
        """The length of the longest sequence at `start`, 0 where there is none, and what it is replaced by."""
        if not self._units:
            return 0, b""
        length, found = 0, 0
        node = _offset(self._units[0])
        for place in range(start, len(data)):
            node ^= data[place]
            unit = self._units[node]
            if unit & 0x800000FF != data[place]:
                break
            node ^= _offset(unit)
            if unit & 0x100:
                length, found = place + 1 - start, self._units[node] & 0x7FFFFFFF
        return length, self._replacements[found : self._replacements.index(0, found)] if length else b""


def _offset(unit: int) -> int:
    return (unit >> 10) << ((unit & 0x200) >> 6)
