"""Embeddings on disk in shards, so that a job can stop anywhere and go on.

    OUTPUT/img_emb/img_emb_0000.npy             (rows, embed_dim), row i belonging to row i of
    OUTPUT/metadata/metadata_0000.parquet       key, image_path, width, height, status, error, norm
    OUTPUT/errors.jsonl                         {"key", "image_path", "reason"} of every failure, where there are any
    OUTPUT/manifest.json                        the settings, and the totals once all is done
    OUTPUT/listings/                            what is in the tars among the inputs, see `listings.py`

This is the layout that clip-retrieval and autofaiss read. Every input has its row, in order; the embedding of a failed
one is zero. The metadata holds the size and the checksum of the embeddings' file and is renamed into place after it: a
shard is there once its metadata is. Where a shard is replaced, its old metadata goes before the embeddings do. A killed
run leaves whole shards, temporary files that the next run removes, and a lock that the operating system has released.
"""

from __future__ import annotations

import io
import json
import logging
import os
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from hashlib import file_digest, sha256
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import reason_of, summary
from ..extras import pyarrow
from ..inputs.items import Item
from .atomic import TEMPORARY_SUFFIX, NewFile, locked, naming, new_file
from .listings import LISTINGS_FOLDER
from .manifest import MANIFEST_NAME, compare, read_manifest, write_manifest
from .tables import Record, Shard, Totals, as_text, columns_of

ERRORS_NAME = "errors.jsonl"
LOCK_NAME = ".lock"
EMBEDDINGS_FOLDER = "img_emb"
METADATA_FOLDER = "metadata"

NORM = "norm"  # column of the metadata

_FOOTER = b"clip_fast"  # key in the parquet footer, under which a shard's `Footer` stands
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Footer:
    """A shard in short: the digest of its inputs, its counts, and the size and SHA-256 of its embeddings' file.

    Shards of earlier releases have no SHA-256.
    """

    inputs: str
    images: int
    failed: int
    bytes: int
    sha256: str | None = None


class ShardFolder:
    """The finished shards of an output folder: reads them and adds to them."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)

    def finished(self, index: int, items: Sequence[Item]) -> Totals | None:
        """The counts of shard `index`; None where it is not there, lacks new inputs, or is damaged, which is logged.

        Raises:
            ValueError: the shard was made from other inputs than `items`.
        """
        path, embeddings = self.metadata_path(index), self.embeddings_path(index)
        if not path.exists() or not embeddings.exists():
            return None
        try:
            footer = check_shard(path, embeddings)
        except ValueError as error:
            _log.warning("%s: the shard is made again", error)
            return None
        if footer.images < len(items) and footer.inputs == _digest(items[: footer.images]):
            return None  # it was the last one, and more inputs follow
        if footer.inputs != _digest(items):
            raise ValueError(
                f"cannot resume {self.folder}: the inputs have changed, {path.name} was made from others than "
                f"{items[0].key!r} to {items[-1].key!r}"
            )
        return Totals(footer.images, footer.failed, 1)

    def write(self, shard: Shard) -> None:
        """Writes a shard, whole or not at all.

        A shard of that number which is there already stays until all bytes of the new one are on the disk.

        Raises:
            OSError: for example because the disk is full.
        """
        data = npy_bytes(shard.rows)
        _, parquet = pyarrow()
        paths = self.embeddings_path(shard.index), self.metadata_path(shard.index)
        with NewFile(paths[0]) as embeddings, NewFile(paths[1]) as metadata:
            embeddings.file.writelines(data)
            parquet.write_table(_metadata(shard, data), metadata.file, write_page_checksum=True)
            embeddings.finish()
            metadata.finish()
            metadata.target.unlink(missing_ok=True)  # a kill must not leave it beside the new embeddings
            embeddings.move()
            metadata.move()
        for folder in (EMBEDDINGS_FOLDER, METADATA_FOLDER):
            _sync_folder(self.folder / folder)
        errors = _error_lines(shard.records)
        if errors:
            path = self.folder / ERRORS_NAME
            with naming(path), open(path, "ab") as file:
                file.write(errors)

    def embeddings_path(self, index: int) -> Path:
        return self.folder / EMBEDDINGS_FOLDER / f"img_emb_{index:04d}.npy"

    def metadata_path(self, index: int) -> Path:
        return self.folder / METADATA_FOLDER / f"metadata_{index:04d}.parquet"

    def all_metadata(self) -> list[Path]:
        """The metadata files of the finished shards, in their order."""
        return [self.metadata_path(index) for index in self.finished_shards()]

    def error_lines(self) -> Iterator[bytes]:
        """What errors.jsonl has of the finished shards, in their order; damaged ones are left to `finished`."""
        for path in self.all_metadata():
            with suppress(ValueError):
                if read_footer(path).failed:
                    yield _error_lines(read_records(path))

    def finished_shards(self) -> list[int]:
        """The numbers of the finished shards, in their order."""
        paths = (self.folder / METADATA_FOLDER).glob("metadata_*.parquet")
        numbers = (path.stem.removeprefix("metadata_") for path in paths)
        return sorted(int(number) for number in numbers if number.isdecimal())


class OutputFolder(ShardFolder):
    """A `ShardFolder` that belongs to one run, from here to `close` or the end of the process, however it ends.

    Args:
        folder: created where it does not exist.
        resume: continue the run in the folder. Without it, an earlier run in the folder is an error.

    Raises:
        OSError: the folder cannot be created or written to, or another process is writing to it.
        ValueError: the folder holds an earlier run and `resume` is false, or it holds something else.
    """

    def __init__(self, folder: str | os.PathLike[str], resume: bool = False) -> None:
        super().__init__(folder)
        pyarrow()  # its absence is better known now than after the first shard
        self._manifest = self.folder / MANIFEST_NAME
        self._settings: dict[str, Any] = {}
        self._earlier: bytes | None = None  # the manifest that this run has found
        self._found: dict[Path, int] = {}  # the shards that this run has found
        self._refuse_others()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = locked(self.folder / LOCK_NAME)
        if self._manifest.exists() and not resume:
            self.close()
            raise ValueError(f"{self.folder} holds an earlier run: --resume continues it")

    def _refuse_others(self) -> None:
        if self.folder.exists() and not self.folder.is_dir():
            raise NotADirectoryError(f"{self.folder} is not a folder")
        if self.folder.exists() and not self._manifest.exists():
            others = [name for name in os.listdir(self.folder) if not name.startswith(".")]
            if others:
                raise ValueError(f"the folder {self.folder} is not empty and holds no earlier run: choose another")

    def begin(self, settings: dict[str, object]) -> None:
        """Prepares the folder for shards.

        Args:
            settings: all that the bytes of the output depend on, as JSON values.

        Raises:
            ValueError: the run to resume had other settings; the message names them.
        """
        self._settings = json.loads(json.dumps(settings))
        if self._manifest.exists():
            compare(read_manifest(self._manifest).settings, self._settings, self.folder)
            self._earlier, self._found = self._manifest.read_bytes(), self._times()
        names = (EMBEDDINGS_FOLDER, METADATA_FOLDER, LISTINGS_FOLDER)
        for folder in (self.folder, *(self.folder / name for name in names)):
            for leftover in folder.glob(f".*{TEMPORARY_SUFFIX}"):
                leftover.unlink()
        write_manifest(self._manifest, {"settings": self._settings})  # without totals, until the run is complete
        (self.folder / EMBEDDINGS_FOLDER).mkdir(exist_ok=True)
        (self.folder / METADATA_FOLDER).mkdir(exist_ok=True)
        self._write_errors()
        _sync_folder(self.folder)

    def finish(self, shards: int) -> Totals:
        """Ends a run whose `shards` shards are all there: sorts the errors and writes the totals to the manifest.

        Raises:
            ValueError: the folder holds other shards than these.
        """
        paths = self.all_metadata()
        expected = [self.metadata_path(index) for index in range(shards)]
        if paths != expected:
            odd = sorted(path.name for path in set(paths) ^ set(expected))
            raise ValueError(f"{self.folder} should hold {shards} shards; missing or too many: {', '.join(odd)}")
        self._write_errors()
        footers = [read_footer(path) for path in paths]
        totals = Totals(sum(each.images for each in footers), sum(each.failed for each in footers), shards)
        write_manifest(self._manifest, {"settings": self._settings, "done": asdict(totals)})
        _sync_folder(self.folder)
        return totals

    def close(self) -> None:
        """Releases the lock."""
        self._lock.close()

    def __enter__(self) -> OutputFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # A run that was refused, or stopped before its first shard, leaves the manifest as it was.
        if error is not None and self._earlier is not None and self._times() == self._found:
            with suppress(OSError), new_file(self._manifest) as file:
                file.write(self._earlier)
        self.close()

    def _times(self) -> dict[Path, int]:
        """When each finished shard was written."""
        return {path: path.stat().st_mtime_ns for path in self.all_metadata()}

    def _write_errors(self) -> None:
        """Writes errors.jsonl anew."""
        target = self.folder / ERRORS_NAME
        with new_file(target) as file:
            file.writelines(self.error_lines())
            empty = not file.tell()
        if empty:
            target.unlink()


def npy_bytes(rows: NDArray[Any]) -> tuple[bytes, memoryview]:
    """A `.npy` file of `rows`: its header and its data.

    NumPy's own writer does not say that a disk is full, only how many numbers it has written.
    """
    rows = np.ascontiguousarray(rows)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(rows))
    return header.getvalue(), rows.reshape(-1).view(np.uint8).data


def read_records(path: Path) -> list[Record]:
    """The records of a shard's metadata.

    Raises:
        ValueError: the file is damaged; the message names it.
    """
    _, parquet = pyarrow()
    with _naming_damage(path):
        table = parquet.read_table(path, page_checksum_verification=True)
        schema = columns_of([]).schema
        if not any(table.schema.equals(each) for each in (schema, schema.append(_norm_field()))):
            raise ValueError(f"it has other columns: {table.schema}")
        columns, names = table.to_pydict(), ("key", "image_path", "width", "height", "error")
        return [Record(*values) for values in zip(*(columns[name] for name in names), strict=True)]


def read_footer(path: Path) -> Footer:
    """The note on a shard in its metadata.

    Raises:
        ValueError: the file is damaged; the message names it.
    """
    _, parquet = pyarrow()
    with _naming_damage(path):
        metadata = parquet.read_metadata(path)
        content = json.loads(metadata.metadata[_FOOTER])
        footer = Footer(**{each.name: content[each.name] for each in fields(Footer) if each.name in content})
        if metadata.num_rows != footer.images:
            raise ValueError(f"{metadata.num_rows} rows of {footer.images}")
        return footer


def check_shard(records: Path, embeddings: Path) -> Footer:
    """Reads all of a shard's two files and compares them with the note on it, which it returns.

    Raises:
        ValueError: a file is damaged; the message names it.
    """
    footer = read_footer(records)
    check_embeddings(embeddings, footer, contents=True)
    check_records(records, footer)
    return footer


def check_embeddings(path: Path, footer: Footer, *, contents: bool) -> None:
    """Compares a shard's embeddings with what its metadata says of them: the size, and with `contents` the checksum.

    Raises:
        ValueError: they differ, or the file cannot be read; the message names it.
    """
    if not path.exists():
        raise ValueError(f"{path} is missing")
    if (size := path.stat().st_size) != footer.bytes:
        raise ValueError(f"{path} is damaged: it has {size} bytes of {footer.bytes}")
    if contents and footer.sha256 is not None:
        try:
            with open(path, "rb") as file:
                digest = file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {reason_of(error)}") from error
        if digest != footer.sha256:
            raise ValueError(f"{path} is damaged: its contents are not those that were written")


def check_records(path: Path, footer: Footer) -> None:
    """Reads a shard's metadata whole.

    Raises:
        ValueError: the file is damaged; the message names it.
    """
    records = read_records(path)
    if (_digest(records), _failures(records)) != (footer.inputs, footer.failed):
        raise ValueError(f"{path} is damaged: its records are not those that were written")


@contextmanager
def _naming_damage(path: Path) -> Generator[None, None, None]:
    """Errors in reading a shard's metadata name the file."""
    try:
        yield
    except Exception as error:  # pyarrow raises whatever its parsing stumbles on
        raise ValueError(f"{path} is damaged: {summary(error)}") from error


def _sync_folder(folder: Path) -> None:
    """Writes the names of renamed files to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest(named: Sequence[Item | Record]) -> str:
    digest = sha256()
    for each in named:
        digest.update(f"{as_text(each.key)}\0{as_text(each.location)}\n".encode())
    return digest.hexdigest()


def row_lengths(rows: NDArray[Any]) -> NDArray[np.float32]:
    """The Euclidean lengths of rows (n, embed_dim), (n,)."""
    rows = np.asarray(rows, np.float32)
    with np.errstate(over="ignore"):  # such a row has no length, and search passes it over
        return np.sqrt(np.einsum("ij,ij->i", rows, rows))


def _norm_field() -> Any:
    """The column of the rows' lengths, which search reads instead of the rows. Earlier releases did not write it."""
    arrow, _ = pyarrow()
    return arrow.field(NORM, arrow.float32())


def _metadata(shard: Shard, embeddings: tuple[bytes, memoryview]) -> Any:
    arrow, _ = pyarrow()
    records = shard.records
    checksum = sha256()
    for part in embeddings:
        checksum.update(part)
    footer = Footer(_digest(records), len(records), _failures(records), sum(map(len, embeddings)), checksum.hexdigest())
    table = columns_of(records).append_column(_norm_field(), arrow.array(row_lengths(shard.rows)))
    return table.replace_schema_metadata({_FOOTER: json.dumps(asdict(footer))})


def _failures(records: list[Record]) -> int:
    return sum(record.error is not None for record in records)


def _error_lines(records: list[Record]) -> bytes:
    lines = (
        json.dumps(
            {"key": as_text(record.key), "image_path": as_text(record.location), "reason": record.error},
            ensure_ascii=False,
        )
        for record in records
        if record.error is not None
    )
    return "".join(f"{line}\n" for line in lines).encode()
