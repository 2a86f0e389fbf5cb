"""Items to raw pixels, in worker processes that may die or hang without taking the job along.

    with closing(decode_batches(decoder, batches, workers=8)) as decoded:
        for batch, pixels in decoded: ...

PyTorch's DataLoader has the processes, the shared memory and the pinning. What it lacks is added here: a worker that is
longer than `time_limit` at an image is killed by its own alarm clock, and when one is dead, all are replaced. The
image that it died of is tried once more, and a second time makes it a failure.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
import time
import warnings
from collections import Counter, deque
from collections.abc import Generator, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from typing import Any, NamedTuple

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from .preprocess import Preprocess
from .sources import Item, Unreadable, reason_of

BATCHES_AHEAD = 3  # per worker
STRIKES = 2  # deaths of a worker that an image is charged with
MAX_RESTARTS = 5  # in a row, without an image to blame and without a batch

DEATH_SECONDS = 2.0  # from a broken connection to the end of the process that broke it

_IDLE = -1


class SharedMemoryError(RuntimeError):
    """There is no room for a batch in /dev/shm; in a worker."""


class Decoded(NamedTuple):
    """A batch: pixels, uint8 (B, 3, image_size, image_size), and what there is to say of them, JSON in uint8.

    All of it is in tensors, whose memory workers share: pickled without that it is shorter than PIPE_BUF. Such a write
    to a pipe is whole or not at all, so that a worker killed in it leaves no half message to wait for.
    """

    pixels: Tensor
    notes: Tensor

    @classmethod
    def of(cls, pixels: Tensor, sizes: list[tuple[int, int]], errors: dict[int, str]) -> Decoded:
        notes = json.dumps([sizes, list(errors.items())])  # in ASCII: a reason may have bytes that are no text
        return cls(pixels, torch.frombuffer(bytearray(notes, "ascii"), dtype=torch.uint8))

    @property
    def sizes(self) -> Tensor:
        """Of the images as they were, int32 (B, 2), width and height."""
        return torch.tensor(self._noted()[0], dtype=torch.int32).view(-1, 2)

    @property
    def errors(self) -> dict[int, str]:
        """By position, why an image could not be decoded: it is black then, and of size 0."""
        return dict(self._noted()[1])

    def _noted(self) -> Any:
        return json.loads(bytes(self.notes.numpy()))


@dataclass(frozen=True)
class Batch:
    """Items to decode together; `shard` and `start` say where they go, of `length` rows in the shard."""

    items: list[Item]
    shard: int
    start: int
    length: int


class _Unremarked:
    """Keeps Pillow from warning of large images, whose double size is an error, while any thread is inside.

    `warnings.catch_warnings` in each of several threads would have the last to leave put back the filter of another.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._caught = ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._caught.enter_context(warnings.catch_warnings())
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._caught.close()


_UNREMARKED = _Unremarked()


@dataclass(frozen=True)
class Decoder:
    """Reads and resizes items as `preprocess` does.

    `fast` lets JPEGs decode at a reduced scale, the smallest of 1/2, 1/4 and 1/8 that has at least twice the pixels
    needed along each side; pixels then differ a little from those of `clip`.
    """

    preprocess: Preprocess
    fast: bool = False

    def __call__(self, item: Item) -> tuple[Tensor, tuple[int, int]]:
        """The item's pixels, uint8 (3, image_size, image_size), and its size. Raises whatever decoders raise."""
        with _UNREMARKED, Image.open(item.source()) as image:
            size = image.size
            self.check(size)
            if self.fast:
                image.draft(None, (2 * self.preprocess.image_size,) * 2)  # pyright: ignore[reportArgumentType]
            return self.preprocess.uint8(image), size

    def check(self, size: tuple[int, int]) -> None:
        """Raises ValueError for an image that would be enlarged beyond what Pillow would open."""
        limit = Image.MAX_IMAGE_PIXELS
        if limit is None or 0 in size or self.preprocess.squash:
            return
        long_side = self.preprocess.image_size * max(size) // min(size)
        if long_side * self.preprocess.image_size > 2 * limit:
            raise ValueError(
                f"too long and thin: {size[0]}x{size[1]} pixels, resized to {self.preprocess.image_size} by {long_side}"
            )

    def into(self, pixels: Tensor, item: Item) -> tuple[tuple[int, int], str | None]:
        """Writes the item's pixels, and returns its size and None; or the reason why it could not. Never raises."""
        try:
            decoded, size = self(item)
            pixels.copy_(decoded)
        except Exception as error:  # decoders fed with broken files raise whatever their parsing stumbles on
            return (0, 0), failure_reason(error)
        return size, None

    def black(self, count: int) -> Tensor:
        """Pixels for `into`, of a batch."""
        return torch.zeros(count, 3, self.preprocess.image_size, self.preprocess.image_size, dtype=torch.uint8)


def failure_reason(error: Exception) -> str:
    """Why an image could not be decoded, in the same words at every run."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image, or not in a format that Pillow reads"
    if isinstance(error, UnicodeEncodeError):
        return "bytes in the name that are not UTF-8"
    return reason_of(error)


def decode_batches(
    decoder: Decoder,
    batches: Iterator[Batch],
    *,
    workers: int,
    time_limit: float,
    pin_memory: bool = False,
) -> Generator[tuple[Batch, Decoded], None, None]:
    """Decodes batches, in order, ahead of need.

    Args:
        workers: processes; with 0, batches are decoded here when asked for, and nothing stops an image that hangs.
        time_limit: seconds for an image.
        pin_memory: page-locks the pixels, for copies to a GPU.

    Raises:
        RuntimeError: where workers keep dying for no image's sake, or shared memory is too small for batches.
        Exception: what `batches` raises.
    """
    waiting: deque[Batch] = deque()  # handed to workers, and not yet decoded
    strikes: Counter[tuple[int, int]] = Counter()
    restarts = 0
    while True:
        board = torch.full((workers, 2), _IDLE, dtype=torch.int64)
        board.share_memory_()
        sampler = _Sampler(batches, waiting)
        loader = iter(
            DataLoader(
                _Batches(decoder, board, time_limit),
                batch_sampler=sampler,  # pyright: ignore[reportArgumentType]
                num_workers=workers,
                worker_init_fn=_start_worker,
                collate_fn=_same,  # pyright: ignore[reportArgumentType]
                multiprocessing_context=_context() if workers else None,
                prefetch_factor=BATCHES_AHEAD if workers else None,
                pin_memory=pin_memory,
            )
        )
        try:
            while (decoded := next(loader, None)) is not None:
                restarts = 0
                yield waiting.popleft(), decoded
            return
        except SharedMemoryError as error:  # its text is the worker's trace
            raise RuntimeError(
                f"shared memory is full: {workers} workers keep {BATCHES_AHEAD} batches each in /dev/shm; let it be "
                "larger (docker run --shm-size), or have fewer workers or smaller batches"
            ) from error
        except (RuntimeError, OSError, EOFError):
            if sampler.broken:  # it is not of a worker, even if one is dead too; and batches would be missing
                raise
            deadline = time.monotonic() + DEATH_SECONDS
            while not (dead := _deaths(board)) and time.monotonic() < deadline:
                time.sleep(0.01)
            if not dead:
                raise
        finally:
            del loader  # ends its workers
        suspects = [divmod(work, _SPAN) for work in dead if work != _IDLE]
        strikes.update(suspects)
        restarts += not suspects
        if restarts > MAX_RESTARTS:
            raise RuntimeError(f"decoder processes died {restarts} times in a row, for no image's sake")
        _give_up(waiting, {suspect for suspect in suspects if strikes[suspect] >= STRIKES}, time_limit)


def _deaths(board: Tensor) -> list[int]:
    """What the workers that are dead were at."""
    return [int(work) for pid, work in board.numpy() if pid != _IDLE and not _alive(int(pid))]


def _give_up(waiting: deque[Batch], suspects: set[tuple[int, int]], time_limit: float) -> None:
    """Makes failures of the suspects, (shard, row), in the batches to be decoded again."""
    reason = f"a decoder died of it, or took longer than {time_limit:g} s, {STRIKES} times"
    for i, batch in enumerate(waiting):
        items = [
            Unreadable(item.key, item.location, reason) if (batch.shard, batch.start + j) in suspects else item
            for j, item in enumerate(batch.items)
        ]
        waiting[i] = replace(batch, items=items)


# --- The workers' side -----------------------------------------------------------------------------------------------

_SPAN = 1 << 32  # rows in a shard, at most: (shard, row) is written as one number


class _Sampler:
    """For the DataLoader: what is still waiting, then more batches, which wait from then on."""

    def __init__(self, batches: Iterator[Batch], waiting: deque[Batch]) -> None:
        self._batches = batches
        self._waiting = waiting
        self.broken = False  # whether an exception came instead of a batch

    def __iter__(self) -> Iterator[Batch]:
        yield from list(self._waiting)
        while True:
            try:
                batch = next(self._batches, None)
            except Exception:
                self.broken = True
                raise
            if batch is None:
                return
            self._waiting.append(batch)
            yield batch


class _Batches(Dataset[Decoded]):
    """For the DataLoader: decodes a batch, and notes on the board, (workers, 2), who is at which image."""

    def __init__(self, decoder: Decoder, board: Tensor, time_limit: float) -> None:
        self._decoder = decoder
        self._board = board
        self._time_limit = time_limit

    def __getitems__(self, batch: Batch) -> Decoded:
        pixels = self._decoder.black(len(batch.items))
        worker = get_worker_info()
        if worker is not None:
            self._board[worker.id, 0] = os.getpid()
            _share(pixels)
        sizes: list[tuple[int, int]] = []
        errors: dict[int, str] = {}
        for i, item in enumerate(batch.items):
            if worker is not None:
                self._board[worker.id, 1] = batch.shard * _SPAN + batch.start + i
            size, error = self._decode(pixels[i], item, limited=worker is not None)
            sizes.append(size)
            if error is not None:
                errors[i] = error
        decoded = Decoded.of(pixels, sizes, errors)
        if worker is not None:
            self._board[worker.id, 1] = _IDLE
            _share(decoded.notes)
        return decoded

    def _decode(self, pixels: Tensor, item: Item, limited: bool) -> tuple[tuple[int, int], str | None]:
        """`Decoder.into`, within the time limit but for `Item.prepare`, whose time is not the image's."""
        try:
            item.prepare()
        except Exception as error:  # as in `Decoder.into`
            return (0, 0), failure_reason(error)
        if limited:
            signal.setitimer(signal.ITIMER_REAL, self._time_limit)  # what it does by default is to kill
        try:
            return self._decoder.into(pixels, item)
        finally:
            if limited:
                signal.setitimer(signal.ITIMER_REAL, 0)


def _share(tensor: Tensor) -> None:
    """Moves it to shared memory here, where too little of it is an exception that reaches the main process."""
    try:
        tensor.share_memory_()
    except RuntimeError as error:
        raise SharedMemoryError from error


def _start_worker(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process
    end_with_parent()


def end_with_parent() -> None:
    """Ends this process as soon as the one that asked for it is gone, killed or not.

    The DataLoader's own watch is for the process that forked the worker, and that is the fork server.
    """

    def wait() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _same(decoded: Decoded) -> Decoded:
    return decoded


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _context() -> ForkServerContext:
    """A fork server that has the imports done: workers start at once, and inherit neither a GPU nor the lock."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def start_fork_server() -> None:
    """Starts the process that workers come from, which then imports PyTorch, while its caller does something else.

    `decode_batches` starts it where nobody has, and waits for it.
    """
    _context()
    forkserver.ensure_running()
