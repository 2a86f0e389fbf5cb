"""`flash_attention` against its oracle in float64."""

from __future__ import annotations

import math

import pytest
import torch
from kernel_checks import DEVICE, DTYPES, Guards, assert_as_accurate, assert_same_bits
from torch import Tensor

from clip_fast.kernels import flash_attention, ops, oracles
from clip_fast.kernels.dispatch import Impl
from clip_fast.kernels.launches import TABLE
from clip_fast.kernels.targets import TARGETS

# Tokens, heads, head_dim: ViT-B/32, B/16, L/14, L/14@336px; H, g, bigG and SO400M; one token, around a tile, a prime.
SHAPES = (
    (50, 2, 64), (197, 1, 64), (257, 1, 64), (577, 1, 64), (257, 1, 80), (50, 2, 88), (197, 1, 104),
    (200, 2, 72), (1, 2, 72), (1, 2, 64), (2, 3, 80), (63, 1, 64), (64, 1, 64), (65, 1, 64), (66, 1, 104), (129, 1, 64),
    (67, 3, 40), (33, 1, 8), (70, 2, 66), (33, 2, 65), (70, 2, 96), (64, 1, 97), (31, 2, 128),
)  # fmt: skip


def random_qkv(batch: int, tokens: int, heads: int, head_dim: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(batch, tokens, 3, heads, head_dim, dtype=torch.float64, device=DEVICE).to(dtype)


def check(qkv: Tensor, scale: float, guards: Guards) -> None:
    out = ops.flash_attention(guards.copy(qkv), scale, impl="triton")
    assert_as_accurate(out, oracles.flash_attention(qkv, scale), oracles.flash_attention(qkv.double(), scale))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_accuracy(shape: tuple[int, int, int], dtype: torch.dtype, guards: Guards, launches: list[str]) -> None:
    tokens, heads, _ = shape
    batch = 1 if tokens > 100 else math.ceil(400 / (tokens * heads))  # of few rows the error is no steady statistic
    check(random_qkv(batch, *shape, dtype), shape[-1] ** -0.5, guards)
    assert launches == ["_flash_attention_kernel"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dominant", [0, 40, 69])
def test_one_key_outshines_the_rest(dominant: int, dtype: torch.dtype, guards: Guards) -> None:
    """The key is in the narrow tile of keys that comes first, in the middle, or at the last patch.

    A wrong running maximum would over- or underflow.
    """
    qkv = random_qkv(2, 70, 1, 64, dtype)
    qkv[:, :, 0] += 1
    qkv[:, dominant, 1] += 12
    check(qkv, 0.125, guards)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("magnitude", [16, 30])
def test_scores_that_overflow_without_the_running_maximum(magnitude: int, dtype: torch.dtype, guards: Guards) -> None:
    """q kᵀ reaches ±10⁴ and ±3 · 10⁴. Past 65504 the twin's own scores would be infinite in float16.

    Keys come in pairs that score nearly alike. Among random keys a single one wins nearly every row, and the few rows
    where two are close would hold all of the error. The scale is not a power of two, so that the twin rounds the scaled
    scores too. With a power of two the kernel rounds once more than the twin, since it multiplies by log2 e: in float32
    it errs 1.3 times as much. Both keys of a pair are patches.
    """
    qkv = torch.randn(1, 131, 3, 8, 64, dtype=torch.float64, device=DEVICE)
    qkv[:, :, :2] *= magnitude
    qkv[:, 2::2, 1] = qkv[:, 1::2, 1].clone()
    qkv[:, 1:, 1, :, 0] /= magnitude**2  # tells a pair's keys apart, by a score of about one
    qkv[:, 2::2, 1, :, 0] *= -1
    check(qkv.to(dtype), 0.3, guards)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "hostility", ["outlier channels", "outlier channels of keys", "values far from zero", "equal keys", "tiny"]
)
def test_hostile_inputs(hostility: str, dtype: torch.dtype, guards: Guards) -> None:
    qkv = random_qkv(4, 70, 2, 80, dtype)
    if hostility == "outlier channels":
        qkv[:, :, 2, :, ::17] *= 300
    elif hostility == "outlier channels of keys":
        qkv[:, :, 1, :, ::17] *= 100  # more would leave all of the error to the few rows where two keys are close
    elif hostility == "values far from zero":
        qkv[:, :, 2] += 100
    elif hostility == "equal keys":
        qkv[:, :, 1] = qkv[:, :1, 1].clone()
    else:
        qkv *= 1e-3
    check(qkv, 80**-0.5, guards)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "head_dim"), [(50, 64), (65, 64), (65, 72)])
def test_an_image_does_not_depend_on_its_batch(tokens: int, head_dim: int, dtype: torch.dtype) -> None:
    qkv = random_qkv(5, tokens, 2, head_dim, dtype)
    whole = ops.flash_attention(qkv, 0.125, impl="triton")
    for images in (slice(0, 1), slice(3, 4), slice(2, 5), torch.tensor([4, 0, 2], device=DEVICE)):
        assert_same_bits(ops.flash_attention(qkv[images].contiguous(), 0.125, impl="triton"), whole[images])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 72, 104])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_stays_in_its_image_and_head(bad: float, head_dim: int, dtype: torch.dtype, guards: Guards) -> None:
    """A head of 72 is padded to 80 or 96 lanes, one of 104 to 128.

    The added lanes lie in the next head, and its values must not enter.
    """
    qkv = random_qkv(3, 70, 2, head_dim, dtype)
    clean = ops.flash_attention(qkv, 0.125, impl="triton").unflatten(-1, (2, head_dim))
    qkv[1, 69, :, 1, 5] = bad
    out = ops.flash_attention(guards.copy(qkv), 0.125, impl="triton").unflatten(-1, (2, head_dim))
    assert_same_bits(out[[0, 2]], clean[[0, 2]])
    assert_same_bits(out[1, :, 0], clean[1, :, 0])
    assert not out[1, :, 1].isfinite().all()


HALF, FLOAT = torch.float16, torch.float32


@pytest.mark.parametrize(
    ("head_dim", "dtype", "arch", "wanted"),
    [(40, HALF, "sm_90", (64, 0)), (64, HALF, "sm_90", (64, 0)), (65, HALF, "sm_90", (64, 16)),
     (80, HALF, "sm_90", (64, 16)), (81, HALF, "sm_90", (64, 32)), (96, HALF, "sm_90", (64, 32)),
     (97, HALF, "sm_90", (128, 0)), (72, HALF, "sm_80", (64, 16)), (72, FLOAT, "sm_80", (64, 32)),
     (72, HALF, "gfx942", (128, 0)), (72, FLOAT, "gfx942", (128, 0))],
)  # fmt: skip
def test_the_parts_of_a_head(head_dim: int, dtype: torch.dtype, arch: str, wanted: tuple[int, int]) -> None:
    target = TARGETS[arch]
    launch, *columns = flash_attention._parts(head_dim, dtype, target, "ieee")
    assert tuple(columns) == wanted
    entry = f"flash_attention_{wanted[0]}"
    assert TABLE.launches_for(entry, dtype, target, "ieee") == (launch,)
    if wanted[1]:  # 16 bytes for each thread
        assert wanted[1] * dtype.itemsize * launch.block_n >= 16 * 32 * launch.num_warps


def test_strides_of_any_kind_and_no_images(guards: Guards) -> None:
    qkv = random_qkv(2, 20, 2, 64, torch.float16)
    apart = qkv.permute(1, 3, 2, 4, 0).contiguous().permute(4, 0, 2, 1, 3)
    wanted = ops.flash_attention(qkv, 0.125, impl="triton")
    assert_same_bits(ops.flash_attention(apart, 0.125, impl="triton"), wanted)
    assert ops.flash_attention(qkv[:0], 0.125, impl="triton").shape == (0, 20, 128)


@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize("scale", [0.0, -0.125, float("nan")])
def test_a_scale_is_positive(scale: float, impl: Impl) -> None:
    """The kernel takes the maximum before it scales."""
    with pytest.raises(ValueError, match="scale must be positive, got"):
        ops.flash_attention(random_qkv(1, 9, 2, 64, torch.float16), scale, impl=impl)


# --- which implementation runs, and PyTorch sees through the op ------------------------------------------------------


@pytest.mark.parametrize(("head_dim", "dtype"), [(64, torch.float64), (136, torch.float16)])
def test_what_no_kernel_serves(head_dim: int, dtype: torch.dtype, launches: list[str]) -> None:
    qkv = random_qkv(2, 9, 2, head_dim, dtype)
    with pytest.raises(RuntimeError, match="float64" if dtype == torch.float64 else "136"):
        ops.flash_attention(qkv, 0.125, impl="triton")
    assert_same_bits(ops.flash_attention(qkv, 0.125), oracles.flash_attention(qkv, 0.125))
    assert launches == []


@pytest.mark.parametrize("head_dim", [64, 40, 72])
def test_opcheck(head_dim: int, launches: list[str]) -> None:
    qkv = random_qkv(2, 20, 2, head_dim, torch.float32)
    torch.library.opcheck(torch.ops.clip_fast.flash_attention.default, (qkv, 0.125, "ieee"))
    assert set(launches) == {"_flash_attention_kernel"}


class Attention(torch.nn.Module):
    def forward(self, qkv: Tensor) -> Tensor:
        return 2 * ops.flash_attention(qkv, 0.125)


@pytest.mark.parametrize("dtype", DTYPES)
def test_compile_and_export(dtype: torch.dtype, launches: list[str]) -> None:
    qkv = random_qkv(2, 20, 2, 64, dtype)
    eager = Attention()(qkv)
    compiled = torch.compile(Attention(), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert_same_bits(compiled(qkv), eager)
        assert_same_bits(torch.export.export(Attention(), (qkv,)).module()(qkv), eager)
    assert launches == ["_flash_attention_kernel"] * 3
