"""Weights files: what is none, and code in one, which does not run."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from clip_fast.checkpoint.weights_file import read_weights
from clip_fast.errors import CheckpointError


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"x", "neither a PyTorch file nor safetensors"),
        (b"#!/bin/sh\nexit\n", "neither a PyTorch file nor safetensors"),
        (b"\xff\xd8\xff\xe0 a photograph", "neither a PyTorch file nor safetensors"),
        (b"PK\x03\x04 and no more", "truncated or damaged"),
        (b"\x80\x02 no pickle", "truncated or damaged"),
        (b"\x10\0\0\0\0\0\0\0{not json at all}", "truncated or damaged"),
        (b"\xff\xff\xff\xff\xff\xff\xff\x7f{", "truncated or damaged"),
    ],
)
def test_what_is_no_checkpoint(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(CheckpointError, match=f"file: .*{message}"):
        read_weights(tmp_path / "file")


@pytest.mark.parametrize("content", [[1, 2], torch.zeros(3), "text", {"state_dict": [1]}], ids=str)
def test_what_holds_no_state_dict(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match=r"it holds (list|Tensor|str), not a state dict"):
        read_weights(tmp_path / "m.pt")


class _Malicious:
    """Creates a file when it is unpickled carelessly."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("form", ["zip", "legacy", "bare pickle", "torchscript", "builtin in torchscript"])
def test_code_in_a_file_does_not_run(form: str, tmp_path: Path) -> None:
    marker, path = tmp_path / "marker", tmp_path / "model.pt"
    content = {"visual.conv1.weight": _Malicious(marker)}
    if form in ("zip", "legacy"):
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    elif form == "bare pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        touch = f"c__builtin__\neval\n(V__import__('pathlib').Path({str(marker)!r}).touch()\ntR."
        data = pickle.dumps(content, protocol=2) if form == "torchscript" else touch.encode()
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", data)
            archive.writestr("archive/constants.pkl", pickle.dumps(()))
    with pytest.raises(CheckpointError, match=r"model\.pt: refused: its pickle wants .*could run code"):
        read_weights(path)
    assert not marker.exists()

    if form == "bare pickle":  # the test would see the file if it were made
        pickle.loads(path.read_bytes())
        assert marker.exists()
