"""The checks of every kernel test: accuracy is judged in float64, and a kernel touches nothing that is not its own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from clip_fast.kernels.statistics import STATISTICS_TILE, row_statistics

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# For a test of whole towers: the interpreter takes longest for exact products of float32.
SLOW_IN_FLOAT32 = (*DTYPES[:2], pytest.param(torch.float32, marks=pytest.mark.slow))
# For whole towers beside one that is interpreted in every dtype: each of their kernels has tests of its own in all.
ONE_INTERPRETED = DTYPES if DEVICE.type == "cuda" else (torch.bfloat16,)
GUARD = 1024  # poisoned elements on each side of a guarded tensor; a multiple of 16 bytes in every dtype


def assert_as_accurate(kernel: Tensor, plain: Tensor, exact: Tensor, factor: float = 1.2) -> None:
    """`kernel` errs from `exact` (float64) at most `factor` times as much as `plain`, its twin in the same dtype.

    The error is the root mean square over all elements. The ratio of two such errors of n elements each is itself
    uncertain by 1 / √n, and the bound has four times that beside `factor`. So that one bad row among many cannot hide,
    the worst row's error is checked too. Its bound is three times the twin's: among sound kernels the ratio of two
    maxima of some hundred rows reaches 2.1 once in a hundred draws. If the twin happens to be exact, the bound is the
    error of rounding the exact result to the dtype.
    """
    assert kernel.shape == plain.shape == exact.shape
    assert kernel.dtype == plain.dtype
    assert exact.dtype == torch.float64
    assert torch.isfinite(exact).all(), "the oracle itself is not finite: the inputs are no test of accuracy"
    assert torch.isfinite(kernel).all(), f"{(~torch.isfinite(kernel)).sum()} of {kernel.numel()} are not finite"
    errors = [x.double() - exact for x in (kernel, plain, exact.to(kernel.dtype))]
    luck = 1 + 4 / exact.numel() ** 0.5
    for name, measure, limit in (("overall", rms, factor * luck), ("worst row", _worst_row, 3.0)):
        got, *others = (measure(error).item() for error in errors)
        assert got <= limit * max(others), f"{name} error {got:.3e}, at most {limit * max(others):.3e} wanted"


def assert_statistics_of(statistics: Tensor, y: Tensor) -> None:
    """`statistics` are the row statistics of `y` as stored, as accurately as plain PyTorch computes them in float32.

    Means count relative to their tile's mean magnitude, squared deviations relative to themselves. The root mean square
    of n errors is itself uncertain by 1 / √(2n): the bound has four times that, so that three rows may be unlucky.
    """
    exact, plain = row_statistics(y.double()), row_statistics(y)
    assert statistics.shape == plain.shape
    assert statistics.dtype == plain.dtype
    tiles = y.double().abs().split(STATISTICS_TILE, dim=-1)
    magnitude = torch.stack([tile.mean(dim=-1) for tile in tiles], dim=-1)
    scale = torch.stack([magnitude, exact[..., 1]], dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
    got, twin = (rms((x.double() - exact) / scale).item() for x in (statistics, plain))
    luck = 1 + 4 / (2 * exact.numel()) ** 0.5
    bound = 1.2 * luck * max(twin, torch.finfo(torch.float32).eps / 2)
    assert got <= bound, f"row statistics: relative error {got:.3e}, at most {bound:.3e} wanted"


def rms(error: Tensor) -> Tensor:
    return error.square().mean().sqrt()


def _worst_row(error: Tensor) -> Tensor:
    return error.square().mean(dim=-1).sqrt().max()


def assert_same_bits(a: Tensor, b: Tensor) -> None:
    """`a` and `b` are equal bit for bit. A NaN equals the same NaN."""
    assert a.shape == b.shape
    assert a.dtype == b.dtype
    assert torch.equal(bits(a), bits(b)), f"{(bits(a) != bits(b)).sum()} bytes differ"


def bits(x: Tensor) -> Tensor:
    return x.detach().flatten().view(torch.uint8)  # flattened, since a scalar has no such view


def poison(buffer: Tensor) -> Tensor:
    """Fills `buffer` with a value that shows when it is read: NaN, or the largest integer."""
    return buffer.fill_(float("nan") if buffer.is_floating_point() else torch.iinfo(buffer.dtype).max)


class Guards:
    """Tensors inside larger poisoned buffers, and the check that nothing around them was changed."""

    def __init__(self) -> None:
        self._checks: list[Callable[[], None]] = []

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A contiguous poisoned tensor with a guard band before and after."""
        size = torch.Size(shape).numel()
        buffer = poison(torch.empty(size + 2 * GUARD, dtype=dtype, device=device))
        before = buffer.clone()

        def check() -> None:
            for name, part in (("before", slice(0, GUARD)), ("after", slice(GUARD + size, None))):
                assert torch.equal(bits(buffer[part]), bits(before[part])), f"written {name} a tensor of {shape}"

        self._checks.append(check)
        return buffer[GUARD : GUARD + size].view(shape)

    def copy(self, x: Tensor, gap: int = 0) -> Tensor:
        """`x` with guard bands around it and, if asked for, `gap` poisoned elements after every row."""
        whole = self.empty((*x.shape[:-1], x.shape[-1] + gap), x.dtype, x.device)
        view = whole[..., : x.shape[-1]]
        view.copy_(x)
        before = whole.clone()

        def check() -> None:
            assert torch.equal(bits(whole), bits(before)), f"an input of {list(x.shape)} was changed"

        self._checks.append(check)
        return view

    def check(self) -> None:
        """Raises AssertionError if an input, or anything outside the handed-out tensors, has changed."""
        for check in self._checks:
            check()
