"""Results on disk and on the screen: markdown tables, and JSON that `bench.plot` reads."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .environment import Environment
from .timing import Ceilings


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table: the first column to the left, numbers to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


def document(bench: str, environment: Environment, ceilings: Ceilings | None, rows: Sequence[Mapping[str, Any]]) -> str:
    """A run as JSON: {"bench", "environment", "ceilings", "rows"}."""
    limits = asdict(ceilings) if ceilings else None
    whole = {"bench": bench, "environment": asdict(environment), "ceilings": limits, "rows": rows}
    return json.dumps(whole, indent=1, allow_nan=False) + "\n"


def resumed(path: Path, bench: str, where: Environment) -> list[dict[str, Any]]:
    """The rows of an earlier run of the same benchmark; none where there is no file.

    Raises:
        ValueError: the file is of another benchmark, another machine, other versions or other code.
    """
    if not path.exists():
        return []
    earlier = json.loads(path.read_text())
    if earlier["bench"] != bench:
        raise ValueError(f"{path} holds results of the benchmark {earlier['bench']!r}, not of {bench!r}")
    if differing := where.differing(earlier["environment"]):
        raise ValueError(f"cannot resume {path}: it was measured with another {', '.join(differing)}")
    return earlier["rows"]


def highest(path: Path, limits: Ceilings) -> Ceilings:
    """The highest ceilings that the device reached, in this run or those that `path` has: one set for all rows."""
    earlier = json.loads(path.read_text())["ceilings"] if path.exists() else None
    if earlier is None:
        return limits
    return higher(limits, Ceilings(earlier["flops"], earlier["bytes"]))


def higher(one: Ceilings, other: Ceilings) -> Ceilings:
    """The higher of two measurements of the same device, for each precision that is in either."""
    flops = {name: max(one.flops.get(name, 0.0), other.flops.get(name, 0.0)) for name in {**one.flops, **other.flops}}
    return Ceilings(flops, max(one.bytes, other.bytes))


def save(path: Path, text: str) -> None:
    """Writes `text`, whole or not at all; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    partial.replace(path)
