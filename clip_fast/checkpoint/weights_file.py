"""Weights files: safetensors, pickled state dicts and TorchScript archives, read without running code from them.

Safetensors hold no code. Pickled state dicts go through `torch.load(weights_only=True)`. `torchscript.py` reads
TorchScript archives.
"""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

import torch
from safetensors import safe_open

from ..errors import CheckpointError, summary
from ..towers.config import Activation
from .torchscript import read_torchscript, refused_global


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
                    return WeightsFile(path, *read_torchscript(path, archive, roots[0]))
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
            raise refused_global(path, refused[1] or refused[2]) from None
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
