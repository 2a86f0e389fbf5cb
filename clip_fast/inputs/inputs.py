"""All inputs of a job: files, folders, patterns, lists of paths, webdataset tars and parquet files.

    inputs = find_inputs(["photos", "shards/{0000..0099}.tar", "table.parquet"])
    for item in inputs:
        with item.open() as image: ...

Going through `Inputs` again gives the same items in the same order. An input that cannot be read keeps its place as an
`Unreadable` item. Only a failure that may pass is an exception, such as a disk that does not answer while a tar is
listed: a row in its place would move all later rows, for good.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice

from .containers import IMAGE_COLUMN, Columns, Container
from .finder import Finder, without_braces
from .items import Failure, ImageFile, Item, Unreadable
from .parquet import Parquet
from .tars import Tar

CONTAINERS: tuple[type[Container], ...] = (Tar, Parquet)


@dataclass(frozen=True)
class Files:
    """Single files: a path each, or an item where a path is not enough."""

    places: Sequence[str | Item]

    def __iter__(self) -> Iterator[Item]:
        for place in self.places:
            yield ImageFile(place, place) if isinstance(place, str) else place

    def count(self) -> int:
        return len(self.places)


@dataclass(frozen=True)
class Inputs:
    """Items in a fixed order. Containers are read as it is iterated.

    `passed_over` counts the files in folders that are not among the items, by their suffix in lower case.

    Raises:
        OSError: while it is iterated or counted, where a container cannot be read at the moment.
    """

    parts: Sequence[Files | Container]
    passed_over: Mapping[str, int] = field(default_factory=dict[str, int])

    def __iter__(self) -> Iterator[Item]:
        for part in self.parts:
            yield from part

    def expected(self) -> int:
        """The number of items. Parts that are not counted are taken to be as dense as the first of them."""
        counts = [part.count() for part in self.parts]
        total = sum(count for count in counts if count is not None)
        uncounted = [
            part
            for part, count in zip(self.parts, counts, strict=True)
            if count is None and not isinstance(part, Files) and os.path.isfile(part.path)
        ]
        if not uncounted:
            return total
        sizes = [os.path.getsize(part.path) for part in uncounted]
        return total + round(sum(1 for _ in uncounted[0]) * sum(sizes) / max(sizes[0], 1))


@dataclass(frozen=True)
class Span:
    """Items `start` to `stop` of one of the parts of `Inputs`."""

    part: int
    start: int
    stop: int


def spans_of(inputs: Inputs, size: int) -> Iterator[list[Span]]:
    """The spans of each `size` items that follow each other; of the last, fewer may be left."""
    spans: list[Span] = []
    room = size
    for number, part in enumerate(inputs.parts):
        count = part.count()
        start, stop = 0, sum(1 for _ in part) if count is None else count
        while start < stop:
            spans.append(Span(number, start, min(stop, start + room)))
            room -= spans[-1].stop - start
            start = spans[-1].stop
            if not room:
                yield spans
                spans, room = [], size
    if spans:
        yield spans


class SpanReader:
    """Gives the items of spans in their order. Of the items between, only those in the same part are gone through."""

    def __init__(self, inputs: Inputs) -> None:
        self._inputs = inputs
        self._part = -1
        self._at = 0
        self._items: Iterator[Item] = iter(())

    def read(self, span: Span) -> list[Item]:
        """The items of a span.

        Raises:
            ValueError: the part has fewer items than when it was dealt.
        """
        if span.part != self._part:
            self._part, self._at, self._items = span.part, 0, iter(self._inputs.parts[span.part])
        items = list(islice(self._items, span.start - self._at, span.stop - self._at))
        part = self._inputs.parts[span.part]
        if len(items) < span.stop - span.start and not isinstance(part, Files):
            raise ValueError(f"{part.path} has fewer images than when they were counted: it has changed meanwhile")
        self._at = span.stop
        return items


def find_inputs(
    arguments: Iterable[str | os.PathLike[str]],
    *,
    image_column: str = IMAGE_COLUMN,
    key_column: str | None = None,
) -> Inputs:
    """The inputs that `arguments` name, in their order, each file once.

    A folder stands for the files below it with the suffix of an image format that Pillow reads, sorted by path; links
    are followed. A pattern (`*`, `?`, `[...]`, and `**` for any depth) that is not itself a file's name stands for
    what it matches, sorted, as if the shell had expanded it. Braces stand for each of `{0000..0099}` or `{train,test}`,
    as in the shell. In an `ExactPath` neither is seen. A file ending in `.tar` is read as a webdataset, one ending in
    `.parquet` as a table, in letters of any case. Any other file that is named or matched is taken as an image,
    whatever its suffix.

    What a NAS or a Mac keeps beside photographs (`@eaDir`, `._photo.jpg`) is left out in folders, and of what a pattern
    matches. Other files in folders that have no image's suffix are counted in `Inputs.passed_over`, each once.

    A file that is reached twice keeps its first place; links to one file are several files. An argument that stands
    for no file, and a folder that cannot be listed, are `Unreadable` items.

    Raises:
        OSError: a folder cannot be listed at the moment.
    """
    columns = Columns(image_column, key_column)
    parts: list[Files | Container] = []
    places: list[str | Item] = []
    find = Finder(tuple(kind.suffix for kind in CONTAINERS))
    names = without_braces(arguments)
    for found in (each for name in names for each in ([name] if isinstance(name, Failure) else find(name))):
        if isinstance(found, Failure):
            places.append(Unreadable(found.path, found.path, found.reason))
            continue
        kind = next((kind for kind in CONTAINERS if found.lower().endswith(kind.suffix)), None)
        if kind is None:
            places.append(found)
            continue
        parts += [Files(places)] if places else []
        parts.append(kind.named(found, columns))
        places = []
    return Inputs([*parts, Files(places)] if places else parts, find.passed_over)


def items_at(
    locations: Iterable[str],
    image_column: str = IMAGE_COLUMN,
    reading: Callable[[Container], Iterable[Item]] = iter,
) -> dict[str, Item]:
    """The items at `locations`: paths, members of tars, rows of parquet files. Those that are gone are left out.

    A container is listed once. One that cannot be read has no items. `reading` gives a container's items.
    """
    columns = Columns(image_column)
    found: dict[str, Item] = {}
    inside: dict[Container, set[str]] = {}
    for location in locations:
        if os.path.exists(location):
            found[location] = ImageFile(location, location)
        elif container := next(filter(None, (kind.around(location, columns) for kind in CONTAINERS)), None):
            inside.setdefault(container, set()).add(location)
    for container, wanted in inside.items():
        with suppress(OSError):
            for item in reading(container):
                if item.location in wanted:
                    found[item.location] = item
                    wanted.discard(item.location)
                if not wanted:
                    break
    return found
