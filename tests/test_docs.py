"""The pages: every public name has a place, no link is dead, every command is run by a test, and the site is built."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

import clip_fast
import clip_fast.ray
import clip_fast.search

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

# The commands in the pages, and the file that runs each; tests/test_readme.py has those of its own.
RUN_BY = {
    "pip install . && clip-fast demo": "tests/cli/test_demo.py",
    'pip install -e ".[test]" && pip install --no-deps -r tests/requirements-peers.txt': ".ci/run",
    'pip install -e ".[test,lint,docs]"': ".ci/run",
    "pip install --no-deps -r tests/requirements-peers.txt": ".ci/run",
    "ruff check . && ruff format --check . && pyright": ".ci/run",
    'python -m pytest -n auto --dist loadfile -m "slow or not slow"': ".ci/run",
    "python -m pytest -n auto --dist loadfile": ".ci/run",
    "clip-fast verify embeddings/": "tests/cli/test_verify.py",
    "mkdocs build --strict": "tests/test_docs.py",
    "python -m pytest tests/kernels -q": ".ci/run",
    "python -m tests.emulator": "tests/emulator/part.py",
    "python -m bench.machine_code": "tests/bench/test_machine_code.py",
    "python -m bench.machine_code --json new.json": ".ci/run",
    "python -m bench.predict": ".ci/run",
    "python -m bench.predict --json new.json": ".ci/run",
    "python -m bench.regressions new.json": "tests/bench/test_regressions.py",
    "bench/gpu.sh --dry-run": "tests/bench/test_gpu.py",
    'pip install -e ".[bench]" && pip install --no-deps -r tests/requirements-peers.txt': ".ci/run",
    "python -m bench.end_to_end": "tests/bench/test_end_to_end.py",
    "python -m bench.pipeline": "tests/bench/test_pipeline.py",
    "python -m bench.pipeline --json pipeline.json": "tests/bench/test_pipeline.py",
    "python -m bench.plot pipeline.json": "tests/bench/test_plot.py",
}
RECIPES = {"README.md": 3, "bulk.md": 9}  # commands that tests/test_readme.py runs or parses


def fences(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text("utf-8"), flags=re.M | re.S)


def commands(page: Path) -> list[str]:
    text = "".join(fences(page, "bash")).replace("\\\n", "")
    return [line.partition("  #")[0].strip() for line in text.splitlines()]


def anchors(page: Path) -> set[str]:
    """The places that links to a page may name, as the repository's page and MkDocs make them of headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text("utf-8"), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def test_every_public_name_has_its_place() -> None:
    listed = re.findall(r"^::: (\S+)$", (ROOT / "docs" / "api.md").read_text("utf-8"), flags=re.M)
    wanted = [f"clip_fast.{name}" for name in clip_fast.__all__]
    wanted += [f"clip_fast.ray.{name}" for name in clip_fast.ray.__all__]
    wanted += ["clip_fast.search.Index", "clip_fast.kernels.ops"]
    assert sorted(listed) == sorted(wanted)


def test_every_command_is_run() -> None:
    """A command that is new in a page needs a test, or a step of continuous integration, and its entry above."""
    for page in PAGES:
        others = [command for command in commands(page) if command not in RUN_BY]
        assert len(others) == RECIPES.get(page.name, 0), f"{page.name}: {others}"
    assert set(RUN_BY) <= {command for page in PAGES for command in commands(page)}
    for file in RUN_BY.values():
        assert (ROOT / file).exists()


def test_every_python_block_is_run() -> None:
    """By tests/dropin/test_accelerate.py and tests/test_readme.py, that of bulk.md by tests/search/test_index.py."""
    counts = {page.name: len(fences(page, "python")) for page in PAGES if fences(page, "python")}
    assert counts == {"README.md": 6, "bulk.md": 1}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda page: page.name)
def test_no_link_is_dead(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_readme_is_one_page() -> None:
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 150


def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    for name in ("mkdocs", "mkdocstrings_handlers.python"):
        if not _is_installed(name):
            pytest.skip(f"{name} is not installed: pip install -e '.[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stderr
    assert "clip_fast.accelerate" in (tmp_path / "api" / "index.html").read_text("utf-8")


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # its parent is missing
        return False
