"""The settings of a text tower beside weights, as transformers and open_clip write them, and its tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from ..towers.config import EPS, SIGLIP_EPS, Activation
from .tokenizer import CLEANINGS, SIGLIP_FILES, StoredTokenizer

# By transformers' names.
ACTIVATIONS: dict[str, Activation] = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
_LEGACY_END = ("clip", 2)  # as transformers' CLIP configs before release 4.31 have it, for the largest token
# Keys of open_clip's text_cfg that are read, or change nothing here, and which values of others are served.
_OPEN_CLIP_KEYS = {
    *("context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio", "eos_id", "pad_id"),
    *("proj_bias", "hf_tokenizer_name", "tokenizer_kwargs", "output_tokens", "no_causal_mask", "norm_kwargs"),
}
_TANH = {"approximate": "tanh"}
_OPEN_CLIP_SERVED: dict[str, tuple[Any, ...]] = {
    "pool_type": ("argmax", "eos", "last"),
    "proj_type": ("linear", "none"),
    "act_kwargs": (_TANH,),
    "block_type": ("default",),
}
_Number = TypeVar("_Number", int, float)


@dataclass(frozen=True)
class TextSettings:
    """What the config beside the weights says of the text tower, None where it is silent.

    `tokenizer` None is CLIP's own vocabulary. `unserved` is the part of the tower that is not served, in words. See
    `TextConfig` for the others.
    """

    heads: int | None = None
    layers: int | None = None
    activation: Activation | None = None
    eps: float = EPS
    end: int | None = None
    last: bool = False
    causal: bool = True
    projected: bool = True
    tokenizer: StoredTokenizer | None = None
    unserved: str | None = None


def hugging_face_text(path: Path, content: dict[str, Any]) -> TextSettings:
    """Of a transformers config at `path`; what it leaves out has transformers' defaults."""
    text: dict[str, Any] = {**(content.get("text_config") or {}), **(content.get("text_config_dict") or {})}
    siglip = content["model_type"] == "siglip"
    activation = text.get("hidden_act", "gelu_pytorch_tanh" if siglip else "quick_gelu")
    if activation not in ACTIVATIONS:
        return TextSettings(unserved=f"its hidden_act is {activation!r}")
    if siglip:
        tokenizer = StoredTokenizer.of_siglip(path)
        return TextSettings(
            heads=_number(text, "num_attention_heads", 12),
            layers=_number(text, "num_hidden_layers", 12),
            activation=ACTIVATIONS[activation],
            eps=_number(text, "layer_norm_eps", SIGLIP_EPS),
            last=True,
            causal=False,
            tokenizer=tokenizer,
            unserved=None if tokenizer else f"it has no tokenizer: place {' or '.join(SIGLIP_FILES)} in {path.parent}",
        )
    end = text.get("eos_token_id", 49407)
    if not isinstance(end, int):
        return TextSettings(unserved=f"its eos_token_id is {end!r}")
    return TextSettings(
        heads=_number(text, "num_attention_heads", 8),
        layers=_number(text, "num_hidden_layers", 12),
        activation=ACTIVATIONS[activation],
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
        if key not in _OPEN_CLIP_KEYS and value and value not in _OPEN_CLIP_SERVED.get(key, ()):
            return TextSettings(unserved=f"text_cfg sets {key} to {value!r}")
    norm = cast(dict[str, Any], text.get("norm_kwargs") or {})
    if norm.keys() - {"eps"}:
        return TextSettings(unserved=f"text_cfg sets norm_kwargs to {norm}")
    tokenizer: StoredTokenizer | None = None
    options = cast(dict[str, Any], text.get("tokenizer_kwargs") or {})
    if name := text.get("hf_tokenizer_name"):
        cleaning = options.get("clean", "whitespace")
        if cleaning not in CLEANINGS or options.keys() - {"clean", "strip_sep_token"}:
            return TextSettings(unserved=f"text_cfg sets tokenizer_kwargs to {options}")
        zeroed = bool(options.get("strip_sep_token"))
        tokenizer = StoredTokenizer.of_open_clip(path, str(name), cleaning, separator_zeroed=zeroed)
        if tokenizer is None:
            return TextSettings(unserved=f"its tokenizer is that of {name}: place its tokenizer.json in {path.parent}")
    elif options:
        return TextSettings(unserved=f"text_cfg sets tokenizer_kwargs to {options}")
    return TextSettings(
        heads=_number(text, "heads", 8),
        layers=_number(text, "layers", 12),
        activation=_text_activation(model, text),
        eps=_number(norm, "eps", EPS),
        end=_number(text, "eos_id", 2) if text.get("pool_type") == "eos" else None,
        last=text.get("pool_type") == "last",
        causal=not text.get("no_causal_mask"),
        projected=text.get("proj_type") != "none",
        tokenizer=tokenizer,
    )


def named_tokenizer(content: dict[str, Any]) -> str | None:
    """The repository on the hub whose tokenizer a config of open_clip names, for a text tower that may be served."""
    model = cast(dict[str, Any], content.get("model_cfg") or {})
    text = cast(dict[str, Any], model.get("text_cfg") or {})
    name = None if text.get("hf_model_name") else text.get("hf_tokenizer_name")
    return name if isinstance(name, str) else None


def _text_activation(model: dict[str, Any], text: dict[str, Any]) -> Activation | None:
    """The text tower's activation; None where the image tower has the same: it is not timm's, nor tanh's alone."""
    if text.get("act_kwargs") == _TANH:
        return "gelu_tanh"
    if model["vision_cfg"].get("timm_model_name") or model["vision_cfg"].get("act_kwargs") == _TANH:
        return "quick_gelu" if model.get("quick_gelu") else "gelu"
    return None


def _number(section: dict[str, Any], key: str, default: _Number) -> _Number:
    value = section.get(key, default)
    if not isinstance(value, type(default)):
        raise TypeError(f"{key} must be of type {type(default).__name__}, got {value!r}")
    return value
