"""`layer_norm` against its oracle in float64."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import DEVICE, DTYPES, Guards, assert_as_accurate, assert_same_bits, assert_statistics_of
from torch import Tensor

from clip_fast.kernels import ops, oracles

WIDTHS = (8, 63, 64, 65, 128, 768, 1000, 1024, 1280, 1408, 1664, 2048)


def hostile_rows(width: int, repeats: int = 1) -> Tensor:
    """Rows in float64, (6 · repeats, width), that show the errors of a careless LayerNorm.

    The six kinds are plain, far from zero, with one outlier channel, constant, tiny, and small around a large mean.
    """
    x = torch.randn(6, repeats, width, dtype=torch.float64, device=DEVICE)
    x[1] += 100
    x[2, :, width // 2] *= 300
    x[3] = 3.0
    x[4] *= 1e-3
    x[5] = x[5] * 0.1 - 50
    return x.flatten(0, 1)


def gain_and_shift(width: int) -> tuple[Tensor, Tensor]:
    return 1 + 0.2 * torch.randn(width, device=DEVICE), 0.1 * torch.randn(width, device=DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_accuracy(width: int, dtype: torch.dtype, guards: Guards, launches: list[str]) -> None:
    repeats = 3 + 512 // max(width, 32)  # enough rows for a steady statistic of their errors
    x = guards.copy(hostile_rows(width, repeats).to(dtype))
    weight, bias = (guards.copy(p) for p in gain_and_shift(width))
    y, statistics = ops.layer_norm(x, weight, bias, statistics=True, impl="triton")
    assert launches == ["_layer_norm_kernel"]
    plain, _ = oracles.layer_norm(x, weight, bias)
    exact, _ = oracles.layer_norm(x.double(), weight.double(), bias.double())
    assert_as_accurate(y, plain, exact)
    assert_statistics_of(statistics, y)


def test_eps_is_the_one_given(guards: Guards) -> None:
    """The rows' variance is a tenth of eps, so that another eps would show."""
    x = 0.03 * torch.randn(257, 200, device=DEVICE)
    weight, bias = gain_and_shift(200)
    y, _ = ops.layer_norm(x, weight, bias, eps=1e-2, impl="triton")
    exact, _ = oracles.layer_norm(x.double(), weight.double(), bias.double(), eps=1e-2)
    assert_as_accurate(y, oracles.layer_norm(x, weight, bias, eps=1e-2)[0], exact)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_rows_and_gaps(dtype: torch.dtype, guards: Guards) -> None:
    x = guards.copy(hostile_rows(100).to(dtype), gap=28)
    weight, bias = gain_and_shift(100)
    y, _ = ops.layer_norm(x, weight, bias, impl="triton")
    assert_same_bits(y, ops.layer_norm(x.clone(), weight, bias, impl="triton")[0])
    transposed = x.t().contiguous().t()
    assert_same_bits(y, ops.layer_norm(transposed, weight, bias, impl="triton")[0])


@pytest.mark.parametrize("shape", [(0, 64), (64,), (2, 3, 64), (2, 1, 3, 64), (3, 1)])
def test_leading_shapes(shape: tuple[int, ...], guards: Guards) -> None:
    x = torch.randn(shape, device=DEVICE)
    weight, bias = gain_and_shift(shape[-1])
    y, statistics = ops.layer_norm(x, weight, bias, statistics=True, impl="triton")
    assert y.shape == shape
    assert statistics.shape == (*shape[:-1], 1, 2)
    torch.testing.assert_close(y, oracles.layer_norm(x, weight, bias)[0])


def test_a_row_does_not_depend_on_its_batch(guards: Guards) -> None:
    x = hostile_rows(768).half()
    weight, bias = gain_and_shift(768)
    whole, statistics = ops.layer_norm(x, weight, bias, statistics=True, impl="triton")
    for row in range(len(x)):
        alone, alone_statistics = ops.layer_norm(x[row : row + 1], weight, bias, statistics=True, impl="triton")
        assert_same_bits(alone[0], whole[row])
        assert_same_bits(alone_statistics[0], statistics[row])


def test_nan_and_infinity_stay_in_their_row(guards: Guards) -> None:
    x = torch.randn(5, 200, device=DEVICE)
    weight, bias = gain_and_shift(200)
    clean, _ = ops.layer_norm(x, weight, bias, impl="triton")
    x[1, 3], x[3, 199] = float("nan"), float("inf")
    y, _ = ops.layer_norm(x, weight, bias, impl="triton")
    assert_same_bits(y[[0, 2, 4]], clean[[0, 2, 4]])
    assert y[1].isnan().all()
    assert y[3].isnan().all()
