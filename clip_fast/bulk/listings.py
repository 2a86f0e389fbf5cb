"""Listings of tars, kept in the output folder: what is in a tar is not looked for again.

    OUTPUT/listings/<digest of the tar's path>.parquet      key, name, offset, size, problem of each item

`--resume`, `search --html` and the processes of `--devices` read them. A listing holds while its tar has the size and
the times that it had. A listing that is damaged is as good as none.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

import PIL

from ..extras import pyarrow
from ..inputs.containers import Container
from ..inputs.inputs import Inputs
from ..inputs.items import Item, Unreadable
from ..inputs.tars import Tar, TarMember
from ..version import __version__
from .atomic import NewFile

LISTINGS_FOLDER = "listings"

_STAMP = b"clip_fast"  # key in the parquet footer, under which stands what the listing is of
_ROWS = 1 << 14  # that are put into Python's objects, or written, at once


def with_listings(inputs: Inputs, folder: Path) -> Inputs:
    """`inputs` whose tars are listed once, for this output folder."""
    listings = folder / LISTINGS_FOLDER
    return replace(inputs, parts=[_listed(part, listings) if isinstance(part, Tar) else part for part in inputs.parts])


def listed(container: Container, folder: Path) -> Container:
    """`container` as an earlier run has listed it for the output folder `folder`, if it did."""
    listings = folder / LISTINGS_FOLDER
    return _listed(container, listings) if isinstance(container, Tar) and listings.is_dir() else container


def _listed(tar: Tar, listings: Path) -> ListedTar:
    name = sha256(tar.path.encode("utf-8", "surrogatepass")).hexdigest()[:32]
    return ListedTar(tar.path, str(listings / f"{name}.parquet"))


@dataclass(frozen=True)
class ListedTar(Tar):
    """A tar whose listing is kept in the file `listing`, once it has been gone through to its end."""

    listing: str

    def count(self) -> int | None:
        """The number of items, where the listing is there."""
        table = self._read()
        return None if table is None else table.num_rows

    def __iter__(self) -> Iterator[Item]:
        table = self._read()
        if table is None:
            yield from self._list()
            return
        for batch in table.to_batches(_ROWS):
            for row in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                yield self._item(*row)

    def _read(self) -> Any:
        """The listing as a table; None where there is none, or one of other bytes."""
        arrow, parquet = pyarrow()
        stamp = self._stamp()
        if stamp is None or not os.path.exists(self.listing):
            return None
        try:
            with parquet.ParquetFile(self.listing, page_checksum_verification=True) as file:
                if file.schema_arrow.metadata[_STAMP] != stamp or not file.schema_arrow.equals(_schema(arrow)):
                    return None
                table, facts = file.read(), file.metadata
                # The footer, which has the columns' types and counts the rows twice, has no checksum.
                rows = sum(facts.row_group(group).num_rows for group in range(facts.num_row_groups))
                return table if table.num_rows == rows == facts.num_rows else None
        except Exception:  # pyarrow raises whatever its parsing stumbles on; the tar is listed anew
            return None

    def _list(self) -> Iterator[Item]:
        """The tar's items, and their listing once they are at their end."""
        arrow, parquet = pyarrow()
        stamp = self._stamp()
        schema = _schema(arrow).with_metadata({_STAMP: stamp or b""})
        try:
            os.makedirs(os.path.dirname(self.listing), exist_ok=True)
            new = NewFile(Path(self.listing))
        except OSError:  # as on a disk that is for reading only
            yield from super().__iter__()
            return
        try:
            with parquet.ParquetWriter(new.file, schema, compression="zstd", write_page_checksum=True) as writer:
                items = super().__iter__()
                while rows := list(islice(items, _ROWS)):
                    columns = zip(*map(self._row, rows), strict=True)
                    writer.write_batch(arrow.record_batch([*columns], schema=schema))
                    yield from rows
            if stamp is not None and stamp == self._stamp():  # else it was changed meanwhile
                new.finish()
                new.move()
        finally:
            new.discard()

    def _stamp(self) -> bytes | None:
        """All that a listing depends on, or None where there is no file."""
        try:
            status = os.stat(self.path)
        except OSError:
            return None
        facts = {"size": status.st_size, "changed": [status.st_mtime_ns, status.st_ctime_ns], "path": self.path}
        return json.dumps({**facts, "pillow": PIL.__version__, "clip_fast": __version__}).encode()

    def _row(self, item: Item) -> tuple[bytes, bytes | None, int, int, bytes | None]:
        """An item as a row: the name of an item that is the tar itself is null, so is the problem of an image."""
        name = None if item.location == self.path else _bytes(item.location.removeprefix(f"{self.path}/"))
        offset, size = (item.offset, item.size) if isinstance(item, TarMember) else (0, 0)
        problem = _bytes(item.reason) if isinstance(item, Unreadable) else None
        return _bytes(item.key), name, offset, size, problem

    def _item(self, key: bytes, name: bytes | None, offset: int, size: int, problem: bytes | None) -> Item:
        location = self.path if name is None else f"{self.path}/{_text(name)}"
        if problem is not None:
            return Unreadable(_text(key), location, _text(problem))
        return TarMember(_text(key), location, self.path, offset, size)


def _schema(arrow: Any) -> Any:
    """The columns of a listing."""
    types = {"key": arrow.binary(), "name": arrow.binary(), "offset": arrow.int64(), "size": arrow.int64()}
    return arrow.schema({**types, "problem": arrow.binary()})


def _bytes(text: str) -> bytes:
    """Text as it stands in a listing: a name in a tar may have bytes that are no text, which are surrogates here."""
    return text.encode("utf-8", "surrogatepass")


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogatepass")
