"""The modified ResNet as a straight line: convolutions with all around them folded in, and a pool with one query.

`prepare` folds every batch norm into the convolution before it, and the normalisation of raw pixels into the stem, in
float64, once; `encode` is the encoder of Radford et al. 2021, section 2.3 (He et al. 2019's ResNet-D, with Zhang's
antialiasing average pools):

    stem: 3 × (3×3 convolution + ReLU) → average pool
    → bottlenecks: 1×1 + ReLU → 3×3 + ReLU → (average pool) → 1×1 + shortcut + ReLU
    → attention pool: mean token → query → attention with that one query → projection

The average pools stay passes of their own. One and the 1×1 convolution after it are together one 2×2 convolution of
stride 2, but of four times the arithmetic, and the map that this saves writing is a quarter of the one that is read:
with the 128 channels and more that there are, no device gains.

Shapes: B images, C features of the last map, G = h · w its positions, H heads, D = C / H, E embed_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import BATCH_NORM_EPS, ResNetConfig, Rgb
from .convolution import Convolution, by_kernels
from .cpu import Product, one_query_attention
from .kernels import ops
from .kernels.ops import Precision

ROWS_AT_A_TIME = 400  # tokens of the pool that are encoded together on a CPU, 8 images of 224 pixels: their first maps
# are then still below the size that the allocator returns to the system each time

_PIXEL_OFFSET = 128  # a pixel u enters as u − 128, which is exact in every dtype; as in ops.patch_embed


@dataclass(frozen=True)
class Bottleneck:
    """Three convolutions and a shortcut; `stride` is that of the average pools before the last and the shortcut."""

    conv1: Convolution
    conv2: Convolution
    conv3: Convolution
    shortcut: Convolution | None
    stride: int


@dataclass(frozen=True)
class Pool:
    """The attention pool.

    For the kernels its weights are of the compute dtype, and what is added is float32. On a CPU all is float32: it is
    little to compute, and no rounding after it averages out over the positions, as those of the map do.
    """

    position: Tensor  # (1 + G, C)
    query: Callable[[Tensor], Tensor]
    key_weight: Tensor  # (H, D, C)
    value_weight: Tensor  # (H, D, C)
    value_bias: Tensor  # (C,)
    out: Callable[[Tensor], Tensor]
    precision: Precision


@dataclass(frozen=True)
class Weights:
    """An encoder as the line below reads it.

    `stem` is for normalised images; `stem_uint8` stands for its first convolution where the pixels are raw.
    """

    config: ResNetConfig
    dtype: torch.dtype
    stem: tuple[Convolution, ...]
    stem_uint8: Convolution
    black: Tensor  # (3, 1, 1): the raw value that normalises to zero, less the offset, with which raw images are padded
    bottlenecks: tuple[Bottleneck, ...]
    pool: Pool


def prepare(
    state_dict: dict[str, Tensor],
    config: ResNetConfig,
    dtype: torch.dtype,
    mean: Rgb,
    std: Rgb,
    precision: Precision = "ieee",
) -> Weights:
    """Folds canonical weights in float64 and casts them to `dtype` at the end.

    Args:
        state_dict: of `reference.ModifiedResNet(config)`, any float dtype, any device.
        mean, std: of the RGB channels of pixels scaled to [0, 1], with which `preprocess` normalises.
        precision: of products of float32 operands on a GPU.
    """
    source = {name: t.detach().double() for name, t in state_dict.items() if t.is_floating_point()}

    def folded(conv: str, norm: str) -> tuple[Tensor, Tensor, Tensor]:
        """Weight, scale and bias of a convolution and the batch norm after it, in float64."""
        gain, shift, average, variance = (
            source[f"{norm}.{name}"] for name in ("weight", "bias", "running_mean", "running_var")
        )
        scale = gain * torch.rsqrt(variance + BATCH_NORM_EPS)
        return source[f"{conv}.weight"], scale, shift - average * scale

    def convolution(
        weight: Tensor, scale: Tensor, bias: Tensor, *, stride: int = 1, padding: int | None = None, relu: bool = True
    ) -> Convolution:
        return Convolution(weight, scale, bias, dtype, stride=stride, padding=padding, relu=relu, precision=precision)

    def bottleneck(prefix: str, stride: int) -> Bottleneck:
        shortcut = None
        if f"{prefix}.downsample.0.weight" in source:
            shortcut = convolution(*folded(f"{prefix}.downsample.0", f"{prefix}.downsample.1"), relu=False)
        conv1, conv2, conv3 = (convolution(*folded(f"{prefix}.conv{i}", f"{prefix}.bn{i}")) for i in (1, 2, 3))
        return Bottleneck(conv1, conv2, conv3, shortcut, stride)

    weight, scale, bias = folded("conv1", "bn1")
    mu, sigma = (torch.tensor(x, dtype=torch.float64, device=weight.device)[:, None, None] for x in (mean, std))
    raw = (weight * scale[:, None, None, None] / (255 * sigma)).to(dtype).double()  # normalise(u) = (u − 255 μ) / 255 σ
    raw_bias = bias + (raw * (_PIXEL_OFFSET - 255 * mu)).sum(dim=(1, 2, 3))
    return Weights(
        config=config,
        dtype=dtype,
        stem=(
            convolution(weight, scale, bias, stride=2),
            convolution(*folded("conv2", "bn2")),
            convolution(*folded("conv3", "bn3")),
        ),
        stem_uint8=convolution(raw, torch.ones_like(scale), raw_bias, stride=2, padding=0),
        black=(255 * mu - _PIXEL_OFFSET).to(dtype),
        bottlenecks=tuple(
            bottleneck(f"layer{stage + 1}.{i}", stride=2 if stage > 0 and i == 0 else 1)
            for stage, blocks in enumerate(config.layers)
            for i in range(blocks)
        ),
        pool=_prepare_pool(source, config, dtype, precision),
    )


def _prepare_pool(source: dict[str, Tensor], config: ResNetConfig, dtype: torch.dtype, precision: Precision) -> Pool:
    wide = torch.promote_types(dtype, torch.float32)
    heads, features = config.heads, config.features
    kernels = by_kernels(source["attnpool.q_proj.weight"].to(dtype))

    def weight(name: str) -> Tensor:
        matrix = source[f"attnpool.{name}.weight"]
        return ops.operand(matrix, dtype, precision) if kernels else matrix.to(wide)

    def product(name: str) -> Callable[[Tensor], Tensor]:
        matrix, bias = weight(name), source[f"attnpool.{name}.bias"].to(wide)
        if kernels:
            return lambda x: ops.linear(x, matrix, bias, precision=precision)[0]
        return Product(matrix, bias)

    def per_head(name: str) -> Tensor:
        return weight(name).view(heads, features // heads, features)

    return Pool(
        position=source["attnpool.positional_embedding"].to(wide),
        query=product("q_proj"),
        key_weight=per_head("k_proj"),  # a bias of the keys drops out of the softmax
        value_weight=per_head("v_proj"),
        value_bias=source["attnpool.v_proj.bias"].to(wide),
        out=product("c_proj"),
        precision=precision,
    )


# --- the encoder -----------------------------------------------------------------------------------------------------


def encode(weights: Weights, images: Tensor) -> Tensor:
    """Embeds images (B, 3, h, w), normalised floats or raw uint8 pixels: (B, E), not normalised."""
    x = _stem(weights, images)
    for block in weights.bottlenecks:
        x = _bottleneck(block, x)
    return _pool(weights.pool, x)


def activations(config: ResNetConfig) -> int:
    """Elements of an image that are in memory at once, at most: in the first bottleneck two maps of 4 · width channels
    at a quarter of the image's size, and less before it; doubled for what cuDNN works with."""
    return 4 * config.width * (config.image_size // 2) ** 2


def most_images(config: ResNetConfig) -> int:
    """In one call: cuDNN and PyTorch's pools count a map's elements in 32 bits, and the stem's last is the largest."""
    return (2**31 - 1) // (config.width * (config.image_size // 2) ** 2)


def _stem(weights: Weights, images: Tensor) -> Tensor:
    first, *rest = weights.stem
    if images.dtype == torch.uint8:
        x = weights.stem_uint8(_padded(weights, images))
    else:
        x = first(images.to(weights.dtype, memory_format=torch.channels_last))
    for convolution in rest:
        x = convolution(x)
    return F.avg_pool2d(x, 2)


def _padded(weights: Weights, images: Tensor) -> Tensor:
    """Raw pixels less the offset, with one pixel all around that normalises to zero: (B, 3, h + 2, w + 2)."""
    b, c, h, w = images.shape
    x = torch.empty(b, c, h + 2, w + 2, dtype=weights.dtype, device=images.device, memory_format=torch.channels_last)
    x.copy_(weights.black)
    x[:, :, 1:-1, 1:-1].copy_(images).sub_(_PIXEL_OFFSET)
    return x


def _bottleneck(block: Bottleneck, x: Tensor) -> Tensor:
    y = block.conv2(block.conv1(x))
    if block.stride > 1:
        x, y = F.avg_pool2d(x, block.stride), F.avg_pool2d(y, block.stride)
    return block.conv3(y, residual=x if block.shortcut is None else block.shortcut(x))


def _pool(pool: Pool, x: Tensor) -> Tensor:
    """Attention over the last map with the mean token as its only query: (B, C, h, w) -> (B, E)."""
    features = x.flatten(2).transpose(1, 2)  # (B, G, C), a view of a channels-last map
    heads = pool.key_weight.shape[:2]
    weights = (pool.key_weight, pool.value_weight, pool.value_bias)
    if by_kernels(pool.key_weight):
        mean = ops.mean_token(features, pool.position[0])
        query = pool.query(mean).view(-1, *heads)
        pooled = ops.attention_pool(
            query, mean, features, *weights, heads[1] ** -0.5, position=pool.position[1:], precision=pool.precision
        )
    else:
        features = features.to(pool.position.dtype)
        tokens = torch.cat([features.mean(dim=1, keepdim=True), features], dim=1).add_(pool.position)
        pooled = one_query_attention(pool.query(tokens[:, 0]).view(-1, *heads), tokens, *weights)
    return pool.out(pooled).to(x.dtype)
