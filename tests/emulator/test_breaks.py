"""PTX broken on purpose is noticed."""

from __future__ import annotations

import pytest

from .breaks import BREAKS, Break
from .commands import json_of


@pytest.mark.slow
@pytest.mark.timeout(1800)  # the first test compiles kernels and runs them all
@pytest.mark.parametrize("what", BREAKS, ids=lambda what: f"{what.arch}-{what.op}-{what.title}")
def test_a_broken_kernel_is_noticed(what: Break) -> None:
    (outcome,) = (row for row in json_of("break", "--arch", what.arch) if row["name"] == what.name)
    assert not outcome["missed"], "\n".join(outcome["missed"])
    assert outcome["noticed"], f"{outcome['matching']} lines match {what.pattern}\n" + "\n".join(outcome["details"])
    assert outcome["together"]
