"""Parquet files with a column of images: their bytes, or paths to them. Needs the extra `parquet`."""

from __future__ import annotations

import io
import os
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any, ClassVar

from ..errors import reason_of
from ..extras import pyarrow
from .containers import IMAGE_COLUMN, Columns
from .items import ImageFile, Item, Unreadable, image_bytes, may_pass

_SLICE = 64  # rows that are read at a time
# Arrow's types of columns with images, beside structs. A column of text holds paths.
_BINARY = {"binary", "large_binary", "binary_view", "null"}
_TEXT = {"string", "large_string", "string_view"}


@dataclass(frozen=True, slots=True)
class ParquetCell(Item):
    """Bytes, or Hugging Face's {bytes, path}, in a column of a parquet file."""

    file: str
    column: str
    group: int
    row: int  # in its row group
    folder: str = ""  # a path in the cell is relative to it; by default the working directory

    def prepare(self) -> None:
        _column(self.file, self.group, self.column).seek(self.row)  # reads the rows before it, too

    def source(self) -> Path | io.BytesIO:
        value: bytes | dict[str, Any] | None = _column(self.file, self.group, self.column)[self.row]
        data, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
        if data is not None:
            return image_bytes(data, len(data))
        if path is not None:
            return ImageFile(self.key, os.path.join(self.folder, path)).source()
        raise ValueError("not an image: null")


@dataclass(frozen=True)
class Parquet:
    """The images in `column` of a parquet file: their bytes, Hugging Face's {bytes, path}, or paths to them.

    Keys come from `key_column`; without one they are the paths, or the file's name and the row's number.
    """

    suffix: ClassVar[str] = ".parquet"

    path: str
    column: str = IMAGE_COLUMN
    key_column: str | None = None

    @classmethod
    def named(cls, path: str, columns: Columns) -> Parquet:
        return cls(path, columns.image, columns.key)

    @classmethod
    def around(cls, location: str, columns: Columns) -> Parquet | None:
        path, found, row = location.rpartition("#")
        return cls.named(path, columns) if found and row.isdecimal() and path.endswith(cls.suffix) else None

    def count(self) -> int:
        try:
            return pyarrow()[1].read_metadata(self.path).num_rows
        except _parquet_errors() as error:
            if may_pass(error):
                raise
            return 1

    def __iter__(self) -> Iterator[Item]:
        try:
            yield from self._items()
        except _parquet_errors() as error:
            if may_pass(error):
                raise
            yield Unreadable(self.path, self.path, f"not a readable parquet file: {reason_of(error)}")

    def _items(self) -> Iterator[Item]:
        row = 0
        with pyarrow()[1].ParquetFile(self.path) as file:
            schema = file.schema_arrow
            for name in filter(None, (self.column, self.key_column)):
                if name not in schema.names:
                    raise ValueError(f"no column {name!r}, only {', '.join(schema.names)}")
                if schema.names.count(name) > 1:
                    raise ValueError(f"several columns {name!r}")
            kind = schema.field(self.column).type
            if not _may_hold_images(kind):
                raise ValueError(f"the column {self.column!r} holds no images: bytes or paths are, it has {kind}")
            holds_paths = _is_text(kind)
            columns = [name for name in (self.key_column, self.column if holds_paths else None) if name]
            for group in range(file.num_row_groups):
                count = file.metadata.row_group(group).num_rows
                table = file.read_row_group(group, columns=columns)
                keys = table[self.key_column].to_pylist() if self.key_column else None
                paths = table[self.column].to_pylist() if holds_paths else None
                for i in range(count):
                    location = f"{self.path}#{row}"
                    row += 1
                    if paths and paths[i] is None:
                        yield Unreadable(str(keys[i]) if keys else location, location, "not an image: null")
                    elif paths:
                        yield ImageFile(str(keys[i]) if keys else paths[i], paths[i])
                    else:
                        yield ParquetCell(
                            str(keys[i]) if keys else location, location, self.path, self.column, group, i
                        )


def _parquet_errors() -> tuple[type[Exception], ...]:
    return (OSError, ValueError, pyarrow()[0].ArrowException)


def _is_text(kind: Any) -> bool:
    """Whether a column of this Arrow type holds strings."""
    return str(_values(kind)) in _TEXT


def _may_hold_images(kind: Any) -> bool:
    """Whether cells of this Arrow type are what `ParquetCell` reads, or paths."""
    arrow, _ = pyarrow()
    values = _values(kind)
    if arrow.types.is_struct(values):
        return any(values.get_field_index(name) >= 0 for name in ("bytes", "path"))
    return str(values) in _BINARY | _TEXT or arrow.types.is_fixed_size_binary(values)


def _values(kind: Any) -> Any:
    """The type of a column's values: that of a dictionary's, or an extension's storage, where `kind` is one."""
    arrow, _ = pyarrow()
    if isinstance(kind, arrow.BaseExtensionType):
        return _values(kind.storage_type)
    return kind.value_type if arrow.types.is_dictionary(kind) else kind


class _Column:
    """A column of a row group, read ahead in slices.

    Rows are asked for in order, or nearly so where several threads ask. The last two slices stay in memory. A row
    before them makes the group be read again from its beginning.
    """

    def __init__(self, file: str, group: int, column: str) -> None:
        self._place = (file, group, column)
        self._lock = Lock()
        self._rewind()

    def _rewind(self) -> None:
        file, group, column = self._place
        opened = pyarrow()[1].ParquetFile(file, memory_map=True)  # reads slices, not the whole column
        self._coming: Iterator[Any] = opened.iter_batches(_SLICE, row_groups=[group], columns=[column])
        self._slices: deque[tuple[int, Any]] = deque(maxlen=2)  # each with the number of its first row
        self._next = 0

    def __getitem__(self, row: int) -> Any:
        with self._lock:
            start, rows = self._slice(row)
            return rows[row - start].as_py()

    def seek(self, row: int) -> None:
        """Reads ahead up to `row`."""
        with self._lock:
            self._slice(row)

    def _slice(self, row: int) -> tuple[int, Any]:
        """The number of the first row, and the rows, of the slice that `row` is in."""
        if self._slices and row < self._slices[0][0]:
            self._rewind()
        try:
            while row >= self._next:
                rows = next(self._coming).column(0)
                self._slices.append((self._next, rows))
                self._next += len(rows)
        except Exception:
            self._rewind()  # a broken stream counts as ended; the next row must fail for the same reason
            raise
        return next(found for found in reversed(self._slices) if found[0] <= row)


_column = lru_cache(maxsize=2)(_Column)  # two, since threads at a group's end ask for two groups
