"""The oracles: every op of `ops.py` in the fewest plain PyTorch lines that are obviously right.

The names are those of `ops.py`, the arguments stand in the order of the registered schemas, and any floating dtype
works; the tests judge by float64. Triton is never imported. PyTorch computes the products. A kernel keeps statistics,
epilogues and softmax in registers in float32; they are computed in float32 or wider here, and rounded to the dtype of
the inputs at the end. An oracle ignores `precision`, which asks for TF32 on a GPU.

Shapes: B images, N tokens, G = N − 1 of them patches, W width, H heads, D head_dim; M rows, K and N of a GEMM.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .resampling import FRACTION_BITS
from .statistics import empty_statistics, merge_statistics, row_statistics


def resize(pixels: Tensor, steps: Tensor, tables: Tensor, scratch: int, side: int) -> Tensor:
    squares = [pixels.new_empty((0, side, side, 3))]
    for first, second in steps.transpose(0, 1).tolist():
        between = _resampled(pixels, tables, first, side)
        squares.append(_resampled(between.flatten(), tables, [0, *second[1:]], side)[None])
    return torch.cat(squares).permute(0, 3, 1, 2).contiguous()


def _resampled(pixels: Tensor, tables: Tensor, step: list[int], side: int) -> Tensor:
    """One pass of one image, (rows, columns, 3); the fields of a step are those of `resampling.plan`."""
    offset, row_stride, rows, columns, length, place, taps, along_x, _ = step
    first, *weights = tables[place : place + (1 + taps) * side].view(1 + taps, side)
    shape = (rows, length, 3) if along_x else (length, columns, 3)
    image = pixels.as_strided(shape, (3 * row_stride, 3, 1), pixels.storage_offset() + offset)
    total = torch.full((rows, columns, 3), 1 << (FRACTION_BITS - 1), dtype=torch.int32, device=pixels.device)
    for tap, weight in enumerate(weights):
        neighbours = image.index_select(1 if along_x else 0, first + tap)
        total += neighbours * (weight[None, :, None] if along_x else weight[:, None, None])
    return (total >> FRACTION_BITS).clamp(0, 255).to(torch.uint8)


def patch_embed(
    images: Tensor,
    weight: Tensor,
    position: Tensor,
    patch_size: int,
    class_token: bool = True,
    statistics: bool = False,
    precision: str = "ieee",
) -> tuple[Tensor, Tensor]:
    batch, width, features = len(images), len(weight), 3 * patch_size**2
    pixels = images.to(weight.dtype) - 128 if images.dtype == torch.uint8 else images.to(weight.dtype)
    kernel = weight[:, :features].reshape(width, 3, patch_size, patch_size)
    patches = F.conv2d(pixels, kernel, stride=patch_size).flatten(2).transpose(1, 2)  # (B, G, W)
    tokens = torch.cat([patches.new_zeros(batch, int(class_token), width), patches], dim=1)
    tokens = (_wide(tokens) + position).to(weight.dtype)
    return tokens, row_statistics(tokens) if statistics else empty_statistics(tokens, False)


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, statistics: bool = False
) -> tuple[Tensor, Tensor]:
    wide = _wide(x)
    y = F.layer_norm(wide, x.shape[-1:], weight.to(wide.dtype), bias.to(wide.dtype), eps).to(x.dtype)
    return y, row_statistics(y) if statistics else empty_statistics(x, False)


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    row_stats: Tensor | None = None,
    colsum: Tensor | None = None,
    scale: Tensor | None = None,
    activation: str = "none",
    eps: float = 1e-5,
    statistics: bool = False,
    precision: str = "ieee",
) -> tuple[Tensor, Tensor]:
    y = _wide(F.linear(x, weight))
    if row_stats is not None and colsum is not None:
        mean, rstd = merge_statistics(row_stats, x.shape[-1], eps)
        y = rstd[..., None] * (y - mean[..., None] * colsum)
    if scale is not None:
        y = y * scale
    if bias is not None:
        y = y + bias
    if residual is not None:
        y = y + residual
    y = _ACTIVATIONS[activation](y).to(x.dtype)
    return y, row_statistics(y) if statistics else empty_statistics(x, False)


def flash_attention(qkv: Tensor, scale: float, precision: str = "ieee") -> Tensor:
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, N, D)
    p = (_wide(q @ k.transpose(-2, -1)) * scale).softmax(dim=-1)
    return (p.to(qkv.dtype) @ v).transpose(1, 2).flatten(2)  # (B, N, H·D)


def mean_token(features: Tensor, position: Tensor) -> Tensor:
    return (_wide(features).mean(dim=1) + position).to(features.dtype)


def attention_pool(
    query: Tensor,
    first: Tensor,
    rest: Tensor,
    key_weight: Tensor | None,
    value_weight: Tensor,
    value_bias: Tensor,
    statistics: Tensor | None,
    position: Tensor | None,
    scale: float,
    eps: float = 1e-5,
    precision: str = "ieee",
) -> Tensor:
    tokens = _wide(rest) if position is None else _wide(rest) + position
    tokens = torch.cat([_wide(first)[:, None], tokens], dim=1)  # (B, N, W)
    if statistics is not None:
        mean, rstd = merge_statistics(statistics, tokens.shape[-1], eps)
        tokens = (tokens - mean[..., None]) * rstd[..., None]
    tokens = tokens.to(first.dtype)
    v = torch.einsum("bnw,hdw->bhnd", tokens, value_weight)
    v = (_wide(v) + value_bias.view(*value_weight.shape[:2])[:, None]).to(v.dtype)
    if key_weight is None:
        scores = torch.einsum("hw,bnw->bhn", query, tokens)
    else:
        scores = torch.einsum("bhd,bhnd->bhn", query, torch.einsum("bnw,hdw->bhnd", tokens, key_weight))
    scores = _wide(scores) * scale
    return torch.einsum("bhn,bhnd->bhd", scores.softmax(dim=-1).to(v.dtype), v).flatten(1)


def _wide(x: Tensor) -> Tensor:
    """`x` in the precision that a kernel computes in between its products: float32, or what is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
