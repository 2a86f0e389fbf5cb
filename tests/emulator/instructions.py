"""PTX instructions to operations of the engine, one function for each opcode.

A function gets the registers, the opcode's parts (`["add", "rn", "f32"]`) and its operands. What it does not know is an
error that names the instruction, never a guess.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from .program import Inst, Unsupported
from .registers import WIDTHS, Registers

Decoder = Callable[[Registers, list[str], list[str]], Inst]
DECODERS: dict[str, Decoder] = {}

_BITS = {1: "16", 2: "32", 4: "64"}
_COMPARISONS = {
    "eq": 0, "ne": 1, "lt": 2, "le": 3, "gt": 4, "ge": 5, "lo": 2, "ls": 3, "hi": 4, "hs": 5,
    "equ": 6, "neu": 7, "ltu": 8, "leu": 9, "gtu": 10, "geu": 11, "num": 12, "nan": 13,
}  # fmt: skip
_FORMATS = {"f16": 0, "bf16": 1, "tf32": 2}
_SIXTEEN = ("f16", "bf16", "f16x2", "bf16x2")


def decode(registers: Registers, opcode: str, operands: list[str]) -> Inst:
    """The instruction of an opcode; raises Unsupported, ValueError, KeyError or IndexError for what is not known."""
    parts = opcode.split(".")
    if parts[0] not in DECODERS:
        raise Unsupported(opcode)
    return DECODERS[parts[0]](registers, parts, operands)


def _opcode(*names: str) -> Callable[[Decoder], Decoder]:
    def register(decoder: Decoder) -> Decoder:
        DECODERS.update(dict.fromkeys(names, decoder))
        return decoder

    return register


def _need(holds: bool, parts: list[str]) -> None:
    if not holds:
        raise Unsupported(".".join(parts))


def _plain(r: Registers, op: str, o: list[str], width: int, mode: int = 0) -> Inst:
    """One result, and sources that are all `width` units wide."""
    return Inst(op, [r.register(o[0])], [r.source(x, width) for x in o[1:]], mode)


def _sign(kind: str) -> str:
    return "s" if kind[0] == "s" else "u"


def inner(group: str) -> list[str]:
    """Of "{a, b}" or "[a, b]": its parts; of anything else: itself."""
    return split(group[1:-1]) if group[0] in "{[" else [group]


def split(text: str) -> list[str]:
    """At commas outside brackets and braces."""
    parts, depth, part = [], 0, ""
    for char in text:
        if char == "," and depth == 0:
            parts.append(part.strip())
            part = ""
            continue
        depth += {"{": 1, "[": 1, "}": -1, "]": -1}.get(char, 0)
        part += char
    return [*parts, part.strip()] if part.strip() else parts


# --- control flow and moves ------------------------------------------------------------------------------------------


@_opcode("bra")
def _bra(r: Registers, p: list[str], o: list[str]) -> Inst:
    return Inst("bra", immediate=-1, label=(o[0], tuple(number for number, _ in r.scopes)))


@_opcode("ret", "exit")
def _exit(r: Registers, p: list[str], o: list[str]) -> Inst:
    return Inst("exit")


@_opcode("trap")
def _trap(r: Registers, p: list[str], o: list[str]) -> Inst:
    return Inst("trap")


@_opcode("griddepcontrol")
def _grid_dependency(r: Registers, p: list[str], o: list[str]) -> Inst:
    _need(p[1:] in (["wait"], ["launch_dependents"]), p)
    # When the next kernel may start does not matter: it is taken to have started before this one.
    return Inst("grid_wait" if p[1] == "wait" else "nop")


@_opcode("setmaxnreg", "nanosleep", "prefetch")
def _nop(r: Registers, p: list[str], o: list[str]) -> Inst:
    return Inst("nop")


@_opcode("mov")
def _mov(r: Registers, p: list[str], o: list[str]) -> Inst:
    to, of = o
    kind = p[-1]
    if kind == "pred":
        return Inst("movp", [r.register(to)], [r.predicate(of)])
    width = WIDTHS[kind]
    if to[0] == "{":
        names = inner(to)
        parts = 32 * width // 2 // len(names)
        results = [r.sink(f"b{max(parts, 16)}") if name == "_" else r.register(name) for name in names]
        return Inst(f"unpack{len(names)}x{parts}", results, [r.source(of, width)])
    if of[0] == "{":
        names = inner(of)
        parts = 32 * width // 2 // len(names)
        return Inst(f"pack{len(names)}x{parts}", [r.register(to)], [r.source(x, max(parts // 16, 1)) for x in names])
    return _plain(r, f"mov{_BITS[width]}", o, width)


@_opcode("cvta")
def _cvta(r: Registers, p: list[str], o: list[str]) -> Inst:
    if "param" in p:
        return _plain(r, "cvta_param", o, 4)
    _need("shared" not in p and "local" not in p, p)  # there are no generic addresses of these
    return _plain(r, "mov64", o, 4)


# --- arithmetic ------------------------------------------------------------------------------------------------------


@_opcode("add", "sub", "min", "max", "neg", "abs", "rem", "div", "fma")
def _arithmetic(r: Registers, p: list[str], o: list[str]) -> Inst:
    name, kind = p[0], p[-1]
    count = {"neg": 1, "abs": 1, "fma": 3}.get(name, 2)
    of_three = name in ("min", "max") and kind == "f32" and len(o) == 4
    _need(not {"sat", "relu", "rz", "rm", "rp", "xorsign", "cc"} & set(p), p)
    _need(len(o) == 1 + count or of_three, p)
    kinds = [x for x in p if x in WIDTHS or x.endswith("x2")]
    if len(kinds) > 1:  # 16-bit operands, a float32 result
        _need(name in ("add", "sub", "fma") and kinds in (["f32", "f16"], ["f32", "bf16"]), p)
        sources = [*(r.source(x, 1) for x in o[1:-1]), r.source(o[-1], 2)]
        return Inst(f"mix{name}", [r.register(o[0])], sources, int("bf16" in p))
    flush = int("ftz" in p)
    if kind in ("s16x2", "u16x2"):
        _need(name == "add", p)
        return _plain(r, "add16x2", o, 2)
    if kind == "f32x2":
        return _plain(r, f"f{name}2", o, 4, flush)
    if kind == "f32":
        return _plain(r, f"f{name}", o, 2, flush | 2 * ("NaN" in p))
    if kind == "f64":
        return _plain(r, f"d{name}", o, 4)
    if kind in _SIXTEEN:
        paired = kind.endswith("x2")
        return _plain(r, f"h{name}", o, 2 if paired else 1, int("bf16" in kind) | 2 * paired)
    width = WIDTHS[kind]
    sign = f"_{_sign(kind)}" if name in ("min", "max", "div", "rem") else ""
    return _plain(r, f"{name}{sign}{_BITS[width]}", o, width)


@_opcode("mul", "mad")
def _multiply(r: Registers, p: list[str], o: list[str]) -> Inst:
    name, kind = p[0], p[-1]
    if "f" in kind:
        return _arithmetic(r, ["fma" if name == "mad" else "mul", *p[1:]], o)
    width, sign = WIDTHS[kind], _sign(kind)
    if "wide" in p:
        sources = [r.source(x, width) for x in o[1:3]] + [r.source(x, 2 * width) for x in o[3:]]
        return Inst(f"{name}wide_{sign}{_BITS[width]}", [r.register(o[0])], sources)
    if "hi" in p:
        _need(name == "mul", p)
        return _plain(r, f"mulhi_{sign}{_BITS[width]}", o, width)
    return _plain(r, f"{name}lo{_BITS[width]}", o, width)


@_opcode("ex2", "lg2", "rcp", "rsqrt", "sqrt", "tanh")
def _function(r: Registers, p: list[str], o: list[str]) -> Inst:
    _need(p[-1] == "f32", p)
    return _plain(r, f"f{p[0]}", o, 2, int("ftz" in p))


@_opcode("and", "or", "xor", "not")
def _logic(r: Registers, p: list[str], o: list[str]) -> Inst:
    if p[-1] == "pred":
        return Inst(f"{p[0]}p", [r.register(o[0])], [r.predicate(x) for x in o[1:]])
    return _plain(r, f"{p[0]}{_BITS[WIDTHS[p[-1]]]}", o, WIDTHS[p[-1]])


@_opcode("shl", "shr")
def _shift(r: Registers, p: list[str], o: list[str]) -> Inst:
    width = WIDTHS[p[-1]]
    op = f"shl{_BITS[width]}" if p[0] == "shl" else f"shr_{_sign(p[-1])}{_BITS[width]}"
    return Inst(op, [r.register(o[0])], [r.source(o[1], width), r.source(o[2], 2)])


@_opcode("shf")
def _funnel(r: Registers, p: list[str], o: list[str]) -> Inst:
    _need(p[2] == "wrap", p)
    return _plain(r, f"shf_{p[1]}_wrap", o, 2)


@_opcode("bfe")
def _extract(r: Registers, p: list[str], o: list[str]) -> Inst:
    return Inst(f"bfe_{p[-1]}", [r.register(o[0])], [r.source(o[1], WIDTHS[p[-1]]), *(r.source(x, 2) for x in o[2:])])


@_opcode("bfi", "clz", "popc", "brev")
def _bits(r: Registers, p: list[str], o: list[str]) -> Inst:
    _need(p[-1] == "b32", p)
    return _plain(r, f"{p[0]}32", o, 2)


@_opcode("prmt")
def _permute(r: Registers, p: list[str], o: list[str]) -> Inst:
    _need(len(p) == 2, p)
    return _plain(r, "prmt", o, 2)


@_opcode("lop3")
def _lop3(r: Registers, p: list[str], o: list[str]) -> Inst:
    _need(len(o) == 5, p)
    inst = _plain(r, "lop3", o[:4], 2)
    inst.immediate = int(o[4], 0)
    return inst


@_opcode("selp")
def _select(r: Registers, p: list[str], o: list[str]) -> Inst:
    width = WIDTHS[p[-1]]
    sources = [r.source(o[1], width), r.source(o[2], width), r.register(o[3])]
    return Inst(f"selp{_BITS[width]}", [r.register(o[0])], sources)


@_opcode("setp")
def _compare(r: Registers, p: list[str], o: list[str]) -> Inst:
    kind, combine = p[-1], {"and": 1, "or": 2, "xor": 3}.get(p[2], 0)
    width = WIDTHS[kind]
    suffix = kind if "f" in kind else _sign(kind) + _BITS[width]
    inst = Inst(f"setp_{suffix}", [r.register(x) for x in o[0].split("|")], [r.source(x, width) for x in o[1:3]])
    inst.mode, inst.extra = _COMPARISONS[p[1]], combine
    if combine:
        inst.immediate = int(o[3].startswith("!"))
        inst.sources.append(r.register(o[3].lstrip("!")))
    return inst


@_opcode("cvt")
def _convert(r: Registers, p: list[str], o: list[str]) -> Inst:
    to, of = p[-2:]
    if to in ("f16x2", "bf16x2"):
        _need(of == "f32" and "rn" in p and "relu" not in p, p)
        return _plain(r, f"cvt_{to}", o, 2)
    _need("relu" not in p, p)
    rounding = next((x for x in p if x in _ROUNDINGS), "rn")
    source_bytes = _bytes_of(of)
    inst = Inst("cvt", [r.register(o[0])], [r.source(o[1], max(source_bytes // 2, 1))])
    inst.mode, inst.extra = _type_code(to), _type_code(of)
    inst.immediate = _ROUNDINGS[rounding] | 16 * ("sat" in p) | 32 * ("ftz" in p)
    inst.immediate2, inst.target = r.width(o[1]) or max(source_bytes, 2), r.width(o[0])
    return inst


_ROUNDINGS = {"rn": 0, "rz": 1, "rm": 2, "rp": 3, "rna": 0, "rni": 8, "rzi": 9, "rmi": 10, "rpi": 11}


def _bytes_of(kind: str) -> int:
    return 4 if kind == "tf32" else int(re.sub(r"\D", "", kind)) // 8


def _type_code(kind: str) -> int:
    number = {"u": 0, "s": 1}.get(kind[0], 2)
    return number | _bytes_of(kind) << 4 | 256 * (kind == "bf16") | 512 * (kind == "tf32")


# --- memory ----------------------------------------------------------------------------------------------------------


@_opcode("ld")
def _load(r: Registers, p: list[str], o: list[str]) -> Inst:
    kind, names = p[-1], inner(o[0])
    inst = Inst("", [r.register(x) for x in names], mode=int(kind[1:]) // 8 | 16 * (kind[0] == "s"))
    inst.extra = r.width(names[0])
    if p[1] == "param":
        _need(len(names) == 1, p)
        inst.op = "ldparam"
        name, _, offset = o[1][1:-1].partition("+")
        if name in r.params:
            inst.immediate = r.params[name].offset + (int(offset, 0) if offset else 0)
            return inst
    elif _space(p) == "shared":
        inst.op = "lds"
    else:
        inst.op = "ldg"
    base, inst.immediate, inst.target = r.address(o[1])
    inst.sources.append(base)
    return inst


@_opcode("st")
def _store(r: Registers, p: list[str], o: list[str]) -> Inst:
    kind, values = p[-1], inner(o[1])
    size = int(kind[1:]) // 8
    base, offset, width = r.address(o[0])
    inst = Inst(
        "sts" if _space(p) == "shared" else "stg", [], [*(r.source(x, max(size // 2, 1)) for x in values), base]
    )
    inst.mode, inst.extra, inst.immediate, inst.target = size, r.width(values[0]) or max(size, 2), offset, width
    return inst


def _space(p: list[str]) -> str:
    space = next((x for x in p if x.startswith(("global", "shared", "local", "const", "param"))), "")
    space = space.partition("::")[0]
    _need(space in ("global", "shared"), p)
    return space


@_opcode("ldmatrix", "stmatrix")
def _matrix(r: Registers, p: list[str], o: list[str]) -> Inst:
    _need("m8n8" in p and p[-1] == "b16", p)
    load = p[0] == "ldmatrix"
    values, address = (o[0], o[1]) if load else (o[1], o[0])
    units = [r.register(x) if load else r.source(x, 2) for x in inner(values)]
    base, offset, width = r.address(address)
    results, sources = (units, [base]) if load else ([], [*units, base])
    return Inst(p[0], results, sources, mode=int("trans" in p), immediate=offset, target=width)


@_opcode("mma")
def _mma(r: Registers, p: list[str], o: list[str]) -> Inst:
    shape = re.search(r"\.m16n8k(\d+)\.row\.col\.f32\.(\w+)\.(\w+)\.f32$", ".".join(p))
    _need(shape is not None and shape[2] == shape[3], p)
    assert shape
    d, *sources = (inner(x) for x in o)
    units = [r.source(x, 2) for part in sources for x in part]
    return Inst("mma", [r.register(x) for x in d], units, mode=_FORMATS[shape[2]], extra=int(shape[1]))


@_opcode("cp")
def _copy(r: Registers, p: list[str], o: list[str]) -> Inst:
    name = ".".join(p)
    if name.startswith("cp.async.bulk"):
        return _bulk(r, p, o)
    if name == "cp.async.commit_group":
        return Inst("cpasync_commit")
    if name == "cp.async.wait_group":
        return Inst("cpasync_wait", immediate=int(o[0], 0))
    if name == "cp.async.wait_all":
        return Inst("cpasync_wait", mode=1)
    _need(name.startswith(("cp.async.ca.shared", "cp.async.cg.shared")), p)
    (to, to_offset, width), (of, of_offset, _) = r.address(o[0]), r.address(o[1])
    inst = Inst("cpasync", [], [to, of, *(r.source(x, 2) for x in o[3:4])], immediate=int(o[2], 0), target=width)
    inst.immediate2 = of_offset << 32 | (to_offset & 0xFFFFFFFF)
    return inst


def _bulk(r: Registers, p: list[str], o: list[str]) -> Inst:
    name = ".".join(p)
    if name == "cp.async.bulk.commit_group":
        return Inst("bulk_commit")
    if name.startswith("cp.async.bulk.wait_group"):
        return Inst("bulk_wait", immediate=int(o[0], 0))
    match = re.match(r"cp\.async\.bulk\.tensor\.(\d)d\.(shared::c\w+\.global|global\.shared::cta)\b", name)
    _need(match is not None and "multicast" not in name, p)
    assert match
    load = match[2].startswith("shared")
    descriptor, place = (o[1], o[0]) if load else (o[0], o[1])
    tensor_map, coordinates = inner(descriptor)
    places = [r.address(x) for x in ([place, o[2]] if load else [place])]
    _need(all(offset == 0 for _, offset, _ in places), p)
    units = [base for base, _, _ in places]
    sources = [units[0], r.register(tensor_map), *units[1:], *(r.source(x, 2) for x in inner(coordinates))]
    return Inst("tma_load" if load else "tma_store", [], sources, mode=int(match[1]), target=places[0][2])


# --- synchronisation -------------------------------------------------------------------------------------------------


@_opcode("mbarrier")
def _mbarrier(r: Registers, p: list[str], o: list[str]) -> Inst:
    what = p[1]
    if what in ("init", "inval", "expect_tx"):
        op, results, place, rest = {"expect_tx": "expect"}.get(what, what), [], o[0], o[1:]
    elif what == "arrive":
        _need(o[0] == "_", p)
        op, results, place, rest = "arrive", [], o[1], o[2:]
        if "expect_tx" not in p:
            _need(rest in ([], ["1"]), p)
            rest = []
    else:
        _need(what in ("try_wait", "test_wait") and "parity" in p, p)
        op, results, place, rest = what.partition("_")[0], [r.register(o[0])], o[1], o[2:3]
    base, offset, width = r.address(place)
    inst = Inst(f"mbar_{op}", results, [base, *(r.source(x, 2) for x in rest)], immediate=offset, target=width)
    inst.mode = int("expect_tx" in p)
    return inst


@_opcode("bar", "barrier")
def _barrier(r: Registers, p: list[str], o: list[str]) -> Inst:
    if p[1] == "warp":
        return Inst("barwarp")
    _need(p[1] in ("sync", "arrive"), p)
    return Inst("bar", immediate=int(o[0], 0), immediate2=int(o[1], 0) if o[1:] else 0, mode=int(p[1] == "arrive"))


@_opcode("fence", "membar")
def _fence(r: Registers, p: list[str], o: list[str]) -> Inst:
    return Inst("fence_proxy" if p[1:3] == ["proxy", "async"] else "fence")


@_opcode("shfl")
def _shuffle(r: Registers, p: list[str], o: list[str]) -> Inst:
    results = [r.register(x) for x in o[0].split("|")]
    return Inst("shfl", results, [r.source(x, 2) for x in o[1:5]], mode=["bfly", "idx", "up", "down"].index(p[2]))


@_opcode("elect")
def _elect(r: Registers, p: list[str], o: list[str]) -> Inst:
    leader, predicate = o[0].split("|")
    return Inst("elect", [r.sink("b32") if leader == "_" else r.register(leader), r.register(predicate)])


@_opcode("vote")
def _vote(r: Registers, p: list[str], o: list[str]) -> Inst:
    mode = ["all", "any", "uni", "ballot"].index(p[2])
    return Inst("vote", [r.register(o[0])], [r.register(o[1].lstrip("!"))], mode=mode, extra=int(o[1][0] == "!"))


@_opcode("activemask")
def _activemask(r: Registers, p: list[str], o: list[str]) -> Inst:
    return Inst("activemask", [r.register(o[0])])


@_opcode("redux")
def _redux(r: Registers, p: list[str], o: list[str]) -> Inst:
    _need(p[-1] in ("u32", "s32", "b32"), p)
    how = {"add": 0, "min": 1, "max": 2, "and": 5, "or": 6, "xor": 7}[p[2]]
    return Inst("redux", [r.register(o[0])], [r.source(o[1], 2)], mode=how + 2 * (p[-1] == "s32" and how in (1, 2)))


@_opcode("wgmma")
def _wgmma(r: Registers, p: list[str], o: list[str]) -> Inst:
    if p[1] == "fence":
        return Inst("wg_fence")
    if p[1] == "commit_group":
        return Inst("wg_commit")
    if p[1] == "wait_group":
        return Inst("wg_wait", immediate=int(o[0], 0))
    shape = re.search(r"^wgmma\.mma_async\..*m64n(\d+)k\d+\.f32\.(\w+)\.(\w+)$", ".".join(p))
    _need(shape is not None and shape[2] == shape[3], p)
    assert shape
    results, in_registers = [r.register(x) for x in inner(o[0])], o[1][0] == "{"
    a = [r.source(x, 2 if in_registers else 4) for x in inner(o[1])]
    accumulate, scales, transposed = o[3], o[4:6], [int(x) for x in o[6:]]
    _need(scales == ["1", "1"] and len(results) == int(shape[1]) // 2, p)
    if in_registers:
        transposed = [0, *transposed]  # A's own flag is there only for A in shared memory
    a_transposed, b_transposed = [*transposed, 0, 0][:2]
    inst = Inst("wgmma", results, [*a, r.source(o[2], 4)], extra=int(shape[1]))
    inst.mode = _FORMATS[shape[2]] | 4 * in_registers | 8 * a_transposed | 16 * b_transposed
    if r.type_of(accumulate):
        inst.sources.append(r.register(accumulate))
    else:
        inst.immediate2 = 1 if int(accumulate, 0) else 2
    return inst
