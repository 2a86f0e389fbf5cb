"""SigLIP's Vision Transformer as a straight line of kernel calls.

    patch_embed → (ln+qkv → attention → out+residual → ln+fc1+activation → fc2+residual) × layers
                → ln_post+attention pool → out → ln+fc1+activation → fc2+residual

(Zhai et al. 2023; the head is that of Zhai et al. 2022, section 3.2.) The blocks are those of `vit.py`. There is no
class token, and no LayerNorm before the blocks: `patch_embed` leaves the statistics of its rows for the first one.

The head attends to all tokens with one learned query, the same for every image. So W_kᵀ q is a constant, which is made
when the weights are prepared. ln_post is folded into it, and into the weight and bias of the values.

Shapes: B images, N tokens, W width, H heads, D = W / H.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels import ops
from .config import Rgb, SiglipConfig
from .precision import Precision
from .vit import Folded, Folding, KernelVit


@dataclass(frozen=True)
class Head:
    """The attention pool, with ln_post folded in, and the MLP behind it."""

    towards: Tensor  # W_kᵀ q, (H, W)
    value_weight: Tensor  # (H, D, W)
    value_bias: Tensor  # (W,)
    out: Folded
    fc1: Folded
    fc2: Folded


@dataclass(frozen=True)
class FastSiglip(KernelVit):
    """SigLIP's ViT as the kernels read it."""

    config: SiglipConfig
    ln_post: tuple[Tensor, Tensor]
    head: Head

    @classmethod
    def prepare(
        cls, state_dict: Mapping[str, Tensor], config: SiglipConfig, precision: Precision, mean: Rgb, std: Rgb
    ) -> FastSiglip:
        """Folds the weights of `reference.SiglipTransformer`, in float32 or wider, and casts them at the end."""
        folding = Folding(state_dict, precision)
        source = folding.source
        return cls(
            config=config,
            precision=precision,
            **folding.patches(source["positional_embedding"] + source["conv1.bias"], 0, mean, std),
            blocks=tuple(folding.block(f"transformer.resblocks.{i}") for i in range(config.layers)),
            ln_post=folding.pair("ln_post"),
            head=_head(folding, config),
        )

    def encode(self, images: Tensor) -> Tensor:
        return self._pool(*self._after(images, self.config.layers))

    def encode_tokens(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x, statistics = self._after(images, self.config.layers)
        return self._pool(x, statistics), ops.layer_norm(x, *self.ln_post, self.config.eps)[0]

    def _embed(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self._patches(images, class_token=False, statistics=True)

    def _pool(self, x: Tensor, statistics: Tensor) -> Tensor:
        """ln_post and the head: the residual stream (B, N, W) and its row statistics -> (B, W)."""
        head = self.head
        pooled = ops.attention_pool(
            head.towards,
            x[:, 0],
            x[:, 1:],
            key_weight=None,
            value_weight=head.value_weight,
            value_bias=head.value_bias,
            scale=self.config.head_dim**-0.5,
            statistics=statistics,
            eps=self.config.eps,
            precision=self.precision.products,
        )
        return self._mlp(head.fc1, head.fc2, *self._added(head.out, pooled, residual=None))[0]


def towards_tokens(source: Mapping[str, Tensor], heads: int) -> Tensor:
    """W_kᵀ q of the head's learned query, in float64: (H, W). A bias of the keys drops out of the softmax."""
    weight, bias, query = (source[f"map_head.{name}"] for name in ("attn.in_proj_weight", "attn.in_proj_bias", "query"))
    query_weight, key_weight, _ = weight.double().view(3, heads, -1, query.numel())  # each (H, D, W)
    asked = query_weight @ query.double().flatten() + bias.double().view(3, heads, -1)[0]  # (H, D)
    return torch.einsum("hd,hdw->hw", asked, key_weight)


def head_values(source: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Weight (W, W) and bias (W,) of the head's values."""
    weight, bias = (source[f"map_head.attn.in_proj_{part}"].chunk(3)[2] for part in ("weight", "bias"))
    return weight, bias


def _head(folding: Folding, config: SiglipConfig) -> Head:
    gain, shift = folding.pair("ln_post")
    weight, bias = head_values(folding.source)
    return Head(
        towards=folding.operand(towards_tokens(folding.source, config.heads) * gain.double()),
        value_weight=folding.operand(weight * gain).view(config.heads, config.head_dim, config.width),
        value_bias=bias + weight @ shift,
        out=folding.linear("map_head.attn.out_proj"),
        fc1=folding.linear("map_head.mlp.c_fc", norm="map_head.ln"),
        fc2=folding.linear("map_head.mlp.c_proj"),
    )
