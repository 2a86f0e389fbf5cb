"""CLIP's text encoder in plain PyTorch.

It is a causal Transformer over byte-pair tokens, read at the end-of-text token (Radford et al. 2021, section 2.4).

Shapes: B texts, L context length, W width, E embed_dim.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .config import TextConfig
from .reference import Transformer, random_parameter

VOCABULARY = 49408  # tokens: 256 bytes and 256 bytes that end a word, the merges in use, start and end


class TextEncoder(nn.Module):
    """Tokens (B, L) of an integer dtype -> embeddings (B, E), not normalised.

    Its parameters have OpenAI's names. One of them is `logit_scale`, the logarithm of the factor for cosines.
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding.from_pretrained(  # pyright: ignore[reportUnknownMemberType]
            random_parameter(config.vocabulary, config.width, std=1.0), freeze=False
        )
        self.positional_embedding = random_parameter(config.context_length, config.width, std=0.01)
        self.transformer = Transformer(config, causal=True)
        self.ln_final = nn.LayerNorm(config.width, eps=config.eps)
        self.text_projection = random_parameter(config.width, config.embed_dim, std=config.width**-0.5)
        self.logit_scale = nn.Parameter(torch.tensor(-math.log(0.07)))

    def forward(self, tokens: Tensor) -> Tensor:
        context_length = len(self.positional_embedding)
        if tokens.ndim != 2 or not 0 < tokens.shape[1] <= context_length or tokens.is_floating_point():
            raise ValueError(
                f"tokens must be [batch, at most {context_length}] of an integer dtype, "
                f"got {list(tokens.shape)} of {tokens.dtype}"
            )
        x = self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]  # (B, L, W)
        for block in self.transformer.resblocks:
            x = block(x)
        end = tokens.argmax(dim=-1)  # the end-of-text token has the largest number
        x = self.ln_final(x[torch.arange(len(x), device=x.device), end])  # (B, W)
        return x @ self.text_projection
