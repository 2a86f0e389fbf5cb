"""LayerNorm of rows, and the statistics of what it writes.

    y = (x − mean(x)) / √(var(x) + eps) · weight + bias        x, y (M, W); weight, bias (W,)        (Ba et al. 2016)

One program normalises one row, held in registers as T tiles of STATISTICS_TILE columns: the row is read once and
written once, 2 · W · itemsize bytes, and that is all the time it takes. Mean, its correction and variance are passes
over the registers, never a difference of squares. The statistics of y, per tile, let the next `linear` fold the
LayerNorm that follows into itself; they are those of y as rounded to its dtype, which is what the next reader sees.
"""

# pyright: reportArgumentType=false, reportCallIssue=false
# (at a launch, plain values become constexprs and the options of the launch join the arguments)

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .direct import launch_kernel
from .primitives import dependent_launch, rounded_product, tile_counts, tile_statistics, wait_for_the_last
from .sizes import cdiv, next_power_of_2
from .statistics import STATISTICS_TILE, empty_statistics, statistics_tiles

_COLUMNS_OF_A_WARP = 1024  # a row that one warp holds is summed without a barrier


@triton.jit
def _layer_norm_kernel(
    x_ptr,  # (M, W), rows x_stride apart
    weight_ptr,  # (W,)
    bias_ptr,  # (W,)
    y_ptr,  # (M, W), contiguous
    statistics_ptr,  # (M, ⌈W / TILE⌉, 2), contiguous
    width,
    x_stride,
    eps,
    T: tl.constexpr,  # tiles in a row, rounded up to a power of two
    WHOLE: tl.constexpr,  # a row is T whole tiles
    TILE: tl.constexpr,
    STATISTICS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    wait_for_the_last(DEPENDENT)
    if WHOLE:
        width = T * TILE  # the compiler then leaves the masks out
    row = tl.program_id(0).to(tl.int64)
    tile = tl.arange(0, T)
    column = tile[:, None] * TILE + tl.arange(0, TILE)[None, :]
    inside = column < width

    x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(tl.sum(x, axis=1), axis=0) / width
    deviation = tl.where(inside, x - mean, 0.0)
    # Far from zero the mean's own rounding outweighs all else. The deviations are small and know what it was.
    deviation = tl.where(inside, deviation - tl.sum(tl.sum(deviation, axis=1), axis=0) / width, 0.0)
    variance = tl.sum(tl.sum(rounded_product(deviation, deviation), axis=1), axis=0) / width
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
    y = (deviation * tl.rsqrt(variance + eps) * weight + bias).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + row * width + column, y, mask=inside)

    if STATISTICS:
        tile_mean, tile_m2 = tile_statistics(y.to(tl.float32), tile_counts(T, width), WHOLE, WGMMA=False)
        tiles = (width + TILE - 1) // TILE
        address = statistics_ptr + (row * tiles + tile) * 2
        tl.store(address, tile_mean, mask=tile < tiles)
        tl.store(address + 1, tile_m2, mask=tile < tiles)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, statistics: bool) -> tuple[Tensor, Tensor]:
    width = x.shape[-1]
    rows = x.reshape(-1, width)
    rows = rows if rows.stride(1) == 1 or width == 1 else rows.contiguous()
    y = x.new_empty(x.shape)
    y_statistics = empty_statistics(y, statistics)
    tiles = next_power_of_2(statistics_tiles(width))
    if len(rows) > 0:
        launch_kernel(
            _layer_norm_kernel,
            x.device,
            (len(rows),),
            rows,
            weight.contiguous(),
            bias.contiguous(),
            y,
            y_statistics,
            width,
            rows.stride(0),
            eps,
            T=tiles,
            WHOLE=width == tiles * STATISTICS_TILE,
            TILE=STATISTICS_TILE,
            STATISTICS=statistics,
            num_warps=cdiv(tiles * STATISTICS_TILE, _COLUMNS_OF_A_WARP),
            enable_fp_fusion=True,
            **dependent_launch(x.device),
        )
    return y, y_statistics
