"""TorchScript archives: their tensors, read without running code.

Only the pickled attributes of an archive's modules are read, by an unpickler that knows tensors and turns every module
into an inert holder.
"""

from __future__ import annotations

import io
import pickle
import sys
import zipfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..towers.config import Activation

# Classes of activations, and what they compute. Those of timm and of transformers are named by the approximation.
_ACTIVATIONS: dict[str, Activation] = {"GELUTanh": "gelu_tanh", "PytorchGELUTanh": "gelu_tanh", "GELU": "gelu"}


def refused_global(path: Path, name: str) -> CheckpointError:
    """The error for a pickle that asks for something beside tensors."""
    return CheckpointError(path, f"refused: its pickle wants {name}, which is no part of weights and could run code")


class _Module:
    """A module of an archive: its attributes, and no behaviour."""

    def __init__(self) -> None:
        self.attributes: object = None

    def __setstate__(self, state: object) -> None:
        self.attributes = state


class _StoredTensor(NamedTuple):
    """A strided view of one storage in an archive."""

    storage: str
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


_STORAGES = {
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "ShortStorage": torch.int16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "BoolStorage": torch.bool,
}


class _ArchiveUnpickler(pickle.Unpickler):
    """Reads an archive's module tree with tensors as descriptions.

    A pickle can call what `find_class` returns, and set attributes on it; so that is only inert classes, dtypes, `dict`
    and bound methods, of which none can be changed or made to do anything else.
    """

    def __init__(self, path: Path, data: bytes) -> None:
        super().__init__(io.BytesIO(data))
        self.path = path
        self.classes: set[str] = set()

    def find_class(self, module: str, name: str, /) -> Any:
        if module.startswith("__torch__"):
            self.classes.add(name)
            return _Module
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        known = {
            "collections.OrderedDict": dict,
            "torch._utils._rebuild_tensor_v2": self._rebuild_tensor,
            "torch._utils._rebuild_parameter": self._unwrap,
            "torch.jit._pickle.build_boollist": self._unwrap,
            "torch.jit._pickle.build_doublelist": self._unwrap,
            "torch.jit._pickle.build_intlist": self._unwrap,
            "torch.jit._pickle.build_tensorlist": self._unwrap,
            "torch.jit._pickle.restore_type_tag": self._unwrap,
        }
        if f"{module}.{name}" not in known:
            raise refused_global(self.path, f"{module}.{name}")
        return known[f"{module}.{name}"]

    def persistent_load(self, pid: tuple[str, torch.dtype, str, str, int], /) -> tuple[str, torch.dtype]:
        _, dtype, key, _device, _numel = pid
        return key, dtype

    def _rebuild_tensor(
        self, storage: tuple[str, torch.dtype], offset: int, shape: tuple[int, ...], stride: tuple[int, ...], *_: object
    ) -> _StoredTensor:
        return _StoredTensor(*storage, offset, shape, stride)

    def _unwrap(self, value: object, *_: object) -> object:
        return value


def read_torchscript(path: Path, archive: zipfile.ZipFile, root: str) -> tuple[dict[str, Any], Activation]:
    """The tensors of an archive under the names of its module's `state_dict()`, and the activation of its MLPs."""
    order = archive.read(f"{root}byteorder").decode() if f"{root}byteorder" in archive.namelist() else sys.byteorder
    if order != sys.byteorder:
        raise CheckpointError(path, f"its byte order is {order}, this machine's is {sys.byteorder}")
    unpickler = _ArchiveUnpickler(path, archive.read(f"{root}data.pkl"))
    module = unpickler.load()

    @cache
    def storage(name: str) -> bytearray:
        return bytearray(archive.read(f"{root}data/{name}"))

    def load(tensor: _StoredTensor) -> Tensor:
        flat = torch.frombuffer(storage(tensor.storage), dtype=tensor.dtype)
        return flat.as_strided(tensor.shape, tensor.stride, tensor.offset)  # checks that it lies inside

    seen: set[int] = set()  # modules: of modules inside each other there would be no end

    def tensors(module: _Module, prefix: str) -> Iterator[tuple[str, Tensor]]:
        seen.add(id(module))
        for name, value in cast(dict[str, object], module.attributes).items():
            if isinstance(value, _StoredTensor):
                yield f"{prefix}{name}", load(value)
            elif isinstance(value, _Module) and isinstance(value.attributes, dict) and id(value) not in seen:
                yield from tensors(value, f"{prefix}{name}.")

    # Only the class names tell OpenAI's models from open_clip's with a GELU.
    told: list[Activation] = [activation for name, activation in _ACTIVATIONS.items() if name in unpickler.classes]
    return dict(tensors(module, "")), told[0] if told else "quick_gelu"
