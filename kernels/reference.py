"""The oracles: every op of `ops.py` in the fewest plain PyTorch lines that are obviously right.

Same names as in `ops.py`, arguments in the order of the registered schemas, any floating dtype (float64 is what the
tests judge by), no Triton. Products are left to PyTorch; what a kernel keeps in registers in float32 (statistics,
epilogues, softmax) is computed in float32 or wider here, and rounded to the dtype of the inputs at the end. `precision`
asks for TF32 on a GPU; an oracle takes no notice of it.

Shapes: B images, N tokens, G = N − 1 of them patches, W width, H heads, D head_dim; M rows, K and N of a GEMM.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# Row statistics are kept per tile of this many columns, so that they do not depend on how a kernel is launched.
STATISTICS_TILE = 64


def patch_embed(images: Tensor, weight: Tensor, position: Tensor, patch_size: int, precision: str = "ieee") -> Tensor:
    batch, width, features = len(images), len(weight), 3 * patch_size**2
    pixels = images.to(weight.dtype) - 128 if images.dtype == torch.uint8 else images.to(weight.dtype)
    kernel = weight[:, :features].reshape(width, 3, patch_size, patch_size)
    patches = F.conv2d(pixels, kernel, stride=patch_size).flatten(2).transpose(1, 2)  # (B, G, W)
    tokens = torch.cat([patches.new_zeros(batch, 1, width), patches], dim=1)
    return (_wide(tokens) + position).to(weight.dtype)


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, statistics: bool = False
) -> tuple[Tensor, Tensor]:
    wide = _wide(x)
    y = F.layer_norm(wide, x.shape[-1:], weight.to(wide.dtype), bias.to(wide.dtype), eps).to(x.dtype)
    return y, row_statistics(y) if statistics else _no_statistics(x)


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "gelu": F.gelu,
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
    return y, row_statistics(y) if statistics else _no_statistics(x)


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
    key_weight: Tensor,
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
    k = torch.einsum("bnw,hdw->bhnd", tokens, key_weight)
    v = torch.einsum("bnw,hdw->bhnd", tokens, value_weight)
    v = (_wide(v) + value_bias.view(*query.shape[1:])[:, None]).to(v.dtype)
    scores = _wide(torch.einsum("bhd,bhnd->bhn", query, k)) * scale
    return torch.einsum("bhn,bhnd->bhd", scores.softmax(dim=-1).to(v.dtype), v).flatten(1)


def row_statistics(x: Tensor) -> Tensor:
    """(…, W) -> (…, T, 2), float32 or wider: each tile's mean and sum of squared deviations from it."""
    tiles = _wide(x).split(STATISTICS_TILE, dim=-1)
    means = torch.stack([t.mean(dim=-1) for t in tiles], dim=-1)
    m2s = torch.stack([(t - t.mean(dim=-1, keepdim=True)).square().sum(dim=-1) for t in tiles], dim=-1)
    return torch.stack([means, m2s], dim=-1)


def merge_statistics(statistics: Tensor, width: int, eps: float) -> tuple[Tensor, Tensor]:
    """(…, T, 2) -> mean and 1 / √(variance + eps) of rows of `width` elements, each (…).

    Chan, Golub & LeVeque 1979, eq. 2.1, for any number of parts: the squared deviations of the parts from their own
    means, and of those means from the common one. Nothing large is subtracted from anything large.
    """
    means, m2s = statistics.unbind(-1)  # (…, T)
    counts = torch.full_like(means, STATISTICS_TILE)
    counts[..., -1] = width - STATISTICS_TILE * (means.shape[-1] - 1)
    mean = (counts * means).sum(dim=-1) / width
    m2 = (m2s + counts * (means - mean[..., None]).square()).sum(dim=-1)
    return mean, torch.rsqrt(m2 / width + eps)


def _wide(x: Tensor) -> Tensor:
    """`x` in the precision that a kernel computes in between its products: float32, or what is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _no_statistics(x: Tensor) -> Tensor:
    return x.new_empty(0, dtype=_wide(x[:0]).dtype)
