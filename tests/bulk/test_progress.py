"""What is counted and shown while a job runs."""

from __future__ import annotations

import pytest

from clip_fast.bulk import progress as progress_module
from clip_fast.bulk.pipeline import Step
from clip_fast.bulk.progress import Progress, TooManyErrors
from clip_fast.bulk.tables import Totals


def test_counts_and_shares(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(30) as progress:
        progress(Step(Totals(10, 1, 1), resumed=True))
        progress(Step(Totals(8, 2, 0), decoding=3.0, encoding=1.0))
        progress(Step(Totals(2, 0, 1)))
    summary = progress.summary()
    assert (summary["images"], summary["failed"], summary["resumed"]) == (20, 3, 10)
    assert (summary["bound"], summary["waiting_for_decode"]) == ("decode", 0.75)
    assert progress.done.shards == 2
    said = capsys.readouterr().err
    assert "20/30" in said
    assert "decode-bound, 3 errors" in said


def test_an_encoder_that_is_slower_is_said_to_be() -> None:
    with Progress(3, quiet=True) as progress:
        progress(Step(Totals(3, 0, 1), decoding=1.0, encoding=3.0))
    assert progress.bound == "encode"


@pytest.mark.parametrize(("limit", "stops"), [(None, False), (3, False), (2, True), (0, True)])
def test_the_failure_beyond_the_limit_stops(limit: int | None, stops: bool) -> None:
    with Progress(9, quiet=True, max_errors=limit) as progress:
        if stops:
            with pytest.raises(TooManyErrors, match=f"3 errors, more than --max-errors {limit}"):
                progress(Step(Totals(3, 3, 0)))
        else:
            progress(Step(Totals(3, 3, 0)))


def test_quiet_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(3, quiet=True) as progress:
        progress(Step(Totals(3, 0, 1), resumed=True))
    assert capsys.readouterr() == ("", "")


def test_without_a_terminal_there_is_a_line_a_minute(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [0.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: clock[0])
    with Progress(1000) as counted:
        counted(Step(Totals(400, 0, 1), resumed=True))
        for _ in range(9):
            clock[0] += 25
            counted(Step(Totals(50, 1, 0), encoding=1.0))
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" images")[0] for line in lines] == [f"clip-fast: {n}/1000" for n in (550, 700, 850, 850)]
    assert "01:15" in lines[0]
    assert "2.00 images/s" in lines[0]  # without those of the earlier run
    assert "encode-bound, 3 errors" in lines[0]


def test_an_estimate_that_was_too_small_is_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(2) as progress:
        progress(Step(Totals(5, 0, 1)))
    assert "5/5 images" in capsys.readouterr().err
