"""Triton's interpreter, for machines without a GPU. It is imported before anything else imports Triton, and mended."""

from __future__ import annotations

import functools
import importlib
import operator
import pkgutil
import types
from collections.abc import Callable
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
        _teach_special_functions()
        _spare_repetition()


def _mend_bfloat16() -> None:
    """Mends the interpreter's bfloat16. It keeps bfloat16 as raw uint16, multiplies the raw bits, and truncates casts.

    Products are summed in float64 and rounded once, as if by tensor cores. NumPy's float32 product is a BLAS call whose
    last bits depend on a row's place in a tile. A GPU's do not. Exact products of float32 are summed as on a GPU: in a
    chain of fused multiply-adds, each rounded to float32.
    """
    import triton.language as tl
    from triton._C.libtriton.ir import INPUT_PRECISION
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar == tl.bfloat16:
            return (handle.data.astype(np.uint32) << 16).view(np.float32)
        return handle.data.astype(np.float32)

    def create_dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        left, right = (widened(operand).astype(np.float64) for operand in (a, b))
        if a.dtype.scalar == tl.float32 and input_precision == INPUT_PRECISION.IEEE:
            return TensorHandle(_chain(left, right, d.data), d.dtype.scalar)
        return TensorHandle((np.matmul(left, right) + d.data).astype(d.data.dtype), d.dtype.scalar)

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


def _chain(a: np.ndarray, b: np.ndarray, acc: np.ndarray) -> np.ndarray:
    """acc + a b, k by k, rounded to float32 after each. a and b are float32 in float64, where their products are exact.

    The sum is rounded to float64 first, which changes the float32 about once in 2²⁹ times.
    """
    for k in range(a.shape[1]):
        acc = (a[:, k, None] * b[None, k, :] + acc).astype(np.float32)
    return acc


class _Result:
    """What a builder of Triton's compiler answers: an operation with results."""

    def __init__(self, handle: Any) -> None:
        self.handle = handle

    def get_result(self, number: int) -> Any:
        assert number == 0
        return self.handle


def _teach_special_functions() -> None:
    """Teach the interpreter the PTX instructions that kernels name, each at its worst: off by all that PTX allows.

    The sign of the error is that of the result, everywhere the same, so that no sum averages it away.
    """
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def create_inline_asm(
        self: Any, asm: str, constraints: str, values: list[Any], types: list[Any], is_pure: bool, pack: int
    ) -> Any:
        [x] = values
        function, error = SPECIAL_FUNCTIONS[asm]
        with np.errstate(over="ignore"):
            value = function(x.data.astype(np.float64)) * (1 + SIGN_OF_ERROR * error)
        return _Result(TensorHandle(value.astype(np.float32), x.dtype.scalar))

    InterpreterBuilder.create_inline_asm = create_inline_asm


# Instruction -> what it computes and its largest relative error. PTX ISA 8.7, section 9.7.3: tanh 2⁻¹¹, rcp 1 ulp.
SPECIAL_FUNCTIONS: dict[str, tuple[Callable[[np.ndarray], np.ndarray], float]] = {
    "tanh.approx.f32 $0, $1;": (np.tanh, 2.0**-11),
    "rcp.approx.ftz.f32 $0, $1;": (np.reciprocal, 2.0**-23),
}
SIGN_OF_ERROR = 1.0


def _spare_repetition() -> None:
    """Spares the interpreter more than half of its time, which is spent beside the arithmetic. No result changes.

    At every launch, and at every call of one jit function by another, the interpreter looks for the functions of
    Triton's language and replaces them. It checks each sum of integers for overflow by ten operations of its own, and
    it makes its table of dtypes anew at every use.
    """
    import triton.language as tl
    from triton.language.semantic import TritonSemantic
    from triton.runtime import interpreter

    replace = interpreter._patch_lang

    @functools.cache
    def replacements() -> list[tuple[Any, str, Any]]:
        scope = replace(types.FunctionType((lambda: None).__code__, {"tl": tl, "core": tl.core}))
        made = {(owner, name): getattr(owner, name) for owner, name, _ in scope._changes}
        scope.restore()
        return [(owner, name, value) for (owner, name), value in made.items()]

    def replace_once(fn: Any) -> Any:
        scope = interpreter._LangPatchScope()
        owner, name, value = replacements()[0]
        if getattr(owner, name) is not value:  # else the launch that calls this function has replaced them
            for replacement in replacements():
                scope.set_attr(*replacement)
        return scope

    def check_overflow(self: Any, lhs: Any, rhs: Any, binary_op: Any) -> None:
        dtype = lhs.type.scalar
        if dtype.int_bitwidth < 64 and self.builder.options.sanitize_overflow:
            compute = getattr(operator, binary_op.__name__)
            exact = compute(lhs.handle.data.astype(np.int64), rhs.handle.data.astype(np.int64))
            fits = (exact >= dtype.get_int_min_value()) & (exact <= dtype.get_int_max_value())
            assert fits.all(), f"{dtype} overflow detected for operation {binary_op.__name__}"

    look_up, known = interpreter._get_np_dtype, {}

    def numpy_dtype(dtype: Any) -> Any:
        name = dtype.scalar.name
        if name not in known:
            known[name] = look_up(dtype)
        return known[name]

    interpreter._patch_lang = replace_once
    interpreter._get_np_dtype = numpy_dtype
    TritonSemantic.binary_op_sanitize_overflow_impl = check_overflow
