"""From inputs of any number to shards: decoding, encoding and writing at the same time.

    worker processes          this thread                            a writer thread
    read, decode, resize  ->  copy (side stream), encode, copy back  ->  gather a shard, write, rename

Raw uint8 pixels go between the stages in shared, page-locked memory. On a GPU images are resized after the copy, see
`packing.py`. Embeddings go with a CUDA event that tells when they have arrived. The thread that feeds the GPU waits for
pixels only, and for the writer when that is `WRITES_AHEAD` batches behind. Batches are cut at the same places in every
run, so that a resumed run computes the same bits.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..encoder import ImageEncoder
from ..inputs.inputs import Inputs
from ..inputs.items import Item
from .decoder import Decoder
from .packing import header_of, packing_for, squares
from .rows import encode_rows, settle
from .tables import Record, Shard, Totals
from .workers import ROOMS, TIME_LIMIT, Decoded, Workers, WorkItem

WRITES_AHEAD = 8  # batches

EmbeddingDtype = Literal["float16", "float32"]


class Sink(Protocol):
    """A destination of shards."""

    def finished(self, index: int, items: Sequence[Item], /) -> Totals | None: ...

    def write(self, shard: Shard, /) -> None: ...


@dataclass(frozen=True)
class Options:
    """How to run: sizes are in images, `time_limit` in seconds for an image; `normalize` makes rows of length 1."""

    batch_size: int = 256
    shard_size: int = 10_000
    workers: int = 8
    time_limit: float = TIME_LIMIT
    dtype: EmbeddingDtype = "float32"
    normalize: bool = False


@dataclass(frozen=True)
class Step:
    """Progress since the last report: counts, and the encoding thread's seconds, apart those of waiting for pixels."""

    done: Totals
    decoding: float = 0.0
    encoding: float = 0.0
    resumed: bool = False  # an earlier run did it


def run(
    model: ImageEncoder,
    decoder: Decoder,
    inputs: Inputs,
    sink: Sink,
    options: Options,
    report: Callable[[Step], None],
) -> None:
    """Embeds `inputs` into `sink`: the shards that are not finished.

    `report` is called after every batch, and an exception of it ends the run. An OSError of `inputs`, which cannot be
    listed at the moment, ends it too, since the borders of shards depend on all items before them. Shards that were
    written stay.
    """
    options = without_idle_workers(options, inputs)
    items = iter(inputs)
    shards = enumerate(iter(lambda: list(islice(items, options.shard_size)), []))
    run_shards(model, decoder, shards, sink, options, report)


def without_idle_workers(options: Options, inputs: Inputs) -> Options:
    """With at most as many workers as there are batches, where that is known without listing a container."""
    images = 0
    for part in inputs.parts:
        count = part.count()
        if count is None or images + count >= options.workers * options.batch_size:
            return options
        images += count
    full, rest = divmod(images, options.shard_size)
    batches = full * -(-options.shard_size // options.batch_size) + -(-rest // options.batch_size)
    return replace(options, workers=min(options.workers, batches))


def run_shards(
    model: ImageEncoder,
    decoder: Decoder,
    shards: Iterator[tuple[int, list[Item]]],
    sink: Sink,
    options: Options,
    report: Callable[[Step], None],
) -> None:
    """As `run`, for shards that are given by their numbers and items."""
    on_gpu = model.device.type == "cuda"
    writes: deque[Future[Totals]] = deque()
    gatherer = _Gatherer(sink)
    work = _batches(shards, sink, options, report)
    encode = _encoder(model, options)
    writer = ThreadPoolExecutor(1, thread_name_prefix="write")
    packing = packing_for(decoder.preprocess, model.device, options.workers * ROOMS, options.batch_size)
    workers = Workers(decoder, options.workers, time_limit=options.time_limit, pin_memory=on_gpu, packing=packing)
    # The DataLoader's pinning thread opens the current device. Without this it would open the first one.
    current = torch.cuda.device(model.device) if on_gpu else nullcontext()
    try:
        with current, closing(work), workers, closing(workers.decode(work)) as decoding:
            before = time.perf_counter()
            for batch, decoded in decoding:
                arrived = time.perf_counter()
                rows = encode(decoded)
                writes.append(writer.submit(gatherer.add, batch, decoded.sizes, decoded.errors, rows))
                done = Totals()
                while writes and (len(writes) > WRITES_AHEAD or writes[0].done()):
                    done += writes.popleft().result()
                now = time.perf_counter()
                report(Step(done, arrived - before, now - arrived))
                before = now
        while writes:
            report(Step(writes.popleft().result()))
    finally:
        writer.shutdown(cancel_futures=True)


def _batches(
    shards: Iterator[tuple[int, list[Item]]], sink: Sink, options: Options, report: Callable[[Step], None]
) -> Generator[WorkItem, None, None]:
    """The batches of the unfinished shards. The next shard's items are listed at the same time."""
    with ThreadPoolExecutor(1, thread_name_prefix="list") as lister:
        upcoming = lister.submit(next, shards, None)
        while (shard := upcoming.result()) is not None:
            upcoming = lister.submit(next, shards, None)
            index, items = shard
            finished = sink.finished(index, items)
            if finished:
                report(Step(finished, resumed=True))
                continue
            for start in range(0, len(items), options.batch_size):
                yield WorkItem(items[start : start + options.batch_size], index, start, len(items))


class _Gatherer:
    """Puts batches together to shards, in the writer's thread."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._records: list[Record] = []
        self._rows: NDArray[Any] = np.empty((0, 0))

    def add(self, batch: WorkItem, sizes: Tensor, errors: dict[int, str], rows: Callable[[], Tensor]) -> Totals:
        embeddings = rows().numpy()
        failed = settle(embeddings, errors)
        if batch.start == 0:
            self._rows = np.zeros((batch.length, embeddings.shape[1]), embeddings.dtype)
            self._records = []
        self._rows[batch.start : batch.start + len(embeddings)] = embeddings
        self._records += [
            Record(item.key, item.location, int(width), int(height), failed.get(i))
            for i, (item, (width, height)) in enumerate(zip(batch.items, sizes.numpy(), strict=True))
        ]
        complete = len(self._records) == batch.length
        if complete:
            self._sink.write(Shard(batch.shard, self._rows, self._records))
        return Totals(len(batch.items), len(failed), int(complete))


def _encoder(model: ImageEncoder, options: Options) -> Callable[[Decoded], Callable[[], Tensor]]:
    """A function that starts to encode a decoded batch, and returns another that waits for the rows."""
    dtype = torch.float16 if options.dtype == "float16" else torch.float32

    def embed(pixels: Tensor, plan: Tensor | None, header: tuple[int, int, int] | None) -> Tensor:
        images = pixels if plan is None or header is None else squares(pixels, plan, header)
        return encode_rows(model, images, options.normalize).to(dtype)

    if model.device.type != "cuda":

        def encode_here(decoded: Decoded) -> Callable[[], Tensor]:
            rows = embed(decoded.pixels, decoded.plan, _header(decoded)).to("cpu")
            return lambda: rows

        return encode_here

    device = model.device
    copying, returning = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def encode_there(decoded: Decoded) -> Callable[[], Tensor]:
        computing = torch.cuda.current_stream(device)
        with torch.cuda.stream(copying):
            pixels = decoded.pixels.to(device, non_blocking=True)
            plan = None if decoded.plan is None else decoded.plan.to(device, non_blocking=True)
        computing.wait_stream(copying)
        for moved in (pixels, plan):
            if moved is not None:
                moved.record_stream(computing)
        rows = embed(pixels, plan, _header(decoded))
        returning.wait_stream(computing)
        with torch.cuda.stream(returning):
            host = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
            host.copy_(rows, non_blocking=True)
            rows.record_stream(returning)
            arrived = torch.cuda.Event()
            arrived.record(returning)

        def wait() -> Tensor:
            arrived.synchronize()
            return host

        return wait

    return encode_there


def _header(decoded: Decoded) -> tuple[int, int, int] | None:
    return None if decoded.plan is None else header_of(decoded.plan)
