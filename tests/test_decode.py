"""Items to pixels: every kind of bad image is a reason, none an exception."""

from __future__ import annotations

import os
import pickle
import select
from pathlib import Path

import numpy as np
import pytest
import torch
from bad_files import BAD_FILES
from numpy.testing import assert_array_equal
from PIL import Image

from clip_fast.decode import Batch, Decoded, Decoder, decode_batches
from clip_fast.preprocess import Preprocess
from clip_fast.sources import ImageFile, Item

DECODER = Decoder(Preprocess(32))
PHOTOGRAPHS = sorted((Path(__file__).parent / "data").glob("*.jpg"))


def item(path: Path) -> Item:
    return ImageFile(path.name, str(path))


def decoded(path: Path, decoder: Decoder = DECODER) -> tuple[np.ndarray, tuple[int, int], str | None]:
    pixels = decoder.black(1)
    size, error = decoder.into(pixels[0], item(path))
    return pixels[0].numpy(), size, error


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_bad_file_is_a_reason_and_black(tmp_path: Path, kind: str) -> None:
    make, expected = BAD_FILES[kind]
    make(tmp_path / "x.jpg")
    pixels, _, reason = decoded(tmp_path / "x.jpg")
    assert reason is not None
    assert expected in reason
    assert not pixels.any()
    assert decoded(tmp_path / "x.jpg")[2] == reason  # the same words again


def test_a_name_that_is_no_text_is_good(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"caf\xe9.png")
    Image.new("RGB", (5, 4)).save(path)
    assert decoded(path)[1:] == ((5, 4), None)


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (5000, 3000)])
def test_small_and_large_images_are_good(tmp_path: Path, size: tuple[int, int]) -> None:
    Image.new("RGB", size, (9, 8, 7)).save(tmp_path / "x.png")
    pixels, found, reason = decoded(tmp_path / "x.png")
    assert (found, reason) == (size, None)
    assert_array_equal(pixels[:, 0, 0], [9, 8, 7])


@pytest.mark.parametrize("path", PHOTOGRAPHS, ids=lambda path: path.name)
def test_pixels_are_those_of_preprocess_and_fast_ones_near(path: Path) -> None:
    with Image.open(path) as image:
        exact, size = DECODER.preprocess.uint8(image).numpy(), image.size
    pixels, found, _ = decoded(path)
    assert found == size
    assert_array_equal(pixels, exact)
    fast, found, _ = decoded(path, Decoder(DECODER.preprocess, fast=True))
    assert found == size
    difference = np.abs(fast.astype(int) - exact)
    assert difference.any()  # a reduced scale was used
    assert difference.mean() < 3


def test_batches_come_in_order_with_their_failures(tmp_path: Path) -> None:
    for i in range(6):
        Image.new("RGB", (5, 4), (i, 1, 2)).save(tmp_path / f"{i}.png")
    (tmp_path / "3.png").write_bytes(b"")
    items = [item(tmp_path / f"{i}.png") for i in range(6)]
    batches = [Batch(items[i : i + 2], 0, i, 6) for i in (0, 2, 4)]
    results = list(decode_batches(DECODER, iter(batches), workers=0, time_limit=1))
    assert [batch for batch, _ in results] == batches
    pixels = np.concatenate([decoded.pixels.numpy() for _, decoded in results])
    assert pixels.shape == (6, 3, 32, 32)
    assert pixels.dtype == np.uint8
    assert_array_equal(pixels[:, 0, 5, 5], [0, 1, 2, 0, 4, 5])
    assert [list(decoded.errors) for _, decoded in results] == [[], [1], []]
    assert results[1][1].sizes.tolist() == [[5, 4], [0, 0]]


def test_a_decoded_batch_without_its_tensors_fits_a_pipe() -> None:
    empty = torch.empty(0)
    errors = dict.fromkeys(range(0, 1024, 64), "not an image, or not in a format that Pillow reads")
    assert len(pickle.dumps(Decoded(empty, empty, errors))) < select.PIPE_BUF // 2  # tensors go as some 500 bytes each


def test_nothing_to_decode() -> None:
    assert list(decode_batches(DECODER, iter([]), workers=0, time_limit=1)) == []
