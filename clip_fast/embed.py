"""From photographs on disk to embeddings on disk, a batch at a time, in memory that does not grow with their number.

    paths, failures = find_images(["photos", "more/**/*.png"])
    with EmbeddingWriter("embeddings.npy") as writer:
        writer.fail(failures)
        for batch in embed_files(model, preprocess, paths):
            writer.add(batch)
        writer.commit()

A file that cannot be embedded is never an exception, always a `Failure` with its reason.

The written files: `embeddings.npy` (or any other name), float32 (n, embed_dim), not normalised; `paths.txt` beside it,
UTF-8, line i naming the file of row i exactly; `errors.txt`, path TAB reason, only where there are failures. A path
that does not fit one line of `paths.txt` (a line break in it, or bytes that are no text) is a failure for that reason,
so the lines need no unescaping; `errors.txt` shows such a path with backslash escapes.
"""

from __future__ import annotations

import glob
import io
import os
import secrets
import stat
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

PATHS_NAME = "paths.txt"
ERRORS_NAME = "errors.txt"
DECODERS = 8  # threads; a photograph of the largest size that Pillow reads takes each about half a gigabyte


class Encoder(Protocol):
    """What has `encode_image`: (B, 3, H, W) float32 -> (B, E) of any float dtype, on any device."""

    def encode_image(self, images: Tensor, /) -> Tensor: ...


@dataclass(frozen=True)
class Failure:
    """A path that gave no embedding, and why."""

    path: str
    reason: str

    def __str__(self) -> str:
        return f"{printable(self.path)}: {printable(self.reason)}"


@dataclass(frozen=True)
class Batch:
    """Embeddings `rows`, float32 (len(paths), E), of `paths`; and the failures among the files between them."""

    paths: list[Path]
    rows: NDArray[np.float32]
    failures: list[Failure]


def printable(text: str) -> str:
    """`text` on one line: control characters, line breaks and undecodable bytes as backslash escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


# --- Which files -----------------------------------------------------------------------------------------------------


def find_images(arguments: Iterable[str | os.PathLike[str]]) -> tuple[list[Path], list[Failure]]:
    """The files that `arguments` name, each once, in the order of the arguments.

    A folder stands for the files below it with the suffix of an image format that Pillow reads, sorted by path; links
    are followed. A pattern (`*`, `?`, `[...]`, and `**` for any depth) that is not itself a file's name stands for what
    it matches, sorted, as if the shell had expanded it. A file named or matched is taken whatever its suffix.

    A file reached twice keeps its first place; links to one file are several files. Failures are arguments that name
    nothing and folders that cannot be listed.
    """
    found: dict[tuple[str, str], Path] = {}
    failures: list[Failure] = []

    @cache
    def real_folder(folder: Path) -> str:
        return os.path.realpath(folder)

    for argument in [os.fspath(each) for each in arguments]:
        named = [argument] if os.path.lexists(argument) else glob.glob(argument, recursive=True)
        if not named:
            failures.append(Failure(argument, "no such file or folder"))
        for path in _sorted(named):
            for image in _images_below(path, failures) if os.path.isdir(path) else [path]:
                found.setdefault((real_folder(image.parent), image.name), image)
    return list(found.values()), failures


def _images_below(folder: Path, failures: list[Failure]) -> list[Path]:
    suffixes = {suffix for suffix, name in Image.registered_extensions().items() if name in Image.OPEN}
    entered = {os.path.realpath(folder)}  # a link may lead back up
    images: list[str] = []

    def cannot_list(error: OSError) -> None:
        failures.append(Failure(str(error.filename), _reason(error)))

    for root, folders, files in os.walk(folder, onerror=cannot_list, followlinks=True):
        images += [os.path.join(root, name) for name in files if os.path.splitext(name)[1].lower() in suffixes]
        below = {name: os.path.realpath(os.path.join(root, name)) for name in sorted(folders)}
        folders[:] = [name for name, real in below.items() if real not in entered]
        entered.update(below.values())
    return _sorted(images)


def _sorted(paths: Iterable[str]) -> list[Path]:
    return sorted(map(Path, paths), key=lambda path: path.parts)


# --- Embeddings ------------------------------------------------------------------------------------------------------


def embed_files(
    model: Encoder, preprocess: Callable[[Image.Image], Tensor], paths: Sequence[Path], batch_size: int = 32
) -> Generator[Batch, None, None]:
    """Embeds the images in `paths`, in order, `batch_size` files at a time; the next are decoded meanwhile, in threads.

    `preprocess` turns an image into a float32 tensor (3, H, W). Of an animation or a multi-page file, the first frame
    counts; an EXIF orientation is not applied, as `clip` does not.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    pool = ThreadPoolExecutor(min(DECODERS, os.cpu_count() or 1), thread_name_prefix="decode")
    upcoming: deque[tuple[Sequence[Path], list[Future[Tensor | Failure]]]] = deque()
    try:
        for start in range(0, len(paths), batch_size):
            files = paths[start : start + batch_size]
            upcoming.append((files, [pool.submit(_decode, path, preprocess) for path in files]))
            if len(upcoming) > 1:
                yield _embed(model, *upcoming.popleft())
        while upcoming:
            yield _embed(model, *upcoming.popleft())
    finally:
        pool.shutdown(cancel_futures=True)


def _embed(model: Encoder, files: Sequence[Path], futures: list[Future[Tensor | Failure]]) -> Batch:
    results = [future.result() for future in futures]
    failures = [result for result in results if isinstance(result, Failure)]
    decoded = [(path, result) for path, result in zip(files, results, strict=True) if isinstance(result, Tensor)]
    if not decoded:
        return Batch([], np.empty((0, 0), np.float32), failures)
    with torch.inference_mode():
        rows = model.encode_image(torch.stack([image for _, image in decoded])).float().cpu().numpy()
    return Batch([path for path, _ in decoded], rows, failures)


def _decode(path: Path, preprocess: Callable[[Image.Image], Tensor]) -> Tensor | Failure:
    try:
        str(path).encode()  # a name that is no text is a UnicodeEncodeError
        if str(path).splitlines() != [str(path)]:
            raise ValueError(f"a line break in the name, which {PATHS_NAME} cannot hold")
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for its other end
            raise ValueError("not a regular file")
        with Image.open(path) as image:
            return preprocess(image)
    except Exception as error:  # decoders fed with broken files raise whatever their parsing stumbles on
        return Failure(str(path), _reason(error))


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not an image, or not in a format that Pillow reads"
    if isinstance(error, UnicodeEncodeError):
        return f"bytes in the name that are not UTF-8, which {PATHS_NAME} cannot hold"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__


# --- Writing ---------------------------------------------------------------------------------------------------------


class _NewFile:
    """A file under a temporary name beside `target`, until `move` gives it the target's or `discard` drops it."""

    def __init__(self, target: Path) -> None:
        self.target = target
        self._temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
        self.file = open(self._temporary, "xb")  # noqa: SIM115 (`finish` or `discard` closes it)

    def finish(self) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()

    def move(self) -> None:
        os.replace(self._temporary, self.target)

    def discard(self) -> None:
        self.file.close()
        self._temporary.unlink(missing_ok=True)


class EmbeddingWriter:
    """Writes rows as they come; the final names appear in `commit`, whole, or not at all.

    A context manager: leaving it without `commit` removes what was written, and files of an earlier run stay as they
    were.

    Raises:
        OSError: where the folder of `output` is missing or cannot be written to.
        ValueError: where a name to write is taken by something other than a regular file, or by two files of the three.
    """

    def __init__(self, output: str | os.PathLike[str]) -> None:
        output = Path(output)
        targets = [output, output.with_name(PATHS_NAME), output.with_name(ERRORS_NAME)]
        if output in targets[1:]:
            raise ValueError(f"{output} is the name of the file beside the embeddings: choose another")
        if not output.parent.is_dir():
            raise FileNotFoundError(f"the output's folder {output.parent} does not exist")
        for target in targets:
            if target.exists() and not target.is_file():
                raise ValueError(f"{target} exists and is not a regular file")
        self._open: list[_NewFile] = []
        try:
            for target in targets:
                self._open.append(_NewFile(target))
        except BaseException:
            self._discard()
            raise
        self._rows, self._paths, self._errors = self._open
        self.shape = (0, 0)  # of the embeddings so far
        self.failed = 0  # failures so far
        self.errors_path = self._errors.target

    def __enter__(self) -> EmbeddingWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._discard()

    def add(self, batch: Batch) -> None:
        """Appends the rows, paths and failures of `batch`."""
        self.fail(batch.failures)
        if not batch.paths:
            return
        if not self.shape[0]:
            self._rows.file.write(_npy_header(batch.rows.shape))  # its place; `commit` knows the number of rows
        self.shape = (self.shape[0] + batch.rows.shape[0], batch.rows.shape[1])
        self._rows.file.write(batch.rows.astype("<f4").tobytes())
        self._paths.file.write("".join(f"{path}\n" for path in batch.paths).encode())

    def fail(self, failures: Iterable[Failure]) -> None:
        """Appends failures."""
        for failure in failures:
            self._errors.file.write(f"{printable(failure.path)}\t{printable(failure.reason)}\n".encode())
            self.failed += 1

    def commit(self) -> None:
        """Puts the files in place; without a single row `errors.txt` only.

        Everything is on the disk before the first name changes. `paths.txt` goes first and comes back last: even where
        the run is killed in between, no list of an earlier run stands beside new embeddings.
        """
        if self.shape[0]:
            self._rows.file.seek(0)
            self._rows.file.write(_npy_header(self.shape))
        for new in self._open:
            new.finish()
        if self.shape[0]:
            self._paths.target.unlink(missing_ok=True)
            self._rows.move()
        if self.failed:
            self._errors.move()
        else:
            self._errors.target.unlink(missing_ok=True)
        if self.shape[0]:
            self._paths.move()

    def _discard(self) -> None:
        for new in self._open:
            new.discard()


def _npy_header(shape: tuple[int, ...]) -> bytes:
    """The start of a `.npy` file of float32 rows; as long for any number of rows, since numpy leaves room to grow."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return header.getvalue()
