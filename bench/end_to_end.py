"""`encode_image` against everything else that people can pick: time, memory and error, side by side.

    python -m bench.end_to_end --models ViT-B/32 --batches 1,32 --precisions fp32

Every system encodes the same random images with the same random weights. They are timed in interleaved rounds. A row
holds a system's error and its lowest cosine against the plain tower in float64, so that speed bought with accuracy
shows. Systems that are not installed or fail are listed with the reason. After a system that faults the GPU the command
fails, and `--resume` goes on behind it.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clip_fast.towers.config import Config

from .environment import Environment, bf16_on_cpu, chosen_device, environment
from .models import ENCODERS, random_images, random_tower
from .report import document, higher, highest, resumed, save, table
from .roofline import least_seconds, operations, traffic
from .systems import BASELINE, FLOAT32, OURS, SYSTEMS, Encode, System, Task, Unavailable, compilations
from .timing import WARM_UP, Ceilings, Failed, Fault, Times, ceilings, failure, measure, memory_of, products_in

BATCHES = (1, 8, 32, 256, 1024)
_JUDGED = 4  # images of a batch whose embeddings are compared with float64
_SAME = 0.05  # relative error, beyond which a system computes something else
_HEAT = 60.0  # seconds after which a heat takes no further system

Row = dict[str, Any]


class _Entrant:
    """A system during a model's batches. It is built at the first batch, and judged once at each."""

    def __init__(self, system: System, task: Task, exact: Tensor) -> None:
        self.system, self._task, self._exact = system, task, exact
        self.encode: Encode | Failed | None = None
        self._held = 0  # bytes of a GPU that it holds since earlier batches
        self._judged: dict[int, Row | Failed] = {}

    def judged(self, images: Tensor) -> Row | Failed:
        """The system's error and lowest cosine on the first images, against float64, and the memory that it took."""
        batch = len(images)
        if batch not in self._judged:
            with memory_of(self._task.device) as taken:
                if self.encode is None:
                    self.encode = _built(self.system, self._task)
                result = _judge(self.system, self.encode, images, self._exact, 1 if taken is None else WARM_UP)
            if isinstance(result, dict):
                result["peak_memory"] = None if taken is None else self._held + taken.peak
            self._held += 0 if taken is None else taken.held
            self._judged[batch] = result
        return self._judged[batch]


def heats(
    model: str, config: Config, precision: str, lacking: Mapping[int, Sequence[System]], rounds: int,
    device: torch.device, ours: Mapping[int, System] = MappingProxyType({}), ends: float = math.inf,
) -> Iterator[list[Row]]:  # fmt: skip
    """The rows of one heat after another. A heat is some systems in the same interleaved rounds.

    Some systems take minutes to compile. A heat takes as many systems as get ready within one minute, and one at least,
    so that a run which is cut short has measured something. Our system is in every heat. A row's `beside` is our time
    in that row's own rounds; rows of different heats are compared by it.

    Args:
        lacking: batch -> the systems to measure.
        ours: batch -> our system, which takes part in every heat, even if it has its row already.
        ends: the value of `time.monotonic` after which no further system begins.

    Raises:
        Fault: a system has ended this process's use of the GPU. Its own row comes before.
    """
    tower = random_tower(config)
    task = Task(config, {name: t.detach() for name, t in tower.state_dict().items()}, device, precision)
    images = random_images(max(lacking), config.image_size)
    with torch.inference_mode(), products_in(precision), compilations():
        exact = tower.double()(images[:_JUDGED].double())
        entrants: dict[str, _Entrant] = {}
        for system in (*ours.values(), *(system for systems in lacking.values() for system in systems)):
            entrants.setdefault(system.name, _Entrant(system, task, exact))
        for batch, systems in lacking.items():
            about = {"model": model, "batch": batch, "precision": precision}
            about |= {"operations": batch * operations(config), "traffic": traffic(config, batch, precision)}
            there = images[:batch].to(device, task.dtype)
            waiting = [system.name for system in systems]
            while waiting and time.monotonic() < ends:
                closes = min(ends, time.monotonic() + _HEAT)
                names: list[str] = []
                try:
                    while waiting and (not names or time.monotonic() < closes):
                        names.append(waiting.pop(0))
                        entrants[names[-1]].judged(there)  # builds it, which takes the time; `_heat` reads the result
                    beside = [ours[batch].name] if batch in ours and ours[batch].name not in names else []
                    rows = _heat(about, [entrants[name] for name in (*beside, *names)], there, rounds)
                except Fault as fault:
                    yield [about | {"system": fault.system, "failed": fault.reason}]
                    raise
                yield [rows[name] for name in names]


def _heat(about: Row, entrants: Sequence[_Entrant], images: Tensor, rounds: int) -> dict[str, Row]:
    """A row for each system, by name: its time, or the reason why it has none."""
    results = {entrant.system.name: entrant.judged(images) for entrant in entrants}
    calls = {e.system.name: [partial(e.encode, images)] for e in entrants if callable(e.encode)}
    calls = {name: call for name, call in calls.items() if not isinstance(results[name], Failed)}
    times = measure(calls, images.device, rounds)
    one_on_a_gpu = images.device.type == "cuda" and len(images) == 1
    awaited = measure(calls, images.device, rounds, awaited=True) if one_on_a_gpu else {}
    ours = times.get(OURS)
    rows: dict[str, Row] = {}
    for name, result in results.items():
        row = rows[name] = about | {"system": name}
        if isinstance(result, Failed):
            row["failed"] = result.reason
            continue
        timed = times[name]
        if isinstance(timed, Failed):
            row["failed"] = timed.reason
            continue
        row |= result
        row |= {"seconds": timed.median, "spread": timed.spread, "images_per_second": len(images) / timed.median}
        row["rounds"] = rounds
        row["beside"] = ours.median if isinstance(ours, Times) else None
        latency = awaited.get(name)
        row["latency"] = latency.median if isinstance(latency, Times) else None
    return rows


def _built(system: System, task: Task) -> Encode | Failed:
    try:
        return system.encode(task)
    except Unavailable as why:
        return Failed(str(why))
    except Exception as error:  # any failure of a rival is its result
        return failure(system.name, error, task.device)


def _judge(system: System, encode: Encode | Failed, images: Tensor, exact: Tensor, calls: int) -> Row | Failed:
    if isinstance(encode, Failed):
        return encode
    try:
        got = encode(images)
        for _ in range(calls - 1):
            got = encode(images)
        got = got[: len(exact)].double().cpu()
    except Exception as error:
        return failure(system.name, error, images.device)
    wanted = exact[: len(got)]
    error = float((got - wanted).norm() / wanted.norm())
    cosine = float(F.cosine_similarity(got, wanted).min())
    if not error < _SAME:
        return Failed(f"computes something else: relative error {error:.2g}")
    return {"error": error, "cosine": cosine}


def add_ratios(rows: Sequence[Row], limits: Ceilings) -> None:
    """Adds each system's throughput relative to openai-clip's, to the best rival's and to the machine's ceilings.

    Systems are compared by their time divided by ours in the same rounds. Where ours is missing they are compared by
    seconds.
    """
    for these in _contests(rows):
        done = [row for row in these if "failed" not in row]
        in_units = all(row["beside"] for row in done)
        times = {row["system"]: row["seconds"] / row["beside"] if in_units else row["seconds"] for row in done}
        best = min((taken for name, taken in times.items() if name != OURS), default=None)
        for row in done:
            taken = times[row["system"]]
            row["to_baseline"] = times[BASELINE] / taken if BASELINE in times else None
            row["to_float32"] = times[FLOAT32] / taken if FLOAT32 in times else None
            row["to_best_rival"] = best / taken if best else None
            least = least_seconds(row["operations"], row["traffic"], row["precision"], limits)
            row["to_roofline"] = least / row["seconds"]


def _contests(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows of the same model, batch and precision."""
    contests: dict[tuple[str, int, str], list[Row]] = {}
    for row in rows:
        contests.setdefault((row["model"], row["batch"], row["precision"]), []).append(row)
    return list(contests.values())


# --- tables ----------------------------------------------------------------------------------------------------------


def markdown(rows: Sequence[Row], where: Environment, limits: Ceilings) -> str:
    """A table for every model, batch and precision: the fastest system first, failures below; then the ceilings.

    One column is the time per call when calls are issued one after the other. Where it was measured, another is the
    time of one call whose result is waited for. Columns in which nothing was measured are left out.
    """
    parts: list[str] = []
    for these in _contests(rows):
        done = sorted((row for row in these if "failed" not in row), key=lambda row: row["seconds"])
        failed = [f"- {row['system']}: {row['failed']}" for row in these if "failed" in row]
        lines = [_cells(row) for row in done]
        first = these[0]
        parts.append(f"**{first['model']}, batch {first['batch']}, {first['precision']}**")
        if lines:
            header = [name for name in lines[0] if any(line[name] for line in lines)]
            parts.append(table(header, [[line[name] for name in header] for line in lines]))
        if failed:
            parts.append("Not measured:\n\n" + "\n".join(failed))
    return "\n\n".join([*parts, f"{limits.line()}. {where.line()}."]) + "\n"


def _cells(row: Row) -> dict[str, str]:
    """A row's cells by column. A cell is empty where nothing was measured."""

    def number(name: str, scale: float = 1.0, form: str = ".2f") -> str:
        return "" if row[name] is None else format(row[name] * scale, form)

    return {
        "system": f"**{row['system']}**" if row["system"] == OURS else row["system"],
        "ms": number("seconds", 1e3, ".4g"),
        "ms, waited for": number("latency", 1e3, ".4g"),
        "± %": number("spread", 100, ".0f"),
        "img/s": number("images_per_second", form=".4g"),
        f"× {BASELINE}": number("to_baseline"),
        f"× {FLOAT32}": number("to_float32"),
        "× best rival": number("to_best_rival"),
        "of roofline, %": number("to_roofline", 100, ".0f"),
        "error": number("error", form=".1e"),
        "1 − cosine": f"{max(0.0, 1 - row['cosine']):.0e}",
        "memory, MiB": number("peak_memory", 2**-20, ".0f"),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.end_to_end", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--models", default="ViT-B/32", help="names, separated by commas")
    parser.add_argument("--batches", help="separated by commas; by default up to 1024 on a GPU, 1 and 32 on a CPU")
    parser.add_argument("--precisions", help="of fp32, tf32, fp16, bf16; by default bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--systems", help="names, separated by semicolons; by default all")
    parser.add_argument("--layers", type=int, help="cut ViTs to this many blocks, to try the benchmark itself")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="write the results there, and the tables beside them as markdown")
    parser.add_argument("--resume", action="store_true", help="keep the rows of that file, and measure missing ones")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin nothing new after so many minutes")
    options = parser.parse_args(arguments)
    device = chosen_device(options.device)
    on_gpu = device.type == "cuda"
    batches = [int(b) for b in options.batches.split(",")] if options.batches else BATCHES if on_gpu else (1, 32)
    precisions = (options.precisions or ("bf16" if on_gpu else "fp32")).split(",")
    if not on_gpu and "bf16" in precisions and not bf16_on_cpu():
        print("This CPU has no bf16 instructions: left out.")
        precisions.remove("bf16")
    models = options.models.split(",")
    here = {system.name: system for system in SYSTEMS if device.type in system.devices}
    chosen = options.systems.split(";") if options.systems else list(here)
    for kind, names, known in (("model", models, ENCODERS), ("system", chosen, here)):
        if unknown := [name for name in names if name not in known]:
            parser.error(f"no {kind} {unknown[0]!r} on this device; there are {', '.join(known)}")
    where, limits = environment(device), ceilings(device, precisions, options.rounds)
    rows: list[Row] = []
    if options.resume and options.json:
        rows, limits = resumed(options.json, "end_to_end", where), highest(options.json, limits)
    # A row of fewer rounds than are asked for is measured again. Those of older files do not say their rounds.
    done = {_place(row): row for row in rows if row.get("rounds", options.rounds) >= options.rounds}
    ends = time.monotonic() + options.minutes * 60
    for model in models:
        config: Any = ENCODERS[model]
        if options.layers and hasattr(config, "patch_size"):
            config = replace(config, layers=options.layers)
            model = f"{model}, {options.layers} layers"
        for precision in precisions:
            lacking = {b: [here[s] for s in chosen if (model, precision, b, s) not in done] for b in batches}
            lacking = {batch: systems for batch, systems in lacking.items() if systems}
            if not lacking or time.monotonic() > ends:
                continue
            able = (b for b in lacking if "failed" not in done.get((model, precision, b, OURS), {}))
            ours = {b: here[OURS] for b in able if OURS in chosen}  # where ours faulted the GPU, rivals go on without
            for found in heats(model, config, precision, lacking, options.rounds, device, ours, ends):
                places = [_place(row) for row in found]  # a system that faults the GPU later may have its row already
                rows = [row for row in rows if _place(row) not in places] + found
                print("\n".join(_line(row) for row in found), flush=True)
                _keep(options.json, rows, where, limits)  # after each heat, for a run that is cut short
    # The machine may have been busy at the beginning.
    limits = higher(limits, ceilings(device, precisions, options.rounds))
    _keep(options.json, rows, where, limits)
    print(markdown(rows, where, limits))


def _place(row: Row) -> tuple[str, str, int, str]:
    return row["model"], row["precision"], row["batch"], row["system"]


def _keep(file: Path | None, rows: Sequence[Row], where: Environment, limits: Ceilings) -> None:
    """Adds the rows' ratios to each other and to the ceilings, and writes the rows if a file is named."""
    add_ratios(rows, limits)
    if file:
        save(file, document("end_to_end", where, limits, rows))
        save(file.with_suffix(".md"), markdown(rows, where, limits))


def _line(row: Row) -> str:
    result = row["failed"] if "failed" in row else f"{row['seconds'] * 1e3:.4g} ms"
    return f"{row['model']}, batch {row['batch']}, {row['precision']}, {row['system']}: {result}"


if __name__ == "__main__":
    main()
