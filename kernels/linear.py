"""The GEMM of the transformer: LayerNorm folded in, bias, activation, residual and row statistics in its epilogue.

    y = activation(scale · rstd · (x weightᵀ − mean · colsum) + bias + residual)      x (M, K), weight (N, K), y (M, N)

with each part compiled in only where it is asked for. LN(x) Wᵀ is taken apart so that the product reads the raw x: mean
and rstd are two numbers a row, merged from the statistics that the writer of x left per tile of columns, and colsum is
the weight summed over K. What this kernel writes it leaves the statistics of, for the next LayerNorm. No pass over
memory is then left between two products of a transformer block.

As many persistent programs as the multiprocessors hold at a time walk over the tiles of y. Those that run side by side
share rows of x and all of the weight in the L2 cache:

            N ->                    order of the tiles in one group of GROUP_M rows of tiles:
      M   0  4   8  12              down the group first, then along N. M · K + M · N elements move through memory once,
      |   1  5   9  13              2 · M · N · K operations are done; for ViT-L/14 at batch 256 that is 410 to 820
      v   2  6  10  14              operations a byte, so the tensor cores decide.
          3  7  11  15

Each element of y is the sum of its products in steps of BLOCK_K from k = 0, in one accumulator of float32. M decides
between the launches of the table's entry (`targets.fitting`), which have the same BLOCK_K, and in which every sum over
the columns of a row is taken in the same order: a row's bits depend on the row, the weight and the table alone.

On devices with a tensor copy engine (Hopper and later) tiles travel by tensor descriptors, and the loads of the next
tile of y overlap the epilogue of the last. Elsewhere, and for exact float32, they travel by pointers.
"""

# pyright: reportArgumentType=false, reportCallIssue=false
# (at a launch, plain values become constexprs and the options of the launch join the arguments)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .direct import launch_kernel
from .launches import TABLE
from .primitives import (
    activate,
    add_product,
    by_name,
    dependent_launch,
    load_row_statistics,
    store_row_statistics,
    wait_for_the_last,
)
from .sizes import cdiv, next_power_of_2
from .statistics import STATISTICS_TILE, empty_statistics, statistics_tiles
from .targets import Launch, Target, fitting, multiprocessors, target_of

_GROUP_M = 8  # rows of tiles that share the weight while it is in the cache
_ALIGNMENT = 16  # bytes; the copy engine wants addresses and strides in multiples of it


@triton.jit(do_not_specialize=["M", "x_statistics_pairs"])  # one compiled kernel for every batch: one row, one result
def _linear_kernel(
    x,  # (M, K), rows x_stride apart: pointer, or descriptor with blocks of (BLOCK_M, BLOCK_K)
    weight,  # (N, K), contiguous: pointer, or descriptor with blocks of (BLOCK_N, BLOCK_K)
    y,  # (M, N), contiguous: pointer, or descriptor with blocks of (BLOCK_M, BLOCK_N / PARTS)
    residual,  # (M, N), rows residual_stride apart: pointer, or descriptor with blocks as y's
    bias_ptr,  # (N,)
    colsum_ptr,  # (N,), float32
    scale_ptr,  # (N,)
    x_statistics_ptr,  # (M, ⌈K / TILE⌉, 2), float32, rows x_statistics_pairs pairs apart
    y_statistics_ptr,  # (M, ⌈N / TILE⌉, 2), float32, contiguous
    M,
    N,
    K,
    x_stride,
    x_statistics_pairs,
    residual_stride,
    eps,
    NORM: tl.constexpr,
    SCALE: tl.constexpr,
    BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    RESIDUAL: tl.constexpr,
    STATISTICS: tl.constexpr,
    WHOLE_TILES: tl.constexpr,  # TILE divides N
    DESCRIPTORS: tl.constexpr,
    BY_NAME: tl.constexpr,  # NVIDIA's special functions can be asked for
    DEPENDENT: tl.constexpr,
    PRECISION: tl.constexpr,  # of products of float32 operands: "ieee" or "tf32"
    X_TILES: tl.constexpr,  # tiles of statistics in a row of x, rounded up to a power of two
    EVEN_K: tl.constexpr,  # BLOCK_K divides K
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PARTS: tl.constexpr,  # of a tile's columns that the epilogue takes one after another: 1 or 2
):
    wait_for_the_last(DEPENDENT)
    tl.assume(K > 0)  # or the compiler keeps a second epilogue, for a product without steps
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)

    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=DESCRIPTORS):  # pyright: ignore
        group, within = tile // (GROUP_M * tiles_n), tile % (GROUP_M * tiles_n)
        group_m = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
        m0 = (group * GROUP_M + within % group_m) * BLOCK_M
        n0 = (within // group_m) * BLOCK_N

        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        if DESCRIPTORS:
            for k0 in range(0, K, BLOCK_K):
                a = x.load([m0, k0])
                b = weight.load([n0, k0])
                acc = add_product(a, b.T, acc, PRECISION)
        else:
            # Rows past the end are read from the last one: they are computed and never stored.
            rows = tl.minimum(m0 + tl.arange(0, BLOCK_M), M - 1).to(tl.int64)
            columns = tl.minimum(n0 + tl.arange(0, BLOCK_N), N - 1).to(tl.int64)
            offs_k = tl.arange(0, BLOCK_K)
            a_ptrs = x + rows[:, None] * x_stride + offs_k[None, :]
            b_ptrs = weight + columns[None, :] * K + offs_k[:, None]
            for k0 in range(0, K, BLOCK_K):
                if EVEN_K:
                    a = tl.load(a_ptrs + k0)
                    b = tl.load(b_ptrs + k0)
                else:
                    a = tl.load(a_ptrs + k0, mask=offs_k[None, :] < K - k0, other=0.0)
                    b = tl.load(b_ptrs + k0, mask=offs_k[:, None] < K - k0, other=0.0)
                acc = add_product(a, b, acc, PRECISION)

        mean = tl.zeros((BLOCK_M,), dtype=tl.float32)
        rstd = tl.zeros((BLOCK_M,), dtype=tl.float32)
        if NORM:
            rows = m0 + tl.arange(0, BLOCK_M)
            mean, rstd = load_row_statistics(x_statistics_ptr, rows, x_statistics_pairs, rows < M, K, eps, X_TILES)

        # Parts take less memory at a time than the tile. A whole one keeps the layout that matrix instructions give it.
        if PARTS == 1:  # noqa: SIM108
            parts = (acc,)
        else:
            parts = tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)).split()
        for part in tl.static_range(PARTS):  # pyright: ignore
            _epilogue(
                parts[part], m0, n0 + part * (BLOCK_N // PARTS), mean, rstd,
                y, residual, bias_ptr, colsum_ptr, scale_ptr, y_statistics_ptr, M, N, residual_stride,
                NORM, SCALE, BIAS, ACTIVATION, RESIDUAL, STATISTICS, WHOLE_TILES, DESCRIPTORS, BY_NAME,
                BLOCK_M, BLOCK_N // PARTS,
            )  # fmt: skip


@triton.jit
def _epilogue(
    acc,  # (BLOCK_M, BLOCK_N), float32: columns n0 to n0 + BLOCK_N of the product
    m0,
    n0,
    mean,  # (BLOCK_M,)
    rstd,  # (BLOCK_M,)
    y,
    residual,
    bias_ptr,
    colsum_ptr,
    scale_ptr,
    y_statistics_ptr,
    M,
    N,
    residual_stride,
    NORM: tl.constexpr,
    SCALE: tl.constexpr,
    BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    RESIDUAL: tl.constexpr,
    STATISTICS: tl.constexpr,
    WHOLE_TILES: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    BY_NAME: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    rows = m0 + tl.arange(0, BLOCK_M)
    columns = n0 + tl.arange(0, BLOCK_N)
    inside_n = columns < N
    inside = (rows < M)[:, None] & inside_n[None, :]

    if NORM:
        colsum = tl.load(colsum_ptr + columns, mask=inside_n, other=0.0).to(tl.float32)
        acc = rstd[:, None] * (acc - mean[:, None] * colsum[None, :])
    if SCALE:
        acc *= tl.load(scale_ptr + columns, mask=inside_n, other=0.0).to(tl.float32)[None, :]
    if BIAS:
        acc += tl.load(bias_ptr + columns, mask=inside_n, other=0.0).to(tl.float32)[None, :]
    if RESIDUAL:
        if DESCRIPTORS:
            acc += residual.load([m0, n0]).to(tl.float32)
        else:
            address = residual + rows[:, None].to(tl.int64) * residual_stride + columns[None, :]
            acc += tl.load(address, mask=inside, other=0.0).to(tl.float32)

    dtype: tl.constexpr = y.dtype if DESCRIPTORS else y.dtype.element_ty
    out = activate(acc, ACTIVATION, dtype, BY_NAME).to(dtype)
    if DESCRIPTORS:
        y.store([m0, n0], out)
    else:
        tl.store(y + rows[:, None].to(tl.int64) * N + columns[None, :], out, mask=inside)

    if STATISTICS:
        store_row_statistics(y_statistics_ptr, out, rows, rows < M, n0, N, WHOLE_TILES)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    row_statistics: Tensor | None,
    colsum: Tensor | None,
    scale: Tensor | None,
    activation: str,
    eps: float,
    statistics: bool,
    precision: str,
) -> tuple[Tensor, Tensor]:
    n, k = weight.shape
    x_rows, weight = _rows(x), weight.contiguous()
    residual_rows = None if residual is None else _rows(residual)
    pairs = None if row_statistics is None else _pairs(row_statistics)
    m = len(x_rows)
    y = x.new_empty((*x.shape[:-1], n))
    y_statistics = empty_statistics(y, statistics)
    if y.numel() == 0:
        return y, y_statistics

    target = target_of(x.device)
    launches = TABLE.launches_for("linear", x.dtype, target, precision)
    launch = fitting(launches, m, n, multiprocessors(x.device))
    block_m, block_n, block_k = launch.block_m, launch.block_n, launch.block_k
    parts = _parts(launch, target, residual)
    part = (block_m, block_n // parts)
    operands = [(x_rows, (block_m, block_k)), (weight, (block_n, block_k)), (y.view(m, n), part)]
    if residual_rows is not None:
        operands.append((residual_rows, part))
    exact_float = x.dtype == torch.float32 and precision == "ieee"  # no tensor cores: nothing to feed so fast
    descriptors = target.descriptors and not exact_float and all(_served_by_copy_engine(t) for t, _ in operands)
    x_arg, weight_arg, y_arg, *residual_arg = (_descriptor(*o) for o in operands) if descriptors else (
        tensor for tensor, _ in operands
    )  # fmt: skip
    launch_kernel(
        _linear_kernel,
        x.device,
        _grid(launch, m, n, x.device),
        x_arg,
        weight_arg,
        y_arg,
        residual_arg[0] if residual_arg else None,
        bias,
        colsum,
        scale,
        pairs,
        y_statistics,
        m,
        n,
        k,
        x_rows.stride(0),
        0 if pairs is None else pairs.stride(0) // 2,
        0 if residual_rows is None else residual_rows.stride(0),
        eps,
        NORM=pairs is not None,
        SCALE=scale is not None,
        BIAS=bias is not None,
        ACTIVATION=activation,
        RESIDUAL=residual is not None,
        STATISTICS=statistics,
        WHOLE_TILES=n % STATISTICS_TILE == 0,
        DESCRIPTORS=descriptors,
        BY_NAME=by_name(target),
        PRECISION=precision,
        X_TILES=1 if pairs is None else next_power_of_2(statistics_tiles(k)),
        EVEN_K=k % block_k == 0,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        GROUP_M=_GROUP_M,
        PARTS=parts,
        **launch.options,
        **dependent_launch(x.device),
    )
    return y, y_statistics


def _parts(launch: Launch, target: Target, residual: Tensor | None) -> int:
    """How many parts the epilogue takes a tile in; each holds whole tiles of statistics.

    A residual's tile is in shared memory beside the result's. So is, on a datacenter Blackwell, what comes from the
    memory that its tensor cores sum in.
    """
    crowded = residual is not None or (target.descriptors and not target.wgmma)
    return 2 if crowded and launch.block_n >= 2 * STATISTICS_TILE else 1


def _grid(launch: Launch, m: int, n: int, device: torch.device) -> tuple[int]:
    tiles = cdiv(m, launch.block_m) * cdiv(n, launch.block_n)
    return (min(tiles, multiprocessors(device) * launch.blocks),)


def _rows(x: Tensor) -> Tensor:
    """(…, K) as (M, K) with a contiguous last dimension: a view wherever there is one."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def _pairs(row_statistics: Tensor) -> Tensor:
    """(…, T, 2) as (M, 2 · T), rows a whole number of pairs apart: a view wherever there is one."""
    rows = row_statistics.reshape(-1, 2 * row_statistics.shape[-2])
    return rows if rows.stride(1) == 1 and rows.stride(0) % 2 == 0 else rows.contiguous()


def _served_by_copy_engine(rows: Tensor) -> bool:
    return rows.data_ptr() % _ALIGNMENT == 0 and rows.stride(0) * rows.element_size() % _ALIGNMENT == 0


class _Descriptor(TensorDescriptor):
    """Not checked again: the launch table has the block, and `_served_by_copy_engine` has seen the rows."""

    def __post_init__(self) -> None:
        pass


def _descriptor(rows: Tensor, block: tuple[int, int]) -> TensorDescriptor:
    return _Descriptor(rows, rows.shape, rows.stride(), block)
