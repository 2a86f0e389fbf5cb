"""SigLIP's Vision Transformer on a CPU.

The blocks are those of `vit_cpu.py`. The head attends with one learned query, whose W_kᵀ q is made once. Its attention
is computed in float64, and for float32 so is what follows. The head's roundings are not averaged over the tokens, as
all earlier ones are, and it is a thousandth of the arithmetic.

Shapes: B images, N tokens, W width, H heads, D = W / H.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from .config import Rgb, SiglipConfig
from .cpu import Product, attention_towards
from .precision import FP64, Precision
from .siglip import head_values, towards_tokens
from .vit_cpu import Casting, CpuBlocks, Mlp


@dataclass(frozen=True)
class Head:
    """The attention pool, in float64, and what follows it."""

    towards: Tensor  # W_kᵀ q, (H, W)
    value_weight: Tensor  # (H, D, W)
    value_bias: Tensor  # (W,)
    out: Product
    mlp: Mlp


@dataclass(frozen=True)
class CpuSiglip(CpuBlocks):
    """SigLIP's ViT as a CPU computes it. It also serves GPUs on which Triton cannot launch."""

    config: SiglipConfig
    ln_post: tuple[Tensor, Tensor]
    head: Head

    @classmethod
    def prepare(
        cls, state_dict: Mapping[str, Tensor], config: SiglipConfig, precision: Precision, mean: Rgb, std: Rgb
    ) -> CpuSiglip:
        """Casts the weights of `reference.SiglipTransformer`."""
        casting = Casting(state_dict, config, precision)
        position = casting.source["positional_embedding"].to(precision.wide) + casting.source["conv1.bias"]
        return cls(
            config=config,
            precision=precision,
            normalisation=(mean, std),
            patch=casting.patch(),
            position=position.to(precision.weights),
            blocks=tuple(map(casting.block, range(config.layers))),
            ln_post=casting.pair("ln_post"),
            head=_head(Casting(state_dict, config, FP64) if precision.wide == precision.weights else casting, config),
        )

    def encode(self, images: Tensor) -> Tensor:
        return self.encode_tokens(images)[0]

    def encode_tokens(self, images: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self._norm(self.hidden_state(images, self.config.layers), self.ln_post)
        return self._pool(tokens), tokens

    def _embed(self, images: Tensor) -> Tensor:
        return self._patches(images).add_(self.position)

    def _pool(self, tokens: Tensor) -> Tensor:
        """The head: tokens (B, N, W) after ln_post -> (B, W)."""
        head = self.head
        towards = head.towards.expand(len(tokens), -1, -1)
        pooled = attention_towards(towards, tokens.double(), head.value_weight, head.value_bias)
        return self._mlp(head.mlp, head.out(pooled.to(head.out.bias.dtype))).to(tokens.dtype)


def _head(casting: Casting, config: SiglipConfig) -> Head:
    weight, bias = head_values(casting.source)
    return Head(
        towards=towards_tokens(casting.source, config.heads),
        value_weight=weight.double().view(config.heads, config.head_dim, config.width),
        value_bias=bias.double(),
        out=casting.product("map_head.attn.out_proj."),
        mlp=casting.mlp("map_head.mlp", "map_head.ln"),
    )
