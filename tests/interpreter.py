"""Triton's interpreter, for machines without a GPU. It is imported before anything else imports Triton, and mended."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

import numpy as np
import pytest
import torch

ORIGINALS: dict[str, Any] = {}  # the interpreter's own methods, for the test that fails once Triton mends them


def import_kernels_interpreted() -> None:
    """Imports Triton and all kernels while the environment asks for the interpreter.

    Triton reads the variable at its own import and at each kernel's. It is unset afterwards, so that other tests in the
    same process do without Triton.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        importlib.import_module("triton")
        kernels = importlib.import_module("clip_fast.kernels")
        for module in pkgutil.iter_modules(kernels.__path__):
            importlib.import_module(f"clip_fast.kernels.{module.name}")
        _mend_bfloat16()


def _mend_bfloat16() -> None:
    """Mends the interpreter's bfloat16. It keeps bfloat16 as raw uint16, multiplies the raw bits, and truncates casts.

    Products are summed in float64 and rounded once. NumPy's float32 product is a BLAS call, whose last bits depend on a
    row's place in a tile. A GPU's do not.
    """
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar == tl.bfloat16:
            return (handle.data.astype(np.uint32) << 16).view(np.float32)
        return handle.data.astype(np.float32)

    def create_dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        product = np.matmul(widened(a).astype(np.float64), widened(b).astype(np.float64))
        return TensorHandle((product + d.data).astype(d.data.dtype), d.dtype.scalar)

    def casting(original: Any) -> Any:
        def cast(self: Any, src: Any, dst_type: Any, *rounding: Any) -> Any:
            source, target = src.dtype.scalar, dst_type.scalar
            if source == tl.bfloat16 and target == tl.float32:
                return TensorHandle(widened(src), target)
            if source == tl.float32 and target == tl.bfloat16:
                return TensorHandle(_to_bfloat16(src.data), target)
            return original(self, src, dst_type, *rounding)

        return cast

    ORIGINALS.update({name: getattr(InterpreterBuilder, name) for name in ("create_dot", "cast_impl")})
    ORIGINALS["create_fp_to_fp"] = InterpreterBuilder.create_fp_to_fp
    InterpreterBuilder.create_dot = create_dot
    InterpreterBuilder.cast_impl = casting(ORIGINALS["cast_impl"])
    InterpreterBuilder.create_fp_to_fp = casting(ORIGINALS["create_fp_to_fp"])


def _to_bfloat16(x: np.ndarray) -> np.ndarray:
    """float32 -> bfloat16 as raw uint16, rounded to nearest even."""
    return torch.from_numpy(np.ascontiguousarray(x)).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
