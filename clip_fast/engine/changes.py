"""Whether weights have changed since they were prepared.

PyTorch counts the writes to a tensor in its version. Three kinds of change do not show there:

* another tensor takes a weight's place, or a view that of its data: its id, its address or its order in memory differs;
* a weight is freed and another is made at its address: a weak reference to the old storage has expired;
* an optimiser steps fused, or through `weight.data`, or a module is put into a tower that changes weights so: hooks of
  ours, which PyTorch calls for the whole process, count these. They are installed with the first tower and removed
  with the last.

Other writes to `weight.data`, through NumPy, by another process, or by a CUDA graph's replay cannot be seen.
"""

from __future__ import annotations

import sys
import threading
import warnings
import weakref
from collections.abc import Sequence
from operator import attrgetter
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .. import pytorch
from .tower import PLAIN

_cdata = attrgetter("cdata")


class Weights(Protocol):
    """Anything that holds weights to be followed."""

    def tensors(self) -> list[Tensor]: ...


def fingerprint(tensors: list[Tensor]) -> object:
    """A value that differs after every change of the tensors that PyTorch or our hooks have counted."""
    if not pytorch.SEES_CHANGES:
        _warn_once("this release of PyTorch has lost the names by which clip_fast sees changes of weights")
        return object()  # equal to nothing
    try:
        versions = tuple(map(pytorch.version, tensors))
    except RuntimeError:  # raised for a tensor that was made in inference mode
        _warn_once(
            "weights were made in inference mode, where PyTorch counts no changes; make or clone them outside it"
        )
        return object()  # equal to nothing
    places = tuple(map(id, tensors)), tuple(map(Tensor.data_ptr, tensors))
    # A view at the same address is not contiguous, or it is the first rows; and no weight alone has fewer rows.
    return _hooks.uncounted, places, tuple(map(Tensor.is_contiguous, tensors)), versions


def _warn_once(reason: str) -> None:
    warnings.warn(f"clip_fast prepares the weights at every call: {reason}", stacklevel=2)


class Storages:
    """Weak references to the storages of tensors: tell whether one is gone, and its address free for another."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        made: Any = pytorch.StorageWeakRef
        self._storages = () if made is None else tuple(made(tensor.untyped_storage()) for tensor in tensors)

    def gone(self) -> bool:
        return any(map(pytorch.storage_expired, map(_cdata, self._storages)))


# --- the hooks of the process ----------------------------------------------------------------------------------------

_HOOKED = ("torch/optim/optimizer.py", "torch/nn/modules/module.py")  # files that iterate over the hooks


class _Hooks:
    """Process-wide hooks, there while anyone's weights are followed."""

    def __init__(self) -> None:
        self.uncounted = 0  # events after which any weight may have changed without a count
        self._lock = threading.RLock()  # the end of a follower may come at any point, also while this thread holds it
        self._handles: list[Any] = []
        self._followed: weakref.WeakSet[Weights] = weakref.WeakSet()
        self._parents: weakref.WeakValueDictionary[int, nn.Module] = weakref.WeakValueDictionary()  # by id

    def follow(self, weights: Weights, modules: Sequence[nn.Module]) -> None:
        """Counts changes of `weights`, which live in `modules`, until `weights` is gone."""
        if not pytorch.SEES_CHANGES:
            return
        with self._lock:
            self._followed.add(weights)
            self._parents.update((id(module), module) for module in modules)
            if not self._handles:
                self._handles = [
                    pytorch.register_step_hook(self._count_step),
                    pytorch.register_module_hook(self._count_module),
                ]
        weakref.finalize(weights, self._release).atexit = False

    def _release(self) -> None:
        """Removes the hooks with the last follower.

        PyTorch may be iterating over its hooks at this moment, in any thread, and they must not change under it. Then
        they stay until the next follower is gone.
        """
        with self._lock:
            # Iterated over, not counted: the set may drop the follower that has just gone only after this call.
            if not self._handles or any(True for _ in self._followed) or _iterating():
                return
            for handle in self._handles:
                handle.remove()
            self._handles = []

    def _count_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Counts an optimiser's step in the versions of our weights; a fused step does not.

        A weight that has no gradient is not written, and PyTorch would refuse to differentiate through it with a new
        version. Weights may be views of the flat tensor that is stepped. FSDP steps shards and gathers them into the
        same tensors without a new version, so a step on a weight that is no plain tensor counts as a change of any.
        """
        with self._lock:
            followed = list(self._followed)
        ours = [tensor for weights in followed for tensor in weights.tensors()]
        stepped: list[Tensor] = [p for group in optimizer.param_groups for p in group["params"]]
        identities = set(map(id, ours))
        self.uncounted += any(type(p) not in PLAIN for p in stepped if id(p) in identities)
        places = {_storage(p) for p in stepped if type(p) in PLAIN and p.grad is not None}
        torch.autograd.graph.increment_version([t for t in ours if type(t) in PLAIN and _storage(t) in places])

    def _count_module(self, parent: nn.Module, *_: Any) -> None:
        """Counts a module that is put into a tower.

        peft puts adapters around a tower's modules, adds to `weight.data`, and puts the same modules back. Skipped
        while compiling: a graph that guards on this counter would be recompiled at every change of it.
        """
        if not torch.compiler.is_compiling():
            self.uncounted += id(parent) in self._parents


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _iterating() -> bool:
    """Whether any thread is inside the functions of PyTorch that call hooks."""
    for frame in sys._current_frames().values():  # pyright: ignore[reportPrivateUsage]
        while frame is not None:
            if frame.f_code.co_filename.replace("\\", "/").endswith(_HOOKED):
                return True
            frame = frame.f_back
    return False


_hooks = _Hooks()
follow = _hooks.follow
