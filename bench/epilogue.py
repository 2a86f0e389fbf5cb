"""What `linear`'s epilogue costs: its time at K = 64, a single step of the main loop, beside that at K = 1024.

    python -m bench.epilogue --model ViT-L/14 --batch 256 --precision bf16

The main loop's time is proportional to K and the epilogue's is not: of two times the line through them has the loop as
its slope, and meets K = 0 at the epilogue. Beside it stands what the bytes of the result and the residual take at the
rate of a large copy: where that is more, it is what was measured. Takes seconds, and settles the largest unknown of
`bench.predict`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from clip_fast.towers.config import VitConfig

from .environment import chosen_device, environment
from .kernels.comparison import measured
from .kernels.contests import OURS, Contest, linear_contest
from .models import MODELS
from .report import document, save, table
from .timing import DTYPES, Ceilings, Failed, ceilings

Row = dict[str, Any]


def contests(model: str, config: VitConfig, batch: int, precision: str, k: int) -> Iterator[Contest]:
    """The products of a block, each with its own epilogue, over K columns."""
    m, w, activation = batch * config.tokens, config.width, config.activation

    def contest(part: str, n: int, **features: Any) -> Contest:
        return linear_contest(model, part, 1, batch, precision, m, n, k, **features)

    yield contest("ln+qkv", 3 * w, norm=True)
    yield contest("out+residual", w, residual=True)
    yield contest(f"ln+fc1+{activation}", config.mlp_width, norm=True, activation=activation)


def epilogue_seconds(times: Mapping[int, float]) -> float:
    """Where the line through two times, by K, meets K = 0."""
    (short, least), (long, most) = sorted(times.items())
    return least - (most - least) * short / (long - short)


def rows_of(
    model: str, config: VitConfig, batch: int, precision: str, ks: Sequence[int], rounds: int, limits: Ceilings,
    device: torch.device,
) -> list[Row]:  # fmt: skip
    """A row for each product; what fails has a reason in place of numbers."""
    rows: list[Row] = []
    for these in zip(*(contests(model, config, batch, precision, k) for k in ks), strict=True):
        row: Row = {"model": model, "part": these[0].part, "batch": batch, "precision": precision, "system": OURS}
        times: dict[int, float] = {}
        for k, contest in zip(ks, these, strict=True):
            found = measured(contest, [OURS], rounds, device)[OURS]
            if isinstance(found, Failed):
                row["failed"] = found.reason
                break
            times[k] = found.times.median
        if len(times) == len(ks):
            written = these[0].traffic - (batch * config.tokens) * ks[0] * DTYPES[precision].itemsize
            row |= {"seconds": {str(k): value for k, value in times.items()}, "epilogue": epilogue_seconds(times)}
            row["memory"] = written / limits.bytes
        rows.append(row)
    return rows


def markdown(rows: Sequence[Row], ks: Sequence[int]) -> str:
    """A line for each product."""
    lines = [
        [
            f"{row['model']} {row['part']}, batch {row['batch']}, {row['precision']}",
            *(f"{row['seconds'][str(k)] * 1e6:.4g}" for k in ks),
            f"{row['epilogue'] * 1e6:.4g}",
            f"{row['memory'] * 1e6:.4g}",
        ]
        for row in rows
        if "failed" not in row
    ]
    failed = [f"{row['part']}: {row['failed']}" for row in rows if "failed" in row]
    times = [f"K = {k}, µs" for k in ks]
    return "\n\n".join([table(["", *times, "epilogue, µs", "its bytes alone, µs"], lines), *failed]) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="python -m bench.epilogue", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="ViT-L/14")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--precision", default="bf16", choices=list(DTYPES))
    parser.add_argument("--ks", default="64,1024", help="two, with a comma between (default: 64,1024)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--json", type=Path, help="write the results there, and the table beside them as markdown")
    options = parser.parse_args(arguments)
    config, ks = MODELS[options.model], [int(k) for k in options.ks.split(",")]
    if not isinstance(config, VitConfig):
        parser.error(f"{options.model} is a ResNet")
    if len(set(ks)) != 2:
        parser.error("--ks takes two different numbers")
    device = chosen_device(options.device)
    limits = ceilings(device, [options.precision], options.rounds)
    rows = rows_of(options.model, config, options.batch, options.precision, ks, options.rounds, limits, device)
    text = markdown(rows, ks)
    if options.json:
        save(options.json, document("epilogue", environment(device), limits, rows))
        save(options.json.with_suffix(".md"), text)
    print(text)


if __name__ == "__main__":
    main()
