"""Finding images, embedding them and writing the result, with a model whose embeddings are known."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bad_files import BAD_FILES
from numpy.testing import assert_array_equal
from PIL import Image
from torch import Tensor

from clip_fast.bulk import atomic as files
from clip_fast.bulk import npy as embed
from clip_fast.bulk.npy import EmbeddedBatch, EmbeddingWriter, embed_files
from clip_fast.inputs.items import Failure, Unreadable
from clip_fast.inputs.tars import TarMember
from clip_fast.preprocess import Preprocess


class PixelModel:
    """Embeds an image as its first pixel, (B, 3, H, W) -> (B, 3), in `dtype`; keeps the sizes of its batches."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype
        self.batches: list[int] = []

    def encode_image(self, images: Tensor, /) -> Tensor:
        assert images.dtype == torch.float32
        assert not torch.is_grad_enabled()
        self.batches.append(len(images))
        return images[:, :, 0, 0].to(self.dtype)


class AsItIs(Preprocess):
    """The pixels themselves."""

    def normalised(self, pixels: Tensor) -> Tensor:
        return pixels.float()


preprocess = AsItIs(32)


def save(path: Path, value: int = 0) -> Path:
    """An image that `PixelModel` embeds as (value, 1, 2)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (5, 4), (value, 1, 2)).save(path, "PNG")
    return path


def embed_all(paths: list[Path], batch_size: int = 32) -> list[EmbeddedBatch]:
    return list(embed_files(PixelModel(), preprocess, paths, batch_size))


def only_failure(path: Path) -> str:
    """The reason for which `path` fails; the good file beside it must not."""
    good = save(path.parent / "good.png", 7)
    (batch,) = embed_all([path, good])
    assert batch.paths == [str(good)]
    assert_array_equal(batch.rows, [[7, 1, 2]])
    (failure,) = batch.failures
    assert failure.path == str(path)
    return failure.reason


# --- embed_files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 100])
def test_rows_follow_the_paths_around_failures(tmp_path: Path, batch_size: int) -> None:
    paths = [save(tmp_path / f"{i}.png", i) for i in (5, 3, 9, 1, 200, 4)]
    paths[2:2] = [tmp_path / "missing.png"]
    batches = embed_all(paths, batch_size)
    assert [path for batch in batches for path in batch.paths] == [str(path) for path in paths[:2] + paths[3:]]
    rows = np.concatenate([batch.rows for batch in batches if batch.paths])
    assert rows.dtype == np.float32
    assert_array_equal(rows, [[i, 1, 2] for i in (5, 3, 9, 1, 200, 4)])
    assert [failure.path for batch in batches for failure in batch.failures] == [str(paths[2])]


def test_batches_have_the_size_asked_for(tmp_path: Path) -> None:
    model = PixelModel()
    list(embed_files(model, preprocess, [save(tmp_path / f"{i}.png") for i in range(7)], 3))
    assert model.batches == [3, 3, 1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rows_of_any_precision_come_as_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    (batch,) = embed_files(PixelModel(dtype), preprocess, [save(tmp_path / "a.png", 4)])
    assert batch.rows.dtype == np.float32
    assert_array_equal(batch.rows, [[4, 1, 2]])


def test_other_items_than_files_are_embedded_too(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", 4)
    items = [TarMember("key", "a.tar/./a.png", str(path), 0, path.stat().st_size), Unreadable("u", "u", "gone")]
    (batch,) = embed_files(PixelModel(), preprocess, items)
    assert batch.paths == ["a.tar/./a.png"]
    assert_array_equal(batch.rows, [[4, 1, 2]])
    assert batch.failures == [Failure("u", "gone")]


def test_an_embedding_that_is_not_finite_is_a_failure(tmp_path: Path) -> None:
    class Overflowing(PixelModel):
        def encode_image(self, images: Tensor, /) -> Tensor:
            rows = super().encode_image(images)
            return torch.where(rows == 7, torch.inf, rows)

    paths = [save(tmp_path / f"{i}.png", i) for i in (3, 7, 9)]
    (batch,) = embed_files(Overflowing(), preprocess, paths)
    assert batch.paths == [str(paths[0]), str(paths[2])]
    assert_array_equal(batch.rows, [[3, 1, 2], [9, 1, 2]])
    (failure,) = batch.failures
    assert failure.path == str(paths[1])
    assert "not finite" in failure.reason


def test_few_images_are_decoded_ahead(tmp_path: Path) -> None:
    decoded: list[int] = []

    class Counting(AsItIs):
        def uint8(self, image: Image.Image, out: Tensor | None = None) -> Tensor:
            decoded.append(1)
            return super().uint8(image, out)

    batches = embed_files(PixelModel(), Counting(32), [save(tmp_path / f"{i}.png") for i in range(20)], 2)
    next(batches)
    batches.close()
    assert 2 <= len(decoded) <= 4


def test_nothing_to_embed_gives_nothing() -> None:
    assert embed_all([]) == []


@pytest.mark.parametrize("batch_size", [0, -1])
def test_a_batch_has_at_least_one_file(batch_size: int) -> None:
    with pytest.raises(ValueError, match=f"at least 1, got {batch_size}"):
        embed_all([Path("a.png")], batch_size)


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_bad_file_is_a_failure_with_its_reason_and_the_rest_goes_on(tmp_path: Path, kind: str) -> None:
    make, reason = BAD_FILES[kind]
    path = tmp_path / "x.jpg"
    make(path)
    assert reason in only_failure(path)


def test_a_file_without_permission_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "secret.png")
    path.chmod(0)
    if os.access(path, os.R_OK):  # root reads everything
        opened = Image.open

        def denied(file: Path, **options: Any) -> Image.Image:
            if file == path:
                raise PermissionError(errno.EACCES, "Permission denied", str(file))
            return opened(file, **options)

        monkeypatch.setattr(Image, "open", denied)
    assert only_failure(path) == "Permission denied"


def test_an_error_of_a_decoder_is_a_failure_whatever_its_type(tmp_path: Path) -> None:
    class Clumsy(Preprocess):
        def uint8(self, image: Image.Image, out: Tensor | None = None) -> Tensor:
            raise MemoryError

    (batch,) = embed_files(PixelModel(), Clumsy(32), [save(tmp_path / "a.png")])
    assert batch.failures == [Failure(str(tmp_path / "a.png"), "MemoryError")]
    assert batch.paths == []


@pytest.mark.parametrize("name", ["a\nb.png", "a\rb.png", "line\u2028separator.png", "ends\n"])
def test_a_name_with_a_line_break_is_refused(tmp_path: Path, name: str) -> None:
    assert "line break" in only_failure(save(tmp_path / name))


def test_a_name_that_is_no_text_is_refused(tmp_path: Path) -> None:
    assert "UTF-8" in only_failure(save(tmp_path / os.fsdecode(b"caf\xe9.png")))


def test_an_error_of_the_model_is_raised(tmp_path: Path) -> None:
    class Broken:
        def encode_image(self, images: Tensor, /) -> Tensor:
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        list(embed_files(Broken(), preprocess, [save(tmp_path / "a.png")]))


# --- EmbeddingWriter -------------------------------------------------------------------------------------------------


def batch(values: Iterable[int], failures: Iterable[Failure] = ()) -> EmbeddedBatch:
    values = list(values)
    rows = np.array([[value, 1, 2] for value in values], dtype=np.float32)
    return EmbeddedBatch([f"{value}.png" for value in values], rows, list(failures))


def write(output: Path, *batches: EmbeddedBatch) -> None:
    with EmbeddingWriter(output) as writer:
        for each in batches:
            writer.add(each)
        writer.commit()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_rows_and_paths_are_written_and_nothing_else(tmp_path: Path) -> None:
    write(tmp_path / "e.npy", batch([3, 1]), batch([]), batch([2]))
    for mmap_mode in (None, "r"):
        rows = np.load(tmp_path / "e.npy", mmap_mode=mmap_mode)
        assert rows.dtype == np.float32
        assert_array_equal(rows, [[3, 1, 2], [1, 1, 2], [2, 1, 2]])
    assert (tmp_path / "e.paths.txt").read_bytes() == b"3.png\n1.png\n2.png\n"
    assert set(contents(tmp_path)) == {"e.npy", "e.paths.txt"}


def test_the_file_is_what_numpy_writes(tmp_path: Path) -> None:
    write(tmp_path / "e.npy", batch(range(120)))
    np.save(tmp_path / "numpy.npy", batch(range(120)).rows)
    assert (tmp_path / "e.npy").read_bytes() == (tmp_path / "numpy.npy").read_bytes()


def test_the_header_has_room_for_any_number_of_rows() -> None:
    assert len(embed._npy_header((1, 512))) == len(embed._npy_header((10**12, 512)))


def test_failures_are_written_escaped(tmp_path: Path) -> None:
    write(tmp_path / "e.npy", batch([1], [Failure("a\tb\n.jpg", "no\nimage"), Failure("写真.jpg", "gone")]))
    assert (tmp_path / "e.errors.txt").read_text("utf-8") == "a\\tb\\n.jpg\tno\\nimage\n写真.jpg\tgone\n"


def test_an_earlier_run_is_replaced_and_its_errors_removed(tmp_path: Path) -> None:
    write(tmp_path / "e.npy", batch([1, 2], [Failure("x.jpg", "gone")]))
    assert "e.errors.txt" in contents(tmp_path)
    write(tmp_path / "e.npy", batch([3]))
    assert set(contents(tmp_path)) == {"e.npy", "e.paths.txt"}
    assert_array_equal(np.load(tmp_path / "e.npy"), [[3, 1, 2]])


def test_without_a_row_only_errors_are_written(tmp_path: Path) -> None:
    write(tmp_path / "e.npy", batch([1]))
    before = contents(tmp_path)
    write(tmp_path / "e.npy", batch([], [Failure("x.jpg", "gone")]))
    assert contents(tmp_path) == before | {"e.errors.txt": b"x.jpg\tgone\n"}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def earlier_run(tmp_path: Path) -> dict[str, bytes]:
    write(tmp_path / "e.npy", batch([1, 2], [Failure("x.jpg", "gone")]))
    return contents(tmp_path)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, SystemExit])
def test_leaving_without_commit_changes_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    before = earlier_run(tmp_path)

    def interrupted() -> None:
        with EmbeddingWriter(tmp_path / "e.npy") as writer:
            writer.add(batch([3], [Failure("y.jpg", "gone")]))
            raise error

    with pytest.raises(error):
        interrupted()
    assert contents(tmp_path) == before


def test_a_full_disk_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = earlier_run(tmp_path)
    synced: list[int] = []

    def full(descriptor: int) -> None:
        synced.append(descriptor)
        if len(synced) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "e.npy", batch([3]))
    assert contents(tmp_path) == before


@pytest.mark.parametrize("moved", [0, 1, 2])
def test_new_rows_never_stand_beside_old_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moved: int) -> None:
    before = earlier_run(tmp_path)
    replace, calls = os.replace, []

    def interrupted(source: Path, target: Path) -> None:
        if len(calls) == moved:
            raise KeyboardInterrupt
        calls.append(target)
        replace(source, target)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "e.npy", batch([3], [Failure("y.jpg", "gone")]))
    after = contents(tmp_path)
    assert (after["e.npy"] == before["e.npy"]) == (moved == 0)
    assert "e.paths.txt" not in after
    assert not [name for name in after if name.endswith(".tmp")]


def test_files_get_the_usual_permissions(tmp_path: Path) -> None:
    write(tmp_path / "e.npy", batch([1]))
    (tmp_path / "other").touch()
    assert (tmp_path / "e.npy").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="gone does not exist"):
        EmbeddingWriter(tmp_path / "gone" / "e.npy")


@pytest.mark.parametrize("name", ["e.npy", "e.paths.txt", "e.errors.txt"])
def test_what_is_no_regular_file_is_not_overwritten(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match=f"{name} exists and is not a regular file"):
        EmbeddingWriter(tmp_path / "e.npy")
    assert names(tmp_path) == [name]


def test_outputs_in_one_folder_have_names_and_errors_of_their_own(tmp_path: Path) -> None:
    write(tmp_path / "a.npy", batch([1], [Failure("x.jpg", "gone")]))
    before = contents(tmp_path)
    write(tmp_path / "b.npy", batch([2, 3]))
    assert before.items() <= contents(tmp_path).items()
    assert (tmp_path / "b.paths.txt").read_text() == "2.png\n3.png\n"


def test_the_usual_name_has_short_ones_beside_it(tmp_path: Path) -> None:
    for name in ("embeddings.npy", "train.npy"):
        write(tmp_path / name, batch([1], [Failure("x.jpg", "gone")]))
    of_train = {"train.npy", "train.paths.txt", "train.errors.txt"}
    assert set(contents(tmp_path)) == {"embeddings.npy", "paths.txt", "errors.txt"} | of_train


def test_a_list_that_no_run_wrote_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "e.paths.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"e\.paths\.txt is there without .*e\.npy, so it may be your own"):
        EmbeddingWriter(tmp_path / "e.npy")
    assert contents(tmp_path) == {"e.paths.txt": b"mine"}


def test_errors_that_no_run_wrote_are_not_replaced(tmp_path: Path) -> None:
    errors = tmp_path / "e.errors.txt"
    errors.write_text("my own notes\n")
    with pytest.raises(ValueError, match=r"e\.errors\.txt is there without .*e\.npy, so it may be your own"):
        EmbeddingWriter(tmp_path / "e.npy")
    assert contents(tmp_path) == {"e.errors.txt": b"my own notes\n"}
    errors.unlink()
    write(tmp_path / "e.npy", EmbeddedBatch([], np.empty((0, 0), np.float32), [Failure("1.png", "gone")]))
    assert list(contents(tmp_path)) == ["e.errors.txt"]  # a run in which every image has failed
    write(tmp_path / "e.npy", batch([1]))
    assert set(contents(tmp_path)) == {"e.npy", "e.paths.txt"}


def test_what_opens_too_late_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = iter(["same", "same"])
    monkeypatch.setattr(files.secrets, "token_hex", lambda size: next(tokens))
    with pytest.raises(StopIteration):  # at the third file
        EmbeddingWriter(tmp_path / "e.npy")
    assert names(tmp_path) == []


def test_what_a_killed_run_left_is_removed_and_another_run_s_is_not(tmp_path: Path) -> None:
    for name in (".e.npy.1.tmp", ".e.paths.txt.2.tmp", ".e.errors.txt.3.tmp", ".other.npy.4.tmp"):
        (tmp_path / name).touch()
    with EmbeddingWriter(tmp_path / "e.npy"):
        running = names(tmp_path)
        assert len(running) == 4
        assert ".other.npy.4.tmp" in running
        EmbeddingWriter(tmp_path / "e.npy").__exit__(None, None, None)
        assert names(tmp_path) == running
    assert names(tmp_path) == [".other.npy.4.tmp"]


def test_many_rows_are_not_kept_in_memory(tmp_path: Path) -> None:
    rows = np.ones((1000, 512), np.float32)
    paths = ["a.png"] * len(rows)
    with EmbeddingWriter(tmp_path / "e.npy") as writer:
        sizes: list[int] = []
        for _ in range(3):
            writer.add(EmbeddedBatch(paths, rows, []))
            (temporary,) = tmp_path.glob(".e.npy.*")
            sizes.append(temporary.stat().st_size)
        assert min(np.diff(sizes)) >= rows.nbytes - 10**6
        writer.commit()
    assert np.load(tmp_path / "e.npy").shape == (3000, 512)
