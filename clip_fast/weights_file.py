"""Weights files: safetensors, pickled state dicts and TorchScript archives, read without running code from them.

Safetensors hold no code; pickled state dicts go through `torch.load(weights_only=True)`; of a TorchScript archive, only
the pickled attributes of its modules are read, by an unpickler that knows tensors and turns every module into an inert
holder.
"""

from __future__ import annotations

import io
import json
import pickle
import re
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast, get_args

import torch
from safetensors import safe_open
from torch import Tensor

from .config import Activation
from .errors import CheckpointError, summary


@dataclass(frozen=True)
class WeightsFile:
    """What is in a weights file: entries under the file's own names, and what the file tells about itself."""

    path: Path
    entries: dict[str, Any]
    activation: str | None = None
    open_clip: bool = False  # it bears marks of open_clip, whose models come with either activation


def read_weights(path: Path) -> WeightsFile:
    """Reads a weights file, whose kind shows in its first bytes, or the shards that an index lists."""
    if path.name.endswith(".index.json"):
        return _read_shards(path)
    with path.open("rb") as file:
        head = file.read(9)
    if not head:
        raise CheckpointError(path, "is empty")
    try:
        if head[8:] == b"{":  # after the header's length
            return _read_safetensors(path)
        if head.startswith(b"PK"):
            with zipfile.ZipFile(path) as archive:
                roots = [name.removesuffix("data.pkl") for name in archive.namelist() if name.endswith("data.pkl")]
                if any(f"{root}constants.pkl" in archive.namelist() for root in roots):
                    return _read_torchscript(path, archive, roots[0])
            return _read_pickle(path, mmap=True)
        if head.startswith(b"\x80"):
            return _read_pickle(path, mmap=False)
    except CheckpointError:
        raise
    except Exception as error:  # what a damaged file makes a parser raise is anyone's guess
        raise CheckpointError(path, f"cannot be read, truncated or damaged ({summary(error)})") from error
    raise CheckpointError(path, "is not a checkpoint: neither a PyTorch file nor safetensors")


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(path, f"cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(path, f"must hold a JSON object, got {type(content).__name__}")
    return cast(dict[str, Any], content)


def _refuse_global(path: Path, name: str) -> CheckpointError:
    return CheckpointError(path, f"refused: its pickle wants {name}, which is no part of weights and could run code")


def _read_shards(path: Path) -> WeightsFile:
    shards = read_json(path).get("weight_map")
    if not isinstance(shards, dict):
        raise CheckpointError(path, "has no weight_map")
    entries: dict[str, Any] = {}
    for name in sorted({str(name) for name in cast(dict[str, Any], shards).values()}):
        shard = path.parent / name
        if Path(name).name != name or not shard.is_file():
            raise CheckpointError(path, f"shard {name!r} is not a file in the same folder")
        entries |= read_weights(shard).entries
    return WeightsFile(path, entries)


def _read_safetensors(path: Path) -> WeightsFile:
    opened: Any = safe_open(path, "pt")
    with opened as file:
        entries: dict[str, Any] = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        metadata: dict[str, str] = file.metadata() or {}
    activation = metadata.get("activation")
    if activation is not None and activation not in get_args(Activation):
        raise CheckpointError(
            path, f"its metadata must name an activation of {get_args(Activation)}, got {activation!r}"
        )
    return _from_state_dict(path, entries, activation)


def _read_pickle(path: Path, *, mmap: bool) -> WeightsFile:
    """Reads what `torch.save` wrote: a state dict, or a training checkpoint with one under "state_dict"."""
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        if refused := re.search(r"GLOBAL ([\w.]+)|(?:class|module|function) ([\w.]+\.[\w.]+)", str(error)):
            raise _refuse_global(path, refused[1] or refused[2]) from None
        raise
    training = isinstance(content, dict) and "state_dict" in content
    if training:
        content = cast(dict[Any, Any], content)["state_dict"]
    if not isinstance(content, dict):
        raise CheckpointError(path, f"is not a checkpoint: it holds {type(content).__name__}, not a state dict")
    entries = {str(key): value for key, value in cast(dict[Any, Any], content).items()}
    return _from_state_dict(path, entries, None, training)


def _from_state_dict(
    path: Path, entries: dict[str, Any], activation: str | None, training: bool = False
) -> WeightsFile:
    # As torch.compile saves, of a whole model or of parts of it, and outside or inside of DistributedDataParallel.
    entries = {key.replace("_orig_mod.", ""): value for key, value in entries.items()}
    parallel = bool(entries) and all(key.startswith("module.") for key in entries)  # as DistributedDataParallel saves
    if parallel:
        entries = {key.removeprefix("module."): value for key, value in entries.items()}
    custom_text = any(key.startswith("text.") for key in entries)
    return WeightsFile(
        path, entries, activation, parallel or training or custom_text or path.name.startswith("open_clip")
    )


# --- TorchScript archives --------------------------------------------------------------------------------------------


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
            raise _refuse_global(self.path, f"{module}.{name}")
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


def _read_torchscript(path: Path, archive: zipfile.ZipFile, root: str) -> WeightsFile:
    """Reads the tensors of an archive under the names that its module's `state_dict()` gives them."""
    order = archive.read(f"{root}byteorder").decode() if f"{root}byteorder" in archive.namelist() else sys.byteorder
    if order != sys.byteorder:
        raise CheckpointError(path, f"its byte order is {order}, this machine's is {sys.byteorder}")
    unpickler = _ArchiveUnpickler(path, archive.read(f"{root}data.pkl"))
    module = unpickler.load()

    def load(tensor: _StoredTensor) -> Tensor:
        flat = torch.frombuffer(bytearray(archive.read(f"{root}data/{tensor.storage}")), dtype=tensor.dtype)
        return flat.as_strided(tensor.shape, tensor.stride, tensor.offset)  # checks that it lies inside

    def tensors(module: _Module, prefix: str) -> Iterator[tuple[str, Tensor]]:
        for name, value in cast(dict[str, object], module.attributes).items():
            if isinstance(value, _StoredTensor):
                yield f"{prefix}{name}", load(value)
            elif isinstance(value, _Module) and isinstance(value.attributes, dict):
                yield from tensors(value, f"{prefix}{name}.")

    # Only the class names tell OpenAI's models from open_clip's with an exact GELU.
    return WeightsFile(path, dict(tensors(module, "")), "gelu" if "GELU" in unpickler.classes else "quick_gelu")
