"""The `forward` of an accelerated tower: by an engine, or by the tower's class where that does not serve.

It is judged at every call: weights, modules, their methods, hooks and modes may all have changed since the last. In a
graph of torch.compile the whole judgement is one operator's, made when the graph runs.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook  # pyright: ignore[reportPrivateUsage]

from . import instance, towers
from .config import IMAGE_MEAN, IMAGE_STD, Rgb
from .engine import (
    Engine,
    NotServed,
    Precision,
    Source,
    Task,
    Watch,
    as_tuple,
    compiled,
    normalised,
    register,
    transformed,
    without_values,
)
from .graphs import Results

# Reasons for the original forward that need no warning: nothing else serves, and training is meant to be exact.
_DOUBLE = "it computes in float64"
_GRADIENTS = "gradients are enabled and required; call it under torch.no_grad() for speed"

_AUTOCAST: dict[torch.dtype, Precision] = {torch.float16: "fp16", torch.bfloat16: "bf16"}
_AUTOCAST_DTYPES = (None, *_AUTOCAST)  # as compiled graphs number them
_PACKAGES = {"clip_fast", "torch", "clip", "open_clip", "transformers", "sentence_transformers"}  # no user's code


@dataclass(frozen=True)
class _Reading:
    """What was found in a tower when it was last looked through."""

    watch: Watch
    inside: tuple[dict[str, Any], ...]  # the attributes of every module in it: more where a method is replaced
    settings: tuple[tuple[dict[str, Any], str], ...]  # of these, what `towers.read` has judged
    stamp: object  # another once anything that was read has changed, but for what the watch sees
    in_training: tuple[nn.Module, ...]  # that may compute something else in training mode
    engine: Engine | None  # without autocast; None where there is a problem
    problem: str | None
    engines: dict[Precision, Engine] = field(default_factory=dict[Precision, Engine])  # in those of autocast


class Forward:
    """A tower's `forward`, apart from autocast's precisions in the one precision, by default that of the weights."""

    def __init__(self, tower: nn.Module, precision: Precision | None, cuda_graphs: bool) -> None:
        self.tower: Any = tower
        self._precision: Precision | None = precision
        self._cuda_graphs = cuda_graphs
        self._last: _Reading | None = None
        self._warned: set[str] = set()
        named = inspect.signature(cast(Any, type(tower)).forward).parameters.values()
        self._named = tuple(p.name for p in named if p.kind is p.POSITIONAL_OR_KEYWORD)[2:]  # after self and the images
        self._takes_any_option = any(p.kind is p.VAR_KEYWORD for p in named)
        self._name = register(self, Forward._run, Forward._empty)

    def attach(self) -> None:
        method: Callable[..., Any] = self.embeddings if towers.is_clip(self.tower) else self.hidden_states

        @functools.wraps(method)
        def forward(*arguments: Any, **options: Any) -> Any:  # no method: accelerate would bind it to the tower
            return method(*arguments, **options)

        instance.attach(self.tower, {"forward": forward}, self._attach_to_copy)

    @staticmethod
    def of(tower: nn.Module) -> Forward | None:
        """What is attached to a tower."""
        method = getattr(vars(tower).get("forward"), "__wrapped__", None)
        owner = getattr(method, "__self__", None)
        return owner if isinstance(owner, Forward) else None

    def has(self, precision: Precision | None, cuda_graphs: bool) -> bool:
        """Whether these are its settings."""
        return (self._precision, self._cuda_graphs) == (precision, cuda_graphs)

    def _attach_to_copy(self, tower: nn.Module) -> None:
        forward = Forward(tower, self._precision, self._cuda_graphs)
        forward.read()
        forward.attach()

    def embeddings(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """For openai-clip and open_clip: (B, 3, H, W) -> (B, E), and the patch tokens where open_clip is asked for."""
        with_tokens = getattr(self.tower, "output_tokens", False)
        results = self._results(x, "encode_tokens" if with_tokens else "encode")
        if results is None:
            return self._original(x)
        dtype = _autocast_dtype(results[0].device) or results[0].dtype
        embeddings = results[0].to(dtype)
        return (embeddings, results[1].to(dtype)) if with_tokens else embeddings

    def hidden_states(self, pixel_values: Tensor | None = None, *more: Any, **options: Any) -> Any:
        """For transformers: (B, 3, H, W) -> what the tower returns, its projection being outside of it."""
        given = dict(zip(self._named, more, strict=False))
        twice = any(name in options for name in given)
        if pixel_values is None or len(given) < len(more) or twice or not all(map(self._takes, options)):
            return self._original(pixel_values, *more, **options)  # which raises the error of such a call
        options |= given
        all_states = self._setting(options, "output_hidden_states")
        task, arguments = ("hidden_states", ()) if all_states else self._task()
        results = self._results(pixel_values, task, *arguments, problem=self._not_asked_of_the_fast_path(options))
        if results is None:
            return self._original(pixel_values, **options)
        output = _output_class()(
            last_hidden_state=results[-1],
            pooler_output=self.tower.post_layernorm(results[-1][:, 0]),
            hidden_states=results if all_states else None,
        )
        wants_tuple = self._takes("return_dict") and self._setting(options, "return_dict") is False
        return output.to_tuple() if wants_tuple else output

    def _takes(self, option: str) -> bool:
        """Whether the tower's own forward knows an option; in some releases only the model around it does."""
        return self._takes_any_option or option in self._named

    def _setting(self, options: Mapping[str, Any], name: str) -> Any:
        """What a call of a transformers tower sets, or its configuration."""
        value = options.get(name)
        if value is None and (name not in options or name in self._named):
            return getattr(self.tower.config, name, None)  # a None given in transformers 5, which names it not, stands
        return value

    def _not_asked_of_the_fast_path(self, options: Mapping[str, Any]) -> str | None:
        """Why the original must answer a call of a transformers tower."""
        if self._setting(options, "output_attentions"):
            return "attention weights are asked for"
        if getattr(self.tower.config, "is_causal", None):
            return "its config says is_causal"
        if options.get("interpolate_pos_encoding"):
            return "positional encodings are to be interpolated, which transformers does in its own way"
        all_states = self._setting(options, "output_hidden_states")
        if all_states is not None and not isinstance(all_states, bool):  # 1 is a layer
            return f"output_hidden_states is {all_states!r}"
        served = ("output_attentions", "output_hidden_states", "interpolate_pos_encoding", "return_dict")
        others = [name for name, value in options.items() if name not in served and value is not None]
        return f"{others[0]} is given" if others else None

    # --- which way ---------------------------------------------------------------------------------------------------

    def _task(self) -> tuple[Task, tuple[int, ...]]:
        """What a tower gives unless asked for more, and the task's arguments."""
        return ("encode", ()) if towers.is_clip(self.tower) else ("hidden_state", (len(self.tower.encoder.layers),))

    def _results(self, images: Tensor, task: Task, *arguments: int, problem: str | None = None) -> Results | None:
        """A task's results; None where the original forward must give them, `problem` among the reasons."""
        if torch.compiler.is_exporting() or isinstance(images, torch.fx.Proxy):
            return None  # a program must stand on its own
        if torch.compiler.is_compiling():
            return None if problem else self._compiled(images, task, *arguments)
        if without_values(images):
            return None
        results = self._attempt(images, task, *arguments, problem=problem)
        if not isinstance(results, str):
            return results
        meant = results == _DOUBLE or (results == _GRADIENTS and self.tower.training)
        if not meant:
            self._warn(results)
        return None

    def why_original(self, images: Tensor) -> str | None:
        """Why the original forward would run for `images`; None where the fast path has just run."""
        task, arguments = self._task()
        results = self._attempt(images, task, *arguments)
        return results if isinstance(results, str) else None

    def _attempt(self, images: Tensor, task: Task, *arguments: int, problem: str | None = None) -> Results | str:
        """A task's results, or why the original forward must give them."""
        engine = self.choice(images, problem)
        if isinstance(engine, str):
            return engine
        try:
            return engine.run(engine.checked(images), task, *arguments)
        except NotServed as error:  # weights of another shape have been put in
            return str(error)

    def choice(self, images: Tensor, problem: str | None = None) -> Engine | str:
        """What encodes `images`, or why the original forward must, `problem` among the reasons."""
        if transformed():
            return "a transform of torch.func, or forward-mode differentiation, is at work"
        reading = self._reading()
        engine = reading.engine
        if problem or engine is None:
            return problem or reading.problem or ""
        if reading.watch.hooked() or _has_any_global_hook():
            return "hooks are registered inside the tower"
        if any(module.training and towers.acts_otherwise_in_training(module) for module in reading.in_training):
            return "the tower is in training mode, with dropout or batch norms"
        weight = engine.source.weight()
        if weight.is_meta:
            return "its weights are on the meta device"
        if self._precision is None:
            if weight.dtype == torch.float64:
                return _DOUBLE
            autocast = _autocast_dtype(weight.device)
            if autocast in _AUTOCAST:
                precision = _AUTOCAST[autocast]
                if precision not in reading.engines:
                    reading.engines.setdefault(precision, self._new_engine(engine.source, precision))
                engine = reading.engines[precision]
        return _GRADIENTS if engine.gradients_wanted(images) else engine

    # --- what is in the tower ----------------------------------------------------------------------------------------

    def read(self) -> str | None:
        """Looks through the tower as it is now, whatever is known of it; what is not served."""
        self._last = None
        return self._reading().problem

    def _reading(self) -> _Reading:
        """What is in the tower, looked through again where a module, a method or a setting has been replaced."""
        last = self._last
        if last is None or last.stamp != self._stamp(last) or last.watch.replaced():
            self._last = last = self._read(last)
        return last

    def _stamp(self, reading: _Reading) -> object:
        inside = tuple(map(type, reading.watch.modules)), tuple(map(len, reading.inside))
        judged = tuple([towers.judged(attributes, name) for attributes, name in reading.settings])
        return inside, judged, instance.count(self.tower), towers.attention(self.tower)

    def _read(self, last: _Reading | None) -> _Reading:
        watch = Watch(self.tower)
        every = tuple(map(vars, watch.modules))
        settings = tuple((attributes, name) for attributes in every for name in towers.JUDGED if name in attributes)
        engine, problem = None, None
        try:
            source = towers.read(self.tower)
        except NotServed as error:
            problem = str(error)
        else:
            engine = self._new_engine(source, self._precision)
        in_training = tuple(filter(towers.may_act_otherwise_in_training, watch.modules))
        reading = _Reading(watch, every[1:], settings, None, in_training, engine, problem)
        reading = replace(reading, stamp=self._stamp(reading))
        if last is None or last.engine is None or engine is None:
            return reading
        same = last.watch.modules == watch.modules and last.engine.config == engine.config
        return replace(reading, engine=last.engine, engines=last.engines) if same else reading

    def _new_engine(self, source: Source, precision: Precision | None) -> Engine:
        mean, std = self._normalisation()
        return Engine(source, precision=precision, mean=mean, std=std, cuda_graphs=self._cuda_graphs)

    def _normalisation(self) -> tuple[Rgb, Rgb]:
        """For raw pixels: open_clip's towers know their own."""
        mean, std = (getattr(self.tower, name, None) for name in ("image_mean", "image_std"))
        return (tuple(mean), tuple(std)) if mean and std else (IMAGE_MEAN, IMAGE_STD)  # pyright: ignore[reportReturnType]

    # --- in compiled graphs ------------------------------------------------------------------------------------------

    def _compiled(self, images: Tensor, task: Task, *arguments: int) -> Results | None:
        """The operator that makes `_attempt` when the graph runs; None for the original forward, traced."""
        engine = None if self._last is None else self._last.engine
        if engine is None or engine.gradients_wanted(images) or transformed():
            return None
        weight = engine.source.weight()
        if weight.is_meta or (self._precision is None and weight.dtype == torch.float64):
            return None
        autocast = _autocast_dtype(weight.device)  # which may be gone when the graph runs
        number = _AUTOCAST_DTYPES.index(autocast) if autocast in _AUTOCAST else 0
        return compiled(self._name, engine.checked(images), task, number, *arguments)

    def _run(self, images: Tensor, task: Task, number: int, *arguments: int) -> Results:
        """A task's results when a graph runs, whichever way. No gradients are wanted: it would not have been traced."""
        autocast = _AUTOCAST_DTYPES[number]
        with torch.no_grad(), torch.autocast(images.device.type, autocast, enabled=autocast is not None):
            results = self._results(images, task, *arguments)
            if results is not None:
                return results
            if towers.is_clip(self.tower):
                results = as_tuple(self._original(images))
            else:
                all_states = task == "hidden_states"
                options = {"return_dict": True} if self._takes("return_dict") else {}
                output = self._original(images, output_hidden_states=all_states, **options)
                results = output.hidden_states if all_states else (output.last_hidden_state,)
            dtype = towers.weight(self.tower).dtype
            return tuple(result.to(dtype).contiguous() for result in results)

    def _empty(self, images: Tensor, task: Task) -> Results:
        """Results without values of what `_compiled` has traced."""
        assert self._last is not None
        assert self._last.engine is not None
        return self._last.engine.empty(images, task)

    # --- the original ------------------------------------------------------------------------------------------------

    def _original(self, images: Tensor | None, *more: Any, **options: Any) -> Any:
        """What the tower's class computes, which takes floats."""
        forward: Callable[..., Any] = cast(Any, type(self.tower)).forward
        return forward(self.tower, images if images is None else self._floats(images), *more, **options)

    def _floats(self, images: Tensor) -> Tensor:
        if isinstance(images, torch.fx.Proxy) or images.dtype != torch.uint8:
            return images
        if images.ndim == 4 and images.shape[-1] == 3 and images.shape[1] != 3:
            images = images.permute(0, 3, 1, 2)
        weight = towers.weight(self.tower)
        return normalised(images.to(weight.device), weight.dtype, *self._normalisation())

    def _warn(self, problem: str) -> None:
        if problem not in self._warned:
            self._warned.add(problem)
            name = type(self.tower).__qualname__
            message = f"the original forward of {name} runs, not clip_fast's: {problem}"
            warnings.warn(message, stacklevel=_users_level())


def _users_level() -> int:
    """The `stacklevel`, in the calling function's caller, of the nearest code that is no package's."""
    level, frame = 1, inspect.currentframe()
    frame = frame and frame.f_back
    while frame is not None and str(frame.f_globals.get("__name__")).partition(".")[0] in _PACKAGES:
        level, frame = level + 1, frame.f_back
    return level


def _autocast_dtype(device: torch.device) -> torch.dtype | None:
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def _output_class() -> Any:
    from transformers.modeling_outputs import BaseModelOutputWithPooling  # there: the tower is one of its modules

    return BaseModelOutputWithPooling
