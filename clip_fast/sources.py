"""Where images come from: files, folders, patterns, lists of paths, webdataset tars and parquet files.

    inputs = find_inputs(["photos", "shards/{0000..0099}.tar", "table.parquet"])
    for item in inputs:
        with Image.open(item.source()) as image: ...

An `Item` is one image's place, small enough to be sent to another process; its bytes are read where it is decoded.
Going through `Inputs` again gives the same items in the same order. What cannot be read is an `Unreadable` item in its
place, so that every input has its row. An exception is only what may pass, such as a disk that does not answer while a
tar is listed: a row in its place would move all rows after it, and stay.
"""

from __future__ import annotations

import errno
import glob
import io
import os
import re
import stat
import tarfile
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from threading import Lock
from types import ModuleType
from typing import Any, BinaryIO

from PIL import Image

TAR_SUFFIX = ".tar"
PARQUET_SUFFIX = ".parquet"
IMAGE_COLUMN = "image"

_BRACES = re.compile(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}")  # {0000..0099} or {train,test}
_NO_IMAGES = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}  # Pillow knows them, and needs other programs to read them
_HERE = os.path.join(os.curdir, "")
_TAR_BLOCK = 512  # bytes; at least one of zeros ends an archive
_TAR_END = 1 << 20  # at most as many bytes of zeros; tar pads to 10 KiB
_SLICE = 64  # rows of a parquet file that are read at a time
_BINARY = {"binary", "large_binary", "binary_view", "null"}  # Arrow's types that hold images, but for text and structs
_TEXT = {"string", "large_string", "string_view"}

# Of an OSError: what will be the same another time. EINVAL is of a tar whose sizes lead beyond what a file may have.
_LASTING = {
    errno.ENOENT,
    errno.EISDIR,
    errno.ENOTDIR,
    errno.EACCES,
    errno.EPERM,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENXIO,
    errno.EINVAL,
}


# --- Items -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Item:
    """One image: the `key` that its row is known by, and where it lies, for people."""

    key: str
    location: str

    def source(self) -> Path | io.BytesIO:
        """What `Image.open` takes.

        Raises:
            OSError, ValueError: where it cannot be read.
        """
        raise NotImplementedError

    def prepare(self) -> None:
        """Does what takes `source` long for no fault of the image; raises what `source` raises. May be left out."""


@dataclass(frozen=True, slots=True)
class ImageFile(Item):
    """A file; key and location are its path unless a table names them otherwise."""

    def source(self) -> Path:
        path = Path(self.location)
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for its other end
            raise ValueError("not a regular file")
        if not status.st_size:
            raise ValueError("not an image: zero bytes")
        return path


@dataclass(frozen=True, slots=True)
class TarMember(Item):
    """A member of an uncompressed tar: `size` bytes from `offset`; its key is the webdataset key."""

    tar: str
    offset: int
    size: int

    def source(self) -> io.BytesIO:
        with open(self.tar, "rb") as file:
            file.seek(self.offset)
            return _image_bytes(file.read(self.size), self.size)


@dataclass(frozen=True, slots=True)
class ParquetCell(Item):
    """Bytes, or Hugging Face's {bytes, path}, in a column of a parquet file."""

    file: str
    column: str
    group: int
    row: int  # in its row group
    folder: str = ""  # that a path in it is relative to, by default the working one

    def prepare(self) -> None:
        _column(self.file, self.group, self.column).seek(self.row)  # through the rows before it

    def source(self) -> Path | io.BytesIO:
        value: bytes | dict[str, Any] | None = _column(self.file, self.group, self.column)[self.row]
        data, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
        if data is not None:
            return _image_bytes(data, len(data))
        if path is not None:
            return ImageFile(self.key, os.path.join(self.folder, path)).source()
        raise ValueError("not an image: null")


@dataclass(frozen=True, slots=True)
class Unreadable(Item):
    """Stands for what is known not to be readable."""

    reason: str

    def source(self) -> Path:
        raise ValueError(self.reason)


def _image_bytes(data: bytes, size: int) -> io.BytesIO:
    if not size:
        raise ValueError("not an image: zero bytes")
    if len(data) < size:
        raise ValueError(f"the archive ends inside it, after {len(data)} of {size} bytes")
    return io.BytesIO(data)


# --- Which items -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Failure:
    """A path that gave no embedding, and why."""

    path: str
    reason: str

    def __str__(self) -> str:
        return f"{printable(self.path)}: {printable(self.reason)}"


@dataclass(frozen=True)
class Inputs:
    """Items in a fixed order, from files, tars and parquet files; tars and parquet files are read as it is iterated.

    Raises:
        OSError: as it is iterated or counted, where a tar or a parquet file cannot be read at the moment.
    """

    parts: list[Files | Tar | Parquet]

    def __iter__(self) -> Iterator[Item]:
        for part in self.parts:
            yield from part

    def expected(self) -> int:
        """The number of items: exact, but for tars, whose samples are taken to be as large as those of the first."""
        exact = sum(part.count() for part in self.parts if isinstance(part, Parquet))
        exact += sum(len(part.places) for part in self.parts if isinstance(part, Files))
        tars = [part for part in self.parts if isinstance(part, Tar) and os.path.isfile(part.path)]
        if not tars:
            return exact
        first = sum(1 for _ in tars[0])
        return exact + round(
            first * sum(os.path.getsize(tar.path) for tar in tars) / max(os.path.getsize(tars[0].path), 1)
        )


@dataclass(frozen=True)
class Files:
    """Files by their paths, for which a string each is enough, and what else there is, as items."""

    places: Sequence[str | Item]

    def __iter__(self) -> Iterator[Item]:
        for place in self.places:
            yield ImageFile(place, place) if isinstance(place, str) else place


@dataclass(frozen=True)
class Tar:
    """The images in an uncompressed tar, in its order, by the suffixes that Pillow reads.

    As webdataset has it, a sample's key is the member's path up to the first dot of its name, and what has nothing
    before that dot is no sample. A sample that is no whole file in it, but a link, is unreadable.
    """

    path: str

    def __iter__(self) -> Iterator[Item]:
        suffixes = image_suffixes()
        try:
            with tarfile.open(self.path, "r:") as tar:
                for member in tar:
                    tar.members = []  # pyright: ignore[reportAttributeAccessIssue]  # or all would be kept
                    folder, name = os.path.split(member.name)
                    sample = name.partition(".")[0]
                    if not sample or member.isdir() or os.path.splitext(name)[1].lower() not in suffixes:
                        continue
                    key, location = os.path.join(folder, sample), f"{self.path}/{member.name}"
                    kind = _kind_of(member)
                    if kind:
                        yield Unreadable(key, location, f"{kind} in the archive")
                    else:
                        yield TarMember(key, location, self.path, member.offset_data, member.size)
                self._check_end(tar.offset)
        except (tarfile.TarError, OSError, ValueError, OverflowError) as error:  # tarfile's own, and what escapes it
            if _may_pass(error):
                raise
            yield Unreadable(self.path, self.path, f"not a readable, uncompressed tar: {reason_of(error)}")

    def _check_end(self, offset: int) -> None:
        """Refuses an archive that does not end at `offset`, where `tarfile` stopped: it says nothing of a cut, or of a
        damaged header, after which members are lost."""
        with open(self.path, "rb") as file:
            file.seek(offset)
            end = file.read(_TAR_END + 1)
        if not _TAR_BLOCK <= len(end) <= _TAR_END or end.strip(b"\0"):
            raise tarfile.ReadError(f"cut or damaged at byte {offset}, and what may follow is lost")


def _kind_of(member: tarfile.TarInfo) -> str | None:
    """What a member is whose bytes do not simply follow its header; None where they do."""
    if member.issparse():
        return "a sparse file"
    if member.islnk() or member.issym():
        return "a link"
    return None if member.isreg() else "no regular file"


@dataclass(frozen=True)
class Parquet:
    """The images in `column` of a parquet file: their bytes, Hugging Face's {bytes, path}, or paths to them.

    Keys come from `key_column`; without one they are paths, or the file's name and the row's number.
    """

    path: str
    column: str = IMAGE_COLUMN
    key_column: str | None = None

    def count(self) -> int:
        try:
            return _pyarrow_parquet().read_metadata(self.path).num_rows
        except _parquet_errors() as error:
            if _may_pass(error):
                raise
            return 1

    def __iter__(self) -> Iterator[Item]:
        try:
            yield from self._items()
        except _parquet_errors() as error:
            if _may_pass(error):
                raise
            yield Unreadable(self.path, self.path, f"not a readable parquet file: {reason_of(error)}")

    def _items(self) -> Iterator[Item]:
        row = 0
        with _pyarrow_parquet().ParquetFile(self.path) as file:
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


def find_inputs(
    arguments: Iterable[str | os.PathLike[str]],
    *,
    image_column: str = IMAGE_COLUMN,
    key_column: str | None = None,
) -> Inputs:
    """What `arguments` name, in their order, each file once.

    Files, folders and patterns as `find_images` takes them; a file ending in `.tar` is read as a webdataset, one ending
    in `.parquet` as a table. Braces stand for each of `{0000..0099}` or `{train,test}`, as the shell expands them.
    """
    parts: list[Files | Tar | Parquet] = []
    places: list[str | Item] = []
    find = _Finder()
    for found in (each for name in _without_braces(arguments) for each in find(name)):
        if isinstance(found, Failure):
            places.append(Unreadable(found.path, found.path, found.reason))
        elif found.endswith((TAR_SUFFIX, PARQUET_SUFFIX)):
            container = Tar(found) if found.endswith(TAR_SUFFIX) else Parquet(found, image_column, key_column)
            parts += [Files(places), container] if places else [container]
            places = []
        else:
            places.append(found)
    return Inputs([*parts, Files(places)] if places else parts)


def item_at(location: str, image_column: str = IMAGE_COLUMN) -> Item:
    """The item that lies at an item's `location`: a path, a member of a tar, or a row of a parquet file.

    Raises:
        FileNotFoundError: there is none any more.
    """
    if os.path.exists(location):
        return ImageFile(location, location)
    tar, found, _ = location.partition(f"{TAR_SUFFIX}/")
    file, numbered, row = location.rpartition("#")
    container: Tar | Parquet | None = None
    if found:
        container = Tar(tar + TAR_SUFFIX)
    elif numbered and row.isdecimal() and file.endswith(PARQUET_SUFFIX):
        container = Parquet(file, image_column)
    for item in container or ():
        if item.location == location:
            return item
    raise FileNotFoundError(errno.ENOENT, "No such file or directory", location)


def read_list(file: BinaryIO) -> list[str]:
    """The paths in a file, one a line; or between zero bytes where there are any, as `find -print0` writes them."""
    data = file.read()
    entries = data.split(b"\0") if b"\0" in data else [line.rstrip(b"\r") for line in data.split(b"\n")]
    return [os.fsdecode(entry) for entry in entries if entry]


def _without_braces(arguments: Iterable[str | os.PathLike[str]]) -> Iterator[str]:
    """Arguments with their braces written out, but for those that name something as they are."""
    for argument in arguments:
        name = os.fspath(argument)
        if "{" in name and not os.path.lexists(name):
            yield from dict.fromkeys(_written_out(name))  # braces in braces give some twice
        else:
            yield name


def _written_out(pattern: str) -> Iterator[str]:
    """What the braces of `pattern` stand for; where an end of a range has zeros in front, all are as wide."""
    found = _BRACES.search(pattern)
    if not found:
        yield pattern
        return
    first, last, words = found.groups()
    if words is None:
        padded = any(len(end) > 1 and end[0] == "0" for end in (first, last))
        width = max(len(first), len(last)) if padded else 1
        step = 1 if int(first) <= int(last) else -1
        inside = [f"{number:0{width}d}" for number in range(int(first), int(last) + step, step)]
    else:
        inside = words.split(",")
    for each in inside:
        yield from _written_out(pattern[: found.start()] + each + pattern[found.end() :])


# --- Files -----------------------------------------------------------------------------------------------------------


def find_images(arguments: Iterable[str | os.PathLike[str]]) -> tuple[list[Path], list[Failure]]:
    """The files that `arguments` name, each once, in the order of the arguments.

    A folder stands for the files below it with the suffix of an image format that Pillow reads, sorted by path; links
    are followed. A pattern (`*`, `?`, `[...]`, and `**` for any depth) that is not itself a file's name stands for what
    it matches, sorted, as if the shell had expanded it. A file named or matched is taken whatever its suffix.

    A file reached twice keeps its first place; links to one file are several files. Failures are arguments that stand
    for no file and folders that cannot be listed.
    """
    find = _Finder()
    found = [each for argument in arguments for each in find(os.fspath(argument))]
    failures = [each for each in found if isinstance(each, Failure)]
    return [Path(each) for each in found if isinstance(each, str)], failures


class _Finder:
    """The paths of the files that an argument names, but for those that an earlier argument named; and failures."""

    def __init__(self) -> None:
        self._seen: set[str] = set()
        self._real = cache(os.path.realpath)  # of folders

    def __call__(self, argument: str) -> Iterator[str | Failure]:
        is_folder = _is_folder(argument)
        if is_folder is not None:
            named = {str(Path(argument)): is_folder}
        else:
            matched = _sorted(str(Path(name)) for name in glob.glob(argument, recursive=True))
            named = {path: os.path.isdir(path) for path in matched}
        nothing = True
        for path, is_folder in named.items():
            for found in self._below(path) if is_folder else [path]:
                nothing = False
                if isinstance(found, Failure) or self._is_new(found):
                    yield found
        if nothing:
            yield Failure(argument, _nothing_in(named))

    def _is_new(self, path: str) -> bool:
        folder, name = os.path.split(path)
        before = len(self._seen)
        self._seen.add(os.path.join(self._real(folder), name))
        return len(self._seen) > before

    def _below(self, folder: str) -> Iterator[str | Failure]:
        suffixes = image_suffixes()
        entered = {os.path.realpath(folder)}  # a link may lead back up
        images: list[str] = []
        failures: list[Failure] = []

        def cannot_list(error: OSError) -> None:
            failures.append(Failure(str(error.filename), reason_of(error)))

        for root, folders, files in os.walk(folder, onerror=cannot_list, followlinks=True):
            images += [os.path.join(root, name) for name in files if os.path.splitext(name)[1].lower() in suffixes]
            below = {name: os.path.realpath(os.path.join(root, name)) for name in sorted(folders)}
            folders[:] = [name for name, real in below.items() if real not in entered]
            entered.update(below.values())
        yield from failures
        yield from _sorted(image.removeprefix(_HERE) for image in images)


def _nothing_in(folders: Collection[str]) -> str:
    """Why an argument that stands for `folders` gives no file."""
    if not folders:
        return "no such file or folder"
    names = (name for folder in folders for _, _, files in os.walk(folder) for name in files)
    if any(name.endswith((TAR_SUFFIX, PARQUET_SUFFIX)) for name in names):
        return f"no image below it; {TAR_SUFFIX} and {PARQUET_SUFFIX} files are to be named themselves"
    return "no image below it"


@cache
def image_suffixes() -> frozenset[str]:
    """The suffixes of the formats that Pillow reads, in lower case, with their dot."""
    readable = Image.registered_extensions().items()  # first: it imports the formats
    return frozenset(suffix for suffix, name in readable if name in Image.OPEN.keys() - _NO_IMAGES)


def _is_folder(path: str) -> bool | None:
    """None where there is nothing; asks once, since a list may name millions of files."""
    try:
        return stat.S_ISDIR(os.stat(path).st_mode)
    except (OSError, ValueError):
        return False if os.path.lexists(path) else None  # a link that leads nowhere is a file that cannot be read


def _sorted(paths: Iterable[str]) -> list[str]:
    """In the order of their parts: a folder's files stand together, before those of a folder that its name begins."""
    return sorted(paths, key=lambda path: path.replace(os.sep, "\0"))


# --- Words -----------------------------------------------------------------------------------------------------------


def printable(text: str) -> str:
    """`text` on one line: control characters, line breaks and undecodable bytes as backslash escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def reason_of(error: Exception) -> str:
    """What went wrong, in a line for people."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__


def _may_pass(error: Exception) -> bool:
    """Whether reading may succeed another time. Readers give no number where the contents are to blame."""
    return isinstance(error, OSError) and error.errno is not None and error.errno not in _LASTING


# --- Parquet ---------------------------------------------------------------------------------------------------------


def pyarrow() -> tuple[ModuleType, ModuleType]:
    """pyarrow and pyarrow.parquet.

    Raises:
        ImportError: where they are not installed; it names the extra.
    """
    try:
        import pyarrow  # pyright: ignore[reportMissingTypeStubs]
        import pyarrow.parquet  # pyright: ignore[reportMissingTypeStubs]
    except ImportError as error:
        raise ImportError("parquet, and shards with it, need pyarrow: pip install clip-fast[parquet]") from error
    return pyarrow, pyarrow.parquet


def _pyarrow_parquet() -> ModuleType:
    return pyarrow()[1]


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
    """The type of the values where `kind` is a dictionary or an extension of it."""
    arrow, _ = pyarrow()
    if isinstance(kind, arrow.BaseExtensionType):
        return _values(kind.storage_type)
    return kind.value_type if arrow.types.is_dictionary(kind) else kind


class _Column:
    """A column of a row group, whose rows are asked for in order, or nearly so where threads ask.

    The last two slices are in memory; who asks for a row before them waits for the group to be read from its beginning.
    """

    def __init__(self, file: str, group: int, column: str) -> None:
        self._place = (file, group, column)
        self._lock = Lock()
        self._rewind()

    def _rewind(self) -> None:
        file, group, column = self._place
        opened = _pyarrow_parquet().ParquetFile(file, memory_map=True)  # or the whole column would be read at once
        self._coming: Iterator[Any] = opened.iter_batches(_SLICE, row_groups=[group], columns=[column])
        self._slices: deque[tuple[int, Any]] = deque(maxlen=2)  # each with the number of its first row
        self._next = 0

    def __getitem__(self, row: int) -> Any:
        with self._lock:
            start, rows = self._slice(row)
            return rows[row - start].as_py()

    def seek(self, row: int) -> None:
        """Has the row in memory for who asks next."""
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
            self._rewind()  # a stream that broke is at its end, and other rows are to fail for the same reason
            raise
        return next(found for found in reversed(self._slices) if found[0] <= row)


_column = lru_cache(maxsize=2)(_Column)  # while their rows are asked for; two, for threads at a group's end
