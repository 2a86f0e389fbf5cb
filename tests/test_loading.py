"""What type checkers are told of `load`."""

from __future__ import annotations

import inspect
from typing import get_args, get_overloads, get_type_hints

import clip_fast
from clip_fast.checkpoint.published import OPENAI_MODELS, OpenAiName


def test_openai_name_lists_openais_models() -> None:
    assert get_args(OpenAiName) == tuple(OPENAI_MODELS)


def test_overloads_have_loads_own_parameters() -> None:
    own = inspect.signature(clip_fast.load).parameters
    overloads = get_overloads(clip_fast.load)
    for overload in overloads:
        stated = inspect.signature(overload).parameters
        assert [(p.name, p.kind) for p in stated.values()] == [(p.name, p.kind) for p in own.values()]
        assert all(stated[name].annotation == own[name].annotation for name in own if name != "name")
        assert [name for name in own if stated[name].default is ...] == list(own)[1:]


def test_openais_names_give_a_clip_and_other_names_an_image_encoder() -> None:
    by_name, by_any = get_overloads(clip_fast.load)
    assert get_type_hints(by_name)["name"] == OpenAiName
    assert get_args(get_type_hints(by_name)["return"]) == (clip_fast.Clip, clip_fast.Preprocess)
    assert get_args(get_type_hints(by_any)["return"]) == (clip_fast.ImageEncoder, clip_fast.Preprocess)
