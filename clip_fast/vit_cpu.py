"""The Vision Transformer on a CPU, fused as far as PyTorch's own CPU kernels go.

The line of `vit.py` in the form that a CPU wants: LayerNorm is a pass of its own (the caches are near), a product takes
its bias, residual and activation along (`Product`), attention is PyTorch's flash attention for CPUs, and the last block
is taken for the class token alone, as in `vit.py`. Its attention and the projection, products of one row an image, are
taken in float32 whatever the dtype: oneDNN is slow to begin a product in half precision.

Both fast libraries know swish, x · σ(x), but no QuickGELU, x · σ(1.702 x). The first is made the second by scaling what
is around it, QuickGELU(x) = swish(1.702 x) / 1.702: the weights before they are rounded to the dtype; or, where they
come in bfloat16, stay in it and would be rounded by that alone, the LayerNorm before them, whose gain and shift may be
float32, and the sum after them. In float16 1.702 x might overflow: there the activation is a pass of its own.

Shapes: B images, N = 1 + G tokens, W width, H heads, D = W / H, E embed_dim.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import LAYER_NORM_EPS, VitConfig
from .cpu import Product, images_at_a_time, one_query_attention
from .reference import QUICK_GELU_SLOPE

ROWS_AT_A_TIME = 1600  # tokens that are encoded together: more are no faster, and their activations leave the caches


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
    patch: Product  # W of (W, 3 · P · P)
    position: Tensor  # (N, W), the class embedding in its first row
    ln_pre: tuple[Tensor, Tensor]
    blocks: tuple[Block, ...]
    last_qkv: tuple[Tensor, Tensor]  # of the last block, plain: (3 · W, W) and (3 · W,), float32 at least
    ln_post: tuple[Tensor, Tensor]  # float32 at least
    proj: Tensor  # (W, E), float32 at least


def prepare(state_dict: dict[str, Tensor], config: VitConfig, dtype: torch.dtype) -> Weights:
    """Casts canonical weights to `dtype`, those of the products when they are first needed.

    Args:
        state_dict: of `reference.VisionTransformer(config)`, any float dtype, on the CPU.
    """
    source = {name: tensor.detach() for name, tensor in state_dict.items()}

    wide = torch.promote_types(dtype, torch.float32)
    # QuickGELU(x) = swish(1.702 x) / 1.702
    as_swish = config.activation == "quick_gelu" and dtype != torch.float16
    slope, activation = (QUICK_GELU_SLOPE, "swish") if as_swish else (1.0, config.activation)
    given = source["transformer.resblocks.0.mlp.c_fc.weight"].dtype
    rounded_anyway = dtype.itemsize >= 4 or torch.finfo(given).eps < torch.finfo(dtype).eps
    in_weights, beside = (slope, 1.0) if rounded_anyway else (1.0, slope)

    def pair(name: str, dtype: torch.dtype = dtype, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        gain, shift = (source[f"{name}.{part}"].to(wide) * scale for part in ("weight", "bias"))
        return gain.to(dtype), shift.to(dtype)

    def product(name: str, rows: tuple[int, ...], bias_scale: float = 1.0, **options: Any) -> Product:
        bias = source[f"{name}bias"].to(wide) * bias_scale
        return Product(source[f"{name}weight"], bias.to(dtype), usual_rows=rows, **options)

    images = images_at_a_time(ROWS_AT_A_TIME, config.tokens)

    def block(i: int) -> Block:
        prefix = f"transformer.resblocks.{i}"
        tokens = 1 if i == config.layers - 1 else config.tokens  # of an image, that the block is taken for
        rows = (tokens, images * tokens)
        return Block(
            ln_1=pair(f"{prefix}.ln_1"),
            ln_2=pair(f"{prefix}.ln_2", dtype if beside == 1 else wide, beside),
            qkv=product(f"{prefix}.attn.in_proj_", rows),
            out=product(f"{prefix}.attn.out_proj.", rows),
            fc1=product(f"{prefix}.mlp.c_fc.", rows, slope, activation=activation, scale=in_weights),
            fc2=product(f"{prefix}.mlp.c_proj.", rows, beside, scale=1 / in_weights, alpha=1 / beside),
        )

    position = source["positional_embedding"].to(wide, copy=True)
    position[0] += source["class_embedding"]
    patch, patches = source["conv1.weight"].flatten(1), config.grid**2
    last = f"transformer.resblocks.{config.layers - 1}.attn.in_proj"
    return Weights(
        config=config,
        patch=Product(patch, patch.new_zeros(config.width, dtype=dtype), usual_rows=(patches, images * patches)),
        position=position.to(dtype),
        ln_pre=pair("ln_pre"),
        blocks=tuple(map(block, range(config.layers))),
        last_qkv=(source[f"{last}_weight"].to(wide), source[f"{last}_bias"].to(wide)),
        ln_post=pair("ln_post", wide),
        proj=source["proj"].to(wide),
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
    return deque(_residual_stream(weights, images, layer), maxlen=1).pop()


def hidden_states(weights: Weights, images: Tensor) -> tuple[Tensor, ...]:
    """The residual stream (B, N, W) before the first block and after each: layers + 1 tensors."""
    return tuple(x.clone() for x in _residual_stream(weights, images, weights.config.layers))


def _residual_stream(weights: Weights, images: Tensor, layers: int) -> Iterator[Tensor]:
    """The residual stream (B, N, W), once before the first block and once after each of `layers`.

    A block may write over what was given before it.
    """
    config = weights.config
    x = _norm(_embed(weights, images), *weights.ln_pre)
    yield x
    rows = x.view(-1, config.width)  # of all images, which the products take and write over
    for block in weights.blocks[:layers]:
        qkv = block.qkv(_norm(rows, *block.ln_1)).view(*x.shape[:2], 3, config.heads, config.head_dim)
        rows = block.out(_attention(qkv), residual=rows)
        rows = block.fc2(block.fc1(_norm(rows, *block.ln_2)), residual=rows)
        yield rows.view(x.shape)


def _embed(weights: Weights, images: Tensor) -> Tensor:
    """Class token and patches, with their positions: (B, N, W)."""
    config = weights.config
    b, g, p = len(images), config.grid, config.patch_size
    pixels = images.unfold(2, p, p).unfold(3, p, p)  # (B, 3, g, g, P, P)
    patches = weights.patch(pixels.permute(0, 2, 3, 1, 4, 5).reshape(b * g * g, 3 * p * p))
    x = images.new_empty(b, config.tokens, config.width)
    x[:, 0] = weights.position[0]
    torch.add(patches.view(b, g * g, config.width), weights.position[1:], out=x[:, 1:])
    return x


def _attention(qkv: Tensor) -> Tensor:
    """softmax(q kᵀ / √D) v of every head: (B, N, 3, H, D) -> (B · N, W)."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).flatten(0, 1)


def _last_block(weights: Weights, x: Tensor) -> Tensor:
    """The last block for the class token alone, its sums re-associated as in `kernels/attention_pool.py`.

    (B, N, W) -> (B, W)
    """
    config, block = weights.config, weights.blocks[-1]
    batch, (h, d, w) = len(x), (config.heads, config.head_dim, config.width)
    q_weight, k_weight, v_weight = weights.last_qkv[0].view(3, h, d, w)
    q_bias, _, v_bias = weights.last_qkv[1].view(3, w)  # a bias of the keys drops out of the softmax
    y = _norm(x, *block.ln_1).to(q_weight.dtype)
    q = F.linear(y[:, 0], q_weight.flatten(0, 1), q_bias).view(batch, h, d)
    attended = one_query_attention(q, y, k_weight, v_weight, v_bias).to(x.dtype)
    class_token = block.out(attended, residual=x[:, 0].clone())
    return block.fc2(block.fc1(_norm(class_token, *block.ln_2)), residual=class_token)


def _project(weights: Weights, class_token: Tensor) -> Tensor:
    """ln_post and projection: (B, W) -> (B, E)."""
    projected = _norm(class_token.to(weights.proj.dtype), *weights.ln_post) @ weights.proj
    return projected.to(class_token.dtype)


def _norm(x: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], gain, shift, LAYER_NORM_EPS)
