"""Towers in graphs of torch.compile: a task is one operator, which is routed when the graph runs.

The operator finds the tower's owner by a name. It notices changes of the weights and the modules since the graph was
made, as eager mode does. Where other weights give results of other shapes, PyTorch makes a new graph, since `route`
has it guard their shapes. Where a graph is left that expects others, as without some of the layers, it raises.
"""

# pyright: reportPrivateUsage=false
# (an owner's side of the protocol is private to this package)

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from .. import pytorch
from ..errors import NotServed
from ..towers.config import Task, TaskName
from ..towers.fast import Results
from . import graphs
from .engine import Engine


class Compilable(Protocol):
    """An owner of towers that compiled graphs know by name."""

    def _look(self) -> tuple[Engine | None, str | None]:
        """Looks at the tower as it is now: its engine, in the precision of this call, and why it cannot serve.

        The engine is None where the tower is not served at all; the reason is None where nothing is in the way.
        """
        ...

    def _warn(self, reason: str) -> None:
        """Says once that the plain tower runs, and why."""
        ...

    def _run_in_graph(self, images: Tensor, task: Task, autocast: str) -> Results:
        """A task's results when a graph runs. `autocast` names the dtype that autocast casts to; "" is no autocast."""
        ...

    def _without_values(self, images: Tensor, task: Task) -> Results:
        """Results of the same shapes, without values."""
        ...


_OWNERS: dict[str, weakref.ref[Compilable]] = {}
_NUMBERS = itertools.count()


def register(owner: Compilable) -> str:
    """Gives an owner its name. The owner is held weakly."""
    name = str(next(_NUMBERS))
    _OWNERS[name] = weakref.ref(owner, lambda _: _OWNERS.pop(name))
    return name


def _owner(name: str) -> Compilable:
    owner = _OWNERS[name]()
    assert owner is not None
    return owner


@pytorch.constant_in_graphs
def serves(name: str) -> bool:
    """Whether an owner's engine serves its tower as it is while a graph is made. Else the owner warns.

    A graph does not trace this.
    """
    owner = _owner(name)
    engine, problem = owner._look()
    try:
        if engine is not None:
            engine.tower.state_dict()
            return True
    except NotServed as error:  # weights of another shape have been put in
        problem = str(error)
    owner._warn(str(problem))
    return False


def compiled(name: str, images: Tensor, task: Task, rows: Sequence[Sequence[int]], autocast: str = "") -> Results:
    """A task of the owner `name`, as one operator of a compiled graph; `rows` are the shapes of its rows."""
    sizes = [size for row in rows for size in row]
    return tuple(torch.ops.clip_fast.encode(images, name, task.name, list(task.arguments), sizes, autocast))


# The tag keeps it out of torch.compile's own CUDA graphs, whose replays would see no change of the weights.
_TAGS: dict[str, Any] = {} if pytorch.CUDAGRAPH_UNSAFE is None else {"tags": (pytorch.CUDAGRAPH_UNSAFE,)}
_SCHEMA = "(Tensor images, str name, str task, int[] arguments, int[] sizes, str autocast) -> Tensor[]"


@torch.library.custom_op("clip_fast::encode", mutates_args=(), schema=_SCHEMA, **_TAGS)
def _encode(
    images: Tensor, name: str, task: str, arguments: list[int], sizes: list[int], autocast: str
) -> list[Tensor]:
    asked = Task(cast(TaskName, task), tuple(arguments))
    with graphs.launches_only():
        results = [result.contiguous() for result in _owner(name)._run_in_graph(images, asked, autocast)]
    if (now := [size for result in results for size in result.shape[1:]]) != sizes:
        raise RuntimeError(
            f"a compiled program expects results of sizes {sizes} of an image tower that was changed, and has {now} "
            "now: call torch.compiler.reset(), and compile again"
        )
    return results


@_encode.register_fake  # pyright: ignore[reportUnknownMemberType]
def _(images: Tensor, name: str, task: str, arguments: list[int], sizes: list[int], autocast: str) -> list[Tensor]:
    return list(_owner(name)._without_values(images, Task(cast(TaskName, task), tuple(arguments))))
