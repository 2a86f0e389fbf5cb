"""Which way an accelerated tower goes: every fallback to the original, eager and in compiled graphs."""

from __future__ import annotations

import copy
import functools
import inspect
import pickle
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peers import (
    MODELS,
    close,
    embeddings,
    hugging_face,
    open_clip_resnet,
    open_clip_vit,
    openai_resnet,
    openai_vit,
    random_images,
    tower,
    transformers,
    why_original,
)
from random_towers import random_tower
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

import clip_fast
from clip_fast.dropin.forward import _UNREAD, Forward
from clip_fast.engine.engine import Engine
from clip_fast.errors import NotServed
from clip_fast.towers import cpu
from clip_fast.towers.config import VitConfig


@pytest.fixture
def images() -> Tensor:
    return random_images()


def falls_back(model: nn.Module, images: Tensor, because: str, run: Callable[..., Any] = embeddings) -> Any:
    """What the original forward of an accelerated model gives, which says why it runs."""
    with pytest.warns(UserWarning, match=f"the original forward of .* runs, not clip_fast's: .*{because}"):
        return run(model, images)


def stays_fast(model: nn.Module, images: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the original forward")
        return embeddings(model, images)


# --- hooks and modes -------------------------------------------------------------------------------------------------


def inner(model: nn.Module) -> nn.Module:
    """Some module inside its tower."""
    return next(
        module for module in tower(model).modules() if isinstance(module, nn.Linear) and module.bias is not None
    )


HOOKS: dict[str, Callable[[nn.Module, Callable[..., None]], Any]] = {
    "forward": lambda module, hook: module.register_forward_hook(hook),
    "before it": lambda module, hook: module.register_forward_pre_hook(hook),
    "backward": lambda module, hook: module.register_full_backward_hook(hook),
    "before that": lambda module, hook: module.register_full_backward_pre_hook(hook),
    "of all modules": lambda module, hook: nn.modules.module.register_module_forward_hook(hook),
}


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_inside_the_tower(make: Callable[[], nn.Module], kind: str, images: Tensor) -> None:
    model = clip_fast.accelerate(make())
    with torch.no_grad():
        before = stays_fast(model, images)
        hook = HOOKS[kind](inner(model), lambda *_: None)
        try:
            assert close(falls_back(model, images, "hooks are registered inside the tower"), before)
        finally:
            hook.remove()
        assert torch.equal(stays_fast(model, images), before)


@pytest.mark.parametrize("make", MODELS)
def test_hooks_after_all_were_thrown_away(make: Callable[[], nn.Module], images: Tensor) -> None:
    """A widespread way to remove hooks puts a new dictionary in the place of the old."""
    model = clip_fast.accelerate(make())
    with torch.no_grad():
        stays_fast(model, images)
        inner(model)._forward_hooks = OrderedDict()
        inner(model).register_forward_hook(lambda *_: None)
        falls_back(model, images, "hooks are registered inside the tower")


@pytest.mark.parametrize("make", MODELS)
def test_hooks_on_the_tower_run_beside_the_fast_path(make: Callable[[], nn.Module], images: Tensor) -> None:
    model = clip_fast.accelerate(make())
    seen: list[object] = []
    tower(model).register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        stays_fast(model, images)
    assert seen


def _drop_later(model: nn.Module) -> None:
    """As `MultiheadAttention`'s dropout is set, in the middle of a run."""
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.5


@pytest.mark.parametrize(
    ("make", "change"),
    [
        (openai_resnet, None),
        (open_clip_resnet, None),
        (lambda: open_clip_vit(patch_dropout=0.5), None),
        (lambda: hugging_face(attention_dropout=0.5), None),
        (openai_vit, _drop_later),
        (open_clip_vit, _drop_later),
    ],
    ids=["batch norms", "batch norms of open_clip", "patch dropout", "attention_dropout", "dropout", "of open_clip"],
)
def test_training_mode(make: Callable[[], Any], change: Callable[[nn.Module], None] | None, images: Tensor) -> None:
    model = clip_fast.accelerate(make())
    with torch.no_grad():
        before = stays_fast(model, images)
        if change is not None:
            change(model)
        model.train()
        assert not close(falls_back(model, images, "in training mode, with dropout or batch norms"), before, 1e-3)
        after = stays_fast(model.eval(), images)  # of the statistics that training has left
        assert close(after, embeddings(clip_fast.restore(model), images))


@pytest.mark.parametrize("make", [openai_vit, open_clip_vit, hugging_face])
def test_training_mode_without_dropout_is_fast(make: Callable[[], nn.Module], images: Tensor) -> None:
    with torch.no_grad():
        stays_fast(clip_fast.accelerate(make()).train(), images)


# --- what transformers is asked for ----------------------------------------------------------------------------------


def test_attention_weights(images: Tensor) -> None:
    model = clip_fast.accelerate(hugging_face())
    model.set_attn_implementation("eager")
    with torch.no_grad():
        output = falls_back(
            model, images, "attention weights are asked for", lambda m, x: m(pixel_values=x, output_attentions=True)
        )
        assert len(output.attentions) == 3
        stays_fast(model, images)  # what transformers hooked in for that is no user's hook


def test_interpolated_positions(images: Tensor) -> None:
    model = hugging_face()
    larger = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        wanted = model(pixel_values=larger, interpolate_pos_encoding=True).image_embeds
        clip_fast.accelerate(model)
        got = falls_back(
            model, larger, "positional encodings", lambda m, x: m(pixel_values=x, interpolate_pos_encoding=True)
        )
    assert torch.equal(got.image_embeds, wanted)


CAPTURES = hasattr(transformers.utils, "output_capturing")  # as of transformers 5
SELECTS_LAYERS = CAPTURES and hasattr(transformers.utils.output_capturing, "selected_hidden_states")  # as of 5.24

NOT_FLAGS: dict[str, Any] = {"output_hidden_states": (True, 1.5) if SELECTS_LAYERS else 1}
if CAPTURES:
    NOT_FLAGS["unheard_of"] = 1


@pytest.mark.parametrize("name", NOT_FLAGS)
def test_what_else_transformers_may_be_asked(name: str, images: Tensor) -> None:
    options = {name: NOT_FLAGS[name]}
    model = tower(hugging_face(kind="CLIPVisionModel"))
    with torch.no_grad():
        wanted = model(images, **options)
        clip_fast.accelerate(model)
        why = f"{name} is (1|.*1.5|given)"
        got = falls_back(model, images, why, lambda m, x: m(x, **options))
    assert torch.equal(got.last_hidden_state, wanted.last_hidden_state)
    for ours, theirs in zip(got.hidden_states or (), wanted.hidden_states or (), strict=True):
        assert (ours is None and theirs is None) or torch.equal(ours, theirs)


@pytest.mark.skipif(not SELECTS_LAYERS, reason="this release of transformers has no numbers of layers")
@pytest.mark.parametrize("asked", [1, 3, -1, -2, -4, 0, 4, -5, [-2, -1], [0, 2, 2], (1, -1), [9], [-9, 1], []], ids=str)
@pytest.mark.parametrize("by", ["call", "configuration"])
def test_layers_by_their_numbers(asked: Any, by: str, images: Tensor) -> None:
    """As LLaVA asks for them: None stands in the place of every other."""
    model = tower(hugging_face(kind="CLIPVisionModel"))
    options = {"output_hidden_states": asked} if by == "call" else {}
    if by == "configuration":
        model.config.output_hidden_states = asked
    with torch.no_grad():
        wanted = model(images, **options)
        clip_fast.accelerate(model)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="the original forward")
            got = model(images, **options)
    assert got.keys() == wanted.keys()
    assert close(got.last_hidden_state, wanted.last_hidden_state)
    assert (got.hidden_states is None) == (wanted.hidden_states is None)
    for ours, theirs in zip(got.hidden_states or (), wanted.hidden_states or (), strict=True):
        assert (ours is None and theirs is None) or close(ours, theirs)


def llava(layer: int | list[int]) -> Any:
    text = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=200, pad_token_id=0,
    )  # fmt: skip
    vision = hugging_face().config
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=199, image_token_index=199, vision_feature_layer=layer
    )
    return transformers.LlavaForConditionalGeneration(config).eval()


@pytest.mark.parametrize("layer", [-2, [-2, -1]], ids=str)
def test_llava_takes_the_fast_path(layer: int | list[int], images: Tensor) -> None:
    model = llava(layer)
    given = {"input_ids": torch.tensor([[1, *[199] * 16, 5]] * len(images)), "pixel_values": images}
    given["attention_mask"] = torch.ones_like(given["input_ids"])
    calls: list[Callable[[], Tensor]] = [
        lambda: model(**given).logits,
        lambda: model(**given, use_cache=False).logits,
        lambda: model(**given, logits_to_keep=1, num_items_in_batch=3).logits,
        lambda: model.generate(**given, max_new_tokens=2, do_sample=False, output_logits=True,
                               return_dict_in_generate=True).logits[0],
    ]  # fmt: skip
    with torch.no_grad():
        wanted = [call() for call in calls]
        clip_fast.accelerate(model)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="the original forward")
            for call, logits in zip(calls, wanted, strict=True):
                assert close(call(), logits)


@pytest.mark.skipif(not CAPTURES, reason="towers of this release of transformers take no other options")
@pytest.mark.parametrize("name", sorted(_UNREAD))
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_options_that_the_original_never_reads(name: str, attention: str, images: Tensor) -> None:
    """Not even a value that nothing can be made of changes what the original gives."""
    model = tower(hugging_face(kind="CLIPVisionModel", attn_implementation=attention))
    options = {name: object()}
    with torch.no_grad():
        wanted = model(images)
        assert torch.equal(model(images, **options).pooler_output, wanted.pooler_output)
        clip_fast.accelerate(model)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="the original forward")
            assert close(model(images, **options).pooler_output, wanted.pooler_output)


def test_trainer_predicts_by_the_fast_path(images: Tensor, tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")
    config = transformers.CLIPConfig(vision_config=hugging_face().config.to_dict())
    config.num_labels = 3
    model = clip_fast.accelerate(transformers.CLIPForImageClassification(config).eval())
    arguments = transformers.TrainingArguments(str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the original forward")
        found = transformers.Trainer(model, arguments).predict(
            [{"pixel_values": image, "labels": i % 3} for i, image in enumerate(images)]
        )
    with torch.no_grad():
        assert close(torch.from_numpy(found.predictions), clip_fast.restore(model)(pixel_values=images).logits)


@pytest.mark.parametrize("make", MODELS)
def test_the_signature_is_the_originals(make: Callable[[], nn.Module]) -> None:
    """Callers look there for what a model takes, and Trainer for the columns of a dataset to keep."""
    part = tower(make())
    wanted = inspect.signature(part.forward)
    clip_fast.accelerate(part)
    for each in (part, copy.deepcopy(part)):
        assert inspect.signature(each.forward) == wanted
        assert each.forward.__doc__ == type(part).forward.__doc__
        assert Forward.of(each) is not None
    assert Forward.of(clip_fast.restore(part)) is None


def test_an_attention_of_the_users_own_under_a_known_name(images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(module: nn.Module, query: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        return torch.zeros_like(query).transpose(1, 2), None

    interface = pytest.importorskip("transformers", minversion="4.51").AttentionInterface
    known = interface()["sdpa"]
    model = hugging_face()
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        clip_fast.accelerate(model)
        stays_fast(model, images)
        interface.register("sdpa", nothing)
        try:
            falls_back(model, images, "its attention is 'sdpa', not one of transformers' own")
            with pytest.raises(NotServed, match="its attention is 'sdpa'"):
                clip_fast.accelerate(hugging_face())
        finally:
            interface.register("sdpa", known)
        stays_fast(model, images)


def test_an_attention_of_the_users_own(images: Tensor) -> None:
    def nothing(module: nn.Module, query: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        return torch.zeros_like(query).transpose(1, 2), None

    interface = pytest.importorskip("transformers", minversion="4.51").AttentionInterface
    interface.register("nothing", nothing)
    model = hugging_face()
    with torch.no_grad():
        clip_fast.accelerate(model)
        before = stays_fast(model, images)
        model.set_attn_implementation("nothing")
        got = falls_back(model, images, "its attention is 'nothing', not one of transformers' own")
        clip_fast.restore(model)
        assert torch.equal(got, embeddings(model, images))
        assert not close(got, before, 1e-2)
        with pytest.raises(NotServed, match="its attention is 'nothing'"):
            clip_fast.accelerate(model)
        model.set_attn_implementation("eager")
        assert close(stays_fast(clip_fast.accelerate(model), images), before)


# --- dtypes, gradients, transforms, tracers --------------------------------------------------------------------------


def test_float64_and_trained_weights_need_no_warning(images: Tensor) -> None:
    model = open_clip_vit().double()
    with torch.no_grad():
        wanted = embeddings(model, images.double())
        clip_fast.accelerate(model)
        assert torch.equal(stays_fast(model, images.double()), wanted)
        assert why_original(tower(model), images.double()) == "it computes in float64"
    model = clip_fast.accelerate(openai_vit()).train()
    assert stays_fast(model, images).requires_grad


def test_weights_that_require_gradients(images: Tensor) -> None:
    """One of them is enough, and it is asked at every call."""
    model = clip_fast.accelerate(openai_vit()).requires_grad_(False)
    assert not stays_fast(model, images).requires_grad
    tower(model).ln_post.weight.requires_grad_(True)
    assert falls_back(model, images, "gradients are enabled and required").requires_grad
    assert "gradients are enabled" in str(why_original(tower(model), images))
    with torch.no_grad():
        assert why_original(tower(model), images) is None


def test_functional_transforms(images: Tensor) -> None:
    """Of a frozen tower, where no gradient mode tells that they are at work."""
    model = hugging_face(attn_implementation="eager").requires_grad_(False)

    def jvp(model: nn.Module, x: Tensor) -> Tensor:
        return torch.func.jvp(lambda z: embeddings(model, z), (x,), (torch.ones_like(x),))[1]

    def dual(model: nn.Module, x: Tensor) -> Tensor:
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(embeddings(model, forward_ad.make_dual(x, torch.ones_like(x)))).tangent

    def vmap(model: nn.Module, x: Tensor) -> Tensor:
        return torch.vmap(lambda z: embeddings(model, z))(x[:, None])

    for transform in (jvp, dual, vmap):
        wanted = transform(model, images)
        clip_fast.accelerate(model)
        assert torch.equal(falls_back(model, images, "a transform of torch.func", transform), wanted)
        stays_fast(model, images)
        clip_fast.restore(model)


@pytest.mark.parametrize("make", [openai_vit, openai_resnet, open_clip_vit])
def test_a_trace_stands_on_its_own(make: Callable[[], nn.Module], images: Tensor) -> None:
    model = clip_fast.accelerate(make())
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        program = torch.jit.trace(tower(model), images)
        assert "clip_fast" not in str(program.inlined_graph)
        assert close(program(images), embeddings(model, images))


@pytest.mark.parametrize("make", MODELS)
def test_an_exported_program_stands_on_its_own(make: Callable[[], nn.Module], images: Tensor) -> None:
    model = clip_fast.accelerate(make())
    with torch.no_grad():
        program = torch.export.export(tower(model), (images,))
        assert "clip_fast" not in str(program.graph)
        got, wanted = program.module()(images), tower(model)(images)
    if make is hugging_face:
        got, wanted = got.pooler_output, wanted.pooler_output
    assert close(got, wanted)


def test_what_torch_fx_and_fake_tensors_record_stands_on_its_own(images: Tensor) -> None:
    """And nothing of it is kept."""
    model = open_clip_vit().requires_grad_(False)
    wanted = embeddings(model, images)
    part = tower(clip_fast.accelerate(model))
    assert close(torch.fx.symbolic_trace(nn.Sequential(part))(images), wanted)
    for used in (False, True):
        with FakeTensorMode(allow_non_fake_inputs=True):
            assert type(part(images)) is FakeTensor
        program = make_fx(part, tracing_mode="fake", _allow_non_fake_inputs=True)(images)
        assert "clip_fast" not in str(program.graph)
        assert close(program(images), wanted)
        assert close(stays_fast(model, images), wanted), used


def test_a_mask_that_comes_later_is_seen(images: Tensor) -> None:
    model = clip_fast.accelerate(openai_vit())
    with torch.no_grad():
        stays_fast(model, images)
        for block in tower(model).transformer.resblocks:
            block.attn_mask = torch.full((17, 17), -torch.inf).triu(1)
        got = falls_back(model, images, "transformer.resblocks.0 has an attention mask")
        clip_fast.restore(model)
        assert torch.equal(got, embeddings(model, images))


def test_a_zero_to_attend_to_that_comes_later_is_seen(images: Tensor) -> None:
    model = clip_fast.accelerate(openai_vit())
    with torch.no_grad():
        before = stays_fast(model, images)
        tower(model).transformer.resblocks[0].attn.add_zero_attn = True
        got = falls_back(model, images, "transformer.resblocks.0.attn attends to a zero as well")
    assert not close(got, before)


@pytest.mark.parametrize("how", ["replaced", "edited"])
def test_position_ids_that_change_are_seen(how: str, images: Tensor) -> None:
    model = clip_fast.accelerate(hugging_face())
    part: Any = tower(model).embeddings
    with torch.no_grad():
        before = stays_fast(model, images)
        order = part.position_ids.flip(-1).clone()
        if how == "replaced":
            part.position_ids = order
        else:
            part.position_ids.copy_(order)
        got = falls_back(model, images, "its position_ids are not in order")
        assert torch.equal(got, embeddings(clip_fast.restore(model), images))
    assert not close(got, before, 1e-2)


def test_positions_for_larger_images_are_the_originals_matter(images: Tensor) -> None:
    model: Any = clip_fast.accelerate(openai_vit())
    larger = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        stays_fast(model, images)
        with pytest.raises(ValueError, match=r"images must be \[batch, 3, 64, 64\]"):
            embeddings(model, larger)
        tower(model).positional_embedding = nn.Parameter(torch.randn(37, 128))
        got = falls_back(model, larger, r"positional_embedding is \[37, 128\], expected \[17, 128\]")
        assert torch.equal(got, embeddings(clip_fast.restore(model), larger))


def test_integers_are_floats_to_transformers(images: Tensor) -> None:
    model = hugging_face()
    numbers = (20 * images).long()
    with torch.no_grad():
        wanted = embeddings(model, numbers)
        clip_fast.accelerate(model)
        assert torch.equal(falls_back(model, numbers, "the images are integers"), wanted)


def _set(kind: type[nn.Module], **settings: object) -> Callable[[nn.Module], None]:
    """Changes settings of all modules of a class."""

    def change(part: nn.Module) -> None:
        for module in part.modules():
            if isinstance(module, kind):
                vars(module).update(settings)

    return change


def _reverse(part: Any) -> None:
    layers = part.transformer.resblocks if hasattr(part, "transformer") else part.encoder.layers
    modules = dict(layers._modules)
    layers._modules.clear()
    layers._modules.update(reversed(modules.items()))


SETTINGS: dict[str, tuple[Callable[[], nn.Module], Callable[[Any], None], str]] = {
    "padding mode": (openai_resnet, _set(nn.Conv2d, padding_mode="circular"), "conv1 is Conv2d.*expected"),
    "pool": (openai_resnet, _set(nn.AvgPool2d, kernel_size=1), "avgpool is AvgPool2d.*expected"),
    "divisor": (openai_resnet, _set(nn.AvgPool2d, divisor_override=1), "avgpool is AvgPool2d.*expected"),
    "norm of positions": (hugging_face, _set(nn.Embedding, max_norm=0.01), "its positions are renormalised"),
    "order": (open_clip_vit, _reverse, r"transformer.resblocks runs \['2', '1', '0'\]"),
    "order in transformers": (hugging_face, _reverse, r"encoder.layers runs \['2', '1', '0'\]"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_that_the_weights_do_not_tell(name: str, images: Tensor) -> None:
    """Refused where they are there at first, and seen where they come later."""
    make, change, why = SETTINGS[name]
    model = clip_fast.accelerate(make())
    with torch.no_grad():
        stays_fast(model, images)
        change(tower(model))
        got = falls_back(model, images, why)
        clip_fast.restore(model)
        assert torch.equal(got, embeddings(model, images))
    with pytest.raises(NotServed, match=why):
        clip_fast.accelerate(model)


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("wraps", [False, True], ids=["", "wraps"])
def test_a_classes_forward_that_is_replaced(
    make: Callable[[], nn.Module], wraps: bool, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also by a function that has taken the original's names."""
    model = clip_fast.accelerate(make())
    with torch.no_grad():
        stays_fast(model, images)
        kind: Any = next(
            type(module) for module in tower(model).modules() if re.search("MLP|Block|Bott", f"{type(module)}")
        )
        old = kind.forward
        new: Any = lambda *arguments, **options: 2 * old(*arguments, **options)  # noqa: E731
        monkeypatch.setattr(kind, "forward", functools.wraps(old)(new) if wraps else new)
        got = falls_back(model, images, "has its own forward")
        clip_fast.restore(model)
        assert torch.equal(got, embeddings(model, images))
        with pytest.raises(NotServed, match="has its own forward"):
            clip_fast.accelerate(model)
        monkeypatch.undo()
        before = embeddings(model, images)
        assert close(stays_fast(clip_fast.accelerate(model), images), before)
    assert not close(got, before, 1e-2)


@pytest.mark.parametrize("name", ["scale", "is_causal", "position_ids"])
def test_settings_of_transformers_that_are_not_clips(name: str, images: Tensor) -> None:
    model = hugging_face()
    if name == "position_ids":
        tower(model).embeddings.position_ids = tower(model).embeddings.position_ids.flip(-1)
    else:
        setattr(tower(model).encoder.layers[1].self_attn, name, {"scale": 1.0, "is_causal": True}[name])
    with pytest.raises(NotServed, match=r"position_ids are not in order|layers\.1\.self_attn is causal"):
        clip_fast.accelerate(model)


@pytest.mark.parametrize("make", [openai_vit, openai_resnet])
def test_an_optimiser_that_writes_to_data(make: Callable[[], nn.Module], images: Tensor) -> None:
    class Plain(torch.optim.Optimizer):
        def step(self, closure: object = None) -> None:  # type: ignore[override]
            for group in self.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        parameter.data.add_(parameter.grad, alpha=-0.1)

    model = clip_fast.accelerate(make())
    with torch.no_grad():
        before = stays_fast(model, images)
    embeddings(model.train(), images).square().sum().backward()
    Plain(model.parameters(), {}).step()
    with torch.no_grad():
        got = stays_fast(model.eval(), images)
        clip_fast.restore(model)
        assert close(got, embeddings(model, images))
        assert not close(got, before, 1e-4)


# --- changes since it was read ---------------------------------------------------------------------------------------


def _wrap(model: nn.Module) -> None:
    block = tower(model).transformer.resblocks[1].mlp
    block.c_fc = nn.Sequential(block.c_fc)


def _cut(model: nn.Module) -> None:
    part = tower(model)
    part.proj = nn.Parameter(part.proj[:, :32].detach())


def _quantise(model: nn.Module) -> None:
    """A weight whose values are not what they seem, as torchao's."""

    class Doubled(Tensor):
        pass

    layer = tower(model).transformer.resblocks[0].mlp.c_fc
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Doubled))


def _subclass(model: nn.Module) -> None:
    block = tower(model).transformer.resblocks[1]

    class Doubling(type(block)):
        def forward(self, *arguments: Any, **options: Any) -> Tensor:
            return 2 * super().forward(*arguments, **options)

    block.__class__ = Doubling


CHANGES: dict[str, tuple[Callable[[Any], object], str]] = {
    "a module in the place of another": (_wrap, "has no transformer.resblocks.1.mlp.c_fc.weight"),
    "a weight of another shape": (_cut, r"proj is \[128, 32\], expected \[128, 64\]"),
    "a weight of another class": (_quantise, "transformer.resblocks.0.mlp.c_fc.weight is a .*Doubled"),
    "no weight": (lambda model: setattr(tower(model), "proj", None), "the tower has no proj"),
    "no pool": (lambda model: setattr(tower(model), "pool_type", "none"), "pool_type is 'none'"),
    "a block's method": (
        lambda model: setattr(tower(model).transformer.resblocks[1], "attention", lambda *_, **__: 0),
        "transformer.resblocks.1 has its own attention",
    ),
    "a block's forward": (
        lambda model: setattr(tower(model).transformer.resblocks[1], "forward", lambda x, *_, **__: 2 * x),
        "transformer.resblocks.1 has its own forward",
    ),
    "another epsilon": (lambda model: setattr(tower(model).ln_pre, "eps", 0.1), "ln_pre has eps 0.1, expected 1e-05"),
    "another class": (_subclass, "transformer.resblocks.1 is a .*Doubling"),
    "an MLP that is none": (
        lambda model: setattr(tower(model).transformer.resblocks[1], "mlp", nn.Identity()),
        "its parts are not those that its class makes: 'Identity' object has no attribute",
    ),
    "a tower's method": (
        lambda model: setattr(tower(model), "_pool", lambda x: (x[:, 1], x[:, 1:])), "the tower has its own _pool"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("way", ["eager", "compiled"])
def test_a_change_is_seen(name: str, way: str, images: Tensor) -> None:
    """At the next call, and by a graph that was compiled before."""
    change, why = CHANGES[name]
    torch.compiler.reset()
    model = clip_fast.accelerate(open_clip_vit())

    def run(model: nn.Module, x: Tensor) -> Tensor:
        return function(x)

    function: Callable[[Tensor], Tensor] = lambda x: embeddings(model, x)  # noqa: E731
    if way == "compiled":
        function = torch.compile(function, backend="eager", fullgraph=True)
    with torch.no_grad():
        before = function(images)
        change(model)
        if (name, way) == ("no pool", "compiled"):  # results have other sizes, and nothing tells the graph
            changed = pytest.raises(RuntimeError, match=r"sizes \[64\] .* and has \[17, 64\] now: call torch.compiler.")
            with pytest.warns(UserWarning, match=why), changed:
                function(images)
            torch.compiler.reset()
            got = function(images)
        else:
            got = falls_back(model, images, why, run)
        clip_fast.restore(model)
        wanted = embeddings(model, images)
    assert close(got, wanted) if way == "compiled" else torch.equal(got, wanted)
    assert got.shape != before.shape or name.endswith("another class") or not torch.equal(got, before)


def test_a_copy_of_a_tower_whose_class_was_changed(images: Tensor) -> None:
    model = clip_fast.accelerate(openai_vit())
    nn.utils.parametrize.register_parametrization(tower(model), "proj", nn.Softplus())
    with torch.no_grad():
        wanted = embeddings(model, images)
        assert torch.equal(embeddings(copy.deepcopy(model), images), wanted)


def test_a_method_that_is_put_back_is_seen(images: Tensor) -> None:
    model = clip_fast.accelerate(open_clip_vit())
    block: Any = tower(model).transformer.resblocks[1]
    own = block.forward
    with torch.no_grad():
        block.forward = lambda *arguments, **options: own(*arguments, **options)
        falls_back(model, images, "has its own forward")
        block.forward = own  # as transformers 4 leaves it behind in SigLIP's layers
        fast = stays_fast(model, images)
        block.forward = lambda *arguments, **options: 2 * own(*arguments, **options)
        got = embeddings(model, images)
        assert not close(got, fast, 1e-2)
        assert torch.equal(got, embeddings(clip_fast.restore(model), images))


def test_weights_are_prepared_once_however_often_the_attention_is_switched(images: Tensor) -> None:
    """What is looked through anew and found the same keeps its engine."""
    model = clip_fast.accelerate(hugging_face())
    with torch.no_grad():
        stays_fast(model, images)
        forward: Any = Forward.of(tower(model))
        engine, _ = forward._look()
        model.set_attn_implementation("eager")
        assert forward._look()[0] is engine


def test_raw_pixels_reach_the_original_as_floats() -> None:
    """In the dtype of the first convolution, which not all weights have."""
    model: Any = open_clip_vit().bfloat16()
    tower(model).class_embedding.data = tower(model).class_embedding.data.float()
    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    clip_fast.accelerate(model)
    with torch.no_grad():
        before = stays_fast(model, pixels)
        inner(model).register_forward_hook(lambda *_: None)
        got = falls_back(model, pixels, "hooks")
        assert close(got, before, 0.05)
        assert torch.equal(got, embeddings(model, pixels.permute(0, 2, 3, 1)))


def test_a_warning_points_at_the_users_line(images: Tensor) -> None:
    for make in MODELS:
        model = clip_fast.accelerate(make())
        with pytest.warns(UserWarning, match="gradients") as caught:
            embeddings(model, images)
        assert [str(each.filename).rpartition("/")[2] for each in caught] == ["peers.py"]


# --- compiled graphs -------------------------------------------------------------------------------------------------


def image_encoder() -> nn.Module:
    config = VitConfig(image_size=64, patch_size=16, width=128, layers=2, heads=2, embed_dim=64)
    state = {name: tensor.detach() for name, tensor in random_tower(config).state_dict().items()}
    return clip_fast.ImageEncoder(config, state, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("make", [*MODELS, image_encoder])
@pytest.mark.parametrize("grad", ["no_grad", "frozen", "trainable"])
def test_compiled_without_a_graph_break(make: Callable[[], nn.Module], grad: str, images: Tensor) -> None:
    torch.compiler.reset()
    model = clip_fast.accelerate(make()).requires_grad_(grad == "trainable")
    with torch.no_grad():
        wanted = stays_fast(model, images)
    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
        graphs.append(str(graph.graph))
        return graph.forward

    compiled = torch.compile(lambda x: 2 * embeddings(model, x), backend=backend, fullgraph=True)
    with torch.set_grad_enabled(grad != "no_grad"):
        got = compiled(images)
        assert got.requires_grad == (grad == "trainable")
        assert close(got, 2 * wanted)
    assert len(graphs) == 1
    assert ("clip_fast" in graphs[0]) == (grad != "trainable")


@pytest.mark.parametrize("make", MODELS)
def test_compiled_by_aot_autograd(make: Callable[[], nn.Module], images: Tensor) -> None:
    """With shapes from the fake kernel, and for batches of any size."""
    torch.compiler.reset()
    model = clip_fast.accelerate(make())
    compiled = torch.compile(lambda x: embeddings(model, x), backend="aot_eager", fullgraph=True, dynamic=True)
    with torch.no_grad():
        for count in (3, 2):
            assert close(compiled(images[:count]), stays_fast(model, images[:count]))


def test_hidden_states_compiled(images: Tensor) -> None:
    torch.compiler.reset()
    model = clip_fast.accelerate(hugging_face())
    with torch.no_grad():
        wanted = model(images, output_hidden_states=True).hidden_states
        compiled = torch.compile(
            lambda x: model(x, output_hidden_states=True).hidden_states, backend="eager", fullgraph=True
        )
        assert all(map(close, compiled(images), wanted))
        inner(model).register_forward_hook(lambda *_: None)
        assert all(map(close, falls_back(model, images, "hooks", lambda m, x: compiled(x)), wanted))


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_under_autocast(make: Callable[[], nn.Module], backend: str, images: Tensor) -> None:
    """In autocast's precision, though no call before was under autocast, and though AOTAutograd turns it off."""
    torch.compiler.reset()
    model = clip_fast.accelerate(make())
    compiled = torch.compile(lambda x: embeddings(model, x), backend=backend, fullgraph=True)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16), warnings.catch_warnings():
            warnings.filterwarnings("error", message="the original forward")
            got = compiled(images)
            wanted = embeddings(model, images)
        assert got.dtype == torch.bfloat16
        assert close(got, wanted, 1e-2)
        assert not close(got.float(), embeddings(model, images), 1e-4)


@pytest.mark.parametrize("make", [openai_resnet, lambda: hugging_face(attention_dropout=0.5)], ids=["norms", "dropout"])
def test_compiled_and_then_trained(make: Callable[[], nn.Module], images: Tensor) -> None:
    torch.compiler.reset()
    model = clip_fast.accelerate(make())
    compiled = torch.compile(lambda x: embeddings(model, x), backend="eager", fullgraph=True)
    with torch.no_grad():
        before = compiled(images)
        model.train()
        got = falls_back(model, images, "in training mode", lambda m, x: compiled(x))
        assert not close(got, before, 1e-3)


def test_compiled_and_then_hooked(images: Tensor) -> None:
    """The hook's effect is in the result."""
    torch.compiler.reset()
    model = clip_fast.accelerate(openai_vit())
    compiled = torch.compile(lambda x: embeddings(model, x), backend="eager", fullgraph=True)
    with torch.no_grad():
        assert compiled(images).any()
        tower(model).ln_post.register_forward_hook(lambda module, inputs, output: output * 0)
        assert not falls_back(model, images, "hooks", lambda m, x: compiled(x)).any()


@pytest.mark.parametrize("when", ["before it is compiled", "after"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "frozen"])
def test_compiled_with_a_projection_of_another_size(when: str, backend: str, grad: bool, images: Tensor) -> None:
    """A graph has the sizes of results for constants."""
    torch.compiler.reset()
    model: Any = clip_fast.accelerate(open_clip_vit()).requires_grad_(False)

    def mean(x: Tensor) -> Tensor:
        results = embeddings(model, x)
        return results.sum(-1) / results.shape[-1]

    compiled = torch.compile(mean, backend=backend, fullgraph=True)
    with torch.set_grad_enabled(grad):
        if when == "after":
            assert close(compiled(images), mean(images))
        tower(model).proj = nn.Parameter(torch.randn(128, 32), requires_grad=False)
        got = falls_back(model, images, r"proj is \[128, 32\]", lambda m, x: compiled(x))
        clip_fast.restore(model)
        assert close(got, mean(images))


def test_compiled_and_then_without_layers(images: Tensor) -> None:
    """Nothing in the graph tells that there are fewer results."""
    torch.compiler.reset()
    model: Any = clip_fast.accelerate(hugging_face())
    compiled = torch.compile(lambda x: model(x, output_hidden_states=True).hidden_states, backend="aot_eager")
    with torch.no_grad():
        count = len(compiled(images))
        part = tower(model).encoder
        part.layers = part.layers[:-1]
        with pytest.raises(RuntimeError, match=r"was changed.* call torch\.compiler\.reset\(\)"):
            compiled(images)
        torch.compiler.reset()
        assert len(compiled(images)) == count - 1


def test_compiled_and_then_accelerated_anew(images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "multiplies_fast", lambda dtype: True)
    torch.compiler.reset()
    model = clip_fast.accelerate(openai_vit())
    compiled = torch.compile(lambda x: embeddings(model, x), backend="eager", fullgraph=True)
    with torch.no_grad():
        before = compiled(images)
        clip_fast.accelerate(model, precision="bf16")
        assert torch.equal(compiled(images), embeddings(model, images))
        assert not close(compiled(images), before, 1e-4)
        clip_fast.restore(model)
        assert torch.equal(compiled(images), embeddings(model, images))


def test_what_an_engine_refuses_in_a_call(images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: Any) -> None:
        raise NotServed("not today")

    model = clip_fast.accelerate(hugging_face())
    with torch.no_grad():
        before = stays_fast(model, images)
        monkeypatch.setattr(Engine, "run", run)
        assert close(falls_back(copy.deepcopy(model), images, "not today"), before)
        assert why_original(tower(model), images) == "not today"


# --- what other libraries do to modules and classes ------------------------------------------------------------------


class Adapter(nn.Module):
    """As peft's: around a module, to whose weights it is added in the end."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base


@pytest.mark.parametrize("make", MODELS)
def test_adapters_that_came_and_went_between_two_calls(make: Callable[[], nn.Module], images: Tensor) -> None:
    """The module that is put back is the old one, with an old version of a weight that is new."""
    model = clip_fast.accelerate(make())
    name, module = next((n, m) for n, m in tower(model).named_modules() if m is inner(model))
    parent, leaf = tower(model).get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
    with torch.no_grad():
        before = stays_fast(model, images)
        setattr(parent, leaf, Adapter(module))
        module.weight.data += 10 * torch.randn_like(module.weight)  # a ResNet's keys matter little
        setattr(parent, leaf, module)
        after = stays_fast(model, images)
        assert not close(after, before, 1e-3)
        assert close(after, embeddings(clip_fast.restore(model), images))


def test_graphs_of_others_know_nothing_of_our_towers(images: Tensor) -> None:
    """Though a module is made in them, of which we are told."""
    torch.compiler.reset()
    blocks = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])
    counter = CompileCounter()

    @torch.compile(backend=counter, fullgraph=True)
    def first_two(x: Tensor) -> Tensor:
        for block in blocks[:2]:
            x = block(x)
        return x

    model = clip_fast.accelerate(openai_vit())
    for _ in range(2):
        first_two(torch.randn(2, 8))
        tower(model).ln_post = tower(model).ln_post
        with torch.no_grad():
            stays_fast(clip_fast.accelerate(openai_vit()), images)
    assert counter.frame_count == 1


def test_modules_of_others_that_have_no_hash(images: Tensor) -> None:
    with torch.no_grad():
        stays_fast(clip_fast.accelerate(openai_vit()), images)

    class Unhashable(nn.Module):
        __hash__ = None  # type: ignore[assignment]

    Unhashable().inner = nn.Linear(2, 2)


class Sharded(Tensor):
    """As FSDP's shards are to optimisers."""


def test_steps_of_sharded_weights_are_seen(images: Tensor) -> None:
    """What is gathered from shards lies in the memory of the tensors before, whose versions stay."""
    model = clip_fast.accelerate(openai_vit())
    shard = torch.ones(2).as_subclass(Sharded).requires_grad_()
    optimizer = torch.optim.SGD([shard], lr=0.1)
    with torch.no_grad():
        before = stays_fast(model, images)
    parameters, gathered = inner(model)._parameters, inner(model).weight
    gathered.data += 0.1 * torch.randn_like(gathered)
    shard.grad = torch.ones_like(shard)
    parameters["weight"] = shard  # type: ignore[assignment]
    optimizer.step()
    parameters["weight"] = gathered
    with torch.no_grad():
        after = stays_fast(model, images)
        assert not close(after, before, 1e-3)
        assert close(after, embeddings(clip_fast.restore(model), images))


def test_steps_of_others_sharded_weights_are_nothing_to_a_tower(
    images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A frozen tower within a model in training is not prepared at every step."""
    model = clip_fast.accelerate(openai_vit())
    prepared: list[Engine] = []
    prepare = Engine._prepare
    monkeypatch.setattr(Engine, "_prepare", lambda engine: (prepared.append(engine), prepare(engine))[1])
    shard = torch.ones(2).as_subclass(Sharded).requires_grad_()
    optimizer = torch.optim.SGD([shard], lr=0.1)
    for _ in range(3):
        with torch.no_grad():
            stays_fast(model, images)
        shard.grad = torch.ones_like(shard)
        optimizer.step()
    assert len(prepared) == 1


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("part", ["tower", "inside"])
def test_classes_with_methods_of_others(
    make: Callable[[], nn.Module], part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make()
    classes = [type(m) for m in tower(model).modules() if m is tower(model) or type(m).__module__.startswith("torch.")]
    patched = classes[0 if part == "tower" else -1]

    def forward(self: nn.Module, *_: Any, **options: Any) -> None:
        """Something else."""

    monkeypatch.setattr(patched, "forward", forward)
    with pytest.raises(NotServed, match="has its own forward"):
        clip_fast.accelerate(model)


def test_a_causal_configuration_of_transformers(images: Tensor) -> None:
    model = clip_fast.accelerate(hugging_face())
    with torch.no_grad():
        stays_fast(model, images)
        tower(model).config.is_causal = True
        got = falls_back(model, images, "is_causal")
        assert close(got, embeddings(clip_fast.restore(model), images))


def test_releases_of_open_clip_that_pool_otherwise() -> None:
    model = open_clip_vit()
    del tower(model).final_ln_after_pool
    with pytest.raises(NotServed, match="too old"):
        clip_fast.accelerate(model)


@pytest.mark.parametrize("make", MODELS)
def test_a_forward_around_ours_is_not_ours(make: Callable[[], nn.Module], images: Tensor) -> None:
    """As `accelerate`'s hooks make one, with all attributes of the forward that it calls."""
    visual = tower(clip_fast.accelerate(make()))
    ours = visual.forward
    visual.forward = functools.update_wrapper(functools.partial(ours), ours)
    assert Forward.of(visual) is None
    with torch.no_grad():
        assert visual(images) is not None


@pytest.mark.parametrize("make", MODELS)
def test_forward_bound_to_the_tower_once_more(make: Callable[[], nn.Module], images: Tensor) -> None:
    """As `accelerate`'s `Accelerator.prepare` does with methods."""
    model = clip_fast.accelerate(make())
    visual = tower(model)
    method = visual.forward.__func__.__get__(visual) if hasattr(visual.forward, "__func__") else visual.forward
    with torch.no_grad():
        before = stays_fast(model, images)
        visual.forward = lambda *given, **options: method(*given, **options)
        assert close(embeddings(model, images), before)


@pytest.mark.parametrize("make", MODELS)
def test_copies_and_pickles_of_a_compiled_tower(make: Callable[[], nn.Module], images: Tensor) -> None:
    torch.compiler.reset()
    model = clip_fast.accelerate(make())
    tower(model).compile(backend="eager")
    with torch.no_grad():
        before = embeddings(model, images)
        for copied in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
            inner(copied).weight.mul_(100)
            assert not close(embeddings(copied, images), before, 1e-3)
            assert close(embeddings(copied, images), embeddings(clip_fast.restore(copied), images))
        assert torch.equal(embeddings(model, images), before)


def test_accelerated_anew_a_tower_keeps_its_name() -> None:
    """By which compiled graphs know it; another would have them compiled again."""
    model = clip_fast.accelerate(openai_vit())
    before = Forward.of(tower(model))
    assert before is not None
    assert Forward.of(tower(clip_fast.accelerate(model))) is before
    assert Forward.of(tower(clip_fast.accelerate(model, precision="bf16"))) is not before


def test_traces_of_real_values_stand_on_their_own(images: Tensor) -> None:
    """Prepared weights would stay as they are now."""
    model = clip_fast.accelerate(openai_vit())
    with torch.no_grad():
        stays_fast(model, images)
        graph = make_fx(lambda x: embeddings(model, x))(images)
        inner(model).weight.mul_(2)
        assert close(graph(images), stays_fast(model, images))
