"""Single instructions against known results."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from .commands import require_emulator
from .program import Unsupported
from .single import ARRAYS, evaluate, generator, run

Values = np.ndarray


@pytest.fixture(autouse=True)
def _emulator() -> None:
    require_emulator(triton=False)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with np.errstate(all="ignore"):
        yield


def _operand(kind: str) -> Values:
    """Random numbers of a type, with those among them that are easily got wrong."""
    dtype = np.dtype(ARRAYS[kind])
    if dtype.kind == "f":
        x = generator().standard_normal(32) * 10.0 ** generator().integers(-3, 4, 32)
        x[:6] = 0.0, -0.0, np.inf, -np.inf, np.nan, 1.0
        return x.astype(dtype)
    raw = np.frombuffer(generator().bytes(32 * dtype.itemsize), dtype).copy()
    raw[:4] = 0, 1, np.iinfo(dtype).max, np.iinfo(dtype).min
    generator().shuffle(raw)
    return raw


def _wide(f: Callable[..., object], result: str) -> Callable[..., Values]:
    """f over Python's integers, which have no width, cut to that of the result."""
    bits = 8 * np.dtype(ARRAYS[result]).itemsize

    def cut(*operands: Values) -> Values:
        rows = zip(*(x.tolist() for x in operands), strict=True)
        raw = [int(f(*row)) & ((1 << bits) - 1) for row in rows]  # type: ignore[call-overload]
        return np.array(raw, f"u{bits // 8}").view(ARRAYS[result])

    return cut


def _fma(x: Values, y: Values, z: Values) -> Values:
    """In float64, where the product of two float32 is exact; an error of the sum is rounded away almost always."""
    return (x.astype(np.float64) * y + z).astype(np.float32)


_INTEGERS = {
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "mul.lo": lambda x, y: x * y,
    "min": min,
    "max": max,
}
_TABLE: list[tuple[str, str, Callable[..., object]]] = [
    (f"{name}.{kind} {{d}}, {{a}}, {{b}}", f"{kind} {kind} {kind}", f)
    for name, f in _INTEGERS.items()
    for kind in ("u16", "s16", "u32", "s32", "u64", "s64")
]
_TABLE += [
    (f"mul.hi.{kind} {{d}}, {{a}}, {{b}}", f"{kind} {kind} {kind}", lambda x, y, bits=int(kind[1:]): x * y >> bits)
    for kind in ("u32", "s32", "u64", "s64")
]
_TABLE += [
    ("mul.wide.s32 {d}, {a}, {b}", "s64 s32 s32", lambda x, y: x * y),
    ("mul.wide.u16 {d}, {a}, {b}", "u32 u16 u16", lambda x, y: x * y),
    ("mad.lo.s32 {d}, {a}, {b}, {c}", "s32 s32 s32 s32", lambda x, y, z: x * y + z),
    ("mad.wide.u32 {d}, {a}, {b}, {c}", "u64 u32 u32 u64", lambda x, y, z: x * y + z),
    ("and.b32 {d}, {a}, {b}", "b32 b32 b32", lambda x, y: x & y),
    ("or.b64 {d}, {a}, {b}", "b64 b64 b64", lambda x, y: x | y),
    ("xor.b16 {d}, {a}, {b}", "b16 b16 b16", lambda x, y: x ^ y),
    ("not.b32 {d}, {a}", "b32 b32", lambda x: ~x),
    ("neg.s32 {d}, {a}", "s32 s32", lambda x: -x),
    ("abs.s32 {d}, {a}", "s32 s32", abs),
    ("shl.b32 {d}, {a}, 5", "b32 b32", lambda x: x << 5),
    ("shl.b32 {d}, {a}, 40", "b32 b32", lambda x: 0),
    ("shr.u32 {d}, {a}, 5", "u32 u32", lambda x: x >> 5),
    ("shr.s32 {d}, {a}, 5", "s32 s32", lambda x: x >> 5),
    ("shr.s32 {d}, {a}, 99", "s32 s32", lambda x: -1 if x < 0 else 0),
    ("shr.s64 {d}, {a}, 33", "s64 s64", lambda x: x >> 33),
    ("div.s32 {d}, {a}, 7", "s32 s32", lambda x: int(abs(x) // 7 * (1 if x > 0 else -1))),
    ("rem.u32 {d}, {a}, 7", "u32 u32", lambda x: x % 7),
    ("bfe.u32 {d}, {a}, 7, 9", "u32 u32", lambda x: x >> 7 & 511),
    ("bfe.s32 {d}, {a}, 7, 9", "s32 s32", lambda x: (x >> 7 & 511) - (512 if x >> 15 & 1 else 0)),
    ("bfi.b32 {d}, {a}, {b}, 4, 8", "b32 b32 b32", lambda x, y: (y & ~0xFF0) | (x & 255) << 4),
    ("popc.b32 {d}, {a}", "u32 b32", lambda x: x.bit_count()),
    ("clz.b32 {d}, {a}", "u32 b32", lambda x: 32 - x.bit_length()),
    ("brev.b32 {d}, {a}", "b32 b32", lambda x: int(f"{x:032b}"[::-1], 2)),
    ("prmt.b32 {d}, {a}, {b}, 0x5410", "b32 b32 b32", lambda x, y: (x & 0xFFFF) | (y & 0xFFFF) << 16),
    ("prmt.b32 {d}, {a}, {b}, 0x7632", "b32 b32 b32", lambda x, y: x >> 16 | (y >> 16) << 16),
    ("lop3.b32 {d}, {a}, {b}, {c}, 0xE8", "b32 b32 b32 b32", lambda x, y, z: (x & y) | (x & z) | (y & z)),
    ("lop3.b32 {d}, {a}, {b}, {c}, 0x1B", "b32 b32 b32 b32", lambda x, y, z: _looked_up(x, y, z, 0x1B)),
    ("shf.l.wrap.b32 {d}, {a}, {b}, 9", "b32 b32 b32", lambda x, y: y << 9 | x >> 23),
    ("shf.r.wrap.b32 {d}, {a}, {b}, 9", "b32 b32 b32", lambda x, y: x >> 9 | y << 23),
    ("cvt.u64.u32 {d}, {a}", "u64 u32", lambda x: x),
    ("cvt.s64.s32 {d}, {a}", "s64 s32", lambda x: x),
    ("cvt.u32.u16 {d}, {a}", "u32 u16", lambda x: x),
    ("cvt.u16.u32 {d}, {a}", "u16 u32", lambda x: x),
    ("cvt.s32.s8 {d}, {a}", "s32 s32", lambda x: (x & 255) - 256 * (x >> 7 & 1)),
    ("add.s16x2 {d}, {a}, {b}", "b32 b32 b32", lambda x, y: (x + y & 0xFFFF) | ((x >> 16) + (y >> 16)) << 16),
]


def _looked_up(x: int, y: int, z: int, table: int) -> int:
    bits = ((table >> (4 * (x >> i & 1) + 2 * (y >> i & 1) + (z >> i & 1)) & 1) << i for i in range(32))
    return sum(bits)


@pytest.mark.parametrize(("instruction", "types", "f"), _TABLE, ids=lambda x: x if isinstance(x, str) else "")
def test_integers(instruction: str, types: str, f: Callable[..., object]) -> None:
    result, *kinds = types.split()
    operands = [_operand(kind) for kind in kinds]
    np.testing.assert_array_equal(evaluate(instruction, types, *operands), _wide(f, result)(*operands))


_FLOATS: list[tuple[str, str, Callable[..., Values]]] = [
    ("add.f32 {d}, {a}, {b}", "f32 f32 f32", np.add),
    ("sub.f32 {d}, {a}, {b}", "f32 f32 f32", np.subtract),
    ("mul.f32 {d}, {a}, {b}", "f32 f32 f32", np.multiply),
    ("div.full.f32 {d}, {a}, {b}", "f32 f32 f32", np.divide),
    ("fma.rn.f32 {d}, {a}, {b}, {c}", "f32 f32 f32 f32", _fma),
    ("min.f32 {d}, {a}, {b}", "f32 f32 f32", np.fmin),
    ("max.f32 {d}, {a}, {b}", "f32 f32 f32", np.fmax),
    ("max.NaN.f32 {d}, {a}, {b}", "f32 f32 f32", np.maximum),
    ("neg.f32 {d}, {a}", "f32 f32", np.negative),
    ("abs.f32 {d}, {a}", "f32 f32", np.abs),
    ("ex2.approx.f32 {d}, {a}", "f32 f32", lambda x: np.exp2(x.astype(np.float64)).astype(np.float32)),
    ("rcp.approx.f32 {d}, {a}", "f32 f32", lambda x: (1 / x.astype(np.float64)).astype(np.float32)),
    ("rsqrt.approx.f32 {d}, {a}", "f32 f32", lambda x: (1 / np.sqrt(x.astype(np.float64))).astype(np.float32)),
    ("add.f64 {d}, {a}, {b}", "f64 f64 f64", np.add),
    ("add.f16 {d}, {a}, {b}", "f16 f16 f16", np.add),
    ("mul.f16 {d}, {a}, {b}", "f16 f16 f16", np.multiply),
    ("cvt.rn.f16.f32 {d}, {a}", "f16 f32", lambda x: x.astype(np.float16)),
    ("cvt.f32.f16 {d}, {a}", "f32 f16", lambda x: x.astype(np.float32)),
    ("cvt.f64.f32 {d}, {a}", "f64 f32", lambda x: x.astype(np.float64)),
    ("cvt.rn.f32.s32 {d}, {a}", "f32 s32", lambda x: x.astype(np.float32)),
    ("cvt.rn.f32.u64 {d}, {a}", "f32 u64", lambda x: x.astype(np.float32)),
    ("cvt.rmi.f32.f32 {d}, {a}", "f32 f32", np.floor),
    ("cvt.rni.f32.f32 {d}, {a}", "f32 f32", np.rint),
]


@pytest.mark.parametrize(("instruction", "types", "f"), _FLOATS, ids=lambda x: x if isinstance(x, str) else "")
def test_floating_point(instruction: str, types: str, f: Callable[..., Values]) -> None:
    operands = [_operand(kind) for kind in types.split()[1:]]
    got, wanted = evaluate(instruction, types, *operands), f(*operands)
    np.testing.assert_array_equal(got, wanted)
    np.testing.assert_array_equal(np.signbit(got[wanted == 0]), np.signbit(wanted[wanted == 0]))


def test_integers_of_floats_stop_at_the_ends_of_their_type() -> None:
    x = np.array([0.5, -0.5, 1.5, -1.5, 3e9, -3e9, 5e9, np.inf, -np.inf, np.nan, 2.0**31, 7] + [1.0] * 20, np.float32)
    signed = evaluate("cvt.rzi.s32.f32 {d}, {a}", "s32 f32", x)
    assert signed[:12].tolist() == [0, 0, 1, -1, 2**31 - 1, -(2**31), 2**31 - 1, 2**31 - 1, -(2**31), 0, 2**31 - 1, 7]
    unsigned = evaluate("cvt.rzi.u32.f32 {d}, {a}", "u32 f32", x)
    assert unsigned[:12].tolist() == [0, 0, 1, 0, 3_000_000_000, 0, 2**32 - 1, 2**32 - 1, 0, 0, 2**31, 7]


def test_subnormals_are_flushed_if_asked_for() -> None:
    x, y = np.full(32, 2.0**-120, np.float32), np.full(32, 2.0**-20, np.float32)
    assert (evaluate("mul.f32 {d}, {a}, {b}", "f32 f32 f32", x, y) == 2.0**-140).all()
    assert (evaluate("mul.ftz.f32 {d}, {a}, {b}", "f32 f32 f32", x, y) == 0).all()


def test_every_half_becomes_the_right_float() -> None:
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16)
    for part in halves.reshape(-1, 32)[:: generator().integers(1, 4)]:
        np.testing.assert_array_equal(evaluate("cvt.f32.f16 {d}, {a}", "f32 f16", part), part.astype(np.float32))


def _ties() -> Values:
    """Floats in the middle between two halves, beside it, beyond the largest, and below the smallest."""
    halves = generator().integers(0, 0x7C00, 8).astype(np.uint16)
    below, above = halves.view(np.float16).astype(np.float64), (halves + 1).view(np.float16).astype(np.float64)
    middle = ((below + above) / 2).astype(np.float32)
    return np.concatenate([middle, np.nextafter(middle, np.float32(0)), np.nextafter(middle, np.float32(1e9)), -middle])


def test_rounding_to_sixteen_bits() -> None:
    for _ in range(50):
        x = _ties()
        np.testing.assert_array_equal(evaluate("cvt.rn.f16.f32 {d}, {a}", "f16 f32", x), x.astype(np.float16))
        bfloat = torch.from_numpy(x).bfloat16().view(torch.int16).numpy().view(np.uint16)
        np.testing.assert_array_equal(evaluate("cvt.rn.bf16.f32 {d}, {a}", "b16 f32", x), bfloat)
        pair = evaluate("cvt.rn.f16x2.f32 {d}, {a}, {b}", "b32 f32 f32", x, -x)
        np.testing.assert_array_equal(pair >> 16, x.astype(np.float16).view(np.uint16))
        np.testing.assert_array_equal(pair & 0xFFFF, (-x).astype(np.float16).view(np.uint16))


def test_tf32_is_rounded_away_from_ties() -> None:
    x = np.full(32, 1 + 2.0**-11, np.float32)
    assert (evaluate("cvt.rna.tf32.f32 {d}, {a}", "f32 f32", x) == 1 + 2.0**-10).all()


@pytest.mark.parametrize("compare", ["eq", "ne", "lt", "le", "gt", "ge", "equ", "neu", "ltu", "leu", "gtu", "geu"])
def test_comparisons_of_floats(compare: str) -> None:
    x, y = _operand("f32"), generator().permutation(_operand("f32"))
    got = evaluate(f"setp.{compare}.f32 %p1, {{a}}, {{b}}; selp.b32 {{d}}, 1, 0, %p1", "u32 f32 f32", x, y)
    names = {"eq": "equal", "ne": "not_equal", "lt": "less", "le": "less_equal", "gt": "greater", "ge": "greater_equal"}
    wanted = getattr(np, names[compare[:2]])(x, y)
    unordered = np.isnan(x) | np.isnan(y)
    wanted = wanted | unordered if compare.endswith("u") else wanted & ~unordered
    np.testing.assert_array_equal(got, wanted)


def test_a_predicate_with_another() -> None:
    x, y = _operand("s32"), _operand("s32")
    got = evaluate(
        "setp.lt.s32 %p1, {a}, {b}; setp.gt.s32 %p2|%p3, {a}, 0; setp.gt.and.s32 %p4, {a}, 0, !%p1; "
        "selp.b32 %r40, 1, 0, %p4; selp.b32 %r41, 2, 0, %p3; or.b32 {d}, %r40, %r41",
        "u32 s32 s32", x, y,
    )  # fmt: skip
    np.testing.assert_array_equal(got, ((x > 0) & ~(x < y)) * 1 + (x <= 0) * 2)


def test_packing() -> None:
    x = _operand("b64")
    split = """
        mov.b64 {{%r40, %r41}}, {a}; mov.b32 {{%h1, %h2}}, %r40; mov.b32 %r42, {{%h2, %h1}}; mov.b64 {d}, {{%r41, %r42}}
    """
    low, high = x & np.uint64(0xFFFFFFFF), x >> np.uint64(32)
    turned = (low >> np.uint64(16)) | (low & np.uint64(0xFFFF)) << np.uint64(16)
    np.testing.assert_array_equal(evaluate(split, "b64 b64", x), high | turned << np.uint64(32))


@pytest.mark.parametrize(
    ("how", "by", "source"),
    [
        ("bfly", 5, lambda lane: lane ^ 5),
        ("idx", 3, lambda lane: 3),
        ("up", 2, lambda lane: lane - 2 if lane >= 2 else lane),
        ("down", 4, lambda lane: lane + 4 if lane + 4 < 32 else lane),
    ],
)
def test_shuffles(how: str, by: int, source: Callable[[int], int]) -> None:
    x, clamp = _operand("b32"), 0 if how == "up" else 31
    got = evaluate(f"shfl.sync.{how}.b32 {{d}}, {{a}}, {by}, {clamp}, -1", "b32 b32", x)
    np.testing.assert_array_equal(got, x[[source(lane) for lane in range(32)]])


def test_votes_and_reductions() -> None:
    x = np.arange(32, dtype=np.uint32)
    above = "setp.gt.u32 %p1, {a}, 20; "
    assert (evaluate(above + "vote.sync.ballot.b32 {d}, %p1, -1", "u32 u32", x) == 0xFFE00000).all()
    assert (evaluate("redux.sync.add.u32 {d}, {a}, -1", "u32 u32", x) == 31 * 16).all()
    elected = evaluate("elect.sync %r40|%p1, -1; selp.b32 {d}, 1, 0, %p1", "u32 u32", x)
    assert elected.tolist() == [1] + [0] * 31


def test_lanes_part_and_meet_again() -> None:
    """A loop that each lane leaves after its own number of turns; then all of them vote."""
    x = generator().integers(1, 20, 32).astype(np.uint32)
    body = """
        mov.u32 %r40, 0; mov.u32 %r41, {a};
        again: add.u32 %r40, %r40, %r41; sub.u32 %r41, %r41, 1; setp.ne.u32 %p1, %r41, 0; @%p1 bra again;
        setp.gt.u32 %p2, %r40, 0; vote.sync.ballot.b32 %r42, %p2, -1; add.u32 {d}, %r40, %r42
    """
    wanted = x * (x + 1) // 2 + np.uint32(0xFFFFFFFF)
    np.testing.assert_array_equal(evaluate(body, "u32 u32", x), wanted)


# --- matrices --------------------------------------------------------------------------------------------------------


def _loads(first: int, count: int, offset: int) -> str:
    """Registers %r[first…] from words of `in`, a lane's side by side."""
    words = "".join(f"ld.global.b32 %r{first + i}, [%d29+{offset + 4 * i}];" for i in range(count))
    return f"mul.wide.u32 %d28, %r63, {4 * count}; add.s64 %d29, %d30, %d28; {words}"


def _stores(first: int, count: int) -> str:
    words = "".join(f"st.global.b32 [%d29+{4 * i}], %r{first + i};" for i in range(count))
    return f"mul.wide.u32 %d28, %r63, {4 * count}; add.s64 %d29, %d31, %d28; {words}"


# Rows and columns of the fragments, from the PTX manual's section on mma.m16n8k16 with 16-bit operands and on
# mma.m16n8k8 with TF32.
def _a16(lane: int, i: int) -> tuple[int, int]:
    return lane // 4 + (8 if i % 4 >= 2 else 0), lane % 4 * 2 + i % 2 + (8 if i >= 4 else 0)


def _b16(lane: int, i: int) -> tuple[int, int]:
    return lane % 4 * 2 + i % 2 + (8 if i >= 2 else 0), lane // 4


def _a8(lane: int, i: int) -> tuple[int, int]:
    return lane // 4 + (8 if i in (1, 3) else 0), lane % 4 + (4 if i >= 2 else 0)


def _b8(lane: int, i: int) -> tuple[int, int]:
    return lane % 4 + 4 * i, lane // 4


def _c(lane: int, i: int) -> tuple[int, int]:
    return lane // 4 + (8 if i >= 2 else 0), lane % 4 * 2 + i % 2


def _fragment(x: Values, place: Callable[[int, int], tuple[int, int]], count: int) -> Values:
    return np.array([[x[place(lane, i)] for i in range(count)] for lane in range(32)], x.dtype)


@pytest.mark.parametrize("tf32", [False, True])
def test_mma(tf32: bool) -> None:
    k, dtype = (8, np.float32) if tf32 else (16, np.float16)
    a, b, c = (generator().standard_normal(shape) for shape in ((16, k), (k, 8), (16, 8)))
    a, b, c = a.astype(dtype), b.astype(dtype), c.astype(np.float32)
    places = ((_a8, 4), (_b8, 2)) if tf32 else ((_a16, 8), (_b16, 4))
    parts = [_fragment(x, place, count) for x, (place, count) in zip((a, b), places, strict=True)]
    data = np.concatenate([part.view(np.uint8).ravel() for part in (*parts, _fragment(c, _c, 4))])
    kind = "m16n8k8.row.col.f32.tf32.tf32.f32" if tf32 else "m16n8k16.row.col.f32.f16.f16.f32"
    body = _loads(0, 4, 0) + _loads(4, 2, 32 * 16) + _loads(6, 4, 32 * 24)
    body += f"mma.sync.aligned.{kind} {{%r6,%r7,%r8,%r9}}, {{%r0,%r1,%r2,%r3}}, {{%r4,%r5}}, {{%r6,%r7,%r8,%r9}};"
    done = run(body + _stores(6, 4), data)
    assert not done.run.findings
    if tf32:
        a, b = ((x.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32) for x in (a, b))
    wanted = (a.astype(np.float64) @ b.astype(np.float64) + c).astype(np.float32)
    got = done.memory[: 32 * 16].view(np.float32).reshape(32, 4)
    np.testing.assert_allclose(got, _fragment(wanted, _c, 4), rtol=2**-23, atol=1e-7)


_TO_SHARED = """
    mul.lo.u32 %r60, %r63, 16; add.u32 %r60, %r60, global_smem; mul.wide.u32 %d28, %r63, 16; add.s64 %d29, %d30, %d28;
    ld.global.v4.b32 {%r50, %r51, %r52, %r53}, [%d29]; st.shared.v4.b32 [%r60], {%r50, %r51, %r52, %r53}; bar.sync 0;
"""


@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix(transposed: bool) -> None:
    x = generator().integers(0, 2**16, (4, 8, 8)).astype(np.uint16)
    trans = ".trans" if transposed else ""
    body = _TO_SHARED + f"ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{%r0,%r1,%r2,%r3}}, [%r60];"
    done = run(body + _stores(0, 4), x, shared=512)
    assert not done.run.findings
    got = done.memory[: 32 * 16].view(np.uint16).reshape(32, 4, 2)
    for lane in range(32):
        for matrix in range(4):
            m = x[matrix].T if transposed else x[matrix]
            assert got[lane, matrix].tolist() == m[lane // 4, lane % 4 * 2 :][:2].tolist()


def test_stmatrix_is_the_reverse_of_ldmatrix() -> None:
    x = generator().integers(0, 2**16, 256).astype(np.uint16)
    registers = "{%r0,%r1,%r2,%r3}"
    body = (
        _TO_SHARED
        + f"""
        ldmatrix.sync.aligned.m8n8.x4.shared.b16 {registers}, [%r60]; bar.sync 0;
        stmatrix.sync.aligned.m8n8.x4.shared.b16 [%r60], {registers}; bar.sync 0;
        ld.shared.v4.b32 {registers}, [%r60];
    """
    )
    done = run(body + _stores(0, 4), x, shared=512)
    assert not done.run.findings
    np.testing.assert_array_equal(done.memory[:512].view(np.uint16), x)


# --- what is not known, or refused -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "instruction",
    ["tcgen05.alloc.sync.aligned.b32 [%r1], 32", "atom.global.add.u32 %r1, [%d31], 1", "ld.local.b32 %r1, [%r2]"],
)
def test_an_unknown_instruction_is_named(instruction: str) -> None:
    with pytest.raises(Unsupported, match=instruction.split()[0].replace(".", r"\.")):
        run(instruction + ";")


def test_an_unknown_form_of_a_known_instruction_is_named() -> None:
    with pytest.raises(Unsupported, match=r"add\.sat\.f32"):
        run("add.sat.f32 %r1, %r2, %r3;")
