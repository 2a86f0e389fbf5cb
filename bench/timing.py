"""Timing: rivals in interleaved rounds, medians with their spread, and the machine's ceilings.

    results = measure({"ours": [lambda: f(x)], "theirs": [lambda: g(x)]}, device, rounds=7, graph=True)

Clocks, temperatures and neighbours change during a run. So every rival is timed once a round, and each round starts
with another rival: a change meets all of them. Before a sample a rival runs untimed, as in a loop over images. Then
its own weights are in the caches. By then the threads of the rival before, which spin for a while, sleep and leave the
cores free. A rival that fails has a `Failed` in its place.

On a GPU a sample is the device's time by events, over as many calls as fill ten milliseconds. On a CPU it is wall time.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from clip_fast.towers.cpu import can_fuse

T = TypeVar("T")
Call = Callable[[], object]
Sampler = Callable[[], float]  # takes one sample: seconds of one call

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

WARM_UP = 3  # calls before the first sample: libraries choose their algorithms, compilers compile
_SAMPLE_SECONDS = 0.01  # the least time of a sample
_UNTIMED_SECONDS = 0.1  # before a sample on a CPU: ONNX Runtime's threads spin for half as long
_CACHES = 4  # a rotation is larger than this many second-level caches
_MOST_COPIES = 1024  # in a rotation
_MOST_MEMORY = 1 / 8  # the share of the device's memory for a rotation


@dataclass(frozen=True)
class Times:
    """Seconds of one call, one sample per round."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def spread(self) -> float:
        """Distance of the quartiles, as a fraction of the median; 0 for a single sample."""
        if len(self.samples) < 2:
            return 0.0
        first, _, third = statistics.quantiles(self.samples, n=4, method="inclusive")
        return (third - first) / self.median


@dataclass(frozen=True)
class Failed:
    """Takes the place of a result that was not measured, with the reason."""

    reason: str


class Fault(RuntimeError):
    """A system's fault has ended this process's use of the GPU: CUDA answers every later call with the same error."""

    def __init__(self, system: str, why: str) -> None:
        super().__init__(f"{system} faults the GPU, so this process measures nothing more: {why}")
        self.system = system
        self.reason = f"faults the GPU: {why}"


def failure(system: str, error: Exception, device: torch.device) -> Failed:
    """A system's failure is its result.

    Raises:
        Fault: the GPU takes no more work of this process. Then what follows would fail without a fault of its own.
    """
    if lost(device):
        raise Fault(system, reason(error)) from error
    return Failed(reason(error))


def lost(device: torch.device) -> bool:
    """Whether a fault has ended this process's use of a GPU."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


def reason(error: BaseException) -> str:
    """An exception as one line for a table."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return text if len(text) <= 200 else text[:199] + "…"


def measure(
    rivals: Mapping[str, Sequence[Call]],
    device: torch.device,
    rounds: int,
    *,
    graph: bool = False,
    awaited: bool = False,
) -> dict[str, Times | Failed]:
    """Times every rival in `rounds` interleaved rounds.

    Args:
        rivals: name -> calls that do the same work, one after the other, each on buffers of its own. Their results are
            kept until the last call has returned, so that results have a buffer each too. If all these buffers together
            are larger than the caches (`rotated`), the calls are timed with cold caches.
        device: the device to measure; a GPU must be PyTorch's current one.
        graph: on an NVIDIA GPU, time replays of a CUDA graph of the calls: the device's time without the host's. The
            graphs of all rivals share their memory.
        awaited: take wall time from a call until the device has done it, each call alone: the latency that one caller
            sees. Otherwise calls are issued one after the other, and a device that falls behind has a queue of them.

    Raises:
        Fault: a rival has ended this process's use of the GPU.
    """
    prepare = _capturer() if graph else _as_it_is
    samplers: dict[str, Sampler] = {}
    results: dict[str, Times | Failed] = {}
    for name, calls in rivals.items():
        try:
            samplers[name] = sampler(calls, device, prepare, awaited=awaited)
        except Exception as error:  # any failure of a rival is its result
            results[name] = failure(name, error, device)
    results |= interleaved(samplers, rounds, device)
    return {name: results[name] for name in rivals}


def interleaved(samplers: Mapping[str, Sampler], rounds: int, device: torch.device) -> dict[str, Times | Failed]:
    """One sample of every sampler per round. Round r begins with the r-th sampler."""
    names = list(samplers)
    samples: dict[str, list[float]] = {name: [] for name in names}
    failures: dict[str, Times | Failed] = {}
    for r in range(rounds):
        for i in range(len(names)):
            name = names[(r + i) % len(names)]
            if name in failures:
                continue
            try:
                samples[name].append(samplers[name]())
            except Exception as error:
                failures[name] = failure(name, error, device)
    return {name: failures.get(name) or Times(tuple(samples[name])) for name in names}


def _as_it_is(once: Call) -> Call:
    return once


def sampler(
    calls: Sequence[Call], device: torch.device, prepare: Callable[[Call], Call] = _as_it_is, *, awaited: bool = False
) -> Sampler:
    """Warms `calls` up and returns their sampler: it takes the mean seconds of one call, over enough calls."""

    def once() -> list[object]:
        return [call() for call in calls]

    run = prepare(once)
    elapsed = _by_events(run) if device.type == "cuda" and not awaited else _by_the_clock(run, device)
    estimate = [elapsed(1) for _ in range(WARM_UP)][-1]
    repeats = max(1, math.ceil(_SAMPLE_SECONDS / max(estimate, 1e-9)))
    settled = _UNTIMED_SECONDS if device.type == "cpu" else 0.0

    def sample() -> float:
        untimed = elapsed(1)
        while untimed < settled:
            untimed += elapsed(1)
        return elapsed(repeats) / (repeats * len(calls))

    return sample


def _by_the_clock(once: Call, device: torch.device) -> Callable[[int], float]:
    """Wall time. On a GPU each call is waited for."""
    wait = torch.cuda.synchronize if device.type == "cuda" else None

    def elapsed(repeats: int) -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            once()
            if wait is not None:
                wait(device)
        return time.perf_counter() - start

    return elapsed


def _by_events(once: Call) -> Callable[[int], float]:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def elapsed(repeats: int) -> float:
        start.record()
        for _ in range(repeats):
            once()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    return elapsed


def _capturer() -> Callable[[Call], Call]:
    """Turns calls into replays of CUDA graphs. All share one memory pool, since no two of them run at once."""
    stream, pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
    graphs: list[torch.cuda.CUDAGraph] = []  # kept, since a pool ends with its last graph; failed captures do not count

    def captured(once: Call) -> Call:
        graph = torch.cuda.CUDAGraph()
        graphs.append(graph)
        stream.wait_stream(torch.cuda.current_stream())
        # Libraries allocate a workspace for each stream, and cannot do so during a capture.
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                once()
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            once()
        return graph.replay

    return captured


# --- rotation, precision, memory -------------------------------------------------------------------------------------


def rotated(make: Callable[[], T], footprint: int, device: torch.device) -> list[T]:
    """So many copies of a call's operands that none of one is left in the cache when its turn comes again.

    Args:
        make: makes fresh operands of one call.
        footprint: the bytes that a call reads and writes.
    """
    if device.type != "cuda":
        return [make()]
    properties: Any = torch.cuda.get_device_properties(device)
    room = int(properties.total_memory * _MOST_MEMORY / footprint)
    wanted = 1 + math.ceil(_CACHES * properties.L2_cache_size / footprint)
    return [make() for _ in range(max(1, min(_MOST_COPIES, room, wanted)))]


@contextmanager
def products_in(precision: str) -> Iterator[None]:
    """Within this context PyTorch's float32 products and convolutions use TF32 if `precision` is "tf32", else not."""
    backends: tuple[Any, Any] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = precision == "tf32"
        yield
    finally:
        for backend, allowed in zip(backends, before, strict=True):
            backend.allow_tf32 = allowed


@dataclass
class Taken:
    """Bytes of a GPU that some work took: at its peak, and for good."""

    peak: int = 0
    held: int = 0


@contextmanager
def memory_of(device: torch.device) -> Iterator[Taken | None]:
    """The GPU memory that the work in this context takes, known at its end. None on a CPU, where nothing counts it.

    The bytes that the allocator reserves are counted. They include the pools of CUDA graphs, though replays allocate
    nothing.
    """
    if device.type != "cuda":
        yield None
        return
    taken, before = Taken(), _reserved(device)
    torch.cuda.reset_peak_memory_stats(device)
    yield taken
    torch.cuda.synchronize(device)
    taken.peak = torch.cuda.max_memory_reserved(device) - before
    taken.held = _reserved(device) - before


def _reserved(device: torch.device) -> int:
    """The bytes in use, after those that PyTorch merely keeps for reuse are given back."""
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved(device)


# --- ceilings --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ceilings:
    """The best rates that the device reached, in a run of its own beside the measurements."""

    flops: Mapping[str, float]  # precision -> operations per second of a large square matrix product
    bytes: float  # per second of a large copy, reads and writes together

    def line(self) -> str:
        """The rates in one line, without a full stop."""
        reached = ", ".join(f"{flops / 1e12:.4g} TFLOP/s in {name}" for name, flops in self.flops.items())
        return f"Ceilings of this run: {reached}, {self.bytes / 1e9:.4g} GB/s"


def ceilings(device: torch.device, precisions: Sequence[str], rounds: int = 7) -> Ceilings:
    """Measures the ceilings with PyTorch's own products and copy, on random data.

    On a CPU, where PyTorch has two products, the faster one is the ceiling. The other may be half as fast, as MKL's is
    in float32 on AMD's CPUs with AVX-512.

    Args:
        precisions: some of "fp32", "tf32", "fp16" and "bf16".
    """
    large = device.type == "cuda"
    size, elements = (8192, 1 << 28) if large else (2048, 1 << 25)
    flops = {name: 2 * size**3 / _product(size, name, device, rounds) for name in precisions}
    return Ceilings(flops, 2 * 4 * elements / _copy(elements, device, rounds))


def _copy(elements: int, device: torch.device, rounds: int) -> float:
    source = torch.randn(elements, device=device)
    target = torch.empty_like(source)
    return _fastest(lambda: target.copy_(source), device, rounds)


def _product(size: int, precision: str, device: torch.device, rounds: int) -> float:
    a, b = (torch.randn(size, size, device=device).to(DTYPES[precision]) for _ in range(2))
    out = torch.empty_like(a)
    calls: list[Call] = [lambda: torch.mm(a, b, out=out)]
    if device.type == "cpu" and can_fuse(a.dtype):
        packed = torch.ops.mkldnn._reorder_linear_weight(b, size)
        calls.append(lambda: torch.ops.mkldnn._linear_pointwise(a, packed, None, "none", [], ""))
    with products_in(precision):
        return min(_fastest(call, device, rounds) for call in calls)


def _fastest(call: Call, device: torch.device, rounds: int) -> float:
    sample = sampler([call], device)
    return min(sample() for _ in range(rounds))
