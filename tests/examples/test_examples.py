"""The examples on random weights: right shapes, and the results of the models that were not accelerated."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from peers import hugging_face, open_clip_vit
from PIL import Image
from random_towers import random_tower

import clip_fast
from clip_fast import ImageEncoder, Preprocess
from clip_fast.dropin.accelerate import is_accelerated
from clip_fast.towers.config import VitConfig

EXAMPLES = Path(__file__).parents[2] / "examples"
PHOTOGRAPHS = sorted((Path(__file__).parents[1] / "data").glob("*.jpg"))


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_example_is_tested() -> None:
    tested = {"zero_shot", "linear_probe", "similarity_search", "train_tiny_digits"}  # the last by tests/test_demo.py
    assert {path.stem for path in EXAMPLES.glob("*.py")} == tested


def test_zero_shot() -> None:
    module, model = example("zero_shot"), open_clip_vit()
    fast = clip_fast.accelerate(copy.deepcopy(model))
    pictures = [Image.open(path) for path in PHOTOGRAPHS]

    def tokenize(texts: list[str]) -> torch.Tensor:
        return torch.tensor([[99, *(ord(letter) % 98 for letter in text.ljust(76))] for text in texts])

    got, wanted = (module.classify(each, Preprocess(64), tokenize, pictures, ["cat", "bird"]) for each in (fast, model))
    assert got.shape == (len(PHOTOGRAPHS), 2)
    torch.testing.assert_close(got.sum(1), torch.ones(len(PHOTOGRAPHS)))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)
    assert is_accelerated(fast)
    assert not is_accelerated(model)


def test_linear_probe(tmp_path: Path) -> None:
    """Two classes that any embedding tells apart; and features that are the plain tower's."""
    module = example("linear_probe")
    random = np.random.default_rng()
    for split, count in (("train", 8), ("test", 4)):
        for name, level in (("dark", 30), ("light", 220)):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(level - 30, level + 30, (40, 50, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / name / f"{i}.png")
    config = VitConfig(image_size=32, patch_size=16, width=64, layers=2, heads=1, embed_dim=32)
    tower = random_tower(config)
    state = {name: tensor.detach() for name, tensor in tower.state_dict().items()}
    encoder = ImageEncoder(config, state, torch.device("cpu"), torch.float32)
    assert module.probe(encoder, Preprocess(32), tmp_path / "train", tmp_path / "test") == 1
    data = module.Folders(tmp_path / "test", Preprocess(32))
    rows, labels = module.features(encoder, data)
    assert labels == ["dark"] * 4 + ["light"] * 4
    with torch.no_grad():
        wanted = tower(torch.stack([data[i][0] for i in range(8)]))
    torch.testing.assert_close(torch.from_numpy(rows), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("k", [2, 10])
def test_similarity_search(k: int) -> None:
    module: Any = example("similarity_search")
    model = hugging_face()
    fast = clip_fast.accelerate(copy.deepcopy(model))
    paths = [str(path) for path in PHOTOGRAPHS]
    got, wanted = (module.most_similar(each, Preprocess(64), paths[1], paths, k) for each in (fast, model))
    assert [path for path, _ in got] == [path for path, _ in wanted]
    assert len(got) == min(k, len(paths))
    assert got[0][0] == paths[1]
    np.testing.assert_allclose([score for _, score in got], [score for _, score in wanted], rtol=1e-4)
