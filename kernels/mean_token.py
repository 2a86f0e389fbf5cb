"""The query token of CLIP's ResNets: the mean of a feature map's positions plus a positional embedding.

    out = Σ_g features_g / G + position    features (B, G, W), position (W,), out (B, W)    (Radford et al. 2021, 2.3)

With a position of zero it is the average of a ViT's patch tokens, which some models have for an embedding.

One program takes one image and a tile of channels. It reads each element once, B · G · W of them, and adds as many:
memory decides. A tile of positions is summed in float32, one accumulator for each of its rows, and these at the end.
"""

# pyright: reportArgumentType=false, reportCallIssue=false
# (at a launch, plain values become constexprs and the options of the launch join the arguments)

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .direct import launch_kernel
from .primitives import dependent_launch, wait_for_the_last
from .sizes import cdiv, reached_in_32_bits


@triton.jit
def _mean_token_kernel(
    features_ptr,  # (B, G, W)
    position_ptr,  # (W,)
    out_ptr,  # (B, W), contiguous
    G,
    W,
    features_stride_b,
    features_stride_n,
    features_stride_w,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """out = mean over G + position: one program per image and tile of channels."""
    wait_for_the_last(DEPENDENT)
    image = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    inside_w = channel < W

    acc = tl.zeros((BLOCK_N, BLOCK_W), dtype=tl.float32)
    for n0 in range(0, G, BLOCK_N):
        index = n0 + tl.arange(0, BLOCK_N)
        address = image * features_stride_b + index[:, None] * features_stride_n + channel[None, :] * features_stride_w
        inside = (index < G)[:, None] & inside_w[None, :]
        acc += tl.load(features_ptr + address, mask=inside, other=0.0).to(tl.float32)

    # In two steps, so that however a step is taken, few roundings are made at the size of the whole sum.
    total = tl.sum(tl.sum(tl.reshape(acc, (4, BLOCK_N // 4, BLOCK_W)), axis=1), axis=0)
    out = total / G + tl.load(position_ptr + channel, mask=inside_w, other=0.0).to(tl.float32)
    tl.store(out_ptr + image * W + channel, out.to(out_ptr.dtype.element_ty), mask=inside_w)


def mean_token(features: Tensor, position: Tensor) -> Tensor:
    features = reached_in_32_bits(features)
    batch, positions, width = features.shape
    out = features.new_empty((batch, width))
    if out.numel() == 0:
        return out
    half = features.dtype.itemsize == 2
    side = 64 if half else 32  # positions, and channels, of a tile
    launch_kernel(
        _mean_token_kernel,
        features.device,
        (batch, cdiv(width, side)),
        features,
        position.contiguous(),
        out,
        positions,
        width,
        *features.stride(),
        BLOCK_N=side,
        BLOCK_W=side,
        num_warps=8 if half else 4,  # at least 16 bytes for each thread to load
        enable_fp_fusion=True,
        **dependent_launch(features.device),
    )
    return out
