"""Weights files: safetensors, pickled state dicts and TorchScript archives, read without running code from them.

Safetensors hold no code. Pickled state dicts go through `torch.load(weights_only=True)`. `torchscript.py` reads
TorchScript archives.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

import torch
from safetensors import safe_open

from ..errors import CheckpointError, summary
from ..towers.config import Activation
from .layouts import listing, prefixes
from .torchscript import read_torchscript, refused_global

_INDEX = ".index.json"
_TRAINING = "state_dict"  # where open_clip's training checkpoints have it
_LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True)
class WeightsFile:
    """What is in a weights file: entries under the file's own names, and what the file tells about itself."""

    path: Path
    entries: dict[str, Any]
    activation: str | None = None
    open_clip: bool = False  # it bears marks of open_clip, whose models come with either activation
    lasting: bool = False  # entries are the file's pages, and stay as they are


@dataclass(frozen=True)
class _Contents:
    """What one file holds, before the model in it is looked for."""

    entries: dict[str, Any]
    activation: str | None = None
    training: bool = False  # a training checkpoint of open_clip's form
    lasting: bool = False  # see `WeightsFile`


def read_weights(path: Path) -> WeightsFile:
    """Reads a weights file, whose kind shows in its first bytes, or the shards that an index lists.

    The names begin where a CLIP's do: what a module that held the model, or a tool, put before them is cut off.
    """
    contents = _read_shards(path) if is_index(path) else _read(path)
    return _weights_file(path, contents)


def _read(path: Path) -> _Contents:
    with path.open("rb") as file:
        head = file.read(len(_LFS_POINTER))
    if not head:
        raise CheckpointError(path, "is empty")
    if head == _LFS_POINTER:
        raise CheckpointError(path, "is a pointer of git-lfs, and not the weights themselves: run `git lfs pull`")
    try:
        if head[8:9] == b"{":  # after the header's length
            return _read_safetensors(path)
        if head.startswith(b"PK"):
            with zipfile.ZipFile(path) as archive:
                root = f"{next(iter(archive.namelist()), '').partition('/')[0]}/"  # as PyTorch finds it
                _check_sizes(path, archive, root)
                if f"{root}constants.pkl" in archive.namelist():
                    return _Contents(*read_torchscript(path, archive, root))
            return _read_pickle(path, mmap=True)
        if head.startswith(b"\x80"):
            return _read_pickle(path, mmap=False)
    except CheckpointError:
        raise
    except Exception as error:  # what a damaged file makes a parser raise is anyone's guess
        raise CheckpointError(path, f"cannot be read, truncated or damaged ({summary(error)})") from error
    raise CheckpointError(path, "is not a checkpoint: neither a PyTorch file nor safetensors")


def _check_sizes(path: Path, archive: zipfile.ZipFile, root: str) -> None:
    """Refuses an archive that is larger than its file: PyTorch stores all but TorchScript's code as it is.

    The code is in a folder of its own below `root`, from which nothing is read.
    """
    members = [info for info in archive.infolist() if not info.filename.startswith(f"{root}code/")]
    if packed := next((info.filename for info in members if info.compress_type != zipfile.ZIP_STORED), None):
        raise CheckpointError(path, f"refused: its {packed} is compressed, which PyTorch's own files are not")
    if sum(info.file_size for info in members) > path.stat().st_size:
        raise CheckpointError(path, "refused: what it claims to hold is larger than the file")


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(path, f"cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(path, f"must hold a JSON object, got {type(content).__name__}")
    return cast(dict[str, Any], content)


def is_index(path: Path) -> bool:
    """Whether a file lists shards of weights and holds none itself."""
    return path.name.endswith(_INDEX)


def listed_shards(index: Path) -> dict[str, str]:
    """The name of each tensor's shard, as the index lists them."""
    listed: Any = read_json(index).get("weight_map")
    if not isinstance(listed, dict):
        raise CheckpointError(index, "has no weight_map")
    return {key: str(name) for key, name in cast(dict[str, Any], listed).items()}


def _read_shards(path: Path) -> _Contents:
    """Reads the shards that an index lists, which must hold every tensor that it lists."""
    tensors = listed_shards(path)
    entries: dict[str, Any] = {}
    lasting = True
    for name in sorted(set(tensors.values())):
        if Path(name).name != name or name.endswith(_INDEX) or not os.path.isfile(path.parent / name):
            raise CheckpointError(path, f"shard {name!r} is not a file in the same folder")
        shard = _read(path.parent / name)
        wanted = {key for key, of in tensors.items() if of == name}
        if missing := sorted(wanted - shard.entries.keys()):
            raise CheckpointError(path, f"lists {listing(missing)} in {name}, which has no such tensor")
        entries |= shard.entries
        lasting &= shard.lasting
    return _Contents(entries, lasting=lasting)


def _read_safetensors(path: Path) -> _Contents:
    opened: Any = safe_open(path, "pt")
    with opened as file:
        entries: dict[str, Any] = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        metadata: dict[str, str] = file.metadata() or {}
    activation = metadata.get("activation")
    if activation is not None and activation not in get_args(Activation):
        raise CheckpointError(
            path, f"its metadata must name an activation of {get_args(Activation)}, got {activation!r}"
        )
    return _Contents(entries, activation, lasting=_never_written_again(path))


def _never_written_again(path: Path) -> bool:
    """Whether it is a file of the hub's cache, whose name is the hash of its bytes: new bytes go to a new file.

    As with any file that is mapped, the process dies if something cuts it short, or deletes it on another host of a
    network's disk.
    """
    stored = path.resolve()
    return stored.parent.name == "blobs" and re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", stored.name) is not None


def _read_pickle(path: Path, *, mmap: bool) -> _Contents:
    """Reads what `torch.save` wrote: a state dict, or a training checkpoint with one in it, under any name."""
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        if refused := re.search(r"GLOBAL ([\w.]+)|(?:class|module|function) ([\w.]+\.[\w.]+)", str(error)):
            raise refused_global(path, refused[1] or refused[2]) from None
        raise
    name, content = _state_dict_in(path, content)
    if not isinstance(content, dict):
        raise CheckpointError(path, f"is not a checkpoint: it holds {type(content).__name__}, not a state dict")
    return _Contents(_named(cast(dict[Any, Any], content)), training=name == _TRAINING)


def _state_dict_in(path: Path, content: Any) -> tuple[str, Any]:
    """The state dict in a training checkpoint and its name there; what has none is given as it is, without a name."""
    models: dict[str, Any] = dict(_models_in("", content))
    if not models and isinstance(content, dict) and _TRAINING in content:
        models = {_TRAINING: cast(dict[Any, Any], content)[_TRAINING]}
    if len(models) > 1 and _TRAINING not in models:
        raise CheckpointError(path, f"holds several models, {', '.join(models)}: save one of them alone")
    name = _TRAINING if _TRAINING in models else next(iter(models), "")
    return name, models.get(name, cast(Any, content))


def _models_in(name: str, content: Any, depth: int = 3) -> Iterator[tuple[str, dict[Any, Any]]]:
    """The state dicts of CLIPs in nested dicts, each with the names of the dicts around it."""
    if not isinstance(content, dict):
        return
    inside = cast(dict[Any, Any], content)
    if prefixes(_named(inside)):
        yield name, inside
    elif depth:
        for key, value in inside.items():
            yield from _models_in(f"{name}.{key}" if name else str(key), value, depth - 1)


def _named(entries: dict[Any, Any]) -> dict[str, Any]:
    # As torch.compile saves, of a whole model or of parts of it, and outside or inside of DistributedDataParallel.
    return {str(key).replace("_orig_mod.", ""): value for key, value in entries.items()}


def _weights_file(path: Path, contents: _Contents) -> WeightsFile:
    entries = _named(contents.entries)
    found = prefixes(entries)
    if len(found) > 1:
        raise CheckpointError(path, f"holds several models, named {', '.join(found)}: save one of them alone")
    prefix = found[0] if found else ""
    entries = {key.removeprefix(prefix): value for key, value in entries.items() if key.startswith(prefix)}
    if "text.logit_scale" in entries:  # as clip_fast's first versions named the text side
        entries = {key.removeprefix("text."): value for key, value in entries.items()}
    marks = (
        contents.training,
        prefix.startswith("module."),  # as DistributedDataParallel saves
        any(key.startswith("text.") for key in entries),
        path.name.startswith("open_clip"),
    )
    return WeightsFile(path, entries, contents.activation, any(marks), contents.lasting)
