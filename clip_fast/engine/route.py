"""Decides between the fast path and the owner's plain tower, for a loaded encoder and for an accelerated tower alike.

The plain tower is taken only for a reason, which is given in words. Every call is judged anew: weights, modules, hooks
and modes may have changed since the last one. In a graph of torch.compile a call is judged when the graph runs.
"""

# pyright: reportPrivateUsage=false
# (an owner's side of the protocol is private to this package)

from __future__ import annotations

import inspect
from typing import Protocol

import torch
from torch import Tensor

from .. import pytorch
from ..errors import NotServed
from ..towers.config import Task
from ..towers.fast import Results
from .compiled import Compilable, compiled, serves
from .engine import Engine

# Reasons for the plain tower that come from the call itself.
PROGRAM = "a program is recorded, which must stand on its own"
WITHOUT_VALUES = "the images have no values"
TRANSFORMED = "a transform of torch.func, or forward-mode differentiation, is at work"
GRADIENTS = "gradients are enabled and required; call it under torch.no_grad() for speed"
DOUBLE = "it computes in float64"
META = "its weights are on the meta device"

# Reasons that need no warning, since the plain tower is the only one that can serve such a call.
SILENT = frozenset({PROGRAM, WITHOUT_VALUES, DOUBLE})


_PACKAGES = {  # not users' code
    "clip_fast", "torch", "clip", "open_clip", "transformers", "sentence_transformers",
    "pickle", "copy", "multiprocessing", "cloudpickle", "joblib", "ray",
}  # fmt: skip


def users_level() -> int:
    """The `stacklevel`, for a warning of the calling function, of the nearest frame of a user's own code."""
    level, frame = 1, inspect.currentframe()
    frame = frame and frame.f_back
    while frame is not None and str(frame.f_globals.get("__name__")).partition(".")[0] in _PACKAGES:
        level, frame = level + 1, frame.f_back
    return level


class Owner(Compilable, Protocol):
    """An owner of a tower. It can compute the tower plainly too."""

    @property
    def _name(self) -> str:
        """The name that compiled graphs know the owner by."""
        ...

    def _traced_engine(self) -> Engine | None:
        """The engine of the tower as it was last read. A graph must not trace the reading."""
        ...

    def _autocast(self) -> str:
        """The name of the dtype that autocast casts to, since a graph must turn autocast on again; "" for none."""
        ...


def route(owner: Owner, images: Tensor, task: Task, asked: str | None = None) -> Results | str:
    """A task's results by the fast path, or the reason why the owner's plain tower must compute them.

    Args:
        images: the caller's images, not checked yet.
        asked: names something that the call asks for and the fast path does not give.

    Raises:
        ValueError, TypeError: the tower does not take such images.
    """
    if torch.compiler.is_exporting() or isinstance(images, torch.fx.Proxy):
        return PROGRAM
    if torch.compiler.is_compiling():
        if asked or pytorch.transformed() or pytorch.may_be_replayed(images) or not serves(owner._name):
            return PROGRAM
        engine = owner._traced_engine()
        if engine is None or _by_plain_tower(engine, images):
            return PROGRAM
        for tensor in engine.tensors():
            _ = tensor.shape  # so that the graph is made anew for weights of other shapes
        rows = engine.config.row_shapes(task)
        return compiled(owner._name, engine.checked(images), task, rows, owner._autocast())
    if pytorch.without_values(images):
        return WITHOUT_VALUES
    return judge(owner, images, task, asked)


def judge(owner: Owner, images: Tensor, task: Task, asked: str | None = None) -> Results | str:
    """`route` for a call that is not recorded. Looks at the tower, the call and the modes."""
    if pytorch.transformed():
        return TRANSFORMED
    engine, problem = owner._look()
    reason = engine and _by_plain_tower(engine, images)
    if reason := reason or asked or problem:
        return reason
    assert engine is not None
    try:
        try:
            checked = engine.checked(images)
        except (TypeError, ValueError):
            engine.tower.state_dict()  # weights for images of this shape may have been put in
            raise
        return engine.run(checked, task)
    except NotServed as error:  # weights of another shape have been put in
        return str(error)


def _by_plain_tower(engine: Engine, images: Tensor) -> str | None:
    """The reason for the plain tower that the call itself gives; None if there is none."""
    if engine.tower.weight().is_meta:
        return META
    if engine.in_double:
        return DOUBLE
    return GRADIENTS if engine.gradients_wanted(images) else None
