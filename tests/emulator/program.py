"""What a kernel's PTX becomes: instructions over units of a register file."""

from __future__ import annotations

from dataclasses import dataclass, field


class Unsupported(Exception):
    """A PTX instruction that the emulator does not know."""


@dataclass
class Inst:
    """An instruction. Operands are units of the register file; what the numbers mean depends on the operation.

    A negative unit is an immediate, whose place is known when all are.
    """

    op: str
    results: list[int] = field(default_factory=list)
    sources: list[int] = field(default_factory=list)
    mode: int = 0
    extra: int = 0
    immediate: int = 0
    immediate2: int = 0
    target: int = 0  # of a branch; elsewhere mostly the bytes of the register that holds an address
    guard: int = -1
    guard_negated: bool = False
    line: int = 0  # of the PTX
    text: str = ""
    label: tuple[str, tuple[int, ...]] | None = None  # that a branch goes to, and the scopes in which it may be


@dataclass
class Param:
    name: str
    offset: int
    size: int


@dataclass(eq=False)  # each is itself alone, so that what is made of it can be kept
class Program:
    name: str
    insts: list[Inst]
    units: int
    first_constant: int
    constants: bytes
    specials: list[tuple[int, int]]  # unit, and which special register it holds
    params: list[Param]
    param_bytes: int
    warps: int
