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


_ALL = ("fp16", "bf16", "fp32", "tf32")
_LANES = frozenset({"RACE", "BITS"})
_FUSED = "a fused multiply-add makes the lanes of a reduction disagree in the last bit, and all of them store it"


def _chain(op: str, case: str, certain: bool = True) -> Known:
    reason = "exact float32 is one chain of multiply-adds, which errs more than the several sums of a BLAS"
    return Known(reason, op, case, ("fp32",), frozenset({"ACCURACY"}), certain=certain)


KNOWN = (
    Known(_FUSED, "layer_norm", "W=63", _ALL, _LANES, since=(3, 9)),
    Known(_FUSED, "linear", "out 131x257x88", _ALL, _LANES, since=(3, 9)),
    _chain("linear", "qkv 17x512x768"),
    _chain("linear", "out 150x320x1024"),
    _chain("linear", "fc1 quick_gelu 140x512x1024"),
    _chain("linear", "plain 2x256x6144"),
    _chain("attention_pool", "ViT-B/32", certain=False),
    _chain("attention_pool", "ViT-H/14", certain=False),
    _chain("attention_pool", "RN50"),
    _chain("attention_pool", "RN50x64 cut"),
    _chain("flash_attention", "N=577 H=1 D=64", certain=False),
)


def known(op: str, case: str, dtype: str, triton: str) -> Known | None:
    """The entry of a case, for a version of Triton such as "3.9.0"."""
    release = tuple(int(number) for number in triton.split(".")[:2])
    for entry in KNOWN:
        if (entry.op, entry.case) == (op, case) and dtype in entry.dtypes and release >= entry.since:
            return entry
    return None
