"""Small jobs: images to one `.npy` file. `pipeline.py` is for the large ones.

    with EmbeddingWriter("embeddings.npy") as writer:
        for batch in embed_files(model, preprocess, paths):
            writer.add(batch)
        writer.commit()

A file that cannot be embedded is never an exception, always a `Failure` with its reason.

The written files are `embeddings.npy`, float32 (n, embed_dim), not normalised; beside it `paths.txt`, in UTF-8, whose
line i is the path of row i; and `errors.txt`, path TAB reason, only where there are failures. Beside a `train.npy`
these are `train.paths.txt` and `train.errors.txt`. A path that does not fit one line (it has a line break, or bytes
that are no text) is a failure for that reason, so the lines need no unescaping. The errors show such a path with
backslash escapes.
"""

from __future__ import annotations

import io
import os
from collections.abc import Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from ..errors import printable
from ..inputs.items import Failure, ImageFile, Item, Unreadable
from ..preprocess import Preprocess
from .atomic import NewFile, claimed_file
from .decoder import Decoder, failure_reason
from .rows import Encoder, encode_rows, settle
from .workers import TIME_LIMIT, Decoded, Workers, WorkItem

_USUAL = "embeddings.npy"  # its companions have short names


@dataclass(frozen=True)
class EmbeddedBatch:
    """Embeddings `rows`, float32 (len(paths), E), of the items at `paths`; and the items between them that failed."""

    paths: list[str]
    rows: NDArray[np.float32]
    failures: list[Failure]


# --- Embeddings ------------------------------------------------------------------------------------------------------


def embed_files(
    model: Encoder,
    preprocess: Preprocess,
    paths: Sequence[Path | Item],
    batch_size: int = 32,
    *,
    workers: int = 0,
    time_limit: float = TIME_LIMIT,
) -> Generator[EmbeddedBatch, None, None]:
    """Embeds the images in `paths`, files or other items, in order, `batch_size` at a time.

    `workers` and `time_limit` are those of `Workers`: processes decode the next batches at the same time, and share
    each of them. Of an animation or a multi-page file, the first frame counts. An EXIF orientation is not applied, as
    in `Preprocess`.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    items = [_item(each) for each in paths]
    workers = min(workers, len(items))
    share = -(-batch_size // max(1, workers))
    batches = [
        WorkItem(items[start : start + batch_size], 0, start, len(items)).parts(share)
        for start in range(0, len(items), batch_size)
    ]
    with (
        Workers(Decoder(preprocess), workers, time_limit=time_limit) as processes,
        closing(processes.decode(chain.from_iterable(batches))) as decoding,
    ):
        for parts in batches:
            batch = [item for part in parts for item in part.items]
            decoded = Decoded.joined((pixels for _, pixels in islice(decoding, len(parts))), len(batch))
            yield _embed(model, preprocess, batch, decoded)


def _item(path: Path | Item) -> Item:
    item = path if isinstance(path, Item) else ImageFile(str(path), str(path))
    try:
        item.location.encode()
    except UnicodeEncodeError as error:
        return Unreadable(item.key, item.location, failure_reason(error))
    if item.location.splitlines() != [item.location]:
        return Unreadable(item.key, item.location, "a line break in the name, which the list of paths cannot hold")
    return item


def _embed(model: Encoder, preprocess: Preprocess, items: Sequence[Item], decoded: Decoded) -> EmbeddedBatch:
    errors = decoded.errors
    failures = [Failure(items[i].location, reason) for i, reason in errors.items()]
    good = [i for i in range(len(items)) if i not in errors]
    if not good:
        return EmbeddedBatch([], np.empty((0, 0), np.float32), failures)
    rows = encode_rows(model, preprocess.normalised(decoded.pixels[good])).cpu().numpy()
    failed = settle(rows, {})
    places = [items[i].location for i in good]
    failures += [Failure(places[i], reason) for i, reason in failed.items()]
    finite = [i for i in range(len(good)) if i not in failed]
    return EmbeddedBatch([places[i] for i in finite], rows[finite], failures)


# --- Writing ---------------------------------------------------------------------------------------------------------


class EmbeddingWriter:
    """Writes rows as they come; the final names appear in `commit`, whole, or not at all.

    A context manager: leaving it without `commit` removes what was written. Files of an earlier run then stay as they
    were.

    Raises:
        OSError: the folder of `output` is missing or cannot be written to.
        ValueError: a name to write belongs to something other than a regular file, or to a list of paths without
            embeddings.
    """

    def __init__(self, output: str | os.PathLike[str]) -> None:
        output = Path(output)
        paths, errors = (
            output.with_name(name) if output.name == _USUAL else output.with_suffix(f".{name}")
            for name in ("paths.txt", "errors.txt")
        )
        self.targets = [output, paths, errors]
        for companion in (paths, errors):
            if companion.is_file() and not output.exists() and not (companion == errors and _lists_failures(errors)):
                raise ValueError(f"{companion} is there without {output}, so it may be your own: move or remove it")
        self._open: list[NewFile] = []
        try:
            for target in self.targets:
                self._open.append(claimed_file(target))
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

    def add(self, batch: EmbeddedBatch) -> None:
        """Appends the rows, paths and failures of `batch`."""
        self.fail(batch.failures)
        if not batch.paths:
            return
        if not self.shape[0]:
            self._rows.file.write(_npy_header(batch.rows.shape))  # a placeholder; `commit` knows the number of rows
        self.shape = (self.shape[0] + batch.rows.shape[0], batch.rows.shape[1])
        self._rows.file.write(batch.rows.astype("<f4").tobytes())
        self._paths.file.write("".join(f"{path}\n" for path in batch.paths).encode())

    def fail(self, failures: Iterable[Failure]) -> None:
        """Appends failures."""
        for failure in failures:
            self._errors.file.write(f"{printable(failure.path)}\t{printable(failure.reason)}\n".encode())
            self.failed += 1

    def commit(self) -> None:
        """Puts the files in place; without a single row, only the errors.

        All bytes are on the disk before the first name changes. The old list of paths goes first and the new one comes
        last: even a run that is killed in between leaves no old list beside new embeddings.
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


def _lists_failures(errors: Path) -> bool:
    """Whether a list of errors is that of a run, which leaves it alone where every image has failed."""
    with open(errors, "rb") as file:
        return b"\t" in file.readline(1 << 20)


def _npy_header(shape: tuple[int, ...]) -> bytes:
    """The start of a `.npy` file of float32 rows. NumPy pads it, so that its length fits any number of rows."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return header.getvalue()
