"""The recipes of README and docs/bulk.md, run as they are written, at small size.

They load a checkpoint, and encode ten images, ten million, on a cluster, and search. The sizes are small because tars
have one tiny picture each, the CPU stands for GPUs, and small checkpoints stand for ViT-B/32 and ViT-L/14, the latter
in child processes and Ray's workers too. Ray's own commands are for the whole machine: they are parsed, and the test
starts a cluster of its own. README's lines for a user's own model are run by tests/dropin/test_accelerate.py.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from ray_nodes import small_cluster

from clip_fast import Clip
from clip_fast.bulk import processes
from clip_fast.checkpoint import published
from clip_fast.checkpoint.download import Pretrained
from clip_fast.cli.main import main
from clip_fast.search.index import Index
from clip_fast.towers import reference
from clip_fast.towers.config import TextConfig, VitConfig
from clip_fast.towers.text import TextEncoder

pytest.importorskip("pyarrow")

ROOT = Path(__file__).parent.parent
README, BULK = ROOT / "README.md", ROOT / "docs" / "bulk.md"
TARS, SAMPLES = 1000, 20
WANTED = 345  # of the tars, which holds the picture that is searched for

IMAGE_TOWER = VitConfig(image_size=32, patch_size=16, width=64, layers=2, heads=1, embed_dim=24)
TEXT_TOWER = TextConfig(context_length=77, vocabulary=49408, width=64, heads=1, layers=1, embed_dim=24)

SITECUSTOMIZE = """
from importlib.machinery import PathFinder
import sys

class Finder(PathFinder):  # changes the one module that says which file is ViT-L/14, when it is imported
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        spec = super().find_spec(name, path, target) if name == "clip_fast.checkpoint.published" else None
        if spec is not None:
            execute = spec.loader.exec_module

            def then_rename(module):
                execute(module)
                module.OPENAI_CHECKPOINTS["ViT-L/14"] = module.Pretrained({url!r}, {sha256!r})

            spec.loader.exec_module = then_rename
        return spec

sys.meta_path.insert(0, Finder)
"""


def section(page: Path, heading: str) -> str:
    """The text below a heading, up to the next."""
    below = re.split(rf"^#+ {re.escape(heading)}$", page.read_text("utf-8"), maxsplit=1, flags=re.M)[1]
    return re.split(r"^#+ ", below, maxsplit=1, flags=re.M)[0]


def commands(page: Path, heading: str) -> list[list[str]]:
    """The arguments of each command in the bash blocks below a heading."""
    blocks = re.findall(r"^```bash\n(.*?)^```$", section(page, heading), flags=re.M | re.S)
    lines = "".join(blocks).replace("\\\n", "").splitlines()
    return [shlex.split(line, comments=True) for line in lines]


ENCODING = commands(BULK, "From ten images to ten million")
SEARCHING = commands(BULK, "Search at once")


def run(command: list[str]) -> int:
    assert command[0] == "clip-fast"
    return main(command[1:])


def png(number: int) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module", autouse=True)
def small_models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """ViT-B/32 and ViT-L/14 are a small CLIP in OpenAI's form, where the official ones would be kept."""
    home = tmp_path_factory.mktemp("home")
    (home / ".cache" / "clip").mkdir(parents=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        state = {f"visual.{name}": tensor for name, tensor in reference.build(IMAGE_TOWER).state_dict().items()}
        state |= dict(TextEncoder(TEXT_TOWER).state_dict())
    with pytest.MonkeyPatch.context() as patch:
        for name in ("ViT-B/32", "ViT-L/14"):
            official = published.OPENAI_CHECKPOINTS[name]
            path = home / ".cache" / "clip" / official.filename
            torch.save(state, path)
            small = Pretrained(official.url, hashlib.sha256(path.read_bytes()).hexdigest())
            patch.setitem(published.OPENAI_CHECKPOINTS, name, small)
        small = published.OPENAI_CHECKPOINTS["ViT-L/14"]
        (home / "sitecustomize.py").write_text(SITECUSTOMIZE.format(url=small.url, sha256=small.sha256))
        patch.setenv("HOME", str(home))
        patch.setenv("PYTHONPATH", str(home), prepend=os.pathsep)
        yield


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with photos/, data/0000.tar to data/0999.tar, photo.jpg and query.jpg."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "photos").mkdir()
    (folder / "data").mkdir()
    for i in range(10):
        (folder / "photos" / f"{i}.png").write_bytes(png(i))
    others = [png(TARS + i) for i in range(99)]
    for i in range(TARS):
        with tarfile.open(folder / "data" / f"{i:04}.tar", "w") as tar:
            for j in range(SAMPLES):
                for suffix, data in (
                    ("png", others[(i + j) % 99] if j else png(i)),
                    ("txt", b"a picture"),
                    ("json", b"{}"),
                ):
                    member = tarfile.TarInfo(f"{j:02}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    (folder / "photo.jpg").write_bytes(png(0))
    (folder / "query.jpg").write_bytes(png(WANTED))
    return folder


@pytest.fixture
def working_folder(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for path in pictures.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(processes, "all_devices", lambda: [torch.device("cpu")] * 2)  # for two GPUs
    return tmp_path


def search_as_written(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    """The commands, in an index of all tars whose paths begin with `folder`."""
    pytest.importorskip("tokenizers")
    assert len(Index("embeddings/")) == TARS * SAMPLES
    capsys.readouterr()
    words, image, queries = SEARCHING
    assert run(words) == 0
    assert len(capsys.readouterr().out.splitlines()) == 10
    assert run(image) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 100
    assert lines[0] == f"1.0000\t{folder / 'data'}/{WANTED:04}.tar/00.png"
    assert Path("found.html").read_text().count("<img ") == 101
    Path("queries.txt").write_text("a dog on a beach\na cat\n")
    assert run(queries) == 0
    assert len(capsys.readouterr().out.splitlines()) == 20


def test_these_are_the_recipes() -> None:
    """The tests below leave none out, and the pages have lost none. README's are among those of docs/bulk.md."""
    tars = ["clip-fast", "encode", "data/{0000..0999}.tar", "--model", "ViT-L/14", "--output", "embeddings/"]
    index = ["--index", "embeddings/"]
    found = ENCODING + SEARCHING
    assert found == [
        ["clip-fast", "encode", "photos/", "--model", "ViT-L/14", "--output", "embeddings.npy"],
        [*tars, "--devices", "all", "--embedding-dtype", "float16", "--normalize", "--resume"],
        ["ray", "start", "--head"],
        ["ray", "start", "--address=HEAD:6379"],
        [*tars, "--ray", "auto", "--normalize"],
        ["ray", "stop"],
        ["clip-fast", "search", "a dog on a beach", *index],
        ["clip-fast", "search", "--image", "query.jpg", *index, "-k", "100", "--html", "found.html"],
        ["clip-fast", "search", "--queries", "queries.txt", *index, "--json"],
    ]
    assert commands(README, "Millions of images") == [ENCODING[0], ENCODING[1], SEARCHING[0]]


def test_loading(working_folder: Path) -> None:
    (snippet,) = re.findall(r"^```python\n(.*?)^```$", section(README, "Or its own loader"), flags=re.M | re.S)
    names: dict[str, Any] = {}
    exec(snippet, names)
    assert isinstance(names["model"], Clip)
    assert names["embeddings"].shape == (1, 24)


def test_ten_images(working_folder: Path) -> None:
    assert run(ENCODING[0]) == 0
    assert np.load("embeddings.npy").shape == (10, 24)
    assert Path("paths.txt").read_text().splitlines() == [f"photos/{i}.png" for i in range(10)]


@pytest.mark.slow
def test_ten_million(working_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(ENCODING[1]) == 0
    assert json.loads(Path("embeddings/manifest.json").read_text())["done"] == {
        "images": TARS * SAMPLES,
        "failed": 0,
        "shards": 2,
    }
    for shard in (0, 1):
        rows = np.load(f"embeddings/img_emb/img_emb_{shard:04}.npy")
        assert rows.dtype == np.float16
        assert np.abs(np.linalg.norm(rows.astype(np.float32), axis=1) - 1).max() < 2**-10
    search_as_written(capsys, Path())
    assert run(ENCODING[1]) == 0  # what the same command continues is all there


@pytest.mark.slow
def test_a_cluster(working_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray.data")
    from ray.scripts import scripts

    start_head, start_other, encode, stop = ENCODING[2:]
    for command, name in ((scripts.start, start_head), (scripts.start, start_other), (scripts.stop, stop)):
        command.make_context(name[1], name[2:])
    with small_cluster(2) as nodes:
        monkeypatch.setenv("RAY_ADDRESS", nodes.address)  # where `auto` looks first: another cluster may be here
        assert run(encode) == 0
    search_as_written(capsys, working_folder)


@pytest.mark.slow
def test_a_source_distribution_has_what_the_readme_links_to_and_no_tests(tmp_path: Path) -> None:
    hidden = shutil.ignore_patterns(".*", "*.egg-info", "__pycache__", "build", "dist", "site")
    shutil.copytree(ROOT, tmp_path / "source", symlinks=True, ignore=hidden)
    build = "from setuptools import build_meta; build_meta.build_sdist('dist')"
    subprocess.run([sys.executable, "-c", build], cwd=tmp_path / "source", check=True, capture_output=True)
    (archive,) = (tmp_path / "source" / "dist").iterdir()
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    links = {link for link in re.findall(r"\]\(([^)#]+)", README.read_text("utf-8")) if "://" not in link}
    assert "docs/bulk.md" in links
    assert links <= names
    assert {name for name in names if name.startswith("tests/")} == set()
