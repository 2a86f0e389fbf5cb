"""Optional packages: imported when they are first used, with an error that names the extra to install."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any


def _extra(name: str, extra: str, purpose: str) -> Any:
    """The module `name`.

    Raises:
        ModuleNotFoundError: it is not installed; the message says which extra brings it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ModuleNotFoundError(f'{purpose} needs the extra "{extra}": pip install "clip_fast[{extra}]"') from error


def pyarrow() -> tuple[ModuleType, ModuleType]:
    """pyarrow and pyarrow.parquet. Raises ModuleNotFoundError, see `_extra`."""
    purpose = "parquet, and shards with it,"
    return _extra("pyarrow", "parquet", purpose), _extra("pyarrow.parquet", "parquet", purpose)


def ray() -> tuple[Any, Any]:
    """ray and ray.data. Raises ModuleNotFoundError, see `_extra`."""
    return _extra("ray", "ray", "encoding on a cluster"), _extra("ray.data", "ray", "encoding on a cluster")


def tokenizers() -> Any:
    """Raises ModuleNotFoundError, see `_extra`."""
    return _extra("tokenizers", "text", "tokenize")


def ftfy() -> Any:
    """Raises ModuleNotFoundError, see `_extra`."""
    return _extra("ftfy", "text", "tokenize")


def huggingface_hub() -> Any:
    """huggingface_hub, with its modules of errors and constants. Raises ModuleNotFoundError, see `_extra`."""
    purpose = "a model of the Hugging Face hub"
    for module in ("errors", "constants"):
        _extra(f"huggingface_hub.{module}", "hub", purpose)
    return _extra("huggingface_hub", "hub", purpose)


def torchvision_transforms() -> Any:
    """torchvision.transforms. Raises ModuleNotFoundError, see `_extra`."""
    return _extra("torchvision.transforms", "transforms", "preprocess.transforms")
