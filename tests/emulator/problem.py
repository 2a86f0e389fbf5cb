"""What a case of the gate consists of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from .subject import Guards

Precision = Literal["ieee", "tf32"]


@dataclass(frozen=True)
class Kind:
    """In what a case is computed: a dtype, and for float32 how tensor cores take it. Bytes make integers."""

    name: str
    dtype: torch.dtype
    precision: Precision = "ieee"

    @property
    def half(self) -> bool:
        return self.dtype.itemsize == 2

    @property
    def tf32(self) -> bool:
        return self.precision == "tf32"

    def cut(self, x: Tensor) -> Tensor:
        """`x` as the products take it: TF32 has not the low 13 bits of float32, which tensor cores pass over."""
        return x.view(torch.int32).bitwise_and(-0x2000).view(torch.float32) if self.tf32 else x

    def random(self, *shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, dtype=torch.float64) * scale).to(self.dtype)


KINDS = {
    kind.name: kind
    for kind in (
        Kind("fp16", torch.float16),
        Kind("bf16", torch.bfloat16),
        Kind("fp32", torch.float32),
        Kind("tf32", torch.float32, "tf32"),
        Kind("u8", torch.uint8),
    )
}


FLOATS = tuple(name for name, kind in KINDS.items() if kind.dtype.is_floating_point)


@dataclass(frozen=True)
class Problem:
    """One call of an op over random data."""

    call: Callable[[Guards], Any]  # of the kernel, over guarded copies: the result, and perhaps statistics beside it
    plain: Callable[[], Tensor]  # the same by plain PyTorch, whose error is the measure
    exact: Callable[[], Tensor]  # the oracle's result in float64
    statistics: bool = False


@dataclass(frozen=True)
class Case:
    op: str
    name: str
    build: Callable[[Kind], Problem]
    kinds: tuple[str, ...] = FLOATS
