"""Parts of the algorithms that several kernels share, as jit functions."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton import knobs

from .statistics import STATISTICS_TILE
from .targets import Target, has_dependent_launch

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
_SQRT_HALF: tl.constexpr = tl.constexpr(0.7071067811865476)
_QUICK_GELU_SLOPE: tl.constexpr = tl.constexpr(1.702)
_QUICK_GELU_CUBIC: tl.constexpr = tl.constexpr(0.0)
_GELU_TANH_SLOPE: tl.constexpr = tl.constexpr(1.5957691216057308)  # 2 √(2 / π)
_GELU_TANH_CUBIC: tl.constexpr = tl.constexpr(1.5957691216057308 * 0.044715)
TILE: tl.constexpr = tl.constexpr(STATISTICS_TILE)
_SQUARES: tl.constexpr = tl.constexpr(8)  # of columns of a tile, that multiply-adds sum
_TURNS: tl.constexpr = tl.constexpr(4)  # in which a warp of Hopper loads the statistics of its 16 rows

# Abramowitz & Stegun 1964, 7.1.26: erf(z) = 1 − (a₁ t + … + a₅ t⁵) exp(−z²) with t = 1 / (1 + p z), within 1.5e-7.
_ERF_P: tl.constexpr = tl.constexpr(0.3275911)
_ERF_A1: tl.constexpr = tl.constexpr(0.254829592)
_ERF_A2: tl.constexpr = tl.constexpr(-0.284496736)
_ERF_A3: tl.constexpr = tl.constexpr(1.421413741)
_ERF_A4: tl.constexpr = tl.constexpr(-1.453152027)
_ERF_A5: tl.constexpr = tl.constexpr(1.061405429)

_RELEASE = tuple(int(number) for number in triton.__version__.split(".")[:2])


def stages_from_registers(num_stages: int, kind: str, target: Target) -> int:
    """Pipeline stages of a product whose left operand is computed: `num_stages`, or as many as are safe.

    On Hopper such an operand is multiplied from registers, which Triton before 3.9 lets be written over, in a pipeline,
    while the product still reads them (github.com/triton-lang/triton/issues/9433). One stage waits for every product.
    """
    return 1 if target.wgmma and kind != "float32" and _RELEASE < (3, 9) else num_stages


def by_name(target: Target) -> bool:
    """Whether NVIDIA's special functions can be asked for by name: on its GPUs, not in Triton's interpreter."""
    return target.capability is not None and not knobs.runtime.interpret


def dependent_launch(device: torch.device) -> dict[str, bool]:
    """The arguments of a launch on `device` that decide whether it may begin early, see `wait_for_the_last`."""
    if has_dependent_launch(device) and not knobs.runtime.interpret:
        return {"DEPENDENT": True, "launch_pdl": True}
    return {"DEPENDENT": False}


def takes_half(activation: str, dtype: torch.dtype, named: bool) -> bool:
    """Whether all that `activate` needs of its argument is half of it, which is exact. `named` is its BY_NAME."""
    return activation in ("quick_gelu", "gelu_tanh") and dtype == torch.bfloat16 and named


@triton.jit
def wait_for_the_last(DEPENDENT: tl.constexpr):
    """First in every kernel that is launched before the last one has ended (programmatic dependent launch, CUDA C++
    Programming Guide): before it, nothing in global memory may be read or written.

    Blocks of the kernel are so in place when the last one ends, and its own launch costs no time. It waits until the
    last kernel has ended and all that it wrote is seen; that one has waited for the one before it, and so on. Only
    then it lets the next kernel come.
    """
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()  # pyright: ignore
        tl.extra.cuda.gdc_launch_dependents()  # pyright: ignore


@triton.jit
def add_product(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b: one step of a sum that goes on over many. a (M, K), b (K, N), acc (M, N) float32.

    A GPU's product of exact float32 is one chain of K multiply-adds, whose error grows with the chain's length. A step
    is therefore summed from zero and added as a whole.
    """
    if PRECISION == "ieee" and a.dtype == tl.float32:
        # The compiler makes one chain again of a sum, but not of a multiply-add.
        acc = tl.fma(tl.dot(a, b, input_precision=PRECISION), 1.0, acc)
    else:
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def add_product_finely(a, b, acc, lost, PRECISION: tl.constexpr, CHAINS: tl.constexpr):
    """As `add_product`, and in exact float32 more exactly, for CHAINS times the work: acc and what it has lost.

    A step is summed in chains of K / CHAINS products. What adding it to acc rounds away is kept in `lost` (M, N), which
    starts from zero and is added at the end (Knuth, The Art of Computer Programming, 4.2.2, theorem B).
    """
    if PRECISION == "ieee" and a.dtype == tl.float32:
        k = tl.arange(0, a.shape[1])
        step = tl.zeros_like(acc)
        for chain in tl.static_range(CHAINS):  # pyright: ignore
            part = tl.where((k % CHAINS == chain)[None, :], a, 0.0)
            step = tl.fma(tl.dot(part, b, input_precision=PRECISION), 1.0, step)
        total = acc + step
        added = total - acc
        lost += (acc - (total - added)) + (step - added)
        acc = total
    else:
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc, lost


@triton.jit
def rounded_product(a, b):
    """a · b, rounded before anything is added to it.

    The compiler fuses a plain product with the sum that it enters. Where a sum goes over the lanes of a warp, each lane
    would then leave its own product unrounded, and lanes that hold the same sum would disagree in its last bit.
    """
    return tl.fma(a, b, 0.0)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr, dtype: tl.constexpr, BY_NAME: tl.constexpr, HALVED: tl.constexpr):
    """QuickGELU x · σ(1.702 x), GELU x · Φ(x), its approximation by tanh (Hendrycks & Gimpel 2016, section 2), ReLU, or
    x itself.

    x and the value float32; `dtype` is what the value is rounded to next, whose precision is enough; BY_NAME
    whether NVIDIA's special functions can be asked for; HALVED whether half of x is given, see `takes_half`.
    """
    if ACTIVATION == "quick_gelu":
        x = _gated(x, _QUICK_GELU_SLOPE, _QUICK_GELU_CUBIC, dtype, BY_NAME, HALVED)
    elif ACTIVATION == "gelu_tanh":
        if dtype == tl.float32:
            # x σ(u) is x − x σ(−u): of the smaller one little is rounded away. An infinite x has none of it.
            power = tl.exp2(-tl.abs(_odd_cubic(x, _GELU_TANH_SLOPE * LOG2_E, _GELU_TANH_CUBIC * LOG2_E)))
            smaller = power / (1.0 + power)
            tail = tl.where(smaller > 0, x * smaller, 0.0)
            x = tl.where(x < 0, tail, x - tail)
        else:
            x = _gated(x, _GELU_TANH_SLOPE, _GELU_TANH_CUBIC, dtype, BY_NAME, HALVED)
    elif ACTIVATION == "gelu":
        if dtype == tl.float32:
            x = 0.5 * x * (1.0 + tl.erf(x * _SQRT_HALF))
        else:
            z = tl.abs(x) * _SQRT_HALF
            t = _reciprocal(1.0 + z * _ERF_P, BY_NAME)
            polynomial = ((((t * _ERF_A5 + _ERF_A4) * t + _ERF_A3) * t + _ERF_A2) * t + _ERF_A1) * t
            tail = 0.5 * x * (polynomial * tl.exp2(z * z * -LOG2_E))  # x (1 − erf(|x| / √2)) / 2, which is x Φ(−|x|)
            x = tl.where(x < 0, tail, x - tail)
    elif ACTIVATION == "relu":
        x = tl.where(x < 0, 0.0, x)  # a NaN stays one
    return x


@triton.jit
def _gated(
    x, SLOPE: tl.constexpr, CUBIC: tl.constexpr, dtype: tl.constexpr, BY_NAME: tl.constexpr, HALVED: tl.constexpr
):  # fmt: skip
    """x · σ(SLOPE x + CUBIC x³), in the precision of `dtype`; see `activate`."""
    if BY_NAME and dtype == tl.bfloat16:
        # σ(2 u) = (1 + tanh u) / 2. The instruction errs by 2⁻¹¹ at most, a quarter of bfloat16's last place.
        half = x if HALVED else 0.5 * x
        x = half + half * _tanh(_odd_cubic(half, SLOPE, 4.0 * CUBIC))
    else:
        # Far below zero exp2 overflows to infinity and the quotient is −0, the right limit.
        denominator = 1.0 + tl.exp2(_odd_cubic(x, -(SLOPE * LOG2_E), -(CUBIC * LOG2_E)))
        x = x / denominator if dtype == tl.float32 else x * _reciprocal(denominator, BY_NAME)
    return x


@triton.jit
def _odd_cubic(x, LINEAR: tl.constexpr, CUBIC: tl.constexpr):
    """LINEAR x + CUBIC x³. CUBIC x² from the left: with x² first, a tile of 128 × 128 by 4 warps spills in float16."""
    return x * LINEAR if CUBIC == 0.0 else x * (LINEAR + CUBIC * x * x)


@triton.jit
def _tanh(x):
    """tanh x by NVIDIA's instruction, within 2⁻¹¹ of itself (PTX ISA, `tanh`)."""
    return tl.inline_asm_elementwise(
        "tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )  # fmt: skip


@triton.jit
def _reciprocal(x, BY_NAME: tl.constexpr):
    """1 / x for x ≥ 1: by NVIDIA's instruction, within one unit in the last place (PTX ISA, `rcp`), or by division."""
    if BY_NAME:
        inverse = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        inverse = 1.0 / x
    return inverse


@triton.jit
def widened(x, BY_NAME: tl.constexpr):
    """x as float32. Two values of 2 bytes lie in one register, which the compiler would first take apart: by name, each
    is one instruction."""
    if BY_NAME and x.dtype == tl.bfloat16:
        x = tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;",
            "=r,=r,r", [x], dtype=tl.float32, is_pure=True, pack=2,
        )  # fmt: skip
    elif BY_NAME and x.dtype == tl.float16:
        x = tl.inline_asm_elementwise(
            "{ .reg .b16 low, high; mov.b32 {low, high}, $2; cvt.f32.f16 $0, low; cvt.f32.f16 $1, high; }",
            "=r,=r,r", [x], dtype=tl.float32, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        x = x.to(tl.float32)
    return x


@triton.jit
def tile_statistics(x, count, WHOLE: tl.constexpr, WGMMA: tl.constexpr):
    """Mean and sum of squared deviations of each tile of columns.

    x (…, T, STATISTICS_TILE) float32, zero beyond a tile's `count` (T,) of columns; WHOLE where no tile that counts is
    short of columns; WGMMA whether x (S, T, STATISTICS_TILE) lies in registers as Hopper's products leave it -> two
    tensors (…, T).
    """
    if WHOLE:
        mean = tl.sum(x, axis=-1) / TILE
        deviation = x - tl.expand_dims(mean, -1)
    else:
        inside = tl.arange(0, TILE)[None, :] < count[:, None]
        divisor = tl.maximum(count, 1).to(tl.float32)  # a tile that is padding has no columns
        mean = tl.sum(x, axis=-1) / divisor
        deviation = tl.where(inside, x - tl.expand_dims(mean, -1), 0.0)
    m2 = _sum_of_squares(deviation) if WGMMA else tl.sum(rounded_product(deviation, deviation), axis=-1)
    return mean, m2


@triton.jit
def _sum_of_squares(x):
    """The sum of x² over the last axis: (S, T, TILE) -> (S, T).

    A thread has columns 8 apart where Hopper's products left them. Multiply-adds sum the squares of eight such columns.
    """
    parts = split_columns(tl.reshape(x, (x.shape[0] * x.shape[1], TILE)), _SQUARES)
    squares = rounded_product(parts[0], parts[0])
    for part in tl.static_range(1, _SQUARES):  # pyright: ignore
        squares = tl.fma(parts[part], parts[part], squares)
    return tl.reshape(tl.sum(squares, axis=1), (x.shape[0], x.shape[1]))


@triton.jit
def split_columns(x, PARTS: tl.constexpr):
    """x (M, N) as a tuple of PARTS tiles of as many columns, from left to right."""
    if PARTS == 1:
        parts = (x,)
    else:
        left, right = tl.permute(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1)).split()
        parts = split_columns(left, PARTS // 2) + split_columns(right, PARTS // 2)
    return parts


@triton.jit
def merge_statistics(mean, m2, count, width, eps):
    """Row mean and 1 / √(variance + eps) from the statistics of a row's tiles (Chan, Golub & LeVeque 1979, eq. 2.1).

    mean, m2 (M, T), zero where count (T,) is zero -> two tensors (M,).
    """
    count = count.to(tl.float32)[None, :]
    share = 1.0 / width  # a quotient for each row would take three instructions more
    row_mean = rounded_product(tl.sum(rounded_product(count, mean), axis=1), share)
    between = mean - row_mean[:, None]
    row_m2 = tl.sum(tl.fma(count * between, between, m2), axis=1)
    return row_mean, tl.rsqrt(tl.fma(row_m2, share, eps))


@triton.jit
def tile_counts(T: tl.constexpr, width):
    """How many of each tile's columns are a row's own: (T,), STATISTICS_TILE but for the last, zero beyond `width`."""
    return tl.minimum(tl.maximum(width - tl.arange(0, T) * TILE, 0), TILE)


@triton.jit
def store_row_statistics(
    statistics_ptr, y, rows, inside, n0, width, WHOLE: tl.constexpr, WGMMA: tl.constexpr, BY_NAME: tl.constexpr
):  # fmt: skip
    """Writes the statistics of columns n0 to n0 + N of some rows of `width` elements.

    statistics_ptr (M, ⌈width / TILE⌉, 2) float32, contiguous; y (S, N) as it is stored, or (1, N) if all rows are the
    same; rows (S,), written where `inside` (S,); WHOLE where TILE divides the width; WGMMA whether y lies in registers
    as Hopper's products leave it; BY_NAME whether NVIDIA's instructions can be asked for.
    """
    N: tl.constexpr = y.shape[1]
    T: tl.constexpr = N // TILE
    stored = widened(y, BY_NAME)
    if not WHOLE:
        stored = tl.where((n0 + tl.arange(0, N) < width)[None, :], stored, 0.0)
    mean, m2 = tile_statistics(tl.reshape(stored, (y.shape[0], T, TILE)), tile_counts(T, width - n0), WHOLE, WGMMA)
    tiles = (width + TILE - 1) // TILE
    tile = n0 // TILE + tl.arange(0, T)
    address = statistics_ptr + (rows[:, None].to(tl.int64) * tiles + tile[None, :]) * 2
    address = address[:, :, None] + tl.arange(0, 2)[None, None, :]
    tl.store(address, tl.join(mean, m2), mask=(inside[:, None] & (tile < tiles)[None, :])[:, :, None])


@triton.jit
def load_row_statistics(
    statistics_ptr, rows, row_steps, inside, width, eps, T: tl.constexpr, STEP: tl.constexpr, WGMMA: tl.constexpr
):  # fmt: skip
    """Mean and 1 / √(variance + eps) of some rows of `width` elements, from the statistics of their tiles.

    statistics_ptr (M, ⌈width / TILE⌉, 2) float32, a row contiguous and row_steps · STEP numbers from the next; rows
    (S,), read where `inside` (S,); T the number of tiles, rounded up to a power of two; STEP, 2 or 4, divides a row's
    numbers, and a load takes as many at a time; WGMMA whether Hopper's products need the result -> two tensors (S,).
    """
    # Hopper's products leave 16 rows to each warp. Of what is loaded a warp gets 4 rows, then 4 behind those of all the
    # others. Loaded in that order, its rows are those of its product: no result changes warps.
    WARPS: tl.constexpr = rows.shape[0] // 16 if WGMMA else 1  # pyright: ignore
    rows, inside = _interleaved(rows, WARPS, _TURNS), _interleaved(inside, WARPS, _TURNS)
    # (S, 2 T), as it lies in memory: the lanes of a warp then share rows, and a load is of neighbours.
    number = tl.arange(0, 2 * T)
    address = statistics_ptr + rows[:, None].to(tl.int64) * row_steps * STEP + number[None, :]
    mask = inside[:, None] & (number < 2 * tl.cdiv(width, TILE) // STEP * STEP)[None, :]
    pairs = tl.reshape(tl.load(address, mask=mask, other=0.0), (rows.shape[0], T, 2))
    mean, m2 = pairs.split()
    mean, rstd = merge_statistics(mean, m2, tile_counts(T, width), width, eps)
    return _interleaved(mean, _TURNS, WARPS), _interleaved(rstd, _TURNS, WARPS)


@triton.jit
def _interleaved(x, GROUPS: tl.constexpr, PARTS: tl.constexpr):
    """x (S,), GROUPS of PARTS of neighbours, with the first parts of all groups first, then the second ones, and so on.

    With the two numbers exchanged it gives x back.
    """
    if GROUPS > 1 and PARTS > 1:
        apart = tl.reshape(x, (GROUPS, PARTS, x.shape[0] // (GROUPS * PARTS)))
        x = tl.reshape(tl.permute(apart, (1, 0, 2)), (x.shape[0],))
    return x


@triton.jit
def online_softmax_update(score, scale, running_max, running_sum):
    """One step of a softmax whose scores come in tiles (Milakov & Gimelshein 2018, algorithm 3), in base 2.

    score (M, S), to be multiplied by scale > 0, running_max and running_sum (M,) -> probabilities relative to the new
    maximum (M, S), the factor that brings what was summed before to it (M,), the new maximum and the new sum.
    """
    new_max = tl.maximum(running_max, tl.max(score, axis=1) * scale)
    p = tl.exp2(tl.fma(score, scale, -new_max[:, None]))
    rescale = tl.exp2(running_max - new_max)
    return p, rescale, new_max, running_sum * rescale + tl.sum(p, axis=1)
