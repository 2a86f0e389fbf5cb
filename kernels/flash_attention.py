"""Flash self-attention over packed queries, keys and values.

    out = softmax(scale · q kᵀ) v        for every image and head; q, k, v (N, D), read from qkv (B, N, 3, H, D)

One program computes a tile of BLOCK_M queries of one head of one image and walks over its keys, keeping for each query
the running maximum m of its scores, the running sum l of their exponentials, and acc, the sum of the values weighted by
them (Dao et al. 2022, algorithm 1; Milakov & Gimelshein 2018, algorithm 3). The N × N matrix is never in memory, and
queries, keys and values are read where the GEMM left them: a row of qkv holds all heads, so a head's rows are 3 · H · D
elements apart. The output is (B, N, H · D), as the next GEMM reads it.

A sequence of a ViT is one class token and G patches, and G is often a whole number of tiles where N = G + 1 is not. The
keys that are left over come first, in a tile that is as narrow as they are few, so that all others are whole. In
float32 the class token comes first, and the last tile is ragged where G is no whole number of them.

    token     0 | 1 ........ 64 | 65 ...... 128 | ... | 193 ..... 256         N = 257
              ^   whole tiles of keys, no mask
              16 keys wide, of which one counts

Heads are padded to a power of two. Those of 65 to 96 columns are two parts on NVIDIA's GPUs, of 64 columns and of 16 or
32, each with products of its own: padded they would have 128.

Exponentials are powers of two. A row's maximum is multiplied by scale · log2 e; the scores themselves are, too, in the
multiply-add that takes the maximum off. Per image and head 4 · N² · D operations are done, 3 · N · D elements read and
N · D written: N / 2 operations a byte in half precision, 128 for ViT-L/14. Attention is 1 to 9 per cent of an encoder's
operations.
"""

# pyright: reportArgumentType=false, reportCallIssue=false
# (at a launch, plain values become constexprs and the options of the launch join the arguments)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .direct import launch_kernel
from .launches import TABLE
from .primitives import LOG2_E, add_product, by_name, dependent_launch, online_softmax_update, wait_for_the_last
from .sizes import cdiv, next_power_of_2
from .targets import REGISTERS, Launch, Target, target_of

_MIN_KEYS = _MIN_COLUMNS = 16  # what a tensor core takes at least
_LOAD = 16  # bytes, the most that a thread loads at a time
_HEAD_DIM = 64  # of most models: the first part of a larger head, and the largest whose queries wait in registers


@triton.jit
def _flash_attention_kernel(
    qkv_ptr,  # (B, N, 3, H, D), contiguous
    out_ptr,  # (B, N, H · D), contiguous
    N,
    H,
    scale,
    D: tl.constexpr,
    DEPENDENT: tl.constexpr,
    PRECISION: tl.constexpr,  # of products of float32 operands: "ieee" or "tf32"
    TILES: tl.constexpr,  # whether there are whole tiles of keys
    REST: tl.constexpr,  # the width of a tile for the keys that are left over; 0 where none are
    MASKED: tl.constexpr,  # the last tile of the loop is not whole
    HELD: tl.constexpr,  # the queries wait in registers; Hopper's products else read them from shared memory
    BLOCK_D: tl.constexpr,  # a head's first columns, or all of them rounded up to a power of two
    TAIL: tl.constexpr,  # the columns behind these, rounded up likewise; 0 where there are none
    BLOCK_M: tl.constexpr,  # queries
    BLOCK_N: tl.constexpr,  # keys
):
    wait_for_the_last(DEPENDENT)
    # Tiles of one head's queries are neighbours: they read the same keys and values, at about the same time.
    tiles = tl.cdiv(N, BLOCK_M)
    pid = tl.program_id(0)
    head, image = pid // tiles % H, (pid // tiles // H).to(tl.int64)
    row_stride = 3 * H * D
    q_ptr = qkv_ptr + image * N * row_stride + head * D
    k_ptr, v_ptr = q_ptr + H * D, q_ptr + 2 * H * D

    # Queries past the end are read from the last one: they are computed and never stored.
    offs_m = pid % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = tl.minimum(offs_m, N - 1)
    q_rows = q_ptr + rows[:, None] * row_stride
    q = _load_columns(q_rows, 0, D, BLOCK_D)
    q_tail = _load_columns(q_rows, BLOCK_D, D, TAIL) if TAIL > 0 else q

    if HELD:  # what is loaded is multiplied from shared memory, what is computed from registers
        q = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [q], dtype=q.dtype, is_pure=True, pack=2)

    # --- keys that are left over whole tiles, then these
    scale = scale * LOG2_E
    m = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    l = tl.zeros((BLOCK_M,), dtype=tl.float32)  # noqa: E741 (the name that the papers use)
    acc = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    acc_tail = tl.zeros((BLOCK_M, TAIL), dtype=tl.float32) if TAIL > 0 else acc
    start = N % BLOCK_N
    if q.dtype == tl.float32:
        # Two products of the queries take more registers than there are. The class token needs none: m is its score,
        # summed by halves and so more exactly than a product is, l = 1, acc its value.
        v_0 = _load_columns(v_ptr, 0, D, BLOCK_D)
        m = tl.sum(q * _load_columns(k_ptr, 0, D, BLOCK_D), axis=1)
        acc = tl.broadcast_to(v_0, (BLOCK_M, BLOCK_D))
        if TAIL > 0:
            v_0 = _load_columns(v_ptr, BLOCK_D, D, TAIL)
            m += tl.sum(q_tail * _load_columns(k_ptr, BLOCK_D, D, TAIL), axis=1)
            acc_tail = tl.broadcast_to(v_0, (BLOCK_M, TAIL))
        m *= scale
        l = tl.full((BLOCK_M,), 1.0, dtype=tl.float32)  # noqa: E741
        start = 1
    elif REST > 0:
        acc, acc_tail, m, l = _attend(  # noqa: E741
            q, q_tail, k_ptr, v_ptr, 0, start, row_stride, scale, acc, acc_tail, m, l,
            True, True, PRECISION, D, BLOCK_D, TAIL, REST,
        )  # fmt: skip
    if TILES:
        for n0 in range(start, N, BLOCK_N):
            acc, acc_tail, m, l = _attend(  # noqa: E741
                q, q_tail, k_ptr, v_ptr, n0, N, row_stride, scale, acc, acc_tail, m, l,
                False, MASKED, PRECISION, D, BLOCK_D, TAIL, BLOCK_N,
            )  # fmt: skip

    # --- store
    out_rows = out_ptr + (image * N + offs_m[:, None]) * (H * D) + head * D
    inside = (offs_m < N)[:, None]
    _store_columns(out_rows, acc * (1.0 / l)[:, None], inside, 0, D, BLOCK_D)
    if TAIL > 0:
        _store_columns(out_rows, acc_tail * (1.0 / l)[:, None], inside, BLOCK_D, D, TAIL)


@triton.jit
def _load_columns(rows, first, D: tl.constexpr, WIDTH: tl.constexpr):
    """Columns `first` to `first` + WIDTH of a head's rows, pointers (M, 1) or one; zero from column D on."""
    # The compiler sees that all are inside where D is `first` + WIDTH or more, and leaves the masks out.
    columns = first + tl.arange(0, WIDTH)[None, :]
    return tl.load(rows + columns, mask=columns < D, other=0.0)


@triton.jit
def _store_columns(rows, x, inside, first, D: tl.constexpr, WIDTH: tl.constexpr):
    """x (M, WIDTH) into the columns that `_load_columns` reads, of the rows that are `inside` (M, 1)."""
    columns = first + tl.arange(0, WIDTH)[None, :]
    tl.store(rows + columns, x.to(rows.dtype.element_ty), mask=inside & (columns < D))


@triton.jit
def _load_keys_and_values(
    k_ptr, v_ptr, n, inside_n, row_stride, first, MASKED: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """Columns `first` to `first` + WIDTH of keys and values n (K,): (WIDTH, K) and (K, WIDTH)."""
    columns = first + tl.arange(0, WIDTH)
    inside = columns < D
    k_ptrs = k_ptr + n[None, :] * row_stride + columns[:, None]
    v_ptrs = v_ptr + n[:, None] * row_stride + columns[None, :]
    if MASKED:
        k = tl.load(k_ptrs, mask=inside[:, None] & inside_n[None, :], other=0.0)
        v = tl.load(v_ptrs, mask=inside[None, :] & inside_n[:, None], other=0.0)
    else:
        k = tl.load(k_ptrs, mask=inside[:, None], other=0.0)
        v = tl.load(v_ptrs, mask=inside[None, :], other=0.0)
    return k, v


@triton.jit
def _attend(
    q, q_tail, k_ptr, v_ptr, n0, end, row_stride, scale, acc, acc_tail, m, l, FIRST: tl.constexpr,  # noqa: E741
    MASKED: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, TAIL: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """One step of the softmax: keys n0 to n0 + WIDTH. Where MASKED those from `end` on do not count."""
    n = n0 + tl.arange(0, WIDTH)
    inside_n = n < end
    k, v = _load_keys_and_values(k_ptr, v_ptr, n, inside_n, row_stride, 0, MASKED, D, BLOCK_D)
    score = tl.dot(q, k, input_precision=PRECISION)
    v_tail = v
    if TAIL > 0:
        k_tail, v_tail = _load_keys_and_values(k_ptr, v_ptr, n, inside_n, row_stride, BLOCK_D, MASKED, D, TAIL)
        score = add_product(q_tail, k_tail, score, PRECISION)
    if MASKED:
        score = tl.where(inside_n[None, :], score, float("-inf"))
    if q.dtype == tl.float32:  # the largest score less the maximum is then exactly zero; half precision cannot tell
        p, rescale, m, l = online_softmax_update(score * scale, 1.0, m, l)  # noqa: E741
    else:
        p, rescale, m, l = online_softmax_update(score, scale, m, l)  # noqa: E741
    p = p.to(v.dtype)
    # Before the first tile nothing was summed. The compiler must not take zeros times `rescale` for a sum: equal values
    # in an accumulator's registers are copied between wgmma's fence and wgmma, where nothing may write to them.
    acc = tl.zeros_like(acc) if FIRST else acc * rescale[:, None]
    acc = add_product(p, v, acc, PRECISION)
    if TAIL > 0:
        acc_tail = tl.zeros_like(acc_tail) if FIRST else acc_tail * rescale[:, None]
        acc_tail = add_product(p, v_tail, acc_tail, PRECISION)
    return acc, acc_tail, m, l


def flash_attention(qkv: Tensor, scale: float, precision: str) -> Tensor:
    batch, tokens, _, heads, head_dim = qkv.shape
    qkv = qkv.contiguous()
    out = qkv.new_empty((batch, tokens, heads * head_dim))
    if batch == 0:
        return out

    target = target_of(qkv.device)
    launch, block_d, tail = _parts(head_dim, qkv.dtype, target, precision)
    half = qkv.dtype.itemsize == 2
    rest = (tokens if half else tokens - 1) % launch.block_n
    held = half and _held(tokens, head_dim, rest, launch, target)
    launch_kernel(
        _flash_attention_kernel,
        qkv.device,
        (batch * heads * cdiv(tokens, launch.block_m),),
        qkv,
        out,
        tokens,
        heads,
        scale,
        D=head_dim,
        PRECISION=precision,
        TILES=tokens >= launch.block_n or not half,
        REST=max(_MIN_KEYS, next_power_of_2(rest)) if rest and half else 0,
        MASKED=rest > 0 and not half,
        HELD=held,
        BLOCK_D=block_d,
        TAIL=tail,
        BLOCK_M=launch.block_m,
        BLOCK_N=launch.block_n,
        **launch.options,
        **(_share_of_registers(launch) if held else {}),
        **dependent_launch(qkv.device),
    )
    return out


def _parts(head_dim: int, dtype: torch.dtype, target: Target, precision: str) -> tuple[Launch, int, int]:
    """The launch for a head of so many columns, and the kernel's BLOCK_D and TAIL.

    A tail is as wide as each thread of the launch needs it to load 16 bytes of its keys at a time. On AMD's GPUs
    there is none, since nothing tells whether it would pay.
    """
    padded = max(_MIN_COLUMNS, next_power_of_2(head_dim))
    (launch,) = TABLE.launches_for("flash_attention_64", dtype, target, precision)
    if padded <= _HEAD_DIM:
        return launch, padded, 0
    loaded = launch.num_warps * 32 * _LOAD // (launch.block_n * dtype.itemsize)
    tail = max(_MIN_COLUMNS, loaded, next_power_of_2(head_dim - _HEAD_DIM))
    if target.capability is not None and _HEAD_DIM + tail < padded:
        return launch, _HEAD_DIM, tail
    (launch,) = TABLE.launches_for("flash_attention_128", dtype, target, precision)
    return launch, padded, 0


def _held(tokens: int, head_dim: int, rest: int, launch: Launch, target: Target) -> bool:
    """Whether queries wait in registers, which takes a third off the loop's reads of shared memory.

    Larger heads leave too few registers. Without keys that are left over, ptxas has each product wait for the last.
    """
    looped = tokens > launch.block_n and rest > 0
    return looped and head_dim <= _HEAD_DIM and target.wgmma and by_name(target)


def _share_of_registers(launch: Launch) -> dict[str, int]:
    """The compiler's option that lets `launch.blocks` share a multiprocessor."""
    share = REGISTERS // (launch.blocks * launch.num_warps * 32) // 8 * 8
    return {"maxnreg": share} if launch.blocks > 1 else {}
