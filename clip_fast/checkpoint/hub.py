"""Checkpoints on the Hugging Face hub, by huggingface_hub: in its cache, with its token and its settings."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from .. import extras
from ..errors import CheckpointError, summary
from ..version import __version__
from .reading import FOLDER_FILES, HUGGING_FACE_CONFIG
from .settings import STRUCTURE_ERRORS, description, refusal
from .text_settings import named_tokenizer
from .tokenizer import SETTINGS_FILES
from .weights_file import is_index, listed_shards, read_json

# What is read beside weights and configs: see `settings.py` and `tokenizer.py`.
_PROCESSORS = ("preprocessor_config.json", "processor_config.json")
_BESIDE = (*_PROCESSORS, "tokenizer.json", "spiece.model", *SETTINGS_FILES)
_FOLDERS = ("", "0_CLIPModel/")  # where weights are: sentence-transformers has each part of a model in a folder
_CALLED = {"siglip2": "siglip2: a NaFlex tower, whose images keep their shape"}  # fixed ones say "siglip"
_LIBRARY = {"library_name": "clip_fast", "library_version": __version__}


@dataclass(frozen=True)
class HubModel:
    """A model on the hub.

    `revision` is a branch, a tag or a commit; None is the main branch. `config` is the one that is preferred in a
    repository that has transformers' and open_clip's. `cache` is a folder in place of huggingface_hub's own cache.
    `otherwise` ends the error that there is no such model: what else the name may have meant.
    """

    repository: str
    revision: str | None = None
    config: str = HUGGING_FACE_CONFIG
    cache: str | os.PathLike[str] | None = None
    otherwise: str = ""

    def __str__(self) -> str:
        return f"hf-hub:{self.repository}" + (f"@{self.revision}" if self.revision else "")

    def weights(self) -> Path:
        """The file of the weights, or the index of its shards; downloaded where needed, with all that belongs to it.

        Where the hub cannot be reached, the model is looked for in the cache.

        Raises:
            CheckpointError: there is no such model or revision, access is not granted, it is no CLIP that is served, or
                it is neither in the cache nor can be reached; the message says which, and what to do.
            ModuleNotFoundError: the extra `hub` is not installed: `pip install "clip_fast[hub]"`.
        """
        hub = extras.huggingface_hub()
        try:
            info: Any = _info(hub, self.repository, self.revision)
        except Exception as error:  # each release has its own kinds of errors of the network
            if problem := self._refusal(error):
                raise CheckpointError(self, problem) from error
            return self._from_cache(error)
        files = {file.rfilename for file in info.siblings or ()}
        weights = self._choose(files.__contains__, lambda name: self._download(name, info.sha))
        if not self._knows_processor(weights):
            for name in _PROCESSORS:  # to be told that there is none, which huggingface_hub notes in its cache
                with suppress(CheckpointError):
                    self._download(self._beside(weights, name), info.sha)
        self._bring_tokenizer(weights.with_name(FOLDER_FILES[weights.name]))
        return weights

    def _from_cache(self, error: Exception) -> Path:
        """The weights in the cache. `error` kept the hub from being asked."""
        hub = extras.huggingface_hub()

        def cached(name: str) -> str | None:
            found = hub.try_to_load_from_cache(self.repository, name, cache_dir=self.cache, revision=self.revision)
            return found if isinstance(found, str) else None  # it may also say that the hub has no such file

        pairs = [(f"{folder}{name}", f"{folder}{own}") for folder in _FOLDERS for name, own in FOLDER_FILES.items()]
        offline = isinstance(error, hub.errors.OfflineModeIsEnabled)
        problem = "HF_HUB_OFFLINE forbids asking the hub: unset it once" if offline else _no_answer(error)
        where = f"in the cache, {self.cache or hub.constants.HF_HUB_CACHE}, and {problem}"
        if not any(cached(weights) and cached(config) for weights, config in pairs):
            config = next((config for weights, config in pairs if cached(weights)), None)
            absent, more = (f"its {config}", "") if config else ("it", self.otherwise)  # open_clip brings weights alone
            raise CheckpointError(self, f"{absent} is not {where}{more}") from error
        weights = self._choose(lambda name: cached(name) is not None, lambda name: Path(str(cached(name))))
        if lost := next((shard for shard in _shards(weights) if cached(self._beside(weights, shard)) is None), None):
            raise CheckpointError(self, f"its {lost} is not {where}") from error
        if not self._knows_processor(weights):
            warnings.warn(
                f"{self}: the cache has no image processor of it, and the hub could not be asked: if the model has "
                "one, load it once with the hub in reach; until then its family's usual preprocessing is taken",
                stacklevel=5,
            )
        return weights

    def _knows_processor(self, weights: Path) -> bool:
        """Whether transformers' image processor is in the cache, or the cache says that there is none, or none belongs.

        Whoever filled a cache chose from the files. A tokenizer that is missing is told when words are wanted.
        """
        if FOLDER_FILES[weights.name] != HUGGING_FACE_CONFIG:
            return True
        hub, names = extras.huggingface_hub(), [self._beside(weights, name) for name in _PROCESSORS]
        found = [hub.try_to_load_from_cache(self.repository, name, self.cache, self.revision) for name in names]
        return any(isinstance(each, str) for each in found) or None not in found

    @staticmethod
    def _beside(weights: Path, name: str) -> str:
        """A file in the folder of a repository in which the weights are."""
        return next((folder for folder in _FOLDERS if folder == f"{weights.parent.name}/"), "") + name

    def _choose(self, has: Callable[[str], bool], get: Callable[[str], Path]) -> Path:
        """The preferred weights, after all that belongs to them: where weights are, nothing is missing beside them."""
        found = [
            (folder, weights, config)
            for folder in _FOLDERS
            for weights, config in FOLDER_FILES.items()
            if has(f"{folder}{weights}") and has(f"{folder}{config}")
        ]
        problems: dict[str, str | None] = {}
        for folder, weights, config in sorted(found, key=lambda each: each[2] != self.config):
            described = f"{folder}{config}"
            if described not in problems:
                problems[described] = _unserved(get(described))
            if problems[described] is None:
                for name in filter(has, (f"{folder}{each}" for each in _BESIDE)):
                    get(name)
                path = get(f"{folder}{weights}")
                for name in filter(has, (f"{folder}{shard}" for shard in _shards(path))):
                    get(name)
                return path
        reasons = ", ".join(filter(None, problems.values())) or f"it has none of {', '.join(FOLDER_FILES)}"
        raise CheckpointError(self, f"is no CLIP that is served: {reasons}")

    def _bring_tokenizer(self, config: Path) -> None:
        """Downloads a tokenizer that the config names and that is in another repository.

        What hinders it is no error: only words need it.
        """
        repository = named_tokenizer(read_json(config))
        if repository is None or config.with_name("tokenizer.json").is_file():
            return
        hub = extras.huggingface_hub()
        with suppress(Exception):  # each release has its own kinds of errors of the network
            if isinstance(hub.try_to_load_from_cache(repository, "tokenizer.json", cache_dir=self.cache), str):
                return
            files = {file.rfilename for file in _info(hub, repository).siblings or ()}
            for name in (*SETTINGS_FILES, "tokenizer.json"):  # the last one tells that all are there
                if name in files:
                    hub.hf_hub_download(repository, name, cache_dir=self.cache, **_LIBRARY)

    def _download(self, name: str, commit: str) -> Path:
        hub = extras.huggingface_hub()
        try:
            # The config, which comes first, by the revision's name: so the cache knows which commit that was.
            revision = self.revision if PurePosixPath(name).name in FOLDER_FILES.values() else commit
            path = hub.hf_hub_download(self.repository, name, revision=revision, cache_dir=self.cache, **_LIBRARY)
        except Exception as error:
            reason = f"{name} cannot be downloaded: {_no_answer(error)}"
            raise CheckpointError(self, self._refusal(error) or reason) from error
        return Path(path)

    def _refusal(self, error: Exception) -> str | None:
        """What the hub says against a download, and what to do; None where it has not been reached."""
        hub = extras.huggingface_hub()
        page = f"{hub.constants.ENDPOINT}/{self.repository}"
        if isinstance(error, hub.errors.GatedRepoError):
            return f"its owner grants access: ask for it at {page}, then log in with `hf auth login`, or set HF_TOKEN"
        if isinstance(error, hub.errors.RevisionNotFoundError):
            return f"the model has no revision {self.revision!r}: see {page}/commits/main"
        if isinstance(error, hub.errors.RepositoryNotFoundError):
            return (
                f"no model of that name is at {hub.constants.ENDPOINT}, or it is private: check the spelling, or log "
                f"in with `hf auth login`, or set HF_TOKEN{self.otherwise}"
            )
        if isinstance(error, hub.errors.HFValidationError):
            return f"is no name of a model on the hub: {summary(error)}"
        return None


def _shards(weights: Path) -> list[str]:
    """The names of the files that an index lists; none where the weights are one file."""
    return sorted(set(listed_shards(weights).values())) if is_index(weights) else []


def _info(hub: Any, repository: str, revision: str | None = None) -> Any:
    """What the hub says of a model, within the time that its files are asked for: it may be there and not answer."""
    timeout: float = hub.constants.HF_HUB_ETAG_TIMEOUT
    return hub.HfApi(**_LIBRARY).model_info(repository, revision=revision, timeout=timeout)


def _no_answer(error: Exception) -> str:
    """Why the hub gave no answer that is of use, and what to do."""
    place: str = extras.huggingface_hub().constants.ENDPOINT
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return f"{place} does not accept the token ({summary(error)}): log in with `hf auth login`, or unset HF_TOKEN"
    if status is not None:
        return f"{place} answered {status} ({summary(error)}): try again later"
    return f"{place} cannot be reached ({summary(error)}): try again"


def _unserved(config: Path) -> str | None:
    """Why the model that a config describes is none that is served; None where it is one."""
    content = read_json(config)
    try:
        if description(config, content) is not None:
            return refusal(config, content)
        told = content.get("model_type") or content["model_cfg"]["vision_cfg"]["timm_model_name"]
    except STRUCTURE_ERRORS:
        return f"its {config.name} is not a CLIP's"
    return f"its {config.name} is of a {_CALLED.get(str(told), told)}"
