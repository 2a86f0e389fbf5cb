"""CUDA graphs for batches that a GPU computes faster than its host launches the kernels.

A graph is captured for a bucket of batch sizes when it is first needed, and replayed for every batch that fits into it.
A batch that does not fill its bucket leaves the rows of an earlier batch behind its own. They are harmless, since a
row's result depends on that row alone.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..kernels.targets import total_memory
from ..towers.config import Config, Task
from ..towers.fast import Results

# That the fastest GPU does in 0.1 ms. Its host launches a kernel in half of that, or less, while no other thread of
# Python runs.
_OPERATIONS_A_LAUNCH = 6e10
_CHEAP = 7e11  # operations of a padded batch, for which any GPU takes no longer than its host to launch the kernels
_MEMORY_SHARE = 1 / 32  # of a GPU's memory that the graphs of one set of weights may be counted with
_FIRST_PAUSE, _LONGEST_PAUSE = 64, 4096  # calls


def bucket_of(batch: int, config: Config) -> int | None:
    """The batch size at which `batch` images are replayed; None: not as a graph.

    A graph pays as long as the GPU would wait for its host, which the operations of the bucket decide. Buckets are
    powers of two where the whole bucket is cheap. Otherwise there are four of them from one power of two to the next,
    so that at most a fifth of a bucket is padding. A tower whose rows may depend on their batch is never padded.
    """
    power = 1 << (batch - 1).bit_length()
    bucket = power
    if not config.may_be_padded:
        if power != batch:
            return None
    elif power * config.operations > _CHEAP:
        step = max(1, power // 8)
        bucket = -(-batch // step) * step
    return bucket if bucket * config.operations <= config.launches * _OPERATIONS_A_LAUNCH else None


def memory_for(device: torch.device) -> float:
    """The bytes that the graphs of one set of weights may be counted with."""
    return _MEMORY_SHARE * total_memory(device) if device.type == "cuda" else math.inf


class Pause:
    """Counts calls without graphs after memory ran out, twice as many after each time. Graphs keep memory."""

    def __init__(self) -> None:
        self._left, self._next = 0, _FIRST_PAUSE

    def begin(self) -> None:
        self._left, self._next = self._next, min(2 * self._next, _LONGEST_PAUSE)

    def is_over(self) -> bool:
        """Asked once for each call that would be a graph."""
        if self._left == 0:
            return True
        self._left -= 1
        return False


_launches_only: ContextVar[bool] = ContextVar("launches_only", default=False)
_capture_lock = threading.Lock()  # of the process: one graph is captured at a time


@cache
def _capture_stream(device: int) -> torch.cuda.Stream:
    """The stream that captures all graphs of a device. PyTorch has 32 streams, so a new one may be another thread's."""
    return torch.cuda.Stream(device)


def synchronize() -> None:
    """Waits for the current device. CUDA forbids that during a capture, so this first waits for a capture to end."""
    with _capture_lock:
        torch.cuda.synchronize()


@contextmanager
def launches_only() -> Generator[None]:
    """Within this context no graph of ours is captured or replayed. Compiled graphs run in it."""
    token = _launches_only.set(True)
    try:
        yield
    finally:
        _launches_only.reset(token)


def allowed() -> bool:
    """Whether a graph may be captured or replayed now: not in a compiled graph, nor while someone else captures."""
    return not (_launches_only.get() or torch.cuda.is_current_stream_capturing())


@dataclass
class _Captured:
    images: Tensor  # `replay` reads them, as many as the bucket has
    results: Results  # `replay` writes them
    replay: Callable[[], None]


class Graphs:
    """The graphs of one set of weights.

    Args:
        run: a batch of images, (B, 3, h, w) -> results of B rows each. On a GPU it must not wait for the device.
        memory: bytes that all graphs together may be counted with, each with the size that it is asked for with. They
            take less, since they share a pool.

    Graphs may be called from several threads and on several streams. One caller uses the buffers at a time, and a
    stream waits for the one that used them before.
    """

    def __init__(self, run: Callable[[Tensor, Task], Results], memory: float = math.inf) -> None:
        self._run = run
        self._memory = memory
        self._counted = 0
        self._captured: dict[object, _Captured] = {}
        self._lock = threading.Lock()
        self._pool: Any = None  # of memory; all graphs share it, since they run one after another
        self._done: Any = None  # the event after the last results were copied out

    def __call__(self, bucket: int, images: Tensor, task: Task, size: Callable[[], int] = lambda: 0) -> Results | None:
        """`run(images, task)`, replayed for a batch of `bucket` images or fewer.

        None where a new graph, of `size()` bytes, would exceed the memory of all.

        Raises:
            torch.OutOfMemoryError: a new graph does not fit into memory. Nothing of it is kept.
            RuntimeError: a new graph cannot be captured.
        """
        channels_last = images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous()
        key = (bucket, images.dtype, channels_last, images.shape[1:], task)
        with self._lock, torch.cuda.device(images.device):
            stream = torch.cuda.current_stream()
            if self._done is not None:
                stream.wait_event(self._done)
            captured = self._captured.get(key)
            if captured is None:
                counted = self._counted + size()
                if counted > self._memory:
                    return None
                layout = torch.channels_last if channels_last else torch.contiguous_format
                with torch.inference_mode(False), torch.no_grad():  # later callers write to it outside of that mode
                    buffer = torch.zeros_like(images[:1].expand(bucket, -1, -1, -1), memory_format=layout)
                    captured = self._captured[key] = self._capture(buffer, task)
                self._counted = counted
            captured.images[: len(images)].copy_(images)
            captured.replay()
            results = tuple(result[: len(images)].clone() for result in captured.results)
            self._done = stream.record_event()
        return results

    def release(self) -> None:
        """Gives back the memory of all graphs, once they have run."""
        with self._lock:
            if self._done is not None:
                self._done.synchronize()
            self._captured.clear()
            self._counted = 0
            self._pool = None

    def _capture(self, buffer: Tensor, task: Task) -> _Captured:
        """A graph of `run(buffer, task)`."""
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        stream, current = _capture_stream(torch.cuda.current_device()), torch.cuda.current_stream()
        graph = torch.cuda.CUDAGraph()
        # Not `torch.cuda.graph`: it waits for the whole device and empties PyTorch's cache, even while another thread
        # captures. With "thread_local" other threads may go on allocating memory and launching kernels. Meanwhile
        # PyTorch refuses them only random numbers on the GPU, and CUDA refuses them only to wait for the whole device.
        with _capture_lock, torch.cuda.stream(stream):
            stream.wait_stream(current)
            self._run(buffer, task)  # compiles and loads the kernels, which may not happen in a capture
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                results = self._run(buffer, task)
            except BaseException:
                with suppress(RuntimeError):  # that the capture is broken: the first error says by what
                    graph.capture_end()
                raise
            graph.capture_end()
        current.wait_stream(stream)
        return _Captured(buffer, results, graph.replay)
