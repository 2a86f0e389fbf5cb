"""Damaged images of every format: each has its row, in order, and the decoder's memory stays bounded."""

from __future__ import annotations

import io
import random
from pathlib import Path

import pytest
from hostile import Peak
from mutations import mutated
from PIL import Image, features

from clip_fast.bulk.decoder import Decoder
from clip_fast.bulk.workers import Workers, WorkItem
from clip_fast.inputs.items import ImageFile, Item
from clip_fast.preprocess import Preprocess

KINDS: list[tuple[str, str, dict[str, object]]] = [
    *(("PNG", mode, {}) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")),
    *(("JPEG", mode, {"progressive": progressive}) for mode in ("L", "RGB", "CMYK") for progressive in (False, True)),
    *(("TIFF", "RGB", {"compression": each}) for each in (None, "tiff_deflate", "tiff_lzw", "jpeg", "packbits")),
    *(("WEBP", "RGBA", {"lossless": each}) for each in (False, True)),
    *((name, "RGB", {}) for name in ("AVIF", "BMP", "GIF", "ICNS", "ICO", "IM", "JPEG2000", "MPO", "PCX", "PPM")),
    *((name, "RGB", {}) for name in ("QOI", "SGI", "SPIDER", "TGA")),
    ("DDS", "RGBA", {}),
    ("FITS", "L", {}),
    ("MSP", "1", {}),
    ("TIFF", "F", {}),
    ("XBM", "1", {}),
]


def seeds() -> list[bytes]:
    """A small image of every kind that this Pillow writes."""
    found = [b"SIMPLE  =                    T".ljust(80) + b"END".ljust(2800) + bytes(100)]
    noise = Image.effect_noise((40, 30), 90)
    for name, mode, options in KINDS:
        if (name == "AVIF" and not features.check("avif")) or (name == "JPEG2000" and not features.check("jpg_2000")):
            continue
        file = io.BytesIO()
        image = noise.convert("I").convert("I;16") if mode == "I;16" else noise.convert(mode)
        try:
            image.save(file, name, **options)
        except (KeyError, OSError, ValueError):  # a format that this Pillow does not write
            continue
        found.append(file.getvalue())
    assert len(found) > 20
    return found


def check(folder: Path, count: int) -> None:
    files = seeds()
    good = folder / "good.png"
    Image.new("RGB", (40, 30)).save(good)
    items: list[Item] = [ImageFile("good", str(good))]
    for i in range(count):
        path = folder / f"{i}.jpg"
        path.write_bytes(mutated(random.choice(files), files))
        items.append(ImageFile(str(i), str(path)))
    items += [ImageFile("good", str(good)), Peak("peak", "peak")]
    batches = [WorkItem(items[i : i + 32], 0, i, len(items)) for i in range(0, len(items), 32)]
    rows: list[tuple[int, str | None]] = []
    with Workers(Decoder(Preprocess(32)), 1, time_limit=20) as workers:
        for batch, result in workers.decode(iter(batches)):
            assert len(batch.items) == len(result.pixels) == len(result.sizes)
            rows += [(int(width), result.errors.get(i)) for i, (width, _) in enumerate(result.sizes)]
    assert len(rows) == count + 3
    assert rows[0] == rows[-2] == (40, None)
    assert all(error or width for width, error in rows)  # no row without a picture or a reason
    assert sum(error is not None for _, error in rows) > count / 10
    assert int(rows[-1][1] or "") < 2 << 30


def test_a_hundred_damaged_images_have_their_rows(tmp_path: Path) -> None:
    check(tmp_path, 100)


@pytest.mark.slow
def test_thousands_of_damaged_images_have_their_rows(tmp_path: Path) -> None:
    check(tmp_path, 4000)
