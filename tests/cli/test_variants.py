"""A folder of photographs through the command line, with a model for images that are not square."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from saved_clips import VISION, hugging_face_folder, open_clip_folder

from clip_fast.bulk.decoder import Decoder
from clip_fast.cli import main as cli
from clip_fast.cli import warm
from clip_fast.encoder import ImageEncoder
from clip_fast.inputs.items import ImageFile
from clip_fast.loading import load
from clip_fast.preprocess import Preprocess

VARIANT = {"image_size": [48, 80], "no_ln_pre": True, "pool_type": "avg", "ls_init_value": 1e-4}


@pytest.mark.slow
def test_photographs_are_encoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = open_clip_folder(tmp_path / "model", vision_cfg=VISION | VARIANT)
    transforms = pytest.importorskip("open_clip.transform")
    preprocess = transforms.image_transform((48, 80), False, mean=(0.5,) * 3, std=(0.25,) * 3)
    (tmp_path / "photos").mkdir()
    monkeypatch.chdir(tmp_path)
    for i, size in enumerate([(100, 40), (50, 120), (80, 48)]):
        Image.effect_noise(size, 80).convert("RGB").save(f"photos/{i}.png")
    assert cli.main(["encode", "photos", "--model", "model", "--output", "out.npy", "--device", "cpu"]) == 0
    with torch.no_grad():
        images = torch.stack([preprocess(Image.open(f"photos/{i}.png")) for i in range(3)])
        wanted = theirs.encode_image(images).numpy()
    got = np.load("out.npy").astype(np.float32)
    scale = np.linalg.norm(wanted) / np.linalg.norm(got)  # rows may be normalised
    assert np.linalg.norm(got * scale - wanted) < 0.2 * np.linalg.norm(wanted)
    cosines = (got * wanted).sum(1) / np.linalg.norm(got, axis=1) / np.linalg.norm(wanted, axis=1)
    assert (cosines > 0.9999).all()


@pytest.mark.parametrize("with_processor", ["model", "other"])
def test_an_image_that_is_looked_for_is_prepared_as_the_index_was(
    with_processor: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same weights, without the processor that says how: what is transparent would lie on black."""
    monkeypatch.chdir(tmp_path)
    hugging_face_folder(tmp_path / "model")
    shutil.copytree("model", "other")
    for folder in ("model", "other"):
        processor = Path(folder, "preprocessor_config.json")
        processor.unlink(missing_ok=True)
        if folder == with_processor:
            processor.write_text('{"size": 64}')
    noise = Image.effect_noise((90, 71), 90).convert("RGBA")
    noise.putalpha(Image.effect_noise((90, 71), 90))
    noise.save("logo.png")
    assert cli.main(["encode", "logo.png", "--model", "model", "--output", "index/", "--device", "cpu"]) == 0
    capsys.readouterr()
    for folder in ("model", "other"):
        assert cli.main(["search", "--image", "logo.png", "--index", "index/", "--model", folder]) == 0
        assert capsys.readouterr().out == "1.0000\tlogo.png\n"


def test_kernels_are_compiled_for_its_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_clip_folder(tmp_path, vision_cfg=VISION | VARIANT)
    seen: list[torch.Size] = []
    monkeypatch.setattr(warm, "triton_can_run", lambda device: True)
    monkeypatch.setattr(ImageEncoder, "encode_image", lambda self, images: seen.append(images.shape))
    assert cli.main(["warm", "--model", str(tmp_path), "--device", "cpu"]) == 0
    assert set(seen) == {(1, 3, 48, 80)}


def test_a_jpeg_is_decoded_at_a_reduced_scale(tmp_path: Path) -> None:
    """At twice the size of the result at least, along each side."""
    Image.effect_noise((800, 400), 80).convert("RGB").save(tmp_path / "a.jpg")
    preprocess = Preprocess((48, 80))
    pixels = torch.empty(3, 48, 80, dtype=torch.uint8)
    size = Decoder(preprocess, fast=True)(ImageFile("a", str(tmp_path / "a.jpg")), pixels)
    with Image.open(tmp_path / "a.jpg") as image:
        image.draft(None, (160, 96))
        assert image.size == (200, 100)
        assert torch.equal(pixels, preprocess.uint8(image))
    assert size == (800, 400)


def test_a_long_thin_image_is_refused() -> None:
    with pytest.raises(ValueError, match="too long and thin: 2x100000 pixels, resized to 80 by 4000000"):
        Decoder(Preprocess((48, 80))).check((2, 100_000))
    Decoder(Preprocess((48, 80))).check((100_000, 2))  # 2,400,000 by 48
    Decoder(Preprocess((48, 80), squash=True)).check((100_000, 2))


def test_the_size_of_a_model_is_no_square(tmp_path: Path) -> None:
    open_clip_folder(tmp_path, vision_cfg=VISION | VARIANT)
    model, preprocess = load(tmp_path, "cpu")
    assert model.config.image_size == preprocess.image_size == (48, 80)
    with torch.no_grad(), pytest.raises(ValueError, match=r"images must be \[batch, 3, 48, 80\], got \[1, 3, 80, 48\]"):
        model.encode_image(torch.zeros(1, 3, 80, 48))
    with pytest.raises(TypeError, match=r"must be a tensor \[batch, 3, 48, 80\], got list"):
        model.encode_image([])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"image_size must be positive, got \(48, 0\)"):
        Preprocess((48, 0))
