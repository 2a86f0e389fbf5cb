"""The machine-code gate: its readers on small listings, its rules, and the command on real kernels."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import machine_code
from bench.machine_code import Row

ROOT = Path(__file__).parents[2]

SASS = """
        /*0000*/                   LDG.E R2, desc[UR4][R2.64] ;
        /*0010*/                   UTMALDG.2D [UR8], [UR4] ;
        /*0020*/              @!P0 LDGSTS.E.BYPASS.128 [R5], desc[UR6][R8.64] ;
        /*0030*/                   LDGSTS.E.64 [R5], desc[UR6][R8.64] ;
        /*0040*/                   HGMMA.64x256x16.F32 R24, gdesc[UR4], R24 ;
        /*0050*/               @P1 BRA 0x20 ;
        /*0060*/                   LDG.E.U16 R7, desc[UR4][R2.64] ;
        /*0070*/               @P2 BRA 0x0 ;
        /*0080*/                   STL [R1], R4 ;
        /*0090*/                   EXIT ;
"""


def code(sass: str) -> list[tuple[int, str, str]]:
    return [(int(address, 16), name, operands) for address, name, operands in machine_code._INSTRUCTION.findall(sass)]


def test_the_main_loop_is_the_smallest_with_a_matrix_instruction() -> None:
    names = list(machine_code._main_loop(code(SASS)))
    assert names == ["LDGSTS.E.BYPASS.128", "LDGSTS.E.64", "HGMMA.64x256x16.F32", "BRA"]


def test_without_a_matrix_instruction_all_loops_count() -> None:
    names = list(machine_code._main_loop(code(SASS.replace("HGMMA", "FFMA"))))
    assert "LDGSTS.E.64" in names


def test_an_unrolled_loop_is_judged_by_its_copies() -> None:
    unrolled = SASS.replace("@P1 BRA 0x20", "NOP").replace("@P2 BRA 0x0", "NOP")
    assert list(machine_code._main_loop(code(unrolled))) == ["LDGSTS.E.BYPASS.128", "LDGSTS.E.64"]


def read(monkeypatch: pytest.MonkeyPatch, sass: str, usage: str = "REG:168 STACK:0 SHARED:0") -> Row:
    monkeypatch.setattr(machine_code, "_cuobjdump", lambda option, file: sass if "sass" in option else usage)
    row = blank()
    machine_code._read_sass(row, b"")
    return row


def blank(**changes: object) -> Row:
    row = Row(
        case="linear fp16 ln+qkv", kernel="_linear_kernel", arch="sm_90", num_warps=8, num_stages=3,
        instructions=0, registers=0, spilled=0, shared=100_000, shared_limit=232_448, matrix={}, copies={}, loads={},
        bytes_loaded=0, bulk_loaded=0, bulk_stored=0, occupancy=0.0, seconds=0.0,
    )  # fmt: skip
    return dataclasses.replace(row, **changes)  # type: ignore[arg-type]


def test_sass_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    row = read(monkeypatch, SASS, "REG:168 STACK:24 SHARED:0")
    assert row.instructions == 10
    assert row.registers == 168
    assert row.spilled == 24
    assert row.matrix == {"HGMMA": 1}
    assert row.copies == {"UTMALDG": 1, "LDGSTS": 2}
    assert row.loads == {128: 1, 64: 1}
    # 256 threads with 168 registers have 43,008, and need 100 kB of shared memory: one block of 8 warps out of 64.
    assert row.occupancy == 8 / 64


def test_a_stack_without_local_memory_is_no_spill(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read(monkeypatch, SASS.replace("STL", "STS"), "REG:32 STACK:24").spilled == 0


PTX = """
.visible .entry _linear_kernel(
	.param .align 64 .b8 _linear_kernel_param_0[128],
	.param .u32 _linear_kernel_param_1,
	.param .align 64 .b8 _linear_kernel_param_2[128],
	.param .align 64 .b8 _linear_kernel_param_3[128]
)
	mov.b64 	%rd8, _linear_kernel_param_0;
	cvta.param.u64 	%rd4, %rd8;
	mov.b32 	%r75, _linear_kernel_param_2;
	cvt.u64.u32 	%rd9, %r75;
	cvta.param.u64 	%rd10, %rd9;
	mov.b64 	%rd11, _linear_kernel_param_3;
	cvta.param.u64 	%rd2, %rd11;
	@%p6 cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%r98], [%rd4, {%r9, %r7}], [%r96];
	@%p7 cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes [%r98], [%rd10, {%r9, %r7}], [%r96];
	@%p7 cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes [%r98], [%rd10, {%r9, %r7}], [%r97];
	@%p9 cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%rd2, {%r242, %r327}], [%r243];
	cp.async.bulk.commit_group;
"""


def test_what_the_copy_engine_moves_is_counted() -> None:
    kinds = ("tensordesc<fp16[128,64]>", "tensordesc<bf16[256,64]>", "tensordesc<fp32[128,64]>")
    blocks = [machine_code._block_bytes(kind) for kind in kinds]
    assert blocks == [16_384, 32_768, 32_768]
    assert machine_code._bulk_bytes(PTX, blocks) == (16_384 + 2 * 32_768, 32_768)


AMDGCN = """
.LBB0_1:
        global_load_dwordx4 v[0:3], v[4:5], off
        global_load_ushort v6, v[4:5], off
.LBB0_2:
        buffer_load_dwordx2 v[0:1], v2, s[0:3], 0 offen
        v_mfma_f32_32x32x8_f16 a[0:15], v[0:1], v[2:3], a[0:15]
        s_cbranch_scc1 .LBB0_2
        s_cbranch_vccnz .LBB0_1
        s_endpgm
    .sgpr_spill_count: 1
    .vgpr_count:     200
    .vgpr_spill_count: 2
"""


def test_amdgcn_is_read() -> None:
    row = blank(arch="gfx942", num_warps=4, shared=32_768)
    machine_code._read_amdgcn(row, AMDGCN)
    assert (row.registers, row.spilled, row.matrix, row.loads) == (200, 12, {"MFMA": 1}, {64: 1})
    assert row.occupancy == 8 / 32  # registers and shared memory allow two blocks


SOUND = {"matrix": {"HGMMA": 4}, "copies": {"UTMALDG": 6, "UTMASTG": 4}, "loads": {128: 2}}


@pytest.mark.parametrize(
    ("changes", "descriptors", "problem"),
    [
        ({}, True, None),
        ({"spilled": 8}, True, "spills 8 bytes"),
        ({"shared": 232_449}, True, "232449 bytes of shared memory, 232448 are there"),
        ({"matrix": {}}, True, "no matrix instruction"),
        ({"matrix": {}, "case": "linear fp32 ln+qkv"}, True, None),
        ({"matrix": {}, "kernel": "_layer_norm_kernel"}, True, None),
        ({"matrix": {"HMMA": 4}}, True, "no HGMMA"),
        ({"copies": {"UTMALDG": 6}}, True, "no UTMALDG and UTMASTG"),
        ({"loads": {64: 1}}, True, None),  # an epilogue's loads; descriptors move the tiles
        ({"loads": {128: 1, 64: 1}}, False, "narrow loads in the main loop: 1×8B"),
        ({"loads": {128: 1, 64: 1}, "exempt": "a reason"}, False, None),
        ({"loads": {64: 1}, "exempt": "a reason"}, False, "no wide load at all"),
        ({"dependent": True}, False, None),
        ({"early": 2}, False, None),  # launched when the last kernel has ended
        ({"dependent": True, "early": 2}, False, "2 instructions touch memory before"),
    ],
)
def test_each_rule_fires_where_it_must(changes: dict[str, object], descriptors: bool, problem: str | None) -> None:
    problems = machine_code._problems(blank(**(SOUND | changes)), descriptors)
    if problem is None:
        assert problems == []
    else:
        assert any(problem in found for found in problems)


@pytest.mark.parametrize(
    ("lines", "early"),
    [
        (["LDC R1, c[0x0][0x28]", "ACQBULK", "PREEXIT", "LDG.E R1, [R2]", "BRA 0x10"], 0),
        (["LDC R1, c[0x0][0x28]", "LDG.E.128 R4, [R2]", "STG.E [R2], R1", "ACQBULK"], 2),
        (["UTMALDG.2D [UR8], [UR4]", "BRA 0x30", "ACQBULK", "EXIT"], 2),  # past the wait
        (["BRA 0x20", "ATOMS.OR RZ, [UR6], R2", "STS [UR5], R0", "ACQBULK"], 0),  # tensor memory is allocated
        (["LDC R1, c[0x0][0x28]", "LDG.E R1, [R2]"], 1),  # never waits
    ],
)
def test_what_comes_before_the_wait(lines: list[str], early: int) -> None:
    code = [(16 * i, *line.partition(" ")[::2]) for i, line in enumerate(lines)]
    assert machine_code._early(code) == early


def run(*arguments: str, before: str = "") -> subprocess.CompletedProcess[str]:
    """The command in a process of its own. There Triton compiles, and does not interpret."""
    return executed(
        f"{before}\nimport sys\nfrom bench import machine_code\nsys.exit(machine_code.main({list(arguments)!r}))"
    )


def executed(program: str) -> subprocess.CompletedProcess[str]:
    """A program in a process of its own, see `run`."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )


def test_a_sound_kernel_passes_and_its_table_is_written(tmp_path: Path) -> None:
    file = tmp_path / "table.json"
    done = run("--arch", "sm_90", "--only", "layer_norm fp16", "--json", str(file))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 kernels in" in done.stdout
    table = json.loads(file.read_bytes())
    assert table["triton"] == importlib.metadata.version("triton")
    (row,) = table["rows"]
    assert (row["kernel"], row["arch"], row["spilled"], row["problems"]) == ("_layer_norm_kernel", "sm_90", 0, [])
    assert row["registers"] > 0
    assert row["instructions"] > 50
    assert row["bytes_loaded"] == sum(int(width) // 8 * count for width, count in row["loads"].items())
    assert list(tmp_path.iterdir()) == [file]


def test_a_configuration_too_large_fails() -> None:
    """Compiled without worker processes: they would read the committed table."""
    program = """
import dataclasses, json
from clip_fast.kernels import launches, targets
launches.TABLE["linear"]["half"]["sm_90"] = (targets.Launch(128, 256, 64, num_warps=8, num_stages=4),)
from bench import machine_code
case = next(case for case in machine_code.cases() if case.name == "linear fp16 ln+qkv")
(job,) = machine_code.jobs_of(case, "sm_90")
print(json.dumps(dataclasses.asdict(machine_code.compile_job(job))))
"""
    done = executed(program)
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout)
    assert any("bytes of shared memory, 232448 are there" in problem for problem in row["problems"]), row
    step, half = (128 + 256) * 64 * 2, 128 * 128 * 2  # bytes of both operands' tiles, and of half a tile of the result
    assert row["bulk_loaded"] >= step
    assert row["bulk_loaded"] % step == 0
    assert row["bulk_stored"] >= 2 * half
    assert row["bulk_stored"] % half == 0


def test_attention_holds_its_queries_where_no_product_waits_for_the_last() -> None:
    program = """
import re
from functools import partial
from bench import machine_code as m
for tokens, head_dim in ((257, 64), (730, 64), (197, 32), (256, 64), (50, 64), (64, 64), (257, 80)):
    case = m.Case("", partial(m._flash_attention, tokens, head_dim, m.BFLOAT, "ieee"))
    (job,) = m.jobs_of(case, "sm_90")
    assert dict(job.options).get("maxnreg") == (128 if tokens % 64 and tokens > 64 >= head_dim else None), job
    if (tokens, head_dim) not in ((257, 64), (256, 64)):
        continue
    usage, sass = m.disassembled(m.compiled_kernel(job).asm["cubin"])
    products = re.findall(r"HGMMA\\.\\S+ R\\d+, (R\\d+|gdesc)(.*?);", sass)
    ended = sum("gsb0" in rest for _, rest in products)
    print(tokens, products[0][0][0], len(products), ended, *re.findall(r"REG:(\\d+) STACK:(\\d+)", usage)[0])
"""
    done = executed(program)
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        tokens, left, products, groups, registers, spilled = line.split()
        assert left == ("R" if tokens == "257" else "g"), line
        assert int(groups) == (4 if tokens == "257" else 2), (
            line
        )  # all steps of a product are begun before it is waited for
        assert int(products) >= 8, line
        assert int(registers) <= 128, line
        assert spilled == "0", line


def test_nothing_to_compile_is_an_error() -> None:
    done = run("--only", "no such case")
    assert done.returncode == 2
    assert "no case has 'no such case' in its name" in done.stderr
