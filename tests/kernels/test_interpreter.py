"""The help that the interpreter gets in `tests/interpreter.py` is right, and still needed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from kernel_checks import DEVICE, assert_same_bits
from torch import Tensor
from triton.runtime.errors import InterpreterError

pytestmark = pytest.mark.skipif(DEVICE.type != "cpu", reason="there is a GPU: nothing is interpreted")


def _dot(a: Tensor, b: Tensor) -> Tensor:
    out = torch.empty(16, 16)
    _dot_kernel[(1,)](a, b, out)
    return out


def _exact_dot(a: Tensor, b: Tensor) -> Tensor:
    out = torch.empty(16, 16)
    _exact_dot_kernel[(1,)](a, b, out)
    return out


def _cast(x: Tensor) -> Tensor:
    out = torch.empty(len(x), dtype=torch.bfloat16)
    _cast_kernel[(1,)](x, out, N=len(x))
    return out


@pytest.fixture(autouse=True, scope="module")
def _kernels() -> None:
    """Kernels that are decorated while the environment asks for the interpreter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        for kernel in (_dot_kernel, _exact_dot_kernel, _cast_kernel, _sum_kernel):
            globals()[kernel.__name__] = triton.jit(kernel)


def _dot_kernel(a_ptr, b_ptr, out_ptr):
    offsets = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    a, b = tl.load(a_ptr + offsets), tl.load(b_ptr + offsets)
    tl.store(out_ptr + offsets, tl.dot(a, b))


def _exact_dot_kernel(a_ptr, b_ptr, out_ptr):
    offsets = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    a, b = tl.load(a_ptr + offsets), tl.load(b_ptr + offsets)
    tl.store(out_ptr + offsets, tl.dot(a, b, input_precision="ieee"))


def _cast_kernel(x_ptr, out_ptr, N: tl.constexpr):
    offsets = tl.arange(0, N)
    tl.store(out_ptr + offsets, tl.load(x_ptr + offsets).to(tl.bfloat16))


# Not halfway, ties to even and odd, overflow to infinity, a subnormal, both zeros, both infinities, NaN.
AWKWARD = (
    1.003, 1.00390625, 1.01171875, 3.4e38, 1e-40, 0.0, -0.0, float("inf"), float("-inf"), float("nan"),
    -1.003, 65504.0, 1e-3, 0.1, 2.0, 3.0,
)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_products_are_those_of_the_values(dtype: torch.dtype) -> None:
    a, b = torch.randn(16, 16).to(dtype), torch.randn(16, 16).to(dtype)
    torch.testing.assert_close(_dot(a, b), (a.double() @ b.double()).float(), rtol=1e-6, atol=1e-6)


def test_exact_products_of_float32_are_one_chain() -> None:
    """As a GPU sums them: whoever sums many of them at once sees the error grow."""
    a, b = torch.randn(16, 16), torch.randn(16, 16)
    chain = torch.zeros(16, 16)
    for k in range(16):
        chain = (a[:, k, None].double() * b[None, k].double() + chain.double()).float()
    assert_same_bits(_exact_dot(a, b), chain)


def test_casts_round_to_nearest_even() -> None:
    x = torch.tensor(AWKWARD)
    assert_same_bits(_cast(x).nan_to_num(7.0), x.to(torch.bfloat16).nan_to_num(7.0))
    assert _cast(x).isnan().equal(x.isnan())
    many = torch.randn(4096)
    assert_same_bits(_cast(many), many.to(torch.bfloat16))


def test_the_help_is_still_needed(interpreter_originals: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails once Triton's interpreter knows bfloat16. Then remove the help from `tests/interpreter.py`."""
    from triton.runtime.interpreter import InterpreterBuilder

    for name, method in interpreter_originals.items():
        monkeypatch.setattr(InterpreterBuilder, name, method)
    a, b = torch.randn(16, 16).bfloat16(), torch.randn(16, 16).bfloat16()
    error = (_dot(a, b) - a.float() @ b.float()).abs().max()
    assert not error < 1, "the interpreter has learnt bfloat16 products: remove the help in conftest.py"
    x = torch.randn(4096)
    assert not _cast(x).equal(x.bfloat16()), "the interpreter rounds to bfloat16: remove the help in conftest.py"


def _sum_kernel(x_ptr, out_ptr, N: tl.constexpr):
    offsets = tl.arange(0, N)
    tl.store(out_ptr + offsets, tl.load(x_ptr + offsets) + tl.load(x_ptr + offsets))


def test_an_overflow_of_integers_is_an_error() -> None:
    out = torch.empty(2, dtype=torch.int32)
    _sum_kernel[(1,)](torch.tensor([2**30 - 1, -(2**30)], dtype=torch.int32), out, N=2)
    assert out.tolist() == [2**31 - 2, -(2**31)]
    for number in (2**30, -(2**30) - 1):
        with pytest.raises(InterpreterError, match="int32 overflow detected for operation add"):
            _sum_kernel[(1,)](torch.tensor([0, number], dtype=torch.int32), out, N=2)


def test_the_language_is_as_before_after_a_launch() -> None:
    names = [(owner, name) for owner in (tl, tl.core, tl.math, tl.tensor) for name in vars(owner)]
    before = {each: getattr(*each) for each in names}
    _cast(torch.randn(16))
    with pytest.raises(InterpreterError):
        _sum_kernel[(1,)](torch.full((2,), 2**31 - 1, dtype=torch.int32), torch.empty(2, dtype=torch.int32), N=2)
    assert {each: getattr(*each) for each in names} == before
