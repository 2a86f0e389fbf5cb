"""Compares machine code with the committed table, and prints every measure that got worse or better.

    python -m bench.machine_code --json build/machine_code.json
    python -m bench.regressions build/machine_code.json

compares every kernel with its row in `bench/results/machine_code.json`: instructions (all, and the matrix and copy
instructions by name), registers, spilled bytes, shared memory, the bytes that a thread loads in a pass of the main
loop, the bytes that the copy engine moves, and resident warps. The exit status is 1 if anything got worse, or a kernel
is missing. If that is intended, commit the new table in place of the old one.

No clock is involved: the same compiler makes the same code. Tables of two versions of Triton are not compared; then the
exit status is 2.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .environment import ROOT

COMMITTED = ROOT / "bench" / "results" / "machine_code.json"

Key = tuple[str, str, str, int]  # architecture, case, kernel, and the number of its launch in that case

# The measures of a row -> whether more is better.
MEASURES = {
    "instructions": False,
    "registers": False,
    "spilled": False,
    "shared": False,
    "bytes_loaded": False,
    "bulk_loaded": False,
    "bulk_stored": False,
    "occupancy": True,
}
_BY_NAME = ("matrix", "copies")  # counts of instructions by name: more is worse, and so is none where there were some


@dataclass(frozen=True)
class Change:
    """A measure of one kernel that changed. For a kernel that is new or gone the measure is None."""

    key: Key
    measure: str | None
    before: float | None
    after: float | None

    @property
    def worse(self) -> bool:
        if self.measure is None or self.before is None or self.after is None:
            return self.after is None
        if self.measure not in MEASURES:
            return self.before > 0 and not 0 < self.after <= self.before
        return (self.after < self.before) == MEASURES[self.measure]

    def __str__(self) -> str:
        arch, case, kernel, _ = self.key
        where = f"{arch} {case}, {kernel}"
        if self.measure is None:
            return f"{where}: {'gone' if self.after is None else 'new'}"
        return f"{where}: {self.measure} {self.before:g} -> {self.after:g}"


def compare(before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]) -> list[Change]:
    """The differences between two tables of `bench.machine_code`."""
    old, new = _by_key(before), _by_key(after)
    changes: list[Change] = []
    for key in sorted(old.keys() | new.keys()):
        if key not in old or key not in new:
            changes.append(Change(key, None, 0 if key in old else None, 0 if key in new else None))
            continue
        was, now = _values(old[key]), _values(new[key])
        for measure in dict.fromkeys([*was, *now]):
            if was.get(measure, 0) != now.get(measure, 0):
                changes.append(Change(key, measure, was.get(measure, 0), now.get(measure, 0)))
    return changes


def _values(row: Mapping[str, Any]) -> dict[str, float]:
    return {name: row[name] for name in MEASURES} | {name: n for kind in _BY_NAME for name, n in row[kind].items()}


def _by_key(rows: Sequence[Mapping[str, Any]]) -> dict[Key, Mapping[str, Any]]:
    met: Counter[tuple[str, str, str]] = Counter()
    keyed: dict[Key, Mapping[str, Any]] = {}
    for row in rows:
        place = (row["arch"], row["case"], row["kernel"])
        keyed[*place, met[place]] = row
        met[place] += 1
    return keyed


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.regressions", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("table", type=Path, help="JSON of `python -m bench.machine_code --json`")
    parser.add_argument("--committed", type=Path, default=COMMITTED, help="the table to compare with")
    options = parser.parse_args(arguments)
    before, after = (json.loads(path.read_text()) for path in (options.committed, options.table))
    version = before["triton"]
    if after["triton"] != version:
        print(f"not compared: {options.committed} is of Triton {version}, this table is of {after['triton']}")
        print(f"Install triton=={version}; or, from code that is known to be sound, make the committed table anew:")
        print(f"  python -m bench.machine_code --json {options.committed}")
        return 2
    changes = compare(before["rows"], after["rows"])
    worse = [change for change in changes if change.worse]
    better = [change for change in changes if not change.worse]
    for title, these in (("worse", worse), ("better, or new", better)):
        if these:
            print(f"{title}:", *these, sep="\n  ")
    print(f"{len(after['rows'])} kernels compared: {len(worse)} measures worse, {len(better)} better or new")
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
