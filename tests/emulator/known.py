"""What the gate is known to find in the kernels as they are. A case that passes again is reported: remove its entry."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Known:
    reason: str
    op: str
    case: str
    dtypes: tuple[str, ...]
    problems: frozenset[str]  # the kinds of problem that it makes, at most
    since: tuple[int, int] = (0, 0)  # the release of Triton; in those before it passes
    certain: bool = True  # or near the bound, so that it depends on the BLAS of the twin whether it passes


KNOWN: tuple[Known, ...] = ()


def known(op: str, case: str, dtype: str, triton: str) -> Known | None:
    """The entry of a case, for a version of Triton such as "3.9.0"."""
    release = tuple(int(number) for number in triton.split(".")[:2])
    for entry in KNOWN:
        if (entry.op, entry.case) == (op, case) and dtype in entry.dtypes and release >= entry.since:
            return entry
    return None
