"""The settings of a text tower beside weights, as transformers and open_clip write them, and its tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast, get_args

from ..towers.config import EPS, Activation
from .tokenizer import CLEANINGS, StoredTokenizer

_LEGACY_END = ("clip", 2)  # as transformers' CLIP configs before release 4.31 have it, for the largest token
# Keys of open_clip's text_cfg that are read, or change nothing here, and what the others have by default.
_OPEN_CLIP_KEYS = {
    *("context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio", "pool_type", "eos_id", "pad_id"),
    *("proj_bias", "hf_tokenizer_name", "tokenizer_kwargs", "output_tokens"),
}
_OPEN_CLIP_DEFAULTS = {"proj_type": "linear", "block_type": "default"}
_POOLINGS = ("argmax", "eos")
_Number = TypeVar("_Number", int, float)


@dataclass(frozen=True)
class TextSettings:
    """What the config beside the weights says of the text tower, None where it is silent.

    `tokenizer` None is CLIP's own vocabulary. `unserved` is the part of the tower that is not served, in words.
    """

    heads: int | None = None
    layers: int | None = None
    activation: Activation | None = None
    eps: float = EPS
    end: int | None = None
    tokenizer: StoredTokenizer | None = None
    unserved: str | None = None


def hugging_face_text(path: Path, content: dict[str, Any]) -> TextSettings:
    """Of a transformers config at `path`; what it leaves out has transformers' defaults."""
    text: dict[str, Any] = {**(content.get("text_config") or {}), **(content.get("text_config_dict") or {})}
    activation, end = text.get("hidden_act", "quick_gelu"), text.get("eos_token_id", 49407)
    if activation not in get_args(Activation):
        return TextSettings(unserved=f"its hidden_act is {activation!r}")
    if not isinstance(end, int):
        return TextSettings(unserved=f"its eos_token_id is {end!r}")
    return TextSettings(
        heads=_number(text, "num_attention_heads", 8),
        layers=_number(text, "num_hidden_layers", 12),
        activation=activation,
        eps=_number(text, "layer_norm_eps", EPS),
        end=None if (content["model_type"], end) == _LEGACY_END else end,
        tokenizer=StoredTokenizer.beside(path),
    )


def open_clip_text(path: Path, model: dict[str, Any]) -> TextSettings:
    """Of the model_cfg in an open_clip config at `path`."""
    text: dict[str, Any] = model.get("text_cfg") or {}
    if not text:
        return TextSettings()
    if name := text.get("hf_model_name"):
        return TextSettings(unserved=f"it is transformers' {name}")
    for key, value in text.items():
        if key not in _OPEN_CLIP_KEYS and value and value != _OPEN_CLIP_DEFAULTS.get(key):
            return TextSettings(unserved=f"text_cfg sets {key} to {value!r}")
    if (pooling := text.get("pool_type", "argmax")) not in _POOLINGS:
        return TextSettings(unserved=f"text_cfg sets pool_type to {pooling!r}")
    tokenizer: StoredTokenizer | None = None
    options = cast(dict[str, Any], text.get("tokenizer_kwargs") or {})
    if name := text.get("hf_tokenizer_name"):
        cleaning = options.get("clean", "whitespace")
        if cleaning not in CLEANINGS or options.keys() - {"clean"}:
            return TextSettings(unserved=f"text_cfg sets tokenizer_kwargs to {options}")
        tokenizer = StoredTokenizer.beside(path, cleaning)
        if tokenizer is None:
            return TextSettings(unserved=f"its tokenizer is that of {name}: place its tokenizer.json in {path.parent}")
    elif options:
        return TextSettings(unserved=f"text_cfg sets tokenizer_kwargs to {options}")
    return TextSettings(
        heads=_number(text, "heads", 8),
        layers=_number(text, "layers", 12),
        end=_number(text, "eos_id", 2) if pooling == "eos" else None,
        tokenizer=tokenizer,
    )


def _number(section: dict[str, Any], key: str, default: _Number) -> _Number:
    value = section.get(key, default)
    if not isinstance(value, type(default)):
        raise TypeError(f"{key} must be of type {type(default).__name__}, got {value!r}")
    return value
