"""Which images arguments stand for, and how their bytes are read."""

from __future__ import annotations

import base64
import bz2
import datetime
import errno
import gzip
import inspect
import io
import itertools
import lzma
import os
import pickle
import random
import sys
import tarfile
import tracemalloc
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from clip_fast.errors import printable
from clip_fast.inputs import parquet, tars
from clip_fast.inputs.finder import read_list
from clip_fast.inputs.inputs import Files, Inputs, find_inputs, items_at
from clip_fast.inputs.items import Failure, ImageFile, Item, Unreadable
from clip_fast.inputs.parquet import ParquetCell
from clip_fast.inputs.tars import TarMember


def save(path: Path, value: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (5, 4), (value, 1, 2)).save(path, "PNG")
    return path


def png(value: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (5, 4), (value, 1, 2)).save(file, "PNG")
    return file.getvalue()


def value_of(item: Item) -> int:
    """What the image was saved with, as another process would read it."""
    with Image.open(pickle.loads(pickle.dumps(item)).source()) as image:
        pixel = image.getpixel((0, 0))
    assert isinstance(pixel, tuple)
    return int(pixel[0])


# --- find_images -----------------------------------------------------------------------------------------------------


def find_images(arguments: Iterable[str | Path]) -> tuple[list[Path], list[Failure]]:
    """The files that arguments name, and the arguments and folders that give none."""
    items = list(find_inputs(arguments))
    failures = [Failure(item.location, item.reason) for item in items if isinstance(item, Unreadable)]
    return [Path(item.location) for item in items if isinstance(item, ImageFile)], failures


def found(*arguments: str | Path) -> list[str]:
    paths, failures = find_images(arguments)
    assert not failures
    return [path.as_posix() for path in paths]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with images at several depths and other files."""
    for name in ("photos/b.png", "photos/a.JPG", "photos/b/2.webp", "photos/b/10.tiff", "photos/x.jpg/c.gif", "z.png"):
        save(tmp_path / name)
    for name in ("photos/notes.txt", "photos/b/data.pdf", "photos/none"):
        (tmp_path / name).write_text("no image")
    monkeypatch.chdir(tmp_path)
    return tmp_path


IN_PHOTOS = ["photos/a.JPG", "photos/b/10.tiff", "photos/b/2.webp", "photos/b.png", "photos/x.jpg/c.gif"]


def test_a_folder_is_searched_in_depth_by_suffix_and_sorted_by_path(folder: Path) -> None:
    assert found("photos") == IN_PHOTOS


def test_formats_that_pillow_knows_and_cannot_read_are_not_looked_for(folder: Path) -> None:
    for suffix in ("bufr", "emf", "eps", "grib", "h5", "hdf", "mpeg", "mpg", "ps", "wmf"):
        (folder / "photos" / f"x.{suffix}").write_bytes(b"no image")
    assert found("photos") == IN_PHOTOS
    assert found("photos/x.mpg") == ["photos/x.mpg"]


def test_a_working_folder_gives_plain_names(folder: Path) -> None:
    assert found(".") == [*IN_PHOTOS, "z.png"]
    assert found("./photos//b/") == IN_PHOTOS[1:3]


def test_a_folder_stands_before_what_its_name_begins(folder: Path) -> None:
    for name in ("n/a/1.png", "n/a b/2.png", "n/a-3.png", "n/a.png"):
        save(folder / name)
    assert found("n") == ["n/a/1.png", "n/a b/2.png", "n/a-3.png", "n/a.png"]


def test_arguments_keep_their_order(folder: Path) -> None:
    assert found("z.png", "photos/b", "photos/a.JPG") == ["z.png", *IN_PHOTOS[1:3], "photos/a.JPG"]


def test_a_named_file_is_taken_whatever_its_suffix(folder: Path) -> None:
    assert found("photos/none", "photos/notes.txt") == ["photos/none", "photos/notes.txt"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("photos/*.png", ["photos/b.png"]),
        ("photos/?.*", ["photos/a.JPG", "photos/b.png", "photos/x.jpg/c.gif"]),  # a matched folder is a folder
        ("photos/**/*.[tw]*", ["photos/b/10.tiff", "photos/b/2.webp", "photos/notes.txt"]),
        ("**/*.png", ["photos/b.png", "z.png"]),
        ("photos/b.*/**", ["photos/b.*/**"]),  # no folder
        ("photos/*/**", [*IN_PHOTOS[1:3], "photos/b/data.pdf", "photos/x.jpg/c.gif"]),
        ("photos/x*/", ["photos/x.jpg/c.gif"]),
        ("./photos//**/**/b/./*.webp", ["photos/b/2.webp"]),
    ],
)
def test_patterns_are_expanded_and_sorted(folder: Path, pattern: str, expected: list[str]) -> None:
    """As Python's own glob does."""
    assert keys(find_inputs([pattern])) == expected
    assert keys(find_inputs([f"{folder}/{pattern}"])) == [f"{folder}/{name}" for name in expected]


def test_an_existing_name_is_no_pattern(folder: Path) -> None:
    save(folder / "[z].png")
    assert found("[z].png") == ["[z].png"]


def test_a_file_reached_twice_is_kept_once_at_its_first_place(folder: Path) -> None:
    ways = ["./photos/b.png", folder / "photos" / "b.png", "photos/b/../b.png", "photos/*.png", "photos"]
    assert found("photos/b.png", *ways) == ["photos/b.png", *(name for name in IN_PHOTOS if name != "photos/b.png")]


def test_links_to_folders_are_followed_once_and_may_form_loops(folder: Path) -> None:
    (folder / "photos" / "loop").symlink_to(folder / "photos")
    (folder / "photos" / "elsewhere").symlink_to(folder / "other")
    save(folder / "other" / "o.png")
    assert found("photos") == [*IN_PHOTOS[:4], "photos/elsewhere/o.png", IN_PHOTOS[4]]
    assert found("photos/elsewhere", "other") == ["photos/elsewhere/o.png"]


def test_two_stars_alone_are_all_files_that_are_not_hidden(folder: Path) -> None:
    save(folder / ".hidden" / "h.png")
    others = ["photos/b/data.pdf", "photos/none", "photos/notes.txt", "z.png"]
    assert sorted(found("**")) == sorted([*IN_PHOTOS, *others])


@pytest.mark.timeout(10)
@pytest.mark.parametrize("pattern", ["photos/**/*.png", "photos/**/**/b.png", "**/b.png", "photos/**/b/**/b.*"])
def test_links_that_lead_back_up_end_a_pattern_too(folder: Path, pattern: str) -> None:
    for number in range(3):
        (folder / "photos" / "b" / f"up{number}").symlink_to("..")
    (path,) = found(pattern)
    assert os.path.samefile(path, "photos/b.png")


def test_folders_may_be_deeper_than_python_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as of a program that unpacked a folder into itself."""
    monkeypatch.chdir(tmp_path)
    for _ in range(300):
        os.mkdir("d")
        os.chdir("d")
    save(Path("z.png"))
    os.chdir(tmp_path)
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack()) + 200)
    try:
        paths = [next(iter(find_inputs([name]))).location for name in ("d", "d/**/z.png")]
    finally:
        sys.setrecursionlimit(limit)
    assert paths == ["d/" * 300 + "z.png"] * 2


def test_a_link_to_a_file_is_a_file_of_its_own(folder: Path) -> None:
    (folder / "link.png").symlink_to("z.png")
    assert found("z.png", "link.png") == ["z.png", "link.png"]


def test_what_names_nothing_is_a_failure(folder: Path) -> None:
    paths, failures = find_images(["gone.jpg", "z.png", "photos/*.bmp", ""])
    assert paths == [Path("z.png")]
    assert failures == [Failure(name, "no such file or folder") for name in ("gone.jpg", "photos/*.bmp", "")]


def test_a_folder_that_cannot_be_listed_is_a_failure(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scandir = os.scandir

    def denied(path: str) -> object:
        if Path(path).name == "b":
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    paths, failures = find_images(["photos"])
    assert [path.as_posix() for path in paths] == [name for name in IN_PHOTOS if "b/" not in name]
    assert failures == [Failure(os.path.join("photos", "b"), "Permission denied")]


@pytest.mark.parametrize("asked", ["scandir", "stat"])
def test_a_folder_that_does_not_answer_for_a_moment_is_no_row(
    folder: Path, monkeypatch: pytest.MonkeyPatch, asked: str
) -> None:
    function, name = getattr(os, asked), "b" if asked == "scandir" else "photos"

    def failing(path: str, **options: object) -> object:
        if Path(path).name == name:
            raise OSError(errno.EIO, "Input/output error", path)
        return function(path, **options)

    monkeypatch.setattr(os, asked, failing)
    with pytest.raises(OSError, match="Input/output error") as error:
        find_inputs(["photos"])
    assert Path(error.value.filename).name == name


def test_a_folder_that_gives_nothing_is_a_failure(folder: Path) -> None:
    for name in ("empty/deep", "tars/deep"):
        (folder / name).mkdir(parents=True)
    (folder / "tars" / "deep" / "0.tar").touch()
    paths, failures = find_images(["empty", "z.png", "tars", "[et]*", "photos"])
    assert [path.as_posix() for path in paths] == ["z.png", *IN_PHOTOS]
    named = "no image below it; .tar and .parquet files are to be named themselves"
    assert failures == [Failure("empty", "no image below it"), Failure("tars", named), Failure("[et]*", named)]


def test_a_folder_whose_images_were_all_named_before_is_no_failure(folder: Path) -> None:
    assert found("photos", "photos", "photos/b", "p*") == IN_PHOTOS
    (folder / "empty").mkdir()
    assert found("*") == [*IN_PHOTOS, "z.png"]  # of what a pattern matches, something is enough


LEFTOVERS = [
    "@eaDir/b.png/SYNOPHOTO_THUMB_XL.jpg",
    "b/@eaDir/2.webp@SynoEAStream.jpg",
    ".@__thumb/default_b.png",
    "#recycle/gone.png",
    "b/@Recycle/gone.png",
    "__MACOSX/b.png",
    ".AppleDouble/b.png",
    "._b.png",
    "b/._2.webp",
]


@pytest.mark.parametrize("leftover", LEFTOVERS)
def test_leftovers_of_a_nas_or_a_mac_are_no_photographs(folder: Path, leftover: str) -> None:
    save(folder / "photos" / leftover)
    assert found("photos") == IN_PHOTOS
    assert found("photos/[!n]*", "photos/**/*.[jw]*") == IN_PHOTOS
    assert found(f"photos/{leftover}") == [f"photos/{leftover}"]  # named itself, it is meant
    parent, _, name = f"photos/{leftover}".rpartition("/")
    assert found(f"{parent}/{name[:2]}*{name[-3:]}") == [f"photos/{leftover}"]


def test_files_of_other_kinds_in_folders_are_counted(folder: Path) -> None:
    for name in ("a.HEIC", "b/b.heic", "b/c.tar", "._d.heic", "@eaDir/e.heic"):
        (folder / "photos" / name).parent.mkdir(exist_ok=True)
        (folder / "photos" / name).write_bytes(b"no image")
    inputs = find_inputs(["photos", "z.png", "photos/notes.txt"])
    assert inputs.passed_over == {".heic": 2, ".tar": 1, ".txt": 1, ".pdf": 1, "": 1}
    assert find_inputs(["photos", "photos/b", "photos/*", "photos/**/*.gif"]).passed_over == inputs.passed_over
    assert find_inputs(["photos/notes.txt", "photos"]).passed_over == Counter({**inputs.passed_over, ".txt": 0})
    assert find_inputs(["z.png"]).passed_over == {}
    assert pickle.loads(pickle.dumps(inputs)).passed_over == inputs.passed_over


# --- find_inputs: files ----------------------------------------------------------------------------------------------


def keys(inputs: Inputs) -> list[str]:
    return [Path(item.key).as_posix() for item in inputs]


def test_inputs_are_the_same_files_in_the_same_order_and_can_be_gone_through_again(folder: Path) -> None:
    inputs = find_inputs(["z.png", "photos", "photos/*.png", "./z.png"])
    assert keys(inputs) == keys(inputs) == ["z.png", *IN_PHOTOS]
    assert keys(pickle.loads(pickle.dumps(inputs))) == keys(inputs)
    assert inputs.expected() == 6


def test_what_names_nothing_keeps_its_place(folder: Path) -> None:
    items = list(find_inputs(["z.png", "gone.png", "photos/b.png"]))
    assert [type(item) for item in items] == [ImageFile, Unreadable, ImageFile]
    with pytest.raises(ValueError, match="no such file or folder"):
        items[1].source()


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("a{08..10}.png", ["a08.png", "a09.png", "a10.png"]),
        ("{1..2}{8..9}", ["18", "19", "28", "29"]),
        ("{10..08}", ["10", "09", "08"]),
        ("{10..8}", ["10", "9", "8"]),
        ("{0..2}", ["0", "1", "2"]),
        ("{1..003}", ["001", "002", "003"]),
        ("{train,test}.tar", ["train.tar", "test.tar"]),
        ("x{,y}.png", ["x.png", "xy.png"]),
        ("{a,b{1..2}}", ["a", "b1", "b2"]),
        ("{one}{1..x}", ["{one}{1..x}"]),
        ("b{1..2}.png", ["b{1..2}.png"]),  # there
        ("a{1,0*}.png", ["a1.png", "a08.png", "a09.png"]),
    ],
)
def test_braces_are_written_out_as_the_shell_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str, expected: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a08.png", "a09.png", "a10.png", "b{1..2}.png"):
        save(tmp_path / name)
    assert keys(find_inputs([pattern])) == expected


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("{0..99999999999}.tar", "more than 1000000 names"),
        ("{0..999}{0..999}{0..9}", "more than 1000000 names"),
        ("{a,a}" * 20, "more than 1000000 names"),
        ("{1.." + "9" * 5000 + "}", "too long"),
        ("{a,b}" * 3000, "too many"),
        ("{0..99999}" + "x" * 10_000, "too long ones"),
    ],
    ids=lambda text: text[:20],
)
def test_braces_that_stand_for_too_much_are_a_failure_at_once(tmp_path: Path, pattern: str, reason: str) -> None:
    first, last = find_inputs([pattern, save(tmp_path / "z.png", 7)])
    assert isinstance(first, Unreadable)
    assert reason in first.reason
    assert value_of(last) == 7


def test_listing_many_files_asks_little_and_keeps_their_names_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [str(tmp_path / f"{i % 3}" / f"{i}.png") for i in range(300)]
    for name in names:
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).touch()
    realpath, asked = os.path.realpath, []

    def counted(path: str) -> str:
        asked.append(path)
        return realpath(path)

    monkeypatch.setattr(os.path, "realpath", counted)
    (part,) = find_inputs(names).parts
    assert part == Files(names)
    assert len(asked) == 3
    (part,) = find_inputs([tmp_path]).parts
    assert isinstance(part, Files)
    assert set(part.places) == set(names)
    assert len(asked) <= 3 + 2 * 4


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"a.png\nb c.png\r\n\nlast", ["a.png", "b c.png", "last"]),
        (b"a\nb.png\0c.png\0", ["a\nb.png", "c.png"]),
        (b"", []),
        (b"caf\xe9.png\n", [os.fsdecode(b"caf\xe9.png")]),
    ],
)
def test_lists_of_paths(data: bytes, expected: list[str]) -> None:
    assert read_list(io.BytesIO(data)) == expected


def test_what_is_gone_from_a_list_between_zero_bytes_is_no_pattern(folder: Path) -> None:
    """`find -print0` writes names; another file must not come in the place of one that was removed since."""
    gone = ["photos/[b].png", "photos/*.gif", "{z,y}.png", "photos/**/b.png"]
    items = list(find_inputs(read_list(io.BytesIO("\0".join(["z.png", *gone, "photos/b", ""]).encode()))))
    assert [item.location for item in items] == ["z.png", *gone, *IN_PHOTOS[1:3]]
    assert [type(item) for item in items] == [ImageFile] + [Unreadable] * 4 + [ImageFile] * 2
    assert keys(find_inputs(read_list(io.BytesIO("\n".join(["z.png", gone[0]]).encode())))) == ["z.png", "photos/b.png"]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "mark and utf-16-be", "utf-32"]
)
@pytest.mark.parametrize("paths", [["photos/a.jpg", "/data/b c.png"], ["写真/ä.jpg", "z"], ["/x/y.png"]])
def test_lists_are_read_by_their_encoding(paths: list[str], encoding: str, end: str) -> None:
    text = "".join(path + end for path in paths)
    data = ("\ufeff" + text).encode("utf-16-be") if encoding == "mark and utf-16-be" else text.encode(encoding)
    assert read_list(io.BytesIO(data)) == paths
    assert read_list(io.BytesIO(data[: -len(end) * (len(data) // len(text))])) == paths  # without the last line's end


@pytest.mark.parametrize("data", [b"\xff\xfea\0b", b"\xff\xfe\0\0abc", b"a\0b\0c\0d"])
def test_a_damaged_list_is_refused_and_not_taken_apart(data: bytes) -> None:
    with pytest.raises(ValueError, match="list of paths is not readable"):
        read_list(io.BytesIO(data))


# --- find_inputs: tars -----------------------------------------------------------------------------------------------


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def test_a_tar_gives_its_images_under_their_sample_keys(tmp_path: Path) -> None:
    members = {"a/001.png": png(7), "a/001.json": b"{}", "a/002.x.JPG": png(8), "b.d/003.webp": png(9), "notes": b""}
    path = write_tar(tmp_path / "t.tar", members)
    items = list(find_inputs([path]))
    assert [item.key for item in items] == ["a/001", "a/002", "b.d/003"]
    assert [item.location for item in items] == [f"{path}/{name}" for name in ("a/001.png", *list(members)[2:4])]
    assert [value_of(item) for item in items] == [7, 8, 9]


@pytest.mark.parametrize(
    ("pack", "words"),
    [
        (gzip.compress, "compressed with gzip, and a tar is read uncompressed: unpack it"),
        (bz2.compress, "compressed with bzip2"),
        (lzma.compress, "compressed with xz"),
        (lambda data: b"PK\3\4" + data, "a zip archive: unpack it"),
    ],
)
def test_a_compressed_tar_is_named_as_such(tmp_path: Path, pack: Callable[[bytes], bytes], words: str) -> None:
    path = write_tar(tmp_path / "x.tar", {f"{i}.png": png(i) for i in range(50)})
    path.write_bytes(pack(path.read_bytes()))
    (item,) = find_inputs([path])
    with pytest.raises(ValueError, match=f"not a readable, uncompressed tar: it is {words}"):
        item.source()


def test_what_has_no_name_before_its_dot_is_no_sample(tmp_path: Path) -> None:
    members = {"a/._1.png": b"of a Mac", ".png": b"", "a/.x/2.png": png(2), "a/1.png": png(1)}
    assert keys(find_inputs([write_tar(tmp_path / "t.tar", members)])) == ["a/.x/2", "a/1"]


def test_long_names_in_a_tar(tmp_path: Path) -> None:
    name = "folder/" * 40 + "é" * 60
    (item,) = find_inputs([write_tar(tmp_path / "t.tar", {f"{name}.png": png(3)})])
    assert item.key == name
    assert value_of(item) == 3


def test_tars_by_range_and_pattern_in_order(tmp_path: Path) -> None:
    for i in range(3):
        write_tar(tmp_path / f"{i:04d}.tar", {f"{i}{j}.png": png(10 * i + j) for j in range(4)})
    (tmp_path / "0001.tar").unlink()
    items = list(find_inputs([tmp_path / "{0000..0002}.tar"]))
    expected = [f"{i}{j}" for i in (0, 2) for j in range(4)]
    assert [item.key for item in items if not isinstance(item, Unreadable)] == expected
    assert isinstance(items[4], Unreadable)
    inputs = find_inputs([tmp_path / "*.tar"])
    assert keys(inputs) == expected
    assert inputs.expected() == 8
    assert find_inputs([tmp_path / "gone.tar", tmp_path / "*.tar"]).expected() == 9


def test_a_broken_tar_is_unreadable_where_it_breaks(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "t.tar", {f"{i}.png": png(i) for i in range(3)})
    data = path.read_bytes()
    path.write_bytes(data[: 1024 + 520])  # ends in the second member
    items = list(find_inputs([path]))
    assert value_of(items[0]) == 0
    assert isinstance(items[1], TarMember)
    with pytest.raises(ValueError, match=r"ends inside it, after 8 of \d+ bytes"):
        items[1].source()
    for content in (b"no tar", b"no tar" * 1000):
        path.write_bytes(content)
        (item,) = find_inputs([path])
        with pytest.raises(ValueError, match="not a readable, uncompressed tar"):
            item.source()


def member(i: int) -> int:
    """Where the i-th of members of one block each begins."""
    return i * 1024


DAMAGES = {  # what was done to six members of a block each -> the bytes that are left
    "a header's bit": lambda data: data[: member(3)] + bytes([data[member(3)] ^ 1]) + data[member(3) + 1 :],
    "a header of zeros": lambda data: data[: member(3)] + bytes(512) + data[member(3) + 512 :],
    "cut before a header": lambda data: data[: member(3)],
    "cut in a header": lambda data: data[: member(3) + 100],
    "zeros from a header on": lambda data: data[: member(3)] + bytes(5 << 20),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_a_damaged_tar_lost_is_not_passed_over(tmp_path: Path, damage: str) -> None:
    path = write_tar(tmp_path / "t.tar", {f"{i}.png": png(i) for i in range(6)})
    assert keys(find_inputs([path])) == [str(i) for i in range(6)]
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    *items, last = find_inputs([path])
    assert [value_of(item) for item in items] == [0, 1, 2]
    with pytest.raises(ValueError, match=f"cut or damaged at byte {member(3)}"):
        last.source()


@pytest.mark.parametrize("case", ["size", "sparse"])
def test_what_tarfile_itself_stumbles_over_is_unreadable(tmp_path: Path, case: str) -> None:
    member = tarfile.TarInfo("1.png")
    if case == "size":
        member.size = 1 << 70
    else:
        member.pax_headers = {"GNU.sparse.map": "x,y", "GNU.sparse.size": "1"}
    path = write_tar(tmp_path / "t.tar", {"0.png": png(0)})
    header = member.tobuf(tarfile.GNU_FORMAT if case == "size" else tarfile.PAX_FORMAT)
    path.write_bytes(path.read_bytes()[:1024] + header + bytes(10240))
    first, *_, last = find_inputs([path])
    assert value_of(first) == 0
    with pytest.raises(ValueError, match="not a readable, uncompressed tar"):
        last.source()


@pytest.mark.parametrize("size", [1 << 62, (1 << 63) - 2000])
def test_a_size_that_leads_beyond_any_file_is_unreadable(tmp_path: Path, size: int) -> None:
    member = tarfile.TarInfo("1.png")
    member.size = size
    path = write_tar(tmp_path / "t.tar", {"0.png": png(0)})
    path.write_bytes(path.read_bytes()[:1024] + member.tobuf(tarfile.GNU_FORMAT) + bytes(10240))
    first, *_, last = find_inputs([path])
    assert value_of(first) == 0
    assert isinstance(last, Unreadable)


def header_with_size(name: str, size: int) -> bytes:
    """The header of a member with a size below zero, which `tarfile` reads and does not write."""
    header = bytearray(tarfile.TarInfo(name).tobuf(tarfile.GNU_FORMAT))
    header[124:136] = size.to_bytes(12, "big", signed=True)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


@pytest.mark.parametrize("size", [-1, -511, -512, -513, -1023, -1024, -10_000])
@pytest.mark.parametrize("name", ["1.png", "1.txt"])
def test_a_size_below_zero_is_not_read_forever(tmp_path: Path, name: str, size: int) -> None:
    path = write_tar(tmp_path / "t.tar", {"0.png": png(0)})
    path.write_bytes(path.read_bytes()[:1024] + header_with_size(name, size) + bytes(10240))
    first, *rest = itertools.islice(find_inputs([path]), 100)
    assert value_of(first) == 0
    assert len(rest) <= 2
    for item in rest:
        with pytest.raises(ValueError, match=r"below zero|not a readable|zero bytes|impossible"):
            item.source()


PASSING = [errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.EMFILE]
LASTING = [errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.EACCES]


@pytest.mark.parametrize("number", PASSING)
@pytest.mark.parametrize("by", ["scanner", "tarfile"])
def test_a_tar_that_does_not_answer_for_a_moment_is_no_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, by: str
) -> None:
    inputs = find_inputs([write_tar(tmp_path / "t.tar", {f"{i}.png": png(i).ljust(10_000, b"\0") for i in range(6)})])
    before = list(inputs)
    places = [item.offset - 512 for item in before if isinstance(item, TarMember)]
    pread, read = os.pread, tars._Headers.read
    failed: set[str] = set()

    def fail_once(name: str, place: int) -> None:
        if place >= places[2] and name not in failed:
            failed.add(name)
            raise OSError(number, os.strerror(number))

    def failing_pread(descriptor: int, size: int, place: int) -> bytes:
        fail_once("pread", 1 << 20 if by == "tarfile" else place)
        return pread(descriptor, size, place)

    def failing_read(file: tars._Headers, size: int = -1) -> bytes:
        fail_once("read", file.tell())
        return read(file, size)

    monkeypatch.setattr(os, "pread", failing_pread)
    monkeypatch.setattr(tars._Headers, "read", failing_read)
    listing = iter(inputs)
    assert [next(listing), next(listing)] == before[:2]
    with pytest.raises(OSError, match=os.strerror(number)):
        next(listing)
    assert list(inputs) == before


@pytest.mark.parametrize("number", LASTING)
def test_a_tar_that_is_not_there_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    inputs = find_inputs([write_tar(tmp_path / "t.tar", {"0.png": png(0)})])

    def failing(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(tars, "_Headers", failing)
    (item,) = inputs
    with pytest.raises(ValueError, match=os.strerror(number)):
        item.source()


@pytest.mark.parametrize("form", ["old", "0.0", "1.0"])
def test_a_sparse_file_in_a_tar_is_unreadable(tmp_path: Path, form: str) -> None:
    member = tarfile.TarInfo("a/1.png")
    data = png(1)
    if form == "old":  # GNU's: the map of the parts is in the header
        header = bytearray(member.tobuf(tarfile.GNU_FORMAT))
        header[156:157] = tarfile.GNUTYPE_SPARSE
        header[386:410] = b"%011o\0%011o\0" % (0, len(data))
        header[483:495] = b"%011o\0" % (len(data) + 1000)
        header[124:136] = b"%011o\0" % len(data)
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        blocks = bytes(header) + data
    else:
        size = str(len(data) + 1000)
        if form == "0.0":
            numbers = {"GNU.sparse.map": f"0,{len(data)}", "GNU.sparse.size": size, "GNU.sparse.numblocks": "1"}
        else:
            numbers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": size}
            numbers["GNU.sparse.name"] = member.name
            data = f"1\n0\n{len(data)}\n".encode().ljust(512, b"\0") + data
        member.pax_headers = numbers
        member.size = len(data)
        blocks = member.tobuf(tarfile.PAX_FORMAT) + data
    after = write_tar(tmp_path / "after.tar", {"2.png": png(2)}).read_bytes()
    path = tmp_path / "t.tar"
    path.write_bytes(blocks + bytes(-len(blocks) % 512) + after)
    first, second = find_inputs([path])
    assert (first.key, first.location) == ("a/1", f"{path}/a/1.png")
    with pytest.raises(ValueError, match="a sparse file in the archive"):
        first.source()
    assert value_of(second) == 2


def test_what_is_no_file_in_a_tar_is_unreadable_if_it_has_an_images_suffix(tmp_path: Path) -> None:
    kinds = {
        "hard.png": tarfile.LNKTYPE,
        "soft.jpg": tarfile.SYMTYPE,
        "pipe.png": tarfile.FIFOTYPE,
        "soft.txt": tarfile.SYMTYPE,
        "folder.png": tarfile.DIRTYPE,
    }
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        for name, kind in kinds.items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "other.png"
            tar.addfile(member)
    items = list(find_inputs([tmp_path / "t.tar"]))
    assert [item.key for item in items] == ["hard", "soft", "pipe"]
    for item, reason in zip(items, ("a link", "a link", "no regular file"), strict=True):
        with pytest.raises(ValueError, match=f"{reason} in the archive"):
            item.source()


@pytest.mark.parametrize("zeros", [512, 1024, 1 << 20])
def test_a_tar_may_end_with_any_padding(tmp_path: Path, zeros: int) -> None:
    path = write_tar(tmp_path / "t.tar", {f"{i}.png": png(i) for i in range(6)})
    path.write_bytes(path.read_bytes()[: member(6)] + bytes(zeros))
    assert keys(find_inputs([path])) == [str(i) for i in range(6)]


def test_a_tar_is_known_in_letters_of_any_case(tmp_path: Path) -> None:
    for name in ("a.TAR", "b.Tar"):
        (item,) = find_inputs([write_tar(tmp_path / name, {"x/1.png": png(4)})])
        assert (item.key, value_of(item), items_at([item.location])) == ("x/1", 4, {item.location: item})


@pytest.mark.parametrize("leftover", LEFTOVERS)
def test_leftovers_in_a_tar_are_no_samples(tmp_path: Path, leftover: str) -> None:
    path = write_tar(tmp_path / "t.tar", {f"x/{leftover}": png(1), "x/1.png": png(1)})
    assert keys(find_inputs([path])) == ["x/1"]


def extended(kind: bytes, size: int = 0) -> bytes:
    """The header of one that precedes a member."""
    member = tarfile.TarInfo("p")
    member.type, member.size = kind, size
    return member.tobuf(tarfile.GNU_FORMAT)


DAMAGED_TARS: dict[str, bytes] = {
    **{f"3000 of {kind!r}": extended(kind) * 3000 + bytes(10240) for kind in (b"x", b"g", b"L", b"K")},
    **{f"{kind!r} of 1 TB": extended(kind, 1 << 40) for kind in (b"x", b"g", b"L", b"K")},
    "pax numbers": extended(b"x", 512) + b"20 size=999999999x\n".ljust(512, b"\0") + bytes(1024),
    "pax length": extended(b"x", 512) + b"99999999999999999999 a=b\n".ljust(512, b"\0") + bytes(1024),
    "gzip": b"\x1f\x8b" + bytes(2000),
}


@pytest.mark.parametrize("kind", DAMAGED_TARS)
def test_a_damaged_tar_is_one_row_and_takes_little_memory(tmp_path: Path, kind: str) -> None:
    (tmp_path / "bad.tar").write_bytes(DAMAGED_TARS[kind])
    if "TB" in kind:
        os.truncate(tmp_path / "bad.tar", 1 << 33)  # holes
    good = save(tmp_path / "good.png", 3)
    tracemalloc.start()
    bad, last = find_inputs([tmp_path / "bad.tar", good])
    assert tracemalloc.get_traced_memory()[1] < 1 << 24
    tracemalloc.stop()
    with pytest.raises(ValueError, match=r"not a readable, uncompressed tar: ."):
        bad.source()
    assert value_of(last) == 3


def test_the_map_of_a_sparse_member_is_not_read_without_end(tmp_path: Path) -> None:
    member = tarfile.TarInfo("1.png")
    member.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "9"}
    member.size = 1 << 32
    (tmp_path / "t.tar").write_bytes(member.tobuf(tarfile.PAX_FORMAT) + b"99999999\n" + b"1\n" * (1 << 20))
    tracemalloc.start()
    *_, last = find_inputs([tmp_path / "t.tar"])
    assert tracemalloc.get_traced_memory()[1] < 1 << 26
    tracemalloc.stop()
    with pytest.raises(ValueError, match="headers of more than"):
        last.source()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["x.tar", "x.parquet", "x.TAR"])
@pytest.mark.parametrize("kind", ["pipe", "link to a pipe", "device"])
def test_what_would_be_waited_for_is_refused(tmp_path: Path, name: str, kind: str) -> None:
    pytest.importorskip("pyarrow")
    if kind == "pipe":
        os.mkfifo(tmp_path / name)
    elif kind == "link to a pipe":
        os.mkfifo(tmp_path / "pipe")
        (tmp_path / name).symlink_to("pipe")
    else:
        (tmp_path / name).symlink_to("/dev/zero")
    inputs = find_inputs([tmp_path / name, save(tmp_path / "z.png", 5)])
    first, last = inputs
    with pytest.raises(ValueError, match="not a regular file"):
        first.source()
    assert value_of(last) == 5
    assert inputs.expected() >= 1


# --- find_inputs: parquet --------------------------------------------------------------------------------------------


def write_parquet(path: Path, **columns: object) -> Path:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table(columns), path, row_group_size=3)
    return path


def test_a_parquet_gives_the_bytes_of_a_column(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "t.parquet", image=[png(i) for i in range(7)], id=list(range(20, 27)))
    inputs = find_inputs([path])
    items = list(inputs)
    assert inputs.expected() == 7
    assert [item.key for item in items] == [f"{path}#{i}" for i in range(7)]
    assert [value_of(item) for item in items] == list(range(7))
    assert keys(find_inputs([path], key_column="id")) == [str(i) for i in range(20, 27)]


def keys_as(kind: str) -> tuple[object, list[str | None]]:
    """Keys in a column of an Arrow type, and as text; None where one is null."""
    pa = pytest.importorskip("pyarrow")
    texts = ["a", "ä/b", None, ""]
    some = uuid.UUID(int=random.getrandbits(128))
    match kind:
        case "string" | "large_string" | "string_view":
            return pa.array(texts, getattr(pa, kind)()), texts
        case "binary" | "large_binary" | "binary_view":
            cells = [text and text.encode() for text in texts[:3]]
            return pa.array([*cells, b"\xff\x00z"], getattr(pa, kind)()), [*texts[:3], "\\xff\x00z"]
        case "fixed":
            return pa.array([b"n01", b"n02", None, b"\xffab"], pa.binary(3)), ["n01", "n02", None, "\\xffab"]
        case "dictionary":
            return pa.array(["a", "b", None, "a"]).dictionary_encode(), ["a", "b", None, "a"]
        case "dictionary of bytes":
            return pa.array([b"a", b"b", None, b"a"]).dictionary_encode(), ["a", "b", None, "a"]
        case "null":
            return pa.nulls(4), [None] * 4
        case "bool":
            return pa.array([True, None, False, True]), ["true", None, "false", "true"]
        case "float":
            return pa.array([1.0, None, 2.5, 3.0]), ["1", None, "2.5", "3"]  # pandas makes such of integers with nulls
        case "uuid":
            if not hasattr(pa, "uuid"):
                pytest.skip("this pyarrow has no uuid")
            return pa.array([some.bytes, None] * 2, pa.uuid()), [str(some), None] * 2
        case "date":
            return pa.array([datetime.date(2020, 1, 31), None] * 2), ["2020-01-31", None] * 2
        case _:
            values = [0, 7, None, 2**7 - 1] if kind.startswith("int8") else [0, 7, None, 200]
            return pa.array(values, getattr(pa, kind)()), [None if each is None else str(each) for each in values]


KEY_TYPES = ["string", "large_string", "string_view", "binary", "large_binary", "binary_view", "fixed", "dictionary"]
KEY_TYPES += ["dictionary of bytes", "null", "bool", "float", "uuid", "date"]
KEY_TYPES += ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"]


@pytest.mark.parametrize("images", ["bytes", "paths"])
@pytest.mark.parametrize("kind", KEY_TYPES)
def test_keys_of_every_type_are_text_that_joins_again(tmp_path: Path, kind: str, images: str) -> None:
    pa = pytest.importorskip("pyarrow")
    if not hasattr(pa, kind) and kind.endswith("view"):
        pytest.skip(f"this pyarrow has no {kind}")
    column, expected = keys_as(kind)
    paths = [str(save(tmp_path / f"{i}.png", i)) for i in range(4)]
    image = paths if images == "paths" else [png(i) for i in range(4)]
    path = write_parquet(tmp_path / "t.parquet", id=column, image=image)
    items = list(find_inputs([path], key_column="id"))
    own = paths if images == "paths" else [f"{path}#{i}" for i in range(4)]  # where a key is null
    assert [item.key for item in items] == [own[i] if each is None else each for i, each in enumerate(expected)]
    assert [value_of(item) for item in items] == [0, 1, 2, 3]


@pytest.mark.parametrize("key", [[1, 2], {"a": 1}], ids=str)
def test_a_column_of_a_type_that_holds_no_keys_is_unreadable_at_once(tmp_path: Path, key: object) -> None:
    path = write_parquet(tmp_path / "t.parquet", id=[key] * 5, image=[png(0)] * 5)
    (item,) = find_inputs([path], key_column="id")
    with pytest.raises(ValueError, match="the column 'id' holds no keys: text and numbers are, it has"):
        item.source()


def test_text_that_is_no_utf8_is_a_name_and_a_key(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    name = os.fsencode(tmp_path) + b"/caf\xe9.png"
    save(Path(os.fsdecode(name)), 9)
    raw = pa.array([name, b"k\xe9"])
    cells = pa.Array.from_buffers(pa.string(), 2, raw.buffers())
    path = write_parquet(tmp_path / "t.parquet", image=cells.slice(0, 1), id=cells.slice(1, 1))
    (item,) = find_inputs([path], key_column="id")
    assert item.key == "k\\xe9"
    assert value_of(item) == 9


@pytest.mark.parametrize("kind", ["string", "large_string", "dictionary", "binary", "struct", "data url"])
def test_images_in_base64_are_read_and_no_paths(tmp_path: Path, kind: str) -> None:
    pa = pytest.importorskip("pyarrow")
    texts = [base64.b64encode(png(i)).decode() for i in range(4)]
    cells: object = {
        "string": texts,
        "large_string": pa.array(texts, pa.large_string()),
        "dictionary": pa.array(texts).dictionary_encode(),
        "binary": [text.encode() for text in texts],
        "struct": [{"bytes": text.encode(), "path": None} for text in texts],
        "data url": [f"data:image/png;base64,{text}" for text in texts],
    }[kind]
    path = write_parquet(tmp_path / "t.parquet", image=cells)
    items = list(find_inputs([path]))
    assert [item.location for item in items] == [f"{path}#{i}" for i in range(4)]
    assert [item.key for item in items] == [f"{path}#{i}" for i in range(4)]
    assert [value_of(item) for item in items] == [0, 1, 2, 3]


def test_a_long_text_that_is_no_image_is_no_path(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "t.parquet", image=["x y" * 5000, str(save(tmp_path / "a.png", 2))])
    first, second = find_inputs([path])
    assert (first.key, first.location) == (f"{path}#0", f"{path}#0")
    with pytest.raises(ValueError, match="15000 characters, no path and no image in base64"):
        first.source()
    assert value_of(second) == 2


@pytest.mark.parametrize("kind", ["image", "dictionary", "key", "path", "struct"])
def test_a_bomb_in_a_parquet_is_a_failure_for_each_of_its_rows(tmp_path: Path, kind: str) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    zeros = pa.array([bytes(20 << 20)] * 5)
    if kind == "dictionary":
        indices = pa.array([0] * 500, pa.int32())
        zeros = pa.DictionaryArray.from_arrays(indices, pa.array([bytes(80 << 20)]))
    good = pa.array(["k"] * len(zeros))
    columns = {
        "image": zeros if kind in ("image", "dictionary") else good.cast(pa.binary()),
        "key": zeros if kind == "key" else good,
    }
    if kind == "path":
        columns["image"] = pa.array(["x" * (20 << 20)] * 5)
    if kind == "struct":
        columns["image"] = pa.StructArray.from_arrays([zeros, good], names=["bytes", "path"])
    options: dict[str, Any] = (
        {"use_dictionary": False} if kind != "dictionary" else {"dictionary_pagesize_limit": 1 << 30}
    )
    pq.write_table(pa.table(columns), tmp_path / "t.parquet", compression="zstd", **options)
    count = len(zeros)
    del zeros, columns
    before = pa.total_allocated_bytes()
    items = list(find_inputs([tmp_path / "t.parquet", save(tmp_path / "z.png", 1)], key_column="key"))
    assert len(items) == count + 1
    names = [f"{tmp_path / 't.parquet'}#{i}" for i in range(count)]
    assert [item.location for item in items[:-1]] == names
    assert [item.key for item in items[:-1]] == (names if kind in ("key", "path") else ["k"] * count)
    for item in items[:-1]:
        item.prepare()
        with pytest.raises(ValueError, match=r"decompression bomb: \d+ bytes of the table unpack to \d+"):
            item.source()
    assert value_of(items[-1]) == 1
    assert pa.total_allocated_bytes() - before < 1 << 20


def test_rows_of_large_images_are_read_a_few_at_a_time(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pa.table({"image": [os.urandom(4 << 20) for _ in range(40)]})
    pq.write_table(table, tmp_path / "t.parquet", compression="none", use_dictionary=False, data_page_size=1 << 20)
    del table
    before = pa.total_allocated_bytes()
    for item in find_inputs([tmp_path / "t.parquet"]):
        item.prepare()
        assert pa.total_allocated_bytes() - before < 4 * parquet._SLICE_BYTES


def test_a_cell_that_takes_too_much_memory_fails_no_row_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor do rows that are too large together. Arrow goes no further than the cell."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    cells = [png(number) + bytes(size) for number, size in enumerate([0, 900, 0, 900, 900, 0, 2000, 0, 0])]
    iter_batches = pq.ParquetFile.iter_batches

    def limited(file: Any, *arguments: Any, **options: Any) -> Iterator[Any]:
        for batch in iter_batches(file, *arguments, **options):
            if batch.nbytes > 1500:
                raise pa.ArrowMemoryError(f"malloc of size {batch.nbytes} failed")
            yield batch

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", limited)
    pq.write_table(pa.table({"image": cells}), tmp_path / "t.parquet")
    items = list(find_inputs([tmp_path / "t.parquet"]))
    assert [value_of(item) for item in items[:6]] == list(range(6))
    for item in items[6:]:
        with pytest.raises(
            MemoryError, match="row 6 of row group 0 takes too much memory, and those behind it are lost"
        ):
            item.source()
    assert value_of(items[0]) == 0


def test_a_parquet_of_paths(tmp_path: Path) -> None:
    paths = [str(save(tmp_path / f"{i}.png", i)) for i in range(4)]
    table = write_parquet(tmp_path / "t.parquet", file=[*paths[:2], None, *paths[2:]])
    items = list(find_inputs([table], image_column="file"))
    assert [item.key for item in items] == [*paths[:2], f"{table}#2", *paths[2:]]
    assert [value_of(item) for item in items if isinstance(item, ImageFile)] == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="null"):
        items[2].source()


@pytest.mark.parametrize("kind", ["large_string", "string_view", "dictionary"])
def test_paths_are_known_by_any_type_of_text(tmp_path: Path, kind: str) -> None:
    pa = pytest.importorskip("pyarrow")
    if not hasattr(pa, kind):
        pytest.skip(f"this pyarrow has no {kind}")
    paths = [str(save(tmp_path / f"{i}.png", i)) for i in range(4)]
    values = pa.array(paths).dictionary_encode() if kind == "dictionary" else pa.array(paths, getattr(pa, kind)())
    items = list(find_inputs([write_parquet(tmp_path / "t.parquet", image=values)]))
    assert [item.key for item in items] == paths
    assert [value_of(item) for item in items] == [0, 1, 2, 3]


def test_a_parquet_of_hugging_face(tmp_path: Path) -> None:
    file = str(save(tmp_path / "x.png", 6))
    cells = [{"bytes": png(5), "path": "gone.png"}, {"bytes": None, "path": file}, {"bytes": None, "path": None}]
    items = list(find_inputs([write_parquet(tmp_path / "t.parquet", image=cells)]))
    assert [value_of(item) for item in items[:2]] == [5, 6]
    with pytest.raises(ValueError, match="null"):
        items[2].source()


def test_paths_in_cells_are_relative_to_a_folder(tmp_path: Path) -> None:
    save(tmp_path / "x.png", 6)
    (item,) = find_inputs([write_parquet(tmp_path / "t.parquet", image=[{"bytes": None, "path": "x.png"}])])
    assert isinstance(item, ParquetCell)
    assert value_of(replace(item, folder=str(tmp_path))) == 6


def test_rows_are_right_in_any_order_and_in_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "_SLICE", 2)
    path = write_parquet(tmp_path / "t.parquet", image=[png(i) for i in range(20)])  # groups of 3
    items = list(find_inputs([path]))
    order = [*range(20), *reversed(range(20)), *range(0, 20, 3), 19, 0]
    assert [value_of(items[i]) for i in order] == order
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda i: value_of(items[i]), order * 5)) == order * 5


def test_a_large_row_group_is_not_read_at_once(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pa.table({"image": [os.urandom(20_000) for _ in range(2000)]})
    pq.write_table(table, tmp_path / "t.parquet", write_batch_size=10)  # pages of a megabyte in one group of 40
    del table
    before = pa.total_allocated_bytes()
    allocated: list[int] = []
    for item in find_inputs([tmp_path / "t.parquet"]):
        item.source()
        allocated.append(pa.total_allocated_bytes() - before)
    assert max(allocated) < 16e6


def test_a_broken_page_fails_its_rows_whichever_is_asked_for_first(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "t.parquet", image=[png(i) for i in range(3)])
    data = path.read_bytes()
    path.write_bytes(data[:4] + bytes([data[4] ^ 0xFF]) * 40 + data[44:])

    def reason(item: Item) -> str:
        with pytest.raises(Exception) as error:  # noqa: PT011 (whatever pyarrow has for it)
            item.source()
        return str(error.value)

    items = list(find_inputs([path]))
    first = [reason(item) for item in items]
    assert len(set(first)) == 1
    assert first[0]
    assert [reason(item) for item in reversed(items)] == first


def test_rows_behind_a_broken_page_fail_without_being_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pa = pytest.importorskip("pyarrow")
    images = [png(i % 256).ljust(2_000, b"\0") for i in range(1_000)]
    path = tmp_path / "t.parquet"
    options = {"write_batch_size": 10, "data_page_size": 20_000, "compression": "none", "use_dictionary": False}
    pq.write_table(pa.table({"image": images}), path, **options)
    data = bytearray(path.read_bytes())
    middle = data.index(images[500]) - 40
    data[middle : middle + 40] = bytes(byte ^ 0xFF for byte in data[middle : middle + 40])
    path.write_bytes(data)

    rewound: list[int] = []
    rewind = parquet._Column._rewind

    def counted(column: parquet._Column) -> None:
        rewound.append(1)
        rewind(column)

    monkeypatch.setattr(parquet._Column, "_rewind", counted)
    read, reasons = 0, set[str]()
    for item in find_inputs([path]):
        try:
            item.source()
            read += 1
        except Exception as error:
            reasons.add(str(error))
    assert 0 < read < 1_000
    assert len(reasons) == 1
    assert len(rewound) <= 3


def test_an_item_is_found_again_by_its_location(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    write_tar(tmp_path / "a.tar", {"x/1.png": png(1), "x/2.png": png(2)})
    write_parquet(tmp_path / "b.parquet", image=[png(3), png(4)])
    save(tmp_path / "c#1.png", 5)
    items = list(find_inputs([tmp_path / "a.tar", tmp_path / "b.parquet", tmp_path / "c#1.png"]))
    again = items_at(item.location for item in reversed(items))
    assert [value_of(again[item.location]) for item in items] == [1, 2, 3, 4, 5]
    gone = ("a.tar/x/3.png", "b.parquet#2", "d.png", "d.tar/1.png", "d.parquet#0")
    assert not items_at(str(tmp_path / name) for name in gone)


def test_a_tar_is_found_again_in_and_around_what_is_named_as_one(tmp_path: Path) -> None:
    (tmp_path / "x.tar").mkdir()
    path = write_tar(tmp_path / "x.tar" / "in.TAR", {"y.tar/1.png": png(1)})
    (item,) = find_inputs([path])
    assert items_at([item.location]) == {f"{path}/y.tar/1.png": item}


def test_members_of_one_name_are_told_apart(tmp_path: Path) -> None:
    """As in an archive that was appended to. Without a number, as in an index of earlier releases, it is the first."""
    path = tmp_path / "a.tar"
    for colour, name in enumerate(["x.png", "y.png", "x.png", "x.png", "x.png#2.png", "sub/x.png", "y.png"]):
        with tarfile.open(path, "a") as tar:
            member = tarfile.TarInfo(name)
            member.size = len(png(colour))
            tar.addfile(member, io.BytesIO(png(colour)))
    items = list(find_inputs([path]))
    names = ["x.png", "y.png", "x.png#2", "x.png#3", "x.png#2.png", "sub/x.png", "y.png#2"]
    assert [item.location for item in items] == [f"{path}/{name}" for name in names]
    assert [item.key for item in items] == ["x", "y", "x", "x", "x", "sub/x", "y"]
    assert items_at([f"{path}/x.png#4", *(item.location for item in items)]) == {item.location: item for item in items}
    assert [value_of(item) for item in items] == list(range(7))


def test_null_and_empty_cells(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "t.parquet", image=[b"", None, png(1)])
    items = list(find_inputs([path]))
    assert all(isinstance(item, ParquetCell) for item in items)
    for item, reason in zip(items[:2], ("zero bytes", "null"), strict=True):
        with pytest.raises(ValueError, match=reason):
            item.source()
    assert value_of(items[2]) == 1


def test_a_parquet_that_cannot_be_read_is_unreadable(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "t.parquet", picture=[b""])
    (item,) = find_inputs([path])
    with pytest.raises(ValueError, match="no column 'image', only picture"):
        item.source()
    path.write_bytes(b"PAR1 not really")
    inputs = find_inputs([path])
    (item,) = inputs
    with pytest.raises(ValueError, match="not a readable parquet file"):
        item.source()
    assert inputs.expected() == 1


@pytest.mark.parametrize("kind", ["large_binary", "binary_view", "fixed", "dictionary", "null"])
def test_images_are_known_by_any_type_of_bytes(tmp_path: Path, kind: str) -> None:
    pa = pytest.importorskip("pyarrow")
    if kind == "fixed":
        values = pa.array([png(7)], pa.binary(len(png(7))))
    elif kind == "dictionary":
        values = pa.array([png(7)]).dictionary_encode()
    elif kind == "null":
        values = pa.array([None])
    elif not hasattr(pa, kind):
        pytest.skip(f"this pyarrow has no {kind}")
    else:
        values = pa.array([png(7)], getattr(pa, kind)())
    (item,) = find_inputs([write_parquet(tmp_path / "t.parquet", image=values)])
    assert isinstance(item, ParquetCell)
    if kind == "null":
        with pytest.raises(ValueError, match="null"):
            item.source()
    else:
        assert value_of(item) == 7


@pytest.mark.parametrize(
    "cell", [1, 0.5, [1, 2], {"jpg": b""}, {"bytes": 1}, {"bytes": [1], "path": "a"}, {"path": 1}], ids=str
)
def test_a_column_of_a_type_that_holds_no_images_is_unreadable_at_once(tmp_path: Path, cell: object) -> None:
    (item,) = find_inputs([write_parquet(tmp_path / "t.parquet", image=[cell] * 5)])
    with pytest.raises(ValueError, match="the column 'image' holds no images: bytes or paths are, it has"):
        item.source()


def test_columns_of_one_name_are_unreadable(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    arrays = [pa.array([png(1)]), pa.array(["k"]), pa.array(["l"])]
    for names, column in ((["image", "image", "key"], "image"), (["image", "key", "key"], "key")):
        pq.write_table(pa.Table.from_arrays(arrays, names=names), tmp_path / "t.parquet")
        (item,) = find_inputs([tmp_path / "t.parquet"], key_column="key")
        with pytest.raises(ValueError, match=f"several columns '{column}'"):
            item.source()


@pytest.mark.parametrize("number", [*PASSING, *LASTING])
@pytest.mark.parametrize("place", ["open", "group"])
def test_a_parquet_that_does_not_answer_for_a_moment_is_no_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, number: int
) -> None:
    inputs = find_inputs([write_parquet(tmp_path / "t.parquet", image=[png(i) for i in range(5)])])
    pq = pytest.importorskip("pyarrow.parquet")

    def failing(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        if place == "open":
            patch.setattr(pq, "ParquetFile", failing)
            patch.setattr(pq, "read_metadata", failing)
        else:
            patch.setattr(pq.ParquetFile, "iter_batches", failing)
        if number in LASTING:
            assert [type(item) for item in inputs] == [Unreadable]
        else:
            with pytest.raises(OSError, match=os.strerror(number)):
                list(inputs)
        if (place, number in LASTING) == ("open", False):
            with pytest.raises(OSError, match=os.strerror(number)):
                inputs.expected()
    assert len(list(inputs)) == inputs.expected() == 5


def test_a_cell_that_was_prepared_is_read_without_what_lies_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"image": [png(i) for i in range(200)]}), tmp_path / "t.parquet")
    *_, last = find_inputs([tmp_path / "t.parquet"])
    last.prepare()

    column = parquet._column(str(tmp_path / "t.parquet"), 0, "image")
    monkeypatch.setattr(column, "_coming", iter(()))
    assert value_of(last) == 199


def test_without_pyarrow_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_parquet(tmp_path / "t.parquet", image=[png(1)])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r'pip install "clip_fast\[parquet\]"'):
        list(find_inputs([path]))


# --- words -----------------------------------------------------------------------------------------------------------


def test_printable_stays_on_one_line_and_keeps_what_can_be_read() -> None:
    assert printable("Zoë's photo 写真.jpg") == "Zoë's photo 写真.jpg"
    assert printable("a\tb\nc\x1b[31m\u2028\udce9") == r"a\tb\nc\x1b[31m\u2028\udce9"
