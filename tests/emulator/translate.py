"""PTX text to a program of the engine."""

from __future__ import annotations

import re
from collections.abc import Iterator

from .control_flow import set_meeting_points
from .instructions import decode, split
from .program import Inst, Param, Program, Unsupported
from .registers import Registers


def translate(ptx: str) -> Program:
    text = re.sub(r"/\*.*?\*/", lambda comment: "\n" * comment[0].count("\n"), ptx, flags=re.DOTALL)
    text = re.sub(r"//[^\n]*", "", text)
    text = re.sub(r"^[ \t]*\.(loc|file|pragma)\b[^\n]*", "", text, flags=re.MULTILINE)
    entry = re.search(r"\.visible\s+\.entry\s+([\w$]+)\s*\(([^)]*)\)([^{]*)\{", text)
    if not entry:
        raise Unsupported("no kernel in this PTX")
    threads = re.search(r"\.reqntid\s+(\d+)", entry[3])
    if not threads or int(threads[1]) % 32:
        raise Unsupported("a kernel must say that it takes whole warps (.reqntid)")
    params = _params(entry[2])
    registers = Registers(params)
    insts = _instructions(registers, text, entry.end())
    constants, unit_of = registers.place_constants()
    for inst in insts:
        inst.sources = [unit_of.get(unit, unit) for unit in inst.sources]
    return Program(
        name=entry[1],
        insts=insts,
        units=registers.units + len(constants) // 64,
        first_constant=registers.units,
        constants=constants,
        specials=sorted(registers.specials.items()),
        params=params,
        param_bytes=max((param.offset + param.size for param in params), default=0),
        warps=int(threads[1]) // 32,
    )


def _params(text: str) -> list[Param]:
    params: list[Param] = []
    end = 0
    for declaration in filter(None, split(text)):
        match = re.search(r"\.param\s+(?:\.align\s+(\d+)\s+)?\.[a-z]+(\d+)\b.*?([\w$]+)(?:\[(\d+)\])?$", declaration)
        if not match:
            raise Unsupported(f"parameter {declaration}")
        align, bits, name, count = match.groups()
        size = int(bits) // 8
        align = max(int(align or 1), size)
        start = -(-end // align) * align
        end = start + size * int(count or 1)
        params.append(Param(name, start, end - start))
    return params


def _instructions(registers: Registers, text: str, start: int) -> list[Inst]:
    insts: list[Inst] = []
    labels: dict[tuple[int, str], int] = {}
    for what, content, line in _pieces(text, start):
        if what == "{":
            registers.open_scope()
        elif what == "}":
            if registers.close_scope():
                break
        elif what == ":":
            labels[registers.scopes[-1][0], content] = len(insts)
        elif content.startswith(".reg"):
            _, kind, names = content.split(None, 2)
            registers.declare(kind[1:], split(names))
        elif content.startswith("."):
            raise Unsupported(f"line {line}: {content}")
        else:
            insts.append(_instruction(registers, content, line))
    insts.append(Inst("exit", text="(end)"))
    for inst in insts:
        if inst.label is not None:
            name, scopes = inst.label
            found = [labels[scope, name] for scope in reversed(scopes) if (scope, name) in labels]
            if not found:
                raise Unsupported(f"line {inst.line}: no label {name}")
            inst.target = found[0]
    set_meeting_points(insts)
    return insts


def _pieces(text: str, at: int) -> Iterator[tuple[str, str, int]]:
    """Statements, as (";", text, line), and what parts them: scopes "{" and "}", labels (":", name, line)."""
    line, start, depth, statement = text.count("\n", 0, at) + 1, 0, 0, ""
    for char in text[at:]:
        if char == "\n":
            line += 1
            char = " "
        content = statement.strip()
        start = start if content else line
        # A brace inside a statement holds operands, and no label ends before an operand.
        ends = (char in "{}" and depth == 0 and not content) or (char == ";" and depth == 0)
        if ends or (char == ":" and re.fullmatch(r"[\w$%]+", content)):
            if char != ";" or content:
                yield char, content, start
            statement = ""
        else:
            depth += {"{": 1, "}": -1, "[": 1, "]": -1}.get(char, 0)
            statement += char


def _instruction(registers: Registers, text: str, line: int) -> Inst:
    match = re.fullmatch(r"(?:@(!?)\s*([%\w]+)\s+)?(\S+)\s*(.*)", text, re.DOTALL)
    assert match
    negated, guard, opcode, operands = match.groups()
    try:
        inst = decode(registers, opcode, split(operands))
        if guard:
            inst.guard, inst.guard_negated = registers.register(guard), bool(negated)
    except (Unsupported, KeyError, IndexError, ValueError) as error:
        raise Unsupported(f"line {line}: {text[:200]} ({error!r})") from error
    inst.line, inst.text = line, text
    return inst
