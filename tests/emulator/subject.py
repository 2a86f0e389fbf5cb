"""All that the emulator's tests import from the rest of the project."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from kernel_checks import Guards, assert_as_accurate, assert_statistics_of, bits, rms

from clip_fast.kernels import dispatch, ops, oracles, resampling, targets
from clip_fast.kernels.launches import TABLE
from clip_fast.kernels.statistics import merge_statistics, row_statistics

__all__ = [
    "WEIGHTS",
    "Guards",
    "architecture",
    "assert_as_accurate",
    "assert_statistics_of",
    "assume",
    "bits",
    "kernels_run",
    "launches_of",
    "merge_statistics",
    "ops",
    "oracles",
    "persistent_programs",
    "pinned",
    "poisoned",
    "resampling",
    "rms",
    "row_statistics",
    "shared_memory",
    "workaround",
]

assume, pinned = targets.assume, targets.pinned

# Parameters of kernels, without the suffix _ptr, that are a model's own: no kernel writes them.
WEIGHTS = frozenset({"weight", "bias", "colsum", "scale", "position"})


def architecture() -> int:
    """The compute capability that launches are configured for, times ten: 80, 90."""
    return int(targets.target_of(torch.device("cpu")).name[3:])


def launches_of(op: str, dtype: torch.dtype, precision: str, arch: str) -> tuple[targets.Launch, ...]:
    """The launches between which the rows of a product decide."""
    return TABLE.launches_for(op, dtype, targets.TARGETS[arch], precision)


def shared_memory(capability: int) -> int:
    """The bytes of shared memory that one block may have."""
    return targets.TARGETS[f"sm_{capability}"].shared_memory


def kernels_run() -> None:
    """From now on an op with impl="triton" treats a CPU's tensors as a GPU's."""
    dispatch.triton_can_run = lambda device: True


@contextmanager
def workaround(on: bool) -> Iterator[None]:
    """Within this context launches use the workaround for Triton before 3.9, or leave it out."""
    from clip_fast.kernels import primitives

    with mock.patch.object(primitives, "_RELEASE", (3, 8) if on else (3, 9)):
        yield


@contextmanager
def persistent_programs(number: int) -> Iterator[None]:
    """Within this context persistent kernels run as on a device of so many multiprocessors."""
    from clip_fast.kernels import linear

    with mock.patch.object(linear, "multiprocessors", return_value=number):
        yield


@contextmanager
def poisoned(guards: Guards) -> Iterator[None]:
    """Within this context all memory that launchers allocate is poisoned and has guard bands."""

    def new_empty(self: torch.Tensor, *size: Any, dtype: torch.dtype | None = None, **_: Any) -> torch.Tensor:
        shape = size[0] if len(size) == 1 and not isinstance(size[0], int) else size
        return guards.empty(tuple(shape), dtype or self.dtype, self.device)

    with mock.patch.object(torch.Tensor, "new_empty", new_empty):
        yield
