"""A tower as the engine reads it, and a watch over its modules."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import itemgetter
from typing import Any

from torch import Tensor, nn

from ..errors import NotServed
from ..towers.config import Config

PLAIN = (Tensor, nn.Parameter, nn.Buffer)  # the values of other classes may be quantised or sharded
_MASK = "attn_mask"
_hooks_of = itemgetter("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass(frozen=True)
class Tower:
    """The shape of a tower, and where its weights are."""

    config: Config
    modules: tuple[nn.Module, ...]  # the modules that hold its weights
    state_dict: Callable[[], dict[str, Tensor]]  # gives the weights as they are now, under canonical names
    weight: Callable[[], Tensor]  # gives one weight, whose dtype and device are the tower's


def plain_tensors(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """`state` unchanged.

    Raises:
        NotServed: its values are not plain tensors on one device.
    """
    for name, tensor in state.items():
        if type(tensor) not in PLAIN:
            raise NotServed(f"{name} is a {type(tensor).__qualname__}, not a plain tensor")
    if len(devices := {str(tensor.device) for tensor in state.values()}) > 1:
        raise NotServed(f"its weights are on several devices: {', '.join(sorted(devices))}")
    return state


def replaced_method(module: nn.Module, own: Mapping[str, Any]) -> str | None:
    """The name of a method that an attribute of the module's `own` has taken the place of; None where none has."""
    for name, value in own.items():
        method = getattr(type(module), name, None)
        is_own = getattr(value, "__func__", None) is method and getattr(value, "__self__", None) is module
        if callable(value) and callable(method) and not is_own:
            return name
    return None


def setting(attributes: Mapping[str, Any], name: str) -> object:
    """The value of a setting among a module's attributes; for a mask, whether there is none."""
    value = attributes.get(name)
    return value is None if name == _MASK else value


class Watch:
    """Tells whether a module of a tower was replaced or hooked since the watch was made.

    It looks at the dictionaries in which modules keep their children and hooks. It does not walk through the modules,
    since it runs at every call.

    Args:
        called: whether the tower is called as a module, so that its own hooks and methods run anyway.
        settings: names of the attributes that its mathematics depends on, besides its weights and modules.
    """

    def __init__(self, tower: nn.Module, settings: Sequence[str], *, called: bool = True) -> None:
        self.modules: tuple[nn.Module, ...] = tuple(tower.modules())  # kept alive, so that no id is used again
        self._children = tuple(vars(module)["_modules"] for module in self.modules)
        self._identities = self._now()
        self._hooked = tuple(map(vars, self.modules[1:] if called else self.modules))

        every = tuple(map(vars, self.modules))
        self._attributes = every[1:] if called else every
        # transformers 4 leaves SigLIP's layers forwards of their own after a call that collected hidden states.
        self._forwards = tuple(own for own in self._attributes if "forward" in own)
        self._masked = tuple(own for own in every if _MASK in own) if _MASK in settings else ()
        self._kinds: tuple[Any, ...] = tuple(set(map(type, self.modules)))
        told = ((own, [name for name in settings if name in own and name != _MASK]) for own in every)
        self._settings = tuple((itemgetter(*names), own) for own, names in told if names)

    def state(self) -> object:
        """A value that differs where an attribute was put on a module, or a setting or a class's forward was changed.

        Attributes of a tower that is called as a module are its own matter: whoever replaces its forward is called.
        """
        try:
            values = [of(own) for of, own in self._settings]
        except KeyError:
            return object()  # a setting is gone: equal to nothing
        forwards = [own.get("forward") for own in self._forwards]
        classes = [kind.forward for kind in self._kinds]
        masks = [setting(own, _MASK) for own in self._masked]
        return tuple(map(len, self._attributes)), values, masks, forwards, classes

    def _now(self) -> tuple[int, ...]:
        return tuple(map(id, chain.from_iterable(map(dict[str, Any].values, self._children))))

    def replaced(self) -> bool:
        """Whether another module has taken a child's place."""
        return self._now() != self._identities

    def hooked(self) -> bool:
        """Whether a user has hooked a module whose hooks the fast path would not run."""
        # Looked up anew each time: a user may have put a new dictionary of hooks in place of the old one.
        hooks: Iterable[dict[int, Any]] = chain.from_iterable(map(_hooks_of, self._hooked))
        return any(_users(some) for some in hooks if some)


def _users(hooks: dict[int, Any]) -> bool:
    """Whether any hook is a user's. Those that transformers installs do nothing unless it asks for outputs itself."""
    return any(getattr(hook, "__module__", "") != "transformers.utils.output_capturing" for hook in hooks.values())
