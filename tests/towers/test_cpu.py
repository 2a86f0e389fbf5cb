"""Products on a CPU, by each library."""

from __future__ import annotations

import math
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
    "scaled_gelu_tanh": lambda x: GELU_TANH_SLOPE * gelu_tanh(x / GELU_TANH_SLOPE),
}
ROWS = [1, 3, 50, 300]
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_rows_take_no_memory_for_each_number_of_them(
    library: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """oneDNN keeps some for each. By float32 weights that are as they were given, few rows are BLAS's."""
    if library != "BLAS" and not cpu.can_fuse(dtype):
        pytest.skip(f"oneDNN does not multiply in {dtype} on this CPU")
    seen: set[int] = set()
    multiply = pytorch.linear_pointwise
    counted = lambda x, *given: seen.add(len(x)) or multiply(x, *given)  # noqa: E731
    monkeypatch.setattr(pytorch, "linear_pointwise", counted)
    given = torch.randn(160, 96, dtype=dtype)
    product = Product(given, torch.randn(160, dtype=dtype), scale=1.5)
    for rows in range(1, 20):
        x = torch.randn(rows, 96, dtype=dtype)
        assert relative_error(product(x), F.linear(x, 1.5 * given, product.bias)) < 4 * torch.finfo(dtype).eps
        assert ("_operand" in vars(product)) == (library != "oneDNN" or dtype != torch.float32 or rows > 16)
    few = set() if dtype == torch.float32 else {4, 16}
    by_onednn = library == "oneDNN" or (library == "MKL" and dtype != torch.float32)
    assert seen == ({17, 18, 19} | few if by_onednn else set())


@pytest.mark.parametrize("rows", [1, 2, 16])
@pytest.mark.parametrize("width", [160, 4304, 7])  # in 32 parts, in 16, and none
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("maker", ["AMD", "Intel"])
def test_few_rows_in_parts(
    rows: int, width: int, dtype: torch.dtype, maker: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever CPU the test runs on, and by a weight that lies column by column, too."""
    monkeypatch.setattr(cpu, "_capabilities", lambda: {"cpu_name": maker})
    monkeypatch.setattr(pytorch, "has_mkl", lambda: True)
    x, weight, bias = (torch.randn(*shape, dtype=dtype) for shape in ((rows, 96), (width, 96), (width,)))
    plain = torch.addmm(bias, x, weight.T, alpha=1.5)
    exact = torch.addmm(bias.double(), x.double(), weight.double().T, alpha=1.5)
    batched: list[int] = []
    multiply = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda a, b: batched.append(len(a)) or multiply(a, b))
    for each in (weight, weight.T.contiguous().T):
        got = cpu.linear_of_few_rows(x, each, bias, 1.5)
        assert got.shape == plain.shape
        assert relative_error(got, exact) <= bound(plain, exact)
    assert batched == ([] if maker == "Intel" or width == 7 else [math.gcd(width, 32)] * 2)


@pytest.mark.parametrize("rows", [400, 401, 800, 1339, 1340])
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("wide", [False, True])
def test_rows_that_amx_would_leave_to_one_thread(
    rows: int, added: bool, wide: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A narrow product of them is made in parts of at most 384 rows; every row comes once, in its place."""
    if not cpu.can_fuse(torch.bfloat16):
        pytest.skip("oneDNN does not multiply in bfloat16 here")
    monkeypatch.setattr(cpu, "multiplies_in_tiles", lambda dtype: dtype == torch.bfloat16)
    taken: list[int] = []
    plain = pytorch.linear_pointwise

    class Counted:
        def __call__(self, x: Tensor, *others: Any) -> Tensor:
            taken.append(len(x))
            return plain(x, *others)

        def binary(self, x: Tensor, *others: Any) -> Tensor:
            taken.append(len(x))
            return plain.binary(x, *others)

    monkeypatch.setattr(pytorch, "linear_pointwise", Counted())
    columns = 1024 if wide else 160
    x, weight, bias = (torch.randn(*shape).bfloat16() for shape in ((rows, 96), (columns, 96), (columns,)))
    residual = torch.randn(rows, columns).bfloat16() if added else None
    got = Product(weight, bias)(x, residual=None if residual is None else residual.clone())
    exact = F.linear(x.double(), weight.double(), bias.double()) + (0 if residual is None else residual.double())
    assert relative_error(got, exact) <= 2 * relative_error(exact.bfloat16(), exact)
    in_parts = not wide and 400 < rows < 1340
    assert sum(taken) == rows
    assert (len(taken) > 1) == in_parts
    assert max(taken) <= (384 if in_parts else rows)


@pytest.mark.parametrize("rows", [*ROWS, 64, 65])
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("few_in_half", [False, True])
def test_half_weights_that_multiply_slowly_stay_as_they_are(
    rows: int, added: bool, dtype: torch.dtype, few_in_half: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are multiplied in float32, or, few rows by bfloat16 where that may be, as they are: no worse than so."""
    monkeypatch.setattr(cpu, "multiplies_fast", lambda asked: asked.itemsize >= 4)
    monkeypatch.setattr(cpu, "can_pack_for_mkl", lambda: True)
    as_they_are = few_in_half and rows <= 64 and cpu.can_fuse(dtype)
    got, plain, exact = [], [], []
    for _ in range(DRAWS):
        x, weight, bias, residual = fresh(rows, torch.float32)
        weight = weight.to(dtype)
        given = weight.clone()
        activation = "none" if added else "quick_gelu"
        product = Product(weight, bias, activation, scale=1.702, alpha=0.5, few_in_half=few_in_half)
        sums = F.linear(x.double(), weight.double() * 1.702, bias.double())
        exact.append(residual.double() + 0.5 * sums if added else quick_gelu(sums))
        low = dtype if as_they_are else torch.float32
        y = F.linear(x.to(low), weight.to(low)).float() * 1.702 + bias
        plain.append(residual + 0.5 * y if added else quick_gelu(y))
        got.append(product(x, residual=residual.clone()) if added else product(x))
        assert torch.equal(weight, given)
        assert ("_operand" in vars(product)) == as_they_are
    assert got[0].dtype == torch.float32
    assert relative_error(torch.stack(got), torch.stack(exact)) <= bound(torch.stack(plain), torch.stack(exact))


def test_half_weights_where_mkl_is_slow_are_laid_out_once_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "multiplies_fast", lambda asked: asked.itemsize >= 4)
    for fast in (True, False):
        monkeypatch.setattr(cpu, "can_pack_for_mkl", lambda fast=fast: fast)
        assert cpu.stays_half(torch.ones(2, 2).half(), torch.float32) == fast
        assert not cpu.stays_half(torch.ones(2, 2), torch.float32)
        assert not cpu.stays_half(torch.ones(2, 2).half(), torch.float64)


@pytest.mark.parametrize(
    ("capabilities", "fast"),
    [
        ({"cpu_name": "Intel Xeon", "amx_bf16": True}, True),
        ({"cpu_name": "Intel Xeon", "amx_bf16": False, "avx512_bf16": True}, False),
        ({"cpu_name": "Intel Core"}, False),
        ({"cpu_name": "AMD EPYC", "avx512_bf16": True}, True),
        ({}, True),  # a release of PyTorch that cannot say
    ],
)
def test_where_bfloat16_is_fast(capabilities: dict[str, Any], fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_capabilities", lambda: capabilities)
    monkeypatch.setattr(cpu, "can_multiply", lambda dtype: True)
    ask = cpu.multiplies_fast.__wrapped__
    assert (ask(torch.bfloat16), ask(torch.float16), ask(torch.float32)) == (fast, True, True)
    in_tiles = bool(capabilities.get("amx_bf16"))
    assert cpu.multiplies_in_tiles.__wrapped__(torch.bfloat16) == in_tiles
    assert not cpu.multiplies_in_tiles.__wrapped__(torch.float32)
    monkeypatch.setattr(cpu, "multiplies_in_tiles", lambda dtype: in_tiles)
    assert cpu.rows_at_once(torch.bfloat16) == (2100 if in_tiles else 800)


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
