"""A process per device: what goes wrong in one is said, with its name. Whole jobs are in test_pipeline.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from clip_fast.bulk.pipeline import Options, Step
from clip_fast.bulk.processes import ProcessJob, run_on_devices
from clip_fast.inputs.inputs import Inputs


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_an_error_in_a_process_is_an_error_here(tmp_path: Path) -> None:
    steps: list[Step] = []
    job = ProcessJob(
        model=str(tmp_path / "gone.pt"),
        dtype=torch.float32,
        activation=None,
        inputs=Inputs([]),
        folder=str(tmp_path),
        options=Options(workers=0),
        fast_decode=False,
    )
    with pytest.raises(RuntimeError, match=r"cpu: .*gone\.pt"):
        run_on_devices([torch.device("cpu")], job, steps.append)
    assert steps == []
