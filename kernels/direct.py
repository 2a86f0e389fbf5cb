"""Launches of compiled kernels that pass Triton's binder over.

Triton binds and specialises the arguments of each launch anew, which takes the host longer than all else of a launch.
Here the kernel that a launch has compiled is remembered by all that Triton could have chosen it by, and launched as
such from then on, which Triton serves too: `kernel[grid](…)` gives the compiled kernel, and that one has `[grid](…)`.
Where a release of Triton gives none, as its interpreter does, every launch is an ordinary one.

Triton compiles for the types of the arguments, for pointers and integers that are multiples of 16, and for integers
that are 1. Constants and the compiler's options count by value. The key is as fine as that, or finer.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

_ALIGNMENT = 16  # what Triton compiles for: bytes of an address, and a divisor of integers
_AMD = torch.version.hip is not None

_compiled: dict[Hashable, tuple[Any, tuple[Any, ...]]] = {}  # kernels, with the values of their constants
_alike: dict[Hashable, object] = {}  # a key of plans by all in them that a kernel may be compiled for


def launch_kernel(kernel: Any, device: torch.device, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Launches `kernel[grid](*arguments, **constants)` on `device`, which is the current one.

    Args:
        kernel: of `triton.jit`.
        arguments: tensors, descriptors, numbers and None, in the order of the kernel's parameters.
        constants: its constexprs, which are its last parameters, and the compiler's options.
    """
    _launch((kernel.fn, device, *map(_kind, arguments), *constants.items()), kernel, grid, arguments, constants)


class Plan:
    """Launches of a kernel that differ in their tensors alone: the host looks at nothing else anew.

    Args:
        kernel, device, grid, constants: as of `launch_kernel`.
        numbers: the kernel's arguments between its tensors and its constexprs.
    """

    def __init__(
        self, kernel: Any, device: torch.device, grid: tuple[int, ...], numbers: tuple[Any, ...], **constants: Any
    ) -> None:
        self._kernel, self._grid, self._numbers, self._constants = kernel, grid, numbers, constants
        compiled_for = (kernel.fn, device, *map(_kind, numbers), *constants.items())
        self._key = _alike.setdefault(compiled_for, object())

    def launch(self, *tensors: Any) -> None:
        """Launches the kernel on the plan's device, the current one.

        Args:
            tensors: its first arguments: tensors, descriptors and None.
        """
        key = (self._key, *map(_kind, tensors))
        _launch(key, self._kernel, self._grid, (*tensors, *self._numbers), self._constants)


def _launch(
    key: Hashable, kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], constants: dict[str, Any]
) -> None:
    known = _compiled.get(key)
    if known is not None and "run" not in vars(kernel):  # with a `run` of its own it is only compiled: see `dispatch`
        compiled, values = known
        compiled[(*grid, 1, 1)[:3]](*arguments, *values)
        return
    compiled = kernel[grid](*arguments, **constants)
    if hasattr(type(compiled), "__getitem__") and "run" not in vars(kernel):
        _compiled[key] = compiled, tuple(constants[name] for name in kernel.arg_names[len(arguments) :])


def _kind(argument: Any) -> Hashable:
    """What Triton may compile for in an argument; no two types share a value."""
    of = type(argument)
    if of is int:
        return argument % _ALIGNMENT + 2 if 1 < argument < 2**31 else argument  # 0, 1 and more than 31 bits: themselves
    if of is float or argument is None:
        return of
    if isinstance(argument, TensorDescriptor):
        return argument.base.dtype, *argument.block_shape
    if isinstance(argument, Tensor):
        kind = argument.dtype, argument.data_ptr() % _ALIGNMENT
        return (*kind, argument.untyped_storage().nbytes() < 2**31) if _AMD else kind  # whether 32 bits reach all of it
    return of, argument
