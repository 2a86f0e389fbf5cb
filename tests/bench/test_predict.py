"""Predicted times: each term by hand, what must cost more does, and the committed table is today's code's."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import regressions
from bench.models import MODELS
from bench.predict import __main__ as command
from bench.predict import code, launches, rival, terms
from bench.predict.code import Code, Counts
from bench.predict.devices import DEVICES, Device, Library
from bench.predict.launches import Launch, Work
from bench.predict.prediction import Prediction, predict
from bench.predict.terms import Kernel, Tile
from clip_fast.towers.config import VitConfig

ROOT = Path(__file__).parents[2]
SHOWN = command.MODELS_SHOWN.split(",")
SIGLIPS = {"ViT-B-16-SigLIP": "SigLIP B/16", "ViT-SO400M-14-SigLIP-384": "SigLIP SO400M/14 at 384"}  # as a page says it

# Rates that make arithmetic by hand easy: a clock is a nanosecond.
DEVICE = Device(
    "toy", "sm_90", 10, 1e9, {"bf16": 1000.0, "fp32": 256.0}, 1e12, "made up", sustained={"bf16": 5e12}
)  # fmt: skip

# --- reading machine code ---------------------------------------------------------------------------------------------

# One loop over all steps of all tiles, as of a kernel with the copy engine: 0x30 is a step, the branch at 0x50 leaves
# out the epilogue, and 0xb0 spins on a barrier.
FLAT = """
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/               @P0 BRA 0xe0 ;
        /*0020*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P3, [UR4], R5 ;
        /*0030*/              @!P3 BRA 0xc0 ;
        /*0040*/                   HGMMA.64x256x16.F32.BF16 R24, gdesc[UR4], R24, gsb0 ;
        /*0048*/                   UTMALDG.2D [UR8], [UR4] ;
        /*0050*/               @P1 BRA 0xa0 ;
        /*0060*/                   MUFU.EX2 R1, R2 ;
        /*0068*/                   FFMA R1, R2, R3, R4 ;
        /*0070*/                   STS.U16 [R1], R2 ;
        /*0078*/                   STS.128 [R1], R4 ;
        /*0080*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0088*/                   STSM.16.M88.4 [R1], R4 ;
        /*0090*/                   LDG.E.64 R2, desc[UR4][R2.64] ;
        /*0098*/                   IADD3 R1, R1, R1, RZ ;
        /*009c*/                   IADD3 R1, R1, R1, RZ ;
        /*00a0*/               @P2 BRA 0x20 ;
        /*00b0*/                   EXIT ;
        /*00c0*/              @!P3 BRA 0xc0 ;
        /*00d0*/                   BRA 0x40 ;
        /*00e0*/                   FADD R1, R1, R1 ;
        /*00f0*/               @P2 BRA 0xe0 ;
        /*0100*/                   EXIT ;
        /*0110*/                   BRA 0x110 ;
        /*0120*/                   NOP ;
"""

# A block a tile: a prologue, a loop of steps, an epilogue.
PLAIN = """
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/                   LDGSTS.E.BYPASS.128 [R5], desc[UR6][R8.64] ;
        /*0020*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0030*/                   LDSM.16.M88.4 R8, [R9] ;
        /*0040*/               @P1 BRA 0x20 ;
        /*0050*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*0060*/                   EXIT ;
"""

SPIN = """
        /*0200*/                   FADD R1, R1, R1 ;
        /*0210*/               @P2 BRA 0x200 ;
        /*0220*/                   EXIT ;
"""


def test_a_flat_loop_has_its_step_apart_from_its_epilogue() -> None:
    read = code.read(FLAT)
    # 0x20 to 0x50, and the branch back: the shortest way round
    assert read.step == Counts(
        instructions=6, matrix=1, matrix_operations=2 * 64 * 256 * 16 // 4, matrix_bytes=32 * (64 + 256), bulk_loads=1
    )
    # 0x60 to 0x9c, and the two branches that spin; nothing of the loop without products, which another branch takes
    assert read.once == Counts(instructions=11, special=1, floats=1, barriers=1, shared=3, wavefronts=2 + 4 + 4 + 2)


def test_a_block_a_tile_has_its_prologue_and_epilogue_once() -> None:
    read = code.read(PLAIN)
    assert read.step == Counts(instructions=3, matrix=1, matrix_operations=2 * 16 * 8 * 16, shared=1, wavefronts=4)
    assert read.once == Counts(instructions=4, wavefronts=8)


def test_copies_of_a_loops_first_steps_are_not_counted_before_it_too() -> None:
    copy = "        /*0010*/                   LDGSTS.E.BYPASS.128 [R5], desc[UR6][R8.64] ;\n"
    branch = "        /*0040*/               @P1 BRA 0x20 ;\n"
    pipelined = PLAIN.replace(branch, copy.replace("0010", "0038").replace("R8.64]", "R8.64], !P0") + branch)
    assert code.read(pipelined).step.wavefronts == 4 + 4
    assert code.read(pipelined).once == Counts(instructions=4, wavefronts=4)  # of the store
    # Two steps ahead, and a copy that is none of the loop's.
    ahead = pipelined.replace(
        copy, copy + copy.replace("0010", "0014") + copy.replace("0010", "0018").replace("128", "64")
    )
    assert code.read(ahead).once == Counts(instructions=6, wavefronts=4 + 2)
    # One behind the loop is the epilogue's.
    behind = pipelined.replace("        /*0060*/", copy.replace("0010", "0058") + "        /*0060*/")
    assert code.read(behind).once == Counts(instructions=5, wavefronts=8)
    # Without a loop every copy is made.
    unrolled = pipelined.replace("@P1 BRA 0x20", "NOP")
    assert code.read(unrolled).once.wavefronts == 4 + 4 + 4 + 4  # LDSM's, too


def test_code_without_products_and_loops_runs_once() -> None:
    read = code.read(PLAIN.replace("@P1 BRA 0x20", "NOP").replace("HMMA.16816.F32.BF16", "MUFU.EX2"))
    assert read.step == Counts()
    assert read.once.special == 1


def test_a_loop_that_was_unrolled_whole_is_one_step() -> None:
    """All of the products' code is the loop's, and not the epilogue's: from the first of them to the last."""
    step = """
        /*0020*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0030*/                   LDSM.16.M88.4 R8, [R9] ;
"""
    looped = PLAIN.replace("@P1 BRA 0x20", "NOP")
    read = code.read(looped.replace(step.strip(), step.strip() + step + step))
    assert read.step == Counts(instructions=5, matrix=3, matrix_operations=3 * 4096, shared=2, wavefronts=8)
    assert read.once == Counts(instructions=5, shared=1, wavefronts=12)
    # A loop of something else, as one that spins, makes no difference.
    spins = code.read(looped.replace("EXIT", "BRA 0x200") + SPIN)
    assert (spins.step.matrix, spins.step.instructions, spins.once.floats) == (1, 1, 1)


COVERED = """
        /*0082*/              @!P2 UTMALDG.2D [UR16], [UR12] ;
        /*0083*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR8], R16 ;
        /*0084*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0085*/              @!P2 UTMALDG.2D [UR16], [UR12] ;
        /*0086*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR8], R16 ;
"""


def test_a_load_that_is_waited_for_before_the_last_product_is_covered_by_it() -> None:
    barrier = "        /*0080*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;\n"
    once = code.read(FLAT.replace(barrier, barrier + COVERED)).once
    assert (once.bulk_loads, once.covered_loads) == (2, 1)
    late = COVERED.replace("WARPGROUP.DEPBAR.LE gsb0, 0x0", "NOP").replace("0x0082", "0x0081")
    drained = barrier + "        /*0081*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;\n" + late
    once = code.read(FLAT.replace(barrier, drained)).once
    assert (once.bulk_loads, once.covered_loads) == (2, 0)
    assert code.read(FLAT).once.covered_loads == 0


def test_without_matrix_instructions_the_multiply_adds_are_the_loop() -> None:
    read = code.read(PLAIN.replace("HMMA.16816.F32.BF16", "FFMA"))
    assert (read.step.floats, read.step.matrix, read.step.instructions) == (1, 0, 3)


def test_a_left_operand_in_registers_takes_no_shared_memory() -> None:
    read = code.read(FLAT.replace("R24, gdesc[UR4], R24", "R24, R4, gdesc[UR4], R24"))
    assert read.step.matrix_bytes == 32 * 256


# --- the terms, by hand -----------------------------------------------------------------------------------------------

STEP = Counts(instructions=100, matrix=4, matrix_operations=1000, matrix_bytes=1280, wavefronts=3, bulk_loads=2)
ONCE = Counts(instructions=1000, special=20, floats=500, barriers=10, shared=30, wavefronts=60)
KERNEL = Kernel(Code(STEP, ONCE), warps=8, stages=3, resident=1, registers=200, shared=100_000, spilled=0)


def test_pipes() -> None:
    assert terms.issue_clocks(ONCE, 8, DEVICE) == 1000 * 8 / 4
    assert terms.issue_clocks(ONCE, 8, replace(DEVICE, peak={"bf16": 1000.0, "fp32": 64.0})) == 500 * 8 * 32 / 32
    assert terms.special_clocks(ONCE, 8) == 20 * 8 * 32 / 16
    assert terms.memory_pipe_clocks(ONCE, 8, 0) == 60 * 8
    assert terms.memory_pipe_clocks(STEP, 8, 12_800) == 3 * 8 + (1280 * 2 + 12_800) / 128
    assert terms.memory_pipe_clocks(replace(STEP, bulk_loads=0), 8, 12_800) == 3 * 8 + 1280 * 2 / 128


def test_tensor_time_is_the_peaks_where_few_work_and_the_devices_where_all_do() -> None:
    assert terms.tensor_seconds(1e6, "bf16", 1, DEVICE) == 1e6 / 1e12
    assert terms.tensor_seconds(1e6, "bf16", 10, DEVICE) == 1e6 / 0.5e12


def test_passes_of_an_unrolled_loop() -> None:
    assert terms.passes(KERNEL, steps=6, operations=8 * 1000) == 6
    assert terms.passes(KERNEL, steps=6, operations=8 * 500) == 3
    unknown = replace(KERNEL, code=Code(replace(STEP, matrix_operations=0), ONCE))  # Blackwell's names have no shape
    assert terms.passes(unknown, steps=6, operations=8000) == 6
    assert terms.passes(replace(KERNEL, code=Code(Counts(), ONCE)), steps=6, operations=8000) == 0


def test_a_tile_of_a_product() -> None:
    tile = terms.tile_of(KERNEL, 6, 8000, 0, "bf16", 1, DEVICE)
    step = max(8000 / 1000, 100 * 8 / 4, 3 * 8 + 1280 * 2 / 128, 1000 / 2)  # clocks: the latency of loads decides
    once = 1200 + 57 * 10 + max(2000, 320, 480)
    assert tile.tensor == pytest.approx(6 * 8e-9)
    assert tile.loop == pytest.approx(6 * step * 1e-9)
    assert tile.once == pytest.approx(once * 1e-9)
    assert tile.busy == pytest.approx((6 * 200 + 2000) * 1e-9)  # the schedulers
    multiplies = replace(KERNEL, code=Code(replace(STEP, matrix_operations=1_000_000), ONCE))
    large = terms.tile_of(multiplies, 6, 8_000_000, 0, "bf16", 1, DEVICE)
    assert large.loop == pytest.approx(6 * 8e-6)


def test_a_load_covers_what_the_last_step_takes_and_large_ones_count_several_times() -> None:
    def once_of(added: int = 0, **loads: int) -> float:
        kernel = replace(KERNEL, code=Code(replace(STEP, matrix_operations=1000), replace(ONCE, **loads)))
        return terms.tile_of(kernel, 6, 8000 * 50, 0, "bf16", 1, DEVICE, added).once

    least = once_of()
    step = 8000 * 50 / 1000 * 1e-9  # 400 clocks of products
    assert once_of(bulk_loads=2) == pytest.approx(least + 2 * 1000e-9)
    assert once_of(bulk_loads=2, covered_loads=1) == pytest.approx(least + 2 * 1000e-9 - step)
    assert once_of(bulk_loads=1, covered_loads=1, added=64 * 1024) == pytest.approx(least + 2000e-9 - step)
    assert once_of(bulk_loads=1, added=64) == once_of(bulk_loads=1)


def test_products_outside_of_the_loop_take_their_time() -> None:
    outside = replace(KERNEL, code=Code(STEP, replace(ONCE, matrix=1, matrix_operations=500)))
    tiles = [terms.tile_of(kernel, 6, 8000, 0, "bf16", 1, DEVICE) for kernel in (KERNEL, outside)]
    more = 8 * 500 / 1000 * 1e-9
    assert tiles[1].once - tiles[0].once == pytest.approx(more)
    assert tiles[1].tensor - tiles[0].tensor == pytest.approx(more)


def test_a_pass_of_several_steps_waits_for_the_loads_of_each() -> None:
    unrolled = replace(KERNEL, code=Code(replace(STEP, matrix_operations=3000), ONCE))
    assert terms.passes(unrolled, 6, 8000) == 2
    tile = terms.tile_of(unrolled, 6, 8000, 0, "bf16", 1, DEVICE)
    assert tile.loop == pytest.approx(6 * 1000 / 2 * 1e-9)  # of three stages two are ahead


def test_a_tile_whose_products_wait_for_its_softmax() -> None:
    chained = replace(KERNEL, code=Code(replace(STEP, special=10), ONCE))
    tile = terms.tile_of(chained, 6, 8000, 0, "bf16", 1, DEVICE)
    assert tile.loop == pytest.approx(6 * (8 + 200 + 160) * 1e-9)


def test_exact_float32_has_no_tensor_cores() -> None:
    floats = replace(KERNEL, code=Code(Counts(instructions=100, floats=80), ONCE), stages=1)
    tile = terms.tile_of(floats, 6, 64 * 80 * 8, 0, "fp32", 1, DEVICE)
    assert tile.tensor == 0
    assert tile.loop == pytest.approx(6 * 1000e-9)  # latency, with nothing ahead of it


def test_rounds_and_blocks_that_share_a_multiprocessor() -> None:
    assert terms.rounds_of(25, 10, 20) == [10, 10, 5]  # persistent: ten blocks walk
    assert terms.rounds_of(25, 25, 20) == [20, 5]
    tile = Tile(tensor=1, loop=4, once=6, busy=5)
    assert terms.compute_seconds(tile, [10, 10, 5], 10) == 3 * 10
    assert terms.compute_seconds(tile, [20, 5], 10) == (10 + 5) + 10


def test_a_launch() -> None:
    kernel = replace(KERNEL, resident=2)
    time = terms.launch_time(kernel, 25, 25, 6, 8000, 0, 1000, "bf16", True, DEVICE)
    tile = terms.tile_of(kernel, 6, 8000, 0, "bf16", 10, DEVICE)
    assert time.loop + time.epilogue == pytest.approx(2 * tile.alone + tile.busy)
    assert time.waves == 25 / 20
    assert time.tensor == pytest.approx(3 * tile.tensor)
    assert time.memory == 1e-9
    assert time.device == pytest.approx(2 * tile.alone + tile.busy + terms.GAP)
    assert time.host == terms.HOST_DESCRIPTORS
    dependent = terms.launch_time(kernel, 25, 25, 6, 8000, 0, 1000, "bf16", True, DEVICE, dependent=True)
    assert dependent.device == pytest.approx(time.device - terms.GAP + terms.DEPENDENT_GAP)
    bound = terms.launch_time(kernel, 25, 25, 6, 8000, 0, 10**9, "bf16", False, DEVICE)
    assert bound.device == pytest.approx(1e-3 + terms.GAP)
    assert bound.host == terms.HOST_LAUNCH


def test_the_rival() -> None:
    config = MODELS["ViT-B/32"]
    assert isinstance(config, VitConfig)
    steps = {step.name: step for step in rival.steps_of(config, 256, "bf16")}
    m, w = 256 * 50, 768
    assert steps["qkv"].operations == 2 * m * 3 * w * w
    assert steps["qkv"].moved == 2 * (m * w + 3 * w * w + m * 3 * w)
    passes = ("residual and LayerNorm", "activation")  # two of one, one of the other: 32 bytes an element of a block
    assert sum(steps[name].count * steps[name].moved for name in passes) == 12 * 32 * m * w
    library = Library(0.8, 0.87, 0.4)
    large = rival.Step("", "product", 1, 1e12, 1e6)
    assert rival.step_seconds(large, "bf16", DEVICE, library) == pytest.approx(1e12 / (0.8 * 5e12))
    attention = replace(large, kind="attention")
    assert rival.step_seconds(attention, "bf16", DEVICE, library) == pytest.approx(1e12 / (0.4 * 5e12))
    small = rival.Step("", "product", 1, 1, 870_000)
    assert rival.step_seconds(small, "bf16", DEVICE, library) == pytest.approx(5e-6 + 1e-6)
    assert rival.seconds_of(config, 256, "bf16", DEVICE) is None  # nothing is known of such libraries
    known = replace(DEVICE, library=library)
    seconds = rival.seconds_of(config, 256, "bf16", known)
    assert seconds is not None
    assert seconds > max(step.count * rival.step_seconds(step, "bf16", known, library) for step in steps.values())
    assert rival.seconds_of(config, 256, "fp16", known) is None


# --- what must cost more ----------------------------------------------------------------------------------------------


def seconds(kernel: Kernel = KERNEL, tiles: int = 25, device: Device = DEVICE, operations: int = 800_000) -> float:
    return terms.launch_time(kernel, tiles, tiles, 6, operations, 0, 1000, "bf16", False, device).device


@pytest.mark.parametrize("name", ["instructions", "barriers", "bulk_loads"])
def test_each_of_these_costs_time(name: str) -> None:
    worse = replace(KERNEL, code=Code(STEP, replace(ONCE, **{name: 2 * getattr(ONCE, name) + 1})))
    assert seconds(worse) > seconds()


@pytest.mark.parametrize("name", ["special", "wavefronts"])
def test_each_of_these_costs_time_where_it_is_most(name: str) -> None:
    assert seconds(replace(KERNEL, code=Code(STEP, replace(ONCE, **{name: 5000})))) > seconds()
    assert seconds(replace(KERNEL, code=Code(STEP, replace(ONCE, **{name: 1})))) == seconds()


def test_more_of_a_device_takes_less_time_and_more_work_more() -> None:
    assert seconds(tiles=31) > seconds(tiles=30) == seconds(tiles=21)  # a round more
    assert seconds(operations=1_600_000) > seconds()
    assert seconds(device=replace(DEVICE, clock=2e9)) < seconds()
    assert seconds(device=replace(DEVICE, multiprocessors=20, sustained={"bf16": 10e12})) < seconds()
    assert seconds(replace(KERNEL, resident=2)) < seconds()


# --- a prediction, its tables and its comparison ---------------------------------------------------------------------


def predicted(kernel: Kernel = KERNEL, batch: int = 256, device: str = "H200") -> Prediction:
    from bench.machine_code import Job

    job = Job("", "_linear_kernel", "", "sm_90", (("x", "tensordesc<bf16[128,64]>"),), (), (), ())
    launch = Launch("linear 1 × 2 × 3", job, 132, Work(6168, 16, 8000, 49_152), 10**6)
    launches = [launch] * 3 + [replace(launch, label="another")]
    return predict("ViT-L/14", batch, "bf16", DEVICES[device], launches, {job.identity: kernel})


WORSE = replace(KERNEL, code=Code(STEP, replace(ONCE, instructions=1001)))


def test_a_worse_kernel_gives_a_worse_prediction() -> None:
    assert predicted(WORSE).on_device > predicted().on_device
    assert [p.count for p in predicted().launches] == [3, 1]


def test_the_slower_of_host_and_device_decides_but_a_graph_has_no_host() -> None:
    launched, replayed = predicted(), predicted(batch=1)
    assert launched.on_host == 4 * terms.HOST_DESCRIPTORS
    assert launched.seconds == max(launched.on_device, launched.on_host)
    assert replayed.replayed
    assert replayed.seconds == replayed.on_device


@pytest.mark.parametrize("device", ["H200", "A100", "L4"])
def test_every_printed_figure_says_that_it_is_calculated(device: str) -> None:
    them = [predicted(device=device), predicted(batch=1, device=device)]
    text = command.markdown(them, {(device, "ViT-L/14", 256, "bf16"): "12,345"})
    assert ("upper bounds" in text) == (device == "L4")  # no sustained rate of it is published
    assert ("no rival's" in text) == (device != "H200")
    tables = 0
    for part in text.split("\n\n"):
        lines = part.strip().splitlines()
        if not lines[0].startswith("|"):
            assert not re.search(r"\d", part) or "calculated" in part.lower(), part
            continue
        tables += 1
        header, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
        for column, name in enumerate(header):
            figures = any(re.search(r"\d", row[column]) for row in rows)
            assert column == 0 or not figures or "(calculated)" in name or name == "img/s (measured)", name
    assert tables == 3


def test_what_a_gpu_measured_stands_beside(tmp_path: Path) -> None:
    (tmp_path / "some").mkdir()
    rows = [
        {"system": "clip_fast", "model": "ViT-L/14", "batch": 256, "precision": "bf16", "images_per_second": 51234.5},
        {"system": "clip_fast", "model": "ViT-L/14", "batch": 1, "precision": "bf16", "failed": "no memory"},
        {"system": "timm", "model": "ViT-L/14", "batch": 8, "precision": "bf16", "images_per_second": 1.0},
    ]
    result = {"environment": {"device": "NVIDIA H200", "code": "another"}, "rows": rows}
    (tmp_path / "some" / "end_to_end.json").write_text(json.dumps(result))
    key = ("H200", "ViT-L/14", 256, "bf16")
    assert command.measured_on(["H200", "A100"], tmp_path) == {key: "51,234 (other code)"}
    result["environment"]["device"] = "NVIDIA GH200 480GB"
    (tmp_path / "another").mkdir()
    (tmp_path / "another" / "end_to_end.json").write_text(json.dumps(result | {"rows": [rows[0] | {"batch": 9}]}))
    assert command.measured_on(["H200", "A100"], tmp_path) == {key: "51,234 (other code)"}
    assert "img/s (measured)" in command.markdown([predicted()], command.measured_on(["H200"], tmp_path))
    assert "(measured)" not in command.markdown([predicted()], {})


def test_a_change_that_costs_time_is_seen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    old.write_text(command.document([predicted()]))
    new.write_text(command.document([predicted(WORSE)]))
    assert regressions.main([str(new), "--committed", str(old)]) == 1
    said = capsys.readouterr().out
    assert "H200 ViT-L/14, batch 256, bf16: on_device (calculated, seconds)" in said
    assert "H200 ViT-L/14, batch 256, bf16, linear 1 × 2 × 3: seconds (calculated, seconds)" in said
    assert regressions.main([str(old), "--committed", str(new)]) == 0
    assert "1 better" in capsys.readouterr().out
    new.write_text(old.read_text().replace('"triton": "', '"triton": "0.'))
    assert regressions.main([str(new), "--committed", str(old)]) == 2
    assert f"python -m bench.predict --models ViT-L/14 --devices H200 --json {old}" in capsys.readouterr().out


def test_what_the_new_table_leaves_out_is_not_compared() -> None:
    one, all_of_one, both = (
        [row for device in devices for batch in batches for row in command.rows_of(predicted(KERNEL, batch, device))]
        for devices, batches in ((["H200"], [256]), (["H200"], [256, 1]), (["H200", "A100"], [256, 1]))
    )
    assert regressions.compare_predictions(both, all_of_one) == []
    (change,) = regressions.compare_predictions(both, one)  # the other batch of that model is gone
    assert change.worse
    changes = regressions.compare_predictions(all_of_one, both)
    assert len(changes) == 2
    assert not any(change.worse for change in changes)


def test_every_device_names_its_source_and_has_a_target() -> None:
    from clip_fast.kernels.targets import TARGETS

    for device in DEVICES.values():
        assert device.arch in TARGETS
        assert re.search(r"datasheet|whitepaper", device.source)
        assert math.isclose(device.chip("fp32"), device.peak["fp32"] * device.clock * device.multiprocessors)


# --- compiled ---------------------------------------------------------------------------------------------------------


def run(program: str, timeout: float = 570) -> subprocess.CompletedProcess[str]:
    """Python in a process of its own, in which Triton compiles."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout
    )


LAUNCHED = """
from bench.machine_code import TARGETS
from bench.models import MODELS
from bench.predict.devices import DEVICES
from bench.predict.launches import launches_of
for launch in launches_of(MODELS["ViT-B/32"], 256, "bf16", DEVICES["H200"]):
    print(launch.job.kernel, launch.grid, launch.work.tiles, launch.work.steps, sep="\\t")
"""


def test_a_head_of_two_parts_has_the_work_of_both() -> None:
    qkv = torch.empty(1, dtype=torch.bfloat16, device="meta")
    tiles = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_D": 64, "TAIL": 16, "REST": 32, "TILES": True, "MASKED": False}
    _, work = launches._flash_attention(tiles | {"N": 729, "qkv_ptr": qkv}, 12)
    assert work == Work(tiles=12, steps=11, operations=4 * 64 * 64 * 80, copied=2 * 64 * 80 * 2)


def test_launches_are_those_of_the_tower_with_the_devices_grid() -> None:
    done = run(LAUNCHED)
    assert done.returncode == 0, done.stderr
    launches = [line.split("\t") for line in done.stdout.splitlines()]
    kernels = [name for name, *_ in launches]
    assert kernels[:2] == ["_patch_embed_kernel", "_layer_norm_kernel"]
    assert kernels.count("_flash_attention_kernel") == 11
    assert kernels.count("_linear_kernel") >= 4 * 12 + 1
    persistent = [(int(grid), int(tiles)) for name, grid, tiles, _ in launches if name == "_linear_kernel"]
    assert all(grid == tiles or grid % 132 == 0 for grid, tiles in persistent)
    assert any(grid < tiles for grid, tiles in persistent)
    assert {int(steps) for name, *_, steps in launches if name == "_patch_embed_kernel"} == {3 * 32 * 32 // 64}


AS_COUNTED = """
from bench.models import MODELS
from bench.predict.devices import DEVICES
from bench.predict.launches import launches_of
from bench.predict.prediction import read_kernel
from bench.predict.terms import passes
seen = set()
for launch in launches_of(MODELS["ViT-B/32"], 1, "bf16", DEVICES["H200"]):
    if launch.job.identity in seen or not launch.work.operations:
        continue
    seen.add(launch.job.identity)
    kernel = read_kernel(launch.job)
    print(launch.label, passes(kernel, launch.work.steps, launch.work.operations), launch.work.steps, sep="\\t")
"""


@pytest.mark.slow
def test_a_steps_work_is_what_its_matrix_instructions_do() -> None:
    done = run(AS_COUNTED)
    assert done.returncode == 0, done.stderr
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    assert len(lines) >= 7
    for label, passes, steps in lines:
        unrolled = int(steps) / float(passes)
        assert unrolled in (1, 2, 4), label


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_committed_predictions_are_of_todays_code(tmp_path: Path) -> None:
    import triton

    committed = json.loads(regressions.PREDICTED.read_text())
    if committed["triton"] != triton.__version__:
        pytest.skip(f"the committed predictions are of Triton {committed['triton']}")
    file = tmp_path / "predictions.json"
    done = run(f"import sys\nfrom bench.predict import __main__ as p\nsys.exit(p.main(['--json', {str(file)!r}]))")
    assert done.returncode == 0, done.stdout + done.stderr
    shown = [row for row in committed["rows"] if row["device"] == "H200" and row["model"] in SHOWN]
    assert json.loads(file.read_text())["rows"] == shown, "make them anew: see bench/predict/__main__.py"


def test_the_page_has_the_committed_figures() -> None:
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    committed = json.loads(regressions.PREDICTED.read_text())
    section = page.partition("## Predicted, not measured")[2].partition("\n## ")[0]
    assert f"Triton {committed['triton']}" in section
    wholes = {(row["model"], row["batch"], row["device"]): row for row in committed["rows"] if not row["launch"]}
    expected: list[str] = []
    for (model, batch, device), row in wholes.items():
        if device == "H200":
            time, least, rival_ = row["seconds"], row["least"], row["rival"]
            host = f"{row['on_host'] * 1e3:.3g}" if row["on_host"] else "graph"
            figures = [f"{batch / time:,.0f}", f"{least / time:.0%}", f"{row['on_device'] * 1e3:.3g}", host]
            figures += [f"{batch / rival_:,.0f}", f"{rival_ / time:.2f}"]
            expected.append(f"| {SIGLIPS.get(model, model)}, batch {batch} | {' | '.join(figures)} |")
    for batch in (256, 1):
        for model in SHOWN:
            rows = [wholes[model, batch, device] for device in ("A100", "RTX 4090", "L4", "B200")]
            cells = [f"{batch / row['seconds']:,.0f} ({row['least'] / row['seconds']:.0%})" for row in rows]
            expected.append(f"| batch {batch}, {model} | {' | '.join(cells)} |")
    assert [line for line in section.splitlines() if re.match(r"\| .*batch \d", line)] == expected


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--models", "no such"], "unknown: no such"), (["--models", "RN50"], "ResNet"), (["--devices", "H2"], "H200")],
)
def test_what_cannot_be_predicted_is_said(arguments: list[str], said: str) -> None:
    done = run(f"import sys\nfrom bench.predict import __main__ as p\nsys.exit(p.main({arguments!r}))")
    assert done.returncode == 2
    assert said in done.stderr


def test_counts_add_up_field_by_field() -> None:
    ones = Counts(**{field.name: 1 for field in dataclasses.fields(Counts)})
    assert ones + ones == Counts(**{field.name: 2 for field in dataclasses.fields(Counts)})
