"""The Vision Transformer on a CPU, fused as far as PyTorch's own CPU kernels go.

The line of `vit.py` in the form that a CPU wants: LayerNorm is a pass of its own (the caches are near); products run on
oneDNN with weights packed once, bias, activation and residual in their epilogue; attention is PyTorch's flash attention
for CPUs; and the last block is taken for the class token alone, as in `vit.py`.

oneDNN fuses swish, x · σ(x), but no QuickGELU, x · σ(1.702 x). The first is made the second by scaling the weights
around it, QuickGELU(x) = swish(1.702 x) / 1.702, in float32; in half precision the scaled weights' rounding would show,
and the activation is a pass of its own.

Shapes: B images, N = 1 + G tokens, W width, H heads, D = W / H, E embed_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import LAYER_NORM_EPS, VitConfig
from .reference import quick_gelu

_QUICK_GELU_SLOPE = 1.702
_ROWS_HINT = 1600  # that oneDNN packs a weight for: 32 images of 50 tokens; any number of rows may be multiplied
# activation -> oneDNN's name of it, and of the algorithm where there are several
_FUSED = {"none": ("none", ""), "swish": ("swish", ""), "gelu": ("gelu", "none")}
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": torch.nn.Identity(),
    "swish": F.silu,
    "quick_gelu": quick_gelu,
    "gelu": F.gelu,
}


def can_fuse(dtype: torch.dtype) -> bool:
    """Whether this build of PyTorch has oneDNN's fused products, and this CPU the instructions for `dtype`."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


class Product:
    """activation(x Wᵀ + b) + residual, W (N, K) packed for oneDNN where it can fuse."""

    def __init__(self, weight: Tensor, bias: Tensor, activation: str = "none") -> None:
        self.fused = can_fuse(weight.dtype)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS_HINT) if self.fused else weight
        self.bias = bias
        self.activation = activation

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if self.fused and residual is not None:
            return torch.ops.mkldnn._linear_pointwise.binary(x, residual, self.weight, self.bias, "add")
        if self.fused and self.activation in _FUSED:
            attribute, algorithm = _FUSED[self.activation]
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, attribute, [], algorithm)
        if self.fused:
            y = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        else:
            y = F.linear(x, self.weight, self.bias)
        y = _ACTIVATIONS[self.activation](y)
        return y if residual is None else y + residual


@dataclass(frozen=True)
class Block:
    """One transformer block; LayerNorms are pairs of gain and shift."""

    ln_1: tuple[Tensor, Tensor]
    ln_2: tuple[Tensor, Tensor]
    qkv: Product
    out: Product
    fc1: Product
    fc2: Product


@dataclass(frozen=True)
class Weights:
    """An encoder as the line below reads it."""

    config: VitConfig
    patch: Tensor  # (W, 3, P, P)
    position: Tensor  # (N, W), the class embedding in its first row
    ln_pre: tuple[Tensor, Tensor]
    blocks: tuple[Block, ...]
    last_qkv: tuple[Tensor, Tensor]  # of the last block, plain: (3 · W, W) and (3 · W,)
    ln_post: tuple[Tensor, Tensor]
    proj: Tensor  # (W, E)


def prepare(state_dict: dict[str, Tensor], config: VitConfig, dtype: torch.dtype) -> Weights:
    """Casts canonical weights to `dtype` and packs them.

    Args:
        state_dict: of `reference.VisionTransformer(config)`, any float dtype, on the CPU.
    """
    wide = torch.promote_types(dtype, torch.float32)
    source = {name: tensor.detach().to(wide) for name, tensor in state_dict.items()}

    def pair(name: str) -> tuple[Tensor, Tensor]:
        return source[f"{name}.weight"].to(dtype), source[f"{name}.bias"].to(dtype)

    def product(
        name: str, separator: str = ".", scale: tuple[float, float] = (1, 1), activation: str = "none"
    ) -> Product:
        weight, bias = source[f"{name}{separator}weight"] * scale[0], source[f"{name}{separator}bias"] * scale[1]
        return Product(weight.to(dtype).contiguous(), bias.to(dtype), activation)

    # QuickGELU(x) = swish(1.702 x) / 1.702, where the weights' dtype can bear it
    as_swish = config.activation == "quick_gelu" and dtype.itemsize >= 4
    slope, activation = (_QUICK_GELU_SLOPE, "swish") if as_swish else (1.0, config.activation)

    def block(prefix: str) -> Block:
        return Block(
            ln_1=pair(f"{prefix}.ln_1"),
            ln_2=pair(f"{prefix}.ln_2"),
            qkv=product(f"{prefix}.attn.in_proj", "_"),
            out=product(f"{prefix}.attn.out_proj"),
            fc1=product(f"{prefix}.mlp.c_fc", scale=(slope, slope), activation=activation),
            fc2=product(f"{prefix}.mlp.c_proj", scale=(1 / slope, 1)),
        )

    position = source["positional_embedding"].clone()
    position[0] += source["class_embedding"]
    last = f"transformer.resblocks.{config.layers - 1}.attn.in_proj"
    return Weights(
        config=config,
        patch=source["conv1.weight"].to(dtype).contiguous(memory_format=torch.channels_last),
        position=position.to(dtype),
        ln_pre=pair("ln_pre"),
        blocks=tuple(block(f"transformer.resblocks.{i}") for i in range(config.layers)),
        last_qkv=(source[f"{last}_weight"].to(dtype), source[f"{last}_bias"].to(dtype)),
        ln_post=pair("ln_post"),
        proj=source["proj"].to(dtype),
    )


# --- the encoder -----------------------------------------------------------------------------------------------------


def encode(weights: Weights, images: Tensor) -> Tensor:
    """Embeds normalised images (B, 3, h, w) of the weights' dtype: (B, E), not normalised."""
    x = hidden_state(weights, images, weights.config.layers - 1)
    return _project(weights, _last_block(weights, x))


def encode_tokens(weights: Weights, images: Tensor) -> tuple[Tensor, Tensor]:
    """Embeds images and returns (B, E), and their patch tokens (B, G, W) after ln_post, as open_clip gives them."""
    x = hidden_state(weights, images, weights.config.layers)
    return _project(weights, x[:, 0]), _norm(x[:, 1:], *weights.ln_post)


def hidden_state(weights: Weights, images: Tensor, layer: int) -> Tensor:
    """The residual stream (B, N, W) after `layer` blocks: 0 is ln_pre's output, `layers` the last block's."""
    x = _norm(_embed(weights, images), *weights.ln_pre)
    for block in weights.blocks[:layer]:
        x = block.out(_attention(weights.config, block.qkv(_norm(x, *block.ln_1))), residual=x)
        x = block.fc2(block.fc1(_norm(x, *block.ln_2)), residual=x)
    return x


def _embed(weights: Weights, images: Tensor) -> Tensor:
    """Class token and patches, with their positions: (B, N, W)."""
    patches = F.conv2d(images, weights.patch, stride=weights.config.patch_size).flatten(2).transpose(1, 2)
    x = images.new_empty(len(images), 1 + patches.shape[1], weights.config.width)
    x[:, 0] = weights.position[0]
    torch.add(patches, weights.position[1:], out=x[:, 1:])
    return x


def _attention(config: VitConfig, qkv: Tensor) -> Tensor:
    """softmax(q kᵀ / √D) v of every head: (B, N, 3 · W) -> (B, N, W)."""
    q, k, v = qkv.view(*qkv.shape[:-1], 3, config.heads, config.head_dim).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def _last_block(weights: Weights, x: Tensor) -> Tensor:
    """The last block for the class token alone, its sums re-associated as in `kernels/attention_pool.py`.

    (B, N, W) -> (B, W)
    """
    config, block = weights.config, weights.blocks[-1]
    batch, (h, d, w) = len(x), (config.heads, config.head_dim, config.width)
    q_weight, k_weight, v_weight = weights.last_qkv[0].view(3, h, d, w)
    q_bias, _, v_bias = weights.last_qkv[1].view(3, w)  # a bias of the keys drops out of the softmax
    y = _norm(x, *block.ln_1)
    q = F.linear(y[:, 0], q_weight.flatten(0, 1), q_bias).view(batch, h, d)
    u = torch.bmm(q.transpose(0, 1), k_weight).transpose(0, 1)  # W_kᵀ q, (B, H, W)
    p = (torch.bmm(u, y.transpose(1, 2)) * d**-0.5).softmax(dim=-1)  # (B, H, N)
    z = torch.bmm(p, y)  # (B, H, W)
    attended = torch.bmm(z.transpose(0, 1), v_weight.transpose(1, 2)).transpose(0, 1).flatten(1) + v_bias
    class_token = block.out(attended, residual=x[:, 0].contiguous())
    return block.fc2(block.fc1(_norm(class_token, *block.ln_2)), residual=class_token)


def _project(weights: Weights, class_token: Tensor) -> Tensor:
    """ln_post and projection: (B, W) -> (B, E)."""
    return _norm(class_token, *weights.ln_post) @ weights.proj


def _norm(x: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], gain, shift, LAYER_NORM_EPS)
