"""The Vision Transformer as a straight line of kernel calls.

`prepare` folds a state dict into what the kernels read, once; `encode` is the encoder of Radford et al. 2021, section
2.4 (Dosovitskiy et al. 2021, section 3.1), in launches:

    patch_embed → ln_pre → (ln+qkv → attention → out+residual → ln+fc1+activation → fc2+residual) × (layers − 1)
                → the last block, for the class token alone → ln_post+projection

Every LayerNorm but the first is folded into the product that follows it, LN(x) Wᵀ + b = rstd · (x W′ᵀ − mean · colsum)
+ b′ with W′ = W diag(gain), colsum = W′ summed over K and b′ = b + W · shift; mean and rstd come from the statistics
that the writer of x left. Only the class token leaves the encoder, so the last block has one query per image, and its
keys, values and MLP exist for no other token.

Shapes: B images, N = 1 + G tokens, W width, H heads, D = W / H, P patch size, E embed_dim.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import LAYER_NORM_EPS, Rgb, VitConfig
from .kernels import ops
from .kernels.ops import PATCH_K_STEP, Precision


@dataclass(frozen=True)
class Product:
    """What `ops.linear` multiplies by: weight (N, K), bias (N,), and colsum (N,) where a LayerNorm is folded in."""

    weight: Tensor
    bias: Tensor
    colsum: Tensor | None = None


@dataclass(frozen=True)
class Block:
    """One transformer block; `qkv` stacks the projections of queries, keys and values, (3 · W, W)."""

    qkv: Product
    out: Product
    fc1: Product
    fc2: Product


@dataclass(frozen=True)
class Weights:
    """An encoder as the kernels read it.

    `patch` (W, K′) and `position` (N, W) are for normalised images; `patch_uint8` and `position_uint8` for raw pixels,
    with the normalisation folded in. Weights are of the compute dtype, all that is added in an epilogue is float32.
    """

    config: VitConfig
    patch: Tensor
    position: Tensor
    patch_uint8: Tensor
    position_uint8: Tensor
    ln_pre: tuple[Tensor, Tensor]
    blocks: tuple[Block, ...]
    ln_post: tuple[Tensor, Tensor]
    projection: Product


def prepare(
    state_dict: dict[str, Tensor],
    config: VitConfig,
    dtype: torch.dtype,
    mean: Rgb,
    std: Rgb,
    precision: ops.Precision = "ieee",
) -> Weights:
    """Folds canonical weights, in float32 or wider, and casts what is multiplied to `dtype` at the end.

    Args:
        state_dict: of `reference.VisionTransformer(config)`, any float dtype, any device.
        mean, std: of the RGB channels of pixels scaled to [0, 1], with which `preprocess` normalises.
        precision: that the encoder is to run in.
    """
    wide = torch.promote_types(dtype, torch.float32)
    source = {name: tensor.detach().to(wide) for name, tensor in state_dict.items()}

    def product(weight: Tensor, bias: Tensor, norm: str | None = None) -> Product:
        if norm is None:
            return Product(ops.operand(weight, dtype, precision), bias)
        gain, shift = source[f"{norm}.weight"], source[f"{norm}.bias"]
        folded = ops.operand(weight * gain, dtype, precision)
        # summed from the weight as rounded, in float64: the product's means must cancel against exactly these
        return Product(folded, bias + weight @ shift, folded.double().sum(dim=1).to(wide))

    def block(prefix: str) -> Block:
        def of(name: str) -> tuple[Tensor, Tensor]:
            separator = "_" if name == "attn.in_proj" else "."
            return source[f"{prefix}.{name}{separator}weight"], source[f"{prefix}.{name}{separator}bias"]

        return Block(
            qkv=product(*of("attn.in_proj"), norm=f"{prefix}.ln_1"),
            out=product(*of("attn.out_proj")),
            fc1=product(*of("mlp.c_fc"), norm=f"{prefix}.ln_2"),
            fc2=product(*of("mlp.c_proj")),
        )

    patch = source["conv1.weight"]  # (W, 3, P, P)
    position = source["positional_embedding"].clone()
    position[0] += source["class_embedding"]
    mu, sigma = (torch.tensor(x, dtype=torch.float64, device=patch.device)[:, None, None] for x in (mean, std))
    # a pixel u enters as u − 128, see ops.patch_embed
    patch_uint8 = ops.operand(patch.double() / (255 * sigma), dtype, precision)
    shift = (patch_uint8.double() * (128 - 255 * mu)).sum(dim=(1, 2, 3))
    position_uint8 = position.clone()
    position_uint8[1:] += shift.to(wide)
    proj = source["proj"]
    return Weights(
        config=config,
        patch=_pad_features(ops.operand(patch, dtype, precision)),
        position=position,
        patch_uint8=_pad_features(patch_uint8),
        position_uint8=position_uint8,
        ln_pre=(source["ln_pre.weight"], source["ln_pre.bias"]),
        blocks=tuple(block(f"transformer.resblocks.{i}") for i in range(config.layers)),
        ln_post=(source["ln_post.weight"], source["ln_post.bias"]),
        projection=product(proj.T, proj.new_zeros(config.embed_dim), norm="ln_post"),
    )


def resample(state_dict: dict[str, Tensor], config: VitConfig, image_size: int) -> tuple[dict[str, Tensor], VitConfig]:
    """The same tower for images of another size: its positional embedding resampled bicubically, antialiased.

    As open_clip does (`resize_pos_embed`): the class token's row stays, the patches' rows are a grid of W channels.
    """
    resized = replace(config, image_size=image_size)
    if resized.grid == config.grid:
        return state_dict, resized
    position = state_dict["positional_embedding"]
    grid = position[1:].float().view(config.grid, config.grid, -1).permute(2, 0, 1)[None]  # (1, W, grid, grid)
    size = (resized.grid, resized.grid)
    grid = F.interpolate(grid, size, mode="bicubic", antialias=True, align_corners=False)[0]
    patches = grid.permute(1, 2, 0).flatten(0, 1).to(position.dtype)
    return state_dict | {"positional_embedding": torch.cat([position[:1], patches])}, resized


def _pad_features(patch: Tensor) -> Tensor:
    """(W, 3, P, P) -> (W, K′), the features zero-padded to a multiple of the kernel's step."""
    flat = patch.flatten(1)
    return F.pad(flat, (0, -flat.shape[1] % PATCH_K_STEP)).contiguous()


# --- the encoder -----------------------------------------------------------------------------------------------------


def encode(weights: Weights, images: Tensor, precision: Precision = "ieee") -> Tensor:
    """Embeds images.

    Args:
        images: (B, 3, h, w), normalised floats or raw uint8 pixels, any strides.
        precision: of products of float32 operands on a GPU.

    Returns:
        (B, E), not normalised.
    """
    x, statistics = _embed(weights, images, precision)
    for block in weights.blocks[:-1]:
        x, statistics = _block(weights.config, block, x, statistics, precision)
    x, statistics = _last_block(weights.config, weights.blocks[-1], x, statistics, precision)
    return _project(weights, x, statistics, precision)


def encode_tokens(weights: Weights, images: Tensor, precision: Precision = "ieee") -> tuple[Tensor, Tensor]:
    """Embeds images and returns (B, E), and their patch tokens (B, G, W) after ln_post, as open_clip gives them."""
    x, statistics = _hidden_state(weights, images, weights.config.layers, precision)
    tokens, _ = ops.layer_norm(x, *weights.ln_post, LAYER_NORM_EPS)
    return _project(weights, x[:, 0], statistics[:, 0], precision), tokens[:, 1:]


def activations(config: VitConfig) -> int:
    """Elements of an image that are in memory at once, at most: in `_mlp`, x before the block and in it, the attended
    tokens, the MLP's hidden ones and its result."""
    return config.tokens * (4 * config.width + config.mlp_width)


def hidden_state(weights: Weights, images: Tensor, layer: int, precision: Precision = "ieee") -> Tensor:
    """The residual stream (B, N, W) after `layer` blocks: 0 is ln_pre's output, `layers` the last block's."""
    return _hidden_state(weights, images, layer, precision)[0]


def hidden_states(weights: Weights, images: Tensor, precision: Precision = "ieee") -> tuple[Tensor, ...]:
    """The residual stream (B, N, W) before the first block and after each: layers + 1 tensors."""
    x, statistics = _embed(weights, images, precision)
    states = [x]
    for block in weights.blocks:
        x, statistics = _block(weights.config, block, x, statistics, precision)
        states.append(x)
    return tuple(states)


def _hidden_state(weights: Weights, images: Tensor, layer: int, precision: Precision) -> tuple[Tensor, Tensor]:
    x, statistics = _embed(weights, images, precision)
    for block in weights.blocks[:layer]:
        x, statistics = _block(weights.config, block, x, statistics, precision)
    return x, statistics


def _embed(weights: Weights, images: Tensor, precision: Precision) -> tuple[Tensor, Tensor]:
    """Images -> tokens after ln_pre (B, N, W) and their row statistics."""
    raw = images.dtype == torch.uint8
    patch = weights.patch_uint8 if raw else weights.patch
    position = weights.position_uint8 if raw else weights.position
    x = ops.patch_embed(images, patch, position, weights.config.patch_size, precision=precision)
    return ops.layer_norm(x, *weights.ln_pre, LAYER_NORM_EPS, statistics=True)


def _block(
    config: VitConfig, block: Block, x: Tensor, statistics: Tensor, precision: Precision
) -> tuple[Tensor, Tensor]:
    """x + attention(ln_1(x)), then x + mlp(ln_2(x)): five launches. (B, N, W) and its row statistics, in and out."""
    packed = (*x.shape[:-1], 3, config.heads, config.head_dim)
    attended = ops.flash_attention(  # (B, N, W); what has no name here, the next launch's memory is made of
        _normed(block.qkv, x, statistics, precision).view(packed), config.head_dim**-0.5, precision=precision
    )
    x, statistics = _added(block.out, attended, x, precision)
    return _mlp(config, block, x, statistics, precision)


def _last_block(
    config: VitConfig, block: Block, x: Tensor, statistics: Tensor, precision: Precision
) -> tuple[Tensor, Tensor]:
    """`_block` for the class token alone: (B, N, W) -> (B, W), with its row statistics."""
    class_token, patches = x[:, 0], x[:, 1:]
    w, (h, d) = config.width, (config.heads, config.head_dim)
    qkv = block.qkv
    assert qkv.colsum is not None
    query = Product(qkv.weight[:w], qkv.bias[:w], qkv.colsum[:w])
    attended = ops.attention_pool(
        _normed(query, class_token, statistics[:, 0], precision).view(-1, h, d),
        class_token,
        patches,
        key_weight=qkv.weight[w : 2 * w].view(h, d, w),
        value_weight=qkv.weight[2 * w :].view(h, d, w),
        value_bias=qkv.bias[2 * w :],
        scale=d**-0.5,
        statistics=statistics,
        eps=LAYER_NORM_EPS,
        precision=precision,
    )  # (B, W)
    x, statistics = _added(block.out, attended, class_token, precision)
    return _mlp(config, block, x, statistics, precision)


def _mlp(config: VitConfig, block: Block, x: Tensor, statistics: Tensor, precision: Precision) -> tuple[Tensor, Tensor]:
    hidden = _normed(block.fc1, x, statistics, precision, config.activation)
    return _added(block.fc2, hidden, x, precision)


def _project(weights: Weights, class_token: Tensor, statistics: Tensor, precision: Precision) -> Tensor:
    """ln_post and projection of the class token: (B, W) -> (B, E)."""
    return _normed(weights.projection, class_token, statistics, precision)


def _normed(
    product: Product, x: Tensor, statistics: Tensor, precision: Precision, activation: ops.Activation = "none"
) -> Tensor:
    """activation(LN(x) Wᵀ + b), the LayerNorm's gain and shift in the product."""
    assert product.colsum is not None
    y, _ = ops.linear(
        x,
        product.weight,
        product.bias,
        norm=(statistics, product.colsum),
        activation=activation,
        eps=LAYER_NORM_EPS,
        precision=precision,
    )
    return y


def _added(product: Product, x: Tensor, residual: Tensor, precision: Precision) -> tuple[Tensor, Tensor]:
    """x Wᵀ + b + residual, and its row statistics."""
    return ops.linear(x, product.weight, product.bias, residual=residual, statistics=True, precision=precision)
