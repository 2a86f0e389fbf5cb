"""`Clip`: what `clip.load`'s model gives, from the checkpoint that `clip.load` reads."""

from __future__ import annotations

import copy
import json
import operator
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from random_towers import relative_error
from safetensors.torch import save_file
from torch import Tensor, nn

import clip_fast
from clip_fast import model as model_module
from clip_fast.towers import cpu

clip_model = pytest.importorskip("clip.model")


def make(vision_layers: int | tuple[int, ...]) -> nn.Module:
    patch = 16 if isinstance(vision_layers, int) else None
    width = 128 if patch else 32
    return clip_model.CLIP(48, 64, vision_layers, width, patch, 77, 49408, 64, 1, 2).eval()


@pytest.mark.parametrize("vision_layers", [2, (1, 1, 1, 1)], ids=["vit", "resnet"])
def test_a_drop_in_for_clips_model(vision_layers: int | tuple[int, ...], tmp_path: Path) -> None:
    theirs = make(vision_layers)
    torch.save(theirs.state_dict(), tmp_path / "clip.pt")
    ours, _ = clip_fast.load(tmp_path / "clip.pt", "cpu", activation="quick_gelu")
    assert isinstance(ours, clip_fast.Clip)
    images = torch.randn(3, 3, 64, 64)
    tokens = clip_fast.tokenize(["a dog", "two cats", "a beach at night", "nothing"])
    with torch.inference_mode():
        assert relative_error(ours.encode_text(tokens), theirs.encode_text(tokens)) < 1e-5
        assert relative_error(ours.encode_image(images), theirs.encode_image(images)) < 1e-5
        for copied in (ours, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            for got, wanted in zip(copied(images, tokens), theirs(images, tokens), strict=True):
                assert relative_error(got, wanted) < 1e-5
    assert torch.equal(ours.logit_scale, theirs.logit_scale)


def test_in_half_precision(tmp_path: Path) -> None:
    theirs = make(2)
    torch.save(theirs.state_dict(), tmp_path / "clip.pt")
    ours, _ = clip_fast.load(tmp_path / "clip.pt", "cpu", torch.bfloat16, activation="quick_gelu")
    assert isinstance(ours, clip_fast.Clip)
    tokens = clip_fast.tokenize(["a dog", "two cats"])
    embeddings = ours.encode_text(tokens)
    assert embeddings.dtype == torch.bfloat16
    assert relative_error(embeddings, theirs.encode_text(tokens)) < 0.05


@pytest.mark.parametrize("vision_layers", [2, (1, 1, 1, 1)], ids=["vit", "resnet"])
def test_loading_does_not_wait_for_torch_compile(vision_layers: int | tuple[int, ...], tmp_path: Path) -> None:
    torch.save(make(vision_layers).state_dict(), tmp_path / "clip.pt")
    code = """if True:
        import sys, torch, clip_fast
        heavy = {"torch._dynamo", "sympy"} - set(sys.modules)
        assert heavy, "torch imports them by itself now: this test tells nothing"
        model, _ = clip_fast.load(sys.argv[1], "cpu", activation="quick_gelu")
        model.encode_image(torch.zeros(1, 3, 64, 64))
        assert not heavy & set(sys.modules), heavy & set(sys.modules)
    """
    subprocess.run([sys.executable, "-c", code, tmp_path / "clip.pt"], check=True, timeout=300)


def test_without_its_text_tower_a_checkpoint_gives_the_image_encoder(tmp_path: Path) -> None:
    visual = {name: tensor for name, tensor in make(2).state_dict().items() if name.startswith("visual.")}
    torch.save(visual, tmp_path / "clip.pt")
    model, _ = clip_fast.load(tmp_path / "clip.pt", "cpu", activation="quick_gelu")
    assert type(model) is clip_fast.ImageEncoder


@pytest.mark.parametrize("squash", [False, True])
@pytest.mark.parametrize("text", [False, True])
def test_what_is_asked_for_and_what_the_config_says_reach_the_model(
    text: bool, squash: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model with a text tower and one without are made in two places."""
    monkeypatch.setattr(cpu, "multiplies_fast", lambda dtype: True)
    state = {name: tensor.contiguous() for name, tensor in make(2).state_dict().items()}
    save_file(
        {name: tensor for name, tensor in state.items() if text or name.startswith("visual.")},
        tmp_path / "open_clip_model.safetensors",
    )
    mean, std = (0.5, 0.4, 0.3), (0.25, 0.3, 0.35)
    config = {
        "model_cfg": {
            "quick_gelu": True,
            "vision_cfg": {"image_size": 64, "patch_size": 16, "width": 128, "layers": 2},
            "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2},
        },
        "preprocess_cfg": {"mean": mean, "std": std, "resize_mode": "squash" if squash else "shortest"},
    }
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    model, preprocess = clip_fast.load(tmp_path, "cpu", precision="bf16", cuda_graphs=False)
    assert isinstance(model, clip_fast.Clip) == text
    assert preprocess == clip_fast.Preprocess(64, mean, std, squash)
    assert (model.mean, model.std, model.precision, model.dtype) == (mean, std, "bf16", torch.float32)
    assert model._engine.cuda_graphs is False
    pictures = [Image.effect_noise((96, 64), 90).convert("RGB") for _ in range(3)]
    floats = torch.stack([preprocess(picture) for picture in pictures])
    pixels = torch.stack([preprocess.uint8(picture) for picture in pictures])
    plain, _ = clip_fast.load(tmp_path, "cpu")
    with torch.inference_mode():
        wanted = plain.encode_image(floats)
        assert relative_error(plain.encode_image(pixels), wanted) < 1e-4
        for images in (floats, pixels):
            assert 1e-4 < relative_error(model.encode_image(images), wanted) < 0.05  # in bfloat16, indeed
        assert relative_error(plain.encode_image(clip_fast.Preprocess(64)(pictures[0])[None]), wanted[:1]) > 0.05
    assert plain._engine.cuda_graphs is True


def test_jit_is_refused(tmp_path: Path) -> None:
    torch.save(make(2).state_dict(), tmp_path / "clip.pt")
    with pytest.raises(ValueError, match="clip_fast has no TorchScript model: pass jit=False"):
        clip_fast.load(tmp_path / "clip.pt", "cpu", activation="quick_gelu", jit=True)
    model, _ = clip_fast.load(tmp_path / "clip.pt", "cpu", activation="quick_gelu", jit=False)
    assert isinstance(model, clip_fast.Clip)


def test_a_damaged_text_tower_is_named(tmp_path: Path) -> None:
    state = make(2).state_dict()
    state["ln_final.weight"] = state["ln_final.weight"][:-1]
    torch.save(state, tmp_path / "clip.pt")
    with pytest.raises(ValueError, match=r"ln_final.weight must have shape \[64\], got \[63\]"):
        clip_fast.load(tmp_path / "clip.pt", "cpu", activation="quick_gelu")


# --- as clip's model, for code that was written for it ----------------------------------------------------------------


TEXTS = ["a dog", "two cats", "a beach at night"]


@pytest.fixture(params=[2, (1, 1, 1, 1)], ids=["vit", "resnet"])
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Any]:
    """clip's model, and the same loaded."""
    theirs = make(request.param)
    torch.save(theirs.state_dict(), tmp_path / "clip.pt")
    return theirs, clip_fast.load(tmp_path / "clip.pt", "cpu", activation="quick_gelu")[0]


def assert_same(ours: Any, theirs: Any, bound: float = 1e-5) -> None:
    """Both towers of both models give the same."""
    images, tokens = torch.randn(2, 3, 64, 64), clip_fast.tokenize(TEXTS)
    with torch.inference_mode():
        assert relative_error(ours.encode_image(images), theirs.encode_image(images)) < bound
        assert relative_error(ours.encode_text(tokens), theirs.encode_text(tokens)) < bound


def other(theirs: nn.Module) -> dict[str, Tensor]:
    """Weights of another training, of the same shapes."""
    return {
        name: tensor * 1.1 + 0.01 if tensor.is_floating_point() else tensor + 1
        for name, tensor in theirs.state_dict().items()
    }


@pytest.mark.parametrize("strict", [True, False])
def test_clips_state_dicts_go_in(strict: bool, pair: tuple[Any, Any]) -> None:
    theirs, ours = pair
    tuned = other(theirs)
    done = ours.load_state_dict(tuned, strict=strict)
    assert not done.missing_keys
    assert not done.unexpected_keys
    theirs.load_state_dict(tuned)
    assert_same(ours, theirs)


def test_state_dicts_come_out_under_clips_names(pair: tuple[Any, Any], tmp_path: Path) -> None:
    theirs, ours = pair
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert {name for name, _ in ours.named_parameters()} == {name for name, _ in theirs.named_parameters()}
    built = clip_model.build_model(dict(ours.state_dict())).float()
    torch.save({"epoch": 1, "model_state_dict": other(built)}, tmp_path / "tuned.pt")
    again, _ = clip_fast.load(tmp_path / "tuned.pt", "cpu", activation="quick_gelu")
    built.load_state_dict(other(built))
    assert_same(again, built)


def old_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As clip_fast's first versions named the text side."""
    return {name if name.startswith("visual.") else f"text.{name}": tensor for name, tensor in state.items()}


@pytest.mark.filterwarnings("ignore:.*taken for one of OpenAI's")
def test_old_state_dicts_are_read(pair: tuple[Any, Any], tmp_path: Path) -> None:
    theirs, ours = pair
    tuned = other(theirs)
    theirs.load_state_dict(tuned)
    ours.load_state_dict(old_names(tuned))
    assert_same(ours, theirs)
    holder = nn.ModuleDict({"clip": ours})
    holder.load_state_dict({f"clip.{name}": tensor for name, tensor in old_names(tuned).items()})
    torch.save(old_names(tuned), tmp_path / "old.pt")
    assert_same(clip_fast.load(tmp_path / "old.pt", "cpu")[0], theirs)


def test_a_contrastive_step_is_clips(pair: tuple[Any, Any]) -> None:
    images, tokens = torch.randn(4, 3, 64, 64), clip_fast.tokenize([*TEXTS, "nothing"])
    for model in pair:
        optimiser = torch.optim.SGD(model.parameters(), lr=0.01)
        logits = model(images, tokens)
        loss = sum(F.cross_entropy(each, torch.arange(4)) for each in logits)
        loss.backward()
        optimiser.step()
    theirs, ours = pair
    wanted = theirs.state_dict()
    for name, tensor in ours.state_dict().items():
        assert torch.allclose(tensor, wanted[name], rtol=1e-3, atol=1e-5), name
    assert_same(ours, theirs)


def test_an_encoder_under_a_head_is_trained(pair: tuple[Any, Any]) -> None:
    _, ours = pair
    head = nn.Linear(48, 2)
    before = ours.visual.conv1.weight.detach().clone()
    optimiser = torch.optim.SGD([*ours.parameters(), *head.parameters()], lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # in training the plain tower is meant
        F.cross_entropy(head(ours.train().encode_image(torch.randn(2, 3, 64, 64))), torch.tensor([0, 1])).backward()
    optimiser.step()
    assert not torch.equal(ours.visual.conv1.weight, before)


def test_gradients_that_nobody_asked_for_are_warned_of_once(
    pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, ours = pair
    images = torch.randn(2, 3, 64, 64)
    with pytest.warns(UserWarning, match="call it under torch.no_grad\\(\\) for speed") as caught:
        embeddings = ours.encode_image(images)
    assert embeddings.requires_grad
    assert [warning.filename for warning in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours.encode_image(images)  # it is said once
        frozen = copy.deepcopy(ours).requires_grad_(False)
        frozen.encode_image(images.clone().requires_grad_()).sum().backward()
        monkeypatch.setattr(ours.visual, "forward", None)
        with torch.no_grad():
            ours.encode_image(images)  # by the fast path
        monkeypatch.setattr(frozen.visual, "forward", None)
        assert not frozen.encode_image(images).requires_grad


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("frozen", ["", "visual.", "t"])
def test_under_autocast_images_and_texts_have_one_dtype(frozen: str, grad: bool, pair: tuple[Any, Any]) -> None:
    _, ours = pair
    for name, parameter in ours.named_parameters():
        parameter.requires_grad_(not (frozen and name.startswith(frozen)))
    with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        images, texts = ours.encode_image(torch.randn(2, 3, 64, 64)), ours.encode_text(clip_fast.tokenize(TEXTS))
    assert images.dtype == texts.dtype == ours.dtype
    assert (images @ texts.T).shape == (2, 3)


def prompted(model: Any, context: Tensor, tokens: Tensor) -> Tensor:
    """Text features with learned vectors behind the start token, as CoOp computes them."""
    with torch.no_grad():
        embedding = model.token_embedding(tokens).type(model.dtype)
    prefix, suffix = embedding[:, :1], embedding[:, 1 + len(context) :]
    x = torch.cat([prefix, context.expand(len(tokens), -1, -1), suffix], dim=1)
    x = x + model.positional_embedding.type(model.dtype)
    x = model.transformer(x.permute(1, 0, 2)).permute(1, 0, 2)
    x = model.ln_final(x).type(model.dtype)
    return x[torch.arange(len(x)), tokens.argmax(dim=-1)] @ model.text_projection


def test_prompts_are_learned_as_with_clip(pair: tuple[Any, Any]) -> None:
    tokens = clip_fast.tokenize([f"X X X X {text}" for text in TEXTS])
    initial = torch.randn(4, pair[0].ln_final.weight.shape[0])
    gradients, features = [], []
    for model in pair:
        model.requires_grad_(False)
        context = nn.Parameter(initial.clone())
        images = model.visual(torch.ones(1, 3, 64, 64).type(model.dtype))
        made = prompted(model, context, tokens)
        (model.logit_scale.exp() * F.normalize(images, dim=-1) @ F.normalize(made, dim=-1).T)[0, 0].backward()
        features.append(made.detach())
        gradients.append(context.grad)
    assert relative_error(features[1], features[0]) < 1e-5
    assert relative_error(gradients[1], gradients[0]) < 1e-4


def test_attributes_are_clips(pair: tuple[Any, Any]) -> None:
    theirs, ours = pair
    for name in ("context_length", "vocab_size", "dtype", "transformer.width", "transformer.layers",
                 "visual.input_resolution", "visual.output_dim", "text_projection.shape", "positional_embedding.shape",
                 "token_embedding.num_embeddings", "ln_final.normalized_shape", "training"):  # fmt: skip
        assert operator.attrgetter(name)(ours) == operator.attrgetter(name)(theirs), name
    assert torch.equal(ours.build_attention_mask(), theirs.build_attention_mask())
    for model in pair:
        model.logit_scale = nn.Parameter(torch.tensor(1.0))
        model.context_length = 32
    assert torch.equal(ours.build_attention_mask(), theirs.build_attention_mask())
    images, tokens = torch.randn(2, 3, 64, 64), clip_fast.tokenize(TEXTS)
    with torch.no_grad():
        assert relative_error(ours(images, tokens)[0], theirs(images, tokens)[0]) < 1e-5
    assert isinstance(ours, model_module.CLIP)
    towers = (model_module.VisionTransformer, model_module.ModifiedResNet)
    assert [isinstance(ours.visual, tower) for tower in towers] == [
        isinstance(theirs.visual, tower) for tower in (clip_model.VisionTransformer, clip_model.ModifiedResNet)
    ]


@pytest.mark.parametrize("part", ["model", "module"])
def test_every_public_attribute_of_clips_model_is_there(part: str, pair: tuple[Any, Any]) -> None:
    theirs, ours = pair
    if part == "model":
        modules = {"": theirs}
    else:
        modules = {name: module for name, module in theirs.named_modules() if name}
        assert modules.keys() <= dict(ours.named_modules()).keys()
    for name, module in modules.items():
        twin = ours.get_submodule(name)
        assert isinstance(twin, getattr(model_module, type(module).__name__, type(module)))
        missing = [each for each in dir(module) if not each.startswith("_") and not hasattr(twin, each)]
        assert missing == [], name


@pytest.mark.parametrize("vision_layers", [2, (1, 1, 1, 1), [1, 1, 1, 1]], ids=["vit", "resnet", "list"])
def test_a_model_is_made_by_clips_constructor(vision_layers: Any) -> None:
    patch = 16 if vision_layers == 2 else None
    arguments = (48, 64, vision_layers, 128 if patch else 32, patch, 77, 49408, 64, 1, 2)
    theirs, ours = clip_model.CLIP(*arguments), model_module.CLIP(*arguments)
    assert isinstance(ours, clip_fast.Clip)
    assert ours.training
    wanted = dict(theirs.named_parameters())
    assert dict(ours.named_parameters()).keys() == wanted.keys()
    for name, parameter in ours.named_parameters():
        deviation = float(wanted[name].std()) if wanted[name].numel() > 1 else 0.0
        assert parameter.requires_grad
        assert parameter.dtype == wanted[name].dtype
        slack = 0.2 if parameter.numel() > 1000 else 0.9  # more than four deviations of either estimate
        assert float(parameter.mean()) == pytest.approx(float(wanted[name].mean()), abs=slack * deviation + 1e-6), name
        assert float(parameter.std() if deviation else 0) == pytest.approx(deviation, rel=slack), name
    theirs.load_state_dict(ours.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # in training the plain tower is meant
        images = torch.randn(4, 3, 64, 64)
        assert relative_error(ours.encode_image(images), theirs.encode_image(images)) < 1e-5
    assert_same(ours.eval(), theirs.eval())

    class Mine(model_module.CLIP):
        pass

    assert isinstance(Mine(*arguments), model_module.CLIP)
    assert not isinstance(ours, Mine)


def test_parameters_are_initialised_as_clips(pair: tuple[Any, Any]) -> None:
    theirs, ours = pair
    for model in pair:
        for parameter in model.parameters():
            nn.init.constant_(parameter, 7.0)
        model.initialize_parameters()
    wanted = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        deviation = float(wanted[name].std()) if wanted[name].numel() > 1 else 0.0
        assert float(parameter.float().mean()) == pytest.approx(float(wanted[name].mean()), abs=deviation / 2), name
        if deviation:
            assert float(parameter.std()) == pytest.approx(deviation, rel=0.2), name


def test_a_model_is_built_of_a_state_dict(pair: tuple[Any, Any]) -> None:
    theirs, _ = pair
    built: Any = model_module.build_model(theirs.state_dict())
    assert built.dtype == torch.float16
    # clip leaves LayerNorms and embeddings in float32.
    assert_same(built.float(), clip_model.build_model(dict(theirs.state_dict())).float(), bound=2e-3)
    model_module.convert_weights(built)
    assert built.dtype == torch.float16
    with pytest.raises(clip_fast.CheckpointError, match="the state dict: holds no CLIP image tower"):
        model_module.build_model({"a": torch.zeros(1)})


def test_what_is_no_tensor_of_tokens_is_named(pair: tuple[Any, Any]) -> None:
    with pytest.raises(TypeError, match=r"text must be a tensor of tokens, got list: model.tokenize\(texts\)"):
        pair[1].encode_text(["a dog"])


# --- clip's layout inside of a ViT -----------------------------------------------------------------------------------


@pytest.fixture
def vits(tmp_path: Path) -> tuple[Any, Any]:
    theirs = make(2)
    torch.save(theirs.state_dict(), tmp_path / "clip.pt")
    return theirs, clip_fast.load(tmp_path / "clip.pt", "cpu", activation="quick_gelu")[0]


IMAGES = (3, 3, 64, 64)


def embedded(visual: Any, images: Tensor) -> Tensor:
    x = visual.conv1(images).flatten(2).permute(0, 2, 1)
    x = torch.cat([visual.class_embedding + torch.zeros(len(x), 1, x.shape[-1]), x], 1) + visual.positional_embedding
    return visual.ln_pre(x).permute(1, 0, 2)  # (L, N, D)


def by_blocks(model: Any, images: Tensor) -> Tensor:
    x = embedded(model.visual, images)
    for block in model.visual.transformer.resblocks:
        x = block(x)
    return model.visual.ln_post(x.permute(1, 0, 2)) @ model.visual.proj


def by_the_parts_of_blocks(model: Any, images: Tensor) -> Tensor:
    x = embedded(model.visual, images)
    for block in model.visual.transformer.resblocks:
        x = x + block.attention(block.ln_1(x))
        x = x + block.mlp.c_proj(F.gelu(block.mlp.c_fc(block.ln_2(x))))
    return x


def by_the_transformer(model: Any, images: Tensor) -> Tensor:
    return model.visual.transformer(embedded(model.visual, images))


def by_some_blocks(model: Any, images: Tensor) -> Tensor:
    return model.visual.transformer.resblocks[:-1](embedded(model.visual, images))


def by_a_hook(model: Any, images: Tensor) -> Tensor:
    seen: list[Tensor] = []
    model.visual.transformer.resblocks[-1].register_forward_hook(lambda module, inputs, output: seen.append(output))
    model.encode_image(images)
    return seen[0]


def by_a_hook_that_changes(model: Any, images: Tensor) -> Tensor:
    model.visual.transformer.resblocks[0].register_forward_hook(lambda module, inputs, output: output.roll(1, 0))
    return model.encode_image(images)


def by_a_hook_on_the_activation(model: Any, images: Tensor) -> Tensor:
    seen: list[Tensor] = []
    model.visual.transformer.resblocks[1].mlp.gelu.register_forward_hook(lambda module, inputs, out: seen.append(out))
    model.encode_image(images)
    return seen[0]


def by_the_layers_of_an_mlp(model: Any, images: Tensor) -> Tensor:
    x = embedded(model.visual, images)
    for layer in model.visual.transformer.resblocks[0].mlp:
        x = layer(x)
    return x


def by_attention_maps(model: Any, images: Tensor) -> Tensor:
    x = embedded(model.visual, images)
    return model.visual.transformer.resblocks[0].attn(x, x, x, need_weights=True)[1]


def by_a_mask(model: Any, images: Tensor) -> Tensor:
    block = model.visual.transformer.resblocks[1]
    block.attn_mask = torch.zeros(17, 17)
    block.attn_mask[0, 3:] = float("-inf")
    return model.visual(images)


def without_the_projection(model: Any, images: Tensor) -> Tensor:
    model.visual.proj = None
    return model.encode_image(images)


def of_a_text_block(model: Any, images: Tensor) -> Tensor:
    seen: list[Tensor] = []
    model.transformer.resblocks[0].register_forward_hook(lambda module, inputs, output: seen.append(output))
    model.encode_text(clip_fast.tokenize(TEXTS))
    return seen[0]


@pytest.mark.parametrize(
    "walk",
    [by_blocks, by_the_parts_of_blocks, by_the_transformer, by_some_blocks, by_a_hook, by_a_hook_that_changes,
     by_a_hook_on_the_activation, by_the_layers_of_an_mlp,
     by_attention_maps, by_a_mask, without_the_projection, of_a_text_block],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:the plain tower runs")
def test_code_that_walks_through_a_tower_gets_what_it_gets_of_clip(
    walk: Callable[[Any, Tensor], Tensor], vits: tuple[Any, Any]
) -> None:
    images = torch.randn(IMAGES)
    with torch.no_grad():
        wanted, got = (walk(model, images) for model in vits)
    assert relative_error(got, wanted) < 1e-5
