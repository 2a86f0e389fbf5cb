"""Arrow tables of embeddings and records, and one parquet file that is written as they come."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from numpy.typing import NDArray

from ..extras import pyarrow
from ..inputs.items import Item
from .atomic import claimed_file


class Record(NamedTuple):
    """One input: its key, its place, its size in pixels, and why it failed.

    The size is (0, 0) where the image could not be read. `error` is None where nothing failed.
    """

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


class ParquetWriter:
    """Writes embeddings and records to one parquet file, which appears in `commit`; `embedding` is a fixed-size list.

    A context manager: leaving it without `commit` leaves nothing. Temporary files of killed runs are removed.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        path = Path(path)
        pyarrow()
        self._new = claimed_file(path)
        self._writer: Any = None

    def finished(self, index: int, items: Sequence[Item]) -> Totals | None:
        """None: a single file is always written from the start."""
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

    def __enter__(self) -> ParquetWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writer is not None and self._writer.is_open:
            with suppress(OSError, ValueError):  # closing writes the footer, which a full disk may have no room for
                self._writer.close()
        self._new.discard()


def table_of(rows: NDArray[Any], records: list[Record]) -> Any:
    """Records and their embeddings (n, embed_dim), a list of fixed size each, as one Arrow table."""
    arrow, _ = pyarrow()
    embeddings = arrow.FixedSizeListArray.from_arrays(arrow.array(rows.reshape(-1)), rows.shape[1])
    return columns_of(records).append_column("embedding", embeddings)


def columns_of(records: list[Record]) -> Any:
    """Records as an Arrow table, in the columns of a shard's metadata."""
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


def as_text(name: str) -> str:
    """`name` in valid UTF-8; bytes that are none become backslash escapes."""
    return name.encode("utf-8", "backslashreplace").decode()
