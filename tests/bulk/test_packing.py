"""Images that travel as they are: the squares, and the embeddings, are those of images that workers resize."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from sinks import Kept

import clip_fast
from clip_fast.bulk import packing, pipeline
from clip_fast.bulk.decoder import Decoder, Squares
from clip_fast.bulk.packing import Packed, Packing, Rooms, header_of, squares, tall_first, tall_images_first
from clip_fast.bulk.pipeline import Options, Step, run
from clip_fast.bulk.tables import Shard
from clip_fast.inputs.inputs import Files, Inputs
from clip_fast.inputs.items import ImageFile, Item
from clip_fast.kernels import dispatch
from clip_fast.preprocess import Preprocess

DATA = Path(__file__).parents[1] / "data"
assert tall_images_first() is not None, "the installed Pillow resizes otherwise than `resize` does"
TALL = tall_images_first() is True

# (width, height) of RGB: around the side of 32; of one order and of the other; thin; too large to travel below
SIZES = [(32, 32), (33, 31), (20, 70), (40, 150), (150, 40), (64, 48), (16, 16), (15, 200), (1, 9), (400, 300)]
MODES = ("1", "L", "LA", "P", "RGBA", "CMYK", "I", "F")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """A CPU's sums may depend on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def noise(mode: str, width: int, height: int) -> Image.Image:
    image = Image.fromarray(torch.randint(0, 256, (height, width, 4), dtype=torch.uint8).numpy())
    return image.convert("RGB").convert(mode) if mode not in ("RGBA", "LA") else image.convert(mode)


@pytest.fixture
def items(tmp_path: Path) -> list[Item]:
    """Images of all kinds, with a missing and a broken one, in a random order."""
    names = [f"{width}x{height}.png" for width, height in SIZES]
    for name, size in zip(names, SIZES, strict=True):
        noise("RGB", *size).save(tmp_path / name)
    for mode in MODES:
        names.append(f"{mode}.tiff")
        noise(mode, 70, 50).save(tmp_path / names[-1])
    noise("RGB", 90, 60).save(tmp_path / "broken.jpg")
    (tmp_path / "broken.jpg").write_bytes((tmp_path / "broken.jpg").read_bytes()[:900])
    paths = [*(tmp_path / name for name in names), tmp_path / "broken.jpg", tmp_path / "missing.jpg"]
    paths += [path for path in DATA.iterdir() if path.suffix in (".jpg", ".png")]
    random.Random(torch.seed()).shuffle(paths)
    return [ImageFile(path.name, str(path)) for path in paths]


def unpacked(packed: Packed) -> torch.Tensor:
    plan = packed.plan(shared=False)
    return squares(packed.pixels, plan, header_of(plan))


def assert_same_squares(
    decoder: Decoder, items: Sequence[Item], packing: Packing, rooms: Rooms | None = None
) -> Packed:
    wanted = Squares(decoder, len(items), shared=False)
    packed = Packed(decoder, packing, len(items), rooms)
    for number, item in enumerate(items):
        assert packed.into(number, item) == wanted.into(number, item), item
    got = unpacked(packed)
    for number, item in enumerate(items):
        assert torch.equal(got[number], wanted.pixels[number]), item
    return packed


# --- the squares -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "preprocess",
    [
        Preprocess(32),
        Preprocess(32, bilinear=True),
        Preprocess(32, squash=True),
        Preprocess(32, on_white=True),
        Preprocess(32, squash=True, on_white=True),
    ],
    ids=["crop", "bilinear", "squash", "on white", "squash, on white"],
)
@pytest.mark.parametrize("fast", [False, True], ids=["", "fast"])
def test_squares_are_those_of_the_workers(preprocess: Preprocess, fast: bool, items: list[Item]) -> None:
    assert_same_squares(Decoder(preprocess, fast), items, Packing(TALL))


def test_what_is_too_large_is_resized_before(items: list[Item]) -> None:
    decoder = Decoder(Preprocess(32))
    sizes = {
        most: len(assert_same_squares(decoder, items, Packing(TALL, *most)).pixels)
        for most in ((1 << 20, 256 << 20), (20_000, 256 << 20), (1 << 20, 60_000), (0, 0))
    }
    square = 3 * 32 * 32
    everything, small, few, none = sizes.values()
    assert everything > 3 * 400 * 300
    assert none <= (1 + len(items)) * square < small < everything
    assert none < few <= (1 + len(items)) * square + 60_000


def test_rooms_are_used_in_turn_and_black_stays_black(items: list[Item]) -> None:
    decoder, rooms = Decoder(Preprocess(32)), Rooms(2)
    places = [assert_same_squares(decoder, items, Packing(TALL), rooms).pixels.data_ptr() for _ in range(4)]
    assert places[:2] == places[2:]
    assert places[0] != places[1]


def test_an_image_that_never_comes_is_black() -> None:
    packed = Packed(Decoder(Preprocess(32)), Packing(TALL), 3, None)
    got = unpacked(packed)
    assert got.shape == (3, 3, 32, 32)
    assert not got.any()


# --- the embeddings --------------------------------------------------------------------------------------------------


def embedded(items: list[Item], workers: int) -> Shard:
    model, preprocess = clip_fast.load("tiny-digits", "cpu")
    sink, steps = Kept(), list[Step]()
    options = Options(batch_size=7, workers=workers)
    run(model, Decoder(preprocess), Inputs([Files(items)]), sink, options, steps.append)
    (shard,) = sink.shards
    return shard


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_embeddings_have_the_same_bytes(workers: int, items: list[Item], monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of a GPU on a CPU, where the op's oracle resizes."""
    items = items * 3  # more batches than rooms
    wanted = embedded(items, 0)
    calls: list[int] = []
    monkeypatch.setattr(pipeline, "packing_for", lambda preprocess, device, rooms, batch_size: Packing(TALL))
    monkeypatch.setattr(pipeline, "squares", lambda *args: calls.append(1) or squares(*args))
    got = embedded(items, workers)
    assert len(calls) == -(-len(items) // 7)
    assert got.rows.tobytes() == wanted.rows.tobytes()
    assert got.records == wanted.records
    failed = [record.key for record in got.records if record.error]
    assert sorted(failed) == ["broken.jpg"] * 3 + ["missing.jpg"] * 3


# --- whether, and how ------------------------------------------------------------------------------------------------


def test_the_order_is_that_of_the_installed_pillow() -> None:
    """Beside the border between the orders, and anywhere."""
    generator = np.random.default_rng(torch.seed())
    for near in [False, True] * 60:
        width, height, columns, rows = (int(x) for x in generator.integers(1, 120, 4))
        if near:
            rows = min(rows, height)
            columns = max(1, width - (height - rows) // 2 + int(generator.integers(-1, 2)))
        image = Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))
        tall = TALL and tall_first((width, height), (columns, rows))
        between = (width, rows) if tall else (columns, height)
        one_by_one = image.resize(between, Image.Resampling.BICUBIC).resize((columns, rows), Image.Resampling.BICUBIC)
        assert one_by_one.tobytes() == image.resize((columns, rows), Image.Resampling.BICUBIC).tobytes()


def test_another_pillow_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    resize = Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda self, size, filter: resize(self, size, Image.Resampling.HAMMING))
    assert tall_images_first.__wrapped__() is None


def test_a_pillow_that_has_one_order_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    resize = Image.Image.resize

    def along_x_first(self: Image.Image, size: tuple[int, int], filter: Image.Resampling) -> Image.Image:
        return resize(resize(self, (size[0], self.height), filter), size, filter)

    monkeypatch.setattr(Image.Image, "resize", along_x_first)
    assert tall_images_first.__wrapped__() is False


def test_where_images_are_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu, free = torch.device("cpu"), torch.device("cuda"), 8 << 30
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    monkeypatch.setattr(dispatch, "triton_can_run", lambda device: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(packing, "_GPUS", tmp_path)
    square = Preprocess(224)
    assert packing.packing_for(Preprocess((128, 256)), gpu, 4, 256) is None
    assert packing.packing_for(square, cpu, 4, 256) is None
    assert packing.packing_for(square, gpu, 16, 256) == Packing(TALL)
    assert packing.packing_for(square, gpu, 17, 256) is None  # for want of room
    assert packing.packing_for(square, gpu, 32, 128) == Packing(TALL)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert packing.packing_for(square, gpu, 16, 256) is None
    assert packing.packing_for(square, gpu, 8, 256) == Packing(TALL)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # of the machine's four
    for name in "0123":
        (tmp_path / name).mkdir()
    assert packing.packing_for(square, gpu, 8, 256) is None
    assert packing.packing_for(square, gpu, 4, 256) == Packing(TALL)
    monkeypatch.setattr(packing, "tall_images_first", lambda: None)
    assert packing.packing_for(square, gpu, 4, 256) is None
    monkeypatch.setattr(packing, "tall_images_first", lambda: True)
    monkeypatch.setattr(dispatch, "triton_can_run", lambda device: False)
    assert packing.packing_for(square, gpu, 4, 256) is None
