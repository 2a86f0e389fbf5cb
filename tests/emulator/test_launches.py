"""Products have the same bits by every launch between which their rows decide."""

from __future__ import annotations

import pytest

from .commands import json_of
from .gate import Row
from .launches import PRODUCTS
from .part import assert_passes


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("arch", "dtype"), [("sm_80", "bf16"), ("sm_90", "bf16")])
def test_every_launch(arch: str, dtype: str) -> None:
    rows = [Row(**row) for row in json_of("launches", "--arch", arch, "--dtype", dtype)]
    assert len(rows) >= len(PRODUCTS) + 7  # a product of `linear` has two launches or more
    for row in rows:
        assert_passes(row)
