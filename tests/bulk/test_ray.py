"""Ray Data: the encoder as a stage, and whole jobs on a local cluster, of which a worker or a node is lost half-way."""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bad_files import of_gigabytes
from hostile import Greedy, Hanging, Killing
from PIL import Image
from ray_nodes import small_cluster

import clip_fast
from clip_fast.bulk import packing, ray_job, ray_stage, workers
from clip_fast.bulk.ray_stage import ImageEncoder
from clip_fast.bulk.workers import ROOMS
from clip_fast.cli import main as cli

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
ray = pytest.importorskip("ray")
pytest.importorskip("ray.data")
MODEL = "tiny-digits"


def picture(value: int) -> Image.Image:
    return Image.new("RGB", (40, 30 + value % 7), (value % 256, 100, 255 - value % 256))


def encoded(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def expected(image: Image.Image) -> torch.Tensor:
    model, preprocess = clip_fast.load(MODEL, "cpu")
    return model.encode_image(preprocess(image).unsqueeze(0))[0]


def objects(*values: object) -> np.ndarray:
    array = np.empty(len(values), object)
    array[:] = values
    return array


# --- the stage alone -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("column", ["bytes", "image", "png", "path"])
def test_images_of_every_kind(tmp_path: Path, column: str) -> None:
    data = encoded(picture(7))
    (tmp_path / "a.png").write_bytes(data)
    values = {
        "bytes": objects(data, b"", b"nothing"),
        "image": objects(np.asarray(picture(7)), {"bytes": b"", "path": None}, {"bytes": data, "path": "a"}),
        "png": objects(data, None, data),
        "path": objects(str(tmp_path / "a.png"), str(tmp_path / "b.png"), str(tmp_path / "a.png")),
    }[column]
    encoder = ImageEncoder(MODEL, device="cpu", column="path" if column == "path" else None)
    got = encoder({column: values, "label": np.arange(3)})
    assert column not in got
    assert got["label"].tolist() == [0, 1, 2]
    torch.testing.assert_close(torch.from_numpy(got["embedding"][0]), expected(picture(7)), rtol=1e-4, atol=1e-5)
    assert got["embedding"].dtype == np.float32
    assert got["status"].tolist()[:2] == ["ok", "failed"]
    assert not got["embedding"][1].any()
    assert (got["width"][0], got["height"][0]) == (40, 30)
    assert got["error"][0] == ""
    assert got["error"][1]


NOISE = Image.effect_noise((40, 30), 90)
MODES = {
    **{mode: NOISE.convert(mode) for mode in ("1", "L", "LA", "RGB", "RGBA", "F")},
    "I;16": Image.fromarray(np.asarray(NOISE).astype(np.uint16) * 3),
    "I": Image.fromarray(np.asarray(NOISE).astype(np.int32) * 3),
    "transparent": Image.merge("RGBA", [NOISE, NOISE, NOISE, NOISE.transpose(Image.Transpose.ROTATE_180)]),
}
SHAPES = {
    "as it is": lambda array: array,
    "(H, W, 1)": lambda array: array[..., None],
    "(1, H, W)": lambda array: array[None],  # as Ray has it among others
    "big-endian": lambda array: array.astype(array.dtype.newbyteorder(">")),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mode", MODES)
def test_arrays_are_what_the_files_bytes_are(mode: str, shape: str) -> None:
    image = MODES[mode]
    array = np.asarray(image)
    if array.ndim == 3 and shape in ("(H, W, 1)", "(1, H, W)"):
        pytest.skip("it has channels")
    file = io.BytesIO()
    image.save(file, "TIFF")  # which has all of these modes
    encoder = ImageEncoder(MODEL, device="cpu", threads=1)
    got, wanted = (encoder({"image": objects(each)}) for each in (SHAPES[shape](array), file.getvalue()))
    assert wanted["status"].tolist() == ["ok"]
    for name, values in wanted.items():
        np.testing.assert_array_equal(got[name], values)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((3, 30, 40), np.uint8),
        np.zeros((30, 40, 5), np.uint8),
        np.zeros((30, 40, 3), np.uint16),
        np.zeros((30, 40, 3), np.float32),
        np.zeros((30, 40), np.int64),
        np.zeros(40, np.uint8),
        np.zeros((0, 40, 3), np.uint8),
        np.array(["x"]),
    ],
    ids=lambda array: f"{array.dtype}{array.shape}",
)
def test_arrays_that_are_no_images_are_failures(array: np.ndarray) -> None:
    good = np.asarray(picture(7))
    got = ImageEncoder(MODEL, device="cpu", threads=1)({"image": objects(array, good)})
    assert got["status"].tolist() == ["failed", "ok"]
    assert got["error"][0]


@pytest.mark.parametrize("form", ["pyarrow", "pandas"])
@pytest.mark.parametrize("column", ["bytes", "base64", "structs", "paths", "large"])
def test_batches_of_every_format_of_ray(tmp_path: Path, form: str, column: str) -> None:
    data = [encoded(picture(i)) for i in range(3)]
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(data[i])
    cells = {
        "bytes": pyarrow.array([*data, None]),
        "base64": pyarrow.array([*(base64.b64encode(each).decode() for each in data), None]),
        "structs": pyarrow.array([*({"bytes": each, "path": None} for each in data), None]),
        "paths": pyarrow.array([*(str(tmp_path / f"{i}.png") for i in range(3)), None]),
        "large": pyarrow.array([*data, None], pyarrow.large_binary()),
    }[column]
    batch = pyarrow.table({"key": pyarrow.array([1, None, 3, 4], pyarrow.int64()), "image": cells})
    encoder = ImageEncoder(MODEL, device="cpu", threads=1)
    got = encoder(batch if form == "pyarrow" else batch.to_pandas())
    if form == "pandas":
        assert list(got["key"].fillna(0)) == [1, 0, 3, 4]
        assert list(got.columns) == ["key", "width", "height", "status", "error", "embedding"]
        got = pyarrow.Table.from_pandas(got)
    assert got["key"].to_pylist() == [1, None, 3, 4]
    assert got.column_names == ["key", "width", "height", "status", "error", "embedding"]
    assert got["status"].to_pylist() == ["ok", "ok", "ok", "failed"]
    assert got["height"].to_pylist() == [30, 31, 32, 0]
    rows = torch.tensor(got["embedding"].to_pylist())
    for i in range(3):
        torch.testing.assert_close(rows[i], expected(picture(i)), rtol=1e-4, atol=1e-5)
    assert not rows[3].any()


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_hostile_images_are_failures_and_the_next_batch_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reasons = of_gigabytes(tmp_path)
    data = [Path(tmp_path, name).read_bytes() for name in reasons]
    encoder = ImageEncoder(MODEL, device="cpu", threads=2, time_limit=2)
    good = encoded(picture(7))
    for cells in ([good, *data], [str(tmp_path / name) for name in reasons], [*data, good]):
        got = encoder({"image": objects(*cells)})
        errors = [error for error in got["error"] if error]
        assert len(errors) == len(reasons)
        assert all(reason in error for reason, error in zip(reasons.values(), errors, strict=True))
        assert [status == "ok" for status in got["status"]] == [cell == good for cell in cells]
    harmful = [Greedy("g", "g"), Hanging("h", "h"), Killing("k", "k"), ray_stage.item_of(good)]
    columns = encoder.embed(harmful)
    assert columns["error"][0] == "MemoryError"
    assert all("a decoder died of it, or took longer than 2 s" in error for error in columns["error"][1:3])
    assert columns["status"].tolist() == ["failed", "failed", "failed", "ok"]
    monkeypatch.setattr(ray_stage, "CELL_LIMIT", 1000)
    got = encoder({"image": objects(bytes(1001), np.zeros((30, 40), np.uint8), good)})
    assert got["error"][0] == "1001 bytes: an image in a batch may have 1000"
    assert got["error"][1] == "1200 bytes: an image in a batch may have 1000"
    assert got["status"].tolist() == ["failed", "failed", "ok"]


def test_parts_are_of_few_images_and_few_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_stage, "_BYTES_OF_PART", 100)
    encoder = ImageEncoder(MODEL, device="cpu", threads=2)

    def parts(*cells: object) -> list[int]:
        made = encoder._parts([ray_stage.item_of(cell) for cell in cells])
        assert [part.start for part in made] == [sum(len(each.items) for each in made[:i]) for i in range(len(made))]
        assert {part.length for part in made} == {len(cells)}
        return [len(part.items) for part in made]

    assert parts() == [0]
    assert parts(b"x") == [1]
    assert parts(*[b"x"] * 5) == [3, 2]
    assert parts(*["a path"] * 40) == [16, 16, 8]
    assert parts(*[bytes(40)] * 7) == [2, 2, 2, 1]
    assert parts(bytes(101), b"x", b"x", bytes(101), bytes(101), np.zeros((9, 9), np.uint8)) == [1, 2, 1, 1, 1]


@pytest.mark.parametrize("normalize", [False, True])
def test_on_a_gpu_images_travel_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, normalize: bool) -> None:
    """The way of a GPU on a CPU, where the op's oracle resizes: in parts, with failures, and batch after batch."""
    (tmp_path / "a.png").write_bytes(encoded(picture(3)))
    cells = [*map(encoded, map(picture, range(37))), b"nothing", str(tmp_path / "a.png"), np.asarray(NOISE), None]
    cells += [encoded(NOISE.resize((300 + 7 * i, 40 + 90 * i))) for i in range(5)]
    how, asked = packing.Packing(packing.tall_images_first() is True, most_of_image=100_000), list[Any]()
    resizing = ImageEncoder(MODEL, device="cpu", normalize=normalize, threads=2)
    monkeypatch.setattr(ray_stage, "packing_for", lambda *args: asked.append(args) or how)
    travelling = ImageEncoder(MODEL, device="cpu", normalize=normalize, threads=2)
    assert asked[0][1:] == (torch.device("cpu"), 2 * ROOMS, 16)
    calls: list[int] = []
    monkeypatch.setattr(workers, "squares", lambda *args: calls.append(1) or packing.squares(*args))
    for chosen in (cells, cells[::-1], cells[:1], cells[-1:], cells[37:38]):
        got, wanted = (encoder({"image": objects(*chosen)}) for encoder in (travelling, resizing))
        for name in ("status", "error", "width", "height"):
            assert got[name].tolist() == wanted[name].tolist()
        assert got["embedding"].tobytes() == wanted["embedding"].tobytes()
    assert len(calls) == 5


def printed(folder: Path, script: str, *arguments: str) -> str:
    """What a script prints that runs in a folder."""
    (folder / "script.py").write_text(script)
    environment = os.environ | {"PYTHONPATH": str(Path(clip_fast.__file__).parents[1])}
    command = [sys.executable, "script.py", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=True)
    return done.stdout


def test_a_script_without_a_guard_may_call_it(tmp_path: Path) -> None:
    """Decoding processes, which start anew, do not run it."""
    (tmp_path / "a.png").write_bytes(encoded(picture(1)))
    script = (
        "import sys, clip_fast.ray\n"
        "print('once')\n"
        "encoder = clip_fast.ray.ImageEncoder('tiny-digits', device='cpu', threads=2)\n"
        "for _ in range(2):\n"
        "    print(encoder({'image': [sys.argv[1], b'']})['status'].tolist())\n"
    )
    assert printed(tmp_path, script, str(tmp_path / "a.png")) == "once\n['ok', 'failed']\n['ok', 'failed']\n"


def test_batches_of_other_kinds_are_refused() -> None:
    encoder = ImageEncoder(MODEL, device="cpu", threads=1)
    empty = encoder(pyarrow.table({"image": pyarrow.array([], pyarrow.binary())}))
    assert empty.num_rows == 0
    with pytest.raises(TypeError, match="a batch must be of Ray's format numpy, pyarrow or pandas, got a list"):
        encoder([1])


@pytest.mark.slow
def test_images_that_ray_has_read_in_batches_of_every_format(cluster: Any, tmp_path: Path) -> None:
    modes = ["L", "LA", "RGB", "RGBA"]  # of one dtype, as Ray asks of the images in a batch
    for mode in modes:
        MODES[mode].save(tmp_path / f"{mode}.png")
    ray.init(address=cluster.address)
    try:
        read = ray.data.read_images(str(tmp_path), include_paths=True, override_num_blocks=1).materialize()
        settings = {"model": MODEL, "device": "cpu", "threads": 1}
        rows = {
            form: read.map_batches(
                ImageEncoder, fn_constructor_kwargs=settings, batch_format=form, batch_size=2, concurrency=1
            ).take_all()
            for form in ("numpy", "pyarrow", "pandas")
        }
    finally:
        ray.shutdown()
    for found in rows.values():
        assert {Path(row["path"]).stem: row["status"] for row in found} == dict.fromkeys(modes, "ok")
        for row in found:
            got, wanted = torch.tensor(np.array(row["embedding"], np.float32)), expected(Image.open(row["path"]))
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_normalised_embeddings_and_batches_without_images() -> None:
    encoder = ImageEncoder(MODEL, device="cpu", normalize=True)
    got = encoder({"bytes": objects(encoded(picture(1)))})
    assert np.linalg.norm(got["embedding"][0]) == pytest.approx(1, abs=1e-5)
    with pytest.raises(ValueError, match="none of the columns label is known to hold images"):
        encoder({"label": np.arange(3)})
    with pytest.raises(ValueError, match="no column 'photo', only label"):
        ImageEncoder(MODEL, device="cpu", column="photo")({"label": np.arange(3)})


def test_a_batch_of_no_images() -> None:
    got = ImageEncoder(MODEL, device="cpu")({"bytes": objects()})
    embed_dim = expected(picture(0)).shape[0]
    assert {name: values.shape for name, values in got.items()} == {
        "embedding": (0, embed_dim), "width": (0,), "height": (0,), "status": (0,), "error": (0,)
    }  # fmt: skip


def test_an_embedding_that_is_not_finite_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = ImageEncoder(MODEL, device="cpu")
    monkeypatch.setattr(encoder.encoder, "encode_image", lambda pixels: torch.tensor([[1.0, 2.0], [torch.inf, 0.0]]))
    got = encoder({"bytes": objects(encoded(picture(1)), encoded(picture(2)))})
    assert got["status"].tolist() == ["ok", "failed"]
    assert "not finite" in got["error"][1]
    assert got["embedding"].tolist() == [[1, 2], [0, 0]]


def test_columns_of_the_batch_are_not_written_over() -> None:
    batch = {"bytes": objects(encoded(picture(1))), "width": np.array([7]), "status": np.array([200])}
    with pytest.raises(ValueError, match="would be lost, rename or drop them: status, width"):
        ImageEncoder(MODEL, device="cpu")(batch)


# --- on a cluster ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Three nodes, of two CPUs each, on this machine, which has joined none of them."""
    with small_cluster(3) as nodes:
        yield nodes


def table(folder: Path) -> dict[str, dict[str, Any]]:
    """Rows by key; each once."""
    rows = [row for file in folder.glob("*.parquet") for row in parquet.read_table(file).to_pylist()]
    names = [row["key"] for row in rows]
    assert max(Counter(names).values()) == 1
    return dict(zip(names, rows, strict=True))


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def assert_same(got: dict[str, dict[str, Any]], wanted: dict[str, dict[str, Any]], folder: Path) -> None:
    """Rows as those of a run on one machine in `folder`; embeddings to the last bits, which follow the batch."""
    assert got.keys() == wanted.keys()
    for key, row in wanted.items():
        row = {**row, "image_path": str(folder / row["image_path"])}
        embeddings = [torch.tensor(each.pop("embedding")) for each in (got[key], row)]
        assert got[key] == row
        torch.testing.assert_close(*embeddings, rtol=1e-4, atol=1e-5)


def encoders(parents: set[int]) -> Iterator[int]:
    """Processes of actors that encode, children of `parents`."""
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended meanwhile
            name = (process / "cmdline").read_bytes()
            parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
            if name.startswith(b"ray::MapWorker") and b"Encoder" in name and parent in parents:
                yield int(process.name)


def raylet(node: Any) -> int:
    return node.all_processes["raylet"][0].process.pid


@pytest.mark.slow
@pytest.mark.timeout(900)  # Ray waits for what a lost node had
def test_nothing_is_lost_and_nothing_is_twice(cluster: Any, tmp_path: Path) -> None:
    """In a job that loses an actor, and later a node with another one."""
    (tmp_path / "photos").mkdir()
    for i in range(200):  # large enough to take a while
        picture(i).resize((600, 450)).save(tmp_path / "photos" / f"{i:03}.png", compress_level=1)
    for i in range(0, 200, 50):
        (tmp_path / "photos" / f"{i:03}.png").write_bytes(b"broken")
    written: list[int] = []  # files, when each was lost
    stop = threading.Event()

    def lose() -> None:
        """Once something is written, and once more is."""
        while not stop.is_set() and len(written) < 2:
            time.sleep(0.1)
            files = len(list((tmp_path / "out").glob("*.parquet")))
            if files <= max(written, default=0):
                continue
            found = ((node, actor) for node in cluster.worker_nodes for actor in encoders({raylet(node)}))
            node, actor = next(found, (None, None))
            if actor is None:
                continue
            if not written:
                os.kill(actor, signal.SIGKILL)
            else:
                cluster.remove_node(node, allow_graceful=False)
            written.append(files)

    loser = threading.Thread(target=lose)
    loser.start()
    try:
        totals = ray_job.encode(
            [str(tmp_path / "photos")], MODEL, str(tmp_path / "out"), address=cluster.address, workers=3, batch_size=2,
        )  # fmt: skip
    finally:
        stop.set()
        loser.join()
    assert not ray.is_initialized()  # it left the cluster that it had joined
    assert len(written) == 2
    assert written[1] < 200 / (2 * 8)  # all files that there will be, of 8 batches each
    assert totals == {"images": 200, "failed": 4}
    rows = table(tmp_path / "out")
    assert {Path(name).name for name in rows} == {f"{i:03}.png" for i in range(200)}
    for name, row in rows.items():
        number = int(Path(name).stem)
        assert row["status"] == ("ok" if number % 50 else "failed")
        if number in (1, 77, 199):
            torch.testing.assert_close(torch.tensor(row["embedding"]), expected(picture(number)), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_the_command_writes_the_rows_of_a_run_without_ray(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From places as people name them: relative, with patterns and ranges, tars of several suffixes, broken ones."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(Path(clip_fast.__file__).parent / "assets" / MODEL / "model.safetensors", "model.safetensors")
    Path("photos/below").mkdir(parents=True)
    for i in range(3):
        Path("photos/below", f"{i}.png").write_bytes(encoded(picture(i)))
    Path("photos/notes.txt").write_text("no image, and not taken for one")
    Path("photos/below/0.HEIC").write_text("no image that is read")
    reasons = of_gigabytes(Path("photos"))
    Path("odd").write_bytes(encoded(Image.radial_gradient("L")))  # like none of the others
    for number in range(2):
        images = {f"{number}0.png": encoded(picture(number)), f"{number}1.jpg": encoded(picture(10 + number))}
        write_tar(Path(f"{number:02}.tar"), images | {f"{number}2.json": b"{}", f"{number}3.WebP": b"broken"})
    write_tar(Path("cut.tar"), {"whole.png": encoded(picture(30)), "cut.png": encoded(picture(31))})
    os.truncate("cut.tar", Path("cut.tar").read_bytes().rindex(b"IEND"))
    columns = {"name": ["k0", "k1", "k2"], "photo": [encoded(picture(20)), b"", None], "width": [7, 7, 7]}
    parquet.write_table(pyarrow.table(columns), "bytes.parquet")
    parquet.write_table(pyarrow.table({"name": ["k3"], "photo": ["photos/below/1.png"]}), "paths.parquet")
    cells = {"name": ["k4"], "photo": [{"bytes": None, "path": "photos/below/2.png"}]}
    parquet.write_table(pyarrow.table(cells), "cells.parquet")
    inputs = ["photos/**/*.png", "photos", "odd", "nowhere.png", "{00..01}.tar", "cut.tar", "bytes.parquet"]
    common = [*inputs, "paths.parquet", "cells.parquet", "--image-column", "photo", "--key-column", "name"]
    common += ["--model", "./model.safetensors"]
    here = ["--output", "here.parquet", "--workers", "0", "--device", "cpu", "--quiet"]

    assert cli.main(["encode", *common, *here]) == 1
    wanted = {row["key"]: row for row in parquet.read_table("here.parquet").to_pylist()}
    assert {wanted[key]["status"] for key in ("00", "01", "10", "11", "odd", "whole", "k0", "k3", "k4")} == {"ok"}
    tar = str(tmp_path / "cut.tar")
    wanted[tar] = {**wanted.pop("cut.tar"), "key": tar}  # the place that the end of the archive is known by
    for name, reason in reasons.items():
        assert reason in wanted[f"photos/{name}"]["error"]
    capsys.readouterr()
    on_ray = [*common, "--ray", cluster.address, "--workers", "1", "--output", "out/", "--time-limit", "90"]
    assert cli.main(["encode", *on_ray, "--json"]) == 1
    said = capsys.readouterr()
    assert "passed over in folders, by suffix: 1 .heic, 1 .txt\n" in said.err
    summary = json.loads(said.out.splitlines()[-1])
    failed = sum(row["status"] == "failed" for row in wanted.values())
    assert summary == {"output": "out/", "complete": True, "images": len(wanted), "failed": failed}
    assert_same(table(tmp_path / "out"), wanted, tmp_path)
    assert parquet.read_schema(next(Path("out").glob("*.parquet"))) == parquet.read_schema("here.parquet")

    assert cli.main(["search", "--image", "odd", "--index", "out", "-k", "1"]) == 0
    assert capsys.readouterr().out == f"1.0000\t{tmp_path / 'odd'}\n"
    assert cli.main(["encode", *on_ray]) == 2
    assert "is not empty" in capsys.readouterr().err


@pytest.mark.slow
def test_urls_are_read_by_ray(cluster: Any, tmp_path: Path) -> None:
    """Each kind, through the encoder in this process: keys, places and images as `encode` has them without Ray."""
    Path(tmp_path, "photos").mkdir()
    for i in range(2):
        Path(tmp_path, "photos", f"{i}.png").write_bytes(encoded(picture(i)))
    Path(tmp_path, "photos", "notes.txt").write_text("no image")
    images = {"a.dir/0.jpg": b"broken", "a.dir/0.seg.png": encoded(picture(2)), "1.PNG": encoded(picture(3))}
    write_tar(tmp_path / "a.tar", images | {"1.json": b"{}", "a.dir/._0.jpg": b"a Mac's"})
    pictures = {"photo": [encoded(picture(4)), b""], "name": ["k0", "k1"], "status": [200, 404]}
    parquet.write_table(pyarrow.table(pictures), tmp_path / "b.parquet")
    encoder = ray_job._TableEncoder(MODEL, device="cpu")
    ray.init(address=cluster.address)
    try:

        def rows(name: str, key_column: str | None = None) -> list[tuple[str, str, str, int]]:
            read = ray_job._read_urls(ray.data, [f"file://{tmp_path}/{name}"], "photo", key_column)
            found = [row for batch in read.iter_batches(batch_format="numpy") for row in encoder(batch).to_pylist()]
            return sorted((row["key"], row["image_path"], row["status"], row["height"]) for row in found)

        photos = [f"{tmp_path}/photos/{i}.png" for i in range(2)]
        assert rows("photos") == [(photos[0], photos[0], "ok", 30), (photos[1], photos[1], "ok", 31)]
        tar = f"{tmp_path}/a.tar"
        assert rows("a.tar") == [
            ("1", f"{tar}/1.PNG", "ok", 33),
            ("a.dir/0", f"{tar}/a.dir/0.jpg", "failed", 0),
            ("a.dir/0", f"{tar}/a.dir/0.seg.png", "ok", 32),
        ]
        place = f"{tmp_path}/b.parquet"
        assert rows("b.parquet", "name") == [("k0", place, "ok", 34), ("k1", place, "failed", 0)]
        with pytest.raises(ValueError, match="need a column of keys: name it, --key-column"):
            rows("b.parquet")
        with pytest.raises(ValueError, match="the column 'path' is Ray's own: rename it"):
            rows("b.parquet", "path")
        for mixed in (["s3://a/b.tar", "s3://a/c.parquet"], ["s3://a/b.tar", "c.tar"]):
            with pytest.raises(ValueError, match="URLs must be of one kind"):
                ray_job._read_urls(ray.data, mixed, "photo", None)
    finally:
        ray.shutdown()


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_machine_of_one_cpu(tmp_path: Path) -> None:
    """Tasks that list, read and write find room beside the encoder. Ray's handler of SIGTERM takes no other's place."""
    (tmp_path / "a.png").write_bytes(encoded(picture(1)))
    script = (
        "import signal\n"
        "from clip_fast.bulk import ray_job\n"
        "signal.signal(signal.SIGTERM, before := lambda *_: None)\n"
        "init = ray_job.ray()[0].init\n"
        "ray_job.ray()[0].init = lambda address: init(address, num_cpus=1, num_gpus=0, include_dashboard=False)\n"
        "def find(*paths, **options):\n"
        "    print(signal.getsignal(signal.SIGTERM) is before)\n"
        "    return ray_job.find_inputs(*paths, **options)\n"
        f"print(ray_job.encode(['a.png'], {MODEL!r}, 'out', address='local', find=find))\n"
    )
    assert printed(tmp_path, script) == "True\n{'images': 1, 'failed': 0}\n"


def test_a_folder_belongs_to_one_run(tmp_path: Path) -> None:
    output = str(tmp_path / "out")
    place = ray_job._place(output)
    with ray_job._claimed(*place, output):
        with (
            pytest.raises(ValueError, match=r"another run writes to .*out, or was killed there: .* remove \.clip-fast"),
            ray_job._claimed(*place, output),
        ):
            raise AssertionError
        Path(output, "a.parquet").touch()
    assert [path.name for path in Path(output).iterdir()] == ["a.parquet"]
    with pytest.raises(ValueError, match="out is not empty: choose another"), ray_job._claimed(*place, output):
        raise AssertionError
    Path(output, "a.parquet").unlink()
    with ray_job._claimed(*place, output):
        pass
    assert Path(output).is_dir()  # as it was
    Path(output).rmdir()
    with ray_job._claimed(*place, output):
        pass
    assert not Path(output).exists()
    with pytest.raises(ValueError, match=r"Ray does not write to a\?b: give the folder a name without \?"):
        ray_job._place("a?b")


@pytest.mark.slow
def test_errors_of_the_cluster_end_with_status_2(
    cluster: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_tar(Path("cut.tar"), {"cut.png": encoded(picture(31))})
    os.truncate("cut.tar", 700)

    def run(path: str, model: str = MODEL) -> str:
        arguments = [path, "--model", model, "--ray", cluster.address, "--workers", "1", "--output", "out/"]
        assert cli.main(["encode", *arguments]) == 2
        message = capsys.readouterr().err
        assert "Traceback" not in message.partition("clip-fast: error: ")[2]
        assert not ray.is_initialized()
        return message.partition("clip-fast: error: ")[2]

    write_tar(Path("empty.tar"), {"notes.txt": b"no image"})
    # Ray's own reader takes no broken tar.
    assert run(f"file://{tmp_path}/cut.tar") == "the cluster gave up: ReadError: unexpected end of data\n"
    assert run(f"file://{tmp_path}/empty.tar") == "no image found\n"
    assert not Path("out").exists()
    assert run("nowhere") == "no image found\n"
    assert "no such file, and no model of that name" in run("cut.tar", "model.pt")


def test_cells_that_hold_no_image_are_failures() -> None:
    cells = np.empty(4, object)
    cells[:] = [{"bytes": None}, float("nan"), [1, 2], encoded(picture(1))]
    embedded = ImageEncoder(MODEL, device="cpu", threads=1)({"image": cells})
    assert list(embedded["status"]) == ["failed", "failed", "failed", "ok"]
    assert [bool(row.any()) for row in embedded["embedding"]] == [False, False, False, True]
