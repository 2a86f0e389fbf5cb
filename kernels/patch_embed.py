"""The patch embedding: image to positioned tokens in one product, with no im2col matrix in memory.

    out[b, 0]     = position[0]                                                  images (B, 3, h, w), weight (W, K′)
    out[b, 1 + g] = patch(b, g) weightᵀ + position[1 + g]                        position (1 + G, W), out (B, 1 + G, W)

or, where there is no class token, out[b, g] = patch(b, g) weightᵀ + position[g] with one row less everywhere.
(Dosovitskiy et al. 2021, eq. 1 and section 3.1.) The product has M = B · G rows, one a patch, and K = 3 · P² features,
which the weight pads with zeros to K′, a multiple of PATCH_K_STEP. Its left operand exists as addresses only:

    row m = (b, g): the corner of patch g of image b        feature k = (channel, row, column): a step from the corner

         0   P  2P   w                                       k // P²  channel    planes of P · P features
       0 +---+---+---+                                       k // P   channel · P + row: runs of P features
         | 0 | 1 | 2 |      corner(b, g) = b · stride_b      k % P    column: neighbours in memory where the image is
       P +---+---+---+        + (g // 3) · P · stride_h               NCHW; if P is a power of two the compiler can
         | 3 | 4 | 5 |        + (g % 3) · P · stride_w                prove it, and a run is a few loads of 16 bytes
      2P +---+---+---+
       h | not read  |      address(m, k) = corner(m) + step(k)

A uint8 pixel u enters as u − 128. Integers up to 128 are exact in every dtype, so only the weight and the sum are
rounded; and an error of the weight's rounding meets a number around zero, not one around the pixels' mean, which a
plain u would multiply into every output. What the shift takes away, a constant for each column, is in `position`.

Where the tokens enter the first block as they are, the statistics of their rows are left beside them, as by `linear`.

An image is read once, 3 · h · w · itemsize bytes, since the tiles that share its patches run side by side, and written
once as (1 + G) · W elements; 6 · G · W · P² operations are done on it. From uint8 in half precision that is 450
operations a byte for ViT-L/14 and 1000 for ViT-B/32: the tensor cores decide.

Each element of out is the sum of its products in steps of BLOCK_K from k = 0, in one accumulator of float32: its bits
depend on its image, the weight and the launch table alone.
"""

# pyright: reportArgumentType=false, reportCallIssue=false
# (at a launch, plain values become constexprs and the options of the launch join the arguments)

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from .direct import launch_kernel
from .launches import TABLE
from .primitives import (
    add_product,
    by_name,
    dependent_launch,
    stages_from_registers,
    store_row_statistics,
    wait_for_the_last,
)
from .sizes import cdiv
from .statistics import STATISTICS_TILE, empty_statistics
from .targets import fitting, kind_of, multiprocessors, target_of

_IMAGE_DTYPES = (torch.uint8, torch.float16, torch.bfloat16, torch.float32)
_MIDDLE = tl.constexpr(128.0)  # of the values of a uint8 pixel


@triton.jit(do_not_specialize=["M"])
def _patch_embed_kernel(
    images_ptr,  # (B, 3, h, w), uint8 or floating
    weight_ptr,  # (W, K), contiguous
    position_ptr,  # (C + G, W), contiguous
    out_ptr,  # (B, C + G, W), contiguous
    statistics_ptr,  # (B, C + G, ⌈W / TILE⌉, 2), float32, contiguous
    M,  # B · G
    G,
    W,
    grid_width,  # patches side by side in an image
    stride_b,
    stride_c,
    stride_h,
    stride_w,
    P: tl.constexpr,  # side of a patch
    K: tl.constexpr,  # 3 · P², rounded up to a multiple of PATCH_K_STEP
    C: tl.constexpr,  # class tokens: 0 or 1
    STATISTICS: tl.constexpr,
    WHOLE_TILES: tl.constexpr,  # TILE divides W
    BY_NAME: tl.constexpr,  # NVIDIA's special functions can be asked for
    DEPENDENT: tl.constexpr,
    PRECISION: tl.constexpr,  # of products of float32 operands: "ieee" or "tf32"
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    wait_for_the_last(DEPENDENT)
    # Tiles along W are neighbours: they read the same pixels, at about the same time.
    tiles_n = tl.cdiv(W, BLOCK_N)
    offs_m = tl.program_id(0) // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)

    # Rows and columns past the end are read from the last one: they are computed and never stored.
    row = tl.minimum(offs_m, M - 1)
    image, patch = (row // G).to(tl.int64), row % G
    corner_h, corner_w = (patch // grid_width).to(tl.int64) * P, (patch % grid_width).to(tl.int64) * P
    corner_ptrs = images_ptr + image * stride_b + corner_h * stride_h + corner_w * stride_w
    column = tl.minimum(offs_n, W - 1)
    weight_ptrs = weight_ptr + column[None, :].to(tl.int64) * K

    # --- accumulate
    FEATURES: tl.constexpr = 3 * P * P
    tl.static_assert(K % BLOCK_K == 0, "a step must not leave the weight")
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k0 in range(0, FEATURES, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        channel, run = (k // (P * P)).to(tl.int64), (k // P).to(tl.int64)
        step = channel * stride_c + (run - channel * P) * stride_h + (k % P) * stride_w
        pixel_ptrs = corner_ptrs[:, None] + step[None, :]
        if FEATURES % BLOCK_K == 0:
            pixels = tl.load(pixel_ptrs)
        else:  # the weight has its padding in memory, the image has not
            pixels = tl.load(pixel_ptrs, mask=k[None, :] < FEATURES, other=0)
        if images_ptr.dtype.element_ty == tl.uint8:
            pixels = pixels.to(tl.float32) - _MIDDLE
        w = tl.load(weight_ptrs + k[:, None])
        acc = add_product(pixels.to(w.dtype), w, acc, PRECISION)

    # --- epilogue
    inside_n = (offs_n < W)[None, :]
    inside = (offs_m < M)[:, None] & inside_n
    token = C + patch[:, None]
    acc += tl.load(position_ptr + token * W + offs_n[None, :], mask=inside_n, other=0.0).to(tl.float32)
    out = acc.to(out_ptr.dtype.element_ty)
    first_ptrs = out_ptr + image[:, None] * (C + G) * W + offs_n[None, :]
    tl.store(first_ptrs + token * W, out, mask=inside)
    n0 = tl.program_id(0) % tiles_n * BLOCK_N
    if STATISTICS:
        rows = offs_m + C * (image + 1)  # so many class rows are before it
        store_row_statistics(statistics_ptr, out, rows, offs_m < M, n0, W, WHOLE_TILES, False, BY_NAME)
    if C == 1:
        # The program with an image's first patch writes its class row.
        class_token = tl.load(position_ptr + offs_n[None, :], mask=inside_n, other=0.0).to(tl.float32)
        class_token = class_token.to(out_ptr.dtype.element_ty)
        first = inside & (patch == 0)[:, None]
        tl.store(first_ptrs, tl.broadcast_to(class_token, (BLOCK_M, BLOCK_N)), mask=first)
        if STATISTICS:
            rows, first_rows = image * (C + G), (offs_m < M) & (patch == 0)
            store_row_statistics(statistics_ptr, class_token, rows, first_rows, n0, W, WHOLE_TILES, False, BY_NAME)


def patch_embed(
    images: Tensor,
    weight: Tensor,
    position: Tensor,
    patch_size: int,
    class_token: bool,
    statistics: bool,
    precision: str,
) -> tuple[Tensor, Tensor]:
    batch, (width, k), tokens = len(images), weight.shape, len(position)
    patches = tokens - class_token
    out = weight.new_empty((batch, tokens, width))
    out_statistics = empty_statistics(out, statistics)
    if out.numel() == 0:
        return out, out_statistics

    if images.dtype not in _IMAGE_DTYPES:
        images = images.to(weight.dtype)
    target = target_of(images.device)
    m = batch * patches
    kind = kind_of(weight.dtype, precision)
    if statistics:
        launches = TABLE.entry("patch_embed", kind, target)[:1]  # another tile sums row statistics in another order
    else:
        launches = TABLE.launches_for("patch_embed", weight.dtype, target, precision)
    launch = fitting(launches, m, width, multiprocessors(images.device))
    if images.dtype != weight.dtype:
        launch = replace(launch, num_stages=stages_from_registers(launch.num_stages, kind, target))
    launch_kernel(
        _patch_embed_kernel,
        images.device,
        (cdiv(m, launch.block_m) * cdiv(width, launch.block_n),),
        images,
        weight.contiguous(),
        position.contiguous(),
        out,
        out_statistics,
        m,
        patches,
        width,
        images.shape[3] // patch_size,
        *images.stride(),
        P=patch_size,
        K=k,
        C=int(class_token),
        STATISTICS=statistics,
        WHOLE_TILES=width % STATISTICS_TILE == 0,
        BY_NAME=by_name(target),
        PRECISION=precision,
        BLOCK_M=launch.block_m,
        BLOCK_N=launch.block_n,
        BLOCK_K=launch.block_k,
        **launch.options,
        **dependent_launch(images.device),
    )
    return out, out_statistics
