"""Attention with one query per image: a ViT's last block, a ResNet's pool with its mean token, and SigLIP's head.

    out_h = Σ_n p_hn (W_v,h y_n) + b_v,h        p_h = softmax_n(scale · q_h · (W_k,h y_n))

(Radford et al. 2021, section 2.4), with y (N, W) the tokens of an image, q (H, D) its query, W_k and W_v (H, D, W).
A query that is alone lets the sums be taken in another order, so that the weights meet one vector per head instead of
every token:

    1. u_h   = W_k,hᵀ q_h                      (B, H, W)
    2. s_hn  = scale · u_h · y_n               (B, H, N)
    3. z_h   = Σ_n softmax_n(s_h)_n y_n        (B, H, W)
    4. out_h = W_v,h z_h + b_v,h               (B, H, D)

Four launches, of which 1 and 4 are one kernel. A learned query is the same for all images, and so is its u, which is
then given, and launch 1 is left out. A bias of the keys would add q_h · b_k,h to every s_hn of a head, which the
softmax does not see; that of the values is added once, since probabilities sum to one.

For an image that is 4 · H · D · W + 4 · H · N · W operations instead of the 4 · N · H · D · W + 4 · N · H · D of keys
and values: for H · D = W = 1024, H = 16 and N = 257, 21 million instead of 1.1 billion. Memory decides: the tokens are
read twice, 4 · N · W bytes in half precision, the weights once for a tile of images; u and z are a few rows an image.

z stays in float32: a token's rounding is averaged away, and that of their sum is not. Launch 4 takes it apart into two
numbers of the weights' dtype, whose products are exact in float32.

Where row statistics are given, tokens are normalised as they are read, (y − mean) · rstd in float32, and rounded to
their dtype before they are multiplied. Launch 2 leaves each token's mean and rstd for launch 3.

Token 0 has a tensor of its own: the class or the mean token, or merely the first patch. Launch 3 starts the online
softmax (Milakov & Gimelshein 2018, algorithm 3) from it, with maximum s_h0, sum 1 and accumulator y_0, so that the
patches behind a class token, often a multiple of the tile, are whole tiles:

            channels ->
     token  y_0 y_0 y_0                 start
       |    [tile ] ...                 one program per tile of channels (and of heads, past BLOCK_H) goes down
       v    [tile ] ...                 the tokens, rescaling what it has whenever the maximum grows

Every sum is taken by one program in an order that the shape of one image fixes, so that its bits do not depend on the
batch that it is in.
"""

# pyright: reportArgumentType=false, reportCallIssue=false
# (at a launch, plain values become constexprs and the options of the launch join the arguments)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .direct import launch_kernel
from .primitives import (
    LOG2_E,
    TILE,
    add_product,
    add_product_finely,
    dependent_launch,
    load_row_statistics,
    online_softmax_update,
    stages_from_registers,
    wait_for_the_last,
)
from .sizes import cdiv, next_power_of_2, reached_in_32_bits
from .statistics import statistics_tiles
from .targets import Target, kind_of, target_of

_MIN_HEADS = 16  # what a tensor core takes at least
_NUM_STAGES = {2: 3, 4: 2}  # by bytes of an element; with three, float32 spills registers
# Chains of a step of exact float32. With keys and values every token has a rounding of its own, and attention averages
# them away. Here one sum stands for all tokens, and must be as much better.
_LINEAR_CHAINS = tl.constexpr(4)
_SCORE_CHAINS = tl.constexpr(2)  # four take more registers than there are


def _side(dtype: torch.dtype) -> int:
    """Images, heads (at most), tokens and channels come in tiles of this many.

    Without tensor cores, as exact float32 products are, larger tiles than these do not fit into registers.
    """
    return 64 if dtype.itemsize == 2 else 32


def _step(dtype: torch.dtype) -> int:
    """The reduction step, the least that there is in float32, since the error grows with it (`add_product`)."""
    return 64 if dtype.itemsize == 2 else 16


def _stages(operand: Tensor, precision: str) -> int:
    stages = _NUM_STAGES[operand.dtype.itemsize]
    return stages_from_registers(stages, kind_of(operand.dtype, precision), target_of(operand.device))


def _token_warps(dtype: torch.dtype, target: Target) -> int:
    """With 64 heads, tiles of 64 take the registers of 8 warps. Tiles of 32 give each of 128 lanes 16 bytes to load."""
    return 8 if dtype.itemsize == 2 else _warps_of_128_lanes(target)


def _linear_launch(weight: Tensor, precision: str) -> tuple[int, int]:
    """Warps and stages of `_head_linear_kernel`.

    On NVIDIA, sums of exact float32 spill registers with fewer warps or more stages than these. AMD has matrix
    instructions for them.
    """
    target = target_of(weight.device)
    if target.capability is not None and kind_of(weight.dtype, precision) == "float32":
        return 8, 1
    return 4 if weight.dtype.itemsize == 2 else _warps_of_128_lanes(target), _stages(weight, precision)


def _warps_of_128_lanes(target: Target) -> int:
    return 4 if target.capability is not None else 2  # AMD's warps have 64 lanes


@triton.jit(do_not_specialize=["B"])
def _head_linear_kernel(
    x_ptr,  # (B, H, K)
    weight_ptr,  # (H, N, K)
    bias_ptr,  # (H, N), contiguous
    out_ptr,  # (B, H, N), contiguous
    B,
    H,
    N,
    K,
    x_stride_b,
    x_stride_h,
    x_stride_k,
    weight_stride_h,
    weight_stride_n,
    weight_stride_k,
    BIAS: tl.constexpr,
    DEPENDENT: tl.constexpr,
    PRECISION: tl.constexpr,  # of products of float32 operands: "ieee" or "tf32"
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out[b, h] = weight[h] x[b, h] + bias[h]: one program per tile of images, tile of N, and head."""
    wait_for_the_last(DEPENDENT)
    images = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    head = tl.program_id(2)
    inside_b, inside_n = images < B, columns < N

    offs_k = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + images[:, None] * x_stride_b + head * x_stride_h + offs_k[None, :] * x_stride_k
    weight_ptrs = weight_ptr + head * weight_stride_h
    weight_ptrs += columns[None, :] * weight_stride_n + offs_k[:, None] * weight_stride_k
    acc = tl.zeros((BLOCK_B, BLOCK_N), dtype=tl.float32)
    acc_low = tl.zeros((BLOCK_B, BLOCK_N), dtype=tl.float32)
    for k0 in range(0, K, BLOCK_K):
        inside_k = offs_k < K - k0
        x = tl.load(x_ptrs + k0 * x_stride_k, mask=inside_b[:, None] & inside_k[None, :], other=0.0)
        w = tl.load(weight_ptrs + k0 * weight_stride_k, mask=inside_n[None, :] & inside_k[:, None], other=0.0)
        if x.dtype == w.dtype:
            acc, acc_low = add_product_finely(x, w, acc, acc_low, PRECISION, _LINEAR_CHAINS)
        else:
            # Float32 rows meet weights in half precision as sums of two numbers of that. Each has an accumulator: two
            # products into one are miscompiled on Blackwell (github.com/triton-lang/triton/issues/10821).
            high = x.to(w.dtype)
            acc_low = tl.dot((x - high.to(tl.float32)).to(w.dtype), w, acc_low)
            acc = tl.dot(high, w, acc)
    acc += acc_low

    if BIAS:
        acc += tl.load(bias_ptr + head * N + columns, mask=inside_n, other=0.0).to(tl.float32)[None, :]
    out_ptrs = out_ptr + (images[:, None] * H + head) * N + columns[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=inside_b[:, None] & inside_n[None, :])


@triton.jit
def _load_tokens(
    tokens_ptr,  # token 0 of those that index counts
    position_ptr,  # its positional embedding
    index,  # (S,)
    channel,  # (C,)
    inside,  # (S, C)
    positioned,  # (S,), whether a token has a positional embedding
    mean,  # (S,)
    rstd,  # (S,)
    token_stride,
    channel_stride,
    W,
    POSITION: tl.constexpr,
    STATISTICS: tl.constexpr,
):
    """Tokens (S, C) as they enter a product, in their dtype; zero outside."""
    y = tl.load(tokens_ptr + index[:, None] * token_stride + channel[None, :] * channel_stride, mask=inside, other=0.0)
    if POSITION:
        address = position_ptr + index[:, None] * W + channel[None, :]
        y = y.to(tl.float32) + tl.load(address, mask=inside & positioned[:, None], other=0.0).to(tl.float32)
    if STATISTICS:
        y = tl.where(inside, (y.to(tl.float32) - mean[:, None]) * rstd[:, None], 0.0)
    return y.to(tokens_ptr.dtype.element_ty)


@triton.jit
def _scores_kernel(
    u_ptr,  # (B, H, W), u_stride_b from one image to the next
    first_ptr,  # (B, W)
    rest_ptr,  # (B, G, W)
    position_ptr,  # (G, W), contiguous
    statistics_ptr,  # (B, 1 + G, ⌈W / TILE⌉, 2), float32, contiguous
    scores_ptr,  # (B, H, 1 + G), float32, contiguous
    moments_ptr,  # (B, 1 + G, 2), float32, contiguous: mean and rstd, written where there are statistics
    H,
    G,
    W,
    u_stride_b,
    first_stride_b,
    first_stride_w,
    rest_stride_b,
    rest_stride_n,
    rest_stride_w,
    scale,
    eps,
    POSITION: tl.constexpr,
    STATISTICS: tl.constexpr,
    DEPENDENT: tl.constexpr,
    PRECISION: tl.constexpr,
    TILES: tl.constexpr,  # tiles of statistics in a row, rounded up to a power of two
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Scores in base 2, log2(e) · scale · u · y: one program per image, tile of tokens, and tile of heads.

    Tile 0 is token 0, alone; the next ones are the tokens of `rest`.
    """
    wait_for_the_last(DEPENDENT)
    image, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    heads = tl.program_id(2) * BLOCK_H + tl.arange(0, BLOCK_H)
    inside_h = heads < H

    is_first = tile == 0
    tokens_ptr = tl.where(is_first, first_ptr + image * first_stride_b, rest_ptr + image * rest_stride_b)
    channel_stride = tl.where(is_first, first_stride_w, rest_stride_w)
    index = tl.maximum(tile - 1, 0) * BLOCK_N + tl.arange(0, BLOCK_N)  # within `first` or `rest`
    inside_n = index < tl.where(is_first, 1, G)
    token = tl.where(is_first, index, 1 + index)
    tokens = 1 + G

    mean = tl.zeros((BLOCK_N,), dtype=tl.float32)
    rstd = tl.zeros((BLOCK_N,), dtype=tl.float32)
    if STATISTICS:
        rows = image * tokens + token
        mean, rstd = load_row_statistics(
            statistics_ptr, rows, tl.cdiv(W, TILE), inside_n, W, eps, TILES, STEP=2, WGMMA=False
        )
        if tl.program_id(2) == 0:
            tl.store(moments_ptr + rows * 2, mean, mask=inside_n)
            tl.store(moments_ptr + rows * 2 + 1, rstd, mask=inside_n)

    acc = tl.zeros((BLOCK_N, BLOCK_H), dtype=tl.float32)
    acc_low = tl.zeros((BLOCK_N, BLOCK_H), dtype=tl.float32)
    for k0 in range(0, W, BLOCK_K):
        channel = k0 + tl.arange(0, BLOCK_K)
        inside_k = channel < W
        y = _load_tokens(
            tokens_ptr, position_ptr, index, channel, inside_n[:, None] & inside_k[None, :], token > 0, mean, rstd,
            rest_stride_n, channel_stride, W, POSITION, STATISTICS,
        )  # fmt: skip
        u_ptrs = u_ptr + image * u_stride_b + heads[None, :] * W + channel[:, None]
        u = tl.load(u_ptrs, mask=inside_h[None, :] & inside_k[:, None], other=0.0)
        acc, acc_low = add_product_finely(y, u, acc, acc_low, PRECISION, _SCORE_CHAINS)
    acc += acc_low

    scores_ptrs = scores_ptr + (image * H + heads[None, :]) * tokens + token[:, None]
    tl.store(scores_ptrs, acc * (scale * LOG2_E), mask=inside_n[:, None] & inside_h[None, :])


@triton.jit
def _weighted_sum_kernel(
    scores_ptr,  # (B, H, 1 + G), float32, contiguous
    moments_ptr,  # (B, 1 + G, 2), float32, contiguous: mean and rstd of each token
    first_ptr,  # (B, W)
    rest_ptr,  # (B, G, W)
    position_ptr,  # (G, W), contiguous
    z_ptr,  # (B, H, W), contiguous
    H,
    G,
    W,
    first_stride_b,
    first_stride_w,
    rest_stride_b,
    rest_stride_n,
    rest_stride_w,
    POSITION: tl.constexpr,
    STATISTICS: tl.constexpr,
    DEPENDENT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """z_h = Σ_n softmax_n(s_h)_n y_n: one program per image, tile of channels, and tile of heads."""
    wait_for_the_last(DEPENDENT)
    image = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    heads = tl.program_id(2) * BLOCK_H + tl.arange(0, BLOCK_H)
    inside_w, inside_h = channel < W, heads < H
    tokens = 1 + G

    # token 0
    scores_ptr += image * H * tokens
    row = image * tokens
    y0 = tl.load(first_ptr + image * first_stride_b + channel * first_stride_w, mask=inside_w, other=0.0)
    if STATISTICS:
        mean0 = tl.load(moments_ptr + row * 2)
        rstd0 = tl.load(moments_ptr + row * 2 + 1)
        y0 = ((y0.to(tl.float32) - mean0) * rstd0).to(first_ptr.dtype.element_ty)
    running_max = tl.load(scores_ptr + heads * tokens, mask=inside_h, other=0.0)
    running_sum = tl.full((BLOCK_H,), 1.0, dtype=tl.float32)
    acc = tl.zeros((BLOCK_H, BLOCK_W), dtype=tl.float32) + y0.to(tl.float32)[None, :]

    # the tokens of `rest`
    rest_ptr += image * rest_stride_b
    for n0 in range(0, G, BLOCK_N):
        index = n0 + tl.arange(0, BLOCK_N)
        inside_n = index < G
        mean = tl.zeros((BLOCK_N,), dtype=tl.float32)
        rstd = tl.zeros((BLOCK_N,), dtype=tl.float32)
        if STATISTICS:
            mean = tl.load(moments_ptr + (row + 1 + index) * 2, mask=inside_n, other=0.0)
            rstd = tl.load(moments_ptr + (row + 1 + index) * 2 + 1, mask=inside_n, other=0.0)
        y = _load_tokens(
            rest_ptr, position_ptr, index, channel, inside_n[:, None] & inside_w[None, :], inside_n, mean, rstd,
            rest_stride_n, rest_stride_w, W, POSITION, STATISTICS,
        )  # fmt: skip
        score_ptrs = scores_ptr + heads[:, None] * tokens + 1 + index[None, :]
        score = tl.load(score_ptrs, mask=inside_h[:, None] & inside_n[None, :], other=float("-inf"))
        p, rescale, running_max, running_sum = online_softmax_update(score, 1.0, running_max, running_sum)
        acc = add_product(p.to(y.dtype), y, acc * rescale[:, None], PRECISION)

    z = acc * (1.0 / running_sum)[:, None]
    z_ptrs = z_ptr + (image * H + heads[:, None]) * W + channel[None, :]
    tl.store(z_ptrs, z, mask=inside_h[:, None] & inside_w[None, :])


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
    eps: float,
    precision: str,
) -> Tensor:
    heads, head_dim, width = value_weight.shape
    rest = reached_in_32_bits(rest)
    batch, positions = rest.shape[:2]
    tokens = 1 + positions
    out = query.new_empty((batch, heads * head_dim))
    if out.numel() == 0:
        return out
    z = query.new_empty((batch, heads, width), dtype=torch.float32)
    scores = query.new_empty((batch, heads, tokens), dtype=torch.float32)
    moments = None if statistics is None else query.new_empty((batch, tokens, 2), dtype=torch.float32)
    position = None if position is None else position.contiguous()

    side = _side(query.dtype)
    block_h = max(_MIN_HEADS, min(side, next_power_of_2(heads)))
    head_tiles = cdiv(heads, block_h)
    token_strides = (*first.stride(), *rest.stride())
    token_options = {
        "POSITION": position is not None,
        "STATISTICS": statistics is not None,
        "PRECISION": precision,
        "BLOCK_H": block_h,
        "BLOCK_N": side,
        "num_warps": _token_warps(query.dtype, target_of(query.device)),
        "num_stages": _stages(query, precision),
        "enable_fp_fusion": True,
        **dependent_launch(query.device),
    }

    if key_weight is None:
        u, u_stride = query.contiguous(), 0
    else:
        u, u_stride = query.new_empty((batch, heads, width)), heads * width
        _head_linear(query, key_weight.transpose(1, 2), None, u, precision)
    launch_kernel(
        _scores_kernel,
        query.device,
        (batch, 1 + cdiv(positions, side), head_tiles),
        u,
        first,
        rest,
        position,
        None if statistics is None else statistics.contiguous(),
        scores,
        moments,
        heads,
        positions,
        width,
        u_stride,
        *token_strides,
        scale,
        eps,
        TILES=next_power_of_2(statistics_tiles(width)),
        BLOCK_K=_step(query.dtype),
        **token_options,
    )
    launch_kernel(
        _weighted_sum_kernel,
        query.device,
        (batch, cdiv(width, side), head_tiles),
        scores,
        moments,
        first,
        rest,
        position,
        z,
        heads,
        positions,
        width,
        *token_strides,
        BLOCK_W=side,
        **token_options,
    )
    _head_linear(z, value_weight, value_bias.contiguous(), out.view(batch, heads, head_dim), precision)
    return out


def _head_linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, precision: str) -> None:
    """out[b, h] = weight[h] x[b, h] + bias[h]: x (B, H, K), of the weight's dtype or float32, weight (H, N, K), both of
    any strides, out (B, H, N)."""
    batch, heads, k = x.shape
    n = weight.shape[1]
    side = _side(weight.dtype)
    num_warps, num_stages = _linear_launch(weight, precision)
    launch_kernel(
        _head_linear_kernel,
        x.device,
        (cdiv(batch, side), cdiv(n, side), heads),
        x,
        weight,
        bias,
        out,
        batch,
        heads,
        n,
        k,
        *x.stride(),
        *weight.stride(),
        BIAS=bias is not None,
        PRECISION=precision,
        BLOCK_B=side,
        BLOCK_N=side,
        BLOCK_K=_step(weight.dtype),
        num_warps=num_warps,
        num_stages=num_stages,
        enable_fp_fusion=True,
        **dependent_launch(x.device),
    )
