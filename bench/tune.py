"""Searches for faster launches on a GPU, and writes them into `kernels/launches.py`.

    python -m bench.tune --minutes 20 --json bench/results/DEVICE-DATE/tune.json

For every op and kind of dtype the search varies tiles, warps and stages around the table's own entry, and for a
persistent kernel the blocks that a multiprocessor holds.

1. Launches with bad machine code (spills, too much shared memory, no matrix instructions, fewer blocks than the
   launch asks for) are left out.
2. The others are timed at the op's heaviest shape.
3. The best few are timed at all shapes with 1 % of the arithmetic or more, in interleaved rounds beside the current
   launch.
4. A launch's total is the sum of its times at all shapes, each multiplied by the number of times that the shape's model
   meets it. The entry is replaced if another launch's total is lower by more than the spread of these totals.

What is tuned is an entry's first launch, which is for many rows; those for fewer rows stay. The reduction step of a
product is not varied, so that its sums keep their order, and a row has one result by all launches of its entry;
`pytest tests/kernels` proves it again. In attention the tile of keys is a step of the softmax's sum, and is varied. So
a new entry may change last bits, for all batches alike. Parameters outside the table are not searched: the order of a
product's tiles, and the constants of LayerNorm and of the pools.

Every step (some launches at one shape) is on disk before the next begins, and `--resume` continues from there. After a
launch that faults the GPU the command fails, and `--resume` goes on without it.
"""

from __future__ import annotations

import argparse
import itertools
import math
import multiprocessing
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

import torch

from clip_fast.kernels import launches, targets
from clip_fast.kernels.launches import TABLE
from clip_fast.kernels.statistics import STATISTICS_TILE
from clip_fast.kernels.targets import Kind, Launch, LaunchTable, Target
from clip_fast.towers.config import Config

from .environment import LAUNCHES_FILE, environment, fingerprint
from .kernels.comparison import measured
from .kernels.contests import OURS, SEPARATE, Compute, Contest, Operands, contests
from .machine_code import Job, cases, compile_job, jobs_of
from .models import MODELS, PUBLISHED
from .report import document, resumed, save
from .timing import Failed, Fault, Times, reason

T = TypeVar("T")
Row = dict[str, Any]

_KINDS: dict[Kind, str] = {
    "half": "bf16",
    "float32": "fp32",
    "tf32": "tf32",
}  # kind of dtype -> the precision that it is timed in
_LEAST_WEIGHT = 0.01  # of all arithmetic: a shape with a smaller share decides nothing
_ACCUMULATOR = (16, 128)  # the fewest and the most registers of a thread for a tile of the result
_PERSISTENT = ("linear",)  # ops whose programs walk over the tiles, so that the number of programs is a choice
_BLOCKS = (1, 2)  # of a persistent kernel on a multiprocessor
_RESIDENT_WARPS = 16  # the most that fit with the registers of such a tile
_AT_A_TIME = 8  # launches in a step of the screening
_SCREENING_ROUNDS = 3
_FINALISTS = 6
_COMPILE_SECONDS = 120


@dataclass(frozen=True)
class Entry:
    """A place in the launch table, which is tuned on its own.

    `cases` are those of `bench.machine_code` that show a launch's machine code.
    """

    op: str
    kind: Kind
    cases: tuple[str, ...]
    models: Mapping[str, Config]

    @property
    def name(self) -> str:
        return f"{self.op} {self.kind}"

    def shapes(self, batches: Sequence[int]) -> list[Contest]:
        """The op's shapes that matter in its models, the heaviest first."""
        op = re.sub(r"_\d+$", "", self.op)
        found = sorted(contests(self.models, batches, [_KINDS[self.kind]], [op]), key=_weight, reverse=True)
        least = _LEAST_WEIGHT * sum(map(_weight, found))
        return [contest for contest in found if _weight(contest) >= least]

    def candidates(self, current: Launch) -> list[Launch]:
        """The current launch, and then launches around it."""
        block_ns, stages = (64, 128, 256), (2, 3, 4, 5)
        head = re.search(r"_(\d+)$", self.op)
        if head:
            block_ns, stages = (16, 32, 64, 128), (1, 2, 3, 4)
        elif self.op == "linear":  # its kernel halves a tile, and each half needs a tile of statistics
            block_ns = tuple(n for n in block_ns if n >= 2 * STATISTICS_TILE)
        found = [current]
        for m, n, warps, s in itertools.product((64, 128, 256), block_ns, (4, 8, 16), stages):
            columns = int(head[1]) if head else n  # of the result
            if not _ACCUMULATOR[0] <= m * columns // (32 * warps) <= _ACCUMULATOR[1]:
                continue
            for blocks in _BLOCKS if self.op in _PERSISTENT else sorted({1, current.blocks}):
                launch = Launch(m, n, current.block_k, num_warps=warps, num_stages=s, blocks=blocks)
                if launch != current and blocks * warps <= _RESIDENT_WARPS:
                    found.append(launch)
        return found


def _weight(contest: Contest) -> int:
    return contest.count * contest.operations


def entries() -> Iterator[Entry]:
    """The table's entries, in each kind the one that decides most first."""

    def some(*names: str) -> dict[str, Config]:
        return {name: PUBLISHED[name] for name in names}

    common = some("ViT-L/14", "ViT-B/32", "ViT-B/16")
    for kind, precision in _KINDS.items():
        products = (f"linear {precision} ln+fc1+quick_gelu", f"linear {precision} out+residual")
        yield Entry("linear", kind, products, common)
        heads = tuple(f"flash_attention {precision} {shape}" for shape in ("N=257 D=64", "N=729 D=72", "N=257 D=88"))
        yield Entry("flash_attention_64", kind, heads, common | some("ViT-H-14"))
        images = dict.fromkeys((_images(precision), "u8", "fp32"))
        pixels = tuple(f"patch_embed {precision} P=16 of {dtype}" for dtype in images)
        yield Entry("patch_embed", kind, pixels, common)
        yield Entry("flash_attention_128", kind, (f"flash_attention {precision} N=257 D=104",), some("ViT-bigG-14"))


def _images(precision: str) -> str:
    return "fp32" if precision == "tf32" else precision


@contextmanager
def trial(entry: Entry, arch: str, launch: Launch) -> Iterator[None]:
    """Within this context the entry has one launch on `arch`, whatever the rows."""
    place = TABLE[entry.op][entry.kind]
    before = place.get(arch)
    place[arch] = (launch,)
    try:
        yield
    finally:
        if before is None:
            del place[arch]
        else:
            place[arch] = before


# --- launches with bad machine code ----------------------------------------------------------------------------------


def problems_of(entry: Entry, arch: str, launches: Sequence[Launch], workers: int) -> dict[Launch, list[str]]:
    """The problems of each launch's machine code. One may be that the compiler refuses the launch, or dies of it."""
    known = {case.name: case for case in cases()}
    jobs: list[tuple[Launch, Job]] = []
    for launch in launches:
        with trial(entry, arch, launch):
            jobs += [(launch, job) for name in entry.cases for job in jobs_of(known[name], arch)]
    problems: dict[Launch, list[str]] = {launch: [] for launch in launches}
    with ThreadPoolExecutor(workers) as pool:
        for (launch, _), found in zip(jobs, pool.map(_problems, jobs), strict=True):
            problems[launch] += found
    return problems


def _problems(launched: tuple[Launch, Job]) -> list[str]:
    try:
        return isolated(_compiled_problems, *launched)
    except ChildProcessError as error:  # a launch that cannot be compiled is no candidate
        return [f"is not compiled: {error}"]


def _compiled_problems(launch: Launch, job: Job) -> list[str]:
    row = compile_job(job)
    together = job.kernel == "_linear_kernel" or "maxnreg" in dict(job.options)
    if together and row.resident < launch.blocks:
        return [*row.problems, f"{row.resident} blocks fit a multiprocessor, {launch.blocks} are wanted"]
    return row.problems


_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(["bench.machine_code", "triton"])


def isolated(function: Callable[..., T], *arguments: Any) -> T:
    """`function(*arguments)` in a process of its own, so that an aborting compiler ends only that.

    Raises:
        ChildProcessError: the function raised an exception, its process died, or it took longer than two minutes.
    """
    receiver, sender = _PROCESSES.Pipe(duplex=False)
    process = _PROCESSES.Process(target=_answer, args=(sender, function, arguments))
    process.start()
    sender.close()
    try:
        if not receiver.poll(_COMPILE_SECONDS):
            raise ChildProcessError(f"not within {_COMPILE_SECONDS} s")
        failed, answer = receiver.recv()
    except EOFError:
        raise ChildProcessError("its process died") from None
    finally:
        process.kill()
        process.join()
        receiver.close()
    if failed:
        raise ChildProcessError(answer)
    return answer


def _answer(sender: Connection, function: Callable[..., object], arguments: tuple[Any, ...]) -> None:
    try:
        answer = (False, function(*arguments))
    except Exception as error:
        answer = (True, reason(error))
    sender.send(answer)


# --- the search ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """The settings of a run. `deadline` is the value of `time.monotonic` after which no step begins."""

    device: torch.device
    batches: Sequence[int]
    rounds: int
    deadline: float
    workers: int  # processes that compile

    def plan(self, entry: Entry, current: Launch) -> tuple[list[Launch], list[Contest]]:
        """An entry's launches and shapes. On a CPU only the first few, since Triton's interpreter is slow."""
        launches, shapes = entry.candidates(current), entry.shapes(self.batches)
        return (launches, shapes) if self.device.type == "cuda" else (launches[:3], shapes[:2])

    def in_time(self) -> bool:
        return time.monotonic() < self.deadline


def search(entry: Entry, target: Target, rows: list[Row], settings: Settings) -> Iterator[list[Row]]:
    """Adds the missing rows to an entry's rows, step by step, and yields each step.

    A step has one row for each of its launches, with the samples or the reason why there are none. The steps of the
    screening come first. Then comes one step of the finals for each shape. The very first row is the current launch's.

    Raises:
        Fault: a launch has ended this process's use of the GPU. Its own row comes before, as a step of the stage
            "fault", and a later search leaves it out.
    """
    current = _current(entry, target, rows)
    candidates, shapes = settings.plan(entry, current)

    screened = {_launch(row) for row in rows}
    left = [launch for launch in candidates if launch not in screened]
    for some in (left[i : i + _AT_A_TIME] for i in range(0, len(left), _AT_A_TIME)):
        if not settings.in_time():
            return
        condemned: dict[Launch, Times | Failed] = {}
        if settings.device.type == "cuda":
            unknown = [launch for launch in some if launch != current]
            for launch, problems in problems_of(entry, target.name, unknown, settings.workers).items():
                if problems:
                    condemned[launch] = Failed("; ".join(problems))
        sound = [launch for launch in some if launch not in condemned]
        rounds = min(settings.rounds, _SCREENING_ROUNDS)
        try:
            found = condemned | _times(entry, target, shapes[0], sound, rounds, settings.device)
        except Fault as fault:
            yield from _fault(entry, target, shapes[0], current, sound, fault, rows)
            raise
        step = [_row(entry, target, "screening", shapes[0], launch, found[launch]) for launch in some]
        rows += step
        yield step

    medians = {_launch(row): Times(tuple(row["samples"])).median for row in _timed(rows, "screening")}
    rivals = sorted((launch for launch in medians if launch != current), key=medians.__getitem__)
    faults = {_launch(row) for row in rows if row["stage"] == "fault"}
    finalists = [launch for launch in (current, *rivals[:_FINALISTS]) if launch not in faults]
    for shape in shapes:
        if shape.name in _finals(rows):
            continue
        if not settings.in_time():
            return
        found: dict[Launch, Times | Failed] = {current: Failed("no launch is left")}
        try:
            if finalists:
                found = _times(entry, target, shape, finalists, settings.rounds, settings.device)
        except Fault as fault:
            yield from _fault(entry, target, shape, current, finalists, fault, rows)
            raise
        step = [_row(entry, target, "final", shape, launch, result) for launch, result in found.items()]
        rows += step
        yield step


def _fault(
    entry: Entry, target: Target, shape: Contest, current: Launch, launches: Sequence[Launch], fault: Fault,
    rows: list[Row],
) -> Iterator[list[Row]]:  # fmt: skip
    """The step of a launch that faults the GPU. Before any other row stands the current launch's, without a time."""
    (at_fault,) = (launch for launch in launches if str(launch) == fault.system)
    step = [_row(entry, target, "fault", shape, at_fault, Failed(fault.reason))]
    if not rows and at_fault != current:
        step.insert(
            0, _row(entry, target, "screening", shape, current, Failed("not timed: another launch faults the GPU"))
        )
    rows += step
    yield step


def finished(entry: Entry, target: Target, rows: Sequence[Row], settings: Settings) -> bool:
    """Whether an entry's finals have taken place at every shape."""
    _, shapes = settings.plan(entry, _current(entry, target, rows))
    return {shape.name for shape in shapes} <= _finals(rows)


def _current(entry: Entry, target: Target, rows: Sequence[Row]) -> Launch:
    """The launch that an entry had, for many rows, when its search began."""
    return _launch(rows[0]) if rows else TABLE.entry(entry.op, entry.kind, target)[0]


def _times(
    entry: Entry, target: Target, shape: Contest, launches: Sequence[Launch], rounds: int, device: torch.device
) -> dict[Launch, Times | Failed]:
    def launched(launch: Launch) -> Compute:
        def compute(operands: Operands) -> torch.Tensor:
            with trial(entry, target.name, launch):
                return shape.systems[OURS](operands)

        return compute

    systems = {str(launch): launched(launch) for launch in launches}
    contest = replace(shape, systems={SEPARATE: shape.systems[SEPARATE], **systems})
    found = measured(contest, systems, rounds, device)
    results = {launch: found[str(launch)] for launch in launches}
    return {launch: it if isinstance(it, Failed) else it.times for launch, it in results.items()}


def _row(entry: Entry, target: Target, stage: str, shape: Contest, launch: Launch, found: Times | Failed) -> Row:
    row: Row = {"op": entry.op, "kind": entry.kind, "arch": target.name, "stage": stage, "shape": shape.name}
    row |= {"count": shape.count, "launch": asdict(launch)}
    return row | ({"failed": found.reason} if isinstance(found, Failed) else {"samples": list(found.samples)})


def _launch(row: Row) -> Launch:
    return Launch(**row["launch"])


def _timed(rows: Sequence[Row], stage: str) -> list[Row]:
    return [row for row in rows if row["stage"] == stage and "samples" in row]


def _finals(rows: Sequence[Row]) -> set[str]:
    """The shapes at which finals have taken place."""
    return {row["shape"] for row in rows if row["stage"] == "final"}


def winner(rows: Sequence[Row]) -> Launch | None:
    """The launch that replaces the current one; None if the current one stays.

    The rows are those of one entry, and the first is the current launch's. A launch is out if it fails at a shape where
    another one does not.
    """
    current = _launch(rows[0])
    finals = _timed(rows, "final")
    shapes = {row["shape"] for row in finals}
    totals: dict[Launch, Times] = {}
    for launch in dict.fromkeys(map(_launch, finals)):
        weighed = [[row["count"] * seconds for seconds in row["samples"]] for row in finals if _launch(row) == launch]
        if len(weighed) == len(shapes):
            totals[launch] = Times(tuple(map(sum, zip(*weighed, strict=False))))  # a resumed run may have more rounds
    if not totals:
        return None
    best = min(totals, key=lambda launch: totals[launch].median)
    if current in totals:
        noise = max(totals[current].spread, totals[best].spread)
        if totals[best].median >= totals[current].median * (1 - noise):
            return None
    return best


# --- the table in its file -------------------------------------------------------------------------------------------


def rendered(table: LaunchTable) -> str:
    """The whole text of `kernels/launches.py` for a table."""
    lines = [f'"""{launches.__doc__}"""', "", "from __future__ import annotations", ""]
    lines += ["from .targets import Launch, LaunchTable", "", "TABLE = LaunchTable(", "    {"]
    for op, kinds in table.items():
        lines.append(f'        "{op}": {{')
        for kind, entries in kinds.items():
            lines.append(f'            "{kind}": {{')
            for arch in sorted(entries, key=list(targets.TARGETS).index):
                written = [_rendered(launch) for launch in entries[arch]]
                if len(written) == 1:
                    lines.append(f'                "{arch}": ({written[0]},),')
                else:
                    lines += [
                        f'                "{arch}": (',
                        *(f"{' ' * 20}{one}," for one in written),
                        f"{' ' * 16}),",
                    ]
            lines.append("            },")
        lines.append("        },")
    return "\n".join([*lines, "    }", ")", ""])


def _rendered(launch: Launch) -> str:
    blocks = f"{launch.block_m}, {launch.block_n}, {launch.block_k}"
    options = f"num_warps={launch.num_warps}, num_stages={launch.num_stages}"
    options += f", blocks={launch.blocks}" if launch.blocks > 1 else ""
    return f"Launch({blocks}, {options})"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.tune", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", default="", help="only the entries whose name contains this")
    parser.add_argument("--batches", default="256,32", help="separated by commas")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin nothing new after so many minutes")
    parser.add_argument("--json", type=Path, help="write all times there")
    parser.add_argument("--resume", action="store_true", help="keep the rows of that file, and measure missing ones")
    parser.add_argument("--table", type=Path, default=LAUNCHES_FILE, help="the file whose table is rewritten")
    parser.add_argument("--dry-run", action="store_true", help="run on a CPU, at toy size, and change nothing")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes that compile")
    options = parser.parse_args(arguments)
    everything = list(entries())
    if options.dry_run:
        with tempfile.TemporaryDirectory() as folder:
            copied = Path(shutil.copy(LAUNCHES_FILE, folder))
            toys = [replace(entry, models={"toy": MODELS["toy"]}) for entry in everything if entry.kind == "float32"]
            settings = Settings(torch.device("cpu"), [1], 1, math.inf, options.jobs)
            tune(toys, settings, Path(folder) / "tune.json", False, copied, options.only)
        return
    if not torch.cuda.is_available():
        parser.error("there is no GPU to tune for")
    batches = [int(batch) for batch in options.batches.split(",")]
    deadline = time.monotonic() + options.minutes * 60
    settings = Settings(torch.device("cuda"), batches, options.rounds, deadline, options.jobs)
    tune(everything, settings, options.json, options.resume, options.table, options.only)


def tune(
    everything: Sequence[Entry], settings: Settings, file: Path | None, resume: bool, table_file: Path, only: str = ""
) -> None:
    """Tunes the entries whose name contains `only`. `file` is written after each step, the table after each entry.

    Entries that are finished in `file` are put into the table again, even if `only` excludes them: the file may have
    been copied without the table.
    """
    where = replace(environment(settings.device), code=fingerprint(launches=False))
    target = targets.target_of(settings.device)
    rows = resumed(file, "tune", where) if resume and file else []
    for entry in everything:
        own = [row for row in rows if (row["op"], row["kind"]) == (entry.op, entry.kind)]
        if only in entry.name:
            for step in search(entry, target, own, settings):
                rows += step
                if file:
                    save(file, document("tune", where, None, rows))
        if not own:
            continue
        if not finished(entry, target, own, settings):
            print(f"{entry.name}: out of time, --resume goes on", flush=True)
            continue
        best = winner(own)
        print(f"{entry.name}: {best or 'the current launch stays'}", flush=True)
        if best is not None:
            others = TABLE.entry(entry.op, entry.kind, target)[1:]
            TABLE[entry.op][entry.kind][target.name] = (best, *(other for other in others if other != best))
            save(table_file, rendered(TABLE))


if __name__ == "__main__":
    main()
