"""Exact search over shards against a plain sort, the command around it, and its page in a real browser."""

from __future__ import annotations

import base64
import io
import json
import re
import resource
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from bad_files import BAD_FILES
from earlier import as_earlier
from hostile import Greedy
from numpy.testing import assert_allclose, assert_array_equal
from numpy.typing import NDArray
from PIL import Image

import clip_fast
from clip_fast import Clip
from clip_fast.bulk.manifest import RAY_MANIFEST_NAME
from clip_fast.bulk.shards import OutputFolder, row_lengths
from clip_fast.bulk.tables import ParquetWriter, Record, Shard
from clip_fast.cli import main as cli
from clip_fast.inputs import parquet
from clip_fast.inputs.tars import Tar
from clip_fast.search import gallery
from clip_fast.search import index as search
from clip_fast.search.index import Hit, Index
from clip_fast.towers import reference
from clip_fast.towers.config import TextConfig, VitConfig
from clip_fast.towers.text import TextEncoder

pyarrow = pytest.importorskip("pyarrow")
pytest.importorskip("pyarrow.parquet")

PHOTOGRAPHS = sorted((Path(__file__).parents[1] / "data").glob("*.jpg"))
CONFIG = VitConfig(image_size=32, patch_size=16, width=64, layers=2, heads=1, embed_dim=24)
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def cut(rows: NDArray[np.float32], shard_size: int, failed: tuple[int, ...] = ()) -> list[Shard]:
    shards: list[Shard] = []
    for start in range(0, len(rows), shard_size):
        part = range(start, min(start + shard_size, len(rows)))
        records = [Record(f"k{j}", f"{j}.png", 5, 4, "broken" if j in failed else None) for j in part]
        shards.append(Shard(len(shards), rows[part.start : part.stop], records))
    return shards


def write_index(folder: Path, rows: NDArray[np.float32], shard_size: int, failed: tuple[int, ...] = ()) -> Index:
    with OutputFolder(folder) as output:
        output.begin({"model": "m"})
        shards = cut(rows, shard_size, failed)
        for shard in shards:
            output.write(shard)
        output.finish(len(shards))
    return Index(folder)


def write_tables(folder: Path, rows: NDArray[np.float32], shard_size: int, failed: tuple[int, ...] = ()) -> Index:
    """As with --ray: the columns of one parquet file, in several of any names."""
    folder.mkdir()
    for shard in cut(rows, shard_size, failed):
        with ParquetWriter(folder / f"f3a_{shard.index:06}-0.parquet") as file:
            file.write(shard)
            file.commit()
    (folder / RAY_MANIFEST_NAME).write_text(json.dumps({"settings": {"model": "m"}}))
    return Index(folder)


def cosines(queries: NDArray[np.float32], rows: NDArray[np.float32]) -> NDArray[np.float64]:
    q, r = queries.astype(np.float64), rows.astype(np.float64)
    lengths = np.linalg.norm(r, axis=1)
    return (q / np.linalg.norm(q, axis=1, keepdims=True)) @ (r / np.where(lengths, lengths, 1)[:, None]).T


# --- the index -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("write", "dtype"), [(write_index, np.float32), (write_index, np.float16), (write_tables, np.float32)]
)
@pytest.mark.parametrize("shard_size", [1000, 7])
def test_the_nearest_are_those_of_a_plain_sort(
    tmp_path: Path,
    write: Callable[..., Index],
    dtype: type[np.floating],
    shard_size: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(search, "_BLOCK_ROWS", 16)
    random = np.random.default_rng()
    rows = (random.standard_normal((100, 24)) * random.uniform(0.1, 20, (100, 1))).astype(dtype)
    rows[[3, 50]] = 0  # failed
    queries = random.standard_normal((5, 24)).astype(np.float32)
    index = write(tmp_path / "index", rows, shard_size, failed=(3, 50))
    assert (len(index), index.embed_dim) == (100, 24)
    wanted = cosines(queries, rows)
    wanted[:, [3, 50]] = -np.inf
    for k in (1, 10, 98):
        scores, found = index.nearest(queries, k)
        assert_array_equal(found, np.argsort(-wanted, axis=1)[:, :k])
        assert_allclose(scores, np.take_along_axis(wanted, found, axis=1), atol=1e-6)
    assert index.nearest(queries, 1000)[0].shape == (5, 98)  # never a failed one


def test_of_equals_the_earlier_row_is_first(tmp_path: Path) -> None:
    index = write_index(tmp_path / "index", np.ones((30, 4), np.float32), 7)
    assert [hit.row for hit in index.search(np.ones(4), 5)] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("write", [write_index, write_tables])
def test_hits_have_their_records(tmp_path: Path, write: Callable[..., Index]) -> None:
    rows = np.eye(9, dtype=np.float32)
    hits = write(tmp_path / "index", rows, 4).search(rows[6] + 0.5 * rows[2], 2)
    assert [(hit.row, hit.key, hit.location) for hit in hits] == [(6, "k6", "6.png"), (2, "k2", "2.png")]
    assert hits[0].score == pytest.approx(1 / 1.25**0.5)


@pytest.mark.parametrize("write", [write_index, write_tables])
def test_more_shards_than_files_may_be_open(tmp_path: Path, write: Callable[..., Index]) -> None:
    rows = np.eye(80, dtype=np.float32)
    write(tmp_path / "index", rows, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    open_now = max(int(each.name) for each in Path("/proc/self/fd").iterdir())
    resource.setrlimit(resource.RLIMIT_NOFILE, (open_now + 20, hard))
    try:
        hits = Index(tmp_path / "index").search(rows[70] + 0.5 * rows[5], 2)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert [hit.key for hit in hits] == ["k70", "k5"]


def test_several_queries_find_what_each_finds_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the last bit, also where the order among hundreds of near rows is decided in float64."""
    random = np.random.default_rng()
    base = random.standard_normal(24)
    rows = (base + 1e-4 * random.standard_normal((400, 24))).astype(np.float32)
    rows[200:300] = rows[:100]
    queries = np.concatenate([random.standard_normal((4, 24)), rows[:2]]).astype(np.float32)
    index = write_index(tmp_path / "index", rows, 90)
    together = index.search_many(queries, 25)
    assert together == [index.search(query, 25) for query in queries]
    monkeypatch.setattr(search, "_BLOCK_ROWS", 7)
    monkeypatch.setattr(search, "_QUERIES", 2)
    monkeypatch.setattr(search, "_PAIRS", 3)
    monkeypatch.setattr(search, "_ALONE", 50)
    assert Index(tmp_path / "index").search_many(queries, 25) == together
    wanted = cosines(queries, rows)
    for hits, line in zip(together, wanted, strict=True):
        assert [hit.row for hit in hits] == np.lexsort((np.arange(400), -line))[:25].tolist()
    assert [len(hits) for hits in index.search_many(queries[:0], 3)] == []


def test_lengths_are_written_and_not_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders of earlier releases have none; they are then measured once."""
    rows = np.random.default_rng().standard_normal((50, 24)).astype(np.float32)
    rows[7] = 0
    index = write_index(tmp_path / "index", rows, 20, failed=(7,))
    measured: list[int] = []
    monkeypatch.setattr(search, "row_lengths", lambda rows: measured.append(len(rows)) or row_lengths(rows))
    wanted = index.search(rows[3], 50)
    assert (len(wanted), measured) == (49, [])
    for path in (tmp_path / "index" / "metadata").iterdir():
        table = pyarrow.parquet.read_table(path)
        assert_allclose(
            table["norm"].to_numpy(), np.linalg.norm(rows[20 * int(path.stem[-4:]) :][:20], axis=1), rtol=1e-6
        )
        pyarrow.parquet.write_table(table.drop_columns(["norm"]), path)
    index = Index(tmp_path / "index")
    assert index.search(rows[3], 50) == index.search(rows[3], 50) == wanted
    assert measured == [20, 20, 10]


def test_an_approximate_index_of_faiss_reads_the_folder(tmp_path: Path) -> None:
    """The recipe of docs/bulk.md."""
    pytest.importorskip("faiss")
    random = np.random.default_rng(0)
    rows = random.standard_normal((2000, 16)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    index = write_index(tmp_path / "embeddings", rows, 500)
    page = (Path(__file__).parents[2] / "docs" / "bulk.md").read_text("utf-8")
    (recipe,) = re.findall(r"^```python\n(.*?faiss.*?)^```$", page, flags=re.M | re.S)
    code = recipe.replace("embeddings/", f"{tmp_path}/embeddings/").replace('"IVF4096,Flat"', '"IVF8,Flat"')
    assert code.count("IVF8") == 1
    names: dict[str, object] = {"query": rows[77]}
    exec(code, names)
    found = names["rows"]
    assert isinstance(found, np.ndarray)
    wanted = [hit.row for hit in index.search(rows[77], 10)]
    assert found[0, 0] == wanted[0] == 77
    assert len(set(found[0]) & set(wanted)) > 4


def test_autofaiss_and_its_reader_take_the_folder(tmp_path: Path) -> None:
    """With the reader that clip-retrieval and autofaiss share, and the index that they build."""
    embedding_reader = pytest.importorskip("embedding_reader")
    autofaiss = pytest.importorskip("autofaiss")
    rows = np.random.default_rng().standard_normal((300, 24)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    index = write_index(tmp_path / "index", rows, 70)
    embeddings = str(tmp_path / "index" / "img_emb")
    reader = embedding_reader.EmbeddingReader(
        embeddings,
        file_format="parquet_npy",
        metadata_folder=str(tmp_path / "index" / "metadata"),
        meta_columns=["key", "image_path"],
    )
    assert (reader.count, reader.dimension) == (300, 24)
    read = list(reader(batch_size=64, show_progress=False))
    assert_array_equal(np.concatenate([part for part, _ in read]), rows)
    names = [
        name for _, metadata in read for name in metadata[["key", "image_path"]].itertuples(index=False, name=None)
    ]
    assert names == [(f"k{j}", f"{j}.png") for j in range(300)]

    built, _ = autofaiss.build_index(embeddings, save_on_disk=False, metric_type="ip", index_key="Flat", verbose=40)
    scores, found = index.nearest(rows[:5], 10)
    built_scores, built_found = built.search(rows[:5], 10)
    assert_array_equal(built_found, found)
    assert_allclose(built_scores, scores, atol=1e-6)


def test_what_is_no_index_and_no_query(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"it has no manifest\.json or _manifest\.json"):
        Index(tmp_path)
    index = write_index(tmp_path / "index", np.eye(4, dtype=np.float32), 4)
    with pytest.raises(ValueError, match=r"queries must be \[Q, 4\], got \[1, 3\]"):
        index.search(np.ones(3))
    for query in (np.zeros(4), np.full(4, np.nan)):
        with pytest.raises(ValueError, match="no direction"):
            index.search(query)
    with pytest.raises(ValueError, match="search takes one query, got 2: search_many takes several"):
        index.search(np.eye(4)[:2])
    with pytest.raises(ValueError, match=r"queries must be \[Q, 4\], got \[1, 1, 4\]"):
        index.search(np.ones((1, 1, 4)))
    for k in (0, -1):
        with pytest.raises(ValueError, match=f"k must be at least 1, got {k}"):
            index.search(np.ones(4), k)
    with OutputFolder(tmp_path / "begun") as output:
        output.begin({"model": "m"})
    with pytest.raises(ValueError, match="no finished shard"):
        Index(tmp_path / "begun")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_a_query_may_be_a_tensor(tmp_path: Path, dtype: torch.dtype) -> None:
    index = write_index(tmp_path / "index", np.eye(4, dtype=np.float32), 4)
    query = torch.tensor([0, 0.5, 2, 0], dtype=dtype, requires_grad=True)
    wanted = index.search(np.array([0, 0.5, 2, 0]), 2)
    assert [hit.row for hit in wanted] == [2, 1]
    assert index.search(query, 2) == index.search(query[None], 2) == wanted
    assert index.search_many(torch.stack([query, query]), 2) == [wanted, wanted]


@pytest.mark.parametrize("value", [np.nan, np.inf, 1.8e38])
@pytest.mark.parametrize("k", [1, 5, 100])
def test_a_row_that_has_lost_its_length_hides_no_others(tmp_path: Path, k: int, value: float) -> None:
    """As by one bit that the disk has turned. Without an error, the row's cosine would push others out."""
    rows = np.random.default_rng().standard_normal((60, 24)).astype(np.float32)
    write_index(tmp_path / "index", rows, 20)
    stored = np.load(tmp_path / "index" / "img_emb" / "img_emb_0001.npy", mmap_mode="r+")
    stored[3, 5] = value
    with pytest.raises(ValueError, match=r"row 23 of the index is damaged.*clip-fast verify"):
        Index(tmp_path / "index").search(rows[23], k)
    assert cli.main(["verify", str(tmp_path / "index")]) == 1


@pytest.mark.parametrize("length", [1e-18, 1e15])
def test_rows_of_any_length_are_compared(tmp_path: Path, length: float) -> None:
    rows = (length * np.random.default_rng().standard_normal((50, 24))).astype(np.float32)
    assert write_index(tmp_path / "index", rows, 20).search(rows[7] / np.float32(length), 1)[0].row == 7


@pytest.mark.parametrize("searched", [False, True])
@pytest.mark.parametrize("rows", [5, 3, None])
def test_an_open_index_says_that_its_folder_has_changed(tmp_path: Path, searched: bool, rows: int | None) -> None:
    """As when a run is extended meanwhile: rows and names would be of two states. In between there are no names."""
    index = write_index(tmp_path / "index", np.eye(8, dtype=np.float32), 4)
    query = np.ones(8)
    if searched:
        index.search(query, 8)
    if rows is None:
        (tmp_path / "index" / "metadata" / "metadata_0001.parquet").unlink()
    else:
        with OutputFolder(tmp_path / "index", resume=True) as output:
            output.begin({"model": "m"})
            output.write(replace(cut(np.eye(8, dtype=np.float32)[:rows], 8)[0], index=1))
    with pytest.raises(ValueError, match=r"metadata_0001\.parquet has other rows than .*: open it again"):
        index.search(query, 8)
    if rows is not None:
        assert len(Index(tmp_path / "index").search(query, 100)) == 4 + rows


@pytest.mark.parametrize("damage", ["cut", "empty", "longer", "gone", "rows", "no array"])
def test_damaged_embeddings_are_named(tmp_path: Path, damage: str) -> None:
    """By their size, without a checksum too: what is left would be found under the names of others."""
    write_index(tmp_path / "index", np.eye(8, dtype=np.float32), 4)
    path = tmp_path / "index" / "img_emb" / "img_emb_0001.npy"
    data = path.read_bytes()
    if damage == "gone":
        path.unlink()
    elif damage == "rows":
        np.save(path, np.load(path)[:2])
    elif damage == "no array":
        path.write_bytes(bytes(len(data)))
    else:
        path.write_bytes({"cut": data[:-9], "empty": b"", "longer": data + b"\0"}[damage])
    with pytest.raises(ValueError, match=re.escape(f"{path} is ")):
        Index(tmp_path / "index")


def test_an_array_of_other_rows_is_named(tmp_path: Path) -> None:
    """Of the same size in bytes."""
    write_index(tmp_path / "index", np.eye(8, dtype=np.float32), 4)
    path = tmp_path / "index" / "img_emb" / "img_emb_0000.npy"
    for shape, said in (((8, 4), "8 rows of 4"), ((2, 2, 8), "3 dimensions")):
        np.save(path, np.zeros(shape, np.float32))
        with pytest.raises(ValueError, match=rf"img_emb_0000\.npy is damaged: it has {said}"):
            Index(tmp_path / "index")


def test_no_shard_is_left_out_without_a_word(tmp_path: Path) -> None:
    index = write_index(tmp_path / "index", np.eye(12, dtype=np.float32), 4)
    assert index.complete
    metadata = tmp_path / "index" / "metadata"
    lost = (metadata / "metadata_0001.parquet").rename(tmp_path / "lost")
    with pytest.raises(ValueError, match=r"metadata_0001\.parquet: missing, though .*manifest\.json counts 3 shards"):
        Index(tmp_path / "index")
    shutil.copy(lost, metadata / "metadata_0001.parquet")
    shutil.copy(lost, metadata / "metadata_0003.parquet")
    with pytest.raises(ValueError, match=r"metadata_0003\.parquet: too many, as .*manifest\.json counts 3 shards"):
        Index(tmp_path / "index")
    (metadata / "metadata_0003.parquet").unlink()
    for content, said in ((b"", "damaged"), (lost.read_bytes()[:-20], "damaged")):
        (metadata / "metadata_0001.parquet").write_bytes(content)
        with pytest.raises(ValueError, match=rf"metadata_0001\.parquet is {said}"):
            Index(tmp_path / "index")


def test_tables_are_counted(tmp_path: Path) -> None:
    """Ray gives its files any names; the manifest has the number of images."""
    index = write_tables(tmp_path / "index", np.eye(12, dtype=np.float32), 4)
    manifest = tmp_path / "index" / RAY_MANIFEST_NAME
    assert len(index) == 12
    manifest.write_text(json.dumps({"settings": {}, "done": {"images": 12, "failed": 0}}))
    assert Index(tmp_path / "index").complete
    table = tmp_path / "index" / "f3a_000001-0.parquet"
    data = table.read_bytes()
    table.write_bytes(data[:-9])
    with pytest.raises(ValueError, match=r"f3a_000001-0\.parquet is damaged"):
        Index(tmp_path / "index")
    table.unlink()
    with pytest.raises(ValueError, match=r"_manifest\.json counts 12 images, the files beside it hold 8"):
        Index(tmp_path / "index")


def test_an_index_without_checksums(tmp_path: Path) -> None:
    """As earlier releases wrote it, and its manifest before the run was complete."""
    rows = np.eye(8, dtype=np.float32)
    write_index(tmp_path / "index", rows, 4)
    as_earlier(tmp_path / "index")
    assert [hit.row for hit in Index(tmp_path / "index").search(rows[5], 1)] == [5]
    (tmp_path / "index" / "manifest.json").write_text(json.dumps({"settings": {"model": "m"}}))
    (tmp_path / "index" / "metadata" / "metadata_0000.parquet").unlink()
    index = Index(tmp_path / "index")
    assert (index.complete, len(index)) == (False, 4)


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP in OpenAI's form, with a text tower."""
    path = tmp_path_factory.mktemp("checkpoint") / "clip.pt"
    text = TextConfig(context_length=77, vocabulary=49408, width=64, heads=1, layers=1, embed_dim=24)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        state = {f"visual.{name}": tensor for name, tensor in reference.build(CONFIG).state_dict().items()}
        state |= dict(TextEncoder(text).state_dict())
    torch.save(state, path)
    return path


@pytest.fixture
def index(tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of five photographs and pictures, one of them in a tar."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for path in PHOTOGRAPHS:
        shutil.copy(path, tmp_path / "photos")
    random = np.random.default_rng(0)
    Image.fromarray(random.integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(tmp_path / "noise.png")
    shutil.make_archive("more", "tar", root_dir=tmp_path, base_dir="noise.png")
    (tmp_path / "photos" / "broken.jpg").write_bytes(b"nothing")
    arguments = ["photos", "more.tar", "--model", str(checkpoint), "--output", "out/", "--workers", "0", "--quiet"]
    assert cli.main(["encode", *arguments, "--shard-size", "2"]) == 1
    return tmp_path / "out"


def test_an_image_finds_itself(index: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photograph = f"photos/{PHOTOGRAPHS[0].name}"
    assert cli.main(["search", "--image", photograph, "--index", str(index), "-k", "3"]) == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 3
    assert lines[0] == ["1.0000", photograph]
    assert cli.main(["search", "--image", "noise.png", "--index", str(index), "--json"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(found) == len(PHOTOGRAPHS) + 1  # all but the broken one
    assert found[0]["image_path"] == "more.tar/noise.png"
    assert found[0]["score"] == pytest.approx(1)


def test_words_find_what_the_model_says(index: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tokenizers")
    assert cli.main(["search", "a dog on a beach", "--index", str(index), "--json"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    model, preprocess = clip_fast.load(checkpoint, "cpu")
    assert isinstance(model, Clip)
    names = [name for name in (each["image_path"] for each in found) if name.startswith("photos")]
    with torch.no_grad():
        images = torch.stack([preprocess(Image.open(name)) for name in names])
        logits, _ = model(images, clip_fast.tokenize("a dog on a beach"))
    scores = (logits[:, 0] / model.logit_scale.exp()).tolist()
    assert [each["score"] for each in found if each["image_path"] in names] == pytest.approx(scores, abs=1e-5)


def test_a_file_of_queries_is_one_pass(
    index: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tokenizers")
    texts = ["a dog on a beach", "写真", "two\ttabs"]
    Path("queries.txt").write_text("\ufeff" + "\r\n".join([texts[0], "", *texts[1:]]) + "\n", "utf-8")
    alone = []
    for text in texts:
        assert cli.main(["search", text, "--index", str(index), "-k", "2", "--json"]) == 0
        alone += [{"query": text, **json.loads(line)} for line in capsys.readouterr().out.splitlines()]
    passes: list[int] = []
    blocks = Index._blocks
    monkeypatch.setattr(Index, "_blocks", lambda index: passes.append(1) or blocks(index))
    arguments = ["search", "--queries", "queries.txt", "--index", str(index), "-k", "2"]
    assert cli.main([*arguments, "--json"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [{**each, "score": pytest.approx(each["score"], abs=1e-5)} for each in found] == alone
    assert len(passes) == 1
    assert cli.main(arguments) == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [(line[0], line[2]) for line in lines] == [
        (each["query"].replace("\t", "\\t"), each["image_path"]) for each in alone
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either a TEXT, an --image or --queries"),
        (["words", "--image", "noise.png"], "give either a TEXT, an --image or --queries"),
        (["words", "--queries", "noise.png"], "give either a TEXT, an --image or --queries"),
        (["--queries", "noise.png", "--html", "x.html"], "--html shows what one query finds"),
        (["--image", "noise.png", "--html", "gone/x.html"], "the output's folder gone does not exist"),
        (["--image", "noise.png", "--html", "photos"], "photos exists and is not a regular file"),
        (["--queries", "noise.png"], "noise.png: not in UTF-8"),
        (["caf\udce9"], "caf\\udce9: not in UTF-8"),
        (["--queries", "-"], "--queries -: standard input is closed"),
        (["--image", "noise.png", "--html", "./noise.png"], "noise.png is read by this run"),
        (["--queries", "/dev/null"], "/dev/null: no line to look for"),
        (["--queries", "gone.txt"], "No such file or directory: 'gone.txt'"),
    ],
)
def test_errors(
    index: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.setattr(sys, "stdin", None)  # as where a shell has closed it
    assert cli.main(["search", *arguments, "--index", str(index)]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


@pytest.mark.parametrize(
    ("name", "value"),
    [("model", None), ("model", ["x"]), ("weights", 3), ("dtype", "int8"), ("dtype", []), ("activation", "relu"),
     ("image_column", {})],
)  # fmt: skip
def test_a_manifest_with_other_settings_is_named(
    index: Path, capsys: pytest.CaptureFixture[str], name: str, value: object
) -> None:
    manifest = index / "manifest.json"
    content = json.loads(manifest.read_text())
    content["settings"][name] = value
    manifest.write_text(json.dumps(content))
    assert cli.main(["search", "--image", "noise.png", "--index", str(index)]) == 2
    said = capsys.readouterr().err
    assert f"error: {manifest} is damaged: its setting '{name}' is {value!r}, expected " in said
    assert "Traceback" not in said


def test_an_index_that_is_not_finished_is_said_to_be(index: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = index / "manifest.json"
    arguments = ["search", "--image", "noise.png", "--index", str(index)]
    assert cli.main(arguments) == 0
    assert "not finished" not in capsys.readouterr().err
    content = json.loads(manifest.read_text())
    del content["done"]
    manifest.write_text(json.dumps(content))
    assert cli.main(arguments) == 0
    assert f"encode has not finished it; searching the {len(Index(index))} images in it" in capsys.readouterr().err


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_query_that_is_no_image(index: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    make, reason = BAD_FILES[kind]
    make(Path("query.png"))
    assert cli.main(["search", "--image", "query.png", "--index", str(index)]) == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    assert "error: query.png: " in captured.err
    assert reason in captured.err
    assert captured.out == ""


def test_what_nobody_foresaw_is_not_some_failed(
    index: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Index, "search_many", lambda *_: 1 / 0)
    assert cli.main(["search", "--image", "noise.png", "--index", str(index)]) == 2
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_another_model_is_refused(index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other.pt"
    state = {f"visual.{name}": tensor for name, tensor in reference.build(CONFIG).state_dict().items()}
    torch.save(state, other)
    arguments = ["--index", str(index), "--model", str(other), "--activation", "quick_gelu"]
    for dtype in ([], ["--dtype", "float32"], ["--dtype", "bfloat16"]):
        assert cli.main(["search", "--image", "noise.png", *arguments, *dtype]) == 2
        assert "was made with other weights" in capsys.readouterr().err


def test_the_activation_is_as_it_was(index: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["noise.png", "--model", str(checkpoint), "--workers", "0", "--quiet"]
    assert cli.main(["encode", *arguments, "--output", "gelu/", "--activation", "gelu"]) == 0
    capsys.readouterr()
    assert cli.main(["search", "--image", "noise.png", "--index", "gelu/"]) == 0
    assert capsys.readouterr().out.startswith("1.0000\tnoise.png")


def test_the_model_may_search_in_another_precision(
    index: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["search", "--image", "noise.png", "--index", str(index), "--dtype", "bfloat16", "--json"]) == 0
    best = json.loads(capsys.readouterr().out.splitlines()[0])
    assert best["image_path"] == "more.tar/noise.png"
    rows = []
    for dtype in (torch.float32, torch.bfloat16):  # the index's, and the query's
        model, preprocess = clip_fast.load(checkpoint, "cpu", dtype)
        with torch.no_grad():
            rows.append(model.encode_image(preprocess(Image.open("noise.png")).unsqueeze(0)).double())
    assert best["score"] == pytest.approx(torch.cosine_similarity(*rows).item(), abs=2e-7)
    assert torch.cosine_similarity(*rows).item() < 1 - 1e-6  # so that the index's precision would be seen


def test_an_image_tower_alone_knows_no_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (40, 30), "red").save("red.png")
    arguments = ["--model", "tiny-digits", "--quiet", "--workers", "0", "--output", "out/"]
    assert cli.main(["encode", "red.png", *arguments]) == 0
    assert cli.main(["search", "words", "--index", "out"]) == 2
    assert "has no text tower" in capsys.readouterr().err


# --- the page --------------------------------------------------------------------------------------------------------


def test_a_page_stands_alone(index: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--image", "noise.png", "--index", str(index), "--html", "found.html"]
    assert cli.main(["search", *arguments]) == 0
    capsys.readouterr()
    text = Path("found.html").read_text()
    assert text.count("<img ") == len(PHOTOGRAPHS) + 2  # with the query's, and the one in the tar
    assert not re.search(r"(?:src|href)=\"(?!data:)", text)
    assert "<script" not in text
    (index.parent / "photos" / PHOTOGRAPHS[0].name).unlink()
    assert cli.main(["search", *arguments]) == 0
    text = Path("found.html").read_text()
    assert text.count("<img ") == len(PHOTOGRAPHS) + 1
    assert "FileNotFoundError" in text


def test_a_page_lists_a_tar_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And shows the right one of two members of one name."""
    path, gone = tmp_path / "a.tar", tmp_path / "gone.tar"
    with tarfile.open(path, "w") as tar:
        for value in (0, 255):
            file = io.BytesIO()
            Image.new("RGB", (8, 8), (value, 0, 0)).save(file, "PNG")
            member = tarfile.TarInfo("x.png")
            member.size = len(file.getvalue())
            tar.addfile(member, io.BytesIO(file.getvalue()))
    lists: list[str] = []
    listed = Tar.__iter__
    monkeypatch.setattr(Tar, "__iter__", lambda tar: (lists.append(tar.path), listed(tar))[1])
    places = [f"{path}/x.png#2", f"{gone}/x.png", f"{path}/x.png", f"{path}/y.png"]
    text = gallery.page("x", [Hit(1.0, i, "k", place) for i, place in enumerate(places)])
    assert lists == [str(path)]
    shown = re.findall(r'<img alt="([^"]*)" src="data:image/jpeg;base64,([^"]*)"', text)
    assert [place for place, _ in shown] == [places[0], places[2]]
    reds = [Image.open(io.BytesIO(base64.b64decode(data))).getpixel((4, 4))[0] for _, data in shown]  # type: ignore[index]
    assert reds[0] > 200 > 50 > reds[1]
    assert text.count("FileNotFoundError") == 2


def test_a_page_reads_a_table_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not again for each hit that stands before the last one in it; figures are in the order of scores."""
    path = tmp_path / "a.parquet"
    cells: list[bytes] = []
    for value in range(200):
        file = io.BytesIO()
        Image.new("RGB", (8, 8), (value, 0, 0)).save(file, "PNG")
        cells.append(file.getvalue())
    pyarrow.parquet.write_table(pyarrow.table({"image": cells}), path)
    begun: list[int] = []
    rewind = parquet._Column._rewind
    monkeypatch.setattr(parquet._Column, "_rewind", lambda column: begun.append(1) or rewind(column))
    places = [f"{path}#{row}" for row in (199, 0, 120, 3)]
    text = gallery.page("x", [Hit(1.0, i, "k", place) for i, place in enumerate(places)], query=places[2])
    assert re.findall(r'<img alt="([^"]*)"', text) == [places[2], *places]
    assert len(begun) == 1


@pytest.mark.parametrize(("exif", "size"), [(True, (20, 40)), (False, (40, 20))], ids=["whole", "damaged"])
def test_a_thumbnail_is_turned_as_its_exif_says(tmp_path: Path, exif: bool, size: tuple[int, int]) -> None:
    """Where that is damaged, it is shown as it is."""
    orientation = Image.Exif()
    orientation[0x0112] = 6
    path = tmp_path / "a.png"
    Image.new("RGB", (40, 20)).save(path, exif=orientation if exif else b"broken")
    text = gallery.page("x", [Hit(1.0, 0, "k", str(path))])
    (shown,) = re.findall(r"base64,([^\"]*)", text)
    assert Image.open(io.BytesIO(base64.b64decode(shown))).size == size


def test_an_image_that_takes_too_much_memory_is_missing_in_a_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gallery, "items_at", lambda places, *_: {place: Greedy(place, place) for place in places})
    before = resource.getrlimit(resource.RLIMIT_DATA)
    assert '<div class="missing">MemoryError</div>' in gallery.page("x", [Hit(1.0, 0, "k", "a.png")])
    assert resource.getrlimit(resource.RLIMIT_DATA) == before


def test_names_are_text_in_a_page() -> None:
    name = '<script>alert("1")</script>&.png'
    text = gallery.page(name, [Hit(0.5, 0, "k", name)])
    assert "<script" not in text
    assert "&lt;script&gt;alert(" in text


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome is installed")
def test_a_browser_shows_the_page(index: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """All thumbnails have been decoded and laid out, none outside of the window."""
    assert BROWSER is not None
    assert cli.main(["search", "--image", "noise.png", "--index", str(index), "--html", "found.html"]) == 0
    capsys.readouterr()
    measure = """<script>onload = () => { document.title = JSON.stringify([...document.images].map(image => {
        const box = image.getBoundingClientRect();
        return [image.naturalWidth, box.width >= 40, box.left >= 0 && box.right <= innerWidth]; })); }</script>"""
    page = tmp_path / "measured.html"
    page.write_text(Path("found.html").read_text().replace("</html>", measure + "</html>"))
    done = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
         "--window-size=800,600", "--virtual-time-budget=5000", "--dump-dom", page.as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title is not None, done.stdout[:500] + done.stderr[-500:]
    images = json.loads(title[1])
    assert len(images) == len(PHOTOGRAPHS) + 2
    assert all(width > 20 and visible and inside for width, visible, inside in images), images
