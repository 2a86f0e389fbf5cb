"""The command line, from arguments to files and exit status, with a small checkpoint of random weights."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.testing import assert_allclose, assert_array_equal
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

import clip_fast
from clip_fast import Preprocess
from clip_fast.bulk.decoder import Decoder
from clip_fast.bulk.pipeline import Options
from clip_fast.cli import encode as encode_command
from clip_fast.cli import interrupt
from clip_fast.cli import main as cli
from clip_fast.towers import reference
from clip_fast.towers.config import VitConfig

PHOTOGRAPHS = sorted((Path(__file__).parents[1] / "data").glob("*.jpg"))
CONFIG = VitConfig(image_size=32, patch_size=16, width=64, layers=2, heads=1, embed_dim=24)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain state dict under OpenAI's names."""
    path = tmp_path_factory.mktemp("checkpoint") / "small.pt"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        weights = reference.build(CONFIG).state_dict()
    torch.save({f"visual.{name}": value for name, value in weights.items()}, path)
    return path


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with five different images: photos/0.png to photos/4.png."""
    generator = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for i in range(5):
        pixels = generator.integers(0, 256, (3, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((40, 50)).save(tmp_path / "photos" / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


ALL = [f"photos/{i}.png" for i in range(5)]


def encode(checkpoint: Path, *arguments: str | Path) -> int:
    options = ["--model", str(checkpoint), "--activation", "quick_gelu"]
    return cli.main(["encode", *map(str, arguments), *options])


def usage_error(*arguments: str | Path) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main([str(argument) for argument in arguments])
    assert exit_.value.code == 2


def written(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"photos"}


def expected_rows(checkpoint: Path, paths: list[str]) -> NDArray[np.float32]:
    """Each image alone, through the plain tower."""
    weights = torch.load(checkpoint, weights_only=True)
    tower = reference.build(CONFIG)
    tower.load_state_dict({name.removeprefix("visual."): value for name, value in weights.items()})
    _, preprocess = clip_fast.load(checkpoint, "cpu", activation="quick_gelu")
    rows: list[NDArray[np.float32]] = []
    with torch.inference_mode():
        for path in paths:
            with Image.open(path) as image:
                rows.append(tower(preprocess(image).unsqueeze(0)).numpy())
    return np.concatenate(rows)


# --- encode: what it writes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_a_folder_becomes_rows_and_paths(folder: Path, checkpoint: Path, batch_size: int) -> None:
    assert encode(checkpoint, "photos", "--device", "cpu", "--batch-size", str(batch_size)) == 0
    assert written(folder) == {"embeddings.npy", "paths.txt"}
    assert (folder / "paths.txt").read_text("utf-8").splitlines() == [str(Path(path)) for path in ALL]
    rows = np.load(folder / "embeddings.npy")
    assert rows.dtype == np.float32
    expected = expected_rows(checkpoint, ALL)
    assert_allclose(rows, expected, rtol=1e-4, atol=1e-5)
    assert np.abs(expected[1:] - expected[:-1]).max(axis=1).min() > 1e-2  # so that a swapped row would be seen
    assert np.abs(np.linalg.norm(rows, axis=1) - 1).min() > 1e-2  # not normalised


def test_the_same_command_writes_the_same_bytes(folder: Path, checkpoint: Path) -> None:
    contents: list[bytes] = []
    for name in ("a.npy", "b.npy"):
        assert encode(checkpoint, "photos", "--output", name, "--batch-size", "2") == 0
        contents.append((folder / name).read_bytes())
    assert contents[0] == contents[1]


def test_rows_follow_the_arguments_each_file_once(folder: Path, checkpoint: Path) -> None:
    assert encode(checkpoint, "photos/3.png", "photos/[12].png", "photos", "**/*.png", "--output", "out.npy") == 0
    order = [ALL[i] for i in (3, 1, 2, 0, 4)]
    assert (folder / "out.paths.txt").read_text("utf-8").splitlines() == [str(Path(path)) for path in order]
    assert_allclose(np.load(folder / "out.npy"), expected_rows(checkpoint, order), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_lower_precision_still_writes_float32(folder: Path, checkpoint: Path, dtype: str) -> None:
    assert encode(checkpoint, "photos", "--dtype", dtype, "--device", "cpu") == 0
    rows = np.load(folder / "embeddings.npy")
    assert rows.dtype == np.float32
    assert_array_equal(rows, torch.from_numpy(rows).to(getattr(torch, dtype)).float())  # so it did compute in it
    assert_allclose(rows, expected_rows(checkpoint, ALL), atol=0.1)


def test_the_activation_reaches_the_model(folder: Path, checkpoint: Path) -> None:
    rows: list[NDArray[np.float32]] = []
    for activation in ("quick_gelu", "gelu"):
        command = ["encode", "photos", "--model", str(checkpoint), "--activation", activation]
        assert cli.main(command) == 0
        rows.append(np.load(folder / "embeddings.npy"))
    assert np.abs(rows[0] - rows[1]).max() > 1e-4


def test_the_output_may_stand_in_another_folder(folder: Path, checkpoint: Path) -> None:
    (folder / "out").mkdir()
    assert encode(checkpoint, "photos", "--output", "out/e.npy") == 0
    assert written(folder / "out") == {"e.npy", "e.paths.txt"}


def test_rows_agree_with_openai_clip(tmp_path: Path) -> None:
    clip = pytest.importorskip("clip")
    from clip.model import CLIP

    assert len(PHOTOGRAPHS) >= 2
    with torch.random.fork_rng():
        torch.manual_seed(0)
        text = {"context_length": 8, "vocab_size": 64, "transformer_width": 64}
        model = CLIP(32, 96, 2, 64, 16, **text, transformer_heads=1, transformer_layers=1).eval()
    inputs = (torch.zeros(1, 3, 96, 96), torch.zeros(1, 8, dtype=torch.long))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated, and still what OpenAI's files are
        torch.jit.save(torch.jit.trace(model, inputs), tmp_path / "openai.pt")

    command = ["encode", *map(str, PHOTOGRAPHS), "--model", str(tmp_path / "openai.pt"), "--device", "cpu"]
    assert cli.main([*command, "--output", str(tmp_path / "e.npy")]) == 0
    rows = torch.from_numpy(np.load(tmp_path / "e.npy")).double()

    transform = clip.clip._transform(96)
    with torch.inference_mode():
        images = torch.stack([transform(Image.open(path)) for path in PHOTOGRAPHS])
        expected = model.encode_image(images).double()
    assert len(rows) == len(PHOTOGRAPHS)
    assert F.cosine_similarity(rows, expected).min() >= 0.999999
    assert F.cosine_similarity(rows.roll(1, 0), expected).max() < 0.9999  # another photograph is told apart
    assert_allclose(rows.norm(dim=1), expected.norm(dim=1), rtol=1e-3)


def test_paths_come_from_a_file_or_standard_input(
    folder: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "names").write_text(f"{ALL[3]}\n{ALL[0]}\n")
    assert encode(checkpoint, ALL[1], "--files-from", "names") == 0
    assert (folder / "paths.txt").read_text("utf-8").splitlines() == [ALL[1], ALL[3], ALL[0]]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(f"{ALL[4]}\0{ALL[2]}\0".encode())))
    assert encode(checkpoint, "--files-from", "-") == 0
    assert (folder / "paths.txt").read_text("utf-8").splitlines() == [ALL[4], ALL[2]]


def test_a_tar_becomes_rows_of_one_file(folder: Path, checkpoint: Path) -> None:
    with tarfile.open("t.tar", "w") as tar:
        tar.add("photos/1.png", "1.png")
        tar.add("photos/3.png", "3.png")
    assert encode(checkpoint, "t.tar") == 0
    assert (folder / "paths.txt").read_text("utf-8").splitlines() == ["t.tar/1.png", "t.tar/3.png"]
    assert_allclose(np.load("embeddings.npy"), expected_rows(checkpoint, [ALL[1], ALL[3]]), rtol=1e-4, atol=1e-5)


def test_a_folder_of_shards_and_what_is_said(
    folder: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert encode(checkpoint, "photos", "--output", "out/", "--workers", "0", "--json") == 0
    assert_allclose(np.load("out/img_emb/img_emb_0000.npy"), expected_rows(checkpoint, ALL), rtol=1e-4, atol=1e-5)
    said = capsys.readouterr()
    assert "5/5" in said.err
    assert "-bound, 0 errors" in said.err
    assert "out/: complete, 5 images, 0 failed, 0 by earlier runs" in said.err
    summary = json.loads(said.out)
    assert {name: summary[name] for name in ("output", "complete", "images", "failed", "resumed")} == {
        "output": "out/",
        "complete": True,
        "images": 5,
        "failed": 0,
        "resumed": 0,
    }
    assert encode(checkpoint, "photos", "--output", "out", "--workers", "0", "--resume", "--quiet") == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (["--dtype", "bfloat16"], "dtype"),
        (["--batch-size", "2"], "batch_size"),
        (["--shard-size", "2"], "shard_size"),
        (["--embedding-dtype", "float16"], "embedding_dtype"),
        (["--normalize"], "normalize"),
        (["--fast-decode"], "fast_decode"),
        (["--image-column", "picture"], "image_column"),
        (["--key-column", "name"], "key_column"),
    ],
)
def test_another_setting_is_not_resumed(
    folder: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str], options: list[str], name: str
) -> None:
    """Whatever the bytes of the output follow from."""
    arguments = ("photos", "--output", "out/", "--workers", "0", "--quiet")
    assert encode(checkpoint, *arguments) == 0
    assert encode(checkpoint, *arguments, "--resume", *options) == 2
    assert f"{name} was " in capsys.readouterr().err


def test_other_weights_and_versions_are_not_resumed(
    folder: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("photos", "--output", "out/", "--workers", "0", "--quiet")
    assert encode(checkpoint, *arguments) == 0
    with monkeypatch.context() as patched:
        patched.setattr("PIL.__version__", "0.0")
        assert encode(checkpoint, *arguments, "--resume") == 2
        assert "versions was " in capsys.readouterr().err
    weights = torch.load(checkpoint, weights_only=True)
    torch.save(weights | {"visual.proj": weights["visual.proj"] * 2}, folder / "small.pt")
    assert encode(folder / "small.pt", *arguments, "--resume") == 2
    assert "weights was " in capsys.readouterr().err


@pytest.mark.parametrize("output", ["{}/", "{}.parquet"])
def test_decoding_options_reach_the_decoder(
    folder: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, output: str
) -> None:
    given: list[tuple[bool, float]] = []

    def run(model: object, decoder: Decoder, inputs: object, sink: object, options: Options, *_: object) -> None:
        given.append((decoder.fast, options.time_limit))
        raise RuntimeError("seen")

    monkeypatch.setattr(encode_command, "run", run)
    for name, options in (("a", ["--fast-decode", "--time-limit", "7"]), ("b", [])):
        assert encode(checkpoint, "photos", "--output", output.format(name), "--workers", "0", *options) == 2
    assert given == [(True, 7.0), (False, 60.0)]


def test_too_many_errors_end_a_small_job(folder: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a.jpg", "b.jpg"):
        (folder / "photos" / name).touch()
    for most in (0, 1):
        assert encode(checkpoint, "photos", "--quiet", "--max-errors", str(most)) == 3
        assert "stopped: " in capsys.readouterr().err
        assert not (folder / "embeddings.npy").exists()
    assert encode(checkpoint, "photos", "--quiet", "--max-errors", "2") == 1


def test_json_of_a_small_job(folder: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "photos" / "bad.jpg").touch()
    assert encode(checkpoint, "photos", "--json", "--quiet") == 1
    summary = {"output": "embeddings.npy", "complete": True, "images": 6, "failed": 1}
    assert json.loads(capsys.readouterr().out) == summary


# --- encode: what goes wrong -----------------------------------------------------------------------------------------


def test_bad_files_are_named_and_the_rest_goes_on(
    folder: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = {
        "empty.jpg": b"",
        "text.jpg": b"no image",
        "cut.png": (folder / ALL[0]).read_bytes()[:60],
        "bomb.ppm": b"P6 20000 20000 255\n",
        "line\nbreak.png": (folder / ALL[0]).read_bytes(),
    }
    for name, data in bad.items():
        (folder / "photos" / name).write_bytes(data)
    assert encode(checkpoint, "gone.png", "photos", "--batch-size", "2") == 1
    assert (folder / "paths.txt").read_text("utf-8").splitlines() == [str(Path(path)) for path in ALL]
    assert_allclose(np.load(folder / "embeddings.npy"), expected_rows(checkpoint, ALL), rtol=1e-4, atol=1e-5)

    lines = (folder / "errors.txt").read_text("utf-8").splitlines()
    paths, reasons = zip(*(line.split("\t") for line in lines), strict=True)
    assert [Path(path).name for path in paths] == [
        "gone.png",
        *sorted(name.replace("\n", "\\n") for name in bad),
    ]
    assert all(reasons)
    stderr = capsys.readouterr().err
    for path, reason in zip(paths, reasons, strict=True):
        assert f"clip-fast: {path}: {reason}\n" in stderr
    assert "6 failed: see errors.txt" in stderr


def test_errors_of_an_earlier_run_go_when_all_is_well(folder: Path, checkpoint: Path) -> None:
    (folder / "photos" / "empty.jpg").touch()
    assert encode(checkpoint, "photos") == 1
    assert "errors.txt" in written(folder)
    (folder / "photos" / "empty.jpg").unlink()
    assert encode(checkpoint, "photos") == 0
    assert written(folder) == {"embeddings.npy", "paths.txt"}


def test_where_every_file_fails_only_errors_are_written(
    folder: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "bad.jpg").touch()
    assert encode(checkpoint, "bad.jpg") == 1
    assert written(folder) == {"bad.jpg", "errors.txt"}
    assert "no image could be read" in capsys.readouterr().err


def test_a_large_photograph_is_no_cause_for_a_warning(
    folder: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1500)  # the images have 2000; from 3000 it is an error
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        assert encode(checkpoint, "photos", "--workers", "0", "--quiet") == 0
    assert capsys.readouterr().err == ""


def no_model(*_: object, **__: object) -> None:
    raise AssertionError("the model was loaded for nothing")


@pytest.mark.parametrize("arguments", [["nothing"], ["gone.png", "photos/*.gif"]])
def test_no_image_is_an_error_before_any_work(
    folder: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "nothing").mkdir()
    (folder / "nothing" / "notes.txt").touch()
    monkeypatch.setattr(encode_command, "load", no_model)
    assert encode(Path("m.pt"), *arguments) == 2
    assert written(folder) == {"nothing"}
    assert "error: no image found" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--resume"], "--resume: for an --output that is a folder"),
        (["--shard-size", "3", "--normalize"], "--shard-size, --normalize: for an --output"),
        (["--output", "e.parquet", "--resume"], "--resume and --devices are for an --output that is a folder"),
        (["--output", "out/", "--device", "cpu", "--devices", "cpu"], "--device and --devices exclude each other"),
        (["--output", "photos/"], "photos is not empty and holds no earlier run"),
        (["--output", "gone/e.parquet"], "folder gone does not exist"),
        (["--files-from", "gone.txt"], "gone.txt"),
        (["--output", "out/", "--ray", "auto", "--max-errors", "0"], "--max-errors: not with --ray"),
        (["--output", "out/", "--ray", "auto", "--workers", "0"], "--workers 0: not with --ray"),
    ],
)
def test_options_that_do_not_go_together_are_an_error_before_any_work(
    folder: Path,
    options: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(encode_command, "load", no_model)
    assert encode(Path("m.pt"), "photos", *options) == 2
    assert written(folder) == set()
    assert said in capsys.readouterr().err


def test_neither_path_nor_list_is_an_error(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert encode(Path("m.pt")) == 2
    assert "error: no image found" in capsys.readouterr().err


@pytest.mark.parametrize("output", ["gone/e.npy", "photos", "paths.txt", "out", "e.npz", "."])
def test_an_output_that_cannot_be_is_an_error_before_any_work(
    folder: Path, output: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(encode_command, "load", no_model)
    assert encode(Path("m.pt"), "photos", "--output", output) == 2
    assert written(folder) == set()
    assert "clip-fast: error: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--files-from", "e.paths.txt", "--output", "e.npy"], "e.paths.txt"),
        (["--files-from", "list", "--output", "e.npy"], "list"),
        (["e.errors.txt", "--output", "e.npy"], "e.errors.txt"),
        (["*.npy", "--output", "./e.npy"], "e.npy"),
        (["link.parquet", "--output", "t.PARQUET"], "link.parquet"),
    ],
)
def test_an_output_that_would_replace_what_is_read_is_an_error_before_any_work(
    folder: Path, options: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(encode_command, "load", no_model)
    pytest.importorskip("pyarrow")
    for name in ("e.npy", "e.paths.txt", "e.errors.txt", "t.PARQUET"):
        (folder / name).write_text("photos/0.png\n")
    (folder / "link.parquet").symlink_to("t.PARQUET")
    (folder / "list").symlink_to("e.paths.txt")
    before = {name: (folder / name).read_bytes() for name in written(folder)}
    assert encode(Path("m.pt"), "photos", *options) == 2
    assert {name: (folder / name).read_bytes() for name in written(folder)} == before
    assert f"error: {said} is read by this run" in capsys.readouterr().err


def test_parquet_is_known_in_capitals(folder: Path, checkpoint: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    assert encode(checkpoint, "photos", "--output", "e.PARQUET", "--normalize", "--workers", "0") == 0
    assert parquet.read_table("e.PARQUET").num_rows == 5


def test_a_list_from_standard_input_that_is_closed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    assert encode(Path("m.pt"), "--files-from", "-") == 2
    assert capsys.readouterr().err.endswith("clip-fast: error: --files-from -: standard input is closed\n")


@pytest.mark.parametrize("content", [None, b"no checkpoint"])
def test_a_model_that_does_not_load_is_named(
    folder: Path, content: bytes | None, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (folder / "photos" / "m.pt").write_bytes(content)
    assert encode(Path("photos/m.pt"), "photos") == 2
    assert written(folder) == set()
    stderr = capsys.readouterr().err
    assert "error: " in stderr
    assert "m.pt" in stderr


class Stopping:
    """Embeds a first batch, then does `stop`."""

    def __init__(self, error: type[BaseException] | None) -> None:
        self.error = error
        self.batches = 0

    def encode_image(self, images: Tensor) -> Tensor:
        self.batches += 1
        if self.batches == 2:
            if self.error:
                raise self.error("it broke")
            signal.raise_signal(signal.SIGINT)  # Ctrl-C
        return torch.ones(len(images), 24)


@pytest.mark.parametrize(
    ("error", "status"), [(None, 130), (KeyboardInterrupt, 130), (RuntimeError, 2), (torch.OutOfMemoryError, 2)]
)
@pytest.mark.parametrize("earlier", [True, False])
def test_what_stops_in_the_middle_changes_no_file(
    folder: Path,
    checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: type[BaseException] | None,
    status: int,
    earlier: bool,
) -> None:
    (folder / "photos" / "bad.jpg").touch()
    if earlier:
        assert encode(checkpoint, "photos") == 1
    before = {name: (folder / name).read_bytes() for name in written(folder)}
    model = Stopping(error)
    monkeypatch.setattr(encode_command, "load", lambda *_, **__: (model, Preprocess(32)))
    assert encode(checkpoint, "photos", "--batch-size", "2") == status
    assert model.batches == 2
    assert {name: (folder / name).read_bytes() for name in written(folder)} == before
    assert ("interrupted" if status == 130 else "error: it broke") in capsys.readouterr().err


def test_a_fault_of_the_program_is_shown_whole(
    folder: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a status of its own: Python's, 1, says that some files failed and the others are embedded."""
    monkeypatch.setattr(encode_command, "load", lambda *_, **__: (Stopping(TypeError), Preprocess(32)))
    assert encode(checkpoint, "photos", "--batch-size", "2") == 2
    stderr = capsys.readouterr().err
    assert "Traceback" in stderr
    assert "TypeError: it broke" in stderr
    assert written(folder) == set()


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["unknown"],
        ["encode"],
        ["encode", "photos"],
        ["encode", "photos", "--model", "m.pt", "--batch-size", "0"],
        ["encode", "photos", "--model", "m.pt", "--batch-size", "many"],
        ["encode", "photos", "--model", "m.pt", "--dtype", "int8"],
        ["encode", "photos", "--model", "m.pt", "--activation", "relu"],
        ["encode", "photos", "--model", "m.pt", "--device", "toaster"],
        ["encode", "photos", "--model", "m.pt", "--device", "cuda:99"],
        ["encode", "photos", "--model", "m.pt", "--device", "meta"],
        ["encode", "photos", "--model", "m.pt", "--devices", "cpu,toaster"],
        ["encode", "photos", "--model", "m.pt", "--shard-size", "0"],
        ["encode", "photos", "--model", "m.pt", "--workers", "-1"],
        ["encode", "photos", "--model", "m.pt", "--time-limit", "0"],
        ["encode", "photos", "--model", "m.pt", "--time-limit", "soon"],
        ["encode", "photos", "--model", "m.pt", "--time-limit", "1e10"],
        ["encode", "photos", "--model", "m.pt", "--output", ""],
        ["encode", "photos", "--model", ""],
        ["search", "words", "--index", "out/", "--html", ""],
        ["search", "words", "--index", "out/", "--model", ""],
        ["warm", "--model", ""],
        ["encode", "photos", "--model", "m.pt", "--embedding-dtype", "bfloat16"],
    ],
)
def test_wrong_usage(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(encode_command, "load", no_model)
    usage_error(*arguments)
    assert "usage: clip-fast" in capsys.readouterr().err


# --- what it says ----------------------------------------------------------------------------------------------------


def test_progress_and_result_go_to_stderr_unless_quiet(
    folder: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert encode(checkpoint, "photos") == 0
    said = capsys.readouterr()
    assert "5/5" in said.err
    assert "images/s" in said.err
    assert "embeddings.npy: float32 [5, 24]" in said.err
    assert said.out == ""
    assert encode(checkpoint, "photos", "--quiet") == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("command", [[], ["encode"], ["demo"], ["models"]])
def test_help_has_examples(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main([*command, "--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    assert "example" in text
    assert f"  clip-fast {' '.join(command)}" in text
    assert max(map(len, text.splitlines())) <= 120


def test_help_of_encode_explains_files_and_exit_statuses(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["encode", "--help"])
    text = capsys.readouterr().out
    for word in ("embeddings.npy", "FILE.paths.txt", "FILE.errors.txt", "not normalised", "img_emb_0000.npy"):
        assert word in text
    for status in (0, 1, 2, 3, 130):
        assert f"\n  {status} " in text


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out == f"clip-fast {clip_fast.__version__}\n"


def test_models_are_listed_one_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sorted(line.split()[0] for line in lines if line.startswith("  ")) == sorted(clip_fast.available_models())
    heading = lines.index("ViT-B/32: 87.8 million parameters, images of 224 pixels, embeddings of 512")
    assert lines[heading + 1].split()[0] == "ViT-B/32"
    assert "ViT-B-32/laion2b_s34b_b79k hf-hub:laion/CLIP-ViT-B-32-laion2B-s34B-b79K" in map(
        " ".join, map(str.split, lines)
    )


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [([], (None, None)), (["--device", "cpu", "--dtype", "float16"], (torch.device("cpu"), torch.float16))],
)
def test_demo_gets_device_and_dtype_and_gives_its_status(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], expected: tuple[object, object]
) -> None:
    from clip_fast.cli import demo

    calls: list[tuple[object, object]] = []

    def run(device: object, dtype: object) -> int:
        calls.append((device, dtype))
        return 1

    monkeypatch.setattr(demo, "run", run)
    assert cli.main(["demo", *arguments]) == 1
    assert calls == [expected]


def test_as_a_module_in_a_process_of_its_own(folder: Path, checkpoint: Path) -> None:
    (folder / "photos" / "text.jpg").write_text("no image")
    command = [sys.executable, "-m", "clip_fast", "encode", "photos/*", "--model", str(checkpoint), "--device", "cpu"]
    root = Path(clip_fast.__file__).parent.parent
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [*command, "--activation", "quick_gelu"],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert "text.jpg: not an image" in done.stderr
    assert done.stdout == ""
    assert_allclose(np.load("embeddings.npy"), expected_rows(checkpoint, ALL), rtol=1e-4, atol=1e-5)


def test_a_program_without_arguments_is_not_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Python may be embedded in one."""
    monkeypatch.setattr(sys, "argv", [])
    assert not interrupt.is_command.__wrapped__()
