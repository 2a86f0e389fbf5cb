"""Our own scanner of tars beside `tarfile`: the same members of good tars and damaged ones, and a tenth of the time."""

from __future__ import annotations

import io
import random
import tarfile
import time
from collections.abc import Collection, Generator
from pathlib import Path

import pytest
from mutations import mutated
from tar_seeds import tars as seeds

from clip_fast.inputs import tar_headers, tars
from clip_fast.inputs.images import image_suffixes
from clip_fast.inputs.items import Item
from clip_fast.inputs.tars import Tar

FORMS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def webdataset(samples: int, form: int = tarfile.USTAR_FORMAT, mtime: float = 0, folder: str = "") -> bytes:
    """A tar of samples of three members each. With a fractional `mtime`, pax gives each a header of its own."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as tar:
        for i in range(samples):
            for suffix, size in (("jpg", random.randrange(3000)), ("txt", 2), ("json", 0)):
                member = tarfile.TarInfo(f"{folder}{i:06d}.{suffix}")
                member.size, member.mtime = size, mtime
                tar.addfile(member, io.BytesIO(random.randbytes(size)))
    return file.getvalue()


def special() -> bytes:
    """Folders, old and new, a file of the old kind, a large one, and letters that are ASCII in lower case alone."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, kind, size in (
            ("a.png", tarfile.REGTYPE, 5),
            ("b.png/", tarfile.DIRTYPE, 0),
            ("c.png", tarfile.AREGTYPE, 700),
            ("d.png/", tarfile.AREGTYPE, 0),
            ("e.png", tarfile.CONTTYPE, 9),
            ("f.png", tarfile.REGTYPE, 40_000),
            ("g.J2\N{KELVIN SIGN}", tarfile.REGTYPE, 9),
            ("h.Png", tarfile.REGTYPE, 9),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.size = kind, size
            tar.addfile(member, io.BytesIO(bytes(size)))
    return file.getvalue()


def read_by_tarfile(path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Item]:
    def nothing(descriptor: int, suffixes: Collection[str]) -> Generator[tar_headers.Member, None, None]:
        yield from ()

    with monkeypatch.context() as patch:
        patch.setattr(tars, "plain_files", nothing)
        return list(Tar(str(path)))


def resealed(data: bytes) -> bytes:
    """`data` with a few bytes of one header changed, and its checksum made to fit."""
    damaged = bytearray(data)
    start = random.randrange(len(damaged) // 512) * 512
    header = damaged[start : start + 512]
    borders = [0, 99, 100, 107, 108, 124, 125, 135, 136, 147, 156, 157, 329, 344, 345, 400, 499, 500]
    for _ in range(random.randint(1, 3)):
        value = random.choice([*b"\0 0178/-+_xgL5", 0x80, 0xFF, random.randrange(256)])
        header[random.choice([*borders, random.randrange(512)])] = value
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    damaged[start : start + 512] = header
    return bytes(damaged)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("folder", ["", "é/b/", "é" * 20 + "/" + "long/" * 16])
def test_tars_are_listed_as_tarfile_lists_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, folder: str
) -> None:
    path = tmp_path / "t.tar"
    path.write_bytes(webdataset(900, FORMS[form], mtime=1.5, folder=folder))
    items = list(Tar(str(path)))
    assert len(items) == 900
    assert items == read_by_tarfile(path, monkeypatch)
    plain = form == "ustar" or not folder or (form == "gnu" and len(folder) < 80)
    with open(path, "rb") as file:
        found = list(tar_headers.plain_files(file.fileno(), image_suffixes()))
    assert len(found) == (900 if plain else 0)


def test_special_members_are_listed_as_tarfile_lists_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "t.tar"
    path.write_bytes(special())
    items = list(Tar(str(path)))
    assert [item.key for item in items] == list("acefgh")
    assert items == read_by_tarfile(path, monkeypatch)


def test_damaged_tars_are_listed_as_tarfile_lists_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [*seeds(), webdataset(9), webdataset(9, tarfile.PAX_FORMAT, 1.5), special()]
    path = tmp_path / "t.tar"
    for _ in range(600):
        data = random.choice(files)
        path.write_bytes(mutated(data, files) if random.random() < 0.3 else resealed(resealed(data)))
        assert list(Tar(str(path))) == read_by_tarfile(path, monkeypatch)


def test_listing_takes_a_fraction_of_tarfiles_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured here is a seventh; beyond a third, the scanner has been left too early."""
    path = tmp_path / "t.tar"
    path.write_bytes(webdataset(2000, tarfile.PAX_FORMAT, 1.5))

    def seconds(by: str) -> float:
        start = time.process_time()
        read_by_tarfile(path, monkeypatch) if by == "tarfile" else list(Tar(str(path)))
        return time.process_time() - start

    assert min(seconds("ours") for _ in range(3)) < min(seconds("tarfile") for _ in range(2)) / 3


def test_names_of_a_sorted_tar_are_not_kept(tmp_path: Path) -> None:
    def kept(names: list[str]) -> int:
        images = [(name, tar_headers.Member(name, 0, 0)) for name in names]
        seen = tars._Seen(lambda: iter(images))
        numbers = [seen.again(name) for name in names]
        assert numbers == [names[: i + 1].count(name) for i, name in enumerate(names)]
        return len(seen._counts or ())

    names = [f"{i:04d}.png" for i in range(300)]
    assert kept(names) == 0
    assert kept(names + names) == 300
    assert kept(random.sample(names, 300)) > 0


@pytest.mark.parametrize("suffix", ["img", "jpg"])
def test_a_tar_without_images_is_named(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        tar.addfile(tarfile.TarInfo(f"0.{suffix}"))
    if suffix == "jpg":
        assert len(list(Tar(str(path)))) == 1
    else:
        with pytest.warns(UserWarning, match=r"a\.tar: holds no image, by the suffixes that Pillow reads"):
            assert not list(Tar(str(path)))
