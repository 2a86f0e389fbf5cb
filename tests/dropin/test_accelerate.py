"""`accelerate` on models of the packages themselves, with random weights: what it returns, and what it leaves alone."""

from __future__ import annotations

import copy
import gc
import importlib
import inspect
import io
import pickle
import re
import sys
import types
import warnings
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import clip
import pytest
import torch
from peers import (
    MODELS,
    clip_model,
    close,
    embeddings,
    error,
    hugging_face,
    open_clip_vit,
    openai_resnet,
    openai_vit,
    random_images,
    tower,
    transformers,
)
from torch import Tensor, nn

import clip_fast
from clip_fast.dropin import served
from clip_fast.dropin.accelerate import is_accelerated
from clip_fast.dropin.forward import Forward
from clip_fast.errors import NotServed
from clip_fast.towers.config import IMAGE_MEAN, IMAGE_STD

README = Path(__file__).parents[2] / "README.md"

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture
def images() -> Tensor:
    return random_images()


@pytest.fixture
def no_original(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails where a tower's own forward runs."""

    for make in MODELS:
        cls = type(tower(clip_fast.restore(clip_fast.accelerate(make()))))  # which tries the class, once

        def forward(self: nn.Module, *_: Any, **options: Any) -> None:
            pytest.fail(f"the original forward of {type(self)} runs")

        monkeypatch.setattr(cls, "forward", forward)
    monkeypatch.setattr(served, "_patched", lambda kind: None)  # as if they were their own


@pytest.fixture
def no_original_but_for() -> Callable[[Any], None]:
    """Raises where the tower of a model says that its own forward runs."""

    def strict(model: Any) -> None:
        forward: Any = Forward.of(tower(model))

        def warn(problem: str) -> None:
            pytest.fail(problem)

        forward._warn = warn

    return strict


@pytest.mark.parametrize("make", MODELS)
def test_returns_what_the_original_returned(make: Callable[[], nn.Module], images: Tensor) -> None:
    model = make()
    names = list(model.state_dict())
    with torch.no_grad():
        wanted = embeddings(model, images)
        assert clip_fast.accelerate(model) is model
        assert is_accelerated(model)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # the original's turn comes with one
            got = embeddings(model, images)
        assert close(got, wanted)
        assert not torch.equal(got, wanted)  # by another path
        assert embeddings(model, images[:0]).shape == (0, 64)
        assert list(model.state_dict()) == names
        clip_fast.restore(model)
        assert not is_accelerated(model)
        assert torch.equal(embeddings(model, images), wanted)


def test_the_original_forward_does_not_run(images: Tensor, no_original: None) -> None:
    with torch.no_grad():
        for make in MODELS:
            embeddings(clip_fast.accelerate(make()), images)


def test_clips_own_checkpoint(images: Tensor, tmp_path: Path) -> None:
    """`clip.load` builds its model from a TorchScript program."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        program = torch.jit.trace(openai_vit(), (images, torch.zeros(1, 77, dtype=torch.int)), check_trace=False)
        program.save(str(tmp_path / "clip.pt"))
        model, _ = clip.load(str(tmp_path / "clip.pt"), "cpu")
    with torch.no_grad():
        wanted = model.encode_image(images)
        assert close(clip_fast.accelerate(model).encode_image(images), wanted)
        assert is_accelerated(model)


def _half(make: Callable[[], nn.Module], dtype: torch.dtype) -> nn.Module:
    """As each package has its models in half precision: openai-clip's keep some weights in float32."""
    model = make()
    if make in (openai_vit, openai_resnet):
        clip_model.convert_weights(model)
        return model
    return model.to(dtype)


@pytest.mark.parametrize(
    ("make", "dtype"),
    [(openai_vit, torch.float16), (openai_resnet, torch.float16), (open_clip_vit, torch.bfloat16),
     (hugging_face, torch.float16), (hugging_face, torch.bfloat16)],
)  # fmt: skip
def test_half_precision(make: Callable[[], nn.Module], dtype: torch.dtype, images: Tensor) -> None:
    """Judged by the original's own error in that dtype."""
    model = _half(make, dtype)
    exact = copy.deepcopy(model).float()
    images = images.to(dtype)
    with torch.no_grad():
        right = embeddings(exact, images.float())
        wanted = embeddings(model, images)
        got = embeddings(clip_fast.accelerate(model), images)
    assert got.dtype == wanted.dtype == dtype
    assert error(got, right) < 1.5 * error(wanted, right)


@pytest.mark.parametrize(("activation", "eps"), [("quick_gelu", 1e-5), ("gelu", 1e-5), ("gelu", 0.5)])
def test_hidden_states_of_transformers(activation: str, eps: float, images: Tensor) -> None:
    model: Any = hugging_face(activation, layer_norm_eps=eps)
    with torch.no_grad():
        wanted = model(pixel_values=images, output_hidden_states=True)
        clip_fast.accelerate(model)
        got = model(pixel_values=images, output_hidden_states=True)
        assert type(got) is type(wanted)
        assert close(got.last_hidden_state, wanted.last_hidden_state)
        assert len(got.hidden_states) == len(wanted.hidden_states) == 4
        assert all(map(close, got.hidden_states, wanted.hidden_states))
        assert close(got.image_embeds, wanted.image_embeds)


def _outputs(output: Any) -> dict[str, Any]:
    """An output of transformers by name; a tuple by number."""
    return dict(output.items()) if hasattr(output, "items") else dict(enumerate(output))


CALLS: dict[str, tuple[dict[str, Any], tuple[Any, ...], dict[str, Any]]] = {
    # of the configuration; positional arguments; keywords
    "the second positionally": ({}, (False,), {}),
    "hidden states": ({}, (), {"output_hidden_states": True}),
    "hidden states by configuration": ({"output_hidden_states": True}, (), {}),
    "not so this time": ({"output_hidden_states": True}, (), {"output_hidden_states": False}),
    "None given": ({"output_hidden_states": True}, (), {"output_hidden_states": None}),
    "a tuple": ({}, (), {"return_dict": False}),
    "a tuple by configuration": ({"return_dict": False}, (), {}),
    "a tuple with hidden states": ({}, (), {"return_dict": False, "output_hidden_states": True}),
}


@pytest.mark.parametrize("kind", ["CLIPVisionModel", "CLIPVisionModelWithProjection"])
@pytest.mark.parametrize("name", CALLS)
def test_calls_of_transformers(
    name: str, kind: str, images: Tensor, no_original_but_for: Callable[[Any], None]
) -> None:
    configuration, positional, keywords = CALLS[name]
    model = hugging_face(kind=kind, **configuration)
    with torch.no_grad():
        try:
            wanted = model(images, *positional, **keywords)
        except AttributeError as error:
            pytest.skip(f"this release of transformers cannot do it itself: {error}")
        no_original_but_for(clip_fast.accelerate(model))
        got = model(images, *positional, **keywords)
    assert type(got) is type(wanted)
    got, wanted = _outputs(got), _outputs(wanted)
    assert got.keys() == wanted.keys()
    for key, value in wanted.items():
        ours, theirs = (got[key], value) if isinstance(value, tuple) else ((got[key],), (value,))
        assert len(ours) == len(theirs)
        assert all(map(close, ours, theirs))


@pytest.mark.parametrize("call", ["no images", "too many", "twice", "unknown"])
def test_calls_that_transformers_refuses(call: str, images: Tensor) -> None:
    """With its own error."""
    model = tower(hugging_face())
    parameters = inspect.signature(type(model).forward).parameters
    second = list(parameters)[2]
    keywords = {second: 0} if call == "twice" else {"unheard_of": 0} if call == "unknown" else {}
    given = {"no images": (), "too many": (images, False, *[None] * 9), "twice": (images, False)}.get(call, (images,))
    if call == "unknown" and any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        pytest.skip("this release of transformers takes any option")
    with pytest.raises((AttributeError, TypeError, ValueError)) as wanted:
        model(*given, **keywords)
    clip_fast.accelerate(model)
    with pytest.raises(wanted.type, match=re.escape(str(wanted.value))):
        model(*given, **keywords)


def test_patch_tokens_of_open_clip(images: Tensor) -> None:
    model: Any = open_clip_vit(output_tokens=True)
    with torch.no_grad():
        wanted = model.visual(images)
        got = clip_fast.accelerate(model).visual(images)
    assert all(map(close, got, wanted))


@pytest.mark.parametrize("make", MODELS)
def test_gradients_are_the_originals(make: Callable[[], nn.Module], images: Tensor) -> None:
    model = make()
    images.requires_grad_(True)

    weights = [parameter for parameter in tower(model).parameters() if parameter.requires_grad]

    def gradients() -> tuple[Tensor, ...]:
        loss = embeddings(model, images).square().sum()
        return torch.autograd.grad(loss, [images, *weights])

    wanted = gradients()
    clip_fast.accelerate(model)
    with pytest.warns(UserWarning, match="gradients are enabled"):
        got = gradients()
    assert len(got) > 20
    for ours, theirs in zip(got, wanted, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("make", MODELS)
def test_copies_pickles_and_changed_weights(make: Callable[[], nn.Module], images: Tensor) -> None:
    model: Any = clip_fast.accelerate(make())
    with torch.no_grad():
        before = embeddings(model, images)
        other = copy.deepcopy(model)
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
        for parameter in model.parameters():
            parameter.mul_(1.1)
        assert is_accelerated(other)
        assert torch.equal(embeddings(other, images), before)  # of its own weights
        assert not is_accelerated(loaded)
        assert close(embeddings(loaded, images), before)
        changed = embeddings(model, images)
        assert not close(changed, before, 1e-2)
        clip_fast.restore(model)
        assert close(changed, embeddings(model, images))


PICKLES: dict[str, Callable[[nn.Module], Any]] = {
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "a spawned process": lambda model: pickle.loads(ForkingPickler.dumps(model)),
    "Ray and loky": lambda model: pickle.loads(pytest.importorskip("ray.cloudpickle").dumps(model)),
    "a shallow copy": lambda model: copy.copy(tower(model)),
}


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("way", PICKLES)
def test_a_pickle_says_that_it_is_the_original(make: Callable[[], nn.Module], way: str, images: Tensor) -> None:
    """A process pool would run at the original's speed without a word."""
    model = clip_fast.accelerate(make())
    with pytest.warns(UserWarning, match=r"a pickle of an accelerated .* call clip_fast\.accelerate on it") as caught:
        arrived = PICKLES[way](model)
    assert len(caught) == 1
    assert caught[0].filename in (__file__, importlib.import_module("threading").__file__)
    assert is_accelerated(model)
    assert not is_accelerated(arrived)
    with torch.no_grad():
        wanted = tower(model)(images)
        got = tower(clip_fast.accelerate(arrived))(images)
    assert close(*((each if isinstance(each, Tensor) else each.pooler_output) for each in (got, wanted)))


@pytest.mark.parametrize("make", MODELS)
def test_copies_and_plain_pickles_say_nothing(make: Callable[[], nn.Module]) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="a pickle of")
        model = copy.deepcopy(clip_fast.accelerate(make()))
        assert is_accelerated(model)
        model.state_dict()
        pickle.dumps(clip_fast.restore(model))


@pytest.mark.parametrize("make", [openai_vit, open_clip_vit])
def test_replicas_of_data_parallel_are_the_originals(make: Callable[[], nn.Module], images: Tensor) -> None:
    """Their weights last for one call: folding them would cost more than it gains."""
    model: Any = make()
    with torch.no_grad():
        wanted = model.visual(images)
        clip_fast.accelerate(model)
        replica = model.visual._replicate_for_data_parallel()
        assert not is_accelerated(replica)
        # As `torch.nn.parallel.replicate` fills a replica: plain tensors in the place of its parameters.
        for name, parameter in model.visual.named_parameters(recurse=False):
            setattr(replica, name, parameter.detach())
        for name, module in model.visual.named_children():
            setattr(replica, name, module)
        assert torch.equal(type(replica).forward(replica, images), wanted)
        assert close(nn.DataParallel(model.visual)(images), wanted)  # without a GPU: the module itself
    assert is_accelerated(model)


def test_raw_pixels(images: Tensor) -> None:
    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    mean, std = (torch.tensor(x)[:, None, None] for x in (IMAGE_MEAN, IMAGE_STD))
    with torch.no_grad():
        for make in MODELS:
            model = make()
            wanted = embeddings(model, (pixels / 255 - mean) / std)
            assert close(embeddings(clip_fast.accelerate(model), pixels), wanted)


@pytest.mark.parametrize("make", MODELS)
def test_wrong_images(make: Callable[[], nn.Module]) -> None:
    model = clip_fast.accelerate(make())
    with torch.no_grad():
        with pytest.raises(ValueError, match=r"images must be \[batch, 3, 64, 64\], got \[2, 1, 64, 64\]"):
            embeddings(model, torch.randn(2, 1, 64, 64))
        with pytest.raises(ValueError, match=r"images must be \[batch, 3, 64, 64\], got \[2, 3, 70, 70\]"):
            embeddings(model, torch.randn(2, 3, 70, 70))


@pytest.mark.parametrize("make", MODELS)
def test_autocast(make: Callable[[], nn.Module], images: Tensor, no_original_but_for: Callable[[Any], None]) -> None:
    """Judged by the original's own error under autocast.

    transformers keeps its residual stream in float32 there; the fast path is held to what it does in bfloat16 itself.
    """
    model = make()
    with torch.no_grad():
        right = embeddings(model, images)
        with torch.autocast("cpu", torch.bfloat16):
            wanted = embeddings(model, images)
        rounded = wanted
        if make is hugging_face:
            rounded = embeddings(copy.deepcopy(model).bfloat16(), images.bfloat16())
        with torch.autocast("cpu", torch.bfloat16):
            no_original_but_for(clip_fast.accelerate(model))
            got = embeddings(model, images)
        assert got.dtype == wanted.dtype == torch.bfloat16
        assert 1e-4 < error(got, right) < 1.5 * error(rounded, right)
        assert close(embeddings(model, images), right)  # and no longer than it lasts


def test_autocast_has_a_dtype_for_each_output(images: Tensor) -> None:
    model: Any = open_clip_vit(output_tokens=True)
    other = hugging_face()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        wanted = [*model.visual(images), *other(images, output_hidden_states=True).to_tuple()[-1]]
        clip_fast.accelerate(model)
        clip_fast.accelerate(other)
        got = [*model.visual(images), *other(images, output_hidden_states=True).to_tuple()[-1]]
    assert [x.dtype for x in got] == [x.dtype for x in wanted]


def test_a_precision_that_is_none() -> None:
    model = openai_vit()
    with pytest.raises(ValueError, match=r"precision must be one of .*, got 'int8'"):
        clip_fast.accelerate(model, precision="int8")  # type: ignore[arg-type]
    assert not is_accelerated(model)


def test_a_loaded_model_alone_and_inside_of_another(images: Tensor) -> None:
    encoder, _ = clip_fast.load("tiny-digits", "cpu")
    for model in (encoder, nn.ModuleDict({"images": encoder}), nn.ModuleList([encoder, openai_vit()])):
        assert clip_fast.accelerate(model) is model
        with pytest.raises(
            ValueError, match="loaded with another precision, or with CUDA graphs: give these to `load`"
        ):
            clip_fast.accelerate(model, precision="bf16")
        with pytest.raises(ValueError, match="give these to `load`"):
            clip_fast.accelerate(model, cuda_graphs=False)
    assert is_accelerated(model)
    plain, _ = clip_fast.load("tiny-digits", "cpu", precision="bf16", cuda_graphs=False)
    clip_fast.accelerate(plain, precision="bf16", cuda_graphs=False)


def test_what_is_no_module() -> None:
    with pytest.raises(TypeError, match=r"accelerate takes a torch\.nn\.Module, got a tuple"):
        clip_fast.accelerate((openai_vit(), None))  # type: ignore[type-var]


@pytest.mark.parametrize("make", MODELS)
def test_random_numbers_are_as_without_it(make: Callable[[], nn.Module]) -> None:
    """Also where a class is tried, which is once in a process."""
    served._computes_as_ours.cache_clear()
    model = make()
    before = torch.get_rng_state()
    clip_fast.accelerate(model)
    assert torch.equal(torch.get_rng_state(), before)


def test_what_others_put_on_an_instance_stays(images: Tensor) -> None:
    """`encode_image` put on a model before it is accelerated, a tower's `forward` put there afterwards."""
    model: Any = openai_vit()
    mine, theirs = (lambda image: "mine"), (lambda image: "theirs")
    model.encode_image = mine
    clip_fast.accelerate(model)
    assert model.encode_image is mine
    model.visual.forward = theirs
    other = copy.deepcopy(model)
    assert other.visual(images) == "theirs"
    clip_fast.restore(model)
    assert (model.encode_image, model.visual.forward) == (mine, theirs)
    assert not is_accelerated(model)


FORKS = {
    "all tokens": lambda source: source.replace("self.ln_post(x[:, 0, :])", "self.ln_post(x)"),
    "an added argument": lambda source: source.replace("output_dim: int):\n", "output_dim: int, prompts: int):\n"),
    "a block": lambda source: source.replace("self.mlp(self.ln_2(x))", "2 * self.mlp(self.ln_2(x))"),
    "a pool": lambda source: source.replace("return x[0]", "return x[1]"),
    "nothing": lambda source: source,
}


@pytest.mark.parametrize("change", FORKS)
def test_a_changed_copy_of_openai_clips_model(change: str, monkeypatch: pytest.MonkeyPatch, images: Tensor) -> None:
    """As programs of papers bring one along, under the same name."""
    own = pytest.importorskip("clip.model")
    source = Path(own.__file__).read_text()
    changed = FORKS[change](source)
    assert (changed != source) == (change != "nothing")
    module = types.ModuleType("clip.model")
    exec(compile(changed, "clip/model.py", "exec"), vars(module))
    monkeypatch.setitem(sys.modules, "clip.model", module)
    layers: Any = (1, 1, 1, 1) if change == "a pool" else 2
    kind = module.ModifiedResNet if change == "a pool" else module.VisionTransformer
    if change == "an added argument":
        visual = kind(64, 16, 128, layers, 2, 64, 4)
    else:
        visual = kind(layers, 64, 16, 64, 8) if change == "a pool" else kind(64, 16, 128, layers, 2, 64)
    model: Any = nn.Module()
    model.visual = visual.eval().requires_grad_(False)
    before = model.visual(images)
    if change == "nothing":
        assert close(clip_fast.accelerate(model).visual(images), before)
        return
    with pytest.raises(NotServed, match="computes something else"):
        clip_fast.accelerate(model)
    assert torch.equal(model.visual(images), before)


def test_an_encode_image_that_others_gave_to_the_class_stays(images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = openai_vit()

    def normalised(model: Any, image: Tensor) -> Tensor:
        return torch.nn.functional.normalize(model.visual(image.type(model.dtype)), dim=-1)

    monkeypatch.setattr(type(model), "encode_image", normalised)
    with torch.no_grad():
        wanted = model.encode_image(images)
        assert close(clip_fast.accelerate(model).encode_image(images), wanted)


def test_while_it_is_copied_a_model_stays_accelerated() -> None:
    """Raw pixels, which the original would not normalise, are embedded meanwhile."""
    model: Any = clip_fast.accelerate(openai_vit())
    raw = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    seen: list[Tensor] = []

    class Spy:
        def __deepcopy__(self, memo: dict[int, Any]) -> Spy:
            seen.append(model.encode_image(raw))
            return self

    with torch.no_grad():
        wanted = model.encode_image(raw)
        model.spy = model.visual.spy = Spy()
        other = copy.deepcopy(model)
        assert len(seen) == 2
        assert all(torch.equal(each, wanted) for each in seen)
        assert torch.equal(other.encode_image(raw), wanted)
        assert other.visual is not model.visual
        other.visual.proj.mul_(2)
        assert torch.equal(model.encode_image(raw), wanted)


def test_a_model_on_the_meta_device(images: Tensor) -> None:
    """It can be accelerated before it has weights."""
    with torch.device("meta"):
        model: Any = clip_fast.accelerate(open_clip_vit())
    with torch.no_grad():
        with pytest.warns(UserWarning, match="its weights are on the meta device"):
            assert model.encode_image(images.to("meta")).shape == (3, 64)
        other = open_clip_vit()
        model.to_empty(device="cpu").load_state_dict(other.state_dict())
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            assert close(model.encode_image(images), embeddings(other, images))


def test_memory_is_free_at_the_next_collection() -> None:
    model: Any = clip_fast.accelerate(openai_vit())
    with torch.no_grad():
        model.encode_image(random_images(1))
    weight = weakref.ref(model.visual.proj)
    del model
    gc.collect()
    assert weight() is None


def test_several_threads(images: Tensor) -> None:
    """They find each other's first call at work: one preparation serves all."""
    model = clip_fast.accelerate(openai_vit())

    def encode(i: int) -> Tensor:
        with torch.no_grad():
            return embeddings(model, images[i % 3 : i % 3 + 1])

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(encode, range(24)))
    clip_fast.restore(model)
    with torch.no_grad():
        wanted = embeddings(model, images)
    assert all(close(row, wanted[i % 3 : i % 3 + 1]) for i, row in enumerate(results))


# --- README ----------------------------------------------------------------------------------------------------------


def test_readmes_lines_take_the_fast_path(images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    section = README.read_text().partition("## Your own model, in one line")[2].partition("\n## ")[0]
    snippets: list[str] = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    config = transformers.CLIPConfig(
        text_config={"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1},
        vision_config=hugging_face().config.to_dict(),
        projection_dim=64,
    )

    class Sentences(nn.Module):
        """As sentence-transformers' `encode`, which turns gradients off."""

        def __init__(self, name: str) -> None:
            super().__init__()
            self.model = hugging_face()

        @torch.inference_mode()
        def encode(self, pictures: Tensor) -> Tensor:
            return self.model(pixel_values=pictures).image_embeds

    names = {
        "clip": types.SimpleNamespace(load=lambda name: (openai_vit(), None)),
        "open_clip": types.SimpleNamespace(
            create_model_and_transforms=lambda name, pretrained: (open_clip_vit(), None, None)
        ),
        "transformers": types.SimpleNamespace(
            CLIPModel=types.SimpleNamespace(from_pretrained=lambda name: transformers.CLIPModel(config))
        ),
        "sentence_transformers": types.SimpleNamespace(SentenceTransformer=Sentences),
        "torch": torch, "clip_fast": clip_fast, "images": images, "pictures": images,
    }  # fmt: skip
    served = [snippet for snippet in snippets if "accelerate" in snippet]
    assert [snippet.split(".")[0].split("= ")[1] for snippet in served] == list(names)[:4]
    assert len(snippets) == len(served) + 1
    for snippet in snippets:  # the last takes up the model of the one before
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="the original forward")
            exec(snippet, names)
        if "accelerate" in snippet:
            assert is_accelerated(names["model"])


# --- on a GPU --------------------------------------------------------------------------------------------------------


@needs_gpu
@pytest.mark.parametrize("make", MODELS)
def test_a_cpu_tensor_for_a_model_on_a_gpu(make: Callable[[], nn.Module], images: Tensor) -> None:
    model = make().cuda()
    with torch.no_grad():
        wanted = embeddings(model, images.cuda())
        got = embeddings(clip_fast.accelerate(model), images)
    assert got.is_cuda
    assert error(got, wanted) < 1e-4  # the original's convolutions are TF32's


@needs_gpu
def test_models_on_two_devices_at_once(images: Tensor) -> None:
    on_cpu = openai_vit()
    on_gpu = copy.deepcopy(on_cpu).cuda()
    with torch.no_grad():
        wanted = embeddings(on_cpu, images)
        for model in (on_cpu, on_gpu):
            clip_fast.accelerate(model)
        for _ in range(2):
            assert close(embeddings(on_cpu, images), wanted)
            assert close(embeddings(on_gpu, images.cuda()).cpu(), wanted, 1e-4)


@needs_gpu
def test_a_model_moves(images: Tensor) -> None:
    model = clip_fast.accelerate(openai_vit())
    with torch.no_grad():
        wanted = embeddings(model, images)
        for device in ("cuda", "cpu"):
            got = embeddings(model.to(device), images)
            assert got.device.type == device
            assert close(got.cpu(), wanted, 1e-4)


@needs_gpu
@pytest.mark.parametrize("make", MODELS)
def test_half_precision_with_cuda_graphs(make: Callable[[], nn.Module], images: Tensor) -> None:
    """The second call replays what the first has captured."""
    model = _half(make, torch.float16).cuda()
    exact = copy.deepcopy(model).float()
    images = images.half().cuda()
    with torch.no_grad():
        right, wanted = embeddings(exact, images.float()), embeddings(model, images)
        clip_fast.accelerate(model)
        for _ in range(2):
            assert error(embeddings(model, images), right) < 1.5 * error(wanted, right)
