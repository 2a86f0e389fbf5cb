"""Published models by name: their shapes, where their checkpoints come from, and how a name becomes a file.

A name is one of OpenAI's nine, of the bundled models, of open_clip's pairs, or of a repository on the Hugging Face hub.
"""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from ..errors import CheckpointError
from ..towers.config import Config, VitConfig
from .download import Pretrained, download
from .hub import HubModel
from .pairs import (
    ARCHITECTURES,
    IMAGES_ONLY,
    PAIRS,
    SAME_WEIGHTS,
    SIGLIP_REPOSITORIES,
    hub_model,
    not_served,
    tags_of,
)
from .reading import OPEN_CLIP_CONFIG

_ASSETS = Path(__file__).parents[1] / "assets"
_HUB_PREFIX = "hf-hub:"  # open_clip's, too
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors", ".json")  # of files, which no repository ends in

# The keys of OPENAI_MODELS, for type checkers: what `load` returns for one of them embeds texts too.
OpenAiName = Literal[
    "RN50", "RN101", "RN50x4", "RN50x16", "RN50x64", "ViT-B/32", "ViT-B/16", "ViT-L/14", "ViT-L/14@336px"
]

# open_clip's name of an architecture is OpenAI's, as in "ViT-L-14-336" for "ViT-L/14@336px".
OPENAI_MODELS: dict[str, Config] = {
    name: ARCHITECTURES[name.replace("/", "-").replace("@", "-").removesuffix("px")] for name in get_args(OpenAiName)
}

# Shipped inside the package (clip_fast/assets), for demonstration and end-to-end checks without a download.
BUNDLED_MODELS: dict[str, VitConfig] = {
    "tiny-digits": VitConfig(32, 8, width=128, layers=3, heads=2, embed_dim=64),
}


def _openai(sha256: str, filename: str) -> Pretrained:
    return Pretrained(f"https://openaipublic.azureedge.net/clip/models/{sha256}/{filename}", sha256)


OPENAI_CHECKPOINTS: dict[str, Pretrained] = {
    "RN50": _openai("afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762", "RN50.pt"),
    "RN101": _openai("8fa8567bab74a42d41c5915025a8e4538c3bdbe8804a470a72f30b0d94fab599", "RN101.pt"),
    "RN50x4": _openai("7e526bd135e493cef0776de27d5f42653e6b4c8bf9e0f653bb11773263205fdd", "RN50x4.pt"),
    "RN50x16": _openai("52378b407f34354e150460fe41077663dd5b39c54cd0bfd2b27167a4a06ec9aa", "RN50x16.pt"),
    "RN50x64": _openai("be1cfb55d75a9666199fb2206c106743da0f6468c9d327f3e0d0a543a9919d9c", "RN50x64.pt"),
    "ViT-B/32": _openai("40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af", "ViT-B-32.pt"),
    "ViT-B/16": _openai("5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f", "ViT-B-16.pt"),
    "ViT-L/14": _openai("b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836", "ViT-L-14.pt"),
    "ViT-L/14@336px": _openai("3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02", "ViT-L-14-336px.pt"),
}


class Published(NamedTuple):
    """A published model: its name, its image tower, where it comes from, and whether its texts are not served."""

    name: str
    config: Config
    source: str
    images_only: bool = False


def published_models() -> list[Published]:
    """The models that are known by name.

    They are OpenAI's, those that come with the package, open_clip's pairs, and transformers' SigLIPs.
    """
    openai = [Published(name, config, OPENAI_CHECKPOINTS[name].url) for name, config in OPENAI_MODELS.items()]
    bundled = [Published(name, config, "comes with clip_fast", True) for name, config in BUNDLED_MODELS.items()]
    of_open_clip = [
        Published(
            f"{architecture}/{tag}", config, f"{_HUB_PREFIX}{PAIRS[architecture][tag]}", architecture in IMAGES_ONLY
        )
        for architecture, config in ARCHITECTURES.items()
        for tag in PAIRS[architecture]
    ]
    of_transformers = [
        Published(repository, ARCHITECTURES[architecture], f"{_HUB_PREFIX}{repository}")
        for repository, architecture in SIGLIP_REPOSITORIES.items()
    ]
    return openai + bundled + of_open_clip + of_transformers


def available_models() -> list[str]:
    """The names that `load` knows without asking the hub: see `published_models`."""
    return [model.name for model in published_models()]


def local_path(name: str | os.PathLike[str]) -> Path | None:
    """The file or folder that a name stands for; None where there is none, or the name is OpenAI's or a bundled one."""
    path = Path(os.path.expanduser(name))  # which leaves the ~ of an unknown user
    return path if path.exists() and name not in OPENAI_MODELS.keys() | BUNDLED_MODELS.keys() else None


def resolve(name_or_path: str | os.PathLike[str], download_root: str | os.PathLike[str] | None = None) -> Path:
    """Finds a checkpoint: a name, downloaded where needed, or a path that exists.

    The first of these counts: one of OpenAI's names, a bundled model's, a path that exists, one of open_clip's pairs,
    the name of a repository on the Hugging Face hub. With `hf-hub:` before it, a name is that of a repository alone.

    OpenAI's downloads are kept in `download_root`, by default `~/.cache/clip`, and checked by their SHA-256 each time;
    those of the hub in `download_root`, by default its own cache.

    Raises:
        CheckpointError: for neither a name nor an existing path, and where a download fails.
        ModuleNotFoundError: the extra `hub` is not installed: `pip install "clip_fast[hub]"`.
    """
    name = os.fspath(name_or_path)
    if not name:  # to Path it is the current folder
        raise CheckpointError("the model", "its name is empty")
    if name in OPENAI_CHECKPOINTS:
        return download(OPENAI_CHECKPOINTS[name], Path(download_root or "~/.cache/clip").expanduser())
    if name in BUNDLED_MODELS:
        return _ASSETS / name / "model.safetensors"
    if path := local_path(name):
        return path
    plain, _, revision = name.removeprefix(_HUB_PREFIX).partition("@")
    if name.startswith(_HUB_PREFIX):
        return HubModel(plain, revision or None, OPEN_CLIP_CONFIG, download_root).weights()
    architecture, _, tag = plain.partition("/")
    if tags := tags_of(architecture):
        repository = hub_model(architecture, tag)
        if repository is None:
            raise CheckpointError(name, f"{architecture} has no weights of that name, only {', '.join(tags)}")
        return HubModel(repository, revision or None, OPEN_CLIP_CONFIG, download_root).weights()
    if architecture in SAME_WEIGHTS:
        other, size = SAME_WEIGHTS[architecture]
        raise CheckpointError(
            name, f"has the weights of {other}: clip_fast.load('{other}/{tags_of(other)[0]}', image_size={size})"
        )
    if tag and (family := not_served(architecture)):
        raise CheckpointError(name, f"is the name of one of open_clip's {family} models, which are not served")
    if _REPOSITORY.fullmatch(plain) and not plain.endswith(_SUFFIXES):
        otherwise = f"; no file or folder has this name{_hint(name, 0.8)}"
        try:
            return HubModel(plain, revision or None, cache=download_root, otherwise=otherwise).weights()
        except ModuleNotFoundError as error:
            raise CheckpointError(name, f"no such file or folder; and {error}") from error
    hint = _hint(name, 0.5)
    names = ", ".join([*OPENAI_MODELS, *BUNDLED_MODELS])
    raise CheckpointError(
        name,
        f"no such file, and no model of that name{hint} (names: {names}, owner/name on the Hugging Face hub, and what "
        "`clip-fast models` lists)",
    )


def _hint(name: str, cutoff: float) -> str:
    """The known name that is most like `name`, as a question, if one is as like it as `cutoff` (from 0 to 1)."""
    known = {each.lower(): each for each in available_models()}
    close = difflib.get_close_matches(name.lower(), known, n=1, cutoff=cutoff)
    return "".join(f"; did you mean {known[each]!r}?" for each in close)
