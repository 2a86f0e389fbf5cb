"""CLIP or SigLIP whole: the fast image encoder with its text side, for zero-shot classification and search by text.

The names are those of openai-clip's `clip.model`, for code that imports it. `CLIP` is made as there; the other classes
are there for `isinstance`.
"""

from __future__ import annotations

from abc import ABCMeta
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import simple_tokenizer
from .checkpoint.reading import Checkpoint, read_state_dict
from .checkpoint.stored_text import Tokenizer
from .encoder import ImageEncoder, with_weights
from .errors import CLIPS_OWN, no_attribute
from .towers import reference
from .towers.config import HEAD_DIM, Config, ResNetConfig, TextConfig, VitConfig
from .towers.reference import QuickGELU as QuickGELU
from .towers.text import TextEncoder, causal_mask, encode_text

_OLD_PREFIX = "text."  # of the text side's names in the state dicts of clip_fast's first versions


class Clip(ImageEncoder):
    """An `ImageEncoder` that embeds texts too: a drop-in for the model of `clip.load`.

    Its parameters, modules and attributes have the names, layouts and meanings of `clip`'s: `visual`,
    `token_embedding`, `positional_embedding`, `transformer`, `ln_final`, `text_projection`, `logit_scale` (the
    logarithm of what cosines are multiplied by), `context_length` (tokens that a text may have, start and end included)
    and `vocab_size`. State dicts go from one to the other. Those of clip_fast's first versions, which had "text."
    before the names of the text side, are loaded too. SigLIP's parts have the same names, and `logit_bias` is what is
    added to its logits; it is None in a CLIP.

    Args:
        config, state_dict, device, dtype, copy, options: the image encoder's, see `ImageEncoder`.
        text_config, text_state_dict: the text encoder's, under the names of `TextEncoder`.
        tokenizer: what `tokenize` calls; by default CLIP's own, `clip_fast.tokenize`.
    """

    def __init__(
        self,
        config: Config,
        state_dict: dict[str, Tensor],
        text_config: TextConfig,
        text_state_dict: dict[str, Tensor],
        device: torch.device,
        dtype: torch.dtype,
        *,
        tokenizer: Tokenizer = simple_tokenizer.tokenize,
        copy: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(config, state_dict, device, dtype, copy=copy, **options)
        self._tokenizer, self._text_config = tokenizer, text_config
        with torch.device("meta"):
            text = TextEncoder(text_config)
        text = with_weights(text, text_state_dict, device, dtype, copy=copy)
        self.context_length = text_config.context_length
        self.vocab_size = text_config.vocabulary
        self.token_embedding = text.token_embedding
        self.positional_embedding = text.positional_embedding
        self.transformer = text.transformer
        self.ln_final = text.ln_final
        self.text_projection = text.text_projection
        self.logit_scale, self.logit_bias = text.logit_scale, text.logit_bias
        self.register_load_state_dict_pre_hook(_rename_old)  # pyright: ignore[reportUnknownMemberType]

    def tokenize(self, texts: str | list[str], truncate: bool = False) -> Tensor:
        """Texts to tokens (B, context_length) in int32, by the tokenizer that belongs to the model.

        Args:
            texts: one text or several.
            truncate: cut texts that are too long.

        Raises:
            RuntimeError: a text is too long and `truncate` is false.
            ModuleNotFoundError: the extra `text` is not installed: `pip install "clip_fast[text]"`.
            CheckpointError: the tokenizer.json beside the weights holds no tokenizer.
        """
        return self._tokenizer(texts, self.context_length, truncate)

    def encode_text(self, text: Tensor) -> Tensor:
        """Embeds texts as `tokenize` gives them: (B, L) integers -> (B, embed_dim), not normalised.

        The result has the encoder's dtype, under autocast too.

        Raises:
            TypeError: the tokens are no tensor.
            ValueError: for tokens of another shape or dtype.
        """
        if not isinstance(text, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(
                f"text must be a tensor of tokens, got {type(text).__name__}: model.tokenize(texts) makes one"
            )
        return encode_text(self, text.to(self.device), self._text_config).to(self.dtype)

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The logits of images (B, …) and texts (T, L): (B, T), and the same transposed.

        They are cosines times exp(logit_scale). Their softmax over the texts gives the probabilities that an image has
        one of them. SigLIP's have logit_bias added, and their sigmoid, not their softmax, gives the probability of each
        pair by itself (Zhai et al. 2023).
        """
        image_embeddings = F.normalize(self.encode_image(image), dim=-1)
        text_embeddings = F.normalize(self.encode_text(text), dim=-1)
        logits = self.logit_scale.exp() * image_embeddings @ text_embeddings.T
        logits = logits if self.logit_bias is None else logits + self.logit_bias
        return logits, logits.T

    def build_attention_mask(self) -> Tensor:
        """(context_length, context_length): 0 where a token sees another, in a CLIP up to itself, else -inf."""
        length = self.context_length
        return causal_mask(length) if self._text_config.causal else torch.zeros(length, length)

    def initialize_parameters(self) -> None:
        """Draws new weights for the text side, and for a ResNet's pool and last batch norms, as `clip` does."""
        width, layers, projection = self.transformer.width, self.transformer.layers, self.text_projection
        into_stream = width**-0.5 * (2 * layers) ** -0.5  # of what is added to the residual stream
        deviations = [
            (self.token_embedding.weight, 0.02),
            (self.positional_embedding, 0.01),
        ]
        if projection is not None:
            deviations.append((projection.weight if isinstance(projection, nn.Linear) else projection, width**-0.5))
        for block in self.transformer.blocks():
            deviations += [
                (block.attn.in_proj_weight, width**-0.5),
                (block.attn.out_proj.weight, into_stream),
                (block.mlp.c_fc.weight, (2 * width) ** -0.5),
                (block.mlp.c_proj.weight, into_stream),
            ]
        if isinstance(self.visual, reference.ModifiedResNet):
            pool = self.visual.attnpool
            for part in (pool.q_proj, pool.k_proj, pool.v_proj, pool.c_proj):
                deviations.append((part.weight, pool.c_proj.in_features**-0.5))
            for name, parameter in self.visual.named_parameters():
                if name.startswith("layer") and name.endswith("bn3.weight"):
                    nn.init.zeros_(parameter)
        for parameter, deviation in deviations:
            nn.init.normal_(parameter, std=deviation)


def _rename_old(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: object) -> None:
    """Gives the text side's names in a state dict of clip_fast's first versions as they are now."""
    old = prefix + _OLD_PREFIX
    for name in [name for name in state_dict if name.startswith(old)]:
        state_dict[prefix + name.removeprefix(old)] = state_dict.pop(name)


class _Clips(ABCMeta):
    """A class under its name in `clip.model`. What is made of its base is an instance of it too."""

    def __instancecheck__(cls, instance: object) -> bool:
        return super().__instancecheck__(instance) or (
            cls.__module__ == __name__ and isinstance(instance, cls.__bases__)  # and not a user's subclass
        )


class CLIP(Clip, metaclass=_Clips):
    """A model with new weights, in float32 on the CPU and in training mode, of `clip.model.CLIP`'s arguments."""

    def __init__(
        self,
        embed_dim: int,
        image_resolution: int,
        vision_layers: int | Sequence[int],
        vision_width: int,
        vision_patch_size: int | None,
        context_length: int,
        vocab_size: int,
        transformer_width: int,
        transformer_heads: int,
        transformer_layers: int,
    ) -> None:
        text_config = TextConfig(
            context_length, vocab_size, transformer_width, transformer_layers, transformer_heads, embed_dim
        )
        if isinstance(vision_layers, int):
            assert vision_patch_size is not None
            heads = vision_width // HEAD_DIM
            config = VitConfig(image_resolution, vision_patch_size, vision_width, vision_layers, heads, embed_dim)
        else:
            a, b, c, d = vision_layers
            heads = 32 * vision_width // HEAD_DIM
            config = ResNetConfig((a, b, c, d), vision_width, heads, image_resolution, embed_dim)
        visual, text = reference.build(config), TextEncoder(text_config)
        super().__init__(
            config, visual.state_dict(), text_config, text.state_dict(), torch.device("cpu"), torch.float32
        )
        self.initialize_parameters()
        self.requires_grad_(True).train()


def _not_made_here(self: object, *_: object, **__: object) -> None:
    raise TypeError(f"{type(self).__name__} is here for isinstance only: {CLIPS_OWN}")


class VisionTransformer(reference.VisionTransformer, metaclass=_Clips):
    __init__ = _not_made_here


class ModifiedResNet(reference.ModifiedResNet, metaclass=_Clips):
    __init__ = _not_made_here


class Bottleneck(reference.Bottleneck, metaclass=_Clips):
    __init__ = _not_made_here


class AttentionPool2d(reference.AttentionPool, metaclass=_Clips):
    __init__ = _not_made_here


class Transformer(reference.Transformer, metaclass=_Clips):
    __init__ = _not_made_here


class ResidualAttentionBlock(reference.ResidualBlock, metaclass=_Clips):
    __init__ = _not_made_here


LayerNorm = nn.LayerNorm


def __getattr__(name: str) -> Any:
    raise no_attribute(f"module {__name__!r}", name)


def from_checkpoint(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, **options: Any) -> ImageEncoder:
    """The model in a checkpoint: a `Clip` where it has a text tower. Its weights require gradients, as `clip`'s do.

    The checkpoint's tensors become the model's, those that are on `device` and in `dtype` already.
    `options` are those of `ImageEncoder`.
    """
    options |= {"mean": checkpoint.mean, "std": checkpoint.std, "copy": False}
    if checkpoint.text is None:
        options |= {"without_text": checkpoint.without_text}
        model = ImageEncoder(checkpoint.config, checkpoint.state_dict, device, dtype, **options)
    else:
        text_config, text_state_dict, tokenizer = checkpoint.text
        options |= {"tokenizer": tokenizer}
        model = Clip(checkpoint.config, checkpoint.state_dict, text_config, text_state_dict, device, dtype, **options)
    return model.requires_grad_(True)


def build_model(state_dict: Mapping[str, Any]) -> ImageEncoder:
    """A model from a state dict of `clip`'s, on the CPU and in float16, as `clip.model.build_model` makes it.

    Raises:
        CheckpointError: the state dict is not that of a CLIP.
    """
    return from_checkpoint(read_state_dict(state_dict), torch.device("cpu"), torch.float16)


def convert_weights(model: nn.Module) -> None:
    """Converts a model's weights to float16, LayerNorms' and embeddings' too, which `clip` leaves as they are."""
    model.half()
