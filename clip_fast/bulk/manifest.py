"""The manifest of an output folder: all that its bytes depend on, and the totals once the run is complete."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import PIL
import torch
from PIL import features

from ..encoder import ImageEncoder
from ..extras import pyarrow
from ..inputs.finder import without_braces
from ..kernels.dispatch import triton_can_run
from ..preprocess import Preprocess
from ..version import __version__
from .atomic import new_file
from .tables import Totals

MANIFEST_NAME = "manifest.json"
RAY_MANIFEST_NAME = "_manifest.json"  # readers of a folder of parquet files skip names that begin with _


class Manifest(NamedTuple):
    """The contents of a manifest: `done` are the totals, None until the run is complete. Ray's counts no shards."""

    settings: dict[str, Any]
    done: Totals | None


def read_manifest(path: Path) -> Manifest:
    """The manifest at `path`.

    Raises:
        ValueError: the file is no manifest; the message names it.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
        settings, done = dict(content["settings"]), content.get("done")
        if done is not None:
            done = Totals(*(int(done.get(name, 0)) for name in ("images", "failed", "shards")))
        return Manifest(settings, done)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no manifest of clip-fast encode: {error!r}") from error


def manifest_bytes(manifest: dict[str, Any]) -> bytes:
    """A manifest as it stands in its file."""
    return json.dumps(manifest, indent=2, sort_keys=True).encode() + b"\n"


def write_manifest(path: Path, manifest: dict[str, Any]) -> None:
    """Writes a manifest, whole or not at all."""
    with new_file(path) as file:
        file.write(manifest_bytes(manifest))


def compare(before: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    """Refuses to resume a run that had other settings. More inputs may follow those that it had, and a model with the
    same weights may have another name.

    Raises:
        ValueError: names each setting that differs, with both values.
    """
    names = [name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]
    if "inputs" in names:
        earlier, inputs = (list(without_braces(settings.get("inputs") or ())) for settings in (before, now))
        if earlier and inputs[: len(earlier)] == earlier:
            names.remove("inputs")
    if "model" in names and "weights" in before and "weights" not in names:
        names.remove("model")
    if names:
        differences = "; ".join(f"{name} was {before.get(name)!r}, is {now.get(name)!r}" for name in names)
        advice = (
            ". A run is extended by inputs behind those that it had: named there, in wider braces, or at the end of "
        )
        advice = f"{advice}its list" if "inputs" in names else ""
        raise ValueError(f"cannot resume {folder} with other settings: {differences}{advice}")


def weights_digest(model: ImageEncoder) -> str:
    """SHA-256 of all that a model computes with: its shape, its normalisation, its precision and its weights."""
    digest = sha256(f"{model.config} {model.mean} {model.std} {model.precision}".encode())
    for name, tensor in sorted(model.visual.state_dict().items()):
        digest.update(f"{name} {tensor.dtype}".encode())
        digest.update(tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def preprocessing(preprocess: Preprocess) -> dict[str, object]:
    """The settings of a manifest that say how images were resized and converted. The weights' digest says the rest."""
    return {
        "squash": preprocess.squash,
        # Alone where they are so: older folders do not have them.
        **({"on_white": True} if preprocess.on_white else {}),
        **({"crop": "rounded down"} if preprocess.on_white and not preprocess.squash else {}),
        **({"bilinear": True} if preprocess.bilinear else {}),
    }


def preprocessed_as(preprocess: Preprocess, settings: Mapping[str, Any]) -> Preprocess:
    """`preprocess`, resizing and converting as a manifest's settings say; as it is where they do not, as Ray's once."""
    if "squash" not in settings:
        return preprocess
    squash, on_white, bilinear = (bool(settings.get(name)) for name in ("squash", "on_white", "bilinear"))
    return replace(preprocess, squash=squash, on_white=on_white, bilinear=bilinear)


def computer(devices: Sequence[torch.device], threads: int) -> dict[str, object]:
    """The devices, threads and versions that show in an embedding's last bits, or in the bytes of its file."""
    versions = {
        "clip_fast": __version__,
        "torch": torch.__version__,
        "pillow": PIL.__version__,
        "libjpeg_turbo": features.version("libjpeg_turbo"),
        "pyarrow": pyarrow()[0].__version__,
    }
    if devices[0].type != "cuda":
        capability = torch.backends.cpu.get_cpu_capability()
        return {"device": f"cpu, {capability}", "threads": threads, "versions": versions}
    if triton_can_run(devices[0]):
        versions["triton"] = import_module("triton").__version__
    names = [torch.cuda.get_device_name(device) for device in devices]
    return {"device": names[0] if len(set(names)) == 1 else names, "versions": versions}
