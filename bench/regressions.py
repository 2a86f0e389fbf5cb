"""Compares machine code with the committed table, and prints every measure that got worse or better.

    python -m bench.machine_code --json build/machine_code.json
    python -m bench.regressions build/machine_code.json

compares every kernel with its row in `bench/results/machine_code.json`: instructions (all, and the matrix and copy
instructions by name), registers, spilled bytes, shared memory, the bytes that a thread loads in a pass of the main
loop, the bytes that the copy engine moves, and resident warps. The exit status is 1 if anything got worse, or a kernel
is missing. If that is intended, commit the new table in place of the old one. Architectures that the new table does not
have are not compared.

    python -m bench.predict --json build/predictions.json
    python -m bench.regressions build/predictions.json

compares calculated times with `bench/results/predictions.json` in the same way: those of each batch of a model, on the
device and on the host. If one got worse, the launches that take longer are named. Models of a device that the new table
does not have are not compared.

No clock is involved: the same compiler makes the same code. Tables of two versions of Triton are not compared; then the
exit status is 2.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .environment import ROOT

COMMITTED = ROOT / "bench" / "results" / "machine_code.json"
PREDICTED = ROOT / "bench" / "results" / "predictions.json"

# Architecture, case, kernel, and the number of its launch in that case. Of a prediction: device, the batch of a model,
# the launch (empty for all of them), and its number among those of one name.
Key = tuple[str, str, str, int]

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
_TIMES = ("on_device", "on_host")  # of a prediction, in seconds; "seconds" is that of one launch
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
        if self.measure in ("seconds", *_TIMES):
            return self.after > self.before
        if self.measure not in MEASURES:
            return self.before > 0 and not 0 < self.after <= self.before
        return (self.after < self.before) == MEASURES[self.measure]

    def __str__(self) -> str:
        arch, case, kernel, _ = self.key
        where = f"{arch} {case}, {kernel}" if kernel else f"{arch} {case}"
        if self.measure is None:
            return f"{where}: {'gone' if self.after is None else 'new'}"
        unit = " (calculated, seconds)" if self.measure in ("seconds", *_TIMES) else ""
        return f"{where}: {self.measure}{unit} {self.before:g} -> {self.after:g}"


def compare(before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]) -> list[Change]:
    """The differences between two tables of `bench.machine_code`, for the architectures of the second."""
    compiled = {row["arch"] for row in after}
    before = [row for row in before if row["arch"] in compiled]
    old, new = (_keyed(rows, lambda row: (row["arch"], row["case"], row["kernel"])) for rows in (before, after))
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


def compare_predictions(before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]) -> list[Change]:
    """The differences between two tables of `bench.predict`, for the devices' models of the second.

    They are those of whole batches, and the launches that explain a worse one. A launch that came or went is neither
    better nor worse by itself.
    """
    calculated = {(row["device"], row["model"]) for row in after}
    before = [row for row in before if (row["device"], row["model"]) in calculated]
    old, new = (_keyed(rows, _place) for rows in (before, after))
    changes: list[Change] = []
    for key in sorted(key for key in old.keys() | new.keys() if not key[2]):
        if key not in old or key not in new:
            changes.append(Change(key, None, 0 if key in old else None, 0 if key in new else None))
            continue
        found = [
            Change(key, name, old[key][name], new[key][name]) for name in _TIMES if old[key][name] != new[key][name]
        ]
        changes += found
        if any(change.worse for change in found):
            its = sorted(other for other in old.keys() & new.keys() if other[:2] == key[:2] and other[2])
            launches = (Change(each, "seconds", old[each]["seconds"], new[each]["seconds"]) for each in its)
            changes += [change for change in launches if change.worse]
    return changes


def _predicting(rows: Sequence[Mapping[str, Any]]) -> str:
    """The command that calculates a table with these rows."""
    models, devices = (",".join(dict.fromkeys(row[name] for row in rows)) for name in ("model", "device"))
    return shlex.join(["bench.predict", "--models", models, "--devices", devices])


def _place(row: Mapping[str, Any]) -> tuple[str, str, str]:
    return row["device"], f"{row['model']}, batch {row['batch']}, {row['precision']}", row["launch"]


def _values(row: Mapping[str, Any]) -> dict[str, float]:
    return {name: row[name] for name in MEASURES} | {name: n for kind in _BY_NAME for name, n in row[kind].items()}


def _keyed(
    rows: Sequence[Mapping[str, Any]], place: Callable[[Mapping[str, Any]], tuple[str, str, str]]
) -> dict[Key, Mapping[str, Any]]:
    """The rows by their place, and by a number where several have one place."""
    met: Counter[tuple[str, str, str]] = Counter()
    keyed: dict[Key, Mapping[str, Any]] = {}
    for row in rows:
        where = place(row)
        keyed[*where, met[where]] = row
        met[where] += 1
    return keyed


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.regressions", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("table", type=Path, help="JSON of `python -m bench.machine_code --json`, or of bench.predict")
    parser.add_argument("--committed", type=Path, help="the table to compare with (default: the committed one)")
    options = parser.parse_args(arguments)
    after = json.loads(options.table.read_text())
    predicted = after.get("bench") == "predict"
    committed = options.committed or (PREDICTED if predicted else COMMITTED)
    before = json.loads(committed.read_text())
    version = before["triton"]
    if after["triton"] != version:
        print(f"not compared: {committed} is of Triton {version}, this table is of {after['triton']}")
        print(f"Install triton=={version}; or, from code that is known to be sound, make the committed table anew:")
        print(f"  python -m {_predicting(before['rows']) if predicted else 'bench.machine_code'} --json {committed}")
        return 2
    changes = (compare_predictions if predicted else compare)(before["rows"], after["rows"])
    worse = [change for change in changes if change.worse]
    better = [change for change in changes if not change.worse]
    for title, these in (("worse", worse), ("better, or new", better)):
        if these:
            print(f"{title}:", *these, sep="\n  ")
    rows = f"{len(after['rows'])} {'calculated times' if predicted else 'kernels'}"
    print(f"{rows} compared: {len(worse)} measures worse, {len(better)} better or new")
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
