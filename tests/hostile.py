"""Items that harm their decoder as broken images might. Worker processes import them, so they have their own module."""

from __future__ import annotations

import os
import resource
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from clip_fast.bulk.decoder import Decoder
from clip_fast.inputs.items import Item


@dataclass(frozen=True, slots=True)
class Hanging(Item):
    def source(self) -> Path:
        while True:
            time.sleep(1)


@dataclass(frozen=True, slots=True)
class Killing(Item):
    def source(self) -> Path:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("alive")


@dataclass(frozen=True, slots=True)
class KillingOnce(Item):
    """Kills its decoder once: it makes `marker` before, and does nothing while that exists."""

    marker: str

    def source(self) -> Path:
        if not Path(self.marker).exists():
            Path(self.marker).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return Path(self.location)


@dataclass(frozen=True)
class KillingAtStart(Decoder):
    """Kills the first process that it is sent to, before that has begun. It makes `marker` as `KillingOnce` does."""

    marker: str = ""

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        if not Path(self.marker).exists():
            Path(self.marker).touch()
            os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True, slots=True)
class Greedy(Item):
    """Takes more memory than any worker may."""

    def source(self) -> Path:
        raise AssertionError(len(bytearray(1 << 33)))


@dataclass(frozen=True, slots=True)
class Peak(Item):
    """Fails with the most memory that its decoder has had, in bytes."""

    def source(self) -> Path:
        raise ValueError(str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))


@dataclass(frozen=True, slots=True)
class ThisProcess(Item):
    """Fails with the number of its decoder's process."""

    def source(self) -> Path:
        raise ValueError(str(os.getpid()))


@dataclass(frozen=True, slots=True)
class Counting(Item):
    """Fails with the number of PyTorch's threads in the process that decodes it."""

    def source(self) -> Path:
        raise ValueError(f"{torch.get_num_threads()} threads")
