"""Items that harm their decoder as broken images might. Worker processes import them, so they have their own module."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

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
