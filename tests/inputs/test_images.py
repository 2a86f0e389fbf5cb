"""Which files are opened as images, by their content, and within which bounds of memory."""

from __future__ import annotations

import base64
import gzip
import io
import os
import struct
import tarfile
from pathlib import Path

import pytest
from bad_files import GIGABYTES, WEBP_OF_34_BYTES, of_gigabytes, saved
from PIL import Image

from clip_fast.bulk.decoder import Decoder
from clip_fast.inputs.base64_text import is_base64, without_base64
from clip_fast.inputs.images import MEMORY_LIMIT, image_formats, image_suffixes, open_image
from clip_fast.inputs.inputs import find_inputs
from clip_fast.inputs.items import ImageFile
from clip_fast.inputs.tars import TarMember
from clip_fast.preprocess import Preprocess
from clip_fast.search.gallery import page
from clip_fast.search.index import Hit

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n%%EndComments\nshowpage\n%%EOF\n"


def reason_of(path: Path) -> str:
    decoder = Decoder(Preprocess(32))
    _, reason = decoder.into(decoder.black(1)[0], ImageFile("x", str(path)))
    assert reason is not None
    return reason


def iptc(data: bytes) -> bytes:
    """IPTC, whose image Pillow opens by content."""

    def field(record: int, number: int, value: bytes) -> bytes:
        return struct.pack(">BBBH", 0x1C, record, number, len(value)) + value

    size = struct.pack(">H", 8)
    return field(3, 20, size) + field(3, 30, size) + field(3, 60, b"\1\0") + field(3, 120, b"\5") + field(8, 10, data)


@pytest.mark.parametrize("place", ["decoder", "gallery"])
@pytest.mark.parametrize("kind", ["eps", "eps with a preview", "iptc", "eps in a tar"])
def test_no_other_program_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, kind: str) -> None:
    called = tmp_path / "called"
    (tmp_path / "bin").mkdir()
    for name in ("gs", "gswin32c", "gswin64c"):
        program = tmp_path / "bin" / name
        program.write_text(f"#!/bin/sh\ntouch {called}\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    preview = struct.pack("<4sIIIIII", b"\xc5\xd0\xd3\xc6", 32, len(EPS), 0, 0, 0, 0).ljust(32, b"\0") + EPS
    data = {"eps": EPS, "eps with a preview": preview, "iptc": iptc(EPS), "eps in a tar": EPS}[kind]
    location = tmp_path / "photo.jpg"
    if kind == "eps in a tar":
        with tarfile.open(tmp_path / "a.tar", "w") as tar:
            member = tarfile.TarInfo("photo.jpg")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        location = tmp_path / "a.tar" / "photo.jpg"
    else:
        location.write_bytes(data)
    if place == "gallery":
        assert "ValueError" in page("x", [Hit(1.0, 0, "k", str(location))])
    elif kind == "eps in a tar":
        decoder = Decoder(Preprocess(32))
        item = TarMember("k", "k", str(tmp_path / "a.tar"), 512, len(data))
        assert "PostScript" in (decoder.into(decoder.black(1)[0], item)[1] or "")
    else:
        assert "not an image" in reason_of(location)
    assert not called.exists()


def test_every_format_that_is_served_is_one_that_pillow_reads_by_itself() -> None:
    assert {"PNG", "JPEG", "GIF", "TIFF", "BMP", "PPM", "WEBP"} <= set(image_formats())
    assert not {"EPS", "WMF", "IPTC", "BUFR", "GRIB", "HDF5", "MPEG"} & set(image_formats())
    assert not {".eps", ".ps", ".wmf", ".emf", ".iim", ".mpg"} & image_suffixes()


MISTAKEN = {
    "gzip": (gzip.compress(b"x" * 100), "compressed with gzip"),
    "bzip2": (b"BZh91AY&SY", "compressed with bzip2"),
    "xz": (b"\xfd7zXZ\0\0\4", "compressed with xz"),
    "zstd": (b"\x28\xb5\x2f\xfd\4", "compressed with zstd"),
    "zip": (b"PK\3\4\x14", "zip archive"),
    "tar": (tarfile.TarInfo("x").tobuf() + bytes(1024), "tar archive, and its name must end in .tar"),
    "parquet": (b"PAR1\x15", "parquet file, and its name must end in .parquet"),
    "heic": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(200), "HEIC: convert it"),
    "heif": (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic" + bytes(200), "HEIF: convert it"),
    "video": (b"\0\0\0\x18ftypisom\0\0\0\0isommp42", "a video"),
    "pdf": (b"%PDF-1.7\n", "PDF"),
    "svg": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "SVG"),
    "web page": (b"\n<!DOCTYPE html><html><body>404</body></html>", "web page"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 9\n", "git lfs pull"),
    "mac": (b"\0\5\x16\7\0\2\0\0Mac OS X        " + bytes(60), "AppleDouble"),
    "eps": (EPS, "PostScript"),
}


@pytest.mark.parametrize("kind", MISTAKEN)
def test_what_is_no_image_is_named_where_it_is_known(tmp_path: Path, kind: str) -> None:
    data, words = MISTAKEN[kind]
    (tmp_path / "x.jpg").write_bytes(data)
    reason = reason_of(tmp_path / "x.jpg")
    assert reason.startswith("not an image")
    assert words in reason
    with pytest.raises(ValueError, match="not an image"):
        open_image(io.BytesIO(data))


def test_several_jpegs_in_one_file_are_an_image_in_a_folder(tmp_path: Path) -> None:
    """As of a camera with two lenses. Pillow opens an MPO as a JPEG, and has no opener of that name."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.mpo", save_all=True, append_images=[Image.new("RGB", (8, 8))])
    (item,) = find_inputs([tmp_path])
    with item.open() as image:
        assert image.format == "MPO"


# --- memory ----------------------------------------------------------------------------------------------------------


def peak_of(path: Path) -> tuple[str, int]:
    """The reason of a failure, and the bytes by which decoding grew the peak of a process of its own."""
    receiving, sending = os.pipe()
    process = os.fork()
    if not process:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
        lines = Path("/proc/self/status").read_text()
        before = int(lines.partition("VmHWM:")[2].split()[0])
        try:
            reason = reason_of(path)
        except BaseException as error:
            reason = repr(error)
        after = int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
        os.write(sending, f"{after - before} {reason}".encode())
        os._exit(0)
    os.close(sending)
    with os.fdopen(receiving) as pipe:
        grown, _, reason = pipe.read().partition(" ")
    os.waitpid(process, 0)
    return reason, int(grown) * 1024


@pytest.mark.parametrize("kind", GIGABYTES)
def test_a_few_bytes_do_not_take_gigabytes(tmp_path: Path, kind: str) -> None:
    expected = of_gigabytes(tmp_path)
    if f"{kind}.jpg" not in expected:
        pytest.skip(f"this Pillow has no {kind}")
    reason, grown = peak_of(tmp_path / f"{kind}.jpg")
    assert expected[f"{kind}.jpg"] in reason
    assert grown < MEMORY_LIMIT // 4


@pytest.mark.parametrize("tile", [64, 512])
def test_a_tile_of_a_usual_size_is_read(tmp_path: Path, tile: int) -> None:
    Image.effect_noise((64, 64), 90).save(tmp_path / "x.tif", tile=(tile, tile))
    with open_image(tmp_path / "x.tif") as image:
        assert image.size == (64, 64)


def test_the_largest_image_that_pillow_opens_is_within_the_limit() -> None:
    assert Image.MAX_IMAGE_PIXELS is not None
    assert 2 * Image.MAX_IMAGE_PIXELS * 6 <= MEMORY_LIMIT  # see `_PEAK_BYTES`


@pytest.mark.parametrize("size", [MEMORY_LIMIT + 1, 1 << 40])
def test_a_file_of_holes_is_not_read(tmp_path: Path, size: int) -> None:
    with open(tmp_path / "x.webp", "wb") as file:
        file.write(b"RIFF\0\0\0\0WEBPVP8 ")
        file.truncate(size)
    assert f"{size} bytes: an image may have" in reason_of(tmp_path / "x.webp")
    with pytest.raises(ValueError, match=f"{size} bytes: an image may have"):
        TarMember("k", "k", str(tmp_path / "x.webp"), 0, size).source()


def test_compressed_fits_is_refused(tmp_path: Path) -> None:
    def card(key: str, value: object) -> bytes:
        return f"{key:8}= {value!s:>20}".encode().ljust(80)

    primary = b"".join(
        [card("SIMPLE", "T"), card("BITPIX", 8), card("NAXIS", 0), card("EXTEND", "T"), b"END".ljust(80)]
    )
    table = [card("XTENSION", "'BINTABLE'"), card("BITPIX", 8), card("NAXIS", 2), card("NAXIS1", 8), card("NAXIS2", 9)]
    table += [card("ZIMAGE", "T"), card("ZCMPTYPE", "'GZIP_1  '"), card("ZBITPIX", 8), card("ZNAXIS", 2)]
    table += [card("ZNAXIS1", 9), card("ZNAXIS2", 9), card("ZTILE1", 9), card("PCOUNT", 0), b"END".ljust(80)]
    data = primary.ljust(2880) + b"".join(table).ljust(2880) + bytes(72) + gzip.compress(bytes(1 << 20))
    (tmp_path / "x.fits").write_bytes(data)
    assert reason_of(tmp_path / "x.fits") == "compressed FITS: unpack it"


# --- base64 ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "AVIF", "JPEG2000"])
@pytest.mark.parametrize("form", ["standard", "urlsafe", "lines", "data url", "unpadded"])
def test_images_in_base64_are_known_and_decoded(name: str, form: str) -> None:
    try:
        data = saved(Image.effect_noise((40, 31), 90).convert("RGB"), name)
    except (KeyError, OSError):
        pytest.skip(f"this Pillow writes no {name}")
    text = {
        "standard": base64.b64encode(data),
        "urlsafe": base64.urlsafe_b64encode(data),
        "lines": base64.encodebytes(data),
        "data url": b"data:image/x;base64," + base64.b64encode(data),
        "unpadded": base64.b64encode(data).rstrip(b"="),
    }[form]
    assert is_base64(text)
    assert without_base64(text) == data


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"/9j/4AAQSkZJRgABAQAAAQABAAD/photo.jpg",
        b"photos/2021/iVBORw0KGgo.png",
        b"/9j/short",
        b"/data/9f/86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
        WEBP_OF_34_BYTES,
    ],
)
def test_paths_and_bytes_are_no_base64(text: bytes) -> None:
    assert not is_base64(text)
    assert without_base64(text) == text


def test_damaged_base64_is_a_reason() -> None:
    with pytest.raises(ValueError, match="damaged base64"):
        without_base64(b"iVBORw0KGgo" + b"A" * 5000 + b"!" + b"A" * 9)
