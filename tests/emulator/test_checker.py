"""What the checker sees, in kernels of a few lines."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from . import tensor_map
from .commands import require_emulator
from .machine import Mode, Settings
from .single import generator, run

_OWN = "mul.lo.u32 %r60, %r63, 4; add.u32 %r60, %r60, global_smem;"  # a thread's own word of shared memory
_OTHER = "xor.b32 %r61, %r63, 32; mul.lo.u32 %r61, %r61, 4; add.u32 %r61, %r61, global_smem;"  # and one of another warp
_OUT = "mul.wide.u32 %d28, %r63, 4; add.s64 %d29, %d31, %d28;"
_IN = (
    "mul.wide.u32 %d28, %r63, 16; add.s64 %d27, %d30, %d28; mul.lo.u32 %r60, %r63, 16; add.u32 %r60, %r60, global_smem;"
)
_MODES: tuple[Mode, ...] = ("earliest", "latest", "random")


@pytest.fixture(autouse=True)
def _emulator() -> None:
    require_emulator(triton=False)


@pytest.mark.parametrize("barrier", [True, False])
def test_warps_that_exchange_words_need_a_barrier(barrier: bool) -> None:
    body = f"{_OWN} {_OTHER} {_OUT} st.shared.b32 [%r60], %r63; {'bar.sync 0;' if barrier else ''}"
    body += "ld.shared.b32 %r1, [%r61]; st.global.b32 [%d29], %r1;"
    done = run(body, warps=2, shared=256)
    if barrier:
        assert not done.kinds
        assert done.memory[:256].view(np.uint32).tolist() == [thread ^ 32 for thread in range(64)]
    else:
        assert "RACE" in done.kinds or "UNINIT_SHARED" in done.kinds


def test_a_word_is_not_written_over_while_another_warp_may_read_it() -> None:
    body = (
        f"{_OWN} {_OTHER} st.shared.b32 [%r60], %r63; bar.sync 0; ld.shared.b32 %r1, [%r61]; st.shared.b32 [%r60], %r1;"
    )
    assert "RACE" in run(body, warps=2, shared=256).kinds
    assert not run(
        body.replace("st.shared.b32 [%r60], %r1", "bar.sync 0; st.shared.b32 [%r60], %r1"), warps=2, shared=256
    ).kinds


def test_accesses_outside_what_is_a_kernels_own() -> None:
    beyond = run(f"{_OUT} st.global.b32 [%d29+4], %r63;", out_bytes=128)
    assert beyond.kinds == {"FAULT"}
    assert "outside every tensor" in beyond.run.findings[0].text
    assert "lane 31" in beyond.run.findings[0].text
    assert run(f"{_OWN} st.shared.b32 [%r60+4], %r63;", shared=128).kinds == {"FAULT"}
    assert "misaligned" in run(f"{_OUT} st.global.b16 [%d29+1], %r63;".replace("%r63;", "%h1;")).run.findings[0].text
    assert run(f"{_OWN} ld.shared.b32 %r1, [%r60];", shared=128).kinds == {"UNINIT_SHARED"}
    assert "UNINIT_REG" in run("add.u32 %r1, %r2, 1;").kinds


def test_lanes_that_disagree_about_a_word() -> None:
    assert run("st.shared.b32 [global_smem], %r63;", shared=16).kinds == {"LANES"}
    assert not run("st.shared.b32 [global_smem], 7;", shared=16).kinds


def test_warps_that_wait_for_nobody() -> None:
    text = "setp.lt.u32 %p1, %r63, 32; @%p1 bra skip; bar.sync 1, 64; skip: bar.sync 0;"
    assert any("deadlock" in finding.text for finding in run(text, warps=2).run.findings)


def test_lanes_missing_at_a_barrier() -> None:
    found = run("setp.lt.u32 %p1, %r63, 7; @%p1 bar.sync 0;").run.findings
    assert any("bar.sync with lanes 0x7f only" in finding.text for finding in found)


@pytest.mark.parametrize(("favourite", "last"), [(1, 2), (2, 2), (3, 1), (-1, 0), (-2, 1), (-3, 2)])
def test_a_warp_runs_ahead_or_falls_behind(favourite: int, last: int) -> None:
    """Three warps write to one word, each after a barrier that lets all of them go."""
    body = "bar.sync 0; shr.u32 %r1, %r63, 5; st.global.b32 [%d31], %r1;"
    done = run(body, warps=3, settings=Settings(favourite=favourite))
    assert done.memory[:4].view(np.uint32)[0] == last


# --- asynchronous copies ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", _MODES)
@pytest.mark.parametrize("waits", [True, False])
def test_cp_async(mode: Mode, waits: bool) -> None:
    """16 bytes a lane, of which the last lane's come from nowhere and are zeros."""
    x = generator().integers(0, 256, 512).astype(np.uint8)
    body = f"""
        {_IN} setp.lt.u32 %p1, %r63, 31; selp.b32 %r1, 16, 0, %p1;
        cp.async.cg.shared.global [%r60], [%d27], 16, %r1; cp.async.commit_group;
        {"cp.async.wait_group 0;" if waits else ""}
        ld.shared.v4.b32 {{%r2, %r3, %r4, %r5}}, [%r60]; add.s64 %d29, %d31, %d28;
        st.global.v4.b32 [%d29], {{%r2, %r3, %r4, %r5}}; cp.async.wait_all;
    """
    done = run(body, x, shared=512, settings=Settings(mode=mode))
    wanted = np.concatenate([x[:496], np.zeros(16, np.uint8)])
    assert done.kinds == (set() if waits else {"RACE"})
    same = (done.memory[:512] == wanted).all()
    assert same or not waits
    assert not (same and mode == "latest" and not waits)  # that adversary shows what the checker tells


def _map(x: np.ndarray, box: tuple[int, int], swizzle: int = 0) -> bytes:
    base = SimpleNamespace(data_ptr=lambda: x.ctypes.data)
    strides = [stride // x.itemsize for stride in x.strides]
    descriptor = SimpleNamespace(base=base, shape=x.shape, strides=strides, padding="zero")
    return tensor_map.encode(descriptor, {"elem_size": x.itemsize, "swizzle": swizzle, "block_size": box})


_LOAD = """
    setp.eq.u32 %p1, %r63, 0; mov.b64 %d20, map; cvta.param.u64 %d20, %d20;
    @%p1 mbarrier.init.shared::cta.b64 [global_smem+4096], 1; bar.sync 0;
    @%p1 mbarrier.arrive.expect_tx.shared.b64 _, [global_smem+4096], {bytes}; mov.u32 %r40, global_smem;
    add.u32 %r41, %r40, 4096; mov.u32 %r42, 4; mov.u32 %r43, 5;
    @%p1 cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes
        [%r40], [%d20, {{%r42, %r43}}], [%r41];
    {wait}
    mul.lo.u32 %r60, %r63, 16; add.u32 %r60, %r60, %r40; ld.shared.v4.b32 {{%r2, %r3, %r4, %r5}}, [%r60];
    mul.wide.u32 %d28, %r63, 16; add.s64 %d29, %d31, %d28; st.global.v4.b32 [%d29], {{%r2, %r3, %r4, %r5}};
"""
_WAIT = "again: mbarrier.try_wait.parity.shared.b64 %p2, [%r41], 0; @!%p2 bra again;"


def _tensor_load(
    mode: Mode = "latest",
    size: int = 512,
    wait: str = _WAIT,
    swizzle: int = 0,
    first: str = "",
    programmatic: bool = False,
) -> tuple[np.ndarray, np.ndarray, set[str]]:
    raw = generator().integers(0, 2**16, 16 * 24 + 8).astype(np.uint16)
    start = -raw.ctypes.data % 16 // 2
    x = raw[start : start + 16 * 24].reshape(16, 24)[:9, :20]  # such that the box reaches beyond both edges
    body = first + _LOAD.format(bytes=size, wait=wait)
    done = run(
        body, x.base, shared=4104, settings=Settings(mode=mode), tensor_map=_map(x, (8, 32), swizzle), more=(raw,),
        programmatic=programmatic,
    )  # fmt: skip
    box = np.zeros((8, 32), np.uint16)
    box[:4, :16] = x[5:, 4:]
    return done.memory[:512].view(np.uint16).reshape(8, 32), box, done.kinds


@pytest.mark.parametrize("mode", _MODES)
def test_a_tensor_load_is_zero_outside_its_tensor(mode: Mode) -> None:
    got, box, kinds = _tensor_load(mode)
    np.testing.assert_array_equal(got, box)
    assert kinds <= {"PROXY_MBARRIER"}


def test_a_swizzled_tensor_load() -> None:
    """Rows of 64 bytes: a chunk's two lowest address bits change by those of the row, two rows at a time."""
    got, box, _ = _tensor_load(swizzle=2)
    chunks = box.reshape(8, 4, 8)
    wanted = np.stack([chunks[row, [chunk ^ (row // 2) for chunk in range(4)]] for row in range(8)])
    np.testing.assert_array_equal(got.reshape(8, 4, 8), wanted)


def test_a_tensor_load_without_a_wait_or_with_the_wrong_bytes() -> None:
    assert "RACE" in _tensor_load(wait="")[2]
    assert "FAULT" in _tensor_load(size=384)[2]  # the phase ends early, or the warp waits for ever


def test_a_tensor_map_is_checked() -> None:
    x = np.zeros((4, 20), np.uint16)
    with pytest.raises(ValueError, match="strides that are multiples of 16 bytes"):
        _map(x, (4, 8))


# --- wgmma -----------------------------------------------------------------------------------------------------------

# A (64 × 16) and B (8 × 16, along k) in float16, without swizzle: core matrices of 8 rows of 16 bytes.
_DESCRIPTOR = "and.b32 {r}, {r}, 0x3FFFF; shr.u32 {r}, {r}, 4; cvt.u64.u32 {d}, {r}; or.b64 {d}, {d}, {strides};"
_A_STRIDES = hex((64 * 16 >> 4) << 16 | (128 >> 4) << 32)
_B_STRIDES = hex((8 * 16 >> 4) << 16 | (128 >> 4) << 32)


def _wgmma(
    fence: str = "fence.proxy.async.shared::cta;", wait: str = "wgmma.wait_group.sync.aligned 0;", mode: Mode = "latest"
) -> tuple[np.ndarray, np.ndarray, set[str]]:
    a, b = (
        generator().standard_normal((64, 16)).astype(np.float16),
        generator().standard_normal((8, 16)).astype(np.float16),
    )
    cores = [x.reshape(len(x), 2, 8).transpose(1, 0, 2).ravel() for x in (a, b)]  # chunks of k outermost
    body = f"""
        {_IN} ld.global.v4.b32 {{%r2, %r3, %r4, %r5}}, [%d27]; st.shared.v4.b32 [%r60], {{%r2, %r3, %r4, %r5}};
        setp.lt.u32 %p1, %r63, 16; add.u32 %r60, %r60, 2048;
        @%p1 ld.global.v4.b32 {{%r2, %r3, %r4, %r5}}, [%d27+2048];
        @%p1 st.shared.v4.b32 [%r60], {{%r2, %r3, %r4, %r5}};
        {fence} bar.sync 0;
        mov.u32 %r40, global_smem; add.u32 %r41, %r40, 2048;
        {_DESCRIPTOR.format(r="%r40", d="%d10", strides=_A_STRIDES)}
        {_DESCRIPTOR.format(r="%r41", d="%d11", strides=_B_STRIDES)}
        wgmma.fence.sync.aligned;
        wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {{%r10, %r11, %r12, %r13}}, %d10, %d11, 0, 1, 1, 0, 0;
        wgmma.commit_group.sync.aligned; {wait}
        mul.wide.u32 %d28, %r63, 16; add.s64 %d29, %d31, %d28; st.global.v4.b32 [%d29], {{%r10, %r11, %r12, %r13}};
        wgmma.wait_group.sync.aligned 0;
    """
    done = run(body, np.concatenate(cores), warps=4, shared=4096, settings=Settings(mode=mode))
    product = (a.astype(np.float64) @ b.astype(np.float64).T).astype(np.float32)
    got = done.memory[:2048].view(np.float32).reshape(4, 8, 4, 2, 2)  # warp, row, pair of columns, half, column
    return got.transpose(0, 3, 1, 2, 4).reshape(64, 8), product, done.kinds


@pytest.mark.parametrize("mode", _MODES)
def test_wgmma(mode: Mode) -> None:
    got, wanted, kinds = _wgmma(mode=mode)
    np.testing.assert_allclose(got, wanted, rtol=2**-23, atol=1e-7)
    assert not kinds


def test_wgmma_needs_a_proxy_fence_and_a_wait() -> None:
    assert _wgmma(fence="")[2] == {"PROXY"}
    got, wanted, kinds = _wgmma(wait="")
    assert kinds == {"RACE"}
    assert not np.allclose(got, wanted)


# --- kernels that start before those before them have ended ----------------------------------------------------------

_READ = "mul.wide.u32 %d28, %r63, 16; add.s64 %d27, %d30, %d28; ld.global.b32 %r1, [%d27];"
_WRITE = "add.s64 %d29, %d31, %d28; st.global.b32 [%d29], %r1;"
_GRIDS = "griddepcontrol.wait;"
_ONE_WARP = "setp.lt.u32 %p1, %r63, 32; @%p1 griddepcontrol.wait;"


def _programmatic(body: str, programmatic: bool = True, constant: bool = False, warps: int = 2) -> set[str]:
    x = generator().integers(0, 256, 1024).astype(np.uint8)
    done = run(body, x, warps=warps, shared=1024, programmatic=programmatic, constant=constant)
    return done.kinds


def test_results_of_the_kernel_before_are_read_after_the_wait_for_it() -> None:
    started = "griddepcontrol.launch_dependents;"  # lets the next kernel start, and says nothing of what is written
    assert not _programmatic(f"{started} {_GRIDS} {_READ} {_WRITE}")
    assert not _programmatic(f"{_GRIDS} {_READ} {started} {_WRITE}")
    assert _programmatic(f"{_READ} {_GRIDS} {_WRITE}") == {"EARLY"}  # the wait behind a load
    assert _programmatic(f"{started} {_READ} {_WRITE} {_GRIDS}") == {"EARLY"}
    assert _programmatic(f"{_READ} {_WRITE}") == {"EARLY", "FAULT"}  # no wait at all
    assert not _programmatic(f"{_READ} {_WRITE}", programmatic=False)
    assert not _programmatic(f"{_READ} {_GRIDS} {_WRITE}", programmatic=False)


def test_what_is_read_too_early_shows_in_the_result() -> None:
    x = np.full(1024, 7, np.uint8)
    for body, same in ((f"{_GRIDS} {_READ} {_WRITE}", True), (f"{_READ} {_GRIDS} {_WRITE}", False)):
        done = run(body, x, warps=2, programmatic=True)
        assert (done.memory[:1024].reshape(64, 16)[:, :4] == 7).all() == same


def test_before_the_wait_weights_are_read_and_nothing_is_written() -> None:
    assert not _programmatic(f"{_READ} {_GRIDS} {_WRITE}", constant=True)
    assert _programmatic(f"{_READ} {_WRITE} {_GRIDS}", constant=True) == {"EARLY"}
    over = _WRITE.replace("%d31", "%d30")
    assert _programmatic(f"{_READ} {over} {_GRIDS}", constant=True) == {"EARLY"}


def test_a_kernel_that_never_waits_hides_the_end_of_those_before_it() -> None:
    assert _programmatic("mov.u32 %r1, 1;") == {"FAULT"}
    assert not _programmatic("mov.u32 %r1, 1;", programmatic=False)


def test_a_copy_counts_from_its_issue() -> None:
    issue, wait = "cp.async.cg.shared.global [%r60], [%d27], 16;", "cp.async.wait_all;"
    assert not _programmatic(f"{_IN} {_GRIDS} {issue} {wait}")
    assert _programmatic(f"{_IN} {issue} {_GRIDS} {wait}") == {"EARLY"}
    assert not _programmatic(f"{_IN} {issue} {_GRIDS} {wait}", constant=True)


def test_a_tensor_copy_counts_from_its_issue() -> None:
    assert "EARLY" not in _tensor_load(first=_GRIDS, programmatic=True)[2]
    assert "EARLY" in _tensor_load(wait=_GRIDS + _WAIT, programmatic=True)[2]
    x = np.zeros(1024, np.uint8)
    x = x[-x.ctypes.data % 16 :][:512].reshape(8, 64)
    store = """
        mov.u32 %r40, global_smem; mov.u32 %r42, 0; mov.b64 %d20, map; cvta.param.u64 %d20, %d20;
        mul.lo.u32 %r60, %r63, 16; add.u32 %r60, %r60, %r40; st.shared.v4.b32 [%r60], {%r63, %r63, %r63, %r63};
        fence.proxy.async.shared::cta; setp.eq.u32 %p1, %r63, 0;
        @%p1 cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%d20, {%r42, %r42}], [%r40];
        cp.async.bulk.commit_group;
    """
    for body, found in ((_GRIDS + store, set()), (store + _GRIDS, {"EARLY"})):
        for mode in _MODES:  # the store lands after the wait, or before
            done = run(
                body + "cp.async.bulk.wait_group 0;", x, shared=512, settings=Settings(mode=mode), constant=True,
                tensor_map=_map(x, (8, 64)), programmatic=True,
            )  # fmt: skip
            assert done.kinds == found


def test_one_warp_waits_for_a_block() -> None:
    """The wait is a thread's own, and a barrier tells the others of it."""
    assert _programmatic(f"{_ONE_WARP} {_READ} {_WRITE}") == {"EARLY"}
    assert not _programmatic(f"{_ONE_WARP} bar.sync 0; {_READ} {_WRITE}")
    one_lane = _ONE_WARP.replace("%r63, 32", "%r63, 1")
    assert _programmatic(f"{one_lane} {_READ} {_WRITE}", warps=1) == {"EARLY"}
    assert not _programmatic(f"{one_lane} bar.warp.sync -1; {_READ} {_WRITE}", warps=1)
    told = """
        setp.eq.u32 %p1, %r63, 0; @%p1 mbarrier.init.shared::cta.b64 [global_smem], 1; bar.sync 0;
        @%p1 griddepcontrol.wait; @%p1 mbarrier.arrive.shared.b64 _, [global_smem]; mov.u32 %r41, global_smem;
    """
    assert not _programmatic(f"{told} {_WAIT} {_READ} {_WRITE}") - {"UNINIT_REG"}
    assert "EARLY" in _programmatic(f"{told} {_READ} {_WRITE}")


# --- counters --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stride", "wavefronts"), [(4, 1), (8, 2), (128, 32), (0, 1)])
def test_bank_conflicts_are_counted(stride: int, wavefronts: int) -> None:
    body = f"mul.lo.u32 %r60, %r63, {stride}; add.u32 %r60, %r60, global_smem; st.shared.b32 [%r60], 7;"
    done = run(body, shared=4096, settings=Settings(count=True))
    counters = done.run.counters
    assert counters is not None
    assert (counters["wavefronts"].sum(), counters["ideal"].sum(), counters["bytes"].sum()) == (wavefronts, 1, 128)


@pytest.mark.parametrize(("stride", "sectors"), [(4, 4), (32, 32), (0, 1)])
def test_sectors_are_counted(stride: int, sectors: int) -> None:
    body = f"mul.wide.u32 %d28, %r63, {stride}; add.s64 %d29, %d30, %d28; ld.global.b32 %r1, [%d29];"
    data = np.zeros(4096, np.uint8)
    start = -data.ctypes.data % 32
    done = run(f"add.s64 %d30, %d30, {start}; {body}", data, settings=Settings(count=True))
    assert done.run.counters is not None
    assert done.run.counters["sectors"].sum() == sectors
