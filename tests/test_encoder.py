"""`ImageEncoder`: what it takes and gives, that it is never stale, and that it survives what is done to modules."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor
from towers import random_tower, relative_error

import clip_fast
from clip_fast import encoder, vit_cpu
from clip_fast.config import IMAGE_MEAN, IMAGE_STD, ResNetConfig, VitConfig
from clip_fast.encoder import ImageEncoder

VIT = VitConfig(image_size=64, patch_size=16, width=128, layers=3, heads=2, embed_dim=32)
RESNET = ResNetConfig(layers=(1, 1, 1, 1), width=4, heads=2, image_size=64, embed_dim=32)
CPU = torch.device("cpu")


def make(config: VitConfig | ResNetConfig = VIT, dtype: torch.dtype = torch.float32, **options: object) -> ImageEncoder:
    return ImageEncoder(config, random_tower(config).state_dict(), CPU, dtype, **options)  # type: ignore[arg-type]


def exact(model: ImageEncoder, images: Tensor) -> Tensor:
    """What the model's weights, as they are now, make of the images, in float64."""
    with torch.no_grad():
        return copy.deepcopy(model.visual).double()(images.double())


@pytest.fixture
def images() -> Tensor:
    return torch.randn(3, 3, 64, 64)


@pytest.mark.parametrize("config", [VIT, RESNET], ids=["vit", "resnet"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_embeddings(config: VitConfig | ResNetConfig, dtype: torch.dtype, images: Tensor) -> None:
    model = make(config, dtype)
    embeddings = model.encode_image(images)
    assert (embeddings.dtype, embeddings.shape) == (dtype, (3, 32))
    bound = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.1}[dtype]
    assert relative_error(embeddings, exact(model, images)) < bound
    assert torch.equal(model(images), embeddings)
    assert model.encode_image(images[:0]).shape == (0, 32)


@pytest.mark.parametrize(("precision", "bound"), [("fp32", 1e-5), ("tf32", 1e-5), ("bf16", 0.05), ("fp16", 0.01)])
def test_precision_is_apart_from_the_embeddings_dtype(precision: str, bound: float, images: Tensor) -> None:
    model = make(precision=precision)
    embeddings = model.encode_image(images)
    assert embeddings.dtype == torch.float32
    error = relative_error(embeddings, exact(model, images))
    assert error < bound
    assert (error > 1e-4) == (precision in ("bf16", "fp16"))  # it was really computed in it


def test_raw_pixels_in_either_layout() -> None:
    mean, std = (0.4, 0.5, 0.3), (0.2, 0.3, 0.25)
    for config in (VIT, RESNET):
        model = make(config, mean=mean, std=std)
        raw = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
        mu, sigma = (torch.tensor(x, dtype=torch.float64).view(3, 1, 1) for x in (mean, std))
        wanted = exact(model, (raw.double() / 255 - mu) / sigma)
        assert relative_error(model.encode_image(raw), wanted) < 1e-5
        assert relative_error(model.encode_image(raw.permute(0, 2, 3, 1).contiguous()), wanted) < 1e-5


def test_patch_tokens_and_hidden_states(images: Tensor) -> None:
    model = make()
    tower = copy.deepcopy(model.visual).double()
    embeddings, tokens = model.encode_image(images, return_patch_tokens=True)
    with torch.no_grad():
        wanted = tower.encode_tokens(images.double())  # type: ignore[operator]
        assert relative_error(embeddings, wanted[0]) < 1e-5
        assert relative_error(tokens, wanted[1]) < 1e-5
        for layer, same in ((0, -4), (2, -2), (3, -1)):
            wanted = tower.hidden_state(images.double(), layer)  # type: ignore[operator]
            assert relative_error(model.hidden_state(images, layer), wanted) < 1e-5
            assert torch.equal(model.hidden_state(images, same), model.hidden_state(images, layer))
    assert [x.shape for x in model.encode_image(images[:0], return_patch_tokens=True)] == [(0, 32), (0, 16, 128)]


def test_what_makes_no_sense_is_named(images: Tensor) -> None:
    model = make()
    with pytest.raises(ValueError, match=r"images must be \[batch, 3, 64, 64\], got \[3, 3, 64, 63\]"):
        model.encode_image(images[..., :63])
    with pytest.raises(ValueError, match=r"got \[3, 64, 64\]"):
        model.encode_image(images[0])
    with pytest.raises(ValueError, match=r"got \[3, 64, 64, 3\]"):  # floats come as the packages take them
        model.encode_image(images.permute(0, 2, 3, 1))
    with pytest.raises(TypeError, match=r"floating-point dtype, or raw pixels in uint8, got torch\.int64"):
        model.encode_image(images.long())
    with pytest.raises(ValueError, match=r"layer must be between -4 and 3, got 4"):
        model.hidden_state(images, 4)
    resnet = make(RESNET)
    with pytest.raises(ValueError, match="a ResNet has no patch tokens"):
        resnet.encode_image(images, return_patch_tokens=True)
    with pytest.raises(ValueError, match="a ResNet has no hidden states"):
        resnet.hidden_state(images, 0)
    with pytest.raises(ValueError, match=r"precision must be one of .*, got 'half'"):
        make(precision="half")
    with pytest.raises(ValueError, match="a ResNet computes in the dtype of its weights"):
        make(RESNET, precision="bf16")


@pytest.mark.parametrize("image_size", [32, 96, 70])
def test_another_image_size_resamples_as_open_clip_does(image_size: int, tmp_path: Path) -> None:
    open_clip = pytest.importorskip("open_clip", reason="open_clip is not installed")
    vision = {"image_size": 64, "layers": 2, "width": 128, "patch_size": 16}
    text = {"context_length": 8, "vocab_size": 64, "width": 64, "heads": 1, "layers": 1}
    saved = open_clip.CLIP(32, vision, text)
    torch.save(saved.state_dict(), tmp_path / "model.pt")
    theirs = open_clip.CLIP(32, vision | {"image_size": image_size}, text).eval()
    state = saved.state_dict()
    open_clip.model.resize_pos_embed(state, theirs)
    theirs.load_state_dict(state)

    options = {"device": "cpu", "activation": "gelu", "image_size": image_size}
    model, preprocess = clip_fast.load(tmp_path / "model.pt", **options)
    images = torch.randn(2, 3, image_size, image_size)
    with torch.no_grad():
        assert relative_error(model.encode_image(images), theirs.encode_image(images)) < 1e-5
    assert preprocess(Image.new("RGB", (200, 150))).shape == (3, image_size, image_size)


def test_an_image_size_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="image_size must be at least patch_size, got 1"):
        clip_fast.load("tiny-digits", "cpu", image_size=1)
    state = {f"visual.{name}": tensor for name, tensor in random_tower(RESNET).state_dict().items()}
    torch.save(state, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="a ResNet takes images of its own size, 64, got 96"):
        clip_fast.load(tmp_path / "model.pt", "cpu", image_size=96)


# --- never stale -----------------------------------------------------------------------------------------------------


def _load(model: ImageEncoder) -> None:
    model.visual.load_state_dict(random_tower(VIT).state_dict())


def _assign(model: ImageEncoder) -> None:
    model.visual.load_state_dict(random_tower(VIT).state_dict(), assign=True)


def _edit(model: ImageEncoder) -> None:
    with torch.no_grad():
        model.visual.proj[3] += 1  # type: ignore[index, union-attr]


def _edit_in_inference_mode(model: ImageEncoder) -> None:
    with torch.inference_mode():
        model.visual.proj.mul_(-1)  # type: ignore[union-attr, operator]


def _replace(model: ImageEncoder) -> None:
    model.visual.proj = torch.nn.Parameter(torch.randn(128, 32))  # type: ignore[assignment]


def _set_data(model: ImageEncoder) -> None:
    model.visual.proj.data = torch.randn(128, 32)  # type: ignore[union-attr]


def _train(model: ImageEncoder) -> None:
    model.requires_grad_(True)
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.1)
    model.encode_image(torch.randn(2, 3, 64, 64)).square().sum().backward()
    optimiser.step()
    model.requires_grad_(False)


def _narrow_and_back(model: ImageEncoder) -> None:
    model.to(torch.bfloat16).to(torch.float32)


CHANGES = (_load, _assign, _edit, _edit_in_inference_mode, _replace, _set_data, _train, _narrow_and_back)


@pytest.mark.parametrize("change", CHANGES)
def test_changed_weights_are_seen(change: Callable[[ImageEncoder], None], images: Tensor) -> None:
    model = make()
    before = model.encode_image(images)
    change(model)
    after = model.encode_image(images)
    assert relative_error(after, exact(model, images)) < 1e-5
    assert relative_error(before, after) > 1e-4


def test_a_change_of_dtype_is_seen(images: Tensor) -> None:
    model = make()
    model.encode_image(images)
    assert model.bfloat16().encode_image(images).dtype == torch.bfloat16
    assert relative_error(model.double().encode_image(images), exact(model, images)) < 1e-12


def test_weights_are_prepared_once(images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []
    prepare = vit_cpu.prepare
    monkeypatch.setattr(vit_cpu, "prepare", lambda *args: made.append(args) or prepare(*args))
    model = make()
    threads = [threading.Thread(target=model.encode_image, args=(images,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with torch.inference_mode():
        model.encode_image(images)
    assert len(made) == 1


# --- what users do ---------------------------------------------------------------------------------------------------


def test_gradients_are_those_of_the_plain_tower(images: Tensor) -> None:
    model = make()
    images.requires_grad_(True)
    model.encode_image(images).sum().backward()
    tower = copy.deepcopy(model.visual)
    twin = images.detach().clone().requires_grad_(True)
    tower(twin).sum().backward()
    assert images.grad is not None
    assert torch.equal(images.grad, twin.grad)  # type: ignore[arg-type]
    with torch.no_grad():
        assert not model.encode_image(images).requires_grad


def test_copies_and_pickles(images: Tensor) -> None:
    model = make()
    wanted = model.encode_image(images)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin.encode_image(images), wanted)
        with torch.no_grad():
            twin.visual.proj.zero_()
        assert twin.encode_image(images).abs().max() == 0
    assert torch.equal(model.encode_image(images), wanted)


def test_under_inference_mode_and_autocast(images: Tensor) -> None:
    model = make()
    wanted = model.encode_image(images)
    with torch.inference_mode():
        assert torch.equal(model.encode_image(images), wanted)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model.encode_image(images), wanted)
    with torch.inference_mode():
        made_there = make()
        made_there.encode_image(images)
    _edit(made_there)
    assert relative_error(made_there.encode_image(images), exact(made_there, images)) < 1e-5


def test_threads_get_their_own_results() -> None:
    model = make()
    batches = [torch.randn(2, 3, 64, 64) for _ in range(6)]
    wanted = [model.encode_image(batch) for batch in batches]
    got: list[Tensor | None] = [None] * len(batches)

    def work(i: int) -> None:
        got[i] = model.encode_image(batches[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result, expected in zip(got, wanted, strict=True):
        assert result is not None
        assert relative_error(result, expected) < 1e-6


def test_a_large_batch_goes_in_parts(images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    wanted = model.encode_image(images)
    monkeypatch.setattr(encoder, "_CPU_BATCH", 2)
    assert relative_error(model.encode_image(images), wanted) < 1e-6


def test_out_of_memory_is_answered_by_halving() -> None:
    model = make()
    sizes: list[int] = []

    def run(part: Tensor) -> Tensor:
        sizes.append(len(part))
        if len(part) > 3:
            raise torch.OutOfMemoryError
        return part

    x = torch.arange(10.0)[:, None]
    assert torch.equal(model._in_parts(x, run)[0], x)
    assert sizes == [10, 5, 3, 3, 3, 1]

    def never(part: Tensor) -> Tensor:
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        model._in_parts(x, never)


def test_torch_compile(images: Tensor) -> None:
    model = make(dataclasses.replace(VIT, layers=2))
    wanted = model.encode_image(images)
    compiled = torch.compile(model, backend="eager")
    assert relative_error(compiled(images), wanted) < 1e-6


def test_the_fast_path_runs(images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """The results above are not the plain tower's own."""
    model = make(mean=IMAGE_MEAN, std=IMAGE_STD)
    monkeypatch.setattr(model.visual, "forward", None)
    model.encode_image(images)
