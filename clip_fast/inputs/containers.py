"""What a container is: a file that holds many images, such as a tar or a table.

A new kind of container is a class with these members in a file of its own, and an entry in `inputs.CONTAINERS`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Protocol, Self

from .items import Item

IMAGE_COLUMN = "image"


@dataclass(frozen=True)
class Columns:
    """The columns of a table that hold the images and, where there is one, the rows' keys."""

    image: str = IMAGE_COLUMN
    key: str | None = None


class Container(Protocol):
    """A file with images in it, at `path`; iterating gives the same items in the same order each time.

    A container is a frozen dataclass, so that it can be sent to another process and given an absolute path.

    Iterating raises OSError where the file cannot be read at the moment. A file that will never be readable gives one
    `Unreadable` item.
    """

    suffix: ClassVar[str]  # of the files that are of this kind, with its dot; in names, in letters of any case

    @property
    def path(self) -> str: ...

    @classmethod
    def named(cls, path: str, columns: Columns) -> Self:
        """The container at `path`."""
        ...

    @classmethod
    def around(cls, location: str, columns: Columns) -> Self | None:
        """The container that an item's `location` lies in; None where it is of another kind."""
        ...

    def count(self) -> int | None:
        """The number of items, or None where only iterating tells."""
        ...

    def __iter__(self) -> Iterator[Item]: ...
