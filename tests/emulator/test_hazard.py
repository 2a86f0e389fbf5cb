"""The register hazard of Triton before 3.9 on Hopper is seen, and the project's workaround is enough."""

from __future__ import annotations

from importlib.metadata import version

import pytest

from .commands import json_of, require_emulator
from .hazard import HAZARDS


@pytest.mark.slow
@pytest.mark.timeout(1800)  # the first test compiles kernels and runs them all
@pytest.mark.parametrize(("op", "case", "dtype", "needed"), HAZARDS, ids=lambda value: str(value))
def test_the_workaround_is_needed_and_enough(op: str, case: str, dtype: str, needed: bool) -> None:
    require_emulator()
    release = version("triton")
    if tuple(int(n) for n in release.split(".")[:2]) >= (3, 9):
        pytest.skip(f"Triton {release} has not the hazard: this is for 3.6 to 3.8")
    rows = [row for row in json_of("hazard") if (row["op"], row["case"], row["dtype"]) == (op, case, dtype)]
    with_it, without = (next(row for row in rows if row["workaround"] is on) for on in (True, False))
    assert with_it["races"] == 0, with_it["example"]
    assert with_it["same_bits"]
    assert with_it["error"] <= 1.2 * with_it["twin"]
    assert (without["races"] > 0) == needed, without["example"]
    assert without["same_bits"] != needed
