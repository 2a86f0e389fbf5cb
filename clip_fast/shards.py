"""Embeddings on disk in shards, so that a job can stop anywhere and go on.

    OUTPUT/img_emb/img_emb_0000.npy             (rows, embed_dim), row i belonging to row i of
    OUTPUT/metadata/metadata_0000.parquet       key, image_path, width, height, status, error
    OUTPUT/errors.jsonl                         {"key", "image_path", "reason"} of every failure, where there are any
    OUTPUT/manifest.json                        the settings, and the totals once all is done

the layout that clip-retrieval and autofaiss read. Every input has its row, in order; the embedding of one that failed
is zero. A shard is there when its metadata is, which is renamed into place after the embeddings and holds their size in
bytes. So what a killed run leaves is whole shards, temporary files that the next run removes, and a lock that the
kernel let go of.
"""

from __future__ import annotations

import json
import os
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .files import TEMPORARY_SUFFIX, claimed_file, locked, new_file
from .sources import Item, pyarrow

MANIFEST_NAME = "manifest.json"
ERRORS_NAME = "errors.jsonl"
LOCK_NAME = ".lock"
EMBEDDINGS_FOLDER = "img_emb"
METADATA_FOLDER = "metadata"

_FOOTER = b"clip_fast"  # key, in its parquet's footer, of a shard's digest, counts and size

Settings = Mapping[str, object]


class Record(NamedTuple):
    """What is known of one input: the size in pixels is (0, 0) where it could not be read; `error` is None if all is
    well."""

    key: str
    location: str
    width: int
    height: int
    error: str | None


@dataclass(frozen=True)
class Shard:
    """Rows (n, embed_dim), float16 or float32, and their records."""

    index: int
    rows: NDArray[Any]
    records: list[Record]


@dataclass(frozen=True)
class Totals:
    """Counts of inputs."""

    images: int = 0
    failed: int = 0
    shards: int = 0

    def __add__(self, other: Totals) -> Totals:
        return Totals(self.images + other.images, self.failed + other.failed, self.shards + other.shards)


class ShardFolder:
    """The finished shards of an output folder, to look at and to add to."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)

    def finished(self, index: int, items: Sequence[Item]) -> Totals | None:
        """The counts of shard `index`, if it is there.

        Raises:
            ValueError: where it was made from other inputs than `items`.
        """
        path, embeddings = self.metadata_path(index), self.embeddings_path(index)
        if not path.exists() or not embeddings.exists():
            return None
        footer = _read_footer(path)
        if footer["bytes"] != embeddings.stat().st_size:
            return None
        if footer["inputs"] != _digest(items):
            raise ValueError(
                f"cannot resume {self.folder}: the inputs have changed, {path.name} was made from others than "
                f"{items[0].key!r} to {items[-1].key!r}"
            )
        return Totals(footer["images"], footer["failed"], 1)

    def write(self, shard: Shard) -> None:
        """Writes a shard, whole or not at all.

        Raises:
            OSError: for example because the disk is full.
        """
        with new_file(self.embeddings_path(shard.index)) as file:
            np.lib.format.write_array(file, np.ascontiguousarray(shard.rows), allow_pickle=False)
            size = file.tell()
        _, parquet = pyarrow()
        with new_file(self.metadata_path(shard.index)) as file:
            parquet.write_table(_metadata(shard.records, size), file)
        for folder in (EMBEDDINGS_FOLDER, METADATA_FOLDER):
            _sync_folder(self.folder / folder)
        errors = _error_lines(shard.records)
        if errors:
            with open(self.folder / ERRORS_NAME, "ab", buffering=0) as file:
                file.write(errors)

    def embeddings_path(self, index: int) -> Path:
        return self.folder / EMBEDDINGS_FOLDER / f"img_emb_{index:04d}.npy"

    def metadata_path(self, index: int) -> Path:
        return self.folder / METADATA_FOLDER / f"metadata_{index:04d}.parquet"

    def all_metadata(self) -> list[Path]:
        """The metadata of the finished shards, in their order."""
        paths = (self.folder / METADATA_FOLDER).glob("metadata_*.parquet")
        return sorted(paths, key=lambda path: int(path.stem.rpartition("_")[2]))


class OutputFolder(ShardFolder):
    """A `ShardFolder` that belongs to one run, from here to `close` or the end of the process, however it ends.

    Args:
        folder: made if it is not there.
        resume: go on with what is there. Without it, what is there is an error.

    Raises:
        OSError: where it cannot be made or written to, or another process is writing to it.
        ValueError: where it holds a run that `resume` does not ask for, or something else.
    """

    def __init__(self, folder: str | os.PathLike[str], resume: bool = False) -> None:
        super().__init__(folder)
        pyarrow()  # if it is missing, better now than after the first shard
        self._manifest = self.folder / MANIFEST_NAME
        self._settings: dict[str, Any] = {}
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

    def begin(self, settings: Settings) -> None:
        """Makes ready for shards.

        Args:
            settings: what the bytes of the output follow from; JSON values.

        Raises:
            ValueError: where the run to resume had other settings; it says which.
        """
        self._settings = json.loads(json.dumps(settings))
        if self._manifest.exists():
            self._compare(read_settings(self._manifest))
        for folder in (self.folder, self.folder / EMBEDDINGS_FOLDER, self.folder / METADATA_FOLDER):
            for leftover in folder.glob(f".*{TEMPORARY_SUFFIX}"):
                leftover.unlink()
        if not self._manifest.exists():
            self._write_manifest({"settings": self._settings})
        (self.folder / EMBEDDINGS_FOLDER).mkdir(exist_ok=True)
        (self.folder / METADATA_FOLDER).mkdir(exist_ok=True)
        self._write_errors()
        _sync_folder(self.folder)

    def _compare(self, before: dict[str, Any]) -> None:
        now = self._settings
        names = [name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]
        if names:
            differences = "; ".join(f"{name} was {before.get(name)!r}, is {now.get(name)!r}" for name in names)
            raise ValueError(f"cannot resume {self.folder} with other settings: {differences}")

    def finish(self, shards: int) -> Totals:
        """Ends a run of which all of `shards` shards are there: puts errors in order and the totals in the manifest.

        Raises:
            ValueError: where there are others than these shards.
        """
        paths = self.all_metadata()
        expected = [self.metadata_path(index) for index in range(shards)]
        if paths != expected:
            odd = sorted(path.name for path in set(paths) ^ set(expected))
            raise ValueError(f"{self.folder} should hold {shards} shards; missing or too many: {', '.join(odd)}")
        self._write_errors()
        footers = [_read_footer(path) for path in paths]
        totals = Totals(sum(each["images"] for each in footers), sum(each["failed"] for each in footers), shards)
        done = {"images": totals.images, "failed": totals.failed, "shards": totals.shards}
        self._write_manifest({"settings": self._settings, "done": done})
        _sync_folder(self.folder)
        return totals

    def close(self) -> None:
        """Lets others at the folder."""
        self._lock.close()

    def __enter__(self) -> OutputFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _write_manifest(self, manifest: dict[str, Any]) -> None:
        with new_file(self._manifest) as file:
            file.write(json.dumps(manifest, indent=2, sort_keys=True).encode() + b"\n")

    def _write_errors(self) -> None:
        """errors.jsonl as the finished shards have it, in their order."""
        target = self.folder / ERRORS_NAME
        paths = [path for path in self.all_metadata() if _read_footer(path)["failed"]]
        if not paths:
            target.unlink(missing_ok=True)
            return
        with new_file(target) as file:
            for path in paths:
                file.write(_error_lines(read_records(path)))


def read_settings(manifest: Path) -> dict[str, Any]:
    """What the bytes of an output follow from, of its manifest.

    Raises:
        ValueError: names the manifest where it is none.
    """
    try:
        return dict(json.loads(manifest.read_text("utf-8"))["settings"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{manifest} is no manifest of clip-fast encode: {error!r}") from error


class ParquetFile:
    """Embeddings and records in one parquet file, which appears in `commit`; `embedding` is a fixed-size list.

    A context manager: leaving it without `commit` leaves nothing, and what a killed run left is removed.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        path = Path(path)
        pyarrow()
        if not path.parent.is_dir():
            raise FileNotFoundError(f"the output's folder {path.parent} does not exist")
        self._new = claimed_file(path)
        self._writer: Any = None

    def finished(self, index: int, items: Sequence[Item]) -> Totals | None:
        """None: a single file is written from the start."""
        return None

    def write(self, shard: Shard) -> None:
        """Appends a shard as a row group."""
        _, parquet = pyarrow()
        table = table_of(shard.rows, shard.records)
        if self._writer is None:
            self._writer = parquet.ParquetWriter(self._new.file, table.schema)
        self._writer.write_table(table)

    def commit(self) -> None:
        """Puts the file in place."""
        if self._writer is None:
            raise ValueError("nothing was written")
        self._writer.close()
        self._new.finish()
        self._new.move()

    def __enter__(self) -> ParquetFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writer is not None and self._writer.is_open:
            with suppress(OSError, ValueError):  # it would write its footer, for which a full disk may have no room
                self._writer.close()
        self._new.discard()


def table_of(rows: NDArray[Any], records: list[Record]) -> Any:
    """Records and their embeddings (n, embed_dim), a list of fixed size each, as one Arrow table."""
    arrow, _ = pyarrow()
    embeddings = arrow.FixedSizeListArray.from_arrays(arrow.array(rows.reshape(-1)), rows.shape[1])
    return _columns(records).append_column("embedding", embeddings)


def read_records(path: Path) -> list[Record]:
    """The records of a shard's metadata."""
    _, parquet = pyarrow()
    with _naming(path):
        columns = parquet.read_table(path).to_pydict()
        names = ("key", "image_path", "width", "height", "error")
        return [Record(*values) for values in zip(*(columns[name] for name in names), strict=True)]


@contextmanager
def _naming(path: Path) -> Generator[None, None, None]:
    """Makes errors in reading a shard's metadata say which file it is, and what helps."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError) as error:  # pyarrow's are some of these
        raise ValueError(f"{path} is damaged: without it, --resume makes the shard again ({error})") from error


def _sync_folder(folder: Path) -> None:
    """Puts renamed files' names on the disk."""
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


def _read_footer(path: Path) -> dict[str, Any]:
    _, parquet = pyarrow()
    with _naming(path):
        return json.loads(parquet.read_metadata(path).metadata[_FOOTER])


def _metadata(records: list[Record], size: int) -> Any:
    failed = sum(record.error is not None for record in records)
    footer = {"inputs": _digest(records), "images": len(records), "failed": failed, "bytes": size}
    return _columns(records).replace_schema_metadata({_FOOTER: json.dumps(footer)})


def _columns(records: list[Record]) -> Any:
    arrow, _ = pyarrow()
    return arrow.table(
        {
            "key": arrow.array([as_text(record.key) for record in records], arrow.string()),
            "image_path": arrow.array([as_text(record.location) for record in records], arrow.string()),
            "width": arrow.array([record.width for record in records], arrow.int32()),
            "height": arrow.array([record.height for record in records], arrow.int32()),
            "status": arrow.array(["ok" if record.error is None else "failed" for record in records], arrow.string()),
            "error": arrow.array([record.error for record in records], arrow.string()),
        }
    )


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


def as_text(name: str) -> str:
    """`name` as UTF-8 can hold it: bytes that are none are shown as backslash escapes."""
    return name.encode("utf-8", "backslashreplace").decode()
