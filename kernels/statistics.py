"""Row statistics: what a kernel leaves of the rows that it writes, so that the next LayerNorm needs no pass of its own.

The statistics of a row of W elements are two numbers for each tile of STATISTICS_TILE columns, the mean and the sum of
squared deviations from it: (…, T, 2) float32, T = ⌈W / STATISTICS_TILE⌉. The width of a tile is fixed, so that they do
not depend on how a kernel is launched. This file has their layout and their oracles; the kernels' parts are in
`primitives.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

STATISTICS_TILE = 64


def statistics_tiles(width: int) -> int:
    """The number of tiles that a row of `width` elements has."""
    return -(-width // STATISTICS_TILE)


def empty_statistics(x: Tensor, wanted: bool) -> Tensor:
    """Memory for the row statistics of `x` (…, W): (…, T, 2) float32 (float64 for float64); empty if not wanted."""
    *rows, width = x.shape
    shape = (*rows, statistics_tiles(width), 2) if wanted else 0
    return x.new_empty(shape, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)


def row_statistics(x: Tensor) -> Tensor:
    """(…, W) -> (…, T, 2), float32 or wider: each tile's mean and sum of squared deviations from it."""
    tiles = x.to(torch.promote_types(x.dtype, torch.float32)).split(STATISTICS_TILE, dim=-1)
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
