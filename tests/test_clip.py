"""`clip_fast.clip` and `load` under openai-clip's names and in its order of arguments."""

from __future__ import annotations

import hashlib
import importlib
import inspect
from pathlib import Path

import pytest
import torch

import clip_fast
from clip_fast import clip, model
from clip_fast.checkpoint import published
from clip_fast.checkpoint.download import Pretrained

theirs = pytest.importorskip("clip.clip")
OWN = r"clip_fast\.accelerate\(clip\.load\(…\)\[0\]\) has all of openai-clip's own model, made fast"


def test_load_takes_clips_arguments_in_clips_order(tmp_path: Path) -> None:
    for loaded in (
        clip_fast.load(name="tiny-digits", device="cpu"),
        clip_fast.load("tiny-digits", "cpu", False, str(tmp_path)),
        clip_fast.load("tiny-digits", "cpu", jit=False, download_root=None),
        clip_fast.load("tiny-digits", "cpu", None),
    ):
        assert loaded[0].dtype == torch.float32
    for third in ({"jit": torch.bfloat16}, {"dtype": torch.bfloat16}):  # a dtype stood third before `jit` did
        assert clip_fast.load("tiny-digits", "cpu", **third)[0].dtype == torch.bfloat16
    with pytest.raises(ValueError, match="pass jit=False"):
        clip_fast.load("tiny-digits", "cpu", True)


def test_downloads_go_to_the_fourth_argument(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = (published._ASSETS / "tiny-digits" / "model.safetensors").read_bytes()
    (tmp_path / "there.safetensors").write_bytes(content)
    source = Pretrained((tmp_path / "there.safetensors").as_uri(), hashlib.sha256(content).hexdigest())
    monkeypatch.setitem(published.OPENAI_CHECKPOINTS, "ViT-B/32", source)
    clip_fast.load("ViT-B/32", "cpu", False, tmp_path / "root")
    assert (tmp_path / "root" / "there.safetensors").is_file()


@pytest.mark.parametrize("name", ["ViT-Z/99", "", "nowhere/clip.pt"])
def test_an_unknown_name_is_clips_error_too(name: str) -> None:
    for error in (RuntimeError, ValueError, clip_fast.CheckpointError):
        with pytest.raises(error):
            clip_fast.load(name, "cpu")


def test_the_names_that_other_code_imports(tmp_path: Path) -> None:
    assert clip_fast.clip is clip
    assert clip._MODELS == theirs._MODELS
    assert [name for name in clip.available_models() if name in clip._MODELS] == theirs.available_models()
    assert clip._transform(96) == clip_fast.Preprocess(96)
    assert clip._tokenizer.encode("a dog") == theirs._tokenizer.encode("a dog")
    assert {"available_models", "load", "tokenize"} == set(clip.__all__) == set(theirs.__all__)
    for name in ("load", "tokenize", "available_models"):
        assert getattr(clip, name) is getattr(clip_fast, name)
    with pytest.raises(AttributeError, match=r"has no attribute .nothing."):
        clip.nothing  # noqa: B018


@pytest.mark.parametrize("name", ["", ".clip", ".model", ".simple_tokenizer"])
def test_every_name_of_clips_is_here_or_its_error_says_what_has_it(name: str) -> None:
    module = importlib.import_module(f"clip{name}")
    ours = importlib.import_module(f"clip_fast{name}")
    for each in dir(module):
        value = getattr(module, each)
        own = not inspect.ismodule(value) and getattr(value, "__module__", module.__name__) == module.__name__
        if own and not each.startswith("__"):
            assert hasattr(ours, each), each
        elif not hasattr(ours, each) and name:
            with pytest.raises(AttributeError, match=OWN):
                getattr(ours, each)


@pytest.mark.parametrize("kind", ["VisionTransformer", "ModifiedResNet", "Bottleneck", "AttentionPool2d", "Transformer",
                                  "ResidualAttentionBlock"])  # fmt: skip
def test_classes_that_are_not_made_here_say_what_has_them(kind: str) -> None:
    for arguments in ((), (64, 16, 128, 2, 2, 48)):
        with pytest.raises(TypeError, match=f"{kind} is here for isinstance only: {OWN}"):
            getattr(model, kind)(*arguments)


def test_a_download_by_address_is_checked(tmp_path: Path) -> None:
    content = b"weights"
    digest = hashlib.sha256(content).hexdigest()
    for name in (digest, "0" * 64):
        (tmp_path / name).mkdir()
        (tmp_path / name / "m.pt").write_bytes(content)
    got = clip._download((tmp_path / digest / "m.pt").as_uri(), str(tmp_path / "root"))
    assert got == str(tmp_path / "root" / "m.pt")
    with pytest.raises(clip_fast.CheckpointError, match="not whole or not genuine"):
        clip._download((tmp_path / ("0" * 64) / "m.pt").as_uri(), str(tmp_path / "elsewhere"))
