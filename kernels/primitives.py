"""Parts of the algorithms that several kernels share, as jit functions."""

from __future__ import annotations

import triton
import triton.language as tl

from .statistics import STATISTICS_TILE
from .targets import Target

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
_SQRT_HALF: tl.constexpr = tl.constexpr(0.7071067811865476)
_QUICK_GELU_SLOPE: tl.constexpr = tl.constexpr(1.702)
TILE: tl.constexpr = tl.constexpr(STATISTICS_TILE)

_RELEASE = tuple(int(number) for number in triton.__version__.split(".")[:2])


def stages_from_registers(num_stages: int, kind: str, target: Target) -> int:
    """Pipeline stages of a product whose left operand is computed: `num_stages`, or as many as are safe.

    On Hopper such an operand is multiplied from registers, which Triton before 3.9 lets be written over, in a pipeline,
    while the product still reads them (github.com/triton-lang/triton/issues/9433). One stage waits for every product.
    """
    return 1 if target.wgmma and kind != "float32" and _RELEASE < (3, 9) else num_stages


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """QuickGELU x · σ(1.702 x), GELU x · Φ(x) (Hendrycks & Gimpel 2016, section 2), ReLU, or x itself; in float32."""
    if ACTIVATION == "quick_gelu":
        # Far below zero exp2 overflows to infinity and the quotient is −0, the right limit.
        x = x / (1.0 + tl.exp2(x * -(_QUICK_GELU_SLOPE * LOG2_E)))
    elif ACTIVATION == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * _SQRT_HALF))
    elif ACTIVATION == "relu":
        x = tl.where(x < 0, 0.0, x)  # a NaN stays one
    return x


@triton.jit
def tile_statistics(x, count):
    """Mean and sum of squared deviations of each tile of columns.

    x (…, T, STATISTICS_TILE) float32, zero beyond a tile's `count` (T,) of columns -> two tensors (…, T).
    """
    columns = tl.arange(0, TILE)
    inside = columns[None, :] < count[:, None]
    divisor = tl.maximum(count, 1).to(tl.float32)  # a tile that is padding has no columns
    mean = tl.sum(x, axis=-1) / divisor
    deviation = tl.where(inside, x - tl.expand_dims(mean, -1), 0.0)
    return mean, tl.sum(deviation * deviation, axis=-1)


@triton.jit
def merge_statistics(mean, m2, count, width, eps):
    """Row mean and 1 / √(variance + eps) from the statistics of a row's tiles (Chan, Golub & LeVeque 1979, eq. 2.1).

    mean, m2 (M, T), zero where count (T,) is zero -> two tensors (M,).
    """
    count = count.to(tl.float32)[None, :]
    row_mean = tl.sum(count * mean, axis=1) / width
    between = mean - row_mean[:, None]
    row_m2 = tl.sum(m2 + count * between * between, axis=1)
    return row_mean, tl.rsqrt(row_m2 / width + eps)


@triton.jit
def tile_counts(T: tl.constexpr, width):
    """How many of each tile's columns are a row's own: (T,), STATISTICS_TILE but for the last, zero beyond `width`."""
    return tl.minimum(tl.maximum(width - tl.arange(0, T) * TILE, 0), TILE)


@triton.jit
def load_row_statistics(statistics_ptr, rows, row_pairs, inside, width, eps, T: tl.constexpr):
    """Mean and 1 / √(variance + eps) of some rows of `width` elements, from the statistics of their tiles.

    statistics_ptr (M, ⌈width / TILE⌉, 2) float32, a row contiguous and row_pairs pairs from the next; rows (S,), read
    where `inside` (S,); T the number of tiles, rounded up to a power of two -> two tensors (S,).
    """
    tile = tl.arange(0, T)
    tiles = tl.cdiv(width, TILE)
    # (S, T, 2): mean and squared deviations lie side by side
    offsets = (rows[:, None].to(tl.int64) * row_pairs + tile[None, :]) * 2
    address = statistics_ptr + offsets[:, :, None] + tl.arange(0, 2)[None, None, :]
    mask = (inside[:, None] & (tile < tiles)[None, :])[:, :, None]
    mean, m2 = tl.load(address, mask=mask, other=0.0).split()
    return merge_statistics(mean, m2, tile_counts(T, width), width, eps)


@triton.jit
def online_softmax_update(score, running_max, running_sum):
    """One step of a softmax whose scores come in tiles (Milakov & Gimelshein 2018, algorithm 3), in base 2.

    score (M, S), running_max and running_sum (M,) -> probabilities relative to the new maximum (M, S), the factor that
    brings what was summed before to it (M,), the new maximum and the new sum.
    """
    new_max = tl.maximum(running_max, tl.max(score, axis=1))
    p = tl.exp2(score - new_max[:, None])
    rescale = tl.exp2(running_max - new_max)
    return p, rescale, new_max, running_sum * rescale + tl.sum(p, axis=1)
