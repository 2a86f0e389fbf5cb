"""The settings beside weights, as transformers and open_clip write them: what the weights' shapes cannot tell."""

from __future__ import annotations

import math
import re
import reprlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast, get_args

import torch
from PIL.Image import Resampling

from ..errors import CheckpointError
from ..towers.config import (
    EPS,
    HEAD_DIM,
    IMAGE_MEAN,
    IMAGE_STD,
    RESNET_STRIDE,
    SIGLIP_EPS,
    SIGLIP_MEAN,
    SIGLIP_STD,
    Activation,
    ImageSize,
    Pool,
    Rgb,
    image_size_of,
)
from .text_settings import ACTIVATIONS, TextSettings, hugging_face_text, open_clip_text
from .weights_file import read_json

_LARGEST = float(torch.finfo(torch.float32).max)  # that a mean or a deviation may be
STRUCTURE_ERRORS = (
    AttributeError,
    KeyError,
    TypeError,
    IndexError,
    ArithmeticError,
)  # of JSON that is not as expected
# Keys of open_clip's vision_cfg that are read, change nothing here or are told by the weights, and harmless defaults.
_OPEN_CLIP_KEYS = {
    *("image_size", "patch_size", "width", "layers", "head_width", "mlp_ratio", "patch_dropout", "ls_init_value"),
    *("no_ln_pre", "pool_type", "final_ln_after_pool", "norm_kwargs", "act_kwargs"),
    *("output_tokens", "attn_pooler_queries", "attn_pooler_heads", "pos_embed_type"),
}
_OPEN_CLIP_DEFAULTS = {"block_type": "default", "timm_pool": "avg", "timm_proj": "linear"}


@dataclass(frozen=True)
class BesideWeights:
    """What the config files beside the weights say, None where they are silent."""

    activation: Activation | None = None
    heads: int | None = None
    image_size: ImageSize | None = None
    mean: Rgb = IMAGE_MEAN
    std: Rgb = IMAGE_STD
    squash: bool = False
    on_white: bool = False
    bilinear: bool = False
    eps: float = EPS
    ln_pre: bool = True
    pool: Pool = "tok"
    ln_after_pool: bool = False
    text: TextSettings = field(default_factory=TextSettings)
    # A file, and the settings of preprocessing in it that `Preprocess` does not follow.
    unfollowed: tuple[Path, dict[str, Any]] | None = None


@dataclass(frozen=True)
class Conventions:
    """What is the same in all models of a kind, and what transformers' configs of it may leave out."""

    types: tuple[str, ...]  # transformers' words for the kind
    activation: str  # transformers' name of it
    patch_size: int
    class_tokens: int
    cropped: bool  # the default of its image processor
    settings: BesideWeights  # where no file says otherwise


_WITHOUT_CONFIG = TextSettings(unserved="place its package's config and its tokenizer.json beside the weights")
# Whether a tower is SigLIP's -> its conventions.
CONVENTIONS = {
    False: Conventions(
        ("clip", "clip_vision_model", "metaclip_2", "metaclip_2_vision_model"),
        "quick_gelu",
        32,
        1,
        True,
        BesideWeights(),
    ),
    True: Conventions(
        ("siglip", "siglip_vision_model"),
        "gelu_pytorch_tanh",
        16,
        0,
        False,
        BesideWeights(mean=SIGLIP_MEAN, std=SIGLIP_STD, squash=True, eps=SIGLIP_EPS, text=_WITHOUT_CONFIG),
    ),
}

# timm's SigLIP towers, by patch and image size in their names, and those of them that have the tanh-GELU.
_TIMM_SIGLIP = re.compile(r"vit_(base|large|so400m|giantopt)_patch(\d+)_siglip_(\d+)")
_TIMM_WITH_TANH = re.compile(r"vit_(base_patch32|large_patch16_siglip_512|so400m_patch16|giantopt_patch16)")
_TIMM_KEYS = {"image_size", "timm_model_name"}
_TIMM_VALUES = {"timm_pool": "map", "timm_proj": "none"}


@dataclass(frozen=True)
class Described:
    """A ViT's or ResNet's shape by a config or by weights, None where it is not told."""

    activation: object
    width: object
    layers: object  # a list for each stage of a ResNet
    patch_size: object
    tokens: object
    embedding: object

    def differences(self, held: Described, names: Sequence[str]) -> str:
        """Where the config, this, and the weights, `held`, differ, in words; empty where they agree."""
        pairs = {name: (getattr(self, name), getattr(held, name)) for name in names}
        return ", ".join(
            f"{name.replace('_', ' ')} {told}, not {found}"
            for name, (told, found) in pairs.items()
            if None not in (told, found) and told != found
        )


def description(path: Path, content: dict[str, Any]) -> Described | None:
    """The shape by a config; None by one that is no CLIP's. What the config leaves out has its package's defaults."""
    class_tokens = 1
    if path.name == "config.json":
        kind = next((kind for kind in CONVENTIONS.values() if content.get("model_type") in kind.types), None)
        if kind is None:
            return None
        vision = _hugging_face_vision(content)
        layers, patch_size = vision.get("num_hidden_layers", 12), vision.get("patch_size", kind.patch_size)
        width, activation = vision.get("hidden_size", 768), vision.get("hidden_act", kind.activation)
        activation, class_tokens = ACTIVATIONS.get(activation, activation), kind.class_tokens
        embedding = content.get("projection_dim", 512) if class_tokens else None
    else:
        model: dict[str, Any] = content["model_cfg"]
        vision: dict[str, Any] = model["vision_cfg"]
        if timm := vision.get("timm_model_name"):
            if (found := _TIMM_SIGLIP.fullmatch(timm)) is None:
                return None
            width, layers, embedding, class_tokens = None, None, None, 0
            patch_size, activation = int(found[2]), _timm_activation(timm)
        else:
            is_resnet = isinstance(vision.get("layers"), list)
            layers, patch_size = vision.get("layers", 12), RESNET_STRIDE if is_resnet else vision.get("patch_size", 16)
            width, activation = vision.get("width", 768), _open_clip_activation(model)
            embedding = model.get("embed_dim")
    rows, columns = (side // patch_size for side in _sides(vision.get("image_size", 224)))
    tokens = rows * columns + class_tokens
    return Described(activation, width, layers, patch_size, tokens, embedding)


def _timm_activation(name: str) -> Activation:
    return "gelu_tanh" if _TIMM_WITH_TANH.match(name) else "gelu"


def read_settings(path: Path, held: Described, kind: Conventions) -> BesideWeights:
    """What the config at `path` says, which must be that of the weights.

    Raises:
        CheckpointError: it cannot be understood, is that of a model that is not served, or not that of the weights.
    """
    content = read_json(path)
    try:
        settings = _settings(path, content, kind)
        told = description(path, content)
    except STRUCTURE_ERRORS as error:
        raise CheckpointError(path, f"has an unexpected structure: {error!r}") from error
    names = "width", "layers", "patch_size", "embedding"
    if told is not None and (differing := told.differences(held, names)):
        raise CheckpointError(path, f"describes another model than its weights are: {differing}")
    if settings.unfollowed is not None:
        _warn_of_preprocessing(*settings.unfollowed)
    return settings


def refusal(path: Path, content: dict[str, Any]) -> str | None:
    """Why a CLIP or SigLIP with this config is not served, before its weights are there; None where it may be."""
    timm = path.name != "config.json" and content["model_cfg"]["vision_cfg"].get("timm_model_name")
    siglip = bool(timm) or content.get("model_type") in CONVENTIONS[True].types
    try:
        _settings(path, content, CONVENTIONS[siglip])
    except CheckpointError as error:
        return str(error).removeprefix(f"{path}: ")
    except STRUCTURE_ERRORS as error:
        return f"its {path.name} has an unexpected structure: {error!r}"
    return None


def _settings(path: Path, content: dict[str, Any], kind: Conventions) -> BesideWeights:
    if path.name == "config.json":
        return _hugging_face_settings(path, content, kind)
    timm = content["model_cfg"]["vision_cfg"].get("timm_model_name")
    if timm and _TIMM_SIGLIP.fullmatch(timm) and not kind.class_tokens:
        return _timm_settings(path, content, kind)
    return _open_clip_settings(path, content)


def _hugging_face_settings(path: Path, content: dict[str, Any], kind: Conventions) -> BesideWeights:
    """Of a transformers config; what it leaves out has transformers' defaults."""
    if content.get("model_type") not in kind.types:
        types = " or ".join(map(repr, kind.types))
        raise CheckpointError(path, f"model_type must be {types}, got {content.get('model_type')!r}")
    vision = _hugging_face_vision(content)
    activation = vision.get("hidden_act", kind.activation)
    if activation not in ACTIVATIONS:
        raise CheckpointError(path, f"hidden_act must be one of {(*ACTIVATIONS,)}, got {activation!r}")
    eps = vision.get("layer_norm_eps", kind.settings.eps)
    if not _is_epsilon(eps):
        raise CheckpointError(path, f"layer_norm_eps must be a number between 0 and 1, got {eps!r}")
    image_size = _integer(path, "image_size", vision.get("image_size", 224))
    processing: dict[str, Any] = {}
    if (beside := path.with_name("preprocessor_config.json")).is_file():
        processing = read_json(beside)
    elif (beside := path.with_name("processor_config.json")).is_file():
        processing = read_json(beside).get("image_processor") or {}
    squash, bilinear, other = _hugging_face_preprocessing(processing, image_size, kind)
    return BesideWeights(
        ACTIVATIONS[activation],
        heads=_integer(path, "num_attention_heads", vision.get("num_attention_heads", 12)),
        image_size=image_size,
        mean=_triple(beside, processing, "image_mean", kind.settings.mean),
        std=_triple(beside, processing, "image_std", kind.settings.std, least=0),
        squash=squash,
        bilinear=bilinear,
        on_white=bool(processing),  # without do_convert_rgb transformers refuses what is not RGB; the crop is the same
        eps=eps,
        text=hugging_face_text(path, content),
        unfollowed=(beside, other),
    )


def _hugging_face_vision(content: dict[str, Any]) -> dict[str, Any]:
    if content["model_type"] in ("clip", "metaclip_2", "siglip"):  # configs with a section for each tower
        # Early versions of transformers let vision_config_dict overrule vision_config.
        return {**(content.get("vision_config") or {}), **(content.get("vision_config_dict") or {})}
    return content


def _hugging_face_preprocessing(
    processing: dict[str, Any], image_size: int, kind: Conventions
) -> tuple[bool, bool, dict[str, Any]]:
    """Whether an image processor of transformers squashes, whether it resizes bilinearly, and what else it is set to do
    otherwise than CLIP's."""
    set_to: dict[str, Any] = {
        "do_resize": True,
        "resample": Resampling.BICUBIC,
        "size": image_size if kind.cropped else {"height": image_size, "width": image_size},
        "do_center_crop": kind.cropped,
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
        "resample": set_to["resample"] in (Resampling.BICUBIC, Resampling.BILINEAR),
        "size": squash or set_to["size"] in (image_size, {"shortest_edge": image_size}),
        "do_center_crop": set_to["do_center_crop"] or squash,
        "crop_size": set_to["crop_size"] in (image_size, *square) or not set_to["do_center_crop"],
        "do_rescale": set_to["do_rescale"],
        "rescale_factor": math.isclose(set_to["rescale_factor"], 1 / 255, rel_tol=1e-6),
        "do_normalize": set_to["do_normalize"],
        "do_pad": not set_to["do_pad"],
    }
    bilinear = set_to["resample"] == Resampling.BILINEAR
    return squash, bilinear, {key: set_to[key] for key in done if not done[key]}


def _open_clip_settings(path: Path, content: dict[str, Any]) -> BesideWeights:
    model: dict[str, Any] = content["model_cfg"]
    vision: dict[str, Any] = model["vision_cfg"]
    if "multimodal_cfg" in model:
        raise CheckpointError(path, "is of a CoCa, which is not served")
    special = _special(vision, _OPEN_CLIP_KEYS, _OPEN_CLIP_DEFAULTS)
    if (pool := vision.get("pool_type", "tok")) not in get_args(Pool):
        special["pool_type"] = pool
    if (activation := _open_clip_activation(model)) is None:
        special["act_kwargs"] = vision["act_kwargs"]
    norms: dict[str, Any] = vision.get("norm_kwargs") or {}
    if norms.keys() - {"eps"} or not _is_epsilon(norms.get("eps", EPS)):
        special["norm_kwargs"] = norms
    for key, value in special.items():
        raise CheckpointError(path, f"vision_cfg sets {key} to {value!r}, which is not served")
    processing: dict[str, Any] = content.get("preprocess_cfg", {})
    width = _integer(path, "width", vision.get("width", 768))
    width *= 32 if isinstance(vision.get("layers"), list) else 1  # of the attention
    size, squash = _open_clip_size(path, vision), processing.get("resize_mode") == "squash"
    return BesideWeights(
        activation,
        heads=width // _integer(path, "head_width", vision.get("head_width", HEAD_DIM)),
        image_size=size,
        mean=_triple(path, processing, "mean", IMAGE_MEAN),
        std=_triple(path, processing, "std", IMAGE_STD, least=0),
        squash=squash,
        # To cover what is no square, open_clip always resizes bicubically.
        bilinear=processing.get("interpolation") == "bilinear" and (squash or isinstance(size, int)),
        eps=norms.get("eps", EPS),
        ln_pre=not vision.get("no_ln_pre"),
        pool=pool,
        ln_after_pool=bool(vision.get("final_ln_after_pool")),
        text=open_clip_text(path, model),
        unfollowed=(path, _unfollowed(processing)),
    )


def _timm_settings(path: Path, content: dict[str, Any], kind: Conventions) -> BesideWeights:
    """Of an open_clip config whose image tower is one of timm's SigLIP towers."""
    vision: dict[str, Any] = content["model_cfg"]["vision_cfg"]
    for key, value in _special(vision, _TIMM_KEYS, _TIMM_VALUES).items():
        raise CheckpointError(path, f"vision_cfg sets {key} to {value!r}, which is not served")
    processing: dict[str, Any] = content.get("preprocess_cfg", {})
    return BesideWeights(
        _timm_activation(vision["timm_model_name"]),
        image_size=_open_clip_size(path, vision),
        mean=_triple(path, processing, "mean", kind.settings.mean),
        std=_triple(path, processing, "std", kind.settings.std, least=0),
        squash=processing.get("resize_mode", "squash") == "squash",
        bilinear=processing.get("interpolation") == "bilinear",
        eps=kind.settings.eps,
        text=open_clip_text(path, content["model_cfg"]),
        unfollowed=(path, _unfollowed(processing)),
    )


def _is_epsilon(value: object) -> bool:
    """Whether it may be the epsilon of a LayerNorm."""
    return isinstance(value, float) and 0 < value < 1


def _open_clip_activation(model: dict[str, Any]) -> Activation | None:
    """The activation of an image tower's MLPs by open_clip's model_cfg; None where it is one that is not served."""
    if model.get("quick_gelu"):
        return "quick_gelu"
    given: Any = model["vision_cfg"].get("act_kwargs") or {}  # of PyTorch's GELU
    told: dict[str, Activation] = {"none": "gelu", "tanh": "gelu_tanh"}
    return told.get(given.get("approximate", "none")) if given.keys() <= {"approximate"} else None


def _open_clip_size(path: Path, vision: dict[str, Any]) -> ImageSize:
    height, width = (_integer(path, "image_size", side) for side in _sides(vision.get("image_size", 224)))
    return image_size_of(height, width)


def _sides(size: Any) -> tuple[Any, Any]:
    """Height and width of an image_size in a config: one number, or both."""
    if not isinstance(size, list):
        return size, size
    if len(both := cast(list[Any], size)) != 2:
        raise TypeError(f"image_size must be a number or two, got {both}")
    return both[0], both[1]


def _unfollowed(processing: dict[str, Any]) -> dict[str, Any]:
    """The settings of an open_clip preprocessing that `Preprocess` does not follow."""
    served = {
        "interpolation": (None, "bicubic", "bilinear", "random"),
        "resize_mode": (None, "shortest", "squash"),
    }  # random: training
    return {key: processing[key] for key, values in served.items() if processing.get(key) not in values}


def _special(section: dict[str, Any], known: set[str], defaults: dict[str, Any]) -> dict[str, Any]:
    """What a section of open_clip's sets besides `known` keys, empty values and harmless `defaults`."""
    return {k: v for k, v in section.items() if k not in known and v and v != defaults.get(k)}


def _integer(path: Path, key: str, value: Any) -> int:
    if not isinstance(value, int):
        raise CheckpointError(path, f"{key} must be an integer, got {value!r}")
    return value


def _triple(path: Path, section: dict[str, Any], key: str, default: Rgb, least: float = -_LARGEST) -> Rgb:
    """Three numbers, each greater than `least`."""
    values: Any = section.get(key) or default
    if len(values) != 3 or not all(isinstance(value, (int, float)) for value in values):
        raise CheckpointError(path, f"{key} must be three numbers, got {values!r}")
    if not all(least < value < _LARGEST for value in values):  # not true of NaN either
        wanted = "finite numbers" if least else "numbers above 0"
        raise CheckpointError(path, f"{key} must be three {wanted}, got {reprlib.repr(values)}")
    return cast(Rgb, tuple(float(value) for value in values))


def _warn_of_preprocessing(path: Path, other: dict[str, Any]) -> None:
    """Warns of the settings that `Preprocess` does not follow."""
    if other:
        settings = ", ".join(f"{key} {value!r}" for key, value in other.items())
        warnings.warn(
            f"{path}: this model's images are not preprocessed as CLIP's ({settings}), which is not done here; "
            "the encoder is right, but preprocess images yourself",
            stacklevel=5,
        )
