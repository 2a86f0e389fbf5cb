"""Where lanes that a branch has parted meet again."""

from __future__ import annotations

from .program import Inst

NOWHERE = -1


def set_meeting_points(insts: list[Inst]) -> None:
    """Give each guarded branch, as its immediate, where its block's immediate post-dominator begins, or NOWHERE."""
    starts = {0} | {inst.target for inst in insts if inst.op == "bra"}
    starts |= {n + 1 for n, inst in enumerate(insts[:-1]) if inst.op in ("bra", "exit")}
    first = sorted(starts)
    number = {start: block for block, start in enumerate(first)}
    end = len(first)  # a block that stands for the kernel's end
    lasts = [insts[following - 1] for following in [*first[1:], len(insts)]]
    successors = [_successors(last, block, end, number) for block, last in enumerate(lasts)]
    dominators = _post_dominators(successors)
    for block, last in enumerate(lasts):
        if last.op != "bra" or last.guard < 0:
            continue
        strict = dominators[block] - {block}
        # They are nested: the nearest is the one that all others of them post-dominate.
        nearest = next(x for x in strict if len(dominators[x]) == len(strict))
        last.immediate = first[nearest] if nearest != end else NOWHERE


def _successors(last: Inst, block: int, end: int, number: dict[int, int]) -> set[int]:
    if last.op == "bra":
        return {number[last.target]} | ({block + 1} if last.guard >= 0 else set())
    if last.op == "exit":
        return {end} | ({block + 1} if last.guard >= 0 else set())
    return {block + 1}


def _post_dominators(successors: list[set[int]]) -> list[set[int]]:
    """Of each block and of the end: the blocks that every way to the end goes through."""
    end = len(successors)
    dominators = [set(range(end + 1)) for _ in range(end)] + [{end}]
    changed = True
    while changed:
        changed = False
        for block in reversed(range(end)):
            new = {block} | set.intersection(*(dominators[x] for x in successors[block]))
            changed |= new != dominators[block]
            dominators[block] = new
    return dominators
