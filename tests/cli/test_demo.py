"""The bundled model, the demonstration around it, and the script that trained it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import clip_fast
from clip_fast.checkpoint.published import BUNDLED_MODELS
from clip_fast.cli import demo
from clip_fast.towers import reference

CONFIG = BUNDLED_MODELS["tiny-digits"]
SCRIPT = Path(__file__).parents[2] / "examples" / "train_tiny_digits.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_tiny_digits", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> tuple[clip_fast.ImageEncoder, clip_fast.Preprocess]:
    """The bundled model with its embeddings' elements one place off, as a wrong kernel might leave them."""
    model, preprocess = clip_fast.load("tiny-digits", "cpu")
    encode_image = model.encode_image
    monkeypatch.setattr(model, "encode_image", lambda images: encode_image(images).roll(1, dims=1))
    return model, preprocess


# --- Assets ----------------------------------------------------------------------------------------------------------


def test_assets_are_small() -> None:
    assert sum(file.stat().st_size for file in demo.ASSETS.iterdir()) < 5e6


def test_model_file_holds_a_finite_image_tower_and_unit_text_embeddings() -> None:
    tensors = load_file(demo.ASSETS / "model.safetensors")
    texts = tensors.pop("text_embeddings")
    assert texts.shape == (10, CONFIG.embed_dim)
    assert texts.dtype == torch.float32
    torch.testing.assert_close(texts.norm(dim=1), torch.ones(10))
    expected = {f"visual.{name}": value.shape for name, value in reference.build(CONFIG).state_dict().items()}
    assert {name: value.shape for name, value in tensors.items()} == expected
    assert [name for name, value in tensors.items() if not value.isfinite().all()] == []
    with safe_open(demo.ASSETS / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"activation": CONFIG.activation}


def test_bundled_digits_are_the_held_out_part_of_the_split(script: ModuleType) -> None:
    train_images, train_labels, images, labels = script.load_split()
    bundled_images, bundled_labels = demo.held_out_digits()
    assert np.array_equal(bundled_images, images)
    assert np.array_equal(bundled_labels, labels)
    assert len(train_labels) + len(labels) == 1797
    seen = {image.tobytes() for image in train_images}
    assert not any(image.tobytes() in seen for image in bundled_images)


# --- Demonstration ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_accuracy(dtype: torch.dtype) -> None:
    assert demo.accuracy(*clip_fast.load("tiny-digits", "cpu", dtype)) >= 0.95


def test_accuracy_sees_a_broken_model(broken: tuple[clip_fast.ImageEncoder, clip_fast.Preprocess]) -> None:
    assert demo.accuracy(*broken) < 0.5


def test_digit_image_spans_black_to_white() -> None:
    pixels = np.zeros((8, 8), np.uint8)
    pixels[2, 5] = 16
    image = demo.digit_image(pixels)
    assert (image.mode, image.size) == ("RGB", (8, 8))
    assert image.getpixel((5, 2)) == (255, 255, 255)
    assert image.getpixel((2, 5)) == (0, 0, 0)


def test_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.run("cpu", torch.float32) == 0
    printed, errors = capsys.readouterr()
    assert errors == ""
    assert max(map(len, printed.splitlines())) <= 80
    assert printed.isascii()
    share = demo.accuracy(*clip_fast.load("tiny-digits", "cpu", torch.float32))
    for promised in (
        "(cpu, float32)",
        "a photo of the digit seven",
        "runner-up",
        f"accuracy  {share:.1%}",
        "images/s",
        "ratio",
        "clip-fast encode PHOTOS --model ViT-B/32 --output embeddings.npy",
    ):
        assert promised in printed


def test_run_fails_for_a_broken_model(
    broken: tuple[clip_fast.ImageEncoder, clip_fast.Preprocess],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(demo, "load_model", lambda *_: broken)
    assert demo.run() == 1
    printed, errors = capsys.readouterr()
    assert "below the 95% that it must reach" in errors
    assert "images/s" not in printed  # what is wrong is not timed


# --- Training --------------------------------------------------------------------------------------------------------


def test_captions_name_their_digit(script: ModuleType) -> None:
    assert len(set(script.CAPTIONS)) == len(script.CAPTIONS) == 10 * len(script.TEMPLATES)
    for number, caption in enumerate(script.CAPTIONS):
        assert demo.WORDS[number // len(script.TEMPLATES)] in caption.split()


def test_tokenise(script: ModuleType) -> None:
    tokens = script.tokenise(["the digit two", "two"])
    start, end = tokens[1, 0], tokens[1, 2]
    assert tokens.shape == (2, 5)
    assert (tokens[:, 0] == start).all()
    assert tokens[1, 1] == tokens[0, 3]  # "two"
    assert tokens[0, 4] == end
    assert (tokens[1, 3:] == 0).all()
    assert (tokens[0] > 0).all()


def test_text_tower_never_looks_past_the_end(script: ModuleType) -> None:
    torch.manual_seed(0)
    tokens = script.tokenise(script.CAPTIONS)
    tower = script.TextTower(int(tokens.max()) + 1, tokens.shape[1], 64).eval()
    before = tower(tokens)
    with torch.no_grad():
        tower.word_embedding.weight[0] += 1.0  # the padding
    torch.testing.assert_close(tower(tokens), before)


def test_loss_is_least_where_digits_agree(script: ModuleType) -> None:
    model = script.TinyClip(CONFIG, script.tokenise(script.CAPTIONS))
    labels = torch.tensor([3, 1, 3, 7])
    separate = torch.eye(10)[labels]
    floor = (2 * np.log(2)) / 4  # the two threes share their targets: their rows keep one bit of entropy
    with torch.no_grad():
        model.log_scale.fill_(np.log(50))
        assert model.loss(separate, separate, labels).item() == pytest.approx(floor, abs=1e-4)
        assert model.loss(separate, separate.roll(1, dims=0), labels).item() > 10


def test_training_improves_the_loss(script: ModuleType) -> None:
    pixels, labels = demo.held_out_digits()
    pixels, labels, batch = pixels[:192], labels[:192], 32
    images = script.preprocess_digits(pixels, CONFIG)
    black = script.preprocess_digits(np.zeros((1, 8, 8), np.uint8), CONFIG)[0]
    losses: list[float] = []
    model = script.train(
        images, labels, black, epochs=8, seed=0, batch=batch, report=lambda _, loss: losses.append(loss)
    )
    assert len(losses) == 8
    assert losses[-1] < np.log(batch) - 0.2 < losses[0]  # log(batch): what guessing costs
    accuracy = script.zero_shot_accuracy(model.visual, script.text_embeddings(model), images, labels)
    assert 0.2 < accuracy <= 1


def test_augmentation_stays_near_the_image_and_keeps_black_borders(script: ModuleType) -> None:
    pixels, _ = demo.held_out_digits()
    images = script.preprocess_digits(pixels[:64], CONFIG)
    black = script.preprocess_digits(np.zeros((1, 8, 8), np.uint8), CONFIG)[0]
    augmented = script.augment(images, black, torch.Generator().manual_seed(0))
    assert augmented.shape == images.shape
    assert torch.nn.functional.cosine_similarity(augmented.flatten(1), images.flatten(1)).mean() > 0.7
    corners = augmented[:, :, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert (corners - black[:, :1, 0]).abs().median() < 0.2


def test_written_files_are_the_shipped_format(script: ModuleType, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = script.TinyClip(CONFIG, script.tokenise(script.CAPTIONS)).eval()
    script.write_model(model, tmp_path / "model.safetensors")
    pixels, labels = demo.held_out_digits()
    script.write_digits(pixels, labels.numpy().astype(np.uint8), tmp_path / "digits.npz")
    assert {file.name for file in tmp_path.iterdir()} == {"model.safetensors", "digits.npz"}
    with np.load(tmp_path / "digits.npz") as written, np.load(demo.ASSETS / "digits.npz") as shipped:
        assert written.files == shipped.files
        assert all(written[name].dtype == shipped[name].dtype for name in shipped)
        assert all(np.array_equal(written[name], shipped[name]) for name in shipped)
    loaded, _ = clip_fast.load(tmp_path / "model.safetensors", "cpu")
    assert loaded.config == CONFIG
    images = torch.randn(2, 3, CONFIG.image_size, CONFIG.image_size)
    with torch.no_grad():
        torch.testing.assert_close(loaded.encode_image(images), model.visual(images), rtol=0.01, atol=0.01)
