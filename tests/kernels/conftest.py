"""Where the kernels run in these tests: on a GPU where there is one, in Triton's interpreter elsewhere.

What the interpreter can show: the arithmetic, masks, shapes, everything written, nothing read from beyond its tensor
into a result. What it cannot: TF32 rounding, races, speed.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from kernel_checks import DEVICE, Guards

INTERPRETED = DEVICE.type == "cpu"


def _import_kernels_interpreted() -> None:
    """Import Triton and all kernels with the interpreter asked for: Triton decides at its import, and at each kernel's.

    The variable is set for that long only, so that tests outside this folder, in the same process, do without Triton.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        importlib.import_module("triton")
        kernels = importlib.import_module("clip_fast.kernels")
        for module in pkgutil.iter_modules(kernels.__path__):
            importlib.import_module(f"clip_fast.kernels.{module.name}")
        _mend_bfloat16()


_original: dict[str, Any] = {}  # the interpreter's own methods, for the test that says when they are mended


def _mend_bfloat16() -> None:
    """Teach the interpreter bfloat16, which it keeps as raw uint16: it multiplies the raw bits, and truncates casts.

    Products are summed in float64 and rounded once. NumPy's float32 product is a BLAS call whose last bits depend on
    where in a tile a row stands, as a GPU's do not.
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

    _original.update({name: getattr(InterpreterBuilder, name) for name in ("create_dot", "cast_impl")})
    _original["create_fp_to_fp"] = InterpreterBuilder.create_fp_to_fp
    InterpreterBuilder.create_dot = create_dot
    InterpreterBuilder.cast_impl = casting(_original["cast_impl"])
    InterpreterBuilder.create_fp_to_fp = casting(_original["create_fp_to_fp"])


def _to_bfloat16(x: np.ndarray) -> np.ndarray:
    """float32 -> bfloat16 as raw uint16, rounded to nearest even."""
    return torch.from_numpy(np.ascontiguousarray(x)).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)


if INTERPRETED:
    _import_kernels_interpreted()


@pytest.fixture(autouse=True)
def _interpret(monkeypatch: pytest.MonkeyPatch) -> None:
    if INTERPRETED:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    else:
        assert os.environ.get("TRITON_INTERPRET") != "1", "there is a GPU: unset TRITON_INTERPRET to test on it"


@pytest.fixture
def interpreter_originals() -> dict[str, Any]:
    """The interpreter's methods as Triton ships them; empty on a GPU."""
    return _original


@pytest.fixture
def guards(monkeypatch: pytest.MonkeyPatch) -> Iterator[Guards]:
    """Guard bands: `guards.copy` for inputs; all that a launcher allocates is poisoned and guarded without asking.

    Launchers allocate with `new_empty`. What they do not write stays NaN in the result, and a change to anything
    outside what they allocated, or to an input, fails the test at its end.
    """
    guards = Guards()

    def new_empty(self: torch.Tensor, *size: Any, dtype: torch.dtype | None = None, **_: Any) -> torch.Tensor:
        shape = size[0] if len(size) == 1 and not isinstance(size[0], int) else size
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        return guards.empty(shape, dtype or self.dtype, self.device)

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    yield guards
    monkeypatch.undo()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    guards.check()


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels launched since the test began, interpreted or compiled."""
    from triton.runtime.interpreter import GridExecutor
    from triton.runtime.jit import JITFunction

    seen: list[str] = []
    run, interpret = JITFunction.run, GridExecutor.__call__

    def recorded_run(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(self.fn.__name__)
        return run(self, *args, **kwargs)

    def recorded_interpret(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(self.fn.__name__)
        return interpret(self, *args, **kwargs)

    monkeypatch.setattr(JITFunction, "run", recorded_run)
    monkeypatch.setattr(GridExecutor, "__call__", recorded_interpret)
    return seen
