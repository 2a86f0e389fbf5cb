"""A product by every launch that its table has for an architecture: sound each, and the same bits by all of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from torch import Tensor

from .cases import EPILOGUES, linear, patch_embed
from .gate import Gate, Row, build, call
from .problem import Case, Kind
from .subject import bits, launches_of, pinned

# Epilogue, M, N, K. Statistics of x are merged from 1, 2, 3, 4, 8, 12, 20 and 26 tiles; M and N leave ragged tiles, and
# one N a tile of statistics that is not whole.
_LINEAR = (
    ("qkv", 70, 192, 64),
    ("qkv", 70, 192, 128),
    ("qkv", 70, 192, 192),
    ("all", 150, 320, 200),
    ("qkv", 130, 64, 512),
    ("qkv", 70, 200, 768),
    ("fc1 quick_gelu", 70, 264, 1280),
    ("qkv", 2, 72, 1664),
    ("out", 131, 264, 88),
)
PRODUCTS: tuple[Case, ...] = (
    *(Case("linear", f"{name} {m}x{n}x{k}", partial(linear, m, n, k, **EPILOGUES[name])) for name, m, n, k in _LINEAR),
    Case("patch_embed", "P=14 of uint8", partial(patch_embed, 14, "uint8")),
    Case("patch_embed", "P=32 of its dtype", partial(patch_embed, 32, "its dtype")),
    Case(
        "patch_embed",
        "P=16 without a class token",
        partial(patch_embed, 16, "uint8", class_token=False, statistics=True),
    ),
)


def compare(gate: Gate, case: Case, kind: Kind, arch: str) -> Iterator[Row]:
    """A row for each launch of the entry that the case takes; BITS is a problem where they are not the first's."""
    first: list[Tensor] = []
    for number, launch in enumerate(launches_of(case.op, kind.dtype, kind.precision, arch)):
        with pinned(number):
            row = gate.check(case, kind, arch)
            results, _ = call(gate.driver, build(case, kind), arch, "random", 2)
        results = [result.clone() for result in results]
        first = first or results
        for one, other in zip(first, results, strict=True):
            if differ := (bits(one) != bits(other)).sum().item():
                row.problems.append(("BITS", f"{differ} bytes are not those of the entry's first launch"))
        tile = f"{launch.block_m}x{launch.block_n}x{launch.block_k}"
        yield replace(row, case=f"{case.name} by {tile}, {launch.num_warps} warps, {launch.num_stages} stages")
