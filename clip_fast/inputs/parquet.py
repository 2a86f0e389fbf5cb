"""Parquet files with a column of images: their bytes, base64, or paths to them. Needs the extra `parquet`."""

from __future__ import annotations

import io
import os
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any, ClassVar

from ..errors import reason_of
from ..extras import pyarrow
from .base64_text import is_base64, without_base64
from .containers import IMAGE_COLUMN, Columns
from .items import ImageFile, Item, Unreadable, image_bytes, may_pass, size_of_file

_SLICE = 64  # rows that are read at a time, at most
_SLICE_BYTES = 1 << 26  # that these rows may have, by the average of their group
_KEPT = 16  # rows that stay in memory, at least, since threads ask for them nearly in order
_LISTED = 4096  # rows of keys and paths that are read at a time, at most
_LONGEST_PATH = 4096  # characters

# What unpacks to this many times its size is no group of images. Its pages would be taken into memory whole.
_BOMB_RATIO = 200
_BOMB_BYTES = 1 << 26

# Arrow's types of columns with images, beside structs. A column of text holds paths, or images in base64.
_BINARY = {"binary", "large_binary", "binary_view", "null"}
_TEXT = {"string", "large_string", "string_view"}


@dataclass(frozen=True, slots=True)
class ParquetCell(Item):
    """Bytes, base64, or Hugging Face's {bytes, path}, in a column of a parquet file."""

    file: str
    column: str
    group: int
    row: int  # in its row group
    folder: str = ""  # a path in the cell is relative to it; by default the working directory

    def prepare(self) -> None:
        _column(self.file, self.group, self.column).seek(self.row)  # reads the rows before it, too

    def source(self) -> Path | io.BytesIO:
        value: bytes | str | dict[str, Any] | None = _column(self.file, self.group, self.column)[self.row]
        data, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
        if data is not None:
            data = without_base64(data.encode() if isinstance(data, str) else data)
            return image_bytes(data, len(data))
        if path is not None:
            return ImageFile(self.key, os.path.join(self.folder, path)).source()
        raise ValueError("not an image: null")


@dataclass(frozen=True)
class Parquet:
    """The images in `column` of a parquet file: bytes, base64, Hugging Face's {bytes, path}, or paths to them.

    Keys come from `key_column`. Without one, and where a key is null, they are the paths, or the file's name and the
    row's number.
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
        return cls.named(path, columns) if found and row.isdecimal() and path.lower().endswith(cls.suffix) else None

    def count(self) -> int | None:
        """None where keys or texts are read to list the rows: a damaged page of them cuts the list."""
        _, parquet = pyarrow()
        try:
            size_of_file(self.path)
            with parquet.ParquetFile(self.path) as file:
                holds_text = self._check_columns(file.schema_arrow)
                return None if holds_text or self.key_column else file.metadata.num_rows
        except Exception as error:  # as in `__iter__`
            if may_pass(error):
                raise
            return 1

    def __iter__(self) -> Iterator[Item]:
        pyarrow()  # its absence is no fault of the file
        try:
            size_of_file(self.path)
            yield from self._items()
        except Exception as error:  # pyarrow raises whatever its parsing stumbles on
            if may_pass(error):
                raise
            yield Unreadable(self.path, self.path, f"not a readable parquet file: {reason_of(error)}")

    def _items(self) -> Iterator[Item]:
        row = 0
        with pyarrow()[1].ParquetFile(self.path) as file:
            holds_text = self._check_columns(file.schema_arrow)
            listed = [name for name in (self.key_column, self.column if holds_text else None) if name]
            for group in range(file.num_row_groups):
                metadata = file.metadata.row_group(group)
                bomb = _bomb(metadata, listed)
                if bomb:  # its keys cannot be read either
                    places = (f"{self.path}#{row + i}" for i in range(metadata.num_rows))
                    yield from (Unreadable(place, place, bomb) for place in places)
                    row += metadata.num_rows
                    continue
                bomb = _bomb(metadata, [self.column])
                read = 0
                size = _rows_at_once(metadata, listed, _LISTED)
                for some in file.iter_batches(size, row_groups=[group], columns=listed):
                    keys = keys_of(some[self.key_column]) if self.key_column else [None] * some.num_rows
                    texts = _texts_of(some[self.column]) if holds_text else [None] * some.num_rows
                    for key, text in zip(keys, texts, strict=True):
                        location = f"{self.path}#{row + read}"
                        if bomb:
                            yield Unreadable(location if key is None else key, location, bomb)
                        elif holds_text:
                            yield self._of_text(key, location, text, group, read)
                        else:
                            yield self._cell(key, location, group, read)
                        read += 1
                row += read

    def _check_columns(self, schema: Any) -> bool:
        """Whether the column of images is one of text.

        Raises:
            ValueError: a column is not there, or cannot be what it is named for.
        """
        for name in filter(None, (self.column, self.key_column)):
            if name not in schema.names:
                raise ValueError(f"no column {name!r}, only {', '.join(schema.names)}")
            if schema.names.count(name) > 1:
                raise ValueError(f"several columns {name!r}")
        kind = schema.field(self.column).type
        if not _may_hold_images(kind):
            raise ValueError(f"the column {self.column!r} holds no images: bytes or paths are, it has {kind}")
        if self.key_column and pyarrow()[0].types.is_nested(_values(schema.field(self.key_column).type)):
            kind = schema.field(self.key_column).type
            raise ValueError(f"the column {self.key_column!r} holds no keys: text and numbers are, it has {kind}")
        return str(_values(kind)) in _TEXT

    def _cell(self, key: str | None, location: str, group: int, row: int) -> ParquetCell:
        return ParquetCell(location if key is None else key, location, self.path, self.column, group, row)

    def _of_text(self, key: str | None, location: str, text: bytes | None, group: int, row: int) -> Item:
        """The item of a cell of text: a path, or an image in base64."""
        if text is not None and is_base64(text):
            return self._cell(key, location, group, row)
        if text is None or len(text) > _LONGEST_PATH:
            reason = "not an image: null" if text is None else f"{len(text)} characters, no path and no image in base64"
            return Unreadable(location if key is None else key, location, reason)
        path = os.fsdecode(text)
        return ImageFile(path if key is None else key, path)


def keys_of(column: Any) -> list[str | None]:
    """The keys in an Arrow array of any type but nested ones, as text; None for nulls.

    Bytes are read as UTF-8, and those that are none become backslash escapes.
    """
    arrow, _ = pyarrow()
    kind = _values(column.type)
    if isinstance(column.type, arrow.BaseExtensionType):  # such as UUIDs
        return [None if value is None else str(value) for value in column.to_pylist()]
    if _is_text_or_bytes(kind):
        return [None if value is None else value.decode("utf-8", "backslashreplace") for value in _texts_of(column)]
    return column.cast(arrow.string()).to_pylist()


def _texts_of(column: Any) -> list[bytes | None]:
    """The cells of an Arrow array of text or bytes. Text in a file may be no UTF-8, which Arrow gives as bytes only."""
    return column.cast(pyarrow()[0].large_binary()).to_pylist()


def _chunks(group: Any, columns: Sequence[str]) -> list[Any]:
    """The metadata of the parts of a row group that hold `columns`."""
    chunks = [group.column(i) for i in range(group.num_columns)]
    return [each for each in chunks if any(f"{each.path_in_schema}.".startswith(f"{name}.") for name in columns)]


def _is_small(group: Any) -> bool:
    """Whether all of a row group unpacks to few bytes.

    Its columns are then not asked for their own: where a file is damaged, Arrow may end the process over the question.
    """
    return 0 <= group.total_byte_size <= _BOMB_BYTES


def _bomb(group: Any, columns: Sequence[str]) -> str | None:
    """The reason why columns of a row group are not to be unpacked; None where they may be."""
    for chunk in [] if _is_small(group) else _chunks(group, columns):
        packed, unpacked = chunk.total_compressed_size, chunk.total_uncompressed_size
        if unpacked > max(_BOMB_BYTES, _BOMB_RATIO * packed):
            return f"a decompression bomb: {packed} bytes of the table unpack to {unpacked}"
    return None


def _rows_at_once(group: Any, columns: Sequence[str], most: int) -> int:
    """The number of rows of a row group to read at a time."""
    if _is_small(group):
        size = group.total_byte_size
    else:
        size = sum(chunk.total_uncompressed_size for chunk in _chunks(group, columns))
    return max(1, min(most, _SLICE_BYTES * group.num_rows // max(1, size)))


def _may_hold_images(kind: Any) -> bool:
    """Whether cells of this Arrow type are what `ParquetCell` reads, or paths."""
    arrow, _ = pyarrow()
    values = _values(kind)
    if not arrow.types.is_struct(values):
        return _is_text_or_bytes(values)
    fields = {field.name: _values(field.type) for field in values}
    return _is_text_or_bytes(fields["bytes"]) if "bytes" in fields else str(fields.get("path")) in _TEXT


def _is_text_or_bytes(values: Any) -> bool:
    arrow, _ = pyarrow()
    return str(values) in _BINARY | _TEXT or arrow.types.is_fixed_size_binary(values)


def _values(kind: Any) -> Any:
    """The type of a column's values: that of a dictionary's, or an extension's storage, where `kind` is one."""
    arrow, _ = pyarrow()
    if isinstance(kind, arrow.BaseExtensionType):
        return _values(kind.storage_type)
    return kind.value_type if arrow.types.is_dictionary(kind) else kind


class _Column:
    """A column of a row group, read ahead in slices.

    Rows are asked for in order, or nearly so where several threads ask. The last slices stay in memory. A row before
    them makes the group be read again from its beginning. Rows behind a damaged page fail without being looked for.

    A slice that takes too much memory is read again row by row. Arrow does not go on behind a row that still does.
    """

    def __init__(self, file: str, group: int, column: str) -> None:
        self._place = (file, group, column)
        self._lock = Lock()
        self._by_row = False
        self._damage: tuple[int, Exception] | None = None  # the first row that cannot be read, and why
        self._rewind()

    def _rewind(self) -> None:
        file, group, column = self._place
        opened = pyarrow()[1].ParquetFile(file, memory_map=True)  # reads slices, not the whole column
        size = 1 if self._by_row else _rows_at_once(opened.metadata.row_group(group), [column], _SLICE)
        self._coming: Iterator[Any] = opened.iter_batches(size, row_groups=[group], columns=[column])
        kept = 2 if self._by_row else max(2, -(-_KEPT // size))
        self._slices: deque[tuple[int, Any]] = deque(maxlen=kept)  # each with the number of its first row
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
        if self._damage is not None and row >= self._damage[0]:
            raise self._damage[1].with_traceback(None)
        if self._slices and row < self._slices[0][0]:
            self._rewind()
        try:
            while row >= self._next:
                batch = next(self._coming, None)
                if batch is None:
                    raise ValueError("the table ends before this row")
                rows = batch.column(0)
                self._slices.append((self._next, rows))
                self._next += len(rows)
        except MemoryError:
            if self._by_row:
                place = f"row {self._next} of row group {self._place[1]}"
                self._damage = self._next, MemoryError(f"{place} takes too much memory, and those behind it are lost")
            self._by_row = True
            self._rewind()
            return self._slice(row)
        except Exception as error:
            if not may_pass(error):
                self._damage = self._next, error
            self._rewind()  # a broken stream counts as ended
            raise
        return next(found for found in reversed(self._slices) if found[0] <= row)


_column = lru_cache(maxsize=2)(_Column)  # two, since threads at a group's end ask for two groups
