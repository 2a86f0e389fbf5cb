"""Published families at their real widths, cut to one layer: loaded, images and words are the package's own.

    pytest tests/test_loaded_families.py -m slow --compatibility docs/compatibility.md

writes what it has seen as the page's second table.
"""

from __future__ import annotations

import copy
import importlib.metadata
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from saved_clips import clip_tokenizer, close, hugging_face_folder, open_clip_folder, whole_words, word_pieces
from saved_siglips import byte_pairs, full, open_clip_siglip, sentence_piece, siglip_folder, unigram

import clip_fast
from clip_fast.cli.main import main
from clip_fast.errors import CheckpointError, NotServed
from clip_fast.towers.config import sides

HEADING = "\n## Loaded checkpoints\n"
INTRODUCTION = """
What `clip_fast.load` gives, as `pytest tests/test_loaded_families.py -m slow --compatibility FILE` saw it: models at
their real widths, cut to one layer, MetaCLIP 2 to 100 tokens and SigLIP to 4,096, saved by their package with random
weights (SigLIP and CLIPA with a tokenizer of their kind that was made on the spot). **equal**: within 1e-5 of what the
package computes in float32; of words, the tokens are the same, too. The hidden state is the last one. For images of
another size, open_clip and timm resample the positions as `load` does; transformers has its own way, so its models
were given the positions that timm resampled. Files are a JPEG and a PNG as `clip-fast encode` embeds them; there the
package's embeddings are of the same pixels. Empty:
the package has no such output. **refused**: for the reason behind it.
"""
COLUMNS = ("package", "model", "images", "words", "patch tokens", "hidden state", "another size", "files")
Cells = tuple[str, ...]  # of the columns behind the first two


@dataclass(frozen=True)
class Family:
    """`make` lays a model down in a folder and gives it, and its own tokenizer."""

    package: str
    name: str
    make: Callable[[Path], tuple[Any, Callable[[list[str]], Any]]]
    refused: str = ""  # a part of the reason why its words are not served


def of_open_clip(
    name: str, *, custom: bool = False, vision: dict[str, Any] | None = None, words: Any = None, **text: Any
) -> Callable[[Path], tuple[Any, Any]]:
    def make(folder: Path) -> tuple[Any, Any]:
        package = pytest.importorskip("open_clip")
        config = copy.deepcopy(package.get_model_config(name))
        config["vision_cfg"]["layers"] = [1] * 4 if isinstance(config["vision_cfg"]["layers"], list) else 1
        config["vision_cfg"] |= vision or {}
        config["text_cfg"] |= {"layers": 1, **text}
        if "hf_model_name" in config["text_cfg"]:
            transformers = pytest.importorskip("transformers")
            small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1}
            transformers.XLMRobertaConfig(**small, vocab_size=64).save_pretrained(folder / "text")
            config["text_cfg"] |= {"hf_model_name": str(folder / "text"), "hf_model_pretrained": False}
        model = open_clip_folder(folder, custom, **config)
        if words is not None:
            words(folder)
        return model, None if "hf_model_name" in config["text_cfg"] else package.get_tokenizer(f"local-dir:{folder}")

    return make


def of_transformers(kind: str, words: Callable[[Path], Any], **text: Any) -> Callable[[Path], tuple[Any, Any]]:
    def make(folder: Path) -> tuple[Any, Any]:
        shape = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 1, "num_attention_heads": 8}
        model = hugging_face_folder(folder, kind, {"num_hidden_layers": 1}, 512, **shape, **text)
        tokenizer = words(folder)
        full = {"padding": "max_length", "truncation": True, "max_length": 77, "return_tensors": "pt"}
        return model, lambda texts: tokenizer(texts, **full).input_ids

    return make


def siglip_of_open_clip(name: str, words: Callable[[Path], Any]) -> Callable[[Path], tuple[Any, Any]]:
    def make(folder: Path) -> tuple[Any, Any]:
        with pytest.MonkeyPatch.context() as patched:
            model = open_clip_siglip(folder, patched, name)
        words(folder)
        return model, pytest.importorskip("open_clip").get_tokenizer(f"local-dir:{folder}")

    return make


def siglip_of_transformers(
    words: Callable[[Path], Any], width: int, heads: int, mlp: int
) -> Callable[[Path], tuple[Any, Any]]:
    def make(folder: Path) -> tuple[Any, Any]:
        shape = {"hidden_size": width, "intermediate_size": mlp, "num_hidden_layers": 1, "num_attention_heads": heads}
        model, tokenizer = siglip_folder(folder, {**shape, "image_size": 224}, **shape), words(folder)
        return model, lambda texts: full(tokenizer, texts)

    return make


def gemma(folder: Path) -> Any:
    return byte_pairs(folder, "GemmaTokenizer")


FAMILIES = [
    Family("open_clip_torch", "ViT-B-32 (LAION, DataComp)", of_open_clip("ViT-B-32")),
    Family("open_clip_torch", "ViT-B-32-quickgelu (MetaCLIP)", of_open_clip("ViT-B-32-quickgelu")),
    Family("open_clip_torch", "ViT-B-32 in a CustomTextCLIP", of_open_clip("ViT-B-32", custom=True)),
    Family("open_clip_torch", "ViT-H-14-378-quickgelu (DFN-5B)", of_open_clip("ViT-H-14-378-quickgelu")),
    Family("open_clip_torch", "ViT-L-14 (LAION, DataComp)", of_open_clip("ViT-L-14")),
    Family("open_clip_torch", "ViT-bigG-14", of_open_clip("ViT-bigG-14")),
    Family(
        "open_clip_torch", "ViT-H-14-worldwide-quickgelu (MetaCLIP 2)",
        of_open_clip("ViT-H-14-worldwide-quickgelu", words=whole_words, vocab_size=100),
    ),
    Family("open_clip_torch", "ViT-L-14-CLIPA", of_open_clip("ViT-L-14-CLIPA", words=word_pieces)),
    Family("open_clip_torch", "ViT-M-16-alt, with LayerScale", of_open_clip("ViT-M-16-alt")),
    Family(
        "open_clip_torch", "ViT-B-16 at 128 by 256 pixels", of_open_clip("ViT-B-16", vision={"image_size": [128, 256]})
    ),
    Family("open_clip_torch", "RN50", of_open_clip("RN50")),
    Family(
        "open_clip_torch", "xlm-roberta-base-ViT-B-32", of_open_clip("xlm-roberta-base-ViT-B-32", custom=True),
        refused="it is transformers'",
    ),
    Family("open_clip_torch", "ViT-B-16-SigLIP", siglip_of_open_clip("ViT-B-16-SigLIP", unigram)),
    Family("open_clip_torch", "ViT-L-16-SigLIP-256", siglip_of_open_clip("ViT-L-16-SigLIP-256", unigram)),
    Family(
        "open_clip_torch", "ViT-SO400M-16-SigLIP2-256", siglip_of_open_clip("ViT-SO400M-16-SigLIP2-256", gemma)
    ),
    Family(
        "open_clip_torch", "ViT-SO400M-14-SigLIP-384", siglip_of_open_clip("ViT-SO400M-14-SigLIP-384", unigram)
    ),
    Family("open_clip_torch", "ViT-B-16-SigLIP2", siglip_of_open_clip("ViT-B-16-SigLIP2", gemma)),
    Family("open_clip_torch", "ViT-gopt-16-SigLIP2-256", siglip_of_open_clip("ViT-gopt-16-SigLIP2-256", gemma)),
    Family("transformers", "SiglipModel (SigLIP)", siglip_of_transformers(sentence_piece, 768, 12, 3072)),
    Family("transformers", "SiglipModel (SigLIP 2)", siglip_of_transformers(byte_pairs, 1152, 16, 4304)),
    Family("transformers", "CLIPModel", of_transformers("CLIP", clip_tokenizer, eos_token_id=2)),
    Family("transformers", "MetaClip2Model", of_transformers("MetaClip2", whole_words, eos_token_id=2, vocab_size=100)),
]  # fmt: skip

# open_clip's, by a part of the reason.
REFUSED = {
    "EVA02-B-16": "from timm that is no SigLIP's, eva02_base_patch16_clip_224",
    "MobileCLIP-S1": "from timm that is no SigLIP's, fastvit_mci1",
    "convnext_base": "from timm that is no SigLIP's, convnext_base",
    "coca_ViT-B-32": "belongs to an attentional pooler, as CoCa has",
}

_SEEN: dict[tuple[str, str], Cells] = {}  # (package and version, model) -> the other columns


@pytest.fixture(scope="module", autouse=True)
def _table(pytestconfig: pytest.Config) -> Iterator[None]:
    yield
    if path := pytestconfig.getoption("--compatibility"):
        write_table(Path(path), _SEEN)


def write_table(path: Path, seen: dict[tuple[str, str], Cells]) -> None:
    """Writes the page's second section anew, and keeps the lines of other packages and versions."""
    first, _, own = path.read_text().partition(HEADING)
    lines = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in own.splitlines() if line[:2] == "| "]
    rows = {(package, name): tuple(cells) for package, name, *cells in lines[2:]} | seen
    body = [(*key, *rows[key]) for key in sorted(rows)]
    table = [f"| {' | '.join(cells)} |" for cells in (COLUMNS, ("---",) * len(COLUMNS), *body)]
    path.write_text(first + HEADING + INTRODUCTION + "\n" + "\n".join(table) + "\n")


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: f"{family.package} {family.name}")
def test_a_family(family: Family, tmp_path: Path) -> None:
    if "MetaClip2" in family.name and not hasattr(pytest.importorskip("transformers"), "MetaClip2Model"):
        pytest.skip("this transformers has no MetaCLIP 2")
    model, tokenize = family.make(tmp_path)
    ours, preprocess = clip_fast.load(tmp_path, "cpu")
    images = torch.randn(2, 3, *sides(ours.config.image_size))
    with torch.no_grad():
        assert close(ours.encode_image(images), _embeddings(model, "image", images))
        cells = [
            "equal",
            _words(family, ours, model, tokenize),
            _patch_tokens(ours, model, images),
            _hidden_state(ours, model, images),
            _another_size(tmp_path, ours, model),
            _files(tmp_path / "pictures", ours, preprocess, model),
        ]
    _SEEN[f"{family.package} {importlib.metadata.version(family.package)}", family.name] = tuple(cells)


def _saw_refusal(package: str, name: str, folder: Path, reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason) as refusal:
        clip_fast.load(folder, "cpu")
    said = str(refusal.value).removeprefix(f"{next(folder.glob('*.safetensors'))}: ")
    key = f"{package} {importlib.metadata.version(package)}", name
    _SEEN[key] = (f"refused: {said}", *[""] * (len(COLUMNS) - 3))


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSED)
def test_a_family_that_is_refused(name: str, tmp_path: Path) -> None:
    """By the names of its weights, whose values are left out, and its config."""
    package = pytest.importorskip("open_clip")
    with torch.device("meta"):
        names = package.create_model(name, device="meta", pretrained=None).state_dict()
    save_file({name: torch.zeros(1) for name in names}, tmp_path / "open_clip_model.safetensors")
    config = {"model_cfg": package.get_model_config(name), "preprocess_cfg": {}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    _saw_refusal("open_clip_torch", name, tmp_path, REFUSED[name])


@pytest.mark.slow
def test_naflex_is_refused(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = transformers.Siglip2Config(text_config=small | {"vocab_size": 100}, vision_config=small)
    transformers.Siglip2Model(config).save_pretrained(tmp_path)
    _saw_refusal("transformers", "Siglip2Model (NaFlex)", tmp_path, "belongs to a NaFlex tower")


def _embeddings(model: Any, side: str, batch: torch.Tensor) -> torch.Tensor:
    if hasattr(model, f"encode_{side}"):
        return getattr(model, f"encode_{side}")(batch)
    found = getattr(model, f"get_{side}_features")(batch)
    return getattr(found, "pooler_output", found)


def _words(family: Family, ours: Any, model: Any, tokenize: Any) -> str:
    texts = ["a photo of a dog", "on the beach, at night", ""]
    if family.refused:
        with pytest.raises(NotServed, match=family.refused):
            ours.tokenize(texts)
        return "not served"
    tokens = tokenize(texts)
    assert torch.equal(ours.tokenize(texts), tokens)
    assert close(ours.encode_text(tokens), _embeddings(model, "text", tokens))
    return "equal"


def _vision(model: Any) -> Any:
    """The module that gives hidden states: of transformers, of timm, or of open_clip."""
    visual = getattr(model, "visual", None)
    return model.vision_model if visual is None else getattr(visual, "trunk", visual)


def _patch_tokens(ours: Any, model: Any, images: torch.Tensor) -> str:
    vision = _vision(model)
    if hasattr(vision, "attnpool"):
        with pytest.raises(ValueError, match="patch tokens"):
            ours.encode_image(images, return_patch_tokens=True)
        return ""
    if hasattr(vision, "output_tokens"):
        vision.output_tokens = True
        wanted = vision(images)[1]
        vision.output_tokens = False
    elif hasattr(vision, "forward_features"):
        wanted = vision.forward_features(images)
    else:
        wanted = vision(images).last_hidden_state
        if hasattr(vision, "pre_layrnorm"):  # CLIP's is before its LayerNorm, and has the class token
            wanted = vision.post_layernorm(wanted)[:, 1:]
    assert close(ours.encode_image(images, return_patch_tokens=True)[1], wanted)
    return "equal"


def _hidden_state(ours: Any, model: Any, images: torch.Tensor) -> str:
    vision = _vision(model)
    if hasattr(vision, "attnpool"):
        with pytest.raises(ValueError, match="hidden states"):
            ours.hidden_state(images, -1)
        return ""
    states: list[torch.Tensor] = []
    blocks = vision.encoder if hasattr(vision, "encoder") else getattr(vision, "transformer", None) or vision.blocks

    def keep(_: Any, __: Any, output: Any) -> None:
        states.append(getattr(output, "last_hidden_state", output))

    with blocks.register_forward_hook(keep):
        vision(images)
    assert close(ours.hidden_state(images, -1), states[0])
    return "equal"


def _another_size(folder: Path, ours: Any, model: Any) -> str:
    vision = _vision(model)
    if hasattr(vision, "attnpool"):
        with pytest.raises(ValueError, match="a ResNet takes images of its own size"):
            clip_fast.load(folder, "cpu", image_size=320)
        return ""
    if not isinstance(ours.config.image_size, int):
        return ""  # open_clip takes every grid that it resamples for a square
    height, width = (side + 2 * ours.config.patch_size for side in sides(ours.config.image_size))
    seen = "equal"
    if not hasattr(model, "visual"):
        model, seen = _with_timms_positions(model, height), "equal, positions by timm"
    elif hasattr(vision, "set_input_size"):
        model = copy.deepcopy(model)
        _vision(model).set_input_size((height, width))
    else:
        package = pytest.importorskip("open_clip")
        options = {"force_image_size": (height, width), "force_custom_text": hasattr(model, "text")}
        model = package.create_model(f"local-dir:{folder}", **options).eval()
    images = torch.randn(1, 3, height, width)  # larger than the model's own, of which two are compared
    resized = clip_fast.load(folder, "cpu", image_size=(height, width))[0]
    assert close(resized.encode_image(images), _embeddings(model, "image", images))
    return seen


def _with_timms_positions(model: Any, side: int) -> Any:
    """A model of transformers for square images of this side, as timm resamples its positions."""
    layers = pytest.importorskip("timm").layers
    model = copy.deepcopy(model)
    embeddings = model.vision_model.embeddings
    grid = (side // embeddings.patch_size,) * 2
    class_tokens = int(hasattr(embeddings, "class_embedding"))
    position = layers.resample_abs_pos_embed(embeddings.position_embedding.weight[None], grid, None, class_tokens)[0]
    embeddings.position_embedding = torch.nn.Embedding.from_pretrained(position)
    embeddings.position_ids = torch.arange(len(position))[None]
    embeddings.image_size = side
    return model


def _files(folder: Path, ours: Any, preprocess: Any, model: Any) -> str:
    """Embeds files by the command; `model` embeds what `preprocess` makes of them."""
    folder.mkdir()
    pictures = [Image.effect_noise((320, 240), 60).convert("RGB"), Image.radial_gradient("L").convert("RGB")]
    for picture, name in zip(pictures, ("a.jpg", "b.png"), strict=True):
        picture.save(folder / name)
    images = torch.stack([preprocess(Image.open(path)) for path in sorted(folder.iterdir())])
    out = folder.parent / "embeddings"
    given = ["encode", str(folder), "--model", str(folder.parent), "--output", f"{out}/", "--device", "cpu"]
    assert main([*given, "--workers", "0", "--quiet", "--embedding-dtype", "float32"]) == 0
    rows = torch.from_numpy(np.load(next(out.glob("img_emb/*.npy"))))
    assert close(rows, _embeddings(model, "image", images))
    return "equal"


def test_the_table_keeps_the_lines_of_other_versions_and_the_first_section(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# First\n\n| a | b |\n")
    write_table(page, {("a 1.0", "x"): ("equal",) * 5 + ("",)})
    write_table(page, {("a 2.0", "x"): ("equal", "not served", "", "", "", "equal")})
    assert page.read_text().startswith("# First\n\n| a | b |\n")
    first, second = page.read_text().splitlines()[-2:]
    assert first == "| a 1.0 | x | equal | equal | equal | equal | equal |  |"
    assert second == "| a 2.0 | x | equal | not served |  |  |  | equal |"
