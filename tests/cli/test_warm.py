"""`clip-fast warm`: goes through every dtype of images that users give."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from clip_fast.cli import warm
from clip_fast.cli.main import main
from clip_fast.engine.engine import Engine
from clip_fast.kernels import ops


def test_every_dtype_of_images(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[torch.dtype] = []
    run = Engine.run

    def seen_by_the_engine(self: Engine, images: Tensor, *task: Any) -> Any:
        seen.append(images.dtype)
        return run(self, images, *task)

    monkeypatch.setattr(warm, "triton_can_run", lambda device: True)
    monkeypatch.setattr(Engine, "run", seen_by_the_engine)
    resized: list[Tensor] = []
    resize = ops.resize
    monkeypatch.setattr(ops, "resize", lambda *operands: resized.append(resize(*operands)))
    assert main(["warm", "--model", "tiny-digits", "--device", "cpu", "--dtype", "bfloat16"]) == 0
    assert seen == [torch.uint8, torch.float32, torch.bfloat16]
    assert [each.shape for each in resized] == [(1, 3, 32, 32)]
    assert "the kernels of tiny-digits in torch.bfloat16 are compiled" in capsys.readouterr().err


def test_without_a_gpu_there_is_nothing_to_compile(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["warm", "--model", "tiny-digits", "--device", "cpu"]) == 0
    assert "nothing to compile: on cpu plain PyTorch computes" in capsys.readouterr().err


def test_a_model_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["warm", "--model", "/nowhere.pt", "--device", "cpu"]) == 2
    assert "/nowhere.pt" in capsys.readouterr().err
