"""Whole jobs: killed, interrupted, out of disk, fed with bad images; and what they leave behind."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import struct
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from bad_files import BAD_FILES
from hostile import Hanging, Killing, KillingOnce
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image, features
from sinks import Kept

import clip_fast
from clip_fast.bulk import pipeline
from clip_fast.bulk.decoder import Decoder
from clip_fast.bulk.manifest import weights_digest
from clip_fast.bulk.pipeline import Options, Step, run, without_idle_workers
from clip_fast.bulk.shards import read_records
from clip_fast.bulk.tables import Totals
from clip_fast.cli import main as cli
from clip_fast.inputs.inputs import Files, Inputs
from clip_fast.inputs.items import ImageFile, Item

pq = pytest.importorskip("pyarrow.parquet")

MODEL = ["--model", "tiny-digits", "--dtype", "float32"]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]
SMALL = ["--shard-size", "7", "--batch-size", "3"]


class Warm:
    """Starts commands at once, in processes that can be killed."""

    def __init__(self, stderr: Path) -> None:
        root = Path(clip_fast.__file__).parent.parent
        path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        self._log = open(stderr, "wb")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, Path(__file__).parents[1] / "warm.py"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=environment,
            text=True,
        )

    def start(self, *arguments: str | Path) -> int:
        """The process's id, which is also that of its session and group."""
        word, process = self._ask(start=[*map(str, arguments)])
        assert word == "started"
        assert int(process) > 1
        return int(process)

    def end(self, signal_: int | None = None, after: float = 0.0, group: bool = False) -> int:
        """Waits for the command that was started, after sending it a signal if one is given: its exit status."""
        word, status = self._ask(end=signal_, after=after, group=group)
        assert word == "status"
        return int(status)

    def run(self, *arguments: str | Path) -> int:
        self.start(*arguments)
        return self.end()

    def _ask(self, **request: object) -> list[str]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._process.stdout.readline().split()

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(60)
        self._process.stdout.close()
        self._log.close()


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As in the processes that are compared with: a CPU's sums may depend on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    warm = Warm(tmp_path_factory.mktemp("warm") / "stderr")
    yield warm
    warm.close()


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 images of several formats, two of them broken."""
    folder = tmp_path_factory.mktemp("input") / "photos"
    folder.mkdir()
    generator = np.random.default_rng(0)
    suffixes = ("png", "jpg", "webp", "bmp", "gif", "tiff")
    for i in range(40):
        pixels = generator.integers(0, 256, (5, 6, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((40 + i, 50)).save(folder / f"{i:02d}.{suffixes[i % len(suffixes)]}")
    (folder / "13.jpg").write_bytes(b"no image")
    (folder / "30.png").write_bytes((folder / "30.png").read_bytes()[:60])
    return folder


def command(photos: Path | str, output: Path, *options: str) -> list[str]:
    device = [] if {"--device", "--devices"} & {*options} else ["--device", "cpu"]
    return ["encode", str(photos), *MODEL, *device, "--output", f"{output}/", *SMALL, "--quiet", *options]


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def undisturbed(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    assert cli.main(command(photos, output, "--workers", "0")) == 1
    return contents(output)


# --- What is written -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
def test_shards_have_a_row_for_every_input_in_order(photos: Path, tmp_path: Path, device: str) -> None:
    output = tmp_path / "out"
    assert cli.main(command(photos, output, "--workers", "0", "--device", device)) == 1
    shards = sorted((output / "img_emb").iterdir())
    assert [path.name for path in shards] == [f"img_emb_{i:04d}.npy" for i in range(6)]
    rows = [np.load(path) for path in shards]
    assert [len(each) for each in rows] == [7] * 5 + [5]
    records = [record for i in range(6) for record in read_records(output / "metadata" / f"metadata_{i:04d}.parquet")]
    paths = sorted(photos.iterdir())
    assert [record.key for record in records] == [str(path) for path in paths]

    model, preprocess = clip_fast.load("tiny-digits", device, torch.float32)
    for path, row, record in zip(paths, np.concatenate(rows), records, strict=True):
        if path.name in ("13.jpg", "30.png"):
            assert not row.any()
            assert record.error
            continue
        assert record.error is None
        with Image.open(path) as image:
            assert (record.width, record.height) == image.size
            expected = model.encode_image(preprocess(image)[None].to(device))[0].detach().cpu().numpy()
            assert_allclose(row, expected, rtol=1e-4, atol=1e-5)

    errors = [json.loads(line) for line in (output / "errors.jsonl").read_text("utf-8").splitlines()]
    assert [Path(error["key"]).name for error in errors] == ["13.jpg", "30.png"]
    assert all(error["reason"] for error in errors)
    done = json.loads((output / "manifest.json").read_text())["done"]
    assert done == {"images": 40, "failed": 2, "shards": 6}


def test_float16_and_length_one(photos: Path, tmp_path: Path) -> None:
    options = ["--workers", "0", "--embedding-dtype", "float16", "--normalize"]
    assert cli.main(command(photos, tmp_path / "out", *options)) == 1
    rows = np.load(tmp_path / "out" / "img_emb" / "img_emb_0000.npy")
    assert rows.dtype == np.float16
    assert_allclose(np.linalg.norm(rows.astype(np.float64), axis=1), 1, atol=2e-3)


def test_the_shards_are_what_autofaiss_and_clip_retrieval_read(
    undisturbed: dict[str, bytes], photos: Path, tmp_path: Path
) -> None:
    reader = pytest.importorskip("embedding_reader")  # theirs, for both
    for name, data in undisturbed.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    folders = {"embeddings_folder": str(tmp_path / "img_emb"), "metadata_folder": str(tmp_path / "metadata")}
    opened = reader.EmbeddingReader(**folders, meta_columns=["image_path"], file_format="parquet_npy")
    assert (opened.count, opened.dimension) == (40, 64)
    rows, tables = zip(*opened(batch_size=9, show_progress=False), strict=True)
    expected = [np.load(path) for path in sorted((tmp_path / "img_emb").iterdir())]
    assert_array_equal(np.concatenate(rows), np.concatenate(expected))
    paths = [path for table in tables for path in table["image_path"]]
    assert paths == [str(path) for path in sorted(photos.iterdir())]


def test_an_embedding_that_float16_cannot_hold_is_a_failure(tmp_path: Path) -> None:
    for i, value in enumerate((10, 250, 20)):
        Image.new("RGB", (8, 8), (value, value, value)).save(tmp_path / f"{i}.png")
    items: list[Item] = [ImageFile(str(i), str(tmp_path / f"{i}.png")) for i in range(4)]
    model = SimpleNamespace(device=torch.device("cpu"), encode_image=lambda pixels: pixels.float().mean((2, 3)) * 1000)
    decoder, sink, steps = Decoder(clip_fast.Preprocess(8)), Kept(), []
    options = Options(workers=0, dtype="float16")
    run(model, decoder, Inputs([Files(items)]), sink, options, steps.append)  # type: ignore[arg-type]
    (shard,) = sink.shards
    assert_array_equal(shard.rows[:, 0], [10_000, 0, 20_000, 0])
    first, second, third, fourth = (record.error for record in shard.records)
    assert first is third is None
    assert "not finite" in str(second)
    assert "No such file" in str(fourth)
    assert sum((step.done for step in steps), Totals()) == Totals(4, 2, 1)


def test_one_parquet_has_a_list_of_fixed_size(photos: Path, undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    output = tmp_path / "e.parquet"
    arguments = ["encode", str(photos), *MODEL, "--output", str(output), *SMALL, "--workers", "0", "--quiet"]
    assert cli.main(arguments) == 1
    table = pq.read_table(output)
    assert str(table.schema.field("embedding").type).startswith("fixed_size_list")
    assert table["status"].to_pylist().count("failed") == 2
    assert np.array(table["embedding"].to_pylist()).shape == (40, 64)
    assert [path.name for path in tmp_path.iterdir()] == ["e.parquet"]


def test_tars_and_parquet_end_to_end(photos: Path, tmp_path: Path) -> None:
    import pyarrow as pa

    files = sorted(photos.iterdir())[:6]
    for number in range(2):
        with tarfile.open(tmp_path / f"{number:04d}.tar", "w") as tar:
            for path in files[number * 3 : number * 3 + 3]:
                tar.add(path, path.name)
    table = pa.table({"image": [path.read_bytes() for path in files], "id": [f"k{i}" for i in range(6)]})
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=4)
    inputs = [str(tmp_path / "{0000..0001}.tar"), str(tmp_path / "t.parquet"), str(photos / "0[0-5].*")]
    output = tmp_path / "out"
    arguments = ["encode", *inputs, "--key-column", "id", *MODEL, "--output", f"{output}/", "--workers", "0", "--quiet"]
    assert cli.main(arguments) == 0
    rows = np.load(output / "img_emb" / "img_emb_0000.npy")
    assert len(rows) == 18
    assert_allclose(rows[:6], rows[6:12], atol=1e-6)
    assert_allclose(rows[:6], rows[12:], atol=1e-6)
    keys = [record.key for record in read_records(output / "metadata" / "metadata_0000.parquet")]
    assert keys == [f"{i:02d}" for i in range(6)] + [f"k{i}" for i in range(6)] + [str(path) for path in files]


@pytest.mark.slow
def test_worker_processes_and_two_devices_give_the_same_bytes(
    photos: Path, undisturbed: dict[str, bytes], tmp_path: Path, warm: Warm
) -> None:
    assert warm.run(*command(photos, tmp_path / "workers", "--workers", "2")) == 1
    assert contents(tmp_path / "workers") == undisturbed
    assert warm.run(*command(photos, tmp_path / "two", "--workers", "1", "--devices", "cpu,cpu")) == 1
    assert contents(tmp_path / "two") == undisturbed


FORMATS = {  # suffix: the modes that it is saved in
    "png": ("RGB", "L", "LA", "RGBA", "P", "1", "I;16"),
    "jpg": ("RGB", "L", "CMYK"),
    "webp": ("RGB", "RGBA"),
    "gif": ("P", "L"),
    "tiff": ("RGB", "L", "CMYK", "F", "1"),
    "bmp": ("RGB", "P", "1"),
    "ppm": ("RGB", "L"),
    "tga": ("RGB", "RGBA"),
    "jp2": ("RGB", "L"),
    "pcx": ("RGB", "L"),
}
PHOTOGRAPHS = sorted(path for path in (Path(__file__).parents[1] / "data").iterdir() if path.suffix in (".jpg", ".png"))


def animate(image: Image.Image, path: Path) -> None:
    image.save(path, save_all=True, append_images=[Image.new("RGB", image.size), image.rotate(180)])


def turn(image: Image.Image, path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the orientation
    image.save(path, exif=exif)


def save_psd(image: Image.Image, path: Path) -> None:
    """What Pillow reads and does not write: three planes, uncompressed."""
    header = struct.pack(">4sH6xHIIHH", b"8BPS", 1, 3, image.height, image.width, 8, 3)
    planes = b"".join(plane.tobytes() for plane in image.split())
    path.write_bytes(header + struct.pack(">III", 0, 0, 0) + struct.pack(">H", 0) + planes)


SPECIAL: dict[str, Callable[[Image.Image, Path], object]] = {
    "animated.gif": animate,
    "animated.png": animate,
    "animated.webp": animate,
    "turned.jpg": turn,
    "icon.ico": lambda image, path: image.save(path, sizes=[image.size]),
    "layers.psd": save_psd,
    os.fsdecode(b"caf\xe9.png"): lambda image, path: image.save(path),
}
if features.check("avif"):
    SPECIAL["picture.avif"] = lambda image, path: image.save(path)
BAD_KINDS = [kind for kind in BAD_FILES if kind not in ("missing", "folder")]  # which a folder's files cannot be


@pytest.mark.slow
def test_a_thousand_images_of_all_formats_and_broken_ones(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    kinds = [(suffix, mode) for suffix, modes in FORMATS.items() for mode in modes]
    folder, output = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for i in range(1000 - len(PHOTOGRAPHS) - len(SPECIAL)):
        suffix, mode = kinds[i % len(kinds)]
        width, height = generator.integers(1, 60, 2)
        pixels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).convert("L" if mode == "LA" else mode.partition(";")[0]).convert(mode).save(
            folder / f"{i:04d}.{suffix}"
        )
    for name, save in SPECIAL.items():
        save(Image.fromarray(generator.integers(0, 256, (30, 40, 3), dtype=np.uint8)), folder / name)
    broken = {folder / f"{i:04d}-{kind}.jpg": BAD_FILES[kind] for i, kind in enumerate(BAD_KINDS)}  # among the others
    for path, (make, _) in broken.items():
        make(path)
    arguments = ["encode", str(folder), *map(str, PHOTOGRAPHS), *MODEL, "--device", "cpu", "--output", f"{output}/"]
    assert cli.main([*arguments, "--quiet", "--shard-size", "300", "--batch-size", "64", "--workers", "2"]) == 1
    rows = np.concatenate([np.load(path) for path in sorted((output / "img_emb").iterdir())])
    paths = [*sorted(folder.iterdir()), *PHOTOGRAPHS]
    records = [record for i in range(4) for record in read_records(output / "metadata" / f"metadata_{i:04d}.parquet")]
    assert [record.key for record in records] == [
        str(path).encode("utf-8", "backslashreplace").decode() for path in paths
    ]

    reasons = {Path(record.key): record.error for record in records if record.error is not None}
    assert reasons.keys() == broken.keys()
    for path, (_, expected) in broken.items():
        assert expected in reasons[path]
    errors = [json.loads(line) for line in (output / "errors.jsonl").read_text("utf-8").splitlines()]
    assert [(Path(error["key"]), error["reason"]) for error in errors] == list(reasons.items())
    assert not rows[[path in broken for path in paths]].any()

    model, preprocess = clip_fast.load("tiny-digits", "cpu")
    images: list[torch.Tensor] = []
    for path in paths:
        if path not in broken:
            with Image.open(path) as image:
                images.append(preprocess(image))
    assert len(images) == 1000
    good = rows[[path not in broken for path in paths]]
    with torch.no_grad():
        expected_rows = model.encode_image(torch.stack(images)).numpy()
    assert_allclose(good, expected_rows, rtol=1e-3, atol=1e-4)


# --- What is killed goes on ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tars(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The photos in three tars, with a text beside each."""
    folder = tmp_path_factory.mktemp("input") / "tars"
    folder.mkdir()
    paths = sorted(photos.iterdir())
    for number in range(3):
        with tarfile.open(folder / f"{number}.tar", "w") as tar:
            for path in paths[number::3]:
                tar.add(path, path.name)
                tar.addfile(tarfile.TarInfo(f"{path.stem}.txt"))
    return folder


@pytest.fixture(scope="module")
def undisturbed_tars(tars: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    assert cli.main(command(f"{tars}/*.tar", output, "--workers", "0")) == 1
    return contents(output)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("source", "how", "kills"),
    [
        ("photos", ["--workers", "0"], 32),
        ("photos", ["--workers", "2"], 8),
        ("tars", ["--workers", "0"], 12),
        ("tars", ["--workers", "1", "--devices", "cpu,cpu"], 8),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_killed_at_random_moments_it_ends_with_the_same_bytes(
    source: str, how: list[str], kills: int, tmp_path: Path, warm: Warm, request: pytest.FixtureRequest
) -> None:
    """Half of the kills are spread evenly over a run's course, and half follow a shard at once."""
    photos = request.getfixturevalue(source)
    undisturbed = request.getfixturevalue("undisturbed" if source == "photos" else "undisturbed_tars")
    inputs = photos if source == "photos" else f"{photos}/*.tar"
    resume = ("--resume", *how)
    warm.start(*command(inputs, tmp_path / "timed", *resume))
    start = time.perf_counter()
    assert warm.end() == 1
    duration = time.perf_counter() - start
    assert contents(tmp_path / "timed") == undisturbed
    print(f"{source}, {how}: undisturbed {duration:.2f} s")

    groups = [False, True] * (kills // 4)  # the workers with it, or left to notice
    parts = [(part + random.random()) / (kills // 2) for part in range(kills // 2)]  # of what is left of a run
    moments: list[tuple[float | None, bool]] = [*zip(parts, groups, strict=True), *((None, group) for group in groups)]
    random.shuffle(moments)
    job = 0
    while moments:
        output = tmp_path / f"out{job}"
        job += 1

        def shards(output: Path = output) -> int:
            return len(list(output.glob("metadata/metadata_*.parquet")))

        while moments and (before := shards()) < 5:  # kills of the same job, while there is much to do
            part, group = moments[-1]
            warm.start(*command(inputs, output, *resume))
            start = time.perf_counter()
            if part is not None:
                moment = duration * (0.25 + 0.75 * part * (6 - before) / 6)  # in the first quarter it only loads
            else:  # as soon as it has written some more shards
                moment, wanted = 0.0, min(before + random.randrange(1, 4), 6)
                while shards() < wanted and time.perf_counter() < start + 2 * duration:
                    time.sleep(0.001)
            status = warm.end(signal.SIGKILL, after=moment, group=group)
            taken = time.perf_counter() - start
            print(f"killed after {taken:.3f} s{' with its workers' * group}: {status}, {shards()} shards")
            if status == 1:  # it was done before: the kill is tried again, earlier
                moments[-1] = part and part * random.random(), group
                break
            assert status == -signal.SIGKILL
            moments.pop()
        assert warm.run(*command(inputs, output, *resume)) == 1
        assert contents(output) == undisturbed


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("devices", [["--workers", "2"], ["--workers", "1", "--devices", "cpu,cpu"]])
def test_a_killed_run_leaves_no_processes_and_goes_on(
    photos: Path, undisturbed: dict[str, bytes], tmp_path: Path, warm: Warm, devices: list[str]
) -> None:
    output = tmp_path / "out"
    group = warm.start(*command(photos, output, *devices))
    while not list(output.glob("metadata/metadata_*")):
        time.sleep(0.001)
    assert warm.end(signal.SIGKILL) in (-signal.SIGKILL, 1)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)  # asks only
        except ProcessLookupError:
            break
        time.sleep(0.05)
    else:
        pytest.fail(f"processes of group {group} are left")
    assert cli.main(command(photos, output, "--resume", "--workers", "0")) == 1
    assert contents(output) == undisturbed


@pytest.mark.slow
@pytest.mark.parametrize(
    "how", [["--workers", "0"], ["--workers", "2"], ["--workers", "0", "--devices", "cpu,cpu"]], ids=" ".join
)
def test_ctrl_c_leaves_what_can_be_resumed(
    photos: Path, undisturbed: dict[str, bytes], tmp_path: Path, warm: Warm, how: list[str]
) -> None:
    start = time.perf_counter()
    assert warm.run(*command(photos, tmp_path / "timed", *how)) == 1
    duration = time.perf_counter() - start
    for attempt in range(20):  # it, or its last shard, may be done before the signal arrives
        output = tmp_path / f"out{attempt}"
        warm.start(*command(photos, output, *how))
        while not (output / "manifest.json").exists():
            time.sleep(0.001)
        status = warm.end(signal.SIGINT, after=random.uniform(0, duration / 2), group=True)
        if status != 1 and len(list(output.glob("metadata/metadata_*"))) < 6:
            break
    assert status == 130
    if "--devices" not in how:  # whose processes are killed; what they leave, the next run removes
        assert not list(output.rglob("*.tmp"))
    assert len(list(output.glob("metadata/metadata_*"))) < 6
    assert cli.main(command(photos, output, "--resume", "--workers", "0")) == 1
    assert contents(output) == undisturbed


def test_a_disk_that_does_not_answer_while_a_tar_is_listed_ends_the_run_and_it_goes_on(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = sorted(photos.iterdir())
    for number in range(2):
        with tarfile.open(tmp_path / f"{number}.tar", "w") as tar:
            for path in files[number * 20 : number * 20 + 20]:
                tar.add(path, path.name)
    tars = str(tmp_path / "{0,1}.tar")
    assert cli.main(command(tars, tmp_path / "undisturbed", "--workers", "0")) == 1
    read = tarfile.TarInfo.fromtarfile

    def failing(tar: tarfile.TarFile) -> tarfile.TarInfo:
        if str(tar.name).endswith("1.tar") and tar.offset:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(tar)

    with monkeypatch.context() as patch:
        patch.setattr(tarfile.TarInfo, "fromtarfile", staticmethod(failing))
        assert cli.main(command(tars, tmp_path / "out", "--workers", "0")) == 2
    assert os.strerror(errno.EIO) in capsys.readouterr().err
    assert len(list((tmp_path / "out" / "img_emb").iterdir())) <= 3  # of 7 each: what was being written is given up
    assert cli.main(command(tars, tmp_path / "out", "--workers", "0", "--resume")) == 1
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")


@pytest.mark.parametrize("device", DEVICES)
def test_at_most_the_unfinished_shards_are_done_again(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], device: str
) -> None:
    output, on = tmp_path / "out", ("--device", device)
    assert cli.main(command(photos, output, "--workers", "0", *on)) == 1
    undisturbed = contents(output)
    for name in ("metadata/metadata_0002.parquet", "img_emb/img_emb_0004.npy"):
        (output / name).unlink()
    kept = {path: path.stat().st_mtime_ns for path in (output / "img_emb").iterdir() if "0002" not in path.name}
    capsys.readouterr()
    assert cli.main(command(photos, output, "--resume", "--workers", "0", "--json", *on)) == 1
    summary = json.loads(capsys.readouterr().out)
    assert (summary["images"], summary["failed"], summary["resumed"]) == (40, 2, 26)
    assert summary["complete"]
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert contents(output) == undisturbed


def test_other_settings_are_refused_and_named(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    assert cli.main(command(photos, output, "--workers", "0")) == 1
    before = contents(output)
    assert cli.main([*command(photos, output, "--workers", "0", "--resume", "--normalize"), "--batch-size", "4"]) == 2
    said = capsys.readouterr().err
    assert "batch_size was 3, is 4; normalize was False, is True" in said
    torch.set_num_threads(2)  # a CPU's sums may follow it
    assert cli.main(command(photos, output, "--workers", "0", "--resume")) == 2
    torch.set_num_threads(1)
    assert "other settings: threads was 1, is 2" in capsys.readouterr().err
    assert cli.main(command(photos, output, "--workers", "0")) == 2
    assert "holds an earlier run" in capsys.readouterr().err
    assert contents(output) == before


def encode_list(names: Path, files: list[str], output: Path, *options: str) -> int:
    names.write_text("\n".join(files))
    arguments = command("", output, "--workers", "0", *options)
    arguments[1:2] = ["--files-from", str(names)]
    return cli.main(arguments)


CHANGES: dict[str, Callable[[list[str]], list[str]]] = {
    "one fewer": lambda files: files[1:],
    "two swapped": lambda files: [*files[:20], files[21], files[20], *files[22:]],
    "the last fewer": lambda files: files[:-1],
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_inputs_are_refused(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: str
) -> None:
    files = sorted(map(str, photos.iterdir()))
    assert encode_list(tmp_path / "names", files, tmp_path / "out") == 1
    manifest = (tmp_path / "out" / "manifest.json").read_bytes()
    assert b"done" in manifest
    assert encode_list(tmp_path / "names", CHANGES[change](files), tmp_path / "out", "--resume") == 2
    assert "the inputs have changed" in capsys.readouterr().err
    assert (tmp_path / "out" / "manifest.json").read_bytes() == manifest
    assert encode_list(tmp_path / "names", files, tmp_path / "out", "--resume") == 1


@pytest.mark.parametrize("first", [35, 37])
def test_inputs_after_those_of_a_run_are_done(photos: Path, tmp_path: Path, first: int) -> None:
    """The last shard is made again where it was not full."""
    files = sorted(map(str, photos.iterdir()))
    assert encode_list(tmp_path / "names", files[:first], tmp_path / "out") == 1
    kept = {path: path.stat().st_mtime_ns for path in sorted(tmp_path.glob("out/img_emb/*"))[: first // 7]}
    assert encode_list(tmp_path / "names", files, tmp_path / "out", "--resume") == 1
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert encode_list(tmp_path / "names", files, tmp_path / "all") == 1
    assert contents(tmp_path / "out") == contents(tmp_path / "all")


@pytest.mark.timeout(120)
def test_a_second_process_is_refused(
    photos: Path, tmp_path: Path, warm: Warm, capsys: pytest.CaptureFixture[str]
) -> None:
    output, pipe = tmp_path / "out", tmp_path / "pipe"
    os.mkfifo(pipe)
    arguments = command(photos, output, "--resume", "--workers", "0")
    warm.start(*arguments, "--files-from", pipe)  # has the folder, and waits for the other end of the pipe
    while not (output / ".lock").exists():
        time.sleep(0.01)
    time.sleep(0.1)
    assert cli.main(arguments) == 2
    assert "another process is writing" in capsys.readouterr().err
    assert warm.end(signal.SIGKILL) == -signal.SIGKILL
    assert cli.main(arguments) == 1


# --- A full disk -----------------------------------------------------------------------------------------------------


def test_a_disk_that_is_full_for_a_while(
    photos: Path, undisturbed: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, calls, sync = tmp_path / "out", [], os.fsync

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 10:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    assert cli.main(command(photos, output, "--workers", "0")) == 2
    assert not list(output.rglob("*.tmp"))
    assert 1 <= len(list(output.glob("metadata/*"))) < 6
    monkeypatch.setattr(os, "fsync", sync)
    assert cli.main(command(photos, output, "--workers", "0", "--resume")) == 1
    assert contents(output) == undisturbed


def test_a_small_disk(
    photos: Path, undisturbed: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=44k", "tmpfs", disk], capture_output=True, check=False)
    if mount.returncode:
        pytest.skip(f"a small tmpfs cannot be mounted: {mount.stderr.decode()}; the test above fakes one")
    try:
        assert cli.main(command(photos, disk / "out", "--workers", "0")) == 2
        assert "No space left" in capsys.readouterr().err
        assert not list(disk.rglob("*.tmp"))
        assert 1 <= len(list(disk.glob("out/metadata/*"))) < 6
        subprocess.run(["mount", "-o", "remount,size=10m", disk], check=True)
        assert cli.main(command(photos, disk / "out", "--workers", "0", "--resume")) == 1
        assert contents(disk / "out") == undisturbed
    finally:
        subprocess.run(["umount", disk], check=True)


# --- Bad images ------------------------------------------------------------------------------------------------------


def embedded(items: list[Item], **options: object) -> tuple[Kept, Totals]:
    model, preprocess = clip_fast.load("tiny-digits", "cpu")
    sink, steps = Kept(), []
    inputs = Inputs([Files(items)])
    run(model, Decoder(preprocess), inputs, sink, Options(**options), steps.append)  # type: ignore[arg-type]
    return sink, sum((step.done for step in steps), Totals())


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_workers_that_die_or_hang_are_replaced(photos: Path, tmp_path: Path) -> None:
    good = [ImageFile(path.stem, str(path)) for path in sorted(photos.iterdir())[:10]]
    items: list[Item] = list(good)
    items[2] = Hanging("hanging", "h")
    items[5] = Killing("killing", "k")
    items[7] = KillingOnce("once", good[7].location, str(tmp_path / "marker"))
    sink, totals = embedded(items, batch_size=2, workers=2, time_limit=2.0)
    (shard,) = sink.shards
    assert totals == Totals(10, 2, 1)
    assert [record.key for record in shard.records] == [item.key for item in items]
    assert [i for i, record in enumerate(shard.records) if record.error] == [2, 5]
    assert "took longer than 2 s" in str(shard.records[2].error)
    expected, _ = embedded(list(good), batch_size=2, workers=0)
    healthy = [0, 1, 3, 4, 6, 7, 8, 9]
    assert_allclose(shard.rows[healthy], expected.shards[0].rows[healthy], rtol=1e-5, atol=1e-6)
    assert not shard.rows[[2, 5]].any()


def test_max_errors_ends_the_job_with_a_status_of_its_own(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = command(photos, tmp_path / "out", "--workers", "0", "--json")
    assert cli.main([*arguments, "--max-errors", "1"]) == 3
    assert "more than --max-errors 1" in capsys.readouterr().err
    assert cli.main([*arguments, "--max-errors", "2", "--resume"]) == 1


def test_what_report_raises_ends_the_run(photos: Path) -> None:
    def report(step: Step) -> None:
        raise KeyboardInterrupt

    model, preprocess = clip_fast.load("tiny-digits", "cpu")
    items: list[Item] = [ImageFile(path.stem, str(path)) for path in sorted(photos.iterdir())]
    with pytest.raises(KeyboardInterrupt):
        run(model, Decoder(preprocess), Inputs([Files(items)]), Kept(), Options(batch_size=2, workers=0), report)


@dataclass(frozen=True)
class Table(Files):
    """Stands for a container of `known` items, or of a number that only iterating tells."""

    known: int | None = None

    def count(self) -> int | None:
        return self.known


@pytest.mark.parametrize(
    ("counts", "workers"),
    [([1], 1), ([4], 1), ([5], 2), ([4, 1], 2), ([10], 3), ([11], 4), ([10, 10, 10], 9), ([1000], 9), ([1, None], 9)],
)
def test_there_are_no_more_workers_than_batches(counts: list[int | None], workers: int) -> None:
    """Which end with their shards, of 10."""
    inputs = Inputs([Table([], count) for count in counts])
    options = Options(batch_size=4, shard_size=10, workers=9)
    assert without_idle_workers(options, inputs) == replace(options, workers=workers)


def test_a_job_starts_no_more_workers_than_it_has_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    class Seen(Exception):
        pass

    def workers(_: Decoder, count: int, **options: object) -> None:
        raise Seen(count)

    monkeypatch.setattr(pipeline, "Workers", workers)
    with pytest.raises(Seen, match="1"):
        embedded([ImageFile("x", "x.png")], workers=40)


# --- Settings --------------------------------------------------------------------------------------------------------


def test_the_digest_follows_every_weight() -> None:
    model, _ = clip_fast.load("tiny-digits", "cpu")
    before = weights_digest(model)
    assert weights_digest(clip_fast.load("tiny-digits", "cpu")[0]) == before
    with torch.no_grad():
        next(reversed(list(model.parameters()))).view(-1)[-1] += 1e-3
    assert weights_digest(model) != before
