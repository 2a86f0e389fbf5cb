"""The imports of the package run one way: from the command line down to the kernels."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

import pytest

import clip_fast

ROOT = Path(clip_fast.__file__).parent

# From the lowest layer to the highest. A module may import from its own package and from the layers below.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("kernels",),
    ("errors", "extras", "version", "pytorch"),
    ("towers",),
    ("inputs", "preprocess", "simple_tokenizer"),
    ("checkpoint", "engine"),
    ("encoder",),
    ("model", "dropin"),
    ("loading", "verification"),
    ("clip",),
    ("bulk",),
    ("ray", "search"),
    ("cli",),
    ("__init__", "__main__"),
)
LAYER_OF = {name: layer for layer, names in enumerate(LAYERS) for name in names}

# Layers that do not know each other, though one is below.
APART = {"inputs": {"towers"}, "kernels": {"errors"}}


def place_of(path: Path) -> str:
    """The package, or the module directly in `clip_fast`, that a file belongs to."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports_of(path: Path) -> set[str]:
    """The packages and modules of `clip_fast` that a file imports, at its top or inside of functions."""
    package = ("clip_fast", *path.relative_to(ROOT).parent.parts)
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*start, *filter(None, [node.module])))
            found |= {module} | {f"{module}.{name.name}" for name in node.names}
    ours = [name.split(".") for name in found if name.split(".")[0] == "clip_fast"]
    known = {parts[1] for parts in ours if len(parts) > 1 and parts[1] in LAYER_OF}
    names_of_init = {
        parts[1] for parts in ours if len(parts) > 1 and parts[1] not in LAYER_OF and hasattr(clip_fast, parts[1])
    }
    if names_of_init or (["clip_fast"] in ours and not known):
        known.add("__init__")
    return known - {place_of(path)}


FILES = sorted(path for path in ROOT.rglob("*.py")) + sorted((ROOT / "kernels").glob("*.py"))


@pytest.fixture(scope="module")
def arrows() -> dict[str, set[str]]:
    """The places that each place imports."""
    found: dict[str, set[str]] = defaultdict(set)
    for path in FILES:
        found[place_of(path)] |= imports_of(path)
    return dict(found)


def test_every_place_has_a_layer(arrows: dict[str, set[str]]) -> None:
    assert arrows.keys() - {"assets"} == LAYER_OF.keys()


def test_imports_run_one_way(arrows: dict[str, set[str]]) -> None:
    for layer, names in reversed(list(enumerate(LAYERS))):
        for name in names:
            print(f"{layer:>2}  {name:<13} -> {', '.join(sorted(arrows[name])) or '-'}")
    wrong = [
        f"{name} imports {other}"
        for name, others in arrows.items()
        for other in others
        if LAYER_OF[other] >= LAYER_OF[name] or other in APART.get(name, ())
    ]
    assert not wrong


def test_few_modules_stand_outside_of_a_package() -> None:
    assert len(list(ROOT.glob("*.py"))) <= 14


def test_a_wrong_import_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    file = tmp_path / "engine" / "graphs.py"
    file.parent.mkdir()
    for text, wanted in {
        "from ..dropin import forward": {"dropin"},
        "from .. import load": {"__init__"},
        "def late():\n    from ..bulk.rows import settle": {"bulk"},
        "import clip_fast.search.index": {"search"},
        "from . import engine\nimport torch": set(),
    }.items():
        file.write_text(text)
        assert imports_of(file) == wanted
