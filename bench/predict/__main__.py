"""How long an encoder takes on a GPU: calculated, launch by launch, from its kernels' machine code. Without a GPU.

    python -m bench.predict --models ViT-L/14 --batches 256,1 --precisions bf16 --device H200

The kernels are compiled as `bench.machine_code` compiles them, and what their machine code executes meets the published
rates of a device (`devices.py`) in the equations of `terms.py`. Printed are each launch's terms, their sum, and the
same arithmetic for the rival (`rival.py`). Where `bench/results/` has a run of `bench.end_to_end` on such a device, its
throughput stands beside.

`clip-fast encode` resizes a batch before: these launches, of photographs of 640 × 480, stand first and in no sum.

Between two launches of a graph 1 µs is taken to pass, or 0.5 µs where the second is in place before the first ends:
both are estimates. Nothing here is measured. Against hand arithmetic with more knowledge of the caches the sums differ
by up to 15 %, and that is what they are good for: to see whether a change costs time, and where the time goes.

    models=ViT-B/32,ViT-B/16,ViT-L/14,ViT-L/14@336px,ViT-B-16-SigLIP,ViT-SO400M-14-SigLIP-384
    devices="H200,A100,RTX 4090,L4,B200"
    python -m bench.predict --models $models --devices "$devices" --json bench/results/predictions.json

writes the committed table, with which `bench.regressions` compares, and whose figures `docs/benchmarks.md` shows.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..environment import RESULTS, fingerprint
from ..report import save, table
from ..timing import DTYPES
from .devices import DEVICES
from .prediction import PREDICTABLE, Predicted, Prediction, predictions

MODELS_SHOWN = "ViT-B/32,ViT-B/16,ViT-L/14,ViT-L/14@336px"


# --- tables ----------------------------------------------------------------------------------------------------------


def markdown(them: Sequence[Prediction], measured: Mapping[tuple[str, str, int, str], str]) -> str:
    """Throughputs of all, then each one's launches. Every column and sentence with a figure says "calculated"."""
    names = ["img/s", "of the roofline", "device, ms", "host, ms", "rival, img/s", "× rival"]
    header = ["", *(f"{name} (calculated)" for name in names)]
    beside = any((p.device, p.model, p.batch, p.precision) in measured for p in them)
    lines = [_summary(p) for p in them]
    if beside:
        header.append("img/s (measured)")
        for line, p in zip(lines, them, strict=True):
            line.append(measured.get((p.device, p.model, p.batch, p.precision), ""))
    parts = [table(header, lines)]
    for p in them:
        parts.append(f"**{_title(p)}**, calculated, one launch of each kind:")
        parts.append(table(_LAUNCH_HEADER, [_launch_line(each) for each in (*p.before, *p.launches)]))
    parts.append(_about({p.device for p in them}))
    return "\n\n".join(parts) + "\n"


def _title(p: Prediction) -> str:
    return f"{p.model}, batch {p.batch}, {p.precision}, {p.device}"


def _summary(p: Prediction) -> list[str]:
    return [
        _title(p), f"{p.batch / p.seconds:,.0f}", f"{p.least / p.seconds:.0%}", f"{p.on_device * 1e3:.3g}",
        "graph" if p.replayed else f"{p.on_host * 1e3:.3g}",
        *(["", ""] if p.rival is None else [f"{p.batch / p.rival:,.0f}", f"{p.rival / p.seconds:.2f}"]),
    ]  # fmt: skip


_LAUNCH_HEADER = [
    "launch",
    *(
        f"{name} (calculated)"
        for name in (
            "times", "tiles", "waves", "tensor, µs", "main loop, µs", "epilogue, µs", "memory, µs", "all, µs",
            "host, µs", "instructions of a step", "and once", "barriers once", "registers", "blocks a multiprocessor",
        )
    ),
]  # fmt: skip


def _launch_line(p: Predicted) -> list[str]:
    time, code_ = p.time, p.kernel.code
    seconds = (time.tensor, time.loop, time.epilogue, time.memory, time.device, time.host)
    return [
        p.launch.label, str(p.count), str(p.launch.work.tiles), f"{time.waves:.2f}",
        *(f"{value * 1e6:.4g}" for value in seconds), str(code_.step.instructions), str(code_.once.instructions),
        str(code_.once.barriers), str(p.kernel.registers), str(p.kernel.resident),
    ]  # fmt: skip


def _about(devices: Iterable[str]) -> str:
    lines: list[str] = []
    for name in sorted(devices):
        kind = "sustained rates" if DEVICES[name].sustained else "peak rates, so these are upper bounds"
        rival = "" if DEVICES[name].library else ", and no rival's"
        lines.append(f"Calculated with the {name}'s {kind}{rival}. {DEVICES[name].source}.")
    version = importlib.metadata.version("triton")
    lines.append(
        f"Every figure is calculated, from the code that Triton {version} makes. Take calculated times as right to 15 "
        "%, those of attention to 40 %."
    )
    return "\n\n".join(lines)


def measured_on(devices: Iterable[str], results: Path = RESULTS) -> dict[tuple[str, str, int, str], str]:
    """Our throughput where `bench.end_to_end` has measured it on such a device, and a mark where by other code."""
    found: dict[tuple[str, str, int, str], str] = {}
    for file in sorted(results.glob("*/end_to_end.json")):
        document = json.loads(file.read_text())
        where = document["environment"]
        for name in devices:
            if not re.search(rf"\b{re.escape(name)}\b(?! (?:D|Laptop)\b)", where["device"]):
                continue
            mark = "" if where.get("code") == fingerprint() else " (other code)"
            for row in document["rows"]:
                if row["system"] == "clip_fast" and "failed" not in row:
                    key = (name, row["model"], row["batch"], row["precision"])
                    found[key] = f"{row['images_per_second']:,.0f}{mark}"
    return found


def document(them: Sequence[Prediction]) -> str:
    """As JSON: the version of Triton, and a line for each prediction and each of its launches."""
    lines = [json.dumps(row, ensure_ascii=False) for p in them for row in rows_of(p)]
    version = json.dumps(importlib.metadata.version("triton"))
    return f'{{"bench": "predict", "triton": {version}, "rows": [\n' + ",\n".join(lines) + "\n]}\n"


def rows_of(p: Prediction) -> list[dict[str, Any]]:
    """The whole first, then each launch: all figures are calculated."""
    where = {"device": p.device, "model": p.model, "batch": p.batch, "precision": p.precision}
    whole = {"seconds": p.seconds, "on_device": p.on_device, "on_host": p.on_host, "rival": p.rival, "least": p.least}
    rows: list[dict[str, Any]] = [where | {"launch": ""} | _rounded(whole)]
    for each in (*p.before, *p.launches):
        row = where | {"launch": each.launch.label, "times": each.count, "tiles": each.launch.work.tiles}
        rows.append(row | _rounded({"seconds": each.time.device} | asdict(each.time)))
    return rows


def _rounded(values: Mapping[str, float | None]) -> dict[str, float | None]:
    """To five digits: the same code has the same table on any machine."""
    return {name: None if value is None else float(f"{value:.5g}") for name, value in values.items()}


# --- the command -----------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.predict", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--models", default=MODELS_SHOWN, help=f"names, with commas between (default: {MODELS_SHOWN})")
    parser.add_argument("--batches", default="256,1", help="with commas between (default: 256,1)")
    parser.add_argument("--precisions", default="bf16", help="of bf16, fp16, tf32 and fp32 (default: bf16)")
    parser.add_argument("--devices", default="H200", help=f"of {', '.join(DEVICES)} (default: H200)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the predictions there")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: one per CPU core)")
    options = parser.parse_args(arguments)
    models, precisions, devices = (text.split(",") for text in (options.models, options.precisions, options.devices))
    for chosen, known in ((models, PREDICTABLE), (precisions, DTYPES), (devices, DEVICES)):
        if unknown := [name for name in chosen if name not in known]:
            parser.error(f"unknown: {', '.join(unknown)}; known: {', '.join(known)}")
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set: there is nothing to compile")
    try:
        them = predictions(
            models, [int(batch) for batch in options.batches.split(",")], precisions, devices, options.jobs
        )
    except ValueError as error:
        parser.error(str(error))
    if options.json:
        save(options.json, document(them))
    print(markdown(them, measured_on(devices)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
