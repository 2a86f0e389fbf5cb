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
from clip_fast.towers.cpu import GELU_TANH_SLOPE, Product
from clip_fast.towers.reference import gelu_tanh, quick_gelu

ACTIVATIONS = {
    "none": lambda x: x,
    "swish": F.silu,
    "quick_gelu": quick_gelu,
    "gelu": F.gelu,
    "gelu_tanh": gelu_tanh,
    "scaled_gelu_tanh": lambda x: 2 * GELU_TANH_SLOPE * gelu_tanh(x / GELU_TANH_SLOPE),
}
ROWS = [1, 50, 300]
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


@pytest.fixture(params=["MKL", "oneDNN", "BLAS"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The library that multiplies where the dtype allows it."""
    name: str = request.param
    if name == "MKL" and not pytorch.has_mkl():
        pytest.skip("this build has no MKL")
    monkeypatch.setattr(cpu, "can_pack_for_mkl", lambda: name == "MKL")
    if name == "BLAS":
        monkeypatch.setattr(cpu, "can_fuse", lambda dtype: False)
    return name


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("rows", ROWS)
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


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("alpha", [1, 1 / 1.702])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_product_and_its_residual(rows: int, alpha: float, dtype: torch.dtype) -> None:
    draws = [fresh(rows, dtype) for _ in range(DRAWS)]
    got = torch.stack([Product(w, bias, alpha=alpha)(x, residual=r.clone()) for x, w, bias, r in draws])
    plain = torch.stack([alpha * F.linear(*draw[:3]) + draw[3] for draw in draws])
    exact = torch.stack([alpha * F.linear(*(t.double() for t in draw[:3])) + draw[3].double() for draw in draws])
    assert relative_error(got, exact) <= bound(plain, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_scaled_weight_is_rounded_once(dtype: torch.dtype) -> None:
    """A weight times 1.702 has no exact half-precision form. It is scaled in float32 or wider, and then cast."""
    for weight in (torch.randn(160, 96), torch.randn(160, 96).half()):
        product = Product(weight, torch.zeros(160, dtype=dtype), scale=1.702)
        assert torch.equal(product.weight, (weight.float() * 1.702).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_layout_serves_all_rows_and_threads(
    library: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is made once, whatever the rows and the threads of the first call were. BLAS needs none."""
    made: list[str] = []
    for name in ("mkl_reorder_linear_weight", "reorder_linear_weight"):
        reorder = getattr(pytorch, name)
        monkeypatch.setattr(
            pytorch, name, lambda *given, name=name, reorder=reorder: made.append(name) or reorder(*given)
        )
    threads = torch.get_num_threads()
    weight, bias = torch.randn(160, 96, dtype=dtype), torch.randn(160, dtype=dtype)
    product = Product(weight, bias)
    try:
        for count in (2, 1):
            torch.set_num_threads(count)
            for rows in (50, 1, 300, 7):
                draws = [torch.randn(rows, 96, dtype=dtype) for _ in range(4)]
                got = torch.stack([product(x) for x in draws])
                plain = torch.stack([F.linear(x, weight, bias) for x in draws])
                exact = torch.stack([F.linear(x.double(), weight.double(), bias.double()) for x in draws])
                assert relative_error(got, exact) <= bound(plain, exact)
    finally:
        torch.set_num_threads(threads)
    by_mkl = library == "MKL" and dtype == torch.float32
    packs = library != "BLAS" and cpu.can_fuse(dtype)
    assert made == (["mkl_reorder_linear_weight"] if by_mkl else ["reorder_linear_weight"] if packs else [])
    if not made:
        assert product.weight is weight


@pytest.mark.parametrize(
    ("capabilities", "mkl", "packs"),
    [
        ({"cpu_name": "Intel(R) Xeon(R)"}, True, True),
        ({"cpu_name": "Intel(R) Xeon(R)"}, False, False),  # another BLAS
        ({"cpu_name": "AMD EPYC"}, True, False),  # MKL leaves AVX-512 unused there
        ({}, True, False),
    ],
)
def test_where_mkl_multiplies(
    capabilities: dict[str, Any], mkl: bool, packs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "_capabilities", lambda: capabilities)
    monkeypatch.setattr(pytorch, "has_mkl", lambda: mkl)
    assert cpu.can_pack_for_mkl() == packs
