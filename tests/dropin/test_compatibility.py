"""Every model family of every package at its real widths, accelerated: which outputs are fast, and the same.

    pytest tests/dropin/test_compatibility.py --compatibility docs/compatibility.md

writes what it has seen as a table; lines of other packages and versions in that file stay.

Image towers keep their widths, heads, patches, image sizes and activations. They lose layers, since a family is another
shape of a block, and not another number of blocks. One of each kind has all: openai-clip's RN50, open_clip's ViT-B-32
and transformers' CLIPVisionModel. Text towers, which `accelerate` leaves alone, are small.
"""

from __future__ import annotations

import copy
import gzip
import importlib
import importlib.metadata
import json
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_checks import assert_same_bits
from packaging.version import Version
from torch import Tensor, nn

import clip_fast
from clip_fast.dropin.accelerate import is_accelerated
from clip_fast.errors import NotServed
from clip_fast.towers.config import IMAGE_MEAN, IMAGE_STD, SIGLIP_MEAN, SIGLIP_STD, ImageSize, Rgb, sides

FAST, ORIGINAL = "fast", "original"
PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"


@dataclass(frozen=True)
class Family:
    """Models of one package that are built alike. `refused` is a part of the error where they are not served."""

    package: str
    name: str
    make: Callable[[], Any]
    refused: str = ""
    size: ImageSize = 224
    normalisation: tuple[Rgb, Rgb] = (IMAGE_MEAN, IMAGE_STD)  # mean and deviation
    by_original: tuple[str, ...] = ()  # outputs that the original gives, besides those that it gives of every family


def openai_clip(*shape: Any) -> Callable[[], nn.Module]:
    return lambda: importlib.import_module("clip.model").CLIP(*shape, 77, 1000, 64, 2, 1)


def open_clip(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: importlib.import_module("open_clip").create_model(name, pretrained=None, **options)


def cut(
    name: str, layers: int | tuple[int, ...] | None = 1, options: dict[str, Any] | None = None, **vision: Any
) -> Callable[[], nn.Module]:
    """A model of open_clip's, its image tower cut to a few layers (None: all), its text towers to one and few tokens.

    `options` are for open_clip's `create_model`, and `vision` for its `vision_cfg`.
    """

    def make() -> nn.Module:
        package: Any = importlib.import_module("open_clip")
        config = package.get_model_config(name)
        shape = config["vision_cfg"] | ({} if layers is None else {"layers": layers}) | vision
        others = {"text_cfg": config["text_cfg"] | {"layers": 1, "vocab_size": 100}}
        if "multimodal_cfg" in config:
            others["multimodal_cfg"] = config["multimodal_cfg"] | {"layers": 1}
        model = open_clip(name, vision_cfg=shape, **others, **(options or {}))()
        for part, weight in model.named_parameters():
            if part.endswith(".gamma"):  # a fresh LayerScale hides the blocks
                torch.nn.init.uniform_(weight, 0.5, 2)
        return model

    return make


def cut_siglip(name: str) -> Callable[[], nn.Module]:
    """A SigLIP of open_clip's, its image tower, which is timm's, cut to one layer, and its text tower to few tokens."""

    def make() -> nn.Module:
        package: Any = importlib.import_module("open_clip")
        timm: Any = importlib.import_module("timm")
        create = timm.create_model
        text = package.get_model_config(name)["text_cfg"] | {"layers": 1, "vocab_size": 100}
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(timm, "create_model", lambda *given, **options: create(*given, **options, depth=1))
            return open_clip(name, text_cfg=text)()

    return make


def so400m_of_transformers() -> nn.Module:
    """SO400M at 384 pixels, one layer, with a small text tower."""
    module: Any = importlib.import_module("transformers")
    vision = {"hidden_size": 1152, "intermediate_size": 4304, "num_attention_heads": 16, "patch_size": 14}
    text = {"hidden_size": 1152, "intermediate_size": 64, "num_attention_heads": 16, "vocab_size": 100}
    layer = {"num_hidden_layers": 1}
    ends = {"bos_token_id": 1, "eos_token_id": 2}
    config = module.SiglipConfig(text_config=text | layer | ends, vision_config=vision | layer | {"image_size": 384})
    return module.SiglipModel(config)


def llava() -> nn.Module:
    """With a vision tower of real shape, cut to two layers, and a small language model."""
    module: Any = importlib.import_module("transformers")
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1}
    text = module.LlamaConfig(**shape, num_key_value_heads=1, vocab_size=100)
    vision = module.CLIPVisionConfig(**_TWO_LAYERS)
    config = module.LlavaConfig(vision_config=vision, text_config=text, image_token_id=99)
    return module.LlavaForConditionalGeneration(config)


def transformers(name: str, config: str, **settings: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        module: Any = importlib.import_module("transformers")
        return getattr(module, name)(getattr(module, config)(**settings))

    return make


def sentence_transformers() -> nn.Module:
    """Read from a folder, as its users do, which is made first: model, processor and tokenizer."""
    import tempfile

    transformers: Any = importlib.import_module("transformers")
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        config = transformers.CLIPConfig(vision_config=_TWO_LAYERS, text_config={"num_hidden_layers": 1})
        transformers.CLIPModel(config).save_pretrained(place)
        transformers.CLIPImageProcessor().save_pretrained(place)
        merges = gzip.decompress(_VOCABULARY.read_bytes()).decode().splitlines()[1 : 49152 - 256 - 2 + 1]
        (place / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
        (place / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(_tokens(merges))}))
        (place / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer"}))
        package: Any = importlib.import_module("sentence_transformers")
        return package.SentenceTransformer(str(place), device="cpu")


_VOCABULARY = Path(clip_fast.__file__).parent / "assets" / "vocabulary" / "bpe_simple_vocab_16e6.txt.gz"


def _tokens(merges: list[str]) -> list[str]:
    letters = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [chr(256 + i) for i in range(256 - len(letters))]
    symbols = [*map(chr, letters), *others]
    pairs = ["".join(merge.split()) for merge in merges]
    return [*symbols, *(f"{symbol}</w>" for symbol in symbols), *pairs, "<|startoftext|>", "<|endoftext|>"]


# Late releases of transformers 4 take hidden states from SigLIP's layers, which the original must run for that.
_OLD_TRANSFORMERS = find_spec("transformers") and importlib.metadata.version("transformers").startswith("4.")
_COLLECTED = ("hidden states",) if _OLD_TRANSFORMERS else ()

_TWO_LAYERS = {"num_hidden_layers": 2}
_SMALL_TEXT = {"num_hidden_layers": 1, "vocab_size": 100, "bos_token_id": 1, "eos_token_id": 2}
QUICK = ("ViT-B/32", "RN50", "ViT-B-32", "CLIPVisionModel")  # the others take some seconds: slow tests
FAMILIES = [
    Family("openai-clip", "ViT-B/32", openai_clip(512, 224, 2, 768, 32)),
    Family("openai-clip", "ViT-B/16", openai_clip(512, 224, 2, 768, 16)),
    Family("openai-clip", "RN50", openai_clip(1024, 224, (3, 4, 6, 3), 64, None)),
    Family("openai-clip", "RN50x4", openai_clip(640, 288, (2, 1, 2, 1), 80, None), size=288),
    Family("open_clip_torch", "ViT-B-32", cut("ViT-B-32", None)),
    Family("open_clip_torch", "ViT-B-32, QuickGELU forced", cut("ViT-B-32", 2, {"force_quick_gelu": True})),
    Family("open_clip_torch", "ViT-B-16-plus-240, two layers", cut("ViT-B-16-plus-240", 2), size=240),
    Family(
        "open_clip_torch", "ViT-B-32 at 256 pixels", cut("ViT-B-32", 2, image_size=256), size=256
    ),
    Family("open_clip_torch", "ViT-B-32 in a CustomTextCLIP", cut("ViT-B-32", 2, {"force_custom_text": True})),
    Family("open_clip_torch", "ViT-H-14-378-quickgelu, one layer", cut("ViT-H-14-378-quickgelu"), size=378),
    Family("open_clip_torch", "ViT-L-14-CLIPA, one layer", cut("ViT-L-14-CLIPA")),
    Family("open_clip_torch", "ViT-M-16-alt, with LayerScale, two layers", cut("ViT-M-16-alt", 2)),
    Family(
        "open_clip_torch", "ViT-B-32, average of the patch tokens, two layers", cut("ViT-B-32", 2, pool_type="avg")
    ),
    Family(
        "open_clip_torch", "ViT-B-16 at 128 by 256 pixels, two layers", cut("ViT-B-16", 2, image_size=(128, 256)),
        size=(128, 256),
    ),
    Family("open_clip_torch", "EVA02-B-16", open_clip("EVA02-B-16"), refused="its visual.trunk is a timm.models.eva"),
    Family(
        "open_clip_torch", "MobileCLIP-S1", open_clip("MobileCLIP-S1"), refused="its visual.trunk is a timm.models.fast"
    ),
    Family("open_clip_torch", "RN50", cut("RN50", (2, 1, 2, 1))),
    Family("open_clip_torch", "coca_ViT-B-32", cut("coca_ViT-B-32"), refused="attn_pool is"),
    *(
        Family(
            "open_clip_torch", f"{name}, one layer", cut_siglip(name), size=size,
            normalisation=(SIGLIP_MEAN, SIGLIP_STD),
        )
        for name, size in (
            ("ViT-B-16-SigLIP", 224), ("ViT-B-32-SigLIP2-256", 256), ("ViT-L-16-SigLIP-256", 256),
            ("ViT-SO400M-14-SigLIP-384", 384), ("ViT-SO400M-16-SigLIP2-512", 512),
            ("ViT-gopt-16-SigLIP2-256", 256),
        )
    ),
    *(Family("open_clip_torch", f"{name}, one layer", cut(name)) for name in ("ViT-L-14", "ViT-g-14", "ViT-bigG-14")),
    Family("open_clip_torch", "ViT-H-14-worldwide-quickgelu, one layer", cut("ViT-H-14-worldwide-quickgelu")),
    Family("open_clip_torch", "convnext_base", open_clip("convnext_base"), refused="its visual.trunk is a timm"),
    Family(
        "transformers", "CLIPModel",
        transformers("CLIPModel", "CLIPConfig", vision_config=_TWO_LAYERS, text_config=_SMALL_TEXT),
    ),
    Family("transformers", "CLIPVisionModel", transformers("CLIPVisionModel", "CLIPVisionConfig")),
    Family(
        "transformers", "CLIPVisionModelWithProjection",
        transformers("CLIPVisionModelWithProjection", "CLIPVisionConfig", **_TWO_LAYERS),
    ),
    Family(
        "transformers", "MetaClip2Model",
        transformers("MetaClip2Model", "MetaClip2Config", vision_config=_TWO_LAYERS, text_config=_SMALL_TEXT),
    ),
    Family("transformers", "LlavaForConditionalGeneration", llava),
    Family(
        "transformers", "SiglipModel, two layers",
        transformers("SiglipModel", "SiglipConfig", vision_config=_TWO_LAYERS, text_config=_SMALL_TEXT),
        normalisation=(SIGLIP_MEAN, SIGLIP_STD), by_original=_COLLECTED,
    ),
    Family(
        "transformers", "SiglipVisionModel, two layers",
        transformers("SiglipVisionModel", "SiglipVisionConfig", **_TWO_LAYERS),
        normalisation=(SIGLIP_MEAN, SIGLIP_STD), by_original=_COLLECTED,
    ),
    Family(
        "transformers", "SiglipModel, SO400M at 384 pixels, one layer", so400m_of_transformers, size=384,
        normalisation=(SIGLIP_MEAN, SIGLIP_STD), by_original=_COLLECTED,
    ),
    Family(
        "transformers", "Siglip2Model",
        transformers("Siglip2Model", "Siglip2Config", vision_config=_TWO_LAYERS, text_config=_SMALL_TEXT),
        refused="no image tower",
    ),
    Family("transformers", "Dinov2Model", transformers("Dinov2Model", "Dinov2Config", **_TWO_LAYERS), "no image tower"),
    Family("sentence-transformers", "CLIPModel", sentence_transformers),
]  # fmt: skip


# --- outputs: what users call, and whether a family has it ------------------------------------------------------------


def tensors(output: Any) -> list[Tensor]:
    """All tensors in an output, in a fixed order."""
    if isinstance(output, Tensor):
        return [output]
    if hasattr(output, "to_tuple"):
        output = output.to_tuple()
    return [tensor for part in output for tensor in tensors(part)] if isinstance(output, tuple | list) else []


def is_transformers(model: Any) -> bool:
    return hasattr(model, "config") and not hasattr(model, "encode")  # nor a SentenceTransformer


def vision(model: Any) -> Any:
    """The image part of a model of transformers, which may be all of it."""
    inside = getattr(model, "model", model)  # LLaVA's
    return getattr(model, "vision_model", getattr(inside, "vision_tower", model))


def embeddings(model: Any, images: Tensor) -> Any:
    if hasattr(model, "encode_image"):
        return model.encode_image(images)
    if hasattr(model, "get_image_features"):
        return model.get_image_features(pixel_values=images)
    if hasattr(model, "encode"):  # sentence-transformers: through its processor
        from PIL import Image

        arrays = images.clamp(0, 1).mul(255).byte().permute(0, 2, 3, 1).cpu().numpy()
        return model.encode([Image.fromarray(array) for array in arrays], convert_to_tensor=True)
    return model(pixel_values=images)


def visual(model: Any, images: Tensor) -> Any:
    return model.visual(images) if hasattr(model, "visual") else None


def hidden_states(model: Any, images: Tensor) -> Any:
    return vision(model)(pixel_values=images, output_hidden_states=True) if is_transformers(model) else None


def one_layer(model: Any, images: Tensor) -> Any:
    """As LLaVA asks, of the releases of transformers that take the number of a layer."""
    capturing: Any = sys.modules.get("transformers.utils.output_capturing")
    if not is_transformers(model) or not hasattr(capturing, "selected_hidden_states"):
        return None
    return vision(model)(pixel_values=images, output_hidden_states=-2)


def unread(model: Any, images: Tensor) -> Any:
    """Options that towers are handed and never read; those of transformers 4 take none."""
    if not is_transformers(model) or "transformers.utils.output_capturing" not in sys.modules:
        return None
    return vision(model)(pixel_values=images, use_cache=False, num_items_in_batch=2)


def return_dict(model: Any, images: Tensor) -> Any:
    if not is_transformers(model) or hasattr(model, "get_image_features"):  # which takes none in every version
        return None
    return model(pixel_values=images, return_dict=False)


def patch_tokens(model: Any, images: Tensor) -> Any:
    if not hasattr(getattr(model, "visual", None), "output_tokens"):
        return None
    model.visual.output_tokens = True
    try:
        return model.visual(images)
    finally:
        model.visual.output_tokens = False


def interpolated(model: Any, images: Tensor) -> Any:
    """transformers' own other resolutions."""
    if not is_transformers(model):
        return None
    larger = torch.nn.functional.interpolate(images, scale_factor=9 / 7)
    return vision(model)(pixel_values=larger, interpolate_pos_encoding=True)


OUTPUTS: dict[str, tuple[Callable[[Any, Tensor], Any], str, float]] = {
    "embeddings": (embeddings, FAST, 1e-5),
    "visual": (visual, FAST, 1e-5),
    "hidden states": (hidden_states, FAST, 1e-5),
    "one layer": (one_layer, FAST, 1e-5),
    "unread options": (unread, FAST, 1e-5),
    "return_dict=False": (return_dict, FAST, 1e-5),
    "patch tokens": (patch_tokens, FAST, 1e-5),
    "interpolated positions": (interpolated, ORIGINAL, 1e-6),
}
VERIFY = "verify"
COLUMNS = (*OUTPUTS, VERIFY)

_SEEN: dict[tuple[str, str], dict[str, str]] = {}  # (package and version, family) -> output -> what was seen


@pytest.fixture(scope="module", autouse=True)
def _table(pytestconfig: pytest.Config) -> Iterator[None]:
    yield
    if path := pytestconfig.getoption("--compatibility"):
        write_table(Path(path), _SEEN)


def read_table(path: Path) -> dict[tuple[str, str], dict[str, str]]:
    """What `write_table` has written: for each package with its version, and model, the outputs and how they came."""
    lines = [line for line in _own(path).splitlines() if line.startswith("| ") and "---" not in line]
    header, *rows = ([cell.strip() for cell in line.strip("|").split(" | ")] for line in lines)
    return {(row[0], row[1]): dict(zip(header[2:], row[2:], strict=True)) for row in rows}


def _own(path: Path) -> str:
    """What the page says of `accelerate`: all before its second heading."""
    return path.read_text().partition("\n## ")[0]


def no_longer_fast(package: str, version: str, family: str, cells: dict[str, str]) -> set[str]:
    """The outputs that were fast in the page in an earlier version of a package, and that are not in `cells`."""
    earlier = [
        was
        for (other, name), was in read_table(PAGE).items()
        if (other.split()[0], name) == (package, family) and Version(other.split()[1]) < Version(version)
    ]
    return {output for was in earlier for output, way in was.items() if way == FAST and cells.get(output) != FAST}


def write_table(path: Path, seen: dict[tuple[str, str], dict[str, str]]) -> None:
    header = ["package", "model", *COLUMNS]
    rows = (read_table(path) if path.exists() else {}) | seen
    title = (
        "What `clip_fast.accelerate` gives, as `pytest tests/dropin --compatibility FILE` saw it.\n"
        "**fast**: the fast path ran, and what it returned was what the original returns, but for rounding.\n"
        "**original**: the original forward runs, and a warning says why. Empty: there is no such output.\n"
        "`clip_fast.verify` found both within 1e-5 of the plain encoder in float64."
    )
    rules = "| " + " | ".join("---" for _ in header) + " |"
    body = [f"| {' | '.join([*key, *(rows[key].get(output, '') for output in COLUMNS)])} |" for key in sorted(rows)]
    path.parent.mkdir(parents=True, exist_ok=True)
    rest = path.read_text().removeprefix(_own(path)).lstrip("\n") if path.exists() else ""
    own = "\n".join(["# Compatibility", "", title, "", f"| {' | '.join(header)} |", rules, *body]) + "\n"
    path.write_text(own + (f"\n{rest}" if rest else ""))


@pytest.mark.parametrize(
    "family",
    [family if family.name in QUICK else pytest.param(family, marks=pytest.mark.slow) for family in FAMILIES],
    ids=lambda family: f"{family.package} {family.name}",
)
def test_a_family(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        version = importlib.metadata.version(family.package)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{family.package} is not installed")
    model = family.make().eval()
    cells = _SEEN.setdefault((f"{family.package} {version}", family.name), {})
    if family.refused:
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with pytest.raises(NotServed, match=family.refused) as refusal:
            clip_fast.accelerate(model)
        assert not is_accelerated(model)
        after = model.state_dict()
        assert before.keys() == after.keys()
        for name, tensor in after.items():
            assert_same_bits(tensor, before[name])  # CoCa leaves some uninitialised, which may be NaN
        cells["embeddings"] = f"refused: {refusal.value}"
        assert not no_longer_fast(family.package, version, family.name, cells)
        return
    original = copy.deepcopy(model)
    assert clip_fast.accelerate(model) is model
    height, width = sides(family.size)
    images = torch.rand(1 if height > 300 else 2, 3, height, width)  # large ones take their seconds
    with torch.no_grad():
        for name, (run, way, bound) in OUTPUTS.items():
            way = ORIGINAL if name in family.by_original else way
            wanted = run(original, images)
            if wanted is None:
                continue
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                got = run(model, images)
            said = [str(each.message) for each in caught if "the original forward" in str(each.message)]
            assert bool(said) == (way == ORIGINAL), (name, said)
            assert type(got) is type(wanted)
            pairs = list(zip(tensors(got), tensors(wanted), strict=True))
            assert pairs
            for ours, theirs in pairs:
                assert (ours.shape, ours.dtype, ours.device) == (theirs.shape, theirs.dtype, theirs.device)
                assert float((ours.double() - theirs.double()).norm() / theirs.double().norm()) < bound, name
            if way == FAST:
                assert any(not torch.equal(*pair) for pair in pairs), f"{name} is not by another path"
            cells[name] = way
    monkeypatch.setattr("clip_fast.verification._ROUNDS", 1)  # of timing, which no line below looks at
    verdict = clip_fast.verify(model, images[:1])
    assert verdict.error < 1e-5
    assert verdict.lowest_cosine > 1 - 1e-6
    cells[VERIFY] = FAST
    assert not no_longer_fast(family.package, version, family.name, cells)
    if hasattr(model, "encode"):
        return  # sentence-transformers take pictures
    mean, std = (torch.tensor(x)[:, None, None] for x in family.normalisation)
    raw = torch.randint(0, 256, images[:1].shape, dtype=torch.uint8)
    with torch.no_grad():
        got, wanted = tensors(embeddings(model, raw)), tensors(embeddings(original, (raw / 255 - mean) / std))
    assert float((got[-1] - wanted[-1]).norm() / wanted[-1].norm()) < 1e-5
    clip_fast.restore(model)
    with torch.no_grad():
        results = (tensors(embeddings(each, images[:1])) for each in (model, original))
        assert all(map(torch.equal, *results))


def test_the_table_keeps_the_lines_of_other_versions(tmp_path: Path) -> None:
    file = tmp_path / "docs" / "table.md"
    write_table(file, {("a 1.0", "x"): {"embeddings": "fast"}, ("b 1.0", "x"): {"visual": "fast"}})
    write_table(file, {("a 2.0", "x"): {"embeddings": "fast"}, ("b 1.0", "x"): {"visual": "original"}})
    lines = file.read_text().splitlines()[-3:]
    assert [line.split(" | ")[0] for line in lines] == ["| a 1.0", "| a 2.0", "| b 1.0"]
    assert "original" in lines[2]
    assert "fast" not in lines[2]


def test_the_page_is_as_it_would_be_written_again(tmp_path: Path) -> None:
    """Its header too, which says how."""
    shutil.copy(PAGE, tmp_path)
    write_table(tmp_path / PAGE.name, {})
    assert (tmp_path / PAGE.name).read_text() == PAGE.read_text()


def test_what_was_fast_in_an_earlier_version_stays_fast() -> None:
    assert not no_longer_fast("transformers", "4.0", "CLIPModel", {})
    assert {"embeddings", "hidden states"} <= no_longer_fast("transformers", "99.0", "CLIPModel", {})
    assert "embeddings" not in no_longer_fast("transformers", "99.0", "CLIPModel", {"embeddings": FAST})
    assert not no_longer_fast("transformers", "99.0", "Dinov2Model", {})
