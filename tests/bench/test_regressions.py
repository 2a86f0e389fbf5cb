"""The comparison of two machine-code tables: the measures that count as worse, and the command's output."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import regressions
from bench.machine_code import Row

ROW: dict[str, Any] = {
    "arch": "sm_90", "case": "linear fp16 ln+qkv", "kernel": "_linear_kernel", "instructions": 1000, "registers": 200,
    "spilled": 0, "shared": 200_000, "bytes_loaded": 0, "bulk_loaded": 49_152, "bulk_stored": 32_768,
    "occupancy": 0.125, "matrix": {"HGMMA": 4}, "copies": {"UTMALDG": 6, "UTMASTG": 2},
}  # fmt: skip
WORSE = {
    "instructions": 1001, "registers": 201, "spilled": 8, "shared": 200_001, "bytes_loaded": 16, "bulk_loaded": 98_304,
    "bulk_stored": 65_536, "occupancy": 0.1,
}  # fmt: skip


def test_every_measure_is_one_of_a_row_and_of_the_committed_table() -> None:
    assert set(WORSE) == set(regressions.MEASURES)
    table = json.loads(regressions.COMMITTED.read_text())
    assert all(row.keys() == Row.__dataclass_fields__.keys() - {"seconds"} for row in table["rows"])
    assert set(ROW) <= set(Row.__dataclass_fields__)


@pytest.mark.parametrize("measure", WORSE)
def test_each_measure_has_its_worse_direction(measure: str) -> None:
    worse = ROW | {measure: WORSE[measure]}
    (change,) = regressions.compare([ROW], [worse])
    assert change.worse
    assert measure in str(change)
    (change,) = regressions.compare([worse], [ROW])
    assert not change.worse


@pytest.mark.parametrize(
    ("kind", "counts", "worse"),
    [
        ("matrix", {"HGMMA": 8}, {("HGMMA", 4, 8)}),  # the same work in more instructions
        ("matrix", {"HGMMA": 2}, set()),
        ("matrix", {"HMMA": 16}, {("HGMMA", 4, 0)}),
        ("copies", {"UTMALDG": 7, "UTMASTG": 2}, {("UTMALDG", 6, 7)}),
        ("copies", {"UTMALDG": 6, "UTMASTG": 1}, set()),
        ("copies", {"LDGSTS": 6}, {("UTMALDG", 6, 0), ("UTMASTG", 2, 0)}),
    ],
)
def test_matrix_and_copy_instructions_are_compared_by_name(
    kind: str, counts: dict[str, int], worse: set[tuple[str, int, int]]
) -> None:
    changes = regressions.compare([ROW], [ROW | {kind: counts}])
    assert changes
    assert {(change.measure, change.before, change.after) for change in changes if change.worse} == worse


def test_a_kernel_that_went_is_worse_and_one_that_came_is_not() -> None:
    (change,) = regressions.compare([ROW, ROW], [ROW])
    assert change.worse
    assert "gone" in str(change)
    (change,) = regressions.compare([ROW], [ROW, ROW])
    assert not change.worse
    assert regressions.compare([ROW, ROW], [ROW, ROW]) == []


@pytest.mark.parametrize(
    ("after", "version", "status", "said"),
    [
        (ROW, "3.9.0", 0, "1 kernels compared: 0 measures worse"),
        (ROW | {"spilled": 8}, "3.9.0", 1, "spilled 0 -> 8"),
        (ROW, "3.9.1", 2, "Install triton==3.9.0"),
    ],
)
def test_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], after: dict[str, Any], version: str, status: int, said: str
) -> None:
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    old.write_text(json.dumps({"triton": "3.9.0", "rows": [ROW]}))
    new.write_text(json.dumps({"triton": version, "rows": [after]}))
    assert regressions.main([str(new), "--committed", str(old)]) == status
    assert said in capsys.readouterr().out
