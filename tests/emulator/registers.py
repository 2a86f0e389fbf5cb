"""Names of registers and immediates in PTX, and the units of the register file that stand for them."""

from __future__ import annotations

import re
import struct

from .program import Param, Unsupported

SHARED_BASE = 1024  # where a block's shared memory begins; on Hopper the first KiB is the system's

# A unit is 64 bytes: 16 bits of 32 lanes. The engine keeps of a predicate one bit a lane.
WIDTHS = {
    **dict.fromkeys(("pred", "b8", "u8", "s8", "b16", "u16", "s16", "f16", "bf16"), 1),
    **dict.fromkeys(("b32", "u32", "s32", "f32"), 2),
    **dict.fromkeys(("b64", "u64", "s64", "f64"), 4),
}
SPECIALS = (
    "%tid.x", "%tid.y", "%tid.z", "%ntid.x", "%ntid.y", "%ntid.z", "%ctaid.x", "%ctaid.y", "%ctaid.z",
    "%nctaid.x", "%nctaid.y", "%nctaid.z", "%laneid", "%warpid", "%cluster_ctarank", "%smid",
)  # fmt: skip
_ALL_LANES = -1


class Registers:
    """The registers of one kernel, declared in nested scopes, and its immediates."""

    def __init__(self, params: list[Param]) -> None:
        self.params = {param.name: param for param in params}
        self.scopes: list[tuple[int, dict[str, str]]] = [(0, {})]  # number, and type by name
        self.units = 0  # so many are taken
        self.specials: dict[int, int] = {}  # which, by unit
        self._prefixes: dict[str, str] = {}  # of registers that are declared by number
        self._opened = 0
        self._unit: dict[tuple[str, int], int] = {}  # by name and scope
        self._constants: dict[tuple[int, int], int] = {}  # placeholder by value and width

    def open_scope(self) -> None:
        self._opened += 1
        self.scopes.append((self._opened, {}))

    def close_scope(self) -> bool:
        """Whether it was the last."""
        self.scopes.pop()
        return not self.scopes

    def declare(self, kind: str, names: list[str]) -> None:
        for name in names:
            numbered = re.fullmatch(r"(%\w+?)<\d+>", name)
            if numbered:
                self._prefixes[numbered[1]] = kind
            else:
                self.scopes[-1][1][name] = kind

    def type_of(self, name: str) -> str | None:
        """None for what is no register."""
        for _, types in reversed(self.scopes):
            if name in types:
                return types[name]
        numbered = re.fullmatch(r"(%[a-zA-Z_]+)\d+", name)
        return self._prefixes.get(numbered[1]) if numbered else None

    def width(self, name: str) -> int:
        """Bytes of a register; 0 for what is none."""
        kind = self.type_of(name)
        return 2 * WIDTHS[kind] if kind else 0

    def register(self, name: str) -> int:
        kind = self.type_of(name)
        if kind is None:
            raise Unsupported(f"unknown register {name}")
        scope = next((number for number, types in reversed(self.scopes) if name in types), 0)
        return self._take((name, scope), WIDTHS[kind])

    def sink(self, kind: str) -> int:
        """Where a result goes that the PTX calls _."""
        return self._take((f"_ {kind}", 0), WIDTHS[kind])

    def source(self, operand: str, width: int) -> int:
        """The unit of a register, a special register, or an immediate that is `width` units wide."""
        if self.type_of(operand):
            return self.register(operand)
        if operand in SPECIALS:
            unit = self._take((operand, 0), 2)
            self.specials[unit] = SPECIALS.index(operand)
            return unit
        return self.constant(self.immediate(operand), width)

    def predicate(self, operand: str) -> int:
        """The unit of a predicate, or of an immediate one."""
        if self.type_of(operand):
            return self.register(operand)
        return self.constant(_ALL_LANES if self.immediate(operand) else 0, 2)

    def constant(self, value: int, width: int) -> int:
        value &= (1 << (16 * width)) - 1
        return self._constants.setdefault((value, width), -2 - len(self._constants))

    def immediate(self, operand: str) -> int:
        if operand == "global_smem":
            return SHARED_BASE
        if operand in self.params:
            return self.params[operand].offset
        if re.fullmatch(r"0[fFdD][0-9a-fA-F]+", operand):  # the bits of a float or a double
            return int(operand[2:], 16)
        try:
            return int(operand.rstrip("U"), 0)
        except ValueError:
            raise Unsupported(f"operand {operand!r}") from None

    def address(self, operand: str) -> tuple[int, int, int]:
        """Of "[%r1+16]": the unit of the register, the constant offset, and the register's bytes."""
        match = re.fullmatch(r"\[\s*([%\w$.]+?)\s*(?:([+-])\s*(-?\w+))?\s*\]", operand)
        if not match:
            raise Unsupported(f"address {operand}")
        base, sign, offset = match.groups()
        constant = (-1 if sign == "-" else 1) * int(offset, 0) if offset else 0
        if self.type_of(base):
            return self.register(base), constant, self.width(base)
        return self.constant(self.immediate(base), 2), constant, 4

    def place_constants(self) -> tuple[bytes, dict[int, int]]:
        """The immediates as units that follow the registers, and the unit of each placeholder."""
        filled, unit_of = b"", {}
        for (value, width), placeholder in self._constants.items():
            unit_of[placeholder] = self.units + len(filled) // 64
            filled += struct.pack("<Q", value)[: 2 * width] * 32
        return filled, unit_of

    def _take(self, key: tuple[str, int], width: int) -> int:
        if key not in self._unit:
            self._unit[key] = self.units
            self.units += width
        return self._unit[key]
