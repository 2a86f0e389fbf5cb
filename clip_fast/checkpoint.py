"""Checkpoints of OpenAI, open_clip and Hugging Face: one canonical state dict and one config from any of them.

No code from a file ever runs. Safetensors hold no code; pickled state dicts go through `torch.load(weights_only=True)`;
of a TorchScript archive, only the pickled attributes of its modules are read, by an unpickler that knows tensors and
turns every module into an inert holder.

Layouts, by what their keys begin with: `visual.` (OpenAI and open_clip; the canonical names after it), no prefix (the
image tower alone, under canonical names), `vision_model.` (Hugging Face).
"""

from __future__ import annotations

import difflib
import hashlib
import http.client
import io
import json
import math
import os
import pickle
import re
import sys
import time
import urllib.request
import uuid
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, cast, get_args

import torch
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

from . import reference
from .config import (
    BUNDLED_MODELS,
    IMAGE_MEAN,
    IMAGE_STD,
    LAYER_NORM_EPS,
    OPENAI_CHECKPOINTS,
    OPENAI_MODELS,
    Activation,
    Config,
    Pretrained,
    ResNetConfig,
    Rgb,
    TextConfig,
    VitConfig,
)
from .text import VOCABULARY, TextEncoder

DOWNLOAD_TIMEOUT = 30.0  # seconds without a byte

_ABANDONED = 3600.0  # seconds since a byte, after which nobody downloads to a file any more

_ASSETS = Path(__file__).parent / "assets"
_CHUNK = 1 << 20  # bytes read at a time, from disk or network
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

_HEAD_DIM = 64  # of every OpenAI model, and open_clip's default
_RESNET_STRIDE = 32
_HEAD_DIMS = {1280: 80, 1408: 88, 1664: 104, 1792: 112}  # by width: images in open_clip's ViT-H, ViT-g, ViT-bigG, ViT-e


class CheckpointError(ValueError):
    """A checkpoint that cannot be had or is not sound; the message names the file and what is wrong with it."""

    def __init__(self, path: object, problem: str) -> None:
        super().__init__(f"{path}: {problem}")


@dataclass(frozen=True)
class Checkpoint:
    """An image tower as read from a file, and the text tower where the file has OpenAI's.

    `state_dict` has exactly the names and shapes of `reference.build(config).state_dict()`; its tensors are contiguous,
    on the CPU, independent of the file and of the dtype that they have in it. `mean` and `std` normalise the RGB
    channels of pixels scaled to [0, 1], and `squash` is that of `Preprocess`. `text` has the text tower's config, and
    the names and shapes of `text.TextEncoder(config).state_dict()`.
    """

    config: Config
    state_dict: dict[str, Tensor]
    mean: Rgb
    std: Rgb
    text: tuple[TextConfig, dict[str, Tensor]] | None = None
    squash: bool = False


def available_models() -> list[str]:
    """Names that `resolve` knows: OpenAI's models, then those that come with the package."""
    return [*OPENAI_MODELS, *BUNDLED_MODELS]


def resolve(name_or_path: str | os.PathLike[str], download_root: str | os.PathLike[str] | None = None) -> Path:
    """Finds a checkpoint: a name from `available_models()`, downloaded where needed, or a path that exists.

    Downloads are kept in `download_root`, by default `~/.cache/clip`, and checked by their SHA-256 each time.

    Raises:
        CheckpointError: for neither a name nor an existing path, and where a download fails.
    """
    name = os.fspath(name_or_path)
    if name in OPENAI_CHECKPOINTS:
        return _download(OPENAI_CHECKPOINTS[name], Path(download_root or "~/.cache/clip").expanduser())
    path = _ASSETS / name / "model.safetensors" if name in BUNDLED_MODELS else Path(name).expanduser()
    if path.exists():
        return path
    close = difflib.get_close_matches(name.lower(), {known.lower() for known in available_models()}, n=1, cutoff=0.5)
    hint = "".join(f"; did you mean {known!r}?" for known in available_models() if known.lower() in close)
    raise CheckpointError(
        name, f"no such file, and no model of that name{hint} (names: {', '.join(available_models())})"
    )


def read_checkpoint(path: str | os.PathLike[str], activation: Activation | None = None) -> Checkpoint:
    """Reads the image tower from a checkpoint file or a folder with one, without running code from it.

    Args:
        path: OpenAI's `.pt` (TorchScript archive or state dict), open_clip's `.pt`, `.bin` or `.safetensors`, or a
            folder as Hugging Face (`config.json`) or open_clip (`open_clip_config.json`) writes it. Such a config is
            heeded beside any weights of the shapes that it describes.
        activation: of a ViT's MLPs; by default what the config beside the weights or the file itself says. A plain
            state dict with OpenAI's names is taken for OpenAI's, "quick_gelu", with a warning.

    Raises:
        CheckpointError: for anything but a complete, finite image tower of a kind that is served.
        ValueError: for an unknown activation.
    """
    if activation is not None and activation not in get_args(Activation):
        raise ValueError(f"activation must be one of {get_args(Activation)} or None, got {activation!r}")
    file = _read(_locate(Path(path)))
    tower = _Tower(file, _layout(file))
    settings = _settings_beside(tower)

    @cache
    def activation_of_file() -> Activation:
        return activation or settings.activation or _activation(file)

    config = tower.config(settings, activation_of_file)
    state_dict = tower.state_dict(config)
    text = tower.text(settings, activation_of_file)
    return Checkpoint(config, state_dict, settings.mean, settings.std, text, settings.squash)


# --- Folders and the settings in them --------------------------------------------------------------------------------

# Weights by file name, the preferred first, and the config that belongs to them.
_FOLDER_FILES = {
    "model.safetensors": "config.json",
    "model.safetensors.index.json": "config.json",
    "open_clip_model.safetensors": "open_clip_config.json",
    "pytorch_model.bin": "config.json",
    "pytorch_model.bin.index.json": "config.json",
    "open_clip_pytorch_model.bin": "open_clip_config.json",
}
_HUGGING_FACE_TYPES = ("clip", "clip_vision_model")
_STRUCTURE_ERRORS = (
    AttributeError,
    KeyError,
    TypeError,
    IndexError,
    ZeroDivisionError,
)  # of JSON that is not as expected
# Keys of open_clip's vision_cfg that change nothing here or are read from the weights' shapes, and harmless defaults.
_OPEN_CLIP_KEYS = {"image_size", "patch_size", "width", "layers", "head_width", "mlp_ratio", "patch_dropout"}
_OPEN_CLIP_UNUSED = {"output_tokens", "attn_pooler_queries", "attn_pooler_heads", "pos_embed_type"}
_OPEN_CLIP_DEFAULTS = {"pool_type": "tok", "block_type": "default", "timm_pool": "avg", "timm_proj": "linear"}
# The same of its text_cfg. What pool_type there has no use for, eos_id and pad_id, changes nothing either.
_OPEN_CLIP_TEXT_KEYS = {"context_length", "vocab_size", "width", "heads", "layers", "eos_id", "pad_id"}
_OPEN_CLIP_TEXT_DEFAULTS = {"mlp_ratio": 4.0, "pool_type": "argmax", "proj_type": "linear", "block_type": "default"}


@dataclass(frozen=True)
class _Settings:
    """What the config files beside the weights say, None where they are silent."""

    activation: Activation | None = None
    heads: int | None = None
    image_size: int | None = None
    mean: Rgb = IMAGE_MEAN
    std: Rgb = IMAGE_STD
    squash: bool = False
    text_heads: int | None = None
    text_as_openai: bool = True


def _locate(path: Path) -> Path:
    """The weights at `path` or in this folder."""
    if path.is_dir():
        present = [path / name for name in _FOLDER_FILES if (path / name).is_file()]
        if not present:
            raise CheckpointError(path, f"folder holds none of {', '.join(_FOLDER_FILES)}")
        return present[0]
    if not path.is_file():
        raise CheckpointError(path, "no such file")
    return path


def _settings_beside(tower: _Tower) -> _Settings:
    """What the config beside the weights says; of two, the one whose package names tensors as these are.

    By the files' names, or because Hugging Face's weights cannot do without, a config may have to be that of the
    weights. Any other may lie there for another model, and is used only where it describes the tower in the file.
    """
    weights, hugging_face = tower.file.path, tower.layout is _HUGGING_FACE
    for name in sorted(set(_FOLDER_FILES.values()), reverse=not hugging_face):
        path = weights.with_name(name)
        belongs = _FOLDER_FILES.get(weights.name) == name or (hugging_face and name == "config.json")
        if path.is_file() and (belongs or _describes(path, tower)):
            return _read_settings(path)
    if hugging_face:
        raise CheckpointError(weights, "needs the config.json that transformers writes beside it")
    return _Settings()


def _describes(path: Path, tower: _Tower) -> bool:
    """Whether the config at `path` is that of the tower; warns where it is a CLIP's and is not."""
    held = tower.file.activation, *tower.shape()
    try:
        told = _description(path, _read_json(path))
    except (CheckpointError, *_STRUCTURE_ERRORS) as error:
        warnings.warn(f"{path}: not used, since it cannot be understood: {_summary(error)}", stacklevel=4)
        return False
    if told is None:
        return False
    if told[1:] != held[1:] or held[0] not in (None, told[0]):
        names = "activation", "width", "layers", "patch size", "tokens"
        differing = [f"{name} {a}, not {b}" for name, a, b in zip(names, told, held, strict=True) if b not in (None, a)]
        warnings.warn(
            f"{path}: not used, since it is another model's than {tower.file.path.name}: {', '.join(differing)}",
            stacklevel=4,
        )
        return False
    return True


def _description(path: Path, content: dict[str, Any]) -> tuple[object, ...] | None:
    """A ViT's or ResNet's activation and `_Tower.shape` by a config; None by one that is no CLIP's.

    What the config leaves out has its package's defaults.
    """
    if path.name == "config.json":
        if content.get("model_type") not in _HUGGING_FACE_TYPES:
            return None
        vision = _hugging_face_vision(content)
        layers, patch_size = vision.get("num_hidden_layers", 12), vision.get("patch_size", 32)
        width, activation = vision.get("hidden_size", 768), vision.get("hidden_act", "quick_gelu")
    else:
        model: dict[str, Any] = content["model_cfg"]
        vision: dict[str, Any] = model["vision_cfg"]
        if vision.get("timm_model_name"):
            return None
        is_resnet = isinstance(vision.get("layers"), list)
        layers, patch_size = vision.get("layers", 12), _RESNET_STRIDE if is_resnet else vision.get("patch_size", 16)
        width, activation = vision.get("width", 768), "quick_gelu" if model.get("quick_gelu") else "gelu"
    size: Any = vision.get("image_size", 224)
    side = cast(list[Any], size)[0] if isinstance(size, list) else size
    return activation, width, layers, patch_size, (side // patch_size) ** 2 + 1


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(path, f"cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(path, f"must hold a JSON object, got {type(content).__name__}")
    return cast(dict[str, Any], content)


def _read_settings(path: Path) -> _Settings:
    content = _read_json(path)
    try:
        if path.name == "config.json":
            return _hugging_face_settings(path, content)
        return _open_clip_settings(path, content)
    except _STRUCTURE_ERRORS as error:
        raise CheckpointError(path, f"has an unexpected structure: {error!r}") from error


def _hugging_face_settings(path: Path, content: dict[str, Any]) -> _Settings:
    """Of a transformers config; what it leaves out has transformers' defaults."""
    if content.get("model_type") not in _HUGGING_FACE_TYPES:
        raise CheckpointError(
            path, f"model_type must be 'clip' or 'clip_vision_model', got {content.get('model_type')!r}"
        )
    vision = _hugging_face_vision(content)
    activation = vision.get("hidden_act", "quick_gelu")
    if activation not in get_args(Activation):
        raise CheckpointError(path, f"hidden_act must be one of {get_args(Activation)}, got {activation!r}")
    eps = vision.get("layer_norm_eps", LAYER_NORM_EPS)
    if eps != LAYER_NORM_EPS:
        raise CheckpointError(path, f"layer_norm_eps must be {LAYER_NORM_EPS}, got {eps}")
    image_size = _integer(path, "image_size", vision.get("image_size", 224))
    processing: dict[str, Any] = {}
    if (beside := path.with_name("preprocessor_config.json")).is_file():
        processing = _read_json(beside)
    elif (beside := path.with_name("processor_config.json")).is_file():
        processing = _read_json(beside).get("image_processor") or {}
    squash, other = _hugging_face_preprocessing(processing, image_size)
    _warn_of_preprocessing(beside, other)
    return _Settings(
        activation,
        heads=_integer(path, "num_attention_heads", vision.get("num_attention_heads", 12)),
        image_size=image_size,
        mean=_triple(beside, processing, "image_mean", IMAGE_MEAN),
        std=_triple(beside, processing, "image_std", IMAGE_STD),
        squash=squash,
    )


def _hugging_face_vision(content: dict[str, Any]) -> dict[str, Any]:
    if content["model_type"] == "clip":  # early versions of transformers let vision_config_dict overrule vision_config
        return {**(content.get("vision_config") or {}), **(content.get("vision_config_dict") or {})}
    return content


def _hugging_face_preprocessing(processing: dict[str, Any], image_size: int) -> tuple[bool, dict[str, Any]]:
    """Whether an image processor of transformers squashes, and what else it is set to do otherwise than CLIP's."""
    set_to: dict[str, Any] = {
        "do_resize": True,
        "resample": 3,  # Pillow's bicubic
        "size": image_size,
        "do_center_crop": True,
        "crop_size": image_size,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "do_pad": False,
    }
    set_to |= {key: processing[key] for key in set_to if processing.get(key) is not None}
    square = [image_size, image_size], {"height": image_size, "width": image_size}
    squash = set_to["size"] in square
    done = {
        "do_resize": set_to["do_resize"],
        "resample": set_to["resample"] == 3,
        "size": squash or set_to["size"] in (image_size, {"shortest_edge": image_size}),
        "do_center_crop": set_to["do_center_crop"] or squash,
        "crop_size": set_to["crop_size"] in (image_size, *square) or not set_to["do_center_crop"],
        "do_rescale": set_to["do_rescale"],
        "rescale_factor": math.isclose(set_to["rescale_factor"], 1 / 255, rel_tol=1e-6),
        "do_normalize": set_to["do_normalize"],
        "do_pad": not set_to["do_pad"],
    }
    return squash, {key: set_to[key] for key in done if not done[key]}


def _open_clip_settings(path: Path, content: dict[str, Any]) -> _Settings:
    model: dict[str, Any] = content["model_cfg"]
    vision: dict[str, Any] = model["vision_cfg"]
    for key, value in _special(vision, _OPEN_CLIP_KEYS | _OPEN_CLIP_UNUSED, _OPEN_CLIP_DEFAULTS).items():
        raise CheckpointError(path, f"vision_cfg sets {key} to {value!r}, which is not served")
    processing: dict[str, Any] = content.get("preprocess_cfg", {})
    served = {
        "interpolation": (None, "bicubic", "random"),
        "resize_mode": (None, "shortest", "squash"),
    }  # random: training
    other = {key: processing[key] for key, values in served.items() if processing.get(key) not in values}
    _warn_of_preprocessing(path, other)
    width = vision.get("width", 768) * (32 if isinstance(vision.get("layers"), list) else 1)  # of the attention
    size: Any = vision.get("image_size", 224)
    if isinstance(size, list):
        sizes = cast(list[Any], size)
        if len(set(sizes)) != 1:
            raise CheckpointError(path, f"vision_cfg must have a square image_size, got {sizes}")
        size = sizes[0]
    text: dict[str, Any] = model.get("text_cfg") or {}
    return _Settings(
        "quick_gelu" if model.get("quick_gelu") else "gelu",
        heads=width // vision.get("head_width", _HEAD_DIM),
        image_size=_integer(path, "image_size", size),
        mean=_triple(path, processing, "mean", IMAGE_MEAN),
        std=_triple(path, processing, "std", IMAGE_STD),
        squash=processing.get("resize_mode") == "squash",
        text_heads=_integer(path, "heads", text.get("heads", 8)) if text else None,
        text_as_openai=not _special(text, _OPEN_CLIP_TEXT_KEYS, _OPEN_CLIP_TEXT_DEFAULTS),
    )


def _special(section: dict[str, Any], known: set[str], defaults: dict[str, Any]) -> dict[str, Any]:
    """What a section of open_clip's sets besides `known` keys, empty values and harmless `defaults`."""
    return {k: v for k, v in section.items() if k not in known and v and v != defaults.get(k)}


def _integer(path: Path, key: str, value: Any) -> int:
    if not isinstance(value, int):
        raise CheckpointError(path, f"{key} must be an integer, got {value!r}")
    return value


def _triple(path: Path, section: dict[str, Any], key: str, default: Rgb) -> Rgb:
    values: Any = section.get(key) or default
    if len(values) != 3 or not all(isinstance(value, (int, float)) for value in values):
        raise CheckpointError(path, f"{key} must be three numbers, got {values!r}")
    return cast(Rgb, tuple(float(value) for value in values))


def _warn_of_preprocessing(path: Path, other: dict[str, Any]) -> None:
    """Warns of the settings that `Preprocess` does not follow."""
    if other:
        settings = ", ".join(f"{key} {value!r}" for key, value in other.items())
        warnings.warn(
            f"{path}: this model's images are not preprocessed as CLIP's ({settings}), which is not done here; "
            "the encoder is right, but preprocess images yourself",
            stacklevel=6,
        )


# --- Files -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _File:
    """What is in a weights file: entries under the file's own names, and what the file tells about itself."""

    path: Path
    entries: dict[str, Any]
    activation: str | None = None
    open_clip: bool = False  # it bears marks of open_clip, whose models come with either activation


def _read(path: Path) -> _File:
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
        raise CheckpointError(path, f"cannot be read, truncated or damaged ({_summary(error)})") from error
    raise CheckpointError(path, "is not a checkpoint: neither a PyTorch file nor safetensors")


def _summary(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _refuse_global(path: Path, name: str) -> CheckpointError:
    return CheckpointError(path, f"refused: its pickle wants {name}, which is no part of weights and could run code")


def _read_shards(path: Path) -> _File:
    shards = _read_json(path).get("weight_map")
    if not isinstance(shards, dict):
        raise CheckpointError(path, "has no weight_map")
    entries: dict[str, Any] = {}
    for name in sorted({str(name) for name in cast(dict[str, Any], shards).values()}):
        shard = path.parent / name
        if Path(name).name != name or not shard.is_file():
            raise CheckpointError(path, f"shard {name!r} is not a file in the same folder")
        entries |= _read(shard).entries
    return _File(path, entries)


def _read_safetensors(path: Path) -> _File:
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


def _read_pickle(path: Path, *, mmap: bool) -> _File:
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


def _from_state_dict(path: Path, entries: dict[str, Any], activation: str | None, training: bool = False) -> _File:
    # As torch.compile saves, of a whole model or of parts of it, and outside or inside of DistributedDataParallel.
    entries = {key.replace("_orig_mod.", ""): value for key, value in entries.items()}
    parallel = bool(entries) and all(key.startswith("module.") for key in entries)  # as DistributedDataParallel saves
    if parallel:
        entries = {key.removeprefix("module."): value for key, value in entries.items()}
    custom_text = any(key.startswith("text.") for key in entries)
    return _File(path, entries, activation, parallel or training or custom_text or path.name.startswith("open_clip"))


def _activation(file: _File) -> Activation:
    """The activation by what the weights file alone tells."""
    if file.activation is not None:
        return cast(Activation, file.activation)
    if file.open_clip:
        raise CheckpointError(
            file.path, "does not say which activation its model has: pass activation='gelu' or activation='quick_gelu'"
        )
    warnings.warn(
        f"{file.path}: taken for one of OpenAI's models, with QuickGELU; if it is not, pass activation='gelu' "
        "(and activation='quick_gelu' to silence this warning)",
        stacklevel=5,
    )
    return "quick_gelu"


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


def _read_torchscript(path: Path, archive: zipfile.ZipFile, root: str) -> _File:
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
    return _File(path, dict(tensors(module, "")), "gelu" if "GELU" in unpickler.classes else "quick_gelu")


# --- The image tower in a file ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Layout:
    """How a family of files names things."""

    prefix: str  # of the image tower's keys
    blocks: str  # what comes before a ViT block's number
    other: re.Pattern[str]  # keys that are known and not the image tower's parameters
    keys: Callable[[str], list[str]]  # the file's keys, without prefix, for a canonical name


_HUGGING_FACE_NAMES = {
    "class_embedding": "embeddings.class_embedding",
    "conv1.weight": "embeddings.patch_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_pre.": "pre_layrnorm.",  # transformers' own spelling
    "transformer.resblocks.": "encoder.layers.",
    ".ln_1.": ".layer_norm1.",
    ".attn.": ".self_attn.",
    ".ln_2.": ".layer_norm2.",
    ".mlp.c_fc.": ".mlp.fc1.",
    ".mlp.c_proj.": ".mlp.fc2.",
    "ln_post.": "post_layernorm.",
}


def hugging_face_keys(name: str) -> list[str]:
    if name == "proj":
        return ["visual_projection.weight"]
    for ours, theirs in _HUGGING_FACE_NAMES.items():
        name = name.replace(ours, theirs)
    stacked = re.fullmatch(r"(.*)\.in_proj_(weight|bias)", name)
    names = [f"{stacked[1]}.{part}_proj.{stacked[2]}" for part in "qkv"] if stacked else [name]
    return [f"vision_model.{name}" for name in names]


_OPENAI_OTHER = (
    r"(token_embedding|transformer|ln_final|text)\.|"
    r"(positional_embedding|text_projection(\.weight|\.bias)?|logit_scale|logit_bias|attn_mask|input_resolution|"
    r"context_length|vocab_size|text_embeddings)$"
)
_OPENAI = _Layout("visual.", "transformer.resblocks.", re.compile(_OPENAI_OTHER), lambda name: [f"visual.{name}"])
_TEXT = _Layout("", "transformer.resblocks.", re.compile(r".*"), lambda name: [name])
_TOWER_ALONE = _Layout("", "transformer.resblocks.", re.compile(r"text_embeddings$"), lambda name: [name])
_HUGGING_FACE = _Layout(
    "vision_model.",
    "encoder.layers.",
    re.compile(r"text_model\.|text_projection\.|(logit_scale|vision_model\.embeddings\.position_ids)$"),
    hugging_face_keys,
)

_UNSERVED = {  # parts of open_clip's models, by their keys
    r"visual\.trunk\.": "an image tower from timm",
    r".*\.ls_[12]\.gamma$": "LayerScale",
    r"visual\.attn_pool\.": "an attentional pooler",
}


def _layout(file: _File) -> _Layout:
    """How the image tower in a file is named."""
    keys = file.entries.keys()
    for pattern, part in _UNSERVED.items():
        if key := next((key for key in keys if re.match(pattern, key)), None):
            raise CheckpointError(file.path, f"{key} belongs to {part}, which is not served")
    if any(key.startswith("vision_model.") for key in keys):
        return _HUGGING_FACE
    if any(key.startswith("visual.") for key in keys):
        return _OPENAI
    if "conv1.weight" in keys:
        return _TOWER_ALONE
    if "embeddings.patch_embedding.weight" in keys:  # of a CLIPVisionModel, as transformers 5 writes it
        return _HUGGING_FACE
    raise CheckpointError(file.path, f"holds no CLIP image tower, only {_listing(sorted(keys)) or 'nothing'}")


@dataclass(frozen=True)
class _Tower:
    """The image tower in a file, by canonical names. Every method raises CheckpointError."""

    file: _File
    layout: _Layout

    def config(self, settings: _Settings, activation: Callable[[], Activation]) -> Config:
        """Infers the tower's config from shapes, and from `settings` what shapes cannot tell."""
        if self.layout is _HUGGING_FACE and not self._has("proj"):
            raise CheckpointError(
                self.file.path,
                "misses visual_projection.weight: a CLIPVisionModel has no embeddings shared with text, "
                "save a CLIPModel or a CLIPVisionModelWithProjection",
            )
        try:
            if self._is_resnet():
                return self._resnet_config(settings)
            return self._vit_config(settings, activation)
        except CheckpointError:
            raise
        except ValueError as error:
            raise CheckpointError(self.file.path, f"its tensors' shapes make no tower: {error}") from error

    def shape(self) -> tuple[object, ...]:
        """Width, layers, patch size and number of tokens, as a config tells them."""
        if self._is_resnet():
            width = self._shape("layer1.0.conv1.weight", 4)[0]
            layers = [self._count(f"layer{stage}.") for stage in (1, 2, 3, 4)]
            return width, layers, _RESNET_STRIDE, self._shape("attnpool.positional_embedding", 2)[0]
        width, _, _, patch_size = self._shape("conv1.weight", 4)
        return width, self._count(self.layout.blocks), patch_size, self._shape("positional_embedding", 2)[0]

    def _vit_config(self, settings: _Settings, activation: Callable[[], Activation]) -> VitConfig:
        width, _, _, patch_size = self._shape("conv1.weight", 4)
        if not self._has("ln_pre.weight") and not self._has("ln_pre.bias"):
            raise CheckpointError(self.file.path, "has no ln_pre (open_clip's no_ln_pre), which is not served")
        embed_dim = self._shape("proj", 2)[1]
        layers = self._count(self.layout.blocks)
        mlp_width = self._shape("transformer.resblocks.0.mlp.c_fc.weight", 2)[0]
        image_size = self._image_size("positional_embedding", patch_size, settings)
        heads = self._heads(settings.heads, width, _HEAD_DIMS.get(width, _HEAD_DIM))
        return VitConfig(image_size, patch_size, width, layers, heads, embed_dim, mlp_width / width, activation())

    def _resnet_config(self, settings: _Settings) -> ResNetConfig:
        width = self._shape("layer1.0.conv1.weight", 4)[0]
        layers = self._count("layer1."), self._count("layer2."), self._count("layer3."), self._count("layer4.")
        embed_dim = self._shape("attnpool.c_proj.weight", 2)[0]
        image_size = self._image_size("attnpool.positional_embedding", _RESNET_STRIDE, settings)
        heads = self._heads(settings.heads, 32 * width)
        return ResNetConfig(layers, width, heads, image_size, embed_dim)

    def text(
        self, settings: _Settings, activation: Callable[[], Activation]
    ) -> tuple[TextConfig, dict[str, Tensor]] | None:
        """The text tower, where it is complete, is OpenAI's in its names, its vocabulary and what the config says of
        it, and its activation can be told."""
        names = ("token_embedding.weight", "positional_embedding", "text_projection", "logit_scale")
        if self.layout is not _OPENAI or not all(name in self.file.entries for name in names):
            return None
        tower = _Tower(self.file, _TEXT)
        vocabulary, width = tower._shape("token_embedding.weight", 2)
        if vocabulary != VOCABULARY or not settings.text_as_openai:  # it reads other tokens, or reads them otherwise
            return None
        context_length, embed_dim = tower._shape("positional_embedding", 2)[0], tower._shape("text_projection", 2)[1]
        try:
            told = activation()
        except CheckpointError:  # a ResNet's own needs none
            return None
        layers = tower._count(_TEXT.blocks)
        heads = tower._heads(settings.text_heads, width)
        try:
            config = TextConfig(context_length, vocabulary, width, layers, heads, embed_dim, told)
        except ValueError as error:
            raise CheckpointError(self.file.path, f"its text tower makes none: {error}") from error
        with torch.device("meta"):
            wanted = TextEncoder(config).state_dict()
        return config, {name: tower._load(name, like) for name, like in wanted.items()}

    def state_dict(self, config: Config) -> dict[str, Tensor]:
        """All tensors of the tower, checked: complete, nothing besides, right in shape and dtype, finite."""
        with torch.device("meta"):
            wanted = reference.build(config).state_dict()
        used = {key for name in wanted for key in self.layout.keys(name)}
        state_dict = {name: self._load(name, like) for name, like in wanted.items()}
        surplus = [key for key in self.file.entries if key not in used and not self.layout.other.match(key)]
        if surplus:
            raise CheckpointError(self.file.path, f"holds what a CLIP model has not: {_listing(surplus)}")
        return state_dict

    def _load(self, name: str, like: Tensor) -> Tensor:
        if name.endswith("num_batches_tracked") and not self._has(name):  # some tools leave these counters out
            return torch.zeros((), dtype=like.dtype)
        keys = self.layout.keys(name)
        shape = list(like.shape)
        if transposed := self._is_transposed(name):
            shape.reverse()
        shape[:1] = [size // len(keys) for size in shape[:1]]
        parts = [self._tensor(key) for key in keys]
        for key, part in zip(keys, parts, strict=True):
            if list(part.shape) != shape:
                raise CheckpointError(self.file.path, f"{key} must have shape {shape}, got {list(part.shape)}")
            if like.is_floating_point() and part.dtype not in _DTYPES:
                raise CheckpointError(self.file.path, f"{key} must be of a floating-point dtype, got {part.dtype}")
            # Of NaN and other numbers the least is NaN. Counters of batches are nobody's concern, whatever their dtype.
            if like.is_floating_point() and not all(bound.isfinite() for bound in part.aminmax()):
                raise CheckpointError(self.file.path, f"{key} holds NaN or infinite values")
        if len({part.dtype for part in parts}) != 1:
            raise CheckpointError(self.file.path, f"{', '.join(keys)} must be of one dtype")
        whole = torch.cat([part.detach() for part in parts]) if len(parts) > 1 else parts[0].detach()
        return (whole.T if transposed else whole).clone(memory_format=torch.contiguous_format)

    def _has(self, name: str) -> bool:
        return all(key in self.file.entries for key in self.layout.keys(name))

    def _is_resnet(self) -> bool:
        return self._has("layer1.0.conv1.weight")

    def _is_transposed(self, name: str) -> bool:
        return name == "proj" and self.layout is _HUGGING_FACE

    def _tensor(self, key: str) -> Tensor:
        """The tensor under a key of the file."""
        if key not in self.file.entries:
            raise CheckpointError(self.file.path, f"misses {key}")
        value = self.file.entries[key]
        if not isinstance(value, Tensor) or value.layout != torch.strided or value.device.type != "cpu":
            raise CheckpointError(self.file.path, f"{key} is not a plain dense tensor but {type(value).__name__}")
        return value

    def _shape(self, name: str, dimensions: int) -> tuple[int, ...]:
        """The shape of one canonical tensor that is stored in one piece."""
        (key,) = self.layout.keys(name)
        shape = tuple(self._tensor(key).shape)
        if len(shape) != dimensions or 0 in shape:
            raise CheckpointError(
                self.file.path, f"{key} must have {dimensions} dimensions, none of them 0, got {list(shape)}"
            )
        return shape[::-1] if self._is_transposed(name) else shape

    def _count(self, blocks: str) -> int:
        """How many numbered blocks there are, which must be 0, 1, 2 and so on."""
        pattern = re.compile(re.escape(f"{self.layout.prefix}{blocks}") + r"(\d+)\.")
        numbers = {int(found[1]) for key in self.file.entries if (found := pattern.match(key))}
        missing = next(number for number in range(len(numbers) + 1) if number not in numbers)
        if missing < max(len(numbers), 1):
            raise CheckpointError(self.file.path, f"misses all of {self.layout.prefix}{blocks}{missing}")
        return len(numbers)

    def _image_size(self, name: str, stride: int, settings: _Settings) -> int:
        tokens = self._shape(name, 2)[0]
        grid = math.isqrt(tokens - 1)
        (key,) = self.layout.keys(name)
        if tokens < 2 or grid**2 + 1 != tokens:
            raise CheckpointError(
                self.file.path, f"{key} must have one row and a square number more, got {tokens} rows"
            )
        if settings.image_size is not None and settings.image_size // stride != grid:
            raise CheckpointError(
                self.file.path,
                f"{key} is for images of {grid * stride} pixels, the config beside it says {settings.image_size}",
            )
        return settings.image_size or grid * stride

    def _heads(self, told: int | None, width: int, head_dim: int = _HEAD_DIM) -> int:
        if told is not None:
            return told
        if width % head_dim:
            raise CheckpointError(
                self.file.path,
                f"its number of heads cannot be told from its width of {width}: "
                "put its config.json or open_clip_config.json beside it",
            )
        return width // head_dim


def _listing(keys: list[str]) -> str:
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")


# --- Downloads -------------------------------------------------------------------------------------------------------


def _download(source: Pretrained, folder: Path) -> Path:
    """A published checkpoint in `folder`, verified; downloaded unless it is there already.

    The file appears under its name only when it is whole and verified, so that processes may do this at the same time.
    """
    target = folder / source.filename
    if target.is_file():
        with target.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() == source.sha256:
                return target
        warnings.warn(f"{target}: its SHA-256 is not that of {source.url}; downloading it again", stacklevel=3)
    partial = folder / f"{source.filename}.{uuid.uuid4().hex}.part"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(f"{source.filename}.*.part"):  # of downloads that were killed
            if time.time() - leftover.stat().st_mtime > _ABANDONED:
                leftover.unlink(missing_ok=True)
        received = _fetch(source, partial)
        if received != source.sha256:
            raise CheckpointError(
                target,
                f"the download from {source.url} is not whole or not genuine: its {partial.stat().st_size} bytes have "
                f"SHA-256 {received}, wanted {source.sha256}",
            )
        os.replace(partial, target)
    except (OSError, http.client.HTTPException) as error:
        raise CheckpointError(
            target,
            f"cannot be downloaded from {source.url} ({_summary(error)}); "
            f"without a network, get it elsewhere and place it as {source.filename} in {folder}",
        ) from error
    finally:  # interrupted or not, nothing half-written stays
        partial.unlink(missing_ok=True)
    return target


def _fetch(source: Pretrained, partial: Path) -> str:
    """Downloads to a new file and returns its SHA-256 in hexadecimal."""
    digest = hashlib.sha256()
    with (
        urllib.request.urlopen(source.url, timeout=DOWNLOAD_TIMEOUT) as response,
        partial.open("xb") as file,
        tqdm(
            total=int(response.headers.get("Content-Length", 0)) or None,
            desc=source.filename,
            unit="B",
            unit_scale=True,
            unit_divisor=1024,
        ) as progress,
    ):
        while chunk := response.read(_CHUNK):
            file.write(chunk)
            digest.update(chunk)
            progress.update(len(chunk))
    return digest.hexdigest()
