"""CLIP whole: the fast image encoder with its text side, for zero-shot classification and retrieval by text."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .encoder import ImageEncoder, with_weights
from .towers.config import Config, TextConfig
from .towers.text import TextEncoder


class Clip(ImageEncoder):
    """An `ImageEncoder` that embeds texts too: a drop-in for the model of `clip.load`.

    Args:
        config, state_dict, device, dtype, options: the image encoder's, see `ImageEncoder`.
        text_config, text_state_dict: the text encoder's, under the names of `TextEncoder`.

    In its own state dict the text encoder's weights have the names of `clip`'s behind "text."; `clip_fast.load` reads
    those of `clip` as they are.
    """

    def __init__(
        self,
        config: Config,
        state_dict: dict[str, Tensor],
        text_config: TextConfig,
        text_state_dict: dict[str, Tensor],
        device: torch.device,
        dtype: torch.dtype,
        **options: Any,
    ) -> None:
        super().__init__(config, state_dict, device, dtype, **options)
        with torch.device("meta"):
            text = TextEncoder(text_config)
        self.text = with_weights(text, text_state_dict, device, dtype)

    @property
    def logit_scale(self) -> Tensor:
        """The logarithm of what cosines are multiplied by."""
        return self.text.logit_scale

    @property
    def context_length(self) -> int:
        """Tokens that a text may have, start and end included."""
        return len(self.text.positional_embedding)

    @property
    def vocab_size(self) -> int:
        return self.text.token_embedding.num_embeddings

    def encode_text(self, text: Tensor) -> Tensor:
        """Embeds texts as `clip_fast.tokenize` gives them: (B, L) integers -> (B, embed_dim), not normalised.

        Raises:
            ValueError: for tokens of another shape or dtype.
        """
        return self.text(text.to(self.device))

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Cosines of images (B, …) and texts (T, L), times exp(logit_scale): (B, T), and the same transposed."""
        image_embeddings = F.normalize(self.encode_image(image), dim=-1)
        text_embeddings = F.normalize(self.encode_text(text), dim=-1)
        logits = self.logit_scale.exp() * image_embeddings @ text_embeddings.T
        return logits, logits.T
