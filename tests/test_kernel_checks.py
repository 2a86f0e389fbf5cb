"""The checks that kernels are held to, held to account: each must fail where a kernel would be wrong."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import DEVICE, GUARD, Guards, assert_as_accurate, assert_same_bits, assert_statistics_of
from torch import Tensor

from clip_fast.kernels.statistics import row_statistics


@pytest.fixture
def results() -> tuple[Tensor, Tensor]:
    """A result in float64, and the twin's in float16."""
    exact = torch.randn(1000, 64, dtype=torch.float64, device=DEVICE)
    return (exact + 1e-3 * torch.randn_like(exact)).half(), exact


def test_as_accurate_as_the_twin_passes(results: tuple[Tensor, Tensor]) -> None:
    plain, exact = results
    assert_as_accurate(plain.clone(), plain, exact)
    assert_as_accurate((exact + 1.1e-3 * torch.randn_like(exact)).half(), plain, exact)
    assert_as_accurate(exact.half(), exact.half(), exact)


def test_a_larger_error_fails(results: tuple[Tensor, Tensor]) -> None:
    plain, exact = results
    with pytest.raises(AssertionError, match="overall error"):
        assert_as_accurate((exact + 1.5e-3 * torch.randn_like(exact)).half(), plain, exact)


def test_one_bad_row_among_many_fails(results: tuple[Tensor, Tensor]) -> None:
    plain, exact = results
    kernel = plain.clone()
    kernel[500] += 5e-3
    with pytest.raises(AssertionError, match="worst row error"):
        assert_as_accurate(kernel, plain, exact)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_fails(bad: float, results: tuple[Tensor, Tensor]) -> None:
    plain, exact = results
    kernel = plain.clone()
    kernel[3, 4] = bad
    with pytest.raises(AssertionError, match="1 of 64000 are not finite"):
        assert_as_accurate(kernel, plain, exact)
    with pytest.raises(AssertionError, match="oracle itself is not finite"):
        assert_as_accurate(plain, plain, exact * bad)


def test_another_shape_or_dtype_fails(results: tuple[Tensor, Tensor]) -> None:
    plain, exact = results
    with pytest.raises(AssertionError):
        assert_as_accurate(plain[:-1], plain, exact)
    with pytest.raises(AssertionError):
        assert_as_accurate(plain.float(), plain, exact)


def test_bits_are_compared_not_values() -> None:
    x = torch.tensor([0.0, float("nan"), 1.0])
    assert_same_bits(x, x.clone())
    with pytest.raises(AssertionError, match="bytes differ"):
        assert_same_bits(x, torch.tensor([-0.0, float("nan"), 1.0]))


def test_statistics_of_another_kind_fail() -> None:
    y = torch.randn(50, 128, device=DEVICE) + 100
    good = row_statistics(y)
    assert_statistics_of(good, y)
    unbiased = good * torch.tensor([1, 64 / 63], device=DEVICE)
    tiles = y.unflatten(1, (2, 64))
    of_squares = torch.stack([tiles.mean(2), (tiles.square().mean(2) - tiles.mean(2).square()) * 64], dim=-1)
    for bad in (unbiased, of_squares):
        with pytest.raises(AssertionError, match="row statistics"):
            assert_statistics_of(bad, y)


@pytest.mark.parametrize("offset", [-1, -GUARD, 6, 5 + GUARD])
def test_a_write_beside_an_output_is_seen(offset: int) -> None:
    guards = Guards()
    out = guards.empty((2, 3), torch.float16, DEVICE)
    assert out.isnan().all()
    out.zero_()
    guards.check()
    out.as_strided((1,), (1,), out.storage_offset() + offset).fill_(1)
    with pytest.raises(AssertionError, match=r"written (before|after) a tensor"):
        guards.check()


def test_a_write_to_an_input_or_its_gaps_is_seen() -> None:
    for where in (0, 4):
        guards = Guards()
        x = guards.copy(torch.ones(2, 3, device=DEVICE), gap=2)
        assert x.equal(torch.ones(2, 3, device=DEVICE))
        assert x.stride() == (5, 1)
        assert x.as_strided((2,), (1,), x.storage_offset() + 3).isnan().all()
        guards.check()
        x.as_strided((1,), (1,), x.storage_offset() + where).fill_(7)
        with pytest.raises(AssertionError, match=r"an input of .* was changed"):
            guards.check()
