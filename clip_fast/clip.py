"""The names of openai-clip's `clip.clip`, for code that imports it: `from clip_fast import clip`.

The error for a name that is not here says what has it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

from .checkpoint.download import Pretrained, download
from .checkpoint.published import OPENAI_CHECKPOINTS, available_models
from .errors import no_attribute
from .loading import load
from .model import build_model as build_model
from .preprocess import Preprocess
from .simple_tokenizer import SimpleTokenizer, tokenize

__all__ = ["available_models", "load", "tokenize"]

_MODELS = {name: source.url for name, source in OPENAI_CHECKPOINTS.items()}


def _download(url: str, root: str | None = None) -> str:  # pyright: ignore[reportUnusedFunction]
    """The file of one of `_MODELS`, downloaded where needed and checked, in `root` or in `~/.cache/clip`."""
    return str(download(Pretrained(url, url.split("/")[-2]), Path(root or "~/.cache/clip").expanduser()))


def _convert_image_to_rgb(image: Image.Image) -> Image.Image:  # pyright: ignore[reportUnusedFunction]
    return image.convert("RGB")


def _transform(n_px: int) -> Preprocess:  # pyright: ignore[reportUnusedFunction]
    """The preprocessing for images of `n_px` pixels a side."""
    return Preprocess(n_px)


def __getattr__(name: str) -> Any:
    if name == "_tokenizer":  # made when it is asked for: it needs the extra "text"
        return SimpleTokenizer()
    raise no_attribute(f"module {__name__!r}", name)
