"""Methods of one instance: put on a module in place of its class's methods, and taken off again.

Attributes that someone else has put on the instance are never overwritten. A deep copy gets methods of its own. Pickles
and the replicas of `DataParallel` are the originals: a file can be read where clip_fast is not installed, and a
replica's weights last for one call only.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

from torch import nn

from .. import pytorch

_ATTACHED = "_clip_fast"  # the attribute that holds what was put on an instance, by name
_copying = threading.RLock()  # held while a class's own way of copying a module runs, since the methods are off then


def attach(module: nn.Module, methods: Mapping[str, Callable[..., Any]], renew: Callable[[nn.Module], object]) -> None:
    """Puts methods on a module; `renew` does the same for its deep copies."""
    own = vars(module)

    def deepcopy(memo: dict[int, Any]) -> nn.Module:
        other = _copied(module, memo)
        renew(other)
        return other

    def replicate() -> nn.Module:
        replica: nn.Module = pytorch.data_parallel_replica(module)
        detach(replica)
        return replica

    wanted: dict[str, Any] = {
        "__deepcopy__": deepcopy,
        "__getstate__": partial(state, module),
        "_replicate_for_data_parallel": replicate,  # called by PyTorch under this name, in releases that know it
        **methods,
    }
    ours = {name: method for name, method in wanted.items() if name not in own}
    own.update({**ours, _ATTACHED: ours})


def _copied(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A deep copy of a module, without the methods that `attach` put on it. Other threads may call these meanwhile."""
    kind = type(module)
    if hasattr(kind, "__deepcopy__") or kind.__reduce_ex__ is not object.__reduce_ex__:  # it has its own way
        with _copying:
            taken = detach(module)
            try:
                return copy.deepcopy(module, memo)
            finally:
                vars(module).update(taken)
    memo[id(module)] = other = kind.__new__(kind)
    other.__setstate__(copy.deepcopy(state(module), memo))  # pyright: ignore[reportUnknownMemberType]
    return other


def detach(module: nn.Module) -> dict[str, Any]:
    """Takes the methods off a module, as far as they are still there, and returns them."""
    own = vars(module)
    kept = attributes(module)
    return {name: own.pop(name) for name in tuple(own) if name not in kept}


def state(module: nn.Module) -> dict[str, Any]:
    """A module's state for pickles, without the methods that `attach` put on it."""
    mine = attributes(module)
    given: dict[str, Any] = cast(Any, type(module)).__getstate__(module)
    return {name: value for name, value in given.items() if name in mine}


def is_attached(module: nn.Module) -> bool:
    return _ATTACHED in vars(module)


def attributes(module: nn.Module) -> dict[str, Any]:
    """A module's own attributes, without those that `attach` put on it."""
    own = vars(module)
    ours = {_ATTACHED: own.get(_ATTACHED), **own.get(_ATTACHED, {})}
    return {name: value for name, value in own.items() if name not in ours or ours[name] is not value}


def count(module: nn.Module) -> int:
    """The number of a module's own attributes, which changes when someone replaces a method."""
    ours = vars(module).get(_ATTACHED)
    return len(vars(module)) - (0 if ours is None else 1 + len(ours))
