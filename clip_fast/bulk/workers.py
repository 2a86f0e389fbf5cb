"""Items to raw pixels, in worker processes that may die or hang without taking the job along.

    with Workers(decoder, 8) as workers:
        for batch, decoded in workers.decode(batches): ...

Everything that embeds many images decodes here: shards, one `.npy`, and Ray's stage. PyTorch's DataLoader has the
processes, the shared memory and the pinning. This module adds what it lacks. A worker that spends more than
`time_limit` on an image is killed by its own alarm clock. When one worker is dead, all are replaced. The image that it
died of is tried once more; the second death makes it a failure. Decoding has a memory limit, and an image that needs
more is a failure.
"""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import resource
import signal
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from ..inputs import images
from ..inputs.items import Item, Unreadable
from . import fork_server
from .decoder import Decoder, Squares, failure_reason
from .packing import Packed, Packing, Rooms, header_of, joined_plans, squares

BATCHES_AHEAD = 3  # per worker
ROOMS = BATCHES_AHEAD + 1  # of packed batches, per worker: the one that is encoded, too
STRIKES = 2  # worker deaths that make an image a failure
MAX_RESTARTS = 5  # in a row without a batch, for deaths without an image to blame

FEW_WORKERS = 8  # by default at most, where a job may be small, or several encoders share a machine
TIME_LIMIT = 60.0  # seconds for an image
MEMORY_LIMIT = 2 * images.MEMORY_LIMIT  # bytes that decoding may take: an image is read, and decoded

DEATH_SECONDS = 2.0  # from a broken connection to the end of the process that broke it

_IDLE = -1


class SharedMemoryError(RuntimeError):
    """A worker found no room for a batch in /dev/shm."""


class Decoded(NamedTuple):
    """A decoded batch: pixels, uint8 (B, 3, height, width), and notes on them, JSON in uint8.

    Where images travel as they are, the pixels are those of `Packed`, with its plan.

    All are tensors in shared memory, so that the message about them is shorter than PIPE_BUF. A write that short is
    whole or not at all: a worker that is killed in it leaves no half message to wait for.
    """

    pixels: Tensor
    notes: Tensor
    plan: Tensor | None = None

    @classmethod
    def of(
        cls, pixels: Tensor, sizes: list[tuple[int, int]], errors: dict[int, str], plan: Tensor | None = None
    ) -> Decoded:
        notes = json.dumps([sizes, list(errors.items())])  # in ASCII, since a reason may have bytes that are no text
        return cls(pixels, torch.frombuffer(bytearray(notes, "ascii"), dtype=torch.uint8), plan)

    @classmethod
    def joined(cls, parts: Iterable[Decoded], count: int, device: torch.device | None = None) -> Decoded:
        """The parts of a batch of `count` images, one or more, as one.

        Of several, each part's shared memory is given back when it has been copied. Packed pixels are copied to
        `device`.
        """
        pixels = torch.empty(0)
        packed: list[Tensor] = []
        plans: list[Tensor] = []
        sizes: list[tuple[int, int]] = []
        errors: dict[int, str] = {}
        for part in parts:
            own = part.sizes.numpy()
            if part.plan is not None:
                packed.append(part.pixels.to(device, copy=True))
                plans.append(part.plan.clone())
            elif len(own) == count:
                pixels = part.pixels
            else:
                if not sizes:
                    pixels = part.pixels.new_empty((count, *part.pixels.shape[1:]))
                pixels[len(sizes) : len(sizes) + len(own)] = part.pixels
            errors |= {len(sizes) + i: reason for i, reason in part.errors.items()}
            sizes += [(int(width), int(height)) for width, height in own]
        if not packed:
            return cls.of(pixels, sizes, errors)
        return cls.of(torch.cat(packed), sizes, errors, joined_plans(plans, [len(each) for each in packed]))

    def images(self) -> Tensor:
        """The images, uint8 (B, 3, height, width). Packed ones are resized on the device that their pixels are on."""
        if self.plan is None:
            return self.pixels
        return squares(self.pixels, self.plan.to(self.pixels.device), header_of(self.plan))

    @property
    def sizes(self) -> Tensor:
        """Width and height of the original images, int32 (B, 2)."""
        return torch.tensor(self._noted()[0], dtype=torch.int32).view(-1, 2)

    @property
    def errors(self) -> dict[int, str]:
        """The reasons of the images that could not be decoded, by position. Such an image is black and of size 0."""
        return dict(self._noted()[1])

    def _noted(self) -> Any:
        return json.loads(bytes(self.notes.numpy()))


@dataclass(frozen=True)
class WorkItem:
    """A batch of items to decode together: rows `start` and on of a shard that has `length` rows."""

    items: list[Item]
    shard: int
    start: int
    length: int

    def parts(self, size: int) -> list[WorkItem]:
        """The batch in parts of `size` items, in order, one or more."""
        starts = range(0, max(1, len(self.items)), size)
        return [replace(self, items=self.items[i : i + size], start=self.start + i) for i in starts]


class Workers:
    """Decoding processes. They start with the first batches, and stay until the end of the block or of this object.

    Args:
        count: processes. With 0, batches are decoded here when asked for: the memory limit holds then too, as far as a
            decoder survives it, and nothing stops an image that hangs.
        time_limit: seconds for an image.
        pin_memory: page-locks the pixels, for copies to a GPU.
        packing: how images travel as they are; by default they are resized here.
    """

    def __init__(
        self,
        decoder: Decoder,
        count: int,
        *,
        time_limit: float = TIME_LIMIT,
        pin_memory: bool = False,
        packing: Packing | None = None,
    ) -> None:
        self._decoder = decoder
        self._count = count
        self._time_limit = time_limit
        self._pin_memory = pin_memory
        self._packing = packing
        self._sampler = _Sampler()
        self._board = torch.empty(0, 2)
        self._loader: DataLoader[Decoded] | None = None

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def decode(self, batches: Iterator[WorkItem]) -> Generator[tuple[WorkItem, Decoded], None, None]:
        """Decodes batches, in order, ahead of need. One call at a time.

        Raises:
            RuntimeError: workers keep dying without an image to blame, shared memory is too small for batches, or files
                are too few.
            Exception: whatever `batches` raises.
        """
        waiting: deque[WorkItem] = deque()  # handed to workers and not yet decoded
        strikes: Counter[tuple[int, int]] = Counter()
        restarts = 0
        complete = False
        while True:
            self._sampler.begin(batches, waiting)
            try:
                results = self._results()
                while (decoded := next(results, None)) is not None:
                    restarts = 0
                    yield waiting.popleft(), decoded
                complete = True
                return
            except (RuntimeError, OSError, EOFError) as error:
                if self._sampler.broken:  # the error came from `batches`, not from a worker: do not retry
                    raise
                said = str(error)  # of a worker's error its trace; the error itself holds on to the processes
                if os.strerror(errno.EMFILE) in said and os.strerror(errno.ENFILE) not in said:
                    raise RuntimeError(
                        f"too many open files: {self._count} workers have {BATCHES_AHEAD} batches each in files of "
                        "their own; raise the limit (ulimit -n), or have fewer workers (--workers)"
                    ) from error
                if isinstance(error, SharedMemoryError):
                    raise RuntimeError(
                        f"shared memory is full: {self._count} workers keep {BATCHES_AHEAD} batches each in /dev/shm; "
                        "let it be larger (docker run --shm-size), or have fewer workers or smaller batches"
                    ) from error
                deadline = time.monotonic() + DEATH_SECONDS
                while not (dead := _deaths(self._board)) and time.monotonic() < deadline:
                    time.sleep(0.01)
                if not dead and self._loader is not None and _IDLE in self._board[:, 0]:
                    dead = [_IDLE]  # one died before it had told its process
                if not dead:
                    raise
            finally:
                results = None  # it holds on to the processes
                if not complete:
                    self._end()
            suspects = [divmod(work, _SPAN) for work in dead if work != _IDLE]
            strikes.update(suspects)
            restarts += not suspects
            if restarts > MAX_RESTARTS:
                raise RuntimeError(
                    f"decoder processes died {restarts} times in a row, without an image to blame: {said}"
                )
            _give_up(waiting, {suspect for suspect in suspects if strikes[suspect] >= STRIKES}, self._time_limit)

    def _results(self) -> Iterator[Decoded]:
        """What the workers make of the sampler's batches. They are started where there are none."""
        if self._loader is None:
            self._board = torch.full((self._count, 2), _IDLE, dtype=torch.int64)
            self._board.share_memory_()
            decoding = _Decoding(self._decoder, self._board, self._time_limit, self._packing)
            loader = _Loader(
                decoding,
                batch_sampler=self._sampler,  # pyright: ignore[reportArgumentType]
                num_workers=self._count,
                worker_init_fn=decoding.start,
                collate_fn=_same,  # pyright: ignore[reportArgumentType]
                multiprocessing_context=fork_server.context() if self._count else None,
                prefetch_factor=BATCHES_AHEAD if self._count else None,
                persistent_workers=self._count > 0,
                pin_memory=self._pin_memory,
            )
            with _script_hidden():
                results = iter(loader)
            self._loader = loader  # from now on the workers are there
            return results
        return iter(self._loader)

    def _end(self) -> None:
        self._loader = None  # ends its processes


def _deaths(board: Tensor) -> list[int]:
    """The work that each dead worker had noted."""
    return [int(work) for pid, work in board.numpy() if pid != _IDLE and not _alive(int(pid))]


def _give_up(waiting: deque[WorkItem], suspects: set[tuple[int, int]], time_limit: float) -> None:
    """Replaces the suspects, (shard, row), by failures in the batches that will be decoded again."""
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
    """For the DataLoader: the batches that still wait, then new ones, which wait from then on."""

    def begin(self, batches: Iterator[WorkItem], waiting: deque[WorkItem]) -> None:
        self._batches = batches
        self._waiting = waiting
        self.broken = False  # whether `batches` raised an exception

    def __iter__(self) -> Iterator[WorkItem]:
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


class _Loader(DataLoader[Decoded]):
    """Without the warning about more workers than cores: their number is the caller's choice."""

    def check_worker_number_rationality(self) -> None:
        pass


class _Decoding(Dataset[Decoded]):
    """For the DataLoader: decodes a batch. The board, (workers, 2), has each worker's process and image."""

    def __init__(self, decoder: Decoder, board: Tensor, time_limit: float, packing: Packing | None = None) -> None:
        self._decoder = decoder
        self._board = board
        self._time_limit = time_limit
        self._packing = packing
        self._rooms = Rooms(ROOMS)

    def start(self, worker: int) -> None:
        """Begins a worker's process."""
        self._board[worker, 0] = os.getpid()
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process
        end_with_parent()
        os.environ["ARROW_DEFAULT_MEMORY_POOL"] = "system"  # others reserve a gigabyte when they begin
        limit_memory()

    def __getitems__(self, batch: WorkItem) -> Decoded:
        worker = get_worker_info()
        with memory_limited() if worker is None else nullcontext():  # a worker has its limit from its start
            return self._decoded(batch, None if worker is None else worker.id)

    def _decoded(self, batch: WorkItem, worker: int | None) -> Decoded:
        shared = worker is not None
        with _room_asked_for():
            into = self._begun(len(batch.items), shared)
        sizes: list[tuple[int, int]] = []
        errors: dict[int, str] = {}
        for i, item in enumerate(batch.items):
            if worker is not None:
                self._board[worker, 1] = batch.shard * _SPAN + batch.start + i
            size, error = self._decode(into, i, item, limited=shared)
            sizes.append(size)
            if error is not None:
                errors[i] = error
        if worker is not None:
            self._board[worker, 1] = _IDLE
        with _room_asked_for():
            plan = into.plan(shared=shared) if isinstance(into, Packed) else None
            decoded = Decoded.of(into.pixels, sizes, errors, plan)
            if shared:
                decoded.notes.share_memory_()
        return decoded

    def _begun(self, count: int, shared: bool) -> Squares | Packed:
        """A new batch, to write images into."""
        if self._packing is None:
            return Squares(self._decoder, count, shared=shared)
        return Packed(self._decoder, self._packing, count, self._rooms if shared else None)

    def _decode(
        self, into: Squares | Packed, number: int, item: Item, limited: bool
    ) -> tuple[tuple[int, int], str | None]:
        """Writes an item within the time limit. `Item.prepare` is not counted against it."""
        try:
            item.prepare()
        except Exception as error:  # as in `Decoder.into`
            return (0, 0), failure_reason(error)
        if limited:
            signal.setitimer(signal.ITIMER_REAL, self._time_limit)  # the default action of its signal is to kill
        try:
            return into.into(number, item)
        finally:
            if limited:
                signal.setitimer(signal.ITIMER_REAL, 0)


@contextmanager
def _room_asked_for() -> Generator[None, None, None]:
    """A lack of shared memory in the block is an exception that reaches the main process."""
    try:
        yield
    except RuntimeError as error:
        raise SharedMemoryError from error


def limit_memory() -> None:
    """Lets this process take `MEMORY_LIMIT` more than it has. An allocation beyond fails, as an exception mostly.

    Memory that is shared, as that of batches is, does not count.
    """
    pages = Path("/proc/self/statm")
    if not pages.exists():
        return  # not Linux
    taken = int(pages.read_text().split()[5]) * resource.getpagesize()
    limits = [taken + MEMORY_LIMIT, *resource.getrlimit(resource.RLIMIT_DATA)]
    limit = min(each for each in limits if each != resource.RLIM_INFINITY)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limits[-1]))


@contextmanager
def memory_limited() -> Generator[None, None, None]:
    """`limit_memory` for a block that decodes in a process which goes on afterwards."""
    before = resource.getrlimit(resource.RLIMIT_DATA)
    limit_memory()
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def end_with_parent() -> None:
    """Ends this process as soon as the process that asked for it is gone, killed or not.

    The DataLoader's own watch looks at the process that forked the worker, which is the fork server.
    """

    def wait() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


@contextmanager
def _script_hidden() -> Generator[None, None, None]:
    """Processes that are started in the block do not run the program's script again, of which they need nothing.

    A script that is not guarded by `if __name__ == "__main__"` would start processes in turn, which Python refuses.
    """
    script = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = script


def _same(decoded: Decoded) -> Decoded:
    return decoded


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
