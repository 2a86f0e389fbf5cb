"""The environment of a result: the folder that results go to, and what they are continued in."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from bench.environment import Environment, environment, fingerprint
from bench.report import document, resumed, save

ROWS = [{"model": "x"}]
OTHER = {
    "driver": "590.1", "cpu": "another", "cores": 3, "threads": 3, "system": "Linux 9", "versions": {"torch": "9"},
    "code": "another",
}  # fmt: skip


@pytest.fixture(scope="module")
def here() -> Environment:
    return replace(environment(torch.device("cpu")), device="A GPU", date="2026-11-30 10:00 UTC")


def test_results_go_on_in_their_folder(here: Environment, tmp_path: Path) -> None:
    folder = here.folder(tmp_path)
    assert folder == tmp_path / "a-gpu-2026-11-30"
    save(folder / "tune.json", document("tune", replace(here, code=fingerprint(launches=False)), None, []))
    assert here.folder(tmp_path) == folder
    save(folder / "end_to_end.json", document("end_to_end", here, None, ROWS))
    later = replace(here, date="2026-12-01 10:00 UTC", commit="another")
    assert later.folder(tmp_path) == folder
    assert resumed(folder / "end_to_end.json", "end_to_end", later) == ROWS


@pytest.mark.parametrize("field", OTHER)
def test_what_would_not_be_continued_begins_a_new_folder(here: Environment, tmp_path: Path, field: str) -> None:
    save(here.folder(tmp_path) / "end_to_end.json", document("end_to_end", here, None, ROWS))
    other = replace(here, **{field: OTHER[field]})
    with pytest.raises(ValueError, match=f"another {field}"):
        resumed(here.folder(tmp_path) / "end_to_end.json", "end_to_end", other)
    second = other.folder(tmp_path)
    assert second == tmp_path / "a-gpu-2026-11-30-2"
    save(second / "end_to_end.json", document("end_to_end", other, None, ROWS))
    assert other.folder(tmp_path) == second
    assert here.folder(tmp_path) == tmp_path / "a-gpu-2026-11-30"
    third = replace(other, python="9")
    assert third.folder(tmp_path) == tmp_path / "a-gpu-2026-11-30-3"


def test_a_field_that_older_results_lack(here: Environment) -> None:
    old = asdict(here)
    del old["code"]
    assert here.differing(old) == ["code"]
