"""Checkpoints of OpenAI, open_clip and Hugging Face: one canonical state dict and one config from any of them.

Layouts, by what their keys begin with: `visual.` (OpenAI and open_clip; the canonical names after it), no prefix (the
image tower alone, under canonical names), `vision_model.` (Hugging Face), `visual.trunk.` (open_clip's SigLIP).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast, get_args

from torch import Tensor

from ..errors import CheckpointError, summary
from ..towers.config import Activation, Config, Rgb
from .layouts import layout_of
from .settings import CONVENTIONS, STRUCTURE_ERRORS, BesideWeights, description, read_settings
from .stored_text import Text, read_text
from .stored_tower import StoredTower
from .weights_file import WeightsFile, read_json, read_weights


@dataclass(frozen=True)
class Checkpoint:
    """An image tower as read from a file, and the text tower in it.

    `state_dict` has exactly the names and shapes of `reference.build(config).state_dict()`. Its tensors are contiguous,
    on the CPU, and of the dtype that they have in the file (8 bits in float16). They are copies; but what a safetensors
    file in the hub's cache holds in this form stays in its pages, which the system takes back where memory is short.
    Writes to them stay in this process.

    `mean` and `std` normalise the RGB channels of pixels scaled to [0, 1]; `squash`, `on_white` and `bilinear` are
    those of `Preprocess`. `text` is None where the file has no text tower that is served; `without_text` then says why.
    """

    config: Config
    state_dict: dict[str, Tensor]
    mean: Rgb
    std: Rgb
    text: Text | None = None
    squash: bool = False
    on_white: bool = False
    bilinear: bool = False
    without_text: str = ""


def read_checkpoint(path: str | os.PathLike[str], activation: Activation | None = None) -> Checkpoint:
    """Reads the image tower from a checkpoint file or a folder with one, without running code from it.

    Args:
        path: OpenAI's `.pt` (TorchScript archive or state dict), open_clip's `.pt`, `.bin` or `.safetensors`, or a
            folder as Hugging Face (`config.json`) or open_clip (`open_clip_config.json`) writes it. Such a config is
            heeded beside any weights of the shapes that it describes.
        activation: of a ViT's MLPs, where neither the config beside the weights nor the file itself says it. A plain
            state dict with OpenAI's names is taken for OpenAI's, "quick_gelu", with a warning.

    Raises:
        CheckpointError: for anything but a complete, finite image tower of a kind that is served; or it says another
            activation than was asked for.
        ValueError: for an unknown activation.
    """
    if activation is not None and activation not in get_args(Activation):
        raise ValueError(f"activation must be one of {get_args(Activation)} or None, got {activation!r}")
    file = read_weights(_locate(Path(path)))
    tower = StoredTower(file, layout_of(file.path, file.entries.keys(), lambda: _timm_model(file.path)))
    settings = _settings_beside(tower)
    told = settings.activation or _told_by_weights(tower)
    if activation is not None and told not in (None, activation):
        raise CheckpointError(file.path, f"is a model with {told!r}, and activation={activation!r} was asked for")

    @cache
    def activation_of_file() -> Activation:
        return activation or told or _taken_for(tower)

    return _checkpoint(tower, settings, activation_of_file)


def read_state_dict(state_dict: Mapping[str, Any]) -> Checkpoint:
    """The model in a state dict of `clip`'s, with QuickGELU. Raises CheckpointError, see `read_checkpoint`."""
    file = WeightsFile(Path("the state dict"), dict(state_dict))
    tower = StoredTower(file, layout_of(file.path, file.entries.keys()))
    if tower.is_siglip:
        raise CheckpointError(file.path, "is a SigLIP's, and not a CLIP's")
    return _checkpoint(tower, BesideWeights(), lambda: "quick_gelu")


def _checkpoint(tower: StoredTower, settings: BesideWeights, activation: Callable[[], Activation]) -> Checkpoint:
    config = tower.config(settings, activation)
    state_dict = tower.state_dict(config)
    text = read_text(tower.file, settings.text, activation)
    served, reason = (None, text) if isinstance(text, str) else (text, "")
    return Checkpoint(
        *(config, state_dict, settings.mean, settings.std, served),
        *(settings.squash, settings.on_white, settings.bilinear, reason),
    )


# --- Folders and the settings in them --------------------------------------------------------------------------------

HUGGING_FACE_CONFIG, OPEN_CLIP_CONFIG = "config.json", "open_clip_config.json"

# Weights by file name, the preferred first, and the config that belongs to them.
FOLDER_FILES = {
    "model.safetensors": HUGGING_FACE_CONFIG,
    "model.safetensors.index.json": HUGGING_FACE_CONFIG,
    "open_clip_model.safetensors": OPEN_CLIP_CONFIG,
    "pytorch_model.bin": HUGGING_FACE_CONFIG,
    "pytorch_model.bin.index.json": HUGGING_FACE_CONFIG,
    "open_clip_pytorch_model.bin": OPEN_CLIP_CONFIG,
}


def _locate(path: Path) -> Path:
    """The weights at `path`, in this folder, or in the only folder in it that has some."""
    if path.is_dir():
        if present := _weights_in(path):
            return present
        below = [folder for folder in sorted(path.iterdir()) if folder.is_dir() and _weights_in(folder)]
        if len(below) > 1:
            names = ", ".join(folder.name for folder in below)
            raise CheckpointError(path, f"folder holds several models: choose one of its folders {names}")
        weights = _weights_in(below[0]) if below else None
        if weights is None:
            raise CheckpointError(path, f"folder holds none of {', '.join(FOLDER_FILES)}")
        return weights
    if not path.is_file():
        raise CheckpointError(path, "no such file")
    return path


def _weights_in(folder: Path) -> Path | None:
    """The weights in a folder: the first whose config is a CLIP's, or else the first."""
    present = [folder / name for name in FOLDER_FILES if (folder / name).is_file()]
    return next(filter(_has_a_clips_config, present), present[0] if present else None)


def _has_a_clips_config(weights: Path) -> bool:
    config = weights.with_name(FOLDER_FILES[weights.name])
    try:
        return description(config, read_json(config)) is not None
    except (CheckpointError, *STRUCTURE_ERRORS):
        return False


def _settings_beside(tower: StoredTower) -> BesideWeights:
    """What the config beside the weights says; of two, the one whose package names tensors as these are.

    By the files' names, or because Hugging Face's weights cannot do without, a config may have to be that of the
    weights. Any other may lie there for another model, and is used only where it describes the tower in the file.
    """
    weights, hugging_face = tower.file.path, tower.layout.hugging_face
    for name in sorted(set(FOLDER_FILES.values()), reverse=not hugging_face):
        path = weights.with_name(name)
        belongs = FOLDER_FILES.get(weights.name) == name or (hugging_face and name == HUGGING_FACE_CONFIG)
        if path.is_file() and (belongs or _describes(path, tower)):
            return read_settings(path, tower.described(), CONVENTIONS[tower.is_siglip])
    if hugging_face:
        raise CheckpointError(weights, "needs the config.json that transformers writes beside it")
    return CONVENTIONS[tower.is_siglip].settings


def _timm_model(weights: Path) -> str:
    """The name of timm's model in open_clip's config beside the weights; empty where there is none."""
    try:
        return str(
            read_json(weights.with_name(OPEN_CLIP_CONFIG))["model_cfg"]["vision_cfg"].get("timm_model_name") or ""
        )
    except (CheckpointError, *STRUCTURE_ERRORS):
        return ""


def _describes(path: Path, tower: StoredTower) -> bool:
    """Whether the config at `path` is that of the tower; warns where it is a CLIP's and is not."""
    held = tower.described()
    try:
        told = description(path, read_json(path))
    except (CheckpointError, *STRUCTURE_ERRORS) as error:
        warnings.warn(f"{path}: not used, since it cannot be understood: {summary(error)}", stacklevel=4)
        return False
    if told is None:
        return False
    names = "activation", "width", "layers", "patch_size", "tokens", "embedding"
    if differing := told.differences(held, names):
        warnings.warn(
            f"{path}: not used, since it is another model's than {tower.file.path.name}: {differing}", stacklevel=4
        )
        return False
    return True


def _told_by_weights(tower: StoredTower) -> Activation | None:
    """The activation that the weights file tells by itself, as an archive of TorchScript does."""
    told = tower.file.activation
    return None if tower.is_siglip and told == "quick_gelu" else cast(Activation | None, told)  # an unknown class


def _taken_for(tower: StoredTower) -> Activation:
    """The activation where nothing tells it: QuickGELU, with a warning, for what may be OpenAI's."""
    file = tower.file
    if tower.is_siglip:
        raise CheckpointError(
            file.path, "does not say which activation its model has: pass activation='gelu_tanh' or activation='gelu'"
        )
    if file.open_clip:
        raise CheckpointError(
            file.path, "does not say which activation its model has: pass activation='gelu' or activation='quick_gelu'"
        )
    warnings.warn(
        f"{file.path}: taken for one of OpenAI's models, with QuickGELU; if it is not, pass activation='gelu' "
        "(and activation='quick_gelu' to silence this warning)",
        stacklevel=6,
    )
    return "quick_gelu"
