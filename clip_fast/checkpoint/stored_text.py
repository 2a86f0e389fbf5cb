"""The text tower in a weights file: its shape, its weights under canonical names, and its tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from ..errors import CheckpointError
from ..simple_tokenizer import tokenize
from ..towers.config import Activation, TextConfig
from ..towers.text import VOCABULARY, TextEncoder
from .layouts import TEXTS
from .stored_tower import StoredTower
from .text_settings import TextSettings
from .weights_file import WeightsFile


class Tokenizer(Protocol):
    """Texts to tokens (B, context_length) in int32, as `simple_tokenizer.tokenize`."""

    def __call__(self, texts: str | list[str], context_length: int, truncate: bool = False) -> Tensor: ...


class Text(NamedTuple):
    """A text tower: its shape, `text.TextEncoder(config).state_dict()`, and the tokenizer that belongs to it."""

    config: TextConfig
    state_dict: dict[str, Tensor]
    tokenizer: Tokenizer


def read_text(file: WeightsFile, settings: TextSettings, activation: Callable[[], Activation]) -> Text | str:
    """The text tower in a file, or why it cannot be served, in words. `activation` is asked where the config is silent.

    Raises:
        CheckpointError: the tower is served, and is incomplete or damaged.
    """
    layout = next((layout for key, layout in TEXTS.items() if key in file.entries), None)
    if layout is None and not any(key.startswith(("text.", "text_model.")) for key in file.entries):
        return "it has no text tower"
    if layout is None or settings.unserved:
        return f"its text tower is not served: {settings.unserved or 'it is not a Transformer as CLIP has'}"
    return StoredText(file, layout).read(settings, activation)


@dataclass(frozen=True)
class StoredText(StoredTower):
    """The text tower in a file, whose tensors are read as an image tower's are."""

    def read(self, settings: TextSettings, activation: Callable[[], Activation]) -> Text | str:
        """See `read_text`."""
        affine = self._has("text_projection.bias")
        projection = "text_projection.weight" if affine else "text_projection" if settings.projected else None
        names = filter(None, ("positional_embedding", projection, "logit_scale"))
        if missing := [key for name in names for key in self.layout.keys(name) if key not in self.file.entries]:
            return f"its text tower is not served: it has no {missing[0]}"
        vocabulary, width = self._shape("token_embedding.weight", 2)
        if settings.tokenizer is None and (vocabulary != VOCABULARY or settings.end not in (None, VOCABULARY - 1)):
            folder = self.file.path.parent
            return f"its text tower is not served: its tokens are not CLIP's; place its tokenizer.json in {folder}"
        try:
            told = settings.activation or activation()
        except CheckpointError:  # a ResNet's own needs none
            return "its text tower is not served: its activation cannot be told, pass activation='gelu' or 'quick_gelu'"
        if self._has("transformer.resblocks.0.ls_1.gamma"):
            return "its text tower is not served: it has a LayerScale"
        layers = self._count(self.layout.blocks)
        if settings.layers not in (None, layers):
            raise CheckpointError(
                self.file.path, f"its text tower has {layers} layers, the config beside it says {settings.layers}"
            )
        mlp_width = self._shape("transformer.resblocks.0.mlp.c_fc.weight", 2)[0]
        try:
            config = TextConfig(
                context_length=self._shape("positional_embedding", 2)[0],
                vocabulary=vocabulary,
                width=width,
                layers=layers,
                heads=self._heads(settings.heads, width),
                embed_dim=self._shape(projection, 2)[0 if affine else 1] if projection else width,
                activation=told,
                eps=settings.eps,
                mlp_ratio=mlp_width / width,
                end=settings.end,
                last=settings.last,
                causal=settings.causal,
                projection="affine" if affine else "linear" if projection else "none",
                logit_bias=self._has("logit_bias"),
            )
        except CheckpointError:
            raise
        except ValueError as error:
            raise CheckpointError(self.file.path, f"its text tower makes none: {error}") from error
        wanted = self._wanted(lambda: TextEncoder(config))
        return Text(config, self._load_all(wanted), settings.tokenizer or tokenize)

    def _is_transposed(self, name: str) -> bool:
        return name == "text_projection" and self.layout.keys(name) == ["text_projection.weight"]

    def _tensor(self, key: str) -> Tensor:
        tensor = super()._tensor(key)
        return tensor.reshape(()) if key.startswith("logit_") and tensor.numel() == 1 else tensor  # some have shape [1]
