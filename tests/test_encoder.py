"""`ImageEncoder`: what it takes and gives, that it is never stale, and that it survives what is done to modules."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import pickle
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from PIL import Image
from random_towers import random_tower, relative_error
from torch import Tensor

import clip_fast
from clip_fast.encoder import ImageEncoder
from clip_fast.engine.compiled import _OWNERS
from clip_fast.towers import cpu
from clip_fast.towers.config import ENCODE, HIDDEN_STATES, IMAGE_MEAN, IMAGE_STD, ResNetConfig, VitConfig
from clip_fast.towers.precision import BY_NAME
from clip_fast.towers.vit_cpu import CpuVit

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
@pytest.mark.parametrize("config", [VIT, RESNET], ids=["vit", "resnet"])
def test_precision_is_apart_from_the_embeddings_dtype(
    config: VitConfig | ResNetConfig, precision: str, bound: float, images: Tensor
) -> None:
    model = make(config, precision=precision)
    embeddings = model.encode_image(images)
    assert embeddings.dtype == torch.float32
    error = relative_error(embeddings, exact(model, images))
    assert error < bound
    served = cpu.multiplies_fast(BY_NAME[precision].weights)
    assert (error > 1e-4) == (precision in ("bf16", "fp16") and served)  # it was really computed in it


@pytest.mark.parametrize("config", [VIT, RESNET], ids=["vit", "resnet"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("stays", [False, True])
def test_a_half_precision_that_the_cpu_has_not(
    config: VitConfig | ResNetConfig, dtype: torch.dtype, stays: bool, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Computed in float32, of the rounded weights, and rounded once."""
    monkeypatch.setattr(cpu, "multiplies_fast", lambda asked: asked.itemsize >= 4)
    monkeypatch.setattr(cpu, "can_fuse", lambda asked: asked == torch.float32)
    if not stays:
        monkeypatch.setattr(cpu, "can_pack_for_mkl", lambda: False)
    elif not cpu.can_pack_for_mkl():
        pytest.skip("half weights stay as they are only where MKL is fast")
    model = make(config, dtype)
    wide = ImageEncoder(config, model.visual.state_dict(), CPU, torch.float32)
    embeddings, wanted = model.encode_image(images), wide.encode_image(images)
    assert embeddings.dtype == dtype
    assert stays or config is VIT or torch.equal(embeddings, wanted.to(dtype))
    # A ViT's half weights may take another library than float32 weights. Its sums have another order: in 300 draws at
    # most 3 of the 96 numbers were rounded to a neighbour.
    assert (embeddings != wanted.to(dtype)).sum() < 10
    assert relative_error(embeddings, wanted.double()) < torch.finfo(dtype).eps / 2


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


@pytest.mark.parametrize("kind", ["PIL.Image.Image", "numpy.ndarray", "list", "str", "NoneType"])
def test_what_is_no_tensor_is_named_and_how_to_make_one(kind: str) -> None:
    image = Image.new("RGB", (64, 64))
    values = {"PIL.Image.Image": image, "numpy.ndarray": np.asarray(image), "list": [image], "str": "photo.jpg"}
    for config in (VIT, RESNET):
        model = make(config)
        with pytest.raises(TypeError, match=rf"a tensor \[batch, 3, 64, 64\], got {kind}: preprocess\(picture\)"):
            model.encode_image(values.get(kind))


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
    for layer in ("1", 1.0, None):
        with pytest.raises(TypeError, match=f"layer must be a whole number, got {layer!r}"):
            model.hidden_state(images, layer)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:the plain tower runs")
def test_layers_are_counted_as_they_are(images: Tensor) -> None:
    model = make()
    last = model.hidden_state(images, 2)
    del model.visual.transformer.resblocks[-1]  # type: ignore[union-attr, operator]
    assert relative_error(model.hidden_state(images, -1), last) < 1e-5
    assert torch.equal(model.hidden_state(images, 2), model.hidden_state(images, -1))
    with pytest.raises(ValueError, match="layer must be between -3 and 2, got 3"):
        model.hidden_state(images, 3)


@pytest.mark.filterwarnings("ignore:the plain tower runs")
def test_another_module_in_place_of_the_tower_is_named(images: Tensor) -> None:
    model = make()
    model.visual = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 64 * 64, 32))
    assert model.encode_image(images).shape == (3, 32)
    with pytest.raises(ValueError, match="visual is a Sequential, which gives embeddings alone"):
        model.hidden_state(images, 1)
    model.visual = torch.nn.Flatten()
    with pytest.raises(ValueError, match="visual is a Flatten without a weight: it is no image tower"):
        model.encode_image(images)
    with pytest.raises(ValueError, match=r"precision must be one of .*, got 'half'"):
        make(precision="half")
    with pytest.raises(ValueError, match=r"mean must be three finite numbers, got \(0\.5,\)"):
        make(mean=(0.5,))
    with pytest.raises(ValueError, match="std must be three positive numbers"):
        make(std=(0.5, 0.5, 0.0))
    with pytest.raises(TypeError, match=r"dtype must be a torch\.dtype, got 'float16'"):
        clip_fast.load("tiny-digits", "cpu", dtype="float16")  # type: ignore[call-overload]
    with pytest.raises(ValueError, match=r"must be float16, bfloat16, float32 or float64, got torch\.float8_e4m3fn"):
        clip_fast.load("tiny-digits", "cpu", dtype=torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=r"two dtypes are asked for, torch\.bfloat16 and torch\.float16"):
        clip_fast.load("tiny-digits", "cpu", torch.bfloat16, dtype=torch.float16)


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
    for size in (48.0, (48, 32, 3), "48"):
        with pytest.raises(ValueError, match="image_size must be a whole number of pixels, or height and width, got"):
            clip_fast.load("tiny-digits", "cpu", image_size=size)  # type: ignore[call-overload]
    assert clip_fast.load("tiny-digits", "cpu", image_size=np.int64(48))[0].config.image_size == 48  # type: ignore[call-overload]
    state = {f"visual.{name}": tensor for name, tensor in random_tower(RESNET).state_dict().items()}
    torch.save(state, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="a ResNet takes images of its own size, 64, got 96"):
        clip_fast.load(tmp_path / "model.pt", "cpu", image_size=96)


# --- never stale -----------------------------------------------------------------------------------------------------


def _weight(model: ImageEncoder) -> Any:
    """One of the last, which every embedding depends on."""
    visual: Any = model.visual
    return visual.proj if isinstance(model.config, VitConfig) else visual.attnpool.c_proj.weight


def _load(model: ImageEncoder) -> None:
    model.visual.load_state_dict(random_tower(model.config).state_dict())


def _assign(model: ImageEncoder) -> None:
    model.visual.load_state_dict(random_tower(model.config).state_dict(), assign=True)


def _edit(model: ImageEncoder) -> None:
    with torch.no_grad():
        _weight(model)[3] += 1


def _edit_in_inference_mode(model: ImageEncoder) -> None:
    with torch.inference_mode():
        _weight(model).mul_(-1)


def _set_data(model: ImageEncoder) -> None:
    _weight(model).data = torch.randn_like(_weight(model))


def _set_data_to_the_same_address(model: ImageEncoder) -> None:
    """Memory that is given back comes again, and tells nothing."""
    weight = _weight(model)
    shape, address = weight.shape, weight.data_ptr()
    kept = []
    for _ in range(1000):
        weight.data = torch.zeros(1)
        weight.data = torch.randn(shape)
        if weight.data_ptr() == address:
            return
        kept.append(torch.empty(shape[0]))


def _transpose_data(model: ImageEncoder) -> None:
    """A view at the same address, of the same shape."""
    visual: Any = model.visual
    pool = getattr(visual, "attnpool", None)
    weight = visual.transformer.resblocks[0].attn.out_proj.weight if pool is None else pool.q_proj.weight
    weight.data = weight.data.T


def _train(model: ImageEncoder, **options: bool) -> None:
    model.requires_grad_(True)
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.1, **options)  # type: ignore[arg-type]
    model.encode_image(torch.randn(2, 3, 64, 64)).square().sum().backward()
    optimiser.step()
    model.requires_grad_(False)


def _train_fused(model: ImageEncoder) -> None:
    _train(model, fused=True)


def _train_foreach(model: ImageEncoder) -> None:
    _train(model, foreach=True)


def _narrow_and_back(model: ImageEncoder) -> None:
    model.to(torch.bfloat16).to(torch.float32)


def _replace_the_tower(model: ImageEncoder) -> None:
    model.visual = random_tower(model.config)


CHANGES = (
    _load, _assign, _edit, _edit_in_inference_mode, _set_data, _set_data_to_the_same_address, _transpose_data, _train,
    _train_fused, _train_foreach, _narrow_and_back, _replace_the_tower,
)  # fmt: skip


@pytest.mark.parametrize("config", [VIT, RESNET], ids=["vit", "resnet"])
@pytest.mark.parametrize("change", CHANGES)
def test_changed_weights_are_seen(
    change: Callable[[ImageEncoder], None], config: VitConfig | ResNetConfig, images: Tensor
) -> None:
    model = make(config)
    before = model.encode_image(images)
    change(model)
    with torch.no_grad():
        after = model.encode_image(images)
    assert relative_error(after, exact(model, images)) < 1e-5
    assert relative_error(before, after) > 1e-4


def _replace_ln_post(visual: Any) -> None:
    visual.ln_post = torch.nn.LayerNorm(128, eps=1e-5)


def _replace_a_block(visual: Any) -> None:
    visual.transformer.resblocks[1] = random_tower(VIT).transformer.resblocks[0]  # type: ignore[index, union-attr]


def _replace_a_parameter(visual: Any) -> None:
    visual.proj = torch.nn.Parameter(torch.randn(128, 32))


@pytest.mark.parametrize("change", [_replace_ln_post, _replace_a_block, _replace_a_parameter])
def test_replaced_parts_are_seen(change: Callable[[Any], None], images: Tensor) -> None:
    model = make()
    before = model.encode_image(images)
    change(model.visual)
    with torch.no_grad():
        after = model.encode_image(images)
    assert relative_error(after, exact(model, images)) < 1e-5
    assert relative_error(before, after) > 1e-4


class Doubling(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def _another_module(model: Any) -> None:
    model.visual.ln_post = Doubling()


def _a_hook(model: Any) -> None:
    model.visual.ln_post.register_forward_hook(lambda module, args, output: output * 2)


def _a_hook_on_the_tower(model: Any) -> None:
    model.visual.register_forward_hook(lambda module, args, output: output * 2)


def _a_parametrisation(model: Any) -> None:
    torch.nn.utils.parametrize.register_parametrization(model.visual.ln_post, "weight", Doubling())


def _a_mask(model: Any) -> None:
    tokens = model.config.tokens
    model.visual.transformer.resblocks[0].attn_mask = torch.full((tokens, tokens), -torch.inf).triu(1)


def _another_eps(model: Any) -> None:
    model.visual.ln_post.eps = 1.0


def _a_forward_of_its_own(model: Any) -> None:
    model.visual.transformer.resblocks[1].forward = lambda x: 2 * x


def _a_method_of_its_own(model: Any) -> None:
    """As code does that looks at a ViT's last block without its queries and keys."""
    model.visual.transformer.resblocks[1].attention = lambda x: 2 * x


def _a_forward_of_another_block(model: Any) -> None:
    blocks = model.visual.transformer.resblocks
    blocks[1].forward = blocks[0].forward


def _a_forward_of_the_tower(model: Any) -> None:
    forward = model.visual.forward
    model.visual.forward = lambda x: 2 * forward(x)


def _set(place: str, **settings: Any) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        for name, value in settings.items():
            setattr(model.visual.get_submodule(place), name, value)

    return change


def _another_order(model: Any) -> None:
    blocks: Any = model.visual.transformer.resblocks
    modules: dict[str, Any] = blocks._modules
    for name in reversed(list(modules)):
        modules[name] = modules.pop(name)


class HalfLinear(Tensor):
    """A weight that counts for half, as a quantised one counts for other numbers than it holds."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.nn.functional.linear:
            return function(args[0], 0.5 * args[1].as_subclass(Tensor), *args[2:], **(kwargs or {}))
        return super().__torch_function__(function, types, args, kwargs or {})


def _a_weight_of_another_class(model: Any) -> None:
    layer = model.visual.transformer.resblocks[0].mlp.c_fc
    layer.weight = torch.nn.Parameter(layer.weight.detach().as_subclass(HalfLinear), requires_grad=False)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_another_module, "visual.ln_post is a Doubling"),
        (_a_mask, "visual.transformer.resblocks.0 has another attn_mask"),
        (_another_eps, "visual.ln_post has another eps"),
        (_a_forward_of_its_own, "visual.transformer.resblocks.1 has its own forward"),
        (_a_forward_of_another_block, "visual.transformer.resblocks.1 has its own forward"),
        (_a_method_of_its_own, "visual.transformer.resblocks.1 has its own attention"),
        (_a_forward_of_the_tower, "visual has its own forward"),
        (_set("", pool="avg"), "visual has another pool"),
        (_set("transformer.resblocks.0.attn", num_heads=4, head_dim=32), r"visual\..*\.attn has another num_heads"),
        (_set("transformer.resblocks.0.attn", add_zero_attn=True), r"visual\..*\.attn has another add_zero_attn"),
        (_another_order, "visual's modules are in another order"),
        (_a_weight_of_another_class, "transformer.resblocks.0.mlp.c_fc.weight is a HalfLinear, not a plain tensor"),
        (_a_hook, "hooks are registered"),
        (_a_hook_on_the_tower, "hooks are registered"),
        (_a_parametrisation, "visual.ln_post"),
    ],
)
def test_what_the_fast_path_does_not_know_the_plain_tower_does(
    change: Callable[[Any], None], reason: str, images: Tensor
) -> None:
    model = make()
    before = model.encode_image(images)
    change(model)
    with torch.no_grad():
        with pytest.warns(UserWarning, match=f"the plain tower runs, not the fast one: {reason}"):
            after = model.encode_image(images)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # it is said once
            assert torch.equal(model.encode_image(images), after)
        assert torch.equal(after, model.visual(images))
    assert relative_error(before, after) > 1e-4


@pytest.mark.parametrize("config", [VIT, RESNET], ids=["vit", "resnet"])
@pytest.mark.parametrize("ran", [False, True], ids=["first call", "later"])
@pytest.mark.parametrize(
    ("wrap", "reason"),
    [
        (torch.nn.Sequential, "visual is a Sequential"),
        (torch.nn.DataParallel, "visual is a DataParallel"),
        (lambda visual: torch.nn.Sequential(torch.nn.Identity(), visual), "visual is a Sequential"),
    ],
)
def test_a_wrapped_tower_runs_as_it_is(
    wrap: Callable[[Any], Any], reason: str, ran: bool, config: VitConfig | ResNetConfig, images: Tensor
) -> None:
    model = make(config)
    wanted = model.visual(images)
    if ran:
        model.encode_image(images)
    model.visual = wrap(model.visual)
    with pytest.warns(UserWarning, match=f"the plain tower runs, not the fast one: {reason}"):
        assert torch.equal(model.encode_image(images), wanted)
    raw = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8)
    assert model.encode_image(raw).shape == (2, config.embed_dim)
    assert (model.device, model.dtype) == (CPU, torch.float32)


def test_a_tower_that_was_replaced_by_another_of_its_kind(images: Tensor) -> None:
    model, other = make(), make()
    model.encode_image(images)
    model.visual = other.visual
    assert torch.equal(model.encode_image(images), other.encode_image(images))
    model.visual = other.visual.double()
    assert model.encode_image(images).dtype == torch.float64
    assert relative_error(model.encode_image(images), exact(other, images)) < 1e-13


def test_batch_norms_in_training_use_their_batch(images: Tensor) -> None:
    model = make(RESNET)
    before = model.encode_image(images)
    model.train()
    with pytest.warns(UserWarning, match="its batch norms are in training mode"):
        during = model.encode_image(images)
    assert relative_error(before, during) > 1e-3
    model.eval()
    assert relative_error(model.encode_image(images), exact(model, images)) < 1e-5  # running statistics have moved


def test_weights_made_in_inference_mode(images: Tensor) -> None:
    """A copy has weights of its own that count their changes; of others nothing is known, and they are always read."""
    model = make()
    with torch.inference_mode():
        twin = copy.deepcopy(model)
        twin.encode_image(images)
        twin.visual.load_state_dict(random_tower(VIT).state_dict())
        assert relative_error(twin.encode_image(images), exact(twin, images)) < 1e-5
        state = {name: tensor.clone() for name, tensor in random_tower(VIT).state_dict().items()}
        model.visual.load_state_dict(state, assign=True)
        with pytest.warns(UserWarning, match="weights were made in inference mode"):
            model.encode_image(images)
        model.visual.proj.mul_(-1)  # type: ignore[union-attr, operator]
        assert relative_error(model.encode_image(images), exact(model, images)) < 1e-5


def test_weights_that_no_tower_has(images: Tensor) -> None:
    """The plain tower reads them, or does without."""
    for change in (
        lambda visual: setattr(visual.conv1, "bias", torch.nn.Parameter(torch.randn(128))),
        lambda visual: setattr(visual.transformer.resblocks[0].mlp.c_fc, "bias", None),
    ):
        model = make()
        model.encode_image(images)
        change(model.visual)
        with pytest.warns(UserWarning, match="the plain tower runs"), torch.no_grad():
            got = model.encode_image(images)
        assert relative_error(got, exact(model, images)) < 1e-5


def test_replicas_of_data_parallel_run_the_plain_tower(images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    replicas = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, replica in replicas.items():  # as torch.nn.parallel.replicate, which wants GPUs
        for name, child in module.named_children():
            setattr(replica, name, replicas[child])
        for name, parameter in vars(module)["_parameters"].items():
            setattr(replica, name, None if parameter is None else 2 * parameter)
    doubled = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in doubled.parameters():
            parameter.mul_(2)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            got = replicas[model](images)
        assert relative_error(got, exact(doubled, images)) < 1e-5
        assert not torch.equal(got, doubled(images))  # by another path


def test_a_change_of_dtype_is_seen(images: Tensor) -> None:
    model = make()
    model.encode_image(images)
    assert model.bfloat16().encode_image(images).dtype == torch.bfloat16
    assert relative_error(model.double().encode_image(images), exact(model, images)) < 1e-12


@pytest.mark.parametrize("again", [ImageEncoder.refresh, clip_fast.accelerate])
def test_writes_without_a_trace_are_read_when_asked(again: Callable[[ImageEncoder], object], images: Tensor) -> None:
    model = make()
    model.encode_image(images)
    model.visual.proj.data.mul_(2)  # type: ignore[union-attr, operator]
    again(model)
    assert relative_error(model.encode_image(images), exact(model, images)) < 1e-5


def test_weights_are_prepared_once(images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []
    prepare = CpuVit.prepare
    monkeypatch.setattr(CpuVit, "prepare", lambda *args: made.append(args) or prepare(*args))
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


def test_copies_and_pickles_once_compiled(images: Tensor) -> None:
    torch.compiler.reset()
    model = make()
    model.compile(backend="eager")
    before = model(images)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other.visual.conv1.weight.mul_(2)
        assert torch.equal(other(images), other.encode_image(images))
        assert relative_error(other(images), exact(other, images)) < 1e-5
    assert torch.equal(model(images), before)


def test_refreshed_an_encoder_keeps_its_name() -> None:
    """By which compiled graphs know it."""
    model = make()
    names = len(_OWNERS)
    for _ in range(3):
        model.refresh()
    assert len(_OWNERS) == names


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


def test_a_refresh_beside_other_threads(images: Tensor) -> None:
    model = make()
    wanted, stop = model.encode_image(images), threading.Event()

    def again() -> None:
        while not stop.is_set():
            model.refresh()

    thread = threading.Thread(target=again)
    thread.start()
    try:
        for _ in range(200):
            assert torch.equal(model.encode_image(images), wanted)
    finally:
        stop.set()
        thread.join()


@pytest.mark.filterwarnings("ignore:the plain tower runs")
def test_without_its_projection_an_empty_batch_has_the_width_too(images: Tensor) -> None:
    model = make(dataclasses.replace(VIT, layers=1))
    model.encode_image(images)
    model.visual.proj = None  # type: ignore[assignment]
    with torch.no_grad():
        assert model.encode_image(images).shape == (len(images), 128)
        assert model.encode_image(images[:0]).shape == (0, 128)


def test_a_large_batch_goes_in_parts(images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    wanted = model.encode_image(images)
    monkeypatch.setattr(cpu, "rows_at_once", lambda dtype: 2 * model.config.tokens)
    assert relative_error(model.encode_image(images), wanted) < 1e-6


def test_out_of_memory_is_answered_by_halving() -> None:
    model = make()
    sizes: list[int] = []

    def run(part: Tensor) -> tuple[Tensor, ...]:
        sizes.append(len(part))
        if len(part) > 3:
            raise torch.OutOfMemoryError
        return (part,)

    x = torch.arange(10.0)[:, None]
    assert torch.equal(model._engine.in_parts(x, run)[0], x)
    assert sizes == [10, 5, 3, 3, 2, 2]

    def never(part: Tensor) -> tuple[Tensor, ...]:
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        model._engine.in_parts(x, never)


@pytest.mark.parametrize("config", [VIT, RESNET], ids=["vit", "resnet"])
def test_what_fits_into_a_gpus_memory(config: VitConfig | ResNetConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make(config)._engine

    class Images:
        device, is_cuda, itemsize = torch.device("cuda"), True, 0

        def __len__(self) -> int:
            return 10**6

    million: Any = Images()
    for name, value in (("mem_get_info", (2**29, 2**33)), ("memory_reserved", 2**30), ("memory_allocated", 2**29)):
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    fitting = engine._fitting(million, ENCODE)
    bytes_of_an_image = 0.8 * 2**30 / fitting
    floats = (
        17 * 128 * 8 if config is VIT else 4 * 4 * 32 * 32
    )  # 4 widths and an MLP of 4; two maps at a quarter, twice
    assert bytes_of_an_image == pytest.approx(4 * (floats + 32), rel=0.01)
    if config is VIT:
        assert engine._fitting(million, HIDDEN_STATES) < fitting


def test_no_map_of_a_part_outgrows_32_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make(RESNET)._engine
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**50, 2**50))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)

    class Images:
        device, is_cuda, itemsize = torch.device("cuda"), True, 0

        def __len__(self) -> int:
            return 10**9

    images: Any = Images()
    largest = RESNET.width * (RESNET.image_size // 2) ** 2  # of the stem's last map
    assert engine._fitting(images, ENCODE) == (2**31 - 1) // largest


def test_transforms_of_torch_func_see_the_plain_tower(images: Tensor) -> None:
    model = make()
    plain = model.visual
    tangent = torch.randn_like(images)
    for encode in (model.encode_image, model.forward):
        assert torch.equal(
            torch.func.jvp(encode, (images,), (tangent,))[1], torch.func.jvp(plain, (images,), (tangent,))[1]
        )
        together = torch.vmap(lambda image, encode=encode: encode(image[None])[0])(images)
        assert relative_error(together, exact(model, images)) < 1e-5
    models = [make(), make()]
    stacked = torch.func.stack_module_state(models)
    both = torch.vmap(lambda *state: torch.func.functional_call(model, state, images))(*stacked)
    for got, each in zip(both, models, strict=True):
        assert relative_error(got, exact(each, images)) < 1e-5


def test_traces_and_fake_tensors_leave_nothing_behind(images: Tensor) -> None:
    model = make()
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        model.encode_image(images)
    assert relative_error(model.encode_image(images), exact(model, images)) < 1e-5
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        program = torch.jit.trace(model, images)
    assert relative_error(program(images), exact(model, images)) < 1e-5


def test_hooks_of_all_modules_run(images: Tensor) -> None:
    model = make()
    seen: list[object] = []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        with pytest.warns(UserWarning, match="hooks are registered"):
            model.encode_image(images)
    finally:
        handle.remove()
    assert {model.visual, model.visual.conv1, model.visual.ln_post} <= set(seen)


def test_the_default_dtype_does_not_round_weights() -> None:
    state = random_tower(VIT).state_dict()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = ImageEncoder(VIT, state, CPU, torch.float32)
    finally:
        torch.set_default_dtype(torch.float32)
    for name, tensor in model.visual.state_dict().items():
        assert torch.equal(tensor, state[name])


MODES = ("no_grad", "frozen", "trainable")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("config", [dataclasses.replace(VIT, layers=1), RESNET], ids=["vit", "resnet"])
def test_torch_compile_sees_one_graph(config: VitConfig | ResNetConfig, mode: str, images: Tensor) -> None:
    torch.compiler.reset()
    model = make(config).requires_grad_(mode == "trainable")
    wanted = exact(model, images)
    compiled = torch.compile(lambda x: model(x) * 2, backend="eager", fullgraph=True)
    with torch.no_grad() if mode == "no_grad" else contextlib.nullcontext():
        got = compiled(images)
    assert got.requires_grad == (mode == "trainable")
    assert relative_error(got.detach() / 2, wanted) < 1e-5


def test_one_graph_serves_batches_of_any_size() -> None:
    torch.compiler.reset()
    model = make(dataclasses.replace(VIT, layers=1))
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(lambda x: model.encode_image(x), backend=counter, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for size in range(2, 7):
            assert len(compiled(torch.randn(size, 3, 64, 64))) == size
    assert counter.frame_count == 1


def test_a_compiled_graph_sees_what_has_happened_since(images: Tensor) -> None:
    torch.compiler.reset()
    model = make(dataclasses.replace(VIT, layers=1))
    compiled = torch.compile(lambda x: model(x), backend="eager", fullgraph=True)
    compiled(images)
    _edit(model)
    assert relative_error(compiled(images), exact(model, images)) < 1e-5
    _replace_ln_post(model.visual)
    with torch.no_grad():
        assert relative_error(compiled(images), exact(model, images)) < 1e-5
    _a_hook(model)
    with torch.no_grad(), pytest.warns(UserWarning, match="hooks are registered"):
        assert torch.equal(compiled(images), model.visual(images))


def test_the_precision_is_what_it_was_made_with() -> None:
    model = make(precision="bf16")
    assert model.precision == "bf16"
    for name, value in {"precision": "fp32", "mean": (0.5,) * 3, "std": (0.5,) * 3}.items():
        with pytest.raises(AttributeError):
            setattr(model, name, value)


@pytest.mark.parametrize("config", [VIT, RESNET], ids=["vit", "resnet"])
def test_the_fast_path_runs(config: VitConfig | ResNetConfig, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """The results above are not the plain tower's own."""
    model = make(config, mean=IMAGE_MEAN, std=IMAGE_STD)
    for name in ("forward", "encode_tokens", "hidden_state"):
        monkeypatch.setattr(model.visual, name, None, raising=False)
    model.encode_image(images)
    if config is VIT:
        model.encode_image(images, return_patch_tokens=True)
        model.hidden_state(images, 1)
