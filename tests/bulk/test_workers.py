"""Items to pixels: every kind of bad image is a reason, none an exception."""

from __future__ import annotations

import errno
import os
import resource
import select
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from bad_files import BAD_FILES, WEBP_OF_34_BYTES
from hostile import Greedy, Killing, KillingAtStart, Peak, ThisProcess
from numpy.testing import assert_array_equal
from PIL import Image

from clip_fast.bulk import workers as decode
from clip_fast.bulk.decoder import Decoder
from clip_fast.bulk.workers import Decoded, Workers, WorkItem, _Decoding
from clip_fast.inputs.items import ImageFile, Item, Unreadable
from clip_fast.preprocess import Preprocess

DECODER = Decoder(Preprocess(32))
PHOTOGRAPHS = sorted((Path(__file__).parents[1] / "data").glob("*.jpg"))


def decode_batches(
    decoder: Decoder, batches: Iterator[WorkItem], *, workers: int, time_limit: float
) -> Iterator[tuple[WorkItem, Decoded]]:
    with Workers(decoder, workers, time_limit=time_limit) as processes:
        yield from processes.decode(batches)


def item(path: Path) -> Item:
    return ImageFile(path.name, str(path))


def decoded(path: Path, decoder: Decoder = DECODER) -> tuple[np.ndarray, tuple[int, int], str | None]:
    pixels = decoder.black(1)
    size, error = decoder.into(pixels[0], item(path))
    return pixels[0].numpy(), size, error


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_bad_file_is_a_reason_and_black(tmp_path: Path, kind: str) -> None:
    make, expected = BAD_FILES[kind]
    make(tmp_path / "x.jpg")
    pixels, _, reason = decoded(tmp_path / "x.jpg")
    assert reason is not None
    assert expected in reason
    assert not pixels.any()
    assert decoded(tmp_path / "x.jpg")[2] == reason  # the same words again


def test_a_name_that_is_no_text_is_good(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"caf\xe9.png")
    Image.new("RGB", (5, 4)).save(path)
    assert decoded(path)[1:] == ((5, 4), None)


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (5000, 3000)])
def test_small_and_large_images_are_good(tmp_path: Path, size: tuple[int, int]) -> None:
    Image.new("RGB", size, (9, 8, 7)).save(tmp_path / "x.png")
    pixels, found, reason = decoded(tmp_path / "x.png")
    assert (found, reason) == (size, None)
    assert_array_equal(pixels[:, 0, 0], [9, 8, 7])


@pytest.mark.parametrize("path", PHOTOGRAPHS, ids=lambda path: path.name)
def test_pixels_are_those_of_preprocess_and_fast_ones_near(path: Path) -> None:
    with Image.open(path) as image:
        exact, size = DECODER.preprocess.uint8(image).numpy(), image.size
    pixels, found, _ = decoded(path)
    assert found == size
    assert_array_equal(pixels, exact)
    fast, found, _ = decoded(path, Decoder(DECODER.preprocess, fast=True))
    assert found == size
    difference = np.abs(fast.astype(int) - exact)
    assert difference.any()  # a reduced scale was used
    assert difference.mean() < 3


def test_batches_come_in_order_with_their_failures(tmp_path: Path) -> None:
    for i in range(6):
        Image.new("RGB", (5, 4), (i, 1, 2)).save(tmp_path / f"{i}.png")
    (tmp_path / "3.png").write_bytes(b"")
    items = [item(tmp_path / f"{i}.png") for i in range(6)]
    batches = [WorkItem(items[i : i + 2], 0, i, 6) for i in (0, 2, 4)]
    results = list(decode_batches(DECODER, iter(batches), workers=0, time_limit=1))
    assert [batch for batch, _ in results] == batches
    pixels = np.concatenate([decoded.pixels.numpy() for _, decoded in results])
    assert pixels.shape == (6, 3, 32, 32)
    assert pixels.dtype == np.uint8
    assert_array_equal(pixels[:, 0, 5, 5], [0, 1, 2, 0, 4, 5])
    assert [list(decoded.errors) for _, decoded in results] == [[], [1], []]
    assert results[1][1].sizes.tolist() == [[5, 4], [0, 0]]


def test_what_goes_through_the_pipe_fits_it_whatever_the_reasons() -> None:
    errors = {i: f"{i} \udce9 {'x' * 1000}" for i in range(1024)}
    decoded = Decoded.of(DECODER.black(1).share_memory_(), [(5, 4)] * 1024, errors)
    decoded.notes.share_memory_()
    assert len(ForkingPickler.dumps(decoded)) < select.PIPE_BUF // 2
    assert decoded.errors == errors
    assert decoded.sizes.dtype == torch.int32
    assert decoded.sizes.tolist() == [[5, 4]] * 1024


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_worker_that_dies_while_a_long_result_waits_to_be_read_is_replaced(tmp_path: Path) -> None:
    Image.new("RGB", (5, 4)).save(tmp_path / "x.png")
    good, reason = item(tmp_path / "x.png"), "x" * (1 << 20)  # more than any pipe holds
    items = [good, Unreadable("u", "u", reason), Killing("k", "k"), good]
    results = decode_batches(
        DECODER, (WorkItem([each], 0, i, 4) for i, each in enumerate(items)), workers=1, time_limit=9
    )
    errors = [next(results)[1].errors]
    time.sleep(2)  # the worker goes on, and dies
    errors += [decoded.errors for _, decoded in results]
    assert [bool(each) for each in errors] == [False, True, True, False]
    assert errors[1] == {0: reason}
    assert "a decoder died of it" in errors[2][0]


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_worker_that_dies_before_it_begins_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "DEATH_SECONDS", 0.1)
    Image.new("RGB", (5, 4)).save(tmp_path / "x.png")
    decoder = KillingAtStart(DECODER.preprocess, marker=str(tmp_path / "marker"))
    batches = [WorkItem([item(tmp_path / "x.png")], 0, i, 3) for i in range(3)]
    results = list(decode_batches(decoder, iter(batches), workers=1, time_limit=9))
    assert (tmp_path / "marker").exists()
    assert [decoded.errors for _, decoded in results] == [{}] * 3


def test_more_workers_than_cores_are_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decode._Loader(_Decoding(DECODER, torch.zeros(999, 2), 7.0), num_workers=999)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_takes_too_much_memory_is_a_failure_and_the_others_go_on(tmp_path: Path, workers: int) -> None:
    Image.new("RGB", (5, 4)).save(tmp_path / "x.png")
    (tmp_path / "w.webp").write_bytes(WEBP_OF_34_BYTES)
    good = item(tmp_path / "x.png")
    items = [good, Greedy("g", "g"), good, item(tmp_path / "w.webp"), Greedy("g", "g"), good, Peak("p", "p")]
    before = resource.getrlimit(resource.RLIMIT_DATA)
    ((_, decoded),) = decode_batches(DECODER, iter([WorkItem(items, 0, 0, 7)]), workers=workers, time_limit=60)
    assert list(decoded.errors) == [1, 3, 4, 6]
    assert decoded.errors[1] == decoded.errors[4] == "MemoryError"
    assert "take about" in decoded.errors[3]
    if workers:
        assert int(decoded.errors[6]) < 1 << 30
    assert resource.getrlimit(resource.RLIMIT_DATA) == before  # this process is limited while it decodes


def test_workers_stay_for_the_next_batches_and_are_replaced_between_them(tmp_path: Path) -> None:
    Image.new("RGB", (5, 4)).save(tmp_path / "x.png")
    good, there = WorkItem([item(tmp_path / "x.png")], 0, 0, 1), WorkItem([ThisProcess("p", "p")], 0, 0, 1)
    with Workers(DECODER, 1, time_limit=9) as workers:

        def process() -> str:
            ((_, decoded),) = workers.decode(iter([there]))
            return decoded.errors[0]

        first = process()
        assert process() == first != str(os.getpid())
        begun = workers.decode(iter([good] * 9))
        next(begun)
        begun.close()
        second = process()
        assert second != first
        os.kill(int(second), signal.SIGKILL)
        assert [decoded.errors for _, decoded in workers.decode(iter([good] * 3))] == [{}] * 3
        last = int(process())
    while decode._alive(last):  # within the test's time
        time.sleep(0.01)


def test_the_parts_of_a_batch_are_one_again(tmp_path: Path) -> None:
    for i in range(7):
        Image.new("RGB", (5 + i, 4), (i, 1, 2)).save(tmp_path / f"{i}.png")
    (tmp_path / "5.png").write_bytes(b"")
    batch = WorkItem([item(tmp_path / f"{i}.png") for i in range(7)], 3, 20, 100)
    parts = batch.parts(3)
    assert [(part.shard, part.start, part.length, len(part.items)) for part in parts] == [
        (3, 20, 100, 3), (3, 23, 100, 3), (3, 26, 100, 1)
    ]  # fmt: skip
    ((_, whole),) = decode_batches(DECODER, iter([batch]), workers=0, time_limit=1)
    apart = [pixels for _, pixels in decode_batches(DECODER, iter(parts), workers=0, time_limit=1)]
    for joined in (Decoded.joined(iter(apart), 7), Decoded.joined(iter([whole]), 7)):
        assert torch.equal(joined.pixels, whole.pixels)
        assert torch.equal(joined.sizes, whole.sizes)
        assert joined.errors == whole.errors == {5: "not an image: zero bytes"}
    assert Decoded.joined(iter([whole]), 7).pixels.data_ptr() == whole.pixels.data_ptr()  # not copied
    assert [part.items for part in WorkItem([], 0, 0, 0).parts(4)] == [[]]


def test_the_largest_photograph_fits_into_a_worker(tmp_path: Path) -> None:
    """With as much again for the file and for the resizing."""
    assert Image.MAX_IMAGE_PIXELS is not None
    assert 2 * Image.MAX_IMAGE_PIXELS * 4 * 2 < decode.MEMORY_LIMIT


@dataclass(frozen=True, slots=True)
class Slow(ImageFile):
    """Notes what is asked of it."""

    asked: list[object]

    def prepare(self) -> None:
        self.asked.append("prepare")
        if self.key == "bad":
            raise ValueError("broken before it")

    def source(self) -> Path:
        self.asked.append("source")
        return Path(self.location)


def test_the_time_limit_is_for_what_comes_after_preparing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (5, 4)).save(tmp_path / "x.png")
    asked: list[object] = []
    items: list[Item] = [Slow(key, str(tmp_path / "x.png"), asked) for key in ("good", "bad", "good")]
    monkeypatch.setattr(decode, "get_worker_info", lambda: SimpleNamespace(id=0))
    monkeypatch.setattr(signal, "setitimer", lambda _, seconds: asked.append(seconds))
    batches = _Decoding(DECODER, torch.zeros(1, 2, dtype=torch.int64), 7.0)
    decoded = batches.__getitems__(WorkItem(items, 0, 0, 3))
    one = ["prepare", 7.0, "source", 0]
    assert asked == [*one, "prepare", *one]
    assert decoded.errors == {1: "broken before it"}
    assert decoded.sizes.tolist() == [[5, 4], [0, 0], [5, 4]]


def test_what_batches_raise_is_no_death_of_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    def batches() -> Iterator[WorkItem]:
        yield WorkItem([Unreadable("u", "u", "gone")], 0, 0, 2)
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(decode, "_deaths", lambda board: [decode._IDLE])  # there is one as well
    results = decode_batches(DECODER, batches(), workers=0, time_limit=1)
    next(results)
    with pytest.raises(OSError, match="Input/output error"):
        next(results)


def test_workers_that_always_die_are_an_error_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[int] = []

    def failing(workers: Workers) -> None:
        tries.append(1)
        workers._board, workers._loader = torch.full((1, 2), decode._IDLE), cast(Any, object())
        raise RuntimeError("exited unexpectedly")

    monkeypatch.setattr(decode, "DEATH_SECONDS", 0)
    monkeypatch.setattr(Workers, "_results", failing)
    with pytest.raises(RuntimeError, match="died 6 times in a row, without an image to blame: exited unexpectedly"):
        next(Workers(DECODER, 1).decode(iter([])))
    assert len(tries) == 6


def test_workers_that_cannot_start_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """At once: none of them has died."""
    tries: list[int] = []

    def failing() -> None:
        tries.append(1)
        raise OSError("no fork server")

    monkeypatch.setattr(decode, "DEATH_SECONDS", 0)
    monkeypatch.setattr(decode.fork_server, "context", failing)
    with pytest.raises(OSError, match="no fork server"):
        next(Workers(DECODER, 7).decode(iter([])))
    assert len(tries) == 1


@pytest.mark.parametrize(
    "error",
    [OSError(errno.EMFILE, os.strerror(errno.EMFILE)), decode.SharedMemoryError("trace: Too many open files (24)")],
)
def test_a_lack_of_open_files_says_what_to_do(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def failing(_: Workers) -> None:
        raise error

    monkeypatch.setattr(Workers, "_results", failing)
    with pytest.raises(RuntimeError, match=r"too many open files: 7 workers .*ulimit -n.*--workers"):
        next(Workers(DECODER, 7).decode(iter([])))


def test_as_many_files_may_be_open_as_the_system_allows() -> None:
    program = (
        "import resource as r\nfrom clip_fast.bulk import fork_server\n"
        "hard = r.getrlimit(r.RLIMIT_NOFILE)[1]\nr.setrlimit(r.RLIMIT_NOFILE, (99, hard))\n"
        "fork_server.start(as_fork=True)\nassert r.getrlimit(r.RLIMIT_NOFILE) == (hard, hard)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_temporary_folder_with_too_long_a_path_is_named(tmp_path: Path) -> None:
    folder = tmp_path / ("x" * 99)
    folder.mkdir()
    program = "from clip_fast.bulk import fork_server\nfork_server.start(as_fork=True)\n"
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | {"TMPDIR": str(folder)}, capture_output=True, text=True
    )
    assert f"OSError: the path {folder} is too long for processes to meet there: set TMPDIR to another" in done.stderr


@dataclass(frozen=True, slots=True)
class Held(ImageFile):
    """Says that its decoding began, and waits."""

    begun: threading.Event
    going_on: threading.Event

    def source(self) -> Path:
        self.begun.set()
        assert self.going_on.wait(30)
        return Path(self.location)


def test_large_images_are_no_warnings_and_threads_leave_the_filters_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    Image.new("RGB", (40, 40)).save(tmp_path / "large.png")
    Image.new("RGB", (50, 50)).save(tmp_path / "bomb.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        before = list(warnings.filters)
        held = [
            Held("h", str(tmp_path / name), threading.Event(), threading.Event()) for name in ("large.png", "bomb.png")
        ]
        with ThreadPoolExecutor(2) as pool:
            first, second = [pool.submit(DECODER.into, DECODER.black(1)[0], each) for each in held]
            for each in held:
                assert each.begun.wait(30)
            held[0].going_on.set()  # who came first also leaves first
            assert first.result(30) == ((40, 40), None)
            held[1].going_on.set()
            assert "decompression bomb" in str(second.result(30)[1])
        assert warnings.filters == before
        with pytest.raises(Image.DecompressionBombWarning):
            Image.open(tmp_path / "large.png")


def test_nothing_to_decode() -> None:
    assert list(decode_batches(DECODER, iter([]), workers=0, time_limit=1)) == []


def test_a_long_thin_image_that_is_squashed_is_no_trouble() -> None:
    Decoder(Preprocess(224, squash=True)).check((100_000, 10))
    with pytest.raises(ValueError, match="too long and thin"):
        Decoder(Preprocess(224)).check((100_000, 10))


def test_processes_are_started_with_ctrl_c_blocked() -> None:
    """The resource tracker, which the first start of a process starts too, unblocks it."""
    program = (
        "import signal\nfrom multiprocessing import forkserver\n"
        "from clip_fast.bulk.fork_server import interrupts_blocked\n"
        "with interrupts_blocked():\n    forkserver.ensure_running()\n"
        "    assert signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_decoding_processes_keep_the_memory_of_large_photographs() -> None:
    program = (
        "from PIL import Image\nfrom clip_fast.bulk import preloaded\n"
        "block = Image.core.get_block_size()\nassert Image.core.get_blocks_max() * block >= 4 * 12_000_000\n"
        "for _ in range(2):\n    Image.new('RGB', (4000, 3000), 'white')\n"
        "stats = Image.core.get_stats()\n"
        "assert stats['reused_blocks'] >= 4 * 12_000_000 // block and not stats['freed_blocks'], stats\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_decoders_that_start_when_the_job_is_stopped_show_no_traceback() -> None:
    program = (
        "import sys\nfrom clip_fast.bulk import preloaded\n"
        "errors = EOFError(), FileNotFoundError(2, 'semaphore'), FileNotFoundError(2, 'gone', 'file'), KeyError(3)\n"
        "for error in errors:\n    sys.excepthook(type(error), error, None)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert done.stderr == "FileNotFoundError: [Errno 2] gone: 'file'\nKeyError: 3\n"
