"""The tokenizer that a checkpoint brings: the tokenizer.json, or SigLIP's spiece.model, beside its weights."""

from __future__ import annotations

import string
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from .. import extras
from ..errors import CheckpointError, summary
from ..simple_tokenizer import clean, too_long
from .sentencepiece import SentencePiece
from .weights_file import read_json

_PUNCTUATION = str.maketrans("_", " ", string.punctuation.replace("_", ""))
_ALL_PUNCTUATION = str.maketrans("", "", string.punctuation)

# What open_clip does to a text before a tokenizer of transformers reads it, by the names in its configs.
CLEANINGS: dict[str, Callable[[str], str]] = {
    "whitespace": clean,
    "lower": lambda text: clean(text).lower(),
    "canonicalize": lambda text: " ".join(clean(text).translate(_PUNCTUATION).lower().split()),
}


def _of_siglip(text: str) -> str:
    """What transformers' tokenizer of SigLIP does to a text."""
    return _of_siglip_cased(text.lower())


def _of_siglip_cased(text: str) -> str:
    """The same where letters stay large."""
    return " ".join(text.translate(_ALL_PUNCTUATION).split())


_CLEANINGS = CLEANINGS | {"siglip": _of_siglip, "siglip_cased": _of_siglip_cased}

SETTINGS_FILES = ("tokenizer_config.json", "special_tokens_map.json")
SIGLIP_FILES = ("spiece.model", "tokenizer.json")  # transformers' SiglipTokenizer reads the first alone
_SIGLIP_PADDING = "</s>"  # the default of transformers' SiglipTokenizer
_SEPARATOR = "[SEP]"  # and of its BertTokenizer
_GEMMA = ("GemmaTokenizer", "Siglip2Tokenizer")  # of SigLIP 2; by default they fill texts up on the left


@dataclass(frozen=True)
class StoredTokenizer:
    """A tokenizer as it stands in its file, in memory: it outlives the file, and goes along in a pickle.

    `padding` is the token that fills texts up, None where the file itself says it, and `on_left` says on which side.
    `cleaning` is what is done to texts before; None leaves them as they are. `lower` has the tokenizer read small
    letters. `zeroed` is a token in whose place a 0 stands.
    """

    path: Path
    content: bytes = field(repr=False)
    padding: str | None
    on_left: bool
    cleaning: str | None
    lower: bool = False
    zeroed: str | None = None

    @classmethod
    def beside(cls, config: Path) -> StoredTokenizer | None:
        """The tokenizer in the folder of a config; None where there is none."""
        return cls._at(config.with_name("tokenizer.json"), None, _settings_beside(config))

    @classmethod
    def of_open_clip(
        cls, config: Path, repository: str, cleaning: str, separator_zeroed: bool
    ) -> StoredTokenizer | None:
        """The tokenizer that open_clip's config names by its `repository` on the hub; None where it is not at hand.

        It is in the folder of the config, or else in the cache of huggingface_hub.
        """
        path = config.with_name("tokenizer.json")
        path = path if path.is_file() else _cached(repository, config)
        if path is None:
            return None
        told = _settings_beside(path)
        stored = cls._at(path, cleaning, told)
        zeroed = _token(told, "sep_token") or _SEPARATOR
        return replace(stored, zeroed=zeroed) if stored and separator_zeroed else stored

    @classmethod
    def of_siglip(cls, config: Path) -> StoredTokenizer | None:
        """The tokenizer in the folder of transformers' config of a SigLIP; None where there is none.

        Texts are changed as SigLIP's tokenizers do before they read them. SigLIP 2 was trained with small letters, and
        transformers' tokenizer for it reads them so. The one that its folders name, Gemma's, leaves that to its user.
        """
        told = _settings_beside(config)
        kind = _class_told(told)
        if kind not in ("SiglipTokenizer", None):
            stored = cls._at(config.with_name("tokenizer.json"), None, told)
            return stored and replace(stored, lower=kind in _GEMMA)
        cleaning = "siglip_cased" if told("do_lower_case") is False else "siglip"
        found = (cls._at(config.with_name(name), cleaning, told) for name in SIGLIP_FILES)
        stored = next(filter(None, found), None)
        return stored and replace(stored, padding=stored.padding or _SIGLIP_PADDING)

    @classmethod
    def _at(cls, path: Path, cleaning: str | None, told: Callable[[str], object]) -> StoredTokenizer | None:
        if not path.is_file():
            return None
        side = told("padding_side") or ("left" if _class_told(told) in _GEMMA else "right")
        return cls(path, path.read_bytes(), _token(told, "pad_token"), side == "left", cleaning)

    def __call__(self, texts: str | list[str], context_length: int, truncate: bool = False) -> Tensor:
        """Tokens as `simple_tokenizer.tokenize` gives them, and of the same errors; with this tokenizer's own padding.

        Raises:
            CheckpointError: the file holds no tokenizer.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        if self.cleaning is not None:
            texts = list(map(_CLEANINGS[self.cleaning], texts))
        tokenizer, normalized = _tokenizer(self, context_length)
        try:
            rows = tokenizer.encode_batch(list(map(normalized, texts)))
        except (IndexError, ValueError) as error:
            raise _unreadable(self.path, error) from error
        for text, row in zip(texts, rows, strict=True):
            if row.overflowing and not truncate:
                content = sum(part.special_tokens_mask.count(0) for part in (row, *row.overflowing))
                raise too_long(text, content + tokenizer.num_special_tokens_to_add(False), context_length)
        tokens = torch.tensor([row.ids for row in rows], dtype=torch.int32).view(len(texts), context_length)
        return tokens if self.zeroed is None else tokens.masked_fill_(tokens == tokenizer.token_to_id(self.zeroed), 0)


def _settings_beside(file: Path) -> Callable[[str], object]:
    """Key -> what transformers' settings of the tokenizer in a file's folder say. Each of them is read once."""
    read = cache(read_json)

    def told(key: str) -> object:
        for name in SETTINGS_FILES:
            if (path := file.with_name(name)).is_file() and (value := read(path).get(key)) is not None:
                return value
        return None

    return told


def _token(told: Callable[[str], object], key: str) -> str | None:
    """The token of this kind, as the settings tell it: by itself, or with its properties."""
    token = told(key)
    token = cast(dict[str, Any], token).get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def _cached(repository: str, config: Path) -> Path | None:
    """The tokenizer.json of a repository in the cache that `config` lies in, or in huggingface_hub's own."""
    try:
        hub = extras.huggingface_hub()
        caches = [config.parents[3]] if config.parent.parent.name == "snapshots" else []
        found = (hub.try_to_load_from_cache(repository, "tokenizer.json", cache_dir=each) for each in (*caches, None))
        return next((Path(path) for path in found if isinstance(path, str)), None)
    except (ModuleNotFoundError, ValueError):  # without the extra; what is named may be no repository, but a folder
        return None


def _class_told(told: Callable[[str], object]) -> str | None:
    """The name of transformers' class of the tokenizer."""
    name = told("tokenizer_class")
    return name.removesuffix("Fast") if isinstance(name, str) else None


@lru_cache(maxsize=4)  # one may take a hundred megabytes
def _tokenizer(stored: StoredTokenizer, context_length: int) -> tuple[Any, Callable[[str], str]]:
    """The tokenizer, and what makes a text fit for it."""
    package, normalized = extras.tokenizers(), str
    try:
        if stored.path.suffix == ".model":
            model = SentencePiece(stored.content)
            tokenizer, normalized, number_of = model.tokenizer, model.normalized, model.numbers.get
        else:
            tokenizer = package.Tokenizer.from_str(stored.content.decode())
            number_of = tokenizer.token_to_id
        if stored.lower:
            own_normalizer = [tokenizer.normalizer] if tokenizer.normalizer else []
            tokenizer.normalizer = package.normalizers.Sequence([package.normalizers.Lowercase(), *own_normalizer])
        own: dict[str, Any] = tokenizer.padding or {}
        padding = own.get("pad_id", 0) if stored.padding is None else number_of(stored.padding)
        if padding is None:
            raise ValueError(f"it has no padding token {stored.padding!r}")
        if stored.zeroed is not None and tokenizer.token_to_id(stored.zeroed) is None:
            raise ValueError(f"it has no token {stored.zeroed!r}")
    except Exception as error:  # the package raises bare exceptions
        raise _unreadable(stored.path, error) from error
    tokenizer.enable_truncation(context_length)
    tokenizer.enable_padding(length=context_length, pad_id=padding, direction="left" if stored.on_left else "right")
    return tokenizer, normalized


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(path, f"holds no tokenizer that can be read: {summary(error)}")
