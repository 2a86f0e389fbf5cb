"""Triton before 3.9 on Hopper lets a register be written over that a product still reads (triton-lang/triton#9433).

Seen with the project's workaround off, and not with it on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .cases import find
from .gate import build, call
from .machine import Mode
from .problem import KINDS
from .subject import bits, rms, workaround

if TYPE_CHECKING:
    from .driver import EmulatorDriver

_ADVERSARIES: tuple[tuple[Mode, int], ...] = (("earliest", 0), ("latest", 0), ("latest", 1))

# op, case, dtype, and whether the workaround is needed there
HAZARDS = (
    ("patch_embed", "P=14 of uint8", "fp16", True),
    ("patch_embed", "P=16 of uint8", "fp16", True),
    ("patch_embed", "P=16 of float32", "fp16", True),
    ("patch_embed", "P=14 of uint8", "bf16", True),
    ("attention_pool", "ViT-L/14", "fp16", True),
    ("attention_pool", "RN50 cut", "fp16", True),
    ("attention_pool", "ViT-B/32", "tf32", False),
    ("flash_attention", "N=257 H=1 D=64", "fp16", False),
    ("flash_attention", "N=257 H=1 D=64", "tf32", False),
    ("flash_attention", "N=257 H=1 D=80", "fp16", False),
    ("flash_attention", "N=257 H=1 D=80", "tf32", False),
)


@dataclass
class Seen:
    op: str
    case: str
    dtype: str
    needed: bool
    workaround: bool
    races: int = 0  # places in the PTX
    same_bits: bool = True  # under all adversaries
    error: float = 0.0  # the largest of the adversaries, root mean square
    twin: float = 0.0
    example: str = ""

    @property
    def as_expected(self) -> bool:
        hazardous = self.needed and not self.workaround
        return (self.races > 0, self.same_bits) == (hazardous, not hazardous)


def look(driver: EmulatorDriver, op: str, case: str, dtype: str, needed: bool, on: bool) -> Seen:
    problem = build(find(op, case), KINDS[dtype])
    seen = Seen(op, case, dtype, needed, on)
    exact = problem.exact()
    seen.twin = rms(problem.plain().double() - exact).item()
    first = None
    for mode, seed in _ADVERSARIES:
        with workaround(on):
            (output, *_), runs = call(driver, problem, "sm_90", mode, seed)
        first = output.clone() if first is None else first
        seen.same_bits &= bool((bits(first) == bits(output)).all())
        seen.error = max(seen.error, rms(output.double() - exact).item())
        faults = [f"{run.kernel}: {fault}" for run in runs for fault in run.faults]
        seen.races = max(seen.races, len(faults))
        seen.example = seen.example or next(iter(faults), "")
    return seen
