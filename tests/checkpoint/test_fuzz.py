"""Fuzzing: a checkpoint that was spoilt at random is read, or refused by a CheckpointError, in little memory."""

from __future__ import annotations

import functools
import io
import json
import random
import resource
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import clip_fast
from clip_fast.checkpoint.layouts import hugging_face_keys
from clip_fast.errors import CheckpointError
from clip_fast.towers import reference
from clip_fast.towers.config import Config, ResNetConfig, VitConfig

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*TorchScript.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),
]

TOWERS = (
    VitConfig(image_size=32, patch_size=16, width=64, layers=2, heads=1, embed_dim=8),
    ResNetConfig(layers=(1, 1, 1, 1), width=4, heads=2, image_size=32, embed_dim=8),
)
VISION = {"image_size": 32, "patch_size": 16, "width": 64, "layers": 2, "head_width": 64}
OPEN_CLIP = {
    "model_cfg": {"embed_dim": 8, "quick_gelu": True, "vision_cfg": VISION},
    "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2], "resize_mode": "shortest"},
}
HUGGING_FACE = {
    "model_type": "clip_vision_model",
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 1,
    "image_size": 32,
    "patch_size": 16,
    "projection_dim": 8,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
PROCESSOR = {
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.2, 0.2, 0.2],
    "size": {"shortest_edge": 32},
    "crop_size": {"height": 32, "width": 32},
    "rescale_factor": 1 / 255,
    "resample": 3,
}
JUNK: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        2,
        3.5,
        64.0,
        10**9,
        10**400,
        float("nan"),
        float("inf"),
        1e-300,
        "",
        "64",
        "\ud800",
    ),
    *([], [1], [[[]]], [0, 0, 0], [10**400, 1, 1], ["a", "b", "c"], {}, {"a": 1}, {"height": 32}, "gelu", "squash"),
)


@functools.cache
def shapes(config: Config) -> dict[str, tuple[torch.Size, torch.dtype]]:
    with torch.device("meta"):
        tower = reference.build(config)
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tower.state_dict().items()}


def weights(config: Config) -> dict[str, Tensor]:
    """Weights of a tower at random. Making the tower itself would take a quarter of the test's time."""
    return {name: torch.rand(shape).to(dtype) for name, (shape, dtype) in shapes(config).items()}


def state_dict(draw: random.Random) -> dict[str, Any]:
    return {f"visual.{name}": tensor for name, tensor in weights(draw.choice(TOWERS)).items()}


# --- what is done to a state dict ------------------------------------------------------------------------------------


def spoil_shape(draw: random.Random, tensor: Tensor) -> Any:
    return draw.choice(
        (
            lambda: tensor[:0],
            lambda: tensor[None],
            lambda: tensor.flatten(),
            lambda: tensor[:1].expand(1 << draw.randrange(1, 40), *tensor.shape[1:]),
            lambda: tensor.new_zeros(1).expand(tensor.shape),
            lambda: torch.zeros([draw.randrange(4) for _ in range(draw.randrange(5))]),
        )
    )()


def spoil_values(draw: random.Random, tensor: Tensor) -> Any:
    dtypes = (torch.int8, torch.bool, torch.complex64, torch.float8_e5m2, torch.float64, torch.bfloat16, torch.float16)
    return draw.choice(
        (
            lambda: tensor / 0,
            lambda: tensor * float("nan"),
            lambda: tensor.to(draw.choice(dtypes)),
            lambda: tensor.to_sparse(),
            lambda: nn.Parameter(tensor.float()),
            lambda: draw.choice((None, 3, "text", [1, 2], {"a": tensor}, (tensor,))),
        )
    )()


def spoil_name(draw: random.Random, name: str) -> str:
    parts = name.split(".")
    place = draw.randrange(len(parts))
    return draw.choice(
        (
            ".".join(parts[:place] + parts[place + 1 :]),
            ".".join(
                [*parts[:place], draw.choice(("7", "9" * 5000, "", "module", "visual", "é", "\0")), *parts[place:]]
            ),
            name.replace("visual.", draw.choice(("visual.trunk.", "vision_model.", "model.visual.", "", "text."))),
        )
    )


def spoiled(draw: random.Random, entries: dict[str, Any]) -> dict[Any, Any]:
    entries = dict(entries)
    for name in draw.sample(sorted(entries), draw.choice((1, 1, 1, 2, 5))):
        value: Tensor = entries[name]
        if value.ndim == 0 or draw.random() < 0.2:
            del entries[name]
        elif draw.random() < 0.3:
            entries[spoil_name(draw, name)] = entries.pop(name)
        else:
            entries[name] = draw.choice((spoil_shape, spoil_values))(draw, value)
    if draw.random() < 0.2:
        prefix = draw.choice(("module.", "model.", "a.b.c."))
        entries = {prefix + name: value for name, value in entries.items()}
    for _ in range(draw.choice((0, 0, 1, 3, 9))):
        entries = {draw.choice(("state_dict", "model", "é", "7")): entries, "epoch": 1}
    return entries


# --- what is done to bytes and to configs ----------------------------------------------------------------------------


def scrambled(draw: random.Random, data: bytes) -> bytes:
    """Changed near the ends, mostly, where names and sizes are: other bytes are weights."""
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 3, 20))):
        size = len(changed)
        place = draw.choice((draw.randrange(size), draw.randrange(size) % 2000, -draw.randrange(1, 2000) % size))
        kind = draw.randrange(4)
        if kind == 0:
            changed[place] ^= 1 << draw.randrange(8)
        elif kind == 1:
            changed[place : place + draw.randrange(1, 9)] = draw.randbytes(draw.randrange(1, 9))
        elif kind == 2:
            del changed[place : place + draw.randrange(1, 200)]
        else:
            changed = changed[: draw.randrange(len(changed))]
        if not changed:
            break
    return bytes(changed)


def with_junk(draw: random.Random, content: Any) -> Any:
    """JSON of which one value, at any depth, is junk or gone."""
    content = json.loads(json.dumps(content))
    section = content
    while True:
        key = draw.choice(sorted(section))
        if not isinstance(section[key], dict) or not section[key] or draw.random() < 0.2:
            break
        section = section[key]
    if draw.random() < 0.2:
        del section[key]
    else:
        section[key] = draw.choice(JUNK)
    return content


# --- the files -------------------------------------------------------------------------------------------------------


def entries_file(draw: random.Random, folder: Path) -> Path:
    torch.save(spoiled(draw, state_dict(draw)), folder / "m.pt", _use_new_zipfile_serialization=draw.random() < 0.8)
    return folder / "m.pt"


def bytes_file(draw: random.Random, folder: Path) -> Path:
    path, entries = folder / "m.pt", state_dict(draw)
    form = draw.choice(("zip", "legacy", "safetensors", "torchscript"))
    if form == "safetensors":
        save_file(entries, path)
    elif form == "torchscript":
        path.write_bytes(torchscript(draw.choice(TOWERS)))
    else:
        torch.save(entries, path, _use_new_zipfile_serialization=form == "zip")
    path.write_bytes(scrambled(draw, path.read_bytes()))
    return path


@functools.cache
def torchscript(config: Config) -> bytes:
    """A file of TorchScript, which is slow to make, and whose bytes are scrambled in another way each time."""
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(_Holder({f"visual.{name}": each for name, each in weights(config).items()})), file)
    return file.getvalue()


class _Holder(nn.Module):
    """The weights in modules, as TorchScript takes them."""

    def __init__(self, entries: dict[str, Tensor]) -> None:
        super().__init__()
        for name, tensor in entries.items():
            parent: nn.Module = self
            *path, leaf = name.split(".")
            for part in path:
                if not hasattr(parent, part):
                    parent.add_module(part, nn.Module())
                parent = getattr(parent, part)
            parent.register_buffer(leaf, tensor)

    def forward(self, x: Tensor) -> Tensor:
        return x


def open_clip_folder(draw: random.Random, folder: Path) -> Path:
    save_file(state_dict(draw), folder / "open_clip_model.safetensors")
    config = folder / "open_clip_config.json"
    config.write_text(json.dumps(with_junk(draw, OPEN_CLIP)))
    if draw.random() < 0.2:
        config.write_bytes(scrambled(draw, config.read_bytes()))
    return folder


def hugging_face_folder(draw: random.Random, folder: Path) -> Path:
    (folder / "config.json").write_text(json.dumps(draw.choice((HUGGING_FACE, with_junk(draw, HUGGING_FACE)))))
    (folder / "preprocessor_config.json").write_text(json.dumps(with_junk(draw, PROCESSOR)))
    entries: dict[str, Tensor] = {}
    for name, tensor in weights(TOWERS[0]).items():
        keys = hugging_face_keys(name)
        whole = tensor.T if name == "proj" else tensor
        entries |= {key: part.contiguous() for key, part in zip(keys, whole.chunk(len(keys)), strict=True)}
    if draw.random() < 0.5:
        save_file(entries, folder / "model.safetensors")
        return folder
    half = {key: tensor for key, tensor in entries.items() if draw.random() < 0.5}
    save_file(half, folder / "a.safetensors")
    save_file({key: tensor for key, tensor in entries.items() if key not in half}, folder / "b.safetensors")
    index = {"weight_map": {key: "a.safetensors" if key in half else "b.safetensors" for key in entries}}
    junk = (*JUNK, "a.safetensors", "../m", "model.safetensors.index.json", "x" * 5000, "\0")
    for key in draw.sample(sorted(entries), 2):
        index["weight_map"][key] = draw.choice(junk)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


KINDS: tuple[Callable[[random.Random, Path], Path], ...] = (
    entries_file,
    entries_file,
    bytes_file,
    open_clip_folder,
    hugging_face_folder,
)


@pytest.mark.parametrize("files", [100, pytest.param(2000, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])])
def test_spoilt_checkpoints_are_read_or_refused(files: int, tmp_path: Path) -> None:
    loaded = refused = 0
    for number in range(files):
        seed = random.randrange(2**32)
        draw, folder = random.Random(seed), tmp_path / str(number)
        folder.mkdir()
        torch.manual_seed(seed)
        kind = KINDS[number % len(KINDS)]
        path = kind(draw, folder)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            named = True
            try:
                clip_fast.load(path, "cpu", activation=draw.choice((None, "quick_gelu")))
                loaded += 1
            except CheckpointError as error:
                named = str(folder) in str(error)
                refused += 1
            except BaseException as error:
                raise AssertionError(f"file {number}, {kind.__name__}, seed {seed}: {error!r}") from error
            assert named, f"file {number}, {kind.__name__}, seed {seed}"
            grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # KiB
            assert grown < 300 * 1024, f"file {number}, {kind.__name__}, seed {seed}: {grown} KiB"
        for file in folder.iterdir():
            file.unlink()
    print(loaded, "loaded,", refused, "refused")
    assert loaded > files // 50
    assert refused > files // 3
