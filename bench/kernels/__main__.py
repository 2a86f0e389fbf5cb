"""Every op at every CLIP shape, beside its rivals.

    python -m bench.kernels --models ViT-L/14 --batches 256 --precisions bf16

On a GPU the device alone is timed: replays of a CUDA graph, over operands that rotate through more memory than the
second-level cache holds. Rounds are interleaved, operands are random, and times are medians with their spread. A row
relates an op's arithmetic and traffic to the ceilings measured in the same run, and has the error against float64.
After a system that faults the GPU the command fails, and `--resume` goes on behind it.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from ..environment import Environment, chosen_device, environment
from ..models import MODELS, PUBLISHED
from ..report import document, highest, resumed, save, table
from ..timing import Ceilings, Fault, ceilings
from .comparison import KEY, Row, compare, named, of_ceiling
from .contests import COMPILED, OPS, OURS, contests


def markdown(rows: Sequence[Row], where: Environment, limits: Ceilings) -> str:
    """A table for every op and precision, a line for every shape: each system's time, then how ours compares."""
    parts: list[str] = []
    for op, precision in dict.fromkeys((row["op"], row["precision"]) for row in rows):
        these = [row for row in rows if (row["op"], row["precision"]) == (op, precision)]
        systems = list(dict.fromkeys(row["system"] for row in these))
        header = [
            "shape",
            *(f"{name}, µs" for name in systems),
            "TFLOP/s",
            "GB/s",
            "of ceiling",
            "× best rival",
            "error",
        ]
        lines, failed = [], dict[str, None]()
        for shape in dict.fromkeys((row["model"], row["part"], row["batch"]) for row in these):
            by_system = {row["system"]: row for row in these if (row["model"], row["part"], row["batch"]) == shape}
            lines.append([f"{shape[0]} {shape[1]}, batch {shape[2]}", *_cells(systems, by_system)])
            for row in by_system.values():
                if "failed" in row:
                    failed[f"- {row['system']}: {row['failed']}"] = None
        parts.append(f"**{op}, {precision}**\n\n{table(header, lines)}")
        if failed:
            parts.append("Not measured:\n\n" + "\n".join(failed))
    parts.append(f"{limits.line()}. {where.line()}.")
    return "\n\n".join(parts) + "\n"


def _cells(systems: Sequence[str], rows: Mapping[str, Row]) -> list[str]:
    times = []
    for name in systems:
        row = rows.get(name, {"failed": ""})
        times.append("" if "failed" in row else f"{row['seconds'] * 1e6:.4g} ± {row['spread'] * 100:.0f} %")
    ours = rows.get(OURS, {"failed": ""})
    if "failed" in ours:
        return [*times, "", "", "", "", ""]
    ratio = "" if ours["to_best_rival"] is None else f"{ours['to_best_rival']:.2f}"
    speed = [f"{ours['flops'] / 1e12:.4g}", f"{ours['bytes'] / 1e9:.4g}", f"{ours['of_ceiling'] * 100:.0f} %"]
    return [*times, *speed, ratio, f"{ours['error']:.1e}"]


def main(arguments: Sequence[str] | None = None) -> None:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="python -m bench.kernels", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--models", default="ViT-L/14,ViT-B/32,ViT-B/16,RN50", help="separated by commas; or all")
    parser.add_argument("--batches", default="256,1", help="separated by commas")
    parser.add_argument("--precisions", default="bf16" if on_gpu else "fp32", help="of fp32, tf32, fp16, bf16")
    parser.add_argument("--ops", default=",".join(OPS), help="separated by commas")
    parser.add_argument("--without-compiled", action="store_true", help="leave torch.compile out, which takes minutes")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--json", type=Path, help="write the results there, and the tables beside them as markdown")
    parser.add_argument("--resume", action="store_true", help="keep the rows of that file, and measure missing ones")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin nothing new after so many minutes")
    options = parser.parse_args(arguments)
    device, precisions = chosen_device(options.device), options.precisions.split(",")
    names = list(PUBLISHED) if options.models == "all" else options.models.split(",")
    where, limits = environment(device), ceilings(device, precisions, options.rounds)
    rows = resumed(options.json, "kernels", where) if options.resume and options.json else []
    if rows:  # all rows, old and new, get one set of ceilings
        limits = highest(options.json, limits)
        for row in rows:
            if "failed" not in row:
                row["of_ceiling"] = of_ceiling(row, limits)
    started = time.monotonic()
    batches = [int(batch) for batch in options.batches.split(",")]
    for contest in contests({name: MODELS[name] for name in names}, batches, precisions, options.ops.split(",")):
        systems = [name for name in contest.systems if not (options.without_compiled and name == COMPILED)]
        before = [row for row in rows if all(row[column] == getattr(contest, column) for column in KEY)]
        if {row["system"] for row in before} >= set(systems):
            continue
        failed = [row for row in before if "failed" in row]  # not tried again: they may fault the GPU
        if time.monotonic() - started > options.minutes * 60:
            break
        # If a system is missing, all others are measured again, since rivals are compared within one run.
        left = [name for name in systems if name not in {row["system"] for row in failed}]
        try:
            found = failed + compare(contest, left, options.rounds, limits, device)
        except Fault as fault:
            its = named(contest, fault.system)
            others = [row for row in rows if not its.items() <= row.items()]
            _keep(options.json, [*others, its | {"failed": fault.reason}], where, limits)
            raise
        rows = [row for row in rows if row not in before] + found
        print(f"{contest.name}: {_summary(found)}", flush=True)
        _keep(options.json, rows, where, limits)  # after each contest, for a run that is cut short
    print(markdown(rows, where, limits))


def _keep(file: Path | None, rows: Sequence[Row], where: Environment, limits: Ceilings) -> None:
    """Writes the rows and their tables if a file is named."""
    if file:
        save(file, document("kernels", where, limits, rows))
        save(file.with_suffix(".md"), markdown(rows, where, limits))


def _summary(rows: Sequence[Row]) -> str:
    ours = next(row for row in rows if row["system"] == OURS)
    if "failed" in ours:
        return ours["failed"]
    ratio = "no rival" if ours["to_best_rival"] is None else f"{ours['to_best_rival']:.2f} × the best rival"
    return f"{ours['seconds'] * 1e6:.4g} µs, {ratio}, {ours['of_ceiling'] * 100:.0f} % of the ceiling"


if __name__ == "__main__":
    main()
