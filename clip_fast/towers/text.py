"""The text encoders of CLIP and SigLIP in plain PyTorch.

CLIP's is a causal Transformer over tokens, read at the end-of-text token (Radford et al. 2021, section 2.4). In
SigLIP's every token sees all, and the last token is read, which is the padding of most texts (Zhai et al. 2023).

Shapes: B texts, L context length, W width, E embed_dim.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor, nn

from .config import TextConfig
from .reference import Transformer, random_parameter

VOCABULARY = 49408  # tokens: 256 bytes and 256 bytes that end a word, the merges in use, start and end


class TextTower(Protocol):
    """The parts of a text tower, under OpenAI's names. A projection that has a bias is a module, as in open_clip."""

    token_embedding: nn.Embedding
    positional_embedding: nn.Parameter
    transformer: Transformer
    ln_final: nn.LayerNorm
    text_projection: nn.Parameter | nn.Linear | None


_INTEGERS = (
    *(torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
)


def encode_text(tower: TextTower, tokens: Tensor, config: TextConfig) -> Tensor:
    """Tokens (B, L) of an integer dtype -> embeddings (B, E), not normalised."""
    context_length = len(tower.positional_embedding)
    if tokens.ndim != 2 or not 0 < tokens.shape[1] <= context_length or tokens.dtype not in _INTEGERS:
        raise ValueError(
            f"tokens must be [batch, at most {context_length}] of an integer dtype, "
            f"got {list(tokens.shape)} of {tokens.dtype}"
        )
    tokens = tokens.long()
    x = tower.token_embedding(tokens) + tower.positional_embedding[: tokens.shape[1]]  # (B, L, W)
    x = tower.transformer(x.transpose(0, 1)).transpose(0, 1)
    x = tower.ln_final(x[torch.arange(len(x), device=x.device), _read_at(tokens, config)])  # (B, W)
    projection = tower.text_projection
    if projection is None:
        return x
    return projection(x) if isinstance(projection, nn.Linear) else x @ projection


def _read_at(tokens: Tensor, config: TextConfig) -> Tensor | int:
    """The place of each text's token (B,) at which its embedding is read; or that of all, -1."""
    if config.last:
        return -1
    return (tokens if config.end is None else (tokens == config.end).int()).argmax(dim=-1)  # of equals the first


def causal_mask(length: int) -> Tensor:
    """(L, L): 0 where a query may see a key, which is up to its own position, and -inf elsewhere."""
    return torch.full((length, length), float("-inf"), device="cpu").triu_(1)


class TextEncoder(nn.Module):
    """Tokens (B, L) of an integer dtype -> embeddings (B, E), not normalised.

    Its parameters have OpenAI's names. One of them is `logit_scale`, the logarithm of the factor for cosines, and one
    `logit_bias`, where there is one: what is added to them.
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embedding: nn.Embedding = nn.Embedding.from_pretrained(  # pyright: ignore[reportUnknownMemberType]
            random_parameter(config.vocabulary, config.width, std=1.0), freeze=False
        )
        self.positional_embedding = random_parameter(config.context_length, config.width, std=0.01)
        self.transformer = Transformer(config, causal_mask(config.context_length) if config.causal else None)
        self.ln_final = nn.LayerNorm(config.width, eps=config.eps)
        self.text_projection = _projection(config)
        self.logit_scale = nn.Parameter(torch.tensor(-math.log(0.07)))
        self.logit_bias = nn.Parameter(torch.tensor(-10.0)) if config.logit_bias else None

    def forward(self, tokens: Tensor) -> Tensor:
        return encode_text(self, tokens, self.config)


def _projection(config: TextConfig) -> nn.Parameter | nn.Linear | None:
    match config.projection:
        case "linear":
            return random_parameter(config.width, config.embed_dim, std=config.width**-0.5)
        case "affine":
            return nn.Linear(config.width, config.embed_dim)
        case "none":
            return None
