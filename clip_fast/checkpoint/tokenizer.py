"""The tokenizer that a checkpoint brings: the tokenizer.json beside its weights."""

from __future__ import annotations

import string
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from .. import extras
from ..errors import CheckpointError, summary
from ..simple_tokenizer import clean, too_long
from .weights_file import read_json

_PUNCTUATION = str.maketrans("_", " ", string.punctuation.replace("_", ""))

# What open_clip does to a text before a tokenizer of transformers reads it, by the names in its configs.
CLEANINGS: dict[str, Callable[[str], str]] = {
    "whitespace": clean,
    "lower": lambda text: clean(text).lower(),
    "canonicalize": lambda text: " ".join(clean(text).translate(_PUNCTUATION).lower().split()),
}


@dataclass(frozen=True)
class StoredTokenizer:
    """A tokenizer as it stands in its file, in memory: it outlives the file, and goes along in a pickle.

    `padding` is the token that fills texts up, None where the file itself says it. `cleaning` is one of CLEANINGS; None
    leaves texts as they are, as transformers does.
    """

    path: Path
    content: bytes = field(repr=False)
    padding: str | None
    cleaning: str | None

    @classmethod
    def beside(cls, config: Path, cleaning: str | None = None) -> StoredTokenizer | None:
        """The tokenizer in the folder of a config; None where there is none."""
        path = config.with_name("tokenizer.json")
        if not path.is_file():
            return None
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            told = read_json(beside).get("pad_token") if (beside := path.with_name(name)).is_file() else None
            padding: Any = cast(dict[str, Any], told).get("content") if isinstance(told, dict) else told
            if isinstance(padding, str):
                return cls(path, path.read_bytes(), padding, cleaning)
        return cls(path, path.read_bytes(), None, cleaning)

    def __call__(self, texts: str | list[str], context_length: int, truncate: bool = False) -> Tensor:
        """Tokens as `simple_tokenizer.tokenize` gives them, and of the same errors; with this tokenizer's own padding.

        Raises:
            CheckpointError: the file holds no tokenizer.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        if self.cleaning is not None:
            texts = list(map(CLEANINGS[self.cleaning], texts))
        tokenizer = _tokenizer(self, context_length)
        rows = tokenizer.encode_batch(texts)
        for text, row in zip(texts, rows, strict=True):
            if row.overflowing and not truncate:
                content = sum(part.special_tokens_mask.count(0) for part in (row, *row.overflowing))
                raise too_long(text, content + tokenizer.num_special_tokens_to_add(False), context_length)
        return torch.tensor([row.ids for row in rows], dtype=torch.int32).view(len(texts), context_length)


@lru_cache(maxsize=4)  # one may take a hundred megabytes
def _tokenizer(stored: StoredTokenizer, context_length: int) -> Any:
    try:
        tokenizer = extras.tokenizers().Tokenizer.from_str(stored.content.decode())
        own: dict[str, Any] = tokenizer.padding or {}
        padding = own.get("pad_id", 0) if stored.padding is None else tokenizer.token_to_id(stored.padding)
        if padding is None:
            raise ValueError(f"it has no padding token {stored.padding!r}")
    except ImportError:
        raise
    except Exception as error:  # the package raises bare exceptions
        raise CheckpointError(stored.path, f"holds no tokenizer that can be read: {summary(error)}") from error
    tokenizer.enable_truncation(context_length)
    tokenizer.enable_padding(length=context_length, pad_id=padding)
    return tokenizer
