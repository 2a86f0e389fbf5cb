"""The `forward` of an accelerated tower: by an engine, or by the tower's class where that does not serve.

`engine.route` judges at every call which of the two runs. This file has the tower's side of it: what the tower is now,
what a call asks for, and how the original computes it.
"""

from __future__ import annotations

import functools
import inspect
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn

from .. import pytorch
from ..engine import route
from ..engine.compiled import register
from ..engine.engine import Engine
from ..engine.tower import Tower, Watch
from ..errors import NotServed
from ..towers.config import (
    ENCODE,
    ENCODE_TOKENS,
    HIDDEN_STATES,
    IMAGE_MEAN,
    IMAGE_STD,
    SIGLIP_MEAN,
    SIGLIP_STD,
    Rgb,
    Task,
    hidden_state,
)
from ..towers.fast import Results, as_tuple, normalised
from ..towers.precision import PrecisionName
from . import instance, served

_AUTOCAST: dict[torch.dtype, PrecisionName] = {torch.float16: "fp16", torch.bfloat16: "bf16"}
_DTYPES = {"": None, "fp16": torch.float16, "bf16": torch.bfloat16}  # as compiled graphs name autocast's
_INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64)
_METADATA = ("__module__", "__name__", "__qualname__", "__doc__", "__annotations__")  # of a function, for people
_UNREAD = frozenset(  # options for a language model or a loss, which models around a tower hand down to it
    ["num_items_in_batch", "use_cache", "cache_position", "logits_to_keep", "output_router_logits", "return_loss"]
)


@dataclass(frozen=True)
class _Reading:
    """What a look through the tower found."""

    watch: Watch
    stamp: object  # changes when anything that `served.read` looked at changes, apart from what the watch sees
    in_training: tuple[nn.Module, ...]  # modules that may compute something else in training mode
    engine: Engine | None  # without autocast; None where there is a problem
    problem: str | None
    engines: dict[PrecisionName, Engine] = field(default_factory=dict[PrecisionName, Engine])  # under autocast


class Forward:
    """Replaces a tower's `forward`. Computes in `precision`, by default that of the weights or, under autocast, in
    autocast's.
    """

    def __init__(self, tower: nn.Module, precision: PrecisionName | None, cuda_graphs: bool) -> None:
        self.tower: Any = tower
        self._precision: PrecisionName | None = precision
        self._cuda_graphs = cuda_graphs
        self._last: _Reading | None = None
        self._warned: set[str] = set()
        named = inspect.signature(cast(Any, type(tower)).forward).parameters.values()
        positional = tuple(p.name for p in named if p.kind is p.POSITIONAL_OR_KEYWORD)
        self._named = positional[2:]  # behind self and the images
        self._takes_any_option = any(p.kind is p.VAR_KEYWORD for p in named)
        # In late releases of transformers 4 the model around SigLIP's tower collects hidden states, and makes tuples.
        self._is_inside = served.is_inside_siglip(tower) and self._takes_any_option
        self._attached: Callable[..., Any] | None = None
        self._name = register(self)

    def attach(self) -> None:
        method: Callable[..., Any] = self.embeddings if served.gives_embeddings(self.tower) else self.hidden_states

        def forward(*arguments: Any, **options: Any) -> Any:  # no method: accelerate would bind it to the tower
            return method(*arguments, **options)

        original = MethodType(cast(Any, type(self.tower)).forward, self.tower)
        functools.update_wrapper(forward, original, assigned=_METADATA, updated=())
        forward.__signature__ = inspect.signature(original)  # pyright: ignore[reportFunctionMemberAccess]
        del forward.__wrapped__  # pyright: ignore[reportFunctionMemberAccess]  # others unwrap and call what they find
        self._attached = forward
        methods: dict[str, Callable[..., Any]] = {"forward": forward, "__getstate__": self._state}
        instance.attach(self.tower, methods, self._attach_to_copy)

    @staticmethod
    def of(tower: nn.Module) -> Forward | None:
        """The `Forward` that is attached to a tower, if one is."""
        own = vars(tower)
        owner = getattr(own.get("__getstate__"), "__self__", None)
        return owner if isinstance(owner, Forward) and own.get("forward") is owner._attached else None

    @property
    def device(self) -> torch.device:
        return served.weight(self.tower).device

    def has(self, precision: PrecisionName | None, cuda_graphs: bool) -> bool:
        """Whether it has these settings."""
        return (self._precision, self._cuda_graphs) == (precision, cuda_graphs)

    def _attach_to_copy(self, tower: nn.Module) -> None:
        if not served.is_tower(tower):  # its class was changed, as by a parametrisation: it stays the original
            return
        forward = Forward(tower, self._precision, self._cuda_graphs)
        forward.read()
        forward.attach()

    def _state(self) -> dict[str, Any]:
        """The original's state, for pickles."""
        name = type(self.tower).__qualname__
        warnings.warn(
            f"a pickle of an accelerated {name} is the original, as it is in the processes that pickles are sent to: "
            "call clip_fast.accelerate on it there",
            stacklevel=route.users_level(),
        )
        return instance.state(self.tower)

    def embeddings(self, x: Tensor, *more: Any, **options: Any) -> Tensor | tuple[Tensor, Tensor]:
        """For openai-clip and open_clip: (B, 3, H, W) -> (B, E), and the patch tokens where open_clip is asked for.

        timm's tower takes masks too, with which only the original computes.
        """
        if more or options:
            return self._original(x, *more, **options)
        with_tokens = getattr(self.tower, "output_tokens", False)
        results = self._routed(x, ENCODE_TOKENS if with_tokens else ENCODE)
        if results is None:
            return self._original(x)
        dtype = _autocast_dtype(results[0].device) or results[0].dtype
        embeddings = results[0].to(dtype)
        return (embeddings, results[1].to(dtype)) if with_tokens else embeddings

    def hidden_states(self, pixel_values: Tensor | None = None, *more: Any, **options: Any) -> Any:
        """For transformers: (B, 3, H, W) -> what the tower returns; its projection is outside of it."""
        given = dict(zip(self._named, more, strict=False))
        twice = any(name in options for name in given)
        if pixel_values is None or len(given) < len(more) or twice or not all(map(self._takes, options)):
            return self._original(pixel_values, *more, **options)  # raises the error of such a call
        options |= given
        asked = self._setting(options, "output_hidden_states")
        if self._is_inside and (asked or self._setting(options, "output_attentions")):
            self._warn("hidden states or attention weights are asked for, which transformers 4 takes from the layers")
            return self._original(pixel_values, **options)  # the layers have other forwards while this call lasts
        task = HIDDEN_STATES if asked else self.task
        results = self._routed(pixel_values, task, self._not_served(pixel_values, options))
        if results is None:
            return self._original(pixel_values, **options)
        pooled, last = self._pooled(results, all_states=bool(asked))
        output = _output_class()(
            last_hidden_state=last,
            pooler_output=pooled,
            hidden_states=_chosen(results, asked) if asked else None,
        )
        takes = self._takes("return_dict") and not self._is_inside
        wants_tuple = takes and self._setting(options, "return_dict") is False
        return output.to_tuple() if wants_tuple else output

    def _pooled(self, results: Results, all_states: bool) -> tuple[Tensor, Tensor]:
        """A transformers tower's pooled and last hidden state: CLIP's last is before its LayerNorm, SigLIP's after."""
        tower = self.tower
        if not served.is_siglip(tower):
            return tower.post_layernorm(results[-1][:, 0]), results[-1]
        if not all_states:
            pooled = results[0]
            return pooled.to(_autocast_dtype(pooled.device) or pooled.dtype), results[1]  # the head is all products
        last = tower.post_layernorm(results[-1])
        return tower.head(last), last

    def _takes(self, option: str) -> bool:
        """Whether the tower's own forward knows an option. In some releases only the model around it does."""
        return self._takes_any_option or option in self._named

    def _setting(self, options: Mapping[str, Any], name: str) -> Any:
        """The value of a setting in a call of a transformers tower, or else in its configuration."""
        value = options.get(name)
        if value is None and (name not in options or name in self._named):
            # transformers 5 takes it through `**kwargs`, where an explicit None stays None.
            return getattr(self.tower.config, name, None)
        return value

    def _not_served(self, images: Tensor, options: Mapping[str, Any]) -> str | None:
        """The part of a call of a transformers tower that only the original can answer."""
        if isinstance(images, Tensor) and images.dtype in _INTEGERS:  # pyright: ignore[reportUnnecessaryIsInstance]
            return "the images are integers, which transformers takes for floats"
        if self._setting(options, "output_attentions"):
            return "attention weights are asked for"
        if getattr(self.tower.config, "is_causal", None):
            return "its config says is_causal"
        if options.get("interpolate_pos_encoding"):
            return "positional encodings are to be interpolated, which transformers does in its own way"
        asked = self._setting(options, "output_hidden_states")
        if not (asked is None or isinstance(asked, bool) or (_selects_layers() and _layers(asked) is not None)):
            return f"output_hidden_states is {asked!r}"
        known = {"output_attentions", "output_hidden_states", "interpolate_pos_encoding", "return_dict"} | _UNREAD
        others = [name for name, value in options.items() if name not in known and value is not None]
        return f"{others[0]} is given" if others else None

    # --- which way a call goes, see `engine.route` -------------------------------------------------------------------

    @property
    def task(self) -> Task:
        """The task whose results a tower returns unless it is asked for more."""
        if served.gives_embeddings(self.tower):
            return ENCODE
        return ENCODE_TOKENS if served.is_siglip(self.tower) else hidden_state(len(self.tower.encoder.layers))

    def _routed(self, images: Tensor, task: Task, asked: str | None = None) -> Results | None:
        """A task's results; None where the original forward must give them."""
        results = route.route(self, images, task, asked)
        if not isinstance(results, str):
            return results
        if results not in route.SILENT and not (results == route.GRADIENTS and self.tower.training):
            self._warn(results)
        return None

    def _warn(self, reason: str) -> None:
        if reason not in self._warned:
            self._warned.add(reason)
            name = type(self.tower).__qualname__
            message = f"the original forward of {name} runs, not clip_fast's: {reason}"
            warnings.warn(message, stacklevel=route.users_level())

    def _look(self) -> tuple[Engine | None, str | None]:
        reading = self._reading()
        return self._engine_of(reading), self._problem(reading)

    def _engine_of(self, reading: _Reading) -> Engine | None:
        """The engine in the precision of this call: autocast's, unless `accelerate` was given one."""
        engine = reading.engine
        if engine is None or self._precision is not None or engine.tower.weight().is_meta:
            return engine
        precision = _AUTOCAST.get(_autocast_dtype(engine.device) or torch.float32)
        if precision is None or engine.in_double:
            return engine
        if precision not in reading.engines:
            reading.engines.setdefault(precision, self._new_engine(engine.tower, precision))
        return reading.engines[precision]

    def _traced_engine(self) -> Engine | None:
        return None if self._last is None else self._last.engine

    def _problem(self, reading: _Reading) -> str | None:
        if reading.engine is None:
            return reading.problem
        if reading.watch.hooked() or pytorch.has_global_hook():
            return "hooks are registered inside the tower"
        if any(module.training and served.acts_otherwise_in_training(module) for module in reading.in_training):
            return "the tower is in training mode, with dropout or batch norms"
        return None

    def _autocast(self) -> str:
        dtype = _autocast_dtype(served.weight(self.tower).device)
        return _AUTOCAST.get(dtype, "") if dtype is not None else ""

    def _run_in_graph(self, images: Tensor, task: Task, autocast: str) -> Results:
        """A task's results when a graph runs. Gradients are not wanted: such a graph would have the original in it."""
        dtype = _DTYPES[autocast]
        with torch.no_grad(), torch.autocast(images.device.type, dtype, enabled=dtype is not None):
            results = self._routed(images, task)
            if results is not None:
                return results
            if served.gives_embeddings(self.tower):
                results = as_tuple(self._original(images))
            else:
                all_states = task == HIDDEN_STATES
                options = {"return_dict": True} if self._takes("return_dict") else {}
                output = self._original(images, output_hidden_states=all_states, **options)
                pooled = (output.pooler_output,) if task == ENCODE_TOKENS else ()
                results = output.hidden_states if all_states else (*pooled, output.last_hidden_state)
            weight = served.weight(self.tower)
            return tuple(result.to(weight.dtype).contiguous() for result in results)

    def _without_values(self, images: Tensor, task: Task) -> Results:
        assert self._last is not None
        assert self._last.engine is not None
        return self._last.engine.without_values(images, task)

    # --- what is in the tower ----------------------------------------------------------------------------------------

    def read(self) -> str | None:
        """Reads the tower again, and returns why it is not served, or None."""
        self._last = None
        return self._reading().problem

    def _reading(self) -> _Reading:
        """The last reading, or a new one where a module, a method or a setting has been replaced since."""
        last = self._last
        if last is None or last.stamp != self._stamp(last) or last.watch.replaced():
            self._last = last = self._read(last)
        return last

    def _stamp(self, reading: _Reading) -> object:
        modules = tuple(map(type, reading.watch.modules)), reading.watch.state()
        settings = served.attention_setting(self.tower), self._normalisation()
        if reading.engine is not None:
            return modules, instance.count(self.tower), settings
        values = chain.from_iterable(vars(module).values() for module in reading.watch.modules)
        return modules, instance.count(self.tower), settings, tuple(map(id, values))  # a method may be put back

    def _read(self, last: _Reading | None) -> _Reading:
        watch = Watch(self.tower, served.JUDGED)
        engine, problem = None, None
        try:
            tower = served.read(self.tower)
        except NotServed as error:
            problem = str(error)
        else:
            engine = self._new_engine(tower, self._precision)
        in_training = tuple(filter(served.may_act_otherwise_in_training, watch.modules))
        reading = _Reading(watch, None, in_training, engine, problem)
        reading = replace(reading, stamp=self._stamp(reading))
        if last is None or last.engine is None or engine is None:
            return reading
        same = last.watch.modules == watch.modules and last.engine.config == engine.config
        same = same and (last.engine.mean, last.engine.std) == (engine.mean, engine.std)
        return replace(reading, engine=last.engine, engines=last.engines) if same else reading

    def _new_engine(self, tower: Tower, precision: PrecisionName | None) -> Engine:
        mean, std = self._normalisation()
        return Engine(tower, precision=precision, mean=mean, std=std, cuda_graphs=self._cuda_graphs)

    def _normalisation(self) -> tuple[Rgb, Rgb]:
        """Mean and deviation for raw pixels: open_clip's towers know their own."""
        if served.is_siglip(self.tower):
            return SIGLIP_MEAN, SIGLIP_STD
        mean, std = (getattr(self.tower, name, None) for name in ("image_mean", "image_std"))
        return (tuple(mean), tuple(std)) if mean and std else (IMAGE_MEAN, IMAGE_STD)  # pyright: ignore[reportReturnType]

    # --- the original ------------------------------------------------------------------------------------------------

    def _original(self, images: Tensor | None, *more: Any, **options: Any) -> Any:
        """The results of the tower's class, which takes floats."""
        forward: Callable[..., Any] = cast(Any, type(self.tower)).forward
        return forward(self.tower, images if images is None else self._floats(images), *more, **options)

    def _floats(self, images: Tensor) -> Tensor:
        if isinstance(images, torch.fx.Proxy) or images.dtype != torch.uint8:
            return images
        if images.ndim == 4 and images.shape[-1] == 3 and images.shape[1] != 3:
            images = images.permute(0, 3, 1, 2)
        weight = served.weight(self.tower)
        return normalised(images.to(weight.device), weight.dtype, *self._normalisation())


def _autocast_dtype(device: torch.device) -> torch.dtype | None:
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def _selects_layers() -> bool:
    """Whether this release of transformers takes numbers of layers for `output_hidden_states`, as of 5.24."""
    utils: Any = sys.modules["transformers.utils"]  # imported, since the tower is one of transformers' modules
    return hasattr(getattr(utils, "output_capturing", None), "selected_hidden_states")


def _layers(asked: object) -> list[int] | None:
    """The layers that `output_hidden_states` names by their numbers; None where it is anything else."""
    numbers: list[object] = [*asked] if isinstance(asked, list | tuple) else [asked]
    layers = [number for number in numbers if isinstance(number, int)]
    return layers if len(layers) == len(numbers) else None


def _chosen(states: Results, asked: object) -> tuple[Tensor | None, ...]:
    """The hidden states that are asked for, and None in the place of each other, as transformers has it."""
    if asked is True:
        return states
    count = len(states)
    chosen = {number % count for number in _layers(asked) or () if -count <= number < count}
    return tuple(state if layer in chosen else None for layer, state in enumerate(states))


def _output_class() -> Any:
    from transformers.modeling_outputs import (
        BaseModelOutputWithPooling,  # installed, since the tower is one of its modules
    )

    return BaseModelOutputWithPooling
