"""Every implementation of a convolution, against plain PyTorch in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from random_towers import relative_error

from clip_fast import pytorch
from clip_fast.kernels import ops, targets
from clip_fast.towers import convolution, cpu
from clip_fast.towers.convolution import Convolution
from clip_fast.towers.cpu import can_fuse
from clip_fast.towers.precision import BY_DTYPE

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
GEOMETRIES = [(1, 1, None), (3, 1, None), (3, 2, None), (3, 2, 0)]  # size, stride, padding


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "stride", "padding"), GEOMETRIES)
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("added", [True, False])
@pytest.mark.parametrize("way", ["libraries", "kernels' oracles", "plain"])
def test_convolution(
    size: int,
    stride: int,
    padding: int | None,
    relu: bool,
    added: bool,
    dtype: torch.dtype,
    way: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if way == "kernels' oracles":
        monkeypatch.setattr(convolution, "by_kernels", lambda weight: True)
    if way == "libraries" and not can_fuse(dtype):
        pytest.skip(f"no library fuses {dtype} here: this is the plain way")
    if way == "plain":
        monkeypatch.setattr(convolution, "can_fuse", lambda dtype: False)
    channels_last = torch.channels_last
    x = torch.randn(2, 24, 9, 9).to(dtype).contiguous(memory_format=channels_last)
    weight, bias = torch.randn(40, 24, size, size).to(dtype) / (5 * size), torch.randn(40).double()
    scale = torch.randn(40).double()
    pad = size // 2 if padding is None else padding
    exact = F.conv2d(x.double(), weight.double(), None, stride, pad) * scale[:, None, None] + bias[:, None, None]
    plain = F.conv2d(x, weight * scale[:, None, None, None].to(dtype), bias.to(dtype), stride, pad)
    residual = None
    if added:
        residual = torch.randn(plain.shape).to(dtype).contiguous(memory_format=channels_last)
        exact, plain = exact + residual.double(), plain + residual
    if relu:
        exact, plain = exact.relu(), plain.relu()
    with torch.inference_mode():
        got = Convolution(weight, scale, bias, BY_DTYPE[dtype], stride=stride, padding=padding, relu=relu)(x, residual)
    assert got.dtype == dtype
    assert got.is_contiguous(memory_format=channels_last)
    # In float32 and float64 the bound is a random walk with a rounding for each term: a library sums in its own order.
    terms = 24 * size**2 + 2
    walk = terms**0.5 * torch.finfo(dtype).eps
    wide = dtype.itemsize >= 4
    assert relative_error(got, exact) <= (walk if wide else 1.2 * relative_error(plain, exact))


@pytest.mark.skipif(not can_fuse(torch.float32), reason="no oneDNN")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1, 3])
def test_half_weights_that_multiply_slowly_stay_as_they_are(
    size: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "multiplies_fast", lambda asked: asked.itemsize >= 4)
    monkeypatch.setattr(cpu, "can_pack_for_mkl", lambda: True)
    weight, bias, scale = torch.randn(40, 24, size, size).to(dtype), torch.randn(40).double(), torch.randn(40).double()
    given = weight.clone()
    half = Convolution(weight, scale, bias, BY_DTYPE[torch.float32])
    wide = Convolution(weight.float(), scale, bias, BY_DTYPE[torch.float32])
    for batch in (1, 3):
        x = torch.randn(batch, 24, 9, 9).contiguous(memory_format=torch.channels_last)
        assert relative_error(half(x), wide(x)) < 2 * torch.finfo(torch.float32).eps
    assert half._packed is None
    assert wide._packed
    assert torch.equal(weight, given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_table_says_whose_a_pointwise_convolution_is(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convolution, "by_kernels", lambda weight: True)
    products: list[torch.Tensor] = []
    linear = ops.linear
    monkeypatch.setattr(ops, "linear", lambda x, *rest, **options: products.append(x) or linear(x, *rest, **options))
    x = torch.randn(2, 8, 4, 4).to(dtype).contiguous(memory_format=torch.channels_last)
    operands = (torch.randn(16, 8, 1, 1).to(dtype), torch.ones(16).double(), torch.zeros(16).double(), BY_DTYPE[dtype])
    wanted = Convolution(*operands)(x)
    assert len(products) == 1
    monkeypatch.setitem(targets.POINTWISE, targets.kind_of(dtype, "ieee"), "cudnn")
    assert relative_error(Convolution(*operands)(x), wanted) < 2 * torch.finfo(dtype).eps
    assert len(products) == 1


@pytest.mark.skipif(not can_fuse(torch.float32), reason="no oneDNN")
@pytest.mark.parametrize("alike", [True, False])
def test_layouts_that_are_alike_are_kept_once(alike: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convolution, "by_kernels", lambda weight: False)
    operands = torch.randn(40, 24, 3, 3), torch.randn(40).double(), torch.randn(40).double()
    packed = [
        pytorch.reorder_convolution_weight(torch.randn(40, 24, k, k), [0, 0], [1, 1], [1, 1], 1, [2, 24, 9, 9])
        for k in (1, 3)
    ]
    assert pytorch.same_layout(packed[0], packed[0])
    assert not pytorch.same_layout(*packed)
    monkeypatch.setattr(pytorch, "same_layout", lambda one, other: alike)
    one = Convolution(*operands, BY_DTYPE[torch.float32])
    for batch in (1, 2, 1, 3):
        one(torch.randn(batch, 24, 9, 9).contiguous(memory_format=torch.channels_last))
    assert len({id(layout) for layout in (one._packed or {}).values()}) == (1 if alike else 2)
