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


_ALL = ("fp16", "bf16", "fp32", "tf32")
_LANES = frozenset({"RACE", "BITS"})
_ACCURACY = frozenset({"ACCURACY"})
_FUSED = "a fused multiply-add makes the lanes of a reduction disagree in the last bit, and all of them store it"
_CHAIN = "exact float32 is one chain of multiply-adds, which errs more than a BLAS's several sums"

KNOWN = (
    Known(_FUSED, "layer_norm", "W=63", _ALL, _LANES),
    Known(_FUSED, "linear", "out 131x257x88", _ALL, _LANES),
)


def known(op: str, case: str, dtype: str) -> Known | None:
    return next((k for k in KNOWN if (k.op, k.case) == (op, case) and dtype in k.dtypes), None)
