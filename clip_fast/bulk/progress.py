"""The progress of a job: a bar while it runs, and a summary."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from tqdm import tqdm

from ..errors import TooManyErrors
from .pipeline import Step
from .standard_error import tell
from .tables import Totals

LINE_SECONDS = 60.0  # between lines where there is no terminal


def check_errors(failed: int, limit: int | None) -> None:
    """Raises TooManyErrors where there is a limit and more failed."""
    if limit is not None and failed > limit:
        raise TooManyErrors(f"{failed} errors, more than --max-errors {limit}")


class Bar:
    """How far a job is: a bar on a terminal, and elsewhere, as in a file of logs, a line a minute and one at the end.

    A context manager. `expected` is a number of images.
    """

    def __init__(self, expected: int, *, quiet: bool = False) -> None:
        on_terminal = sys.stderr is not None and sys.stderr.isatty()  # pyright: ignore[reportUnnecessaryComparison]
        self._bar = tqdm(total=expected, unit=" images", disable=quiet or not on_terminal, file=sys.stderr)
        self._in_lines = not quiet and not on_terminal
        self._expected = expected
        self._done = self._earlier = 0
        self._note = ""
        self._start = self._told = time.monotonic()

    def update(self, images: int, note: str = "", *, earlier: bool = False) -> None:
        """Adds images, which an `earlier` run may have done: the speed is this run's."""
        self._done += images
        self._note = note
        if earlier:
            self._earlier += images
            if not self._bar.disable:
                self._bar.initial += images
        self._bar.set_postfix_str(note, refresh=False)
        self._bar.update(images)
        if self._in_lines and time.monotonic() - self._told >= LINE_SECONDS:
            self._tell()

    def __enter__(self) -> Bar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
        if self._in_lines:
            self._tell()

    def _tell(self) -> None:
        self._told = time.monotonic()
        line = tqdm.format_meter(
            self._done,
            max(self._done, self._expected),  # which may be an estimate
            self._told - self._start,
            unit=" images",
            initial=self._earlier,
            postfix=self._note,
            bar_format="{n_fmt}/{total_fmt} images, {elapsed}, {remaining} left, {rate_fmt}{postfix}",
        )
        tell(f"clip-fast: {line}")


class Progress:
    """Counts the steps that `pipeline.run` reports. A context manager, which shows a `Bar` unless `quiet` is set.

    Calling it raises `TooManyErrors` from the first failure beyond `max_errors` on.
    """

    def __init__(self, expected: int, *, quiet: bool = False, max_errors: int | None = None) -> None:
        self.done = Totals()
        self.resumed = Totals()  # the part of `done` that earlier runs did
        self._decoding = self._encoding = 0.0
        self._max_errors = max_errors
        self._start = time.perf_counter()
        self._bar = Bar(expected, quiet=quiet)

    def __call__(self, step: Step) -> None:
        self.done += step.done
        self._decoding += step.decoding
        self._encoding += step.encoding
        if step.resumed:
            self.resumed += step.done
        self._bar.update(step.done.images, f"{self.bound}-bound, {self.done.failed} errors", earlier=step.resumed)
        check_errors(self.done.failed, self._max_errors)

    @property
    def waiting(self) -> float:
        """The share of time that the encoding threads of all processes waited for pixels, 0 to 1."""
        return self._decoding / max(self._decoding + self._encoding, 1e-9)

    @property
    def bound(self) -> str:
        """The stage that a faster run would have to speed up."""
        return "decode" if self.waiting > 0.5 else "encode"

    def summary(self) -> dict[str, object]:
        """For people and scripts; `images_per_second` is of this run."""
        seconds = time.perf_counter() - self._start
        return {
            "images": self.done.images,
            "failed": self.done.failed,
            "resumed": self.resumed.images,
            "seconds": round(seconds, 3),
            "images_per_second": round((self.done.images - self.resumed.images) / seconds, 1),
            "bound": self.bound,
            "waiting_for_decode": round(self.waiting, 3),
        }

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.__exit__(kind, error, trace)
