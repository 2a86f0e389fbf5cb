"""Products on a CPU, by each library."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from random_towers import relative_error
from torch import Tensor

from clip_fast import pytorch
from clip_fast.towers import cpu
from clip_fast.towers.cpu import Product
from clip_fast.towers.reference import gelu_tanh, quick_gelu

ACTIVATIONS = {
    "none": lambda x: x,
    "swish": F.silu,
    "quick_gelu": quick_gelu,
    "gelu": F.gelu,
    "gelu_tanh": gelu_tanh,
}
FEW = cpu._FEW_ROWS


DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
DRAWS = 32  # their errors are pooled, since for one row of 160 numbers the ratio of two errors scatters by 20 %


def fresh(rows: int, dtype: torch.dtype) -> list[Tensor]:
    """x, weight, bias and residual of a product."""
    return [torch.randn(*shape, dtype=dtype) for shape in ((rows, 96), (160, 96), (160,), (rows, 160))]


def bound(plain: Tensor, exact: Tensor) -> float:
    """The bound of an error: twice the plain product's error, or a random walk with a rounding for each term.

    The walk is needed since a library sums in its own order, and the plain product may be a tree of sums.
    """
    walk = 98**0.5 * torch.finfo(plain.dtype).eps / 2
    return max(2 * relative_error(plain, exact), walk if plain.dtype.itemsize >= 4 else 0)


@pytest.fixture(params=[False, True], ids=["BLAS knows the CPU", "BLAS leaves AVX-512"])
def leaves_avx512(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(cpu, "blas_leaves_avx512", lambda: request.param)
    return request.param


@pytest.mark.usefixtures("leaves_avx512")
@pytest.mark.parametrize("rows", [1, FEW, FEW + 1, 300])  # on both sides of the change of library
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_product_and_its_activation(rows: int, activation: str, dtype: torch.dtype) -> None:
    act = ACTIVATIONS[activation]
    draws = [fresh(rows, dtype)[:3] for _ in range(DRAWS)]
    got = torch.stack([Product(weight, bias, activation)(x) for x, weight, bias in draws])
    plain = torch.stack([act(F.linear(*draw)) for draw in draws])
    exact = torch.stack([act(F.linear(*(tensor.double() for tensor in draw))) for draw in draws])
    assert got.dtype == dtype
    assert relative_error(got, exact) <= bound(plain, exact)


@pytest.mark.usefixtures("leaves_avx512")
@pytest.mark.parametrize("rows", [1, FEW, FEW + 1, 300])
@pytest.mark.parametrize("alpha", [1, 1 / 1.702])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_product_and_its_residual(rows: int, alpha: float, packed: bool, dtype: torch.dtype) -> None:
    draws = [fresh(rows, dtype) for _ in range(DRAWS)]
    usual = (rows,) if packed else ()
    got = torch.stack(
        [Product(w, bias, alpha=alpha, usual_rows=usual)(x, residual=r.clone()) for x, w, bias, r in draws]
    )
    plain = torch.stack([alpha * F.linear(*draw[:3]) + draw[3] for draw in draws])
    exact = torch.stack([alpha * F.linear(*(t.double() for t in draw[:3])) + draw[3].double() for draw in draws])
    assert relative_error(got, exact) <= bound(plain, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_scaled_weight_is_rounded_once(dtype: torch.dtype) -> None:
    """A weight times 1.702 has no exact half-precision form. It is scaled in float32 or wider, and then cast."""
    for weight in (torch.randn(160, 96), torch.randn(160, 96).half()):
        product = Product(weight, torch.zeros(160, dtype=dtype), scale=1.702)
        assert torch.equal(product.weight, (weight.float() * 1.702).to(dtype))


@pytest.mark.skipif(not cpu.can_pack_for_mkl(), reason="no Intel CPU with MKL")
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("rows", [1, 50, 300])
def test_packed_for_mkl(rows: int, activation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """MKL multiplies the numbers of rows that weights were packed for, with as many threads as packed them."""
    act = ACTIVATIONS[activation]
    launched: list[int] = []
    packed_by: dict[int, int] = {}  # identity of a packed weight -> threads that packed it
    reorder, mkl_linear = pytorch.mkl_reorder_linear_weight, pytorch.mkl_linear

    def packing(weight: Tensor, rows: int) -> Tensor:
        packed = reorder(weight, rows)
        packed_by[id(packed)] = torch.get_num_threads()
        return packed

    def watched(x: Tensor, packed: Tensor, *operands: Any) -> Tensor:
        assert packed_by[id(packed)] == torch.get_num_threads()
        launched.append(len(x))
        return mkl_linear(x, packed, *operands)

    monkeypatch.setattr(pytorch, "mkl_reorder_linear_weight", packing)
    monkeypatch.setattr(pytorch, "mkl_linear", watched)
    threads = torch.get_num_threads()
    draws = [fresh(rows, torch.float32) for _ in range(DRAWS)]
    got, added = [], []
    for x, weight, bias, residual in draws:
        product = Product(weight, bias, activation, usual_rows=(rows, 7))
        product(x)
        torch.set_num_threads(threads % 2 + 1)
        got.append(product(x))
        torch.set_num_threads(threads)
        added.append(Product(weight, bias, usual_rows=(rows,))(x, residual=residual.clone()))
        product(x[:-1])  # no weight was packed for this number of rows
    assert launched == [rows] * 3 * DRAWS
    for values, wanted in (
        (got, lambda x, weight, bias, _: act(F.linear(x, weight, bias))),
        (added, lambda x, weight, bias, residual: F.linear(x, weight, bias) + residual),
    ):
        plain = torch.stack([wanted(*draw) for draw in draws])
        exact = torch.stack([wanted(*(tensor.double() for tensor in draw)) for draw in draws])
        assert relative_error(torch.stack(values), exact) <= bound(plain, exact)


def test_one_layout_is_made_for_one_library(leaves_avx512: bool) -> None:
    """oneDNN multiplies even many rows in float32 where BLAS leaves the CPU's AVX-512 unused."""
    product = Product(torch.randn(160, 96), torch.zeros(160))
    product(torch.randn(300, 96))
    by_onednn = leaves_avx512 and cpu.can_fuse(torch.float32)
    assert ("_packed" in vars(product)) == by_onednn
    assert ("_transposed" in vars(product)) != by_onednn


@pytest.mark.parametrize(
    ("capabilities", "mkl", "leaves"),
    [
        ({"cpu_name": "AMD EPYC", "avx512_f": True}, True, True),
        ({"cpu_name": "AMD EPYC", "avx512_f": True}, False, False),  # another BLAS
        ({"cpu_name": "AMD EPYC", "avx512_f": False}, True, False),
        ({"cpu_name": "Intel(R) Xeon(R)", "avx512_f": True}, True, False),
        ({}, True, False),
    ],
)
def test_who_leaves_avx512(
    capabilities: dict[str, Any], mkl: bool, leaves: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "_capabilities", lambda: capabilities)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: mkl)
    assert cpu.blas_leaves_avx512() == leaves
