"""The precisions that a tower may be computed in: one object carries each from the user's word to the launch table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ..errors import NotServed
from ..kernels.dispatch import triton_can_run
from ..kernels.targets import InputPrecision, Kind, has_tf32, kind_of
from . import cpu

PrecisionName = Literal["fp32", "tf32", "fp16", "bf16"]


@dataclass(frozen=True)
class Precision:
    """How a tower is computed.

    `weights` is the dtype of weights and activations. Sums, biases and statistics are float32 or wider. `products` is
    how a GPU multiplies float32 operands: exactly, or cut to TF32. `stands_in` tells that float32 stands in for a half
    precision which is slower on this CPU: products of few rows, where it is not, may be taken in it.
    """

    name: str
    weights: torch.dtype
    products: InputPrecision = "ieee"
    stands_in: bool = False

    @property
    def kind(self) -> Kind:
        """The kind of dtype that the launch table knows. Raises ValueError for float64, which no kernel computes in."""
        return kind_of(self.weights, self.products)

    @property
    def wide(self) -> torch.dtype:
        """The dtype of sums, biases and statistics: float32, or float64 for float64."""
        return torch.promote_types(self.weights, torch.float32)


FP32 = Precision("fp32", torch.float32)
TF32 = Precision("tf32", torch.float32, products="tf32")
FP16 = Precision("fp16", torch.float16)
BF16 = Precision("bf16", torch.bfloat16)
FP64 = Precision("fp64", torch.float64)  # by the plain tower only
FP32_FOR_HALF = Precision("fp32", torch.float32, stands_in=True)

BY_NAME: dict[str, Precision] = {precision.name: precision for precision in (FP32, TF32, FP16, BF16)}
BY_DTYPE = {precision.weights: precision for precision in (FP64, FP32, FP16, BF16)}


def check_name(name: PrecisionName | None) -> None:
    """Raises ValueError for what is neither the name of a precision nor None."""
    if name is not None and name not in get_args(PrecisionName):
        raise ValueError(f"precision must be one of {get_args(PrecisionName)} or None, got {name!r}")


def precision_of(name: PrecisionName | None, weight: Tensor) -> Precision:
    """The precision to compute a tower in. `weight` is one of the tower's weights.

    Args:
        name: the user's choice; None is the precision of the weights.

    A half precision that a CPU multiplies more slowly than float32 becomes "fp32", and so does "tf32" where Triton has
    none.

    Raises:
        NotServed: no precision has the dtype of the weights.
    """
    if name is None and weight.dtype not in BY_DTYPE:
        raise NotServed(f"its weights are {weight.dtype}")
    precision = BY_DTYPE[weight.dtype] if name is None else BY_NAME[name]
    device = weight.device
    if device.type == "cpu" and not cpu.multiplies_fast(precision.weights) and not triton_can_run(device):
        return FP32_FOR_HALF
    if precision is TF32 and not has_tf32(device):
        return FP32
    return precision
