"""The hooks that follow weights: they are installed while a tower lives, and go with the last one."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch
from peers import open_clip_vit
from torch import nn
from torch.nn.modules.module import _global_module_registration_hooks
from torch.optim.optimizer import _global_optimizer_post_hooks

import clip_fast
from clip_fast.engine import changes


def installed() -> tuple[int, int]:
    """The numbers of our hooks on optimisers' steps and on registered modules."""
    steps, modules = _global_optimizer_post_hooks.values(), _global_module_registration_hooks.values()
    counted = [sum(getattr(hook, "__self__", None) is changes._hooks for hook in hooks) for hooks in (steps, modules)]
    return counted[0], counted[1]


@pytest.fixture(autouse=True)
def _no_towers() -> Iterator[None]:
    """No tower lives before and after a test. A test is skipped if another one holds a tower."""
    gc.collect()
    if installed() != (0, 0):
        pytest.skip("another test of this process holds a tower")
    yield
    gc.collect()
    assert installed() == (0, 0)


def test_hooks_live_as_long_as_the_last_tower() -> None:
    first, _ = clip_fast.load("tiny-digits", "cpu")
    second, _ = clip_fast.load("tiny-digits", "cpu")
    assert installed() == (1, 1)
    del first
    assert installed() == (1, 1)
    del second
    assert installed() == (0, 0)
    clip_fast.load("tiny-digits", "cpu")
    assert installed() == (0, 0)


def test_an_accelerated_model_takes_its_hooks_along() -> None:
    model = clip_fast.accelerate(open_clip_vit())
    assert installed() == (1, 1)
    del model
    gc.collect()  # the model refers to itself
    assert installed() == (0, 0)


def test_a_step_counts_where_there_is_a_gradient() -> None:
    """PyTorch refuses to differentiate through a weight that has a new version."""
    model = open_clip_vit()
    prompt = nn.Parameter(torch.zeros(1, 3, 64, 64))
    clip_fast.accelerate(model.requires_grad_(False))
    optimizer = torch.optim.SGD([*model.parameters(), prompt], lr=0.1)
    versions = [parameter._version for parameter in model.parameters()]
    results = model.encode_image(torch.randn(2, 3, 64, 64) + prompt)
    results.sum().backward(retain_graph=True)
    optimizer.step()
    results.square().sum().backward()
    assert prompt.grad is not None
    assert [parameter._version for parameter in model.parameters()] == versions


def test_a_step_on_a_flat_tensor_counts_for_its_views() -> None:
    model = open_clip_vit()
    weights = list(model.visual.parameters())
    flat = nn.Parameter(torch.cat([weight.detach().flatten() for weight in weights]))
    for weight, part in zip(weights, flat.detach().split([weight.numel() for weight in weights]), strict=True):
        weight.data = part.view_as(weight)
    images = torch.randn(2, 3, 64, 64)
    clip_fast.accelerate(model)
    optimizer = torch.optim.AdamW([flat], lr=0.01)
    flat.grad = torch.randn_like(flat)
    with torch.no_grad():
        before = model.encode_image(images)
        optimizer.step()
        got = model.encode_image(images)
        wanted = clip_fast.restore(model).encode_image(images)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    assert (got - before).norm() > 1e-2 * before.norm()


def test_a_tower_that_goes_while_hooks_are_called_leaves_them_be() -> None:
    """PyTorch is iterating over its hooks at that moment, and raises an exception if they change."""
    held: list[object] = [clip_fast.load("tiny-digits", "cpu")[0]]
    weight = nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    optimizer = torch.optim.SGD([weight], lr=0.1)
    handle = optimizer.register_step_post_hook(lambda *_: held.clear())
    optimizer.step()
    handle.remove()
    assert installed() == (1, 1)  # they stay until the next tower is gone
    clip_fast.load("tiny-digits", "cpu")
    assert installed() == (0, 0)
