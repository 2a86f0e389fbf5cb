"""The launch that the rows of a product choose."""

from __future__ import annotations

import pytest
import torch

from clip_fast.kernels.launches import TABLE
from clip_fast.kernels.targets import TARGETS, Launch, LaunchTable, fitting, pinned

WIDE, SQUARE, FLAT, SMALL = LAUNCHES = tuple(
    Launch(m, n, 64, num_warps=4, num_stages=3) for m, n in ((128, 256), (128, 128), (64, 128), (64, 64))
)


@pytest.mark.parametrize(
    ("rows", "columns", "multiprocessors", "wanted"),
    [
        (50, 768, 132, SMALL),  # 12 tiles, where the widest would be 3
        (257, 3072, 132, FLAT),  # 120 tiles, where the smallest would be 240, and so two rounds
        (257, 4096, 132, SQUARE),  # 96
        (65792, 3072, 132, WIDE),  # many rounds
        (12800, 768, 132, SQUARE),  # 600 tiles are 5 rounds, where 300 of twice the size are 3
        (65792, 3072, 1, WIDE),
        (1, 1, 1, SMALL),
    ],
)  # fmt: skip
def test_what_fits(rows: int, columns: int, multiprocessors: int, wanted: Launch) -> None:
    assert fitting(LAUNCHES, rows, columns, multiprocessors) == wanted


def test_one_launch_is_taken_as_it_is() -> None:
    assert fitting((SMALL,), 10**6, 10**6, 132) == SMALL


def test_a_number_pins_the_launch() -> None:
    table = LaunchTable(linear={"half": {"sm_80": LAUNCHES}})
    asked = "linear", torch.bfloat16, TARGETS["sm_80"], "ieee"
    for number, wanted in enumerate((*LAUNCHES, LAUNCHES[-1])):
        with pinned(number):
            assert table.launches_for(*asked) == (wanted,)
    assert table.launches_for(*asked) == LAUNCHES


@pytest.mark.parametrize("arch", TARGETS)
def test_launches_of_an_entry_reduce_alike(arch: str) -> None:
    """One reduction step; and a warp has rows enough that row statistics are merged within it, in one order."""
    for op, kinds in TABLE.items():
        for kind in kinds:
            launches = TABLE.entry(op, kind, TARGETS[arch])
            assert len({launch.block_k for launch in launches}) == 1
            assert len(set(launches)) == len(launches) <= TABLE.most
            if op == "linear":
                assert all(launch.block_m >= 8 * launch.num_warps for launch in launches)
