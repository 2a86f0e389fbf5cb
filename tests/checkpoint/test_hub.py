"""Names of models on the Hugging Face hub, against a hub on the loopback device that serves what the packages wrote."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from loopback_hub import LoopbackHub, loopback_hub, visit
from PIL import Image
from saved_clips import clip_tokenizer, close, hugging_face_folder, open_clip_folder, word_pieces
from saved_siglips import byte_pairs, siglip_folder

import clip_fast
from clip_fast.checkpoint import pairs
from clip_fast.checkpoint.published import published_models, resolve
from clip_fast.cli import main as cli
from clip_fast.errors import CheckpointError, NotServed
from clip_fast.towers.config import SiglipConfig

LAION = "laion/CLIP-ViT-B-32-laion2B-s34B-b79K"
IMAGES = torch.randn(2, 3, 64, 64)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    """A folder of transformers, and one that has open_clip's model too; with the model that each stands for."""
    root = tmp_path_factory.mktemp("folders")
    hugging_face, both, other = (root / name for name in ("hugging_face", "both", "other"))
    made = hugging_face_folder(hugging_face, eos_token_id=2)
    clip_tokenizer(hugging_face)
    (hugging_face / "modeling_clip.py").write_text("raise SystemExit('code of a checkpoint was run')")
    (hugging_face / "README.md").write_text("a card")
    torch.save(made.state_dict(), hugging_face / "pytorch_model.bin")
    shutil.copytree(hugging_face, both)
    open_clip = open_clip_folder(both)
    torch.save(open_clip.state_dict(), both / "open_clip_pytorch_model.bin")
    return {"hugging_face": (hugging_face, made), "both": (both, open_clip), "other": (other, open_clip_folder(other))}


@pytest.fixture
def hub(folders: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    """Empty is its cache."""
    with loopback_hub() as served:
        served.add("openai/clip-vit-base-patch32", folders["hugging_face"][0])
        served.add(LAION, folders["both"][0])
        served.add(LAION, folders["other"][0], revision="v2")
        visit(served, tmp_path / "cache", monkeypatch)
        monkeypatch.chdir(tmp_path)
        yield served


def embeddings(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found = model.encode_image(IMAGES) if hasattr(model, "encode_image") else model.get_image_features(IMAGES)
        return getattr(found, "pooler_output", found)


def loaded(name: str, **options: Any) -> Any:
    return clip_fast.load(name, "cpu", **options)[0].requires_grad_(False)


def pages_of(file: Path, tensor: torch.Tensor) -> bool:
    """Whether a tensor is in pages that the system has mapped from a file."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if str(file) in line]
    bounds = [[int(address, 16) for address in line[0].split("-")] for line in lines]
    return any(begin <= tensor.data_ptr() < end for begin, end in bounds)


TOKENIZER = {"tokenizer.json", "tokenizer_config.json"}


@pytest.mark.parametrize(
    ("name", "model", "files"),
    [
        ("openai/clip-vit-base-patch32", "hugging_face", {"config.json", "model.safetensors"} | TOKENIZER),
        (f"hf-hub:{LAION}", "both", {"open_clip_config.json", "open_clip_model.safetensors"} | TOKENIZER),
        ("ViT-B-32/laion2b_s34b_b79k", "both", {"open_clip_config.json", "open_clip_model.safetensors"} | TOKENIZER),
        ("ViT-B-32/laion2B-s34B-b79K@v2", "other", {"open_clip_config.json", "open_clip_model.safetensors"}),
        (f"{LAION}@v2", "other", {"open_clip_config.json", "open_clip_model.safetensors"}),
    ],
)
def test_a_name_gives_the_packages_model(
    name: str, model: str, files: set[str], folders: dict[str, Any], hub: LoopbackHub
) -> None:
    """Only what is needed is downloaded, safetensors where there are two, and once."""
    ours = loaded(name)
    assert close(embeddings(ours), embeddings(folders[model][1]))
    assert ours.tokenize("a photo").shape == (1, 77)
    assert set(hub.downloads()) == files
    assert hub.downloads()[-1].endswith(".safetensors")  # so that weights in the cache have all beside them
    hub.requests.clear()
    assert close(embeddings(loaded(name)), embeddings(ours))
    assert len(hub.requests) <= 2
    assert not hub.downloads()


def test_a_commit_is_a_revision(folders: dict[str, Any], hub: LoopbackHub) -> None:
    commit = hub.add(LAION, folders["other"][0], revision="v2")
    assert close(embeddings(loaded(f"{LAION}@{commit}")), embeddings(folders["other"][1]))


def test_a_download_is_kept_where_it_is_asked_for(hub: LoopbackHub, tmp_path: Path) -> None:
    loaded("openai/clip-vit-base-patch32", download_root=tmp_path / "elsewhere")
    assert (tmp_path / "elsewhere" / "models--openai--clip-vit-base-patch32").is_dir()
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("how", ["HF_HUB_OFFLINE", "no network"])
@pytest.mark.parametrize("name", [LAION, "ViT-B-32/laion2b_s34b_b79k@v2"])
def test_without_a_network_the_cache_serves(
    how: str, name: str, hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = embeddings(loaded(name))
    hub.requests.clear()
    gone = LoopbackHub()
    gone.address = "http://127.0.0.1:9"
    visit(hub if how == "HF_HUB_OFFLINE" else gone, tmp_path / "cache", monkeypatch, offline=how == "HF_HUB_OFFLINE")
    assert torch.equal(embeddings(loaded(name)), wanted)
    assert not hub.requests
    with pytest.raises(
        CheckpointError, match=r"hf-hub:openai/clip-vit-base-patch32: it is not in the cache, .*cache, "
    ):
        loaded("openai/clip-vit-base-patch32")


@pytest.mark.parametrize("missing", ["open_clip_config.json", "preprocessor_config.json", ""])
def test_a_cache_that_another_program_filled(
    missing: str, hub: LoopbackHub, folders: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """open_clip brings weights alone, transformers a model without its processor."""
    if missing.startswith("open_clip"):
        huggingface_hub.hf_hub_download(LAION, "open_clip_model.safetensors", cache_dir=tmp_path / "cache")
    else:
        folder = tmp_path / "whole"
        shutil.copytree(folders["hugging_face"][0], folder)
        (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.1, 0.2, 0.3], "size": 64}))
        hub.add("someone/whole", folder)
        for file in folder.iterdir():
            if file.name != missing:
                huggingface_hub.hf_hub_download("someone/whole", file.name, cache_dir=tmp_path / "cache")
    visit(hub, tmp_path / "cache", monkeypatch, offline=True)
    if missing.startswith("open_clip"):
        with pytest.raises(CheckpointError, match=r"its open_clip_config\.json is not in the cache, .*unset it once$"):
            loaded(f"hf-hub:{LAION}")
    elif missing:
        with pytest.warns(UserWarning, match="the cache has no image processor of it, and the hub could not be"):
            assert clip_fast.load("someone/whole", "cpu")[1].mean != (0.1, 0.2, 0.3)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert clip_fast.load("someone/whole", "cpu")[1].mean == (0.1, 0.2, 0.3)


def test_a_shard_that_was_not_brought_is_told(
    hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "sharded"
    sharded(folder)
    hub.add("someone/sharded", folder)
    lost = sorted(folder.glob("model-*.safetensors"))[-1].name
    for file in folder.iterdir():
        if file.name != lost:
            huggingface_hub.hf_hub_download("someone/sharded", file.name, cache_dir=tmp_path / "cache")
    visit(hub, tmp_path / "cache", monkeypatch, offline=True)
    with pytest.raises(CheckpointError, match=rf"its {lost} is not in the cache, .*unset it once$"):
        loaded("someone/sharded")


@pytest.mark.parametrize("inside", ["", "0_CLIPModel"])
def test_a_model_that_has_no_image_processor_is_not_warned_of(
    inside: str, hub: LoopbackHub, folders: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub is asked for one once, and the cache keeps the answer."""
    folder = tmp_path / "bare"
    shutil.copytree(folders["hugging_face"][0], folder / inside)
    for name in ("preprocessor_config.json", "processor_config.json"):
        (folder / inside / name).unlink(missing_ok=True)
    hub.add("someone/bare", folder)
    wanted = clip_fast.load("someone/bare", "cpu")[1].mean
    hub.requests.clear()
    loaded("someone/bare")
    assert not any("processor" in request for request in hub.requests)
    visit(hub, tmp_path / "cache", monkeypatch, offline=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert clip_fast.load("someone/bare", "cpu")[1].mean == wanted


@pytest.mark.skipif(sys.platform != "linux", reason="the mappings of a process are read from /proc")
def test_float32_weights_are_pages_of_the_cache(hub: LoopbackHub, tmp_path: Path) -> None:
    """They are no copies, they can be trained, and neither changes the file nor are they lost with it."""
    name = f"hf-hub:{LAION}"
    model = loaded(name)
    blob = max((tmp_path / "cache").rglob("blobs/*"), key=lambda path: path.stat().st_size)
    before = blob.read_bytes()
    assert all(pages_of(blob, tensor) for tensor in model.parameters())
    assert not any(pages_of(blob, tensor) for tensor in loaded(name, dtype=torch.bfloat16).parameters())
    wanted = embeddings(model)

    trained = loaded(name)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.mul_(0.5)
    assert not close(embeddings(trained), wanted)
    assert blob.read_bytes() == before
    assert close(embeddings(loaded(name)), wanted)
    shutil.rmtree(tmp_path / "cache")
    model.refresh()
    assert torch.equal(embeddings(model), wanted)


@pytest.mark.skipif(sys.platform != "linux", reason="the mappings of a process are read from /proc")
@pytest.mark.parametrize("odd", [False, True])
def test_weights_that_their_writer_did_not_align_are_copied(odd: bool, hub: LoopbackHub, tmp_path: Path) -> None:
    made = open_clip_folder(tmp_path / "odd")
    file = tmp_path / "odd" / "open_clip_model.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    file.write_bytes(
        (length + odd).to_bytes(8, "little") + content[8 : 8 + length] + b" " * odd + content[8 + length :]
    )
    hub.add("owner/odd", tmp_path / "odd")
    model = loaded("hf-hub:owner/odd")
    blob = max((tmp_path / "cache").rglob("blobs/*"), key=lambda path: path.stat().st_size)
    assert all(pages_of(blob, tensor) != odd for tensor in model.parameters())
    assert close(embeddings(model), embeddings(made))


@pytest.mark.skipif(sys.platform != "linux", reason="the mappings of a process are read from /proc")
def test_weights_of_another_file_are_copied(folders: dict[str, Any], tmp_path: Path) -> None:
    """It may be written again."""
    shutil.copytree(folders["other"][0], tmp_path / "blobs")
    model = loaded(tmp_path / "blobs")
    file = tmp_path / "blobs" / "open_clip_model.safetensors"
    assert not any(pages_of(file, tensor) for tensor in model.parameters())


def test_a_broken_download_goes_on_where_it_was(hub: LoopbackHub, folders: dict[str, Any]) -> None:
    hub.cut_after = 11_000_000  # more than huggingface_hub writes at once
    assert close(embeddings(loaded(f"hf-hub:{LAION}")), embeddings(folders["both"][1]))
    assert len(hub.ranges) == 1
    assert hub.ranges[0] != "bytes=0-"


def sharded(folder: Path) -> Any:
    """A model of transformers, written to a folder in several files."""
    made = hugging_face_folder(folder)
    (folder / "model.safetensors").unlink()
    made.save_pretrained(folder, max_shard_size="2MB")
    return made


def test_shards(tmp_path: Path, hub: LoopbackHub) -> None:
    made = sharded(tmp_path / "sharded")
    hub.add("someone/sharded", tmp_path / "sharded")
    ours = loaded("someone/sharded")
    assert close(embeddings(ours), embeddings(made))
    assert len([name for name in hub.downloads() if name.startswith("model-")]) > 1


def test_a_pickle_where_there_is_nothing_else(tmp_path: Path, hub: LoopbackHub) -> None:
    made = open_clip_folder(tmp_path / "bin", weights="open_clip_pytorch_model.bin")
    hub.add("someone/bin", tmp_path / "bin")
    assert close(embeddings(loaded("someone/bin")), embeddings(made))


def test_a_repository_of_sentence_transformers(
    hub: LoopbackHub, folders: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its parts have a folder each."""
    folder, made = folders["hugging_face"]
    shutil.copytree(folder, tmp_path / "st" / "0_CLIPModel")
    (tmp_path / "st" / "modules.json").write_text("[]")
    hub.add("sentence-transformers/clip-ViT-B-32", tmp_path / "st")
    model = loaded("sentence-transformers/clip-ViT-B-32")
    assert close(embeddings(model), embeddings(made))
    assert model.tokenize("a dog").shape == (1, 77)
    assert all(name.startswith("0_CLIPModel/") for name in hub.downloads())
    visit(hub, tmp_path / "cache", monkeypatch, offline=True)
    assert torch.equal(embeddings(loaded("sentence-transformers/clip-ViT-B-32")), embeddings(model))


@pytest.fixture
def other_words(hub: LoopbackHub, tmp_path: Path) -> tuple[str, Any]:
    """A model whose config names another repository's tokenizer, as open_clip's CLIPA does; and that tokenizer."""
    names = {"hf_tokenizer_name": "google/words", "tokenizer_kwargs": {"strip_sep_token": True}}
    open_clip_folder(tmp_path / "model", text_cfg=names | {"vocab_size": 32000})
    hub.add("a/model", tmp_path / "model")
    return "hf-hub:a/model", word_pieces(tmp_path / "words")


@pytest.mark.parametrize("place", ["the hub's cache", "a folder"])
def test_a_tokenizer_of_another_repository(
    place: str, hub: LoopbackHub, other_words: tuple[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is brought along, and found again without a network, whichever cache it is in."""
    name, theirs = other_words
    hub.add("google/words", tmp_path / "words")
    cache = {"download_root": tmp_path / "folder"} if place == "a folder" else {}
    tokens = theirs(["a photo"], padding="max_length", max_length=77, return_tensors="pt").input_ids
    tokens[tokens == theirs.sep_token_id] = 0
    assert torch.equal(loaded(name, **cache).tokenize("a photo"), tokens)
    assert {"tokenizer.json", "tokenizer_config.json"} <= set(hub.downloads())
    asked = len(hub.requests)
    loaded(name, **cache)
    assert not [line for line in hub.requests[asked:] if "google/words" in line]
    visit(hub, tmp_path / "cache", monkeypatch, offline=True)
    assert torch.equal(loaded(name, **cache).tokenize("a photo"), tokens)


@pytest.mark.parametrize("named", ["google/words", "./words", "no name", "a/b/c"])
def test_a_tokenizer_that_cannot_be_had(named: str, hub: LoopbackHub, tmp_path: Path) -> None:
    """Images are served all the same."""
    open_clip_folder(tmp_path / "model", text_cfg={"hf_tokenizer_name": named, "vocab_size": 32000})
    hub.add("a/model", tmp_path / "model")
    model = loaded("hf-hub:a/model")
    assert embeddings(model).isfinite().all()
    with pytest.raises(NotServed, match=f"its tokenizer is that of {named}: place its tokenizer.json in"):
        model.tokenize("a photo")


def test_a_local_copy_of_a_repository_with_timms_files_too(folders: dict[str, Any], tmp_path: Path) -> None:
    """As timm's own repositories of CLIP's towers."""
    folder, made = folders["other"]
    shutil.copytree(folder, tmp_path / "timm")
    (tmp_path / "timm" / "model.safetensors").write_bytes(b"another model's")
    (tmp_path / "timm" / "config.json").write_text(json.dumps({"architecture": "vit_base_patch32_clip_224"}))
    assert close(embeddings(loaded(str(tmp_path / "timm"))), embeddings(made))


def test_a_local_folder_wins(hub: LoopbackHub, folders: dict[str, Any], tmp_path: Path) -> None:
    shutil.copytree(folders["other"][0], tmp_path / LAION)
    assert close(embeddings(loaded(LAION)), embeddings(folders["other"][1]))
    assert not hub.requests
    assert close(embeddings(loaded(f"hf-hub:{LAION}")), embeddings(folders["both"][1]))


def test_a_gated_model(hub: LoopbackHub, folders: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("someone/gated", folders["other"][0], token="hf_secret")
    with pytest.raises(CheckpointError, match=rf"its owner grants access: ask for it at {hub.address}/someone/gated"):
        loaded("someone/gated")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert close(embeddings(loaded("someone/gated")), embeddings(folders["other"][1]))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lion/CLIP-ViT-B-32", r"hf-hub:lion/CLIP-ViT-B-32: no model of that name is at http.*check the spelling"),
        (f"{LAION}@v3", rf"hf-hub:{LAION}@v3: the model has no revision 'v3'"),
        ("hf-hub:a/b/c", r"hf-hub:a/b/c: is no name of a model on the hub"),
        (
            "ViT-B-32/laion2b",
            r"ViT-B-32/laion2b: ViT-B-32 has no weights of that name, only openai, .*laion2b_s34b_b79k",
        ),
        ("ViT-B-32-quickgelu/laion2b_s34b_b79k", r"ViT-B-32-quickgelu has no weights of that name, only openai"),
        ("EVA02-B-16/merged2b_s8b_b131k", r"merged2b_s8b_b131k: is the name of one of open_clip's EVA models"),
        ("coca_ViT-B-32/laion2b_s13b_b90k", r"one of open_clip's CoCa models, which are not served"),
        ("ViT-B/33", r"no file or folder has this name; did you mean 'ViT-B/32'\?"),
        ("", r"^the model: its name is empty$"),
        ("ViT-SO400M-14-SigLIP-378/webli", r"load\('ViT-SO400M-14-SigLIP-384/webli', image_size=378\)$"),
        ("vit-b-32/laion2b_s34b_b79k", r"did you mean 'ViT-B-32/laion2b_s34b_b79k'\?"),
        ("photos/clip.safetensors", r"photos/clip\.safetensors: no such file, and no model of that name"),
    ],
)
def test_names_that_are_none(name: str, message: str, hub: LoopbackHub) -> None:
    with pytest.raises(CheckpointError, match=message):
        loaded(name)


def test_a_hub_that_does_not_answer(
    hub: LoopbackHub, folders: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes connections, and says nothing: the cache serves after the time that huggingface_hub waits."""
    model = loaded(LAION)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        visit(hub, tmp_path / "cache", monkeypatch)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_ETAG_TIMEOUT", 0.2)
        assert torch.equal(embeddings(loaded(LAION)), embeddings(model))
        with pytest.raises(CheckpointError, match=r"it is not in the cache.*cannot be reached"):
            loaded("someone/else")


@pytest.mark.parametrize(
    ("status", "message"),
    [(401, "does not accept the token .*unset HF_TOKEN"), (503, "answered 503 .*try again later")],
)
def test_a_hub_that_refuses(status: int, message: str, hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    class Refused(Exception):
        response = SimpleNamespace(status_code=status)  # as of huggingface_hub's own errors

    def refused(*_: Any, **__: Any) -> None:
        raise Refused

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refused)
    with pytest.raises(CheckpointError, match=f"it is not in the cache.*{message}"):
        loaded("someone/else")


CONFIGS = {
    "of a bert": {"config.json": {"model_type": "bert"}},
    "of a convnext_base": {
        "open_clip_config.json": {"model_cfg": {"vision_cfg": {"timm_model_name": "convnext_base"}}}
    },
    "is of a CoCa": {
        "open_clip_config.json": {
            "model_cfg": {"vision_cfg": {"patch_size": 32, "attentional_pool": True}, "multimodal_cfg": {"width": 512}}
        }
    },
    "its config.json has an unexpected structure": {
        "config.json": {
            "model_type": "clip",
            "vision_config": {"image_size": 224},
            "text_config": {"num_attention_heads": "8"},
        }
    },
    "vision_cfg sets qk_norm": {"open_clip_config.json": {"model_cfg": {"vision_cfg": {"qk_norm": True}}}},
    "of a siglip2: a NaFlex tower": {"config.json": {"model_type": "siglip2"}},
    "not a CLIP's": {"config.json": {"architectures": ["X"]}},
    "it has none of model.safetensors": {},
}


@pytest.mark.parametrize("reason", CONFIGS)
def test_what_is_no_clip_is_not_downloaded(reason: str, hub: LoopbackHub, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    folder.mkdir()
    for name, content in CONFIGS[reason].items():
        (folder / name).write_text(json.dumps(content))
    for weights in ("model.safetensors", "open_clip_model.safetensors"):
        (folder / weights).write_bytes(b"never read")
    hub.add("someone/other", folder)
    with pytest.raises(CheckpointError, match=f"hf-hub:someone/other: is no CLIP that is served: .*{reason}"):
        loaded("someone/other")
    assert not any(name.endswith(".safetensors") for name in hub.downloads())


@pytest.mark.parametrize(("name", "kind"), [(f"hf-hub:{LAION}", ModuleNotFoundError), (LAION, CheckpointError)])
def test_the_extra_is_named(name: str, kind: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that might be a file's is said to be none, too."""
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.setitem(sys.modules, "huggingface_hub.errors", None)
    message = r'pip install "clip_fast\[hub\]"'
    with pytest.raises(kind, match=message if kind is ModuleNotFoundError else f"no such file or folder.*{message}"):
        resolve(name)


# --- the table -------------------------------------------------------------------------------------------------------


def test_pairs_are_open_clips() -> None:
    """Of all architectures whose image towers are ViTs, ResNets and SigLIPs, as open_clip itself resolves them."""
    pytest.importorskip("open_clip")
    from open_clip import factory, pretrained

    found = 0
    for architecture, tag in pretrained.list_pretrained():
        config = factory.get_model_config(architecture)
        if config is None or "multimodal_cfg" in config:
            continue
        if "_siglip_" not in config["vision_cfg"].get("timm_model_name", "_siglip_"):
            continue
        wanted = pretrained.get_pretrained_cfg(architecture, tag)["hf_hub"].rstrip("/")
        if architecture in pairs.SAME_WEIGHTS:
            other, size = pairs.SAME_WEIGHTS[architecture]
            assert pairs.hub_model(architecture, tag) is None
            assert (pairs.hub_model(other, tag), size) == (wanted, config["vision_cfg"]["image_size"])
            continue
        assert pairs.hub_model(architecture, tag) == wanted, (architecture, tag)
        found += 1
    listed = sum(len(pairs.tags_of(name)) for plain in pairs.PAIRS for name in (plain, f"{plain}-quickgelu"))
    assert found == listed > 100


def test_architectures_are_open_clips() -> None:
    timm = pytest.importorskip("timm")
    pytest.importorskip("open_clip")
    from open_clip import factory

    assert pairs.ARCHITECTURES.keys() == pairs.PAIRS.keys()
    for name, ours in pairs.ARCHITECTURES.items():
        model = factory.get_model_config(name)
        vision = model["vision_cfg"]
        text = model["text_cfg"]
        assert (name in pairs.IMAGES_ONLY) == ("hf_model_name" in text)
        if isinstance(ours, SiglipConfig):
            assert (ours.image_size, ours.embed_dim) == (vision["image_size"], model["embed_dim"])
            with torch.device("meta"):
                tower = timm.create_model(vision["timm_model_name"], num_classes=0, img_size=vision["image_size"])
            block = tower.blocks[0]
            assert (ours.layers, ours.heads, ours.width) == (len(tower.blocks), block.attn.num_heads, tower.embed_dim)
            assert ours.mlp_width == block.mlp.fc1.out_features
            assert ours.patch_size == tower.patch_embed.patch_size[0]
            continue
        assert (ours.image_size, ours.embed_dim, ours.width) == (
            vision["image_size"],
            model["embed_dim"],
            vision["width"],
        )
        attention = ours.width * (32 if isinstance(vision["layers"], list) else 1)
        assert ours.heads == attention // vision.get("head_width", 64)
        layers: Any = ours.layers
        assert (list(layers) if isinstance(layers, tuple) else layers) == vision["layers"]
        assert getattr(ours, "patch_size", None) == vision["patch_size"]
        assert getattr(ours, "mlp_ratio", 4.0) == vision.get("mlp_ratio", 4.0)
        assert getattr(ours, "ln_pre", True) != vision.get("no_ln_pre", False)
        assert getattr(ours, "pool", "tok") == vision.get("pool_type", "tok")
        assert getattr(ours, "ln_after_pool", False) == vision.get("final_ln_after_pool", False)


def test_repositories_of_siglip_have_the_shapes_of_their_names() -> None:
    """Their names tell the patch and the image; the kind of tower is in both names."""
    kinds = {"base": "B", "large": "L", "so400m": "SO400M", "giant": "gopt"}
    for repository, architecture in pairs.SIGLIP_REPOSITORIES.items():
        family, kind, patch, size = re.findall(r"/(siglip2?)-([a-z0-9]+)(?:-opt)?-patch(\d+)-(\d+)", repository)[0]
        config = pairs.ARCHITECTURES[architecture]
        assert (config.patch_size, config.image_size) == (int(patch), int(size))  # type: ignore[union-attr]
        assert f"-{kinds[kind]}-" in architecture
        if repository != "google/siglip2-so400m-patch14-384":  # which open_clip has for 378 pixels
            assert ("SigLIP2" in architecture) == (family == "siglip2")


def test_all_names_are_listed() -> None:
    names = [model.name for model in published_models()]
    assert names == clip_fast.available_models()
    assert len(names) == len(set(names))
    wanted = {
        "ViT-B/32",
        "tiny-digits",
        "ViT-H-14-378/dfn5b",
        "ViT-B-16-SigLIP/webli",
        "google/siglip2-base-patch16-224",
    }
    assert wanted <= set(names)


# --- as a new user ---------------------------------------------------------------------------------------------------


WORDS = "a dog on a beach"


def photographs(folder: Path) -> list[str]:
    """Names of photographs that are made in a folder."""
    (folder / "photos").mkdir()
    for i in range(3):
        Image.new("RGB", (40, 30), (80 * i, 0, 90)).save(folder / "photos" / f"{i}.png")
    return [f"photos/{i}.png" for i in range(3)]


def found(lines: str) -> list[str]:
    return sorted(line.split("\t")[1] for line in lines.splitlines())


@pytest.mark.slow
def test_from_a_name_to_a_search_by_words(hub: LoopbackHub, tmp_path: Path) -> None:
    """With an empty cache, in one line of the shell; then again without the hub."""
    names = photographs(tmp_path)
    root = Path(clip_fast.__file__).parent.parent
    environment = os.environ | {
        "HF_ENDPOINT": hub.address,
        "HF_HOME": str(tmp_path / "home"),
        "PYTHONPATH": os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    environment.pop("HF_HUB_OFFLINE", None)
    command = f"{sys.executable} -m clip_fast"
    line = (
        f"{command} encode photos/ --model ViT-B-32/laion2b_s34b_b79k --output embeddings/ && "
        f'{command} search "{WORDS}" --index embeddings/'
    )
    for offline in ("0", "1"):
        done = subprocess.run(
            ["bash", "-c", line], env=environment | {"HF_HUB_OFFLINE": offline}, cwd=tmp_path, capture_output=True,
            text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert found(done.stdout) == names
        assert ("open_clip_model.safetensors" in hub.downloads()) == (offline == "0")
        hub.requests.clear()
        shutil.rmtree(tmp_path / "embeddings")


@pytest.mark.slow
def test_from_a_siglip_to_a_search_by_words(
    hub: LoopbackHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With an empty cache, in this process."""
    name = "google/siglip2-base-patch16-224"
    names = photographs(tmp_path)
    siglip_folder(tmp_path / "siglip")
    byte_pairs(tmp_path / "siglip", "GemmaTokenizer")
    hub.add(name, tmp_path / "siglip")
    assert cli.main(["encode", "photos/", "--model", name, "--output", "embeddings/"]) == 0
    assert "model.safetensors" in hub.downloads()
    capsys.readouterr()
    assert cli.main(["search", WORDS, "--index", "embeddings/"]) == 0
    assert found(capsys.readouterr().out) == names
