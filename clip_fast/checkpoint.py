"""Checkpoints of OpenAI, open_clip and Hugging Face: one canonical state dict and one config from any of them.

Layouts, by what their keys begin with: `visual.` (OpenAI and open_clip; the canonical names after it), no prefix (the
image tower alone, under canonical names), `vision_model.` (Hugging Face).
"""

from __future__ import annotations

import difflib
import math
import os
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import cast, get_args

import torch
from torch import Tensor

from . import reference
from .config import (
    BUNDLED_MODELS,
    HEAD_DIM,
    OPENAI_CHECKPOINTS,
    OPENAI_MODELS,
    RESNET_STRIDE,
    Activation,
    Config,
    ResNetConfig,
    Rgb,
    TextConfig,
    VitConfig,
)
from .download import download
from .errors import CheckpointError, summary
from .model_settings import STRUCTURE_ERRORS, Settings, description, read_settings
from .text import VOCABULARY, TextEncoder
from .weights_file import WeightsFile, read_json, read_weights

_ASSETS = Path(__file__).parent / "assets"
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_HEAD_DIMS = {1280: 80, 1408: 88, 1664: 104, 1792: 112}  # by width: images in open_clip's ViT-H, ViT-g, ViT-bigG, ViT-e


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
        return download(OPENAI_CHECKPOINTS[name], Path(download_root or "~/.cache/clip").expanduser())
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
    file = read_weights(_locate(Path(path)))
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


def _settings_beside(tower: _Tower) -> Settings:
    """What the config beside the weights says; of two, the one whose package names tensors as these are.

    By the files' names, or because Hugging Face's weights cannot do without, a config may have to be that of the
    weights. Any other may lie there for another model, and is used only where it describes the tower in the file.
    """
    weights, hugging_face = tower.file.path, tower.layout is _HUGGING_FACE
    for name in sorted(set(_FOLDER_FILES.values()), reverse=not hugging_face):
        path = weights.with_name(name)
        belongs = _FOLDER_FILES.get(weights.name) == name or (hugging_face and name == "config.json")
        if path.is_file() and (belongs or _describes(path, tower)):
            return read_settings(path)
    if hugging_face:
        raise CheckpointError(weights, "needs the config.json that transformers writes beside it")
    return Settings()


def _describes(path: Path, tower: _Tower) -> bool:
    """Whether the config at `path` is that of the tower; warns where it is a CLIP's and is not."""
    held = tower.file.activation, *tower.shape()
    try:
        told = description(path, read_json(path))
    except (CheckpointError, *STRUCTURE_ERRORS) as error:
        warnings.warn(f"{path}: not used, since it cannot be understood: {summary(error)}", stacklevel=4)
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


def _activation(file: WeightsFile) -> Activation:
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


def _layout(file: WeightsFile) -> _Layout:
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

    file: WeightsFile
    layout: _Layout

    def config(self, settings: Settings, activation: Callable[[], Activation]) -> Config:
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
            return width, layers, RESNET_STRIDE, self._shape("attnpool.positional_embedding", 2)[0]
        width, _, _, patch_size = self._shape("conv1.weight", 4)
        return width, self._count(self.layout.blocks), patch_size, self._shape("positional_embedding", 2)[0]

    def _vit_config(self, settings: Settings, activation: Callable[[], Activation]) -> VitConfig:
        width, _, _, patch_size = self._shape("conv1.weight", 4)
        if not self._has("ln_pre.weight") and not self._has("ln_pre.bias"):
            raise CheckpointError(self.file.path, "has no ln_pre (open_clip's no_ln_pre), which is not served")
        embed_dim = self._shape("proj", 2)[1]
        layers = self._count(self.layout.blocks)
        mlp_width = self._shape("transformer.resblocks.0.mlp.c_fc.weight", 2)[0]
        image_size = self._image_size("positional_embedding", patch_size, settings)
        heads = self._heads(settings.heads, width, _HEAD_DIMS.get(width, HEAD_DIM))
        return VitConfig(image_size, patch_size, width, layers, heads, embed_dim, mlp_width / width, activation())

    def _resnet_config(self, settings: Settings) -> ResNetConfig:
        width = self._shape("layer1.0.conv1.weight", 4)[0]
        layers = self._count("layer1."), self._count("layer2."), self._count("layer3."), self._count("layer4.")
        embed_dim = self._shape("attnpool.c_proj.weight", 2)[0]
        image_size = self._image_size("attnpool.positional_embedding", RESNET_STRIDE, settings)
        heads = self._heads(settings.heads, 32 * width)
        return ResNetConfig(layers, width, heads, image_size, embed_dim)

    def text(
        self, settings: Settings, activation: Callable[[], Activation]
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

    def _image_size(self, name: str, stride: int, settings: Settings) -> int:
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

    def _heads(self, told: int | None, width: int, head_dim: int = HEAD_DIM) -> int:
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
