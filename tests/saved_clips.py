"""Small CLIPs with both sides and random weights, in folders as the packages themselves write them."""

from __future__ import annotations

import functools
import json
import random
import tempfile
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

VOCABULARY = 49408
VISION = {"image_size": 64, "layers": 2, "width": 128, "patch_size": 16}


class WithoutInitialisation(TorchFunctionMode):
    """Within this context random numbers are zeros, which cost nothing: `randomise` sets all weights afterwards.

    They are not left as memory has them, since an initialisation may draw until all numbers are within its bounds.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.normal_, Tensor.uniform_):
            return args[0].zero_()
        return args[0] if func is Tensor.erfinv_ else func(*args, **(kwargs or {}))


def randomise(module: nn.Module) -> None:
    """Fresh weights everywhere, so that a tensor in the wrong place shows."""
    with torch.no_grad():
        for name, tensor in module.named_parameters():
            tensor.normal_(std=0.2 if tensor.ndim < 2 else tensor[0].numel() ** -0.5)
            tensor += 1 if tensor.ndim == 1 and name.endswith("weight") else 0


def open_clip_folder(
    folder: Path, custom: bool = False, weights: str = "open_clip_model.safetensors", **model: Any
) -> Any:
    """A `CLIP`, or a `CustomTextCLIP`, as `push_to_hf_hub` lays it down; itself. `model` is for its config."""
    open_clip = pytest.importorskip("open_clip", reason="open_clip is not installed")
    text = {"context_length": 77, "vocab_size": VOCABULARY, "width": 64, "heads": 2, "layers": 2}
    config = {"embed_dim": 32, "vision_cfg": VISION, "text_cfg": text | model.pop("text_cfg", {}), **model}
    own = json.loads(json.dumps(config))
    with WithoutInitialisation():
        made = (open_clip.CustomTextCLIP if custom else open_clip.CLIP)(**own).eval()
    randomise(made)
    preprocess = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25], "interpolation": "bicubic"}
    folder.mkdir(exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    state = {name: tensor.contiguous() for name, tensor in made.state_dict().items()}
    save_file(state, folder / weights) if weights.endswith("safetensors") else torch.save(state, folder / weights)
    return made


def hugging_face_folder(
    folder: Path, kind: str = "CLIP", vision: dict[str, Any] | None = None, embed_dim: int = 32, **text: Any
) -> Any:
    """A `CLIPModel`, or a model of another kind that has its parts, as `save_pretrained` lays it down; itself."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    shape = {"hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {**shape, "image_size": 64, "patch_size": 16} if vision is None else vision
    config = getattr(transformers, f"{kind}Config")(
        text_config={**shape, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": VOCABULARY, **text},
        vision_config=vision,
        projection_dim=embed_dim,
    )
    with WithoutInitialisation():
        made = getattr(transformers, f"{kind}Model")(config).eval()
    randomise(made)
    made.save_pretrained(folder)
    return made


def clip_tokenizer(folder: Path) -> Any:
    """transformers' CLIP tokenizer with the vocabulary that comes with openai-clip, saved in `folder`; itself."""
    tokenizer = _clip_tokenizer()
    tokenizer.save_pretrained(folder)
    return tokenizer


@functools.cache
def _clip_tokenizer() -> Any:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    package = pytest.importorskip("clip.simple_tokenizer", reason="openai-clip is not installed").SimpleTokenizer()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in package.bpe_ranks))
        (folder / "vocab.json").write_text(json.dumps(package.encoder))
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer"}))
        return transformers.AutoTokenizer.from_pretrained(folder)


def whole_words(folder: Path, end: str = "</s>") -> Any:
    """A tokenizer of another kind, of 100 tokens, of which 2 ends a text, as XLM-V's does; saved in `folder`."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    tokenizers = pytest.importorskip("tokenizers")
    words = ["<s>", "<pad>", end, "<unk>", *"abcdefghijklmnopqrstuvwxyz", "photo", "dog", "beach"]
    vocabulary = {word: number for number, word in enumerate(words)} | {f"w{i}": i for i in range(len(words), 100)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"<s> $A {end}", special_tokens=[("<s>", 0), (end, 2)]
    )
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token=end, pad_token="<pad>", unk_token="<unk>"
    )
    made.save_pretrained(folder)
    return made


def word_pieces(folder: Path, **settings: Any) -> Any:
    """A tokenizer as BERT's, of every character of a text and a few words, saved in `folder`; itself."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    characters = sorted({c for text in texts_of_every_script(300) for c in text.lower() if not c.isspace()})
    pieces = [*special, *characters, *(f"##{c}" for c in characters), "photo", "dog", "beach", "##s", "##ing"]
    folder.mkdir(exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(dict.fromkeys(pieces)) + "\n")
    made = transformers.BertTokenizerFast.from_pretrained(folder, **settings)
    made.save_pretrained(folder)
    return made


def texts_of_every_script(count: int) -> list[str]:
    """Random texts of 1 to 40 characters, each from two neighbouring places of Unicode, with words of English between.

    Every character that Python knows may come, but for surrogates and private ones.
    """
    known = _known_characters()
    texts: list[str] = []
    for _ in range(count):
        place = random.randrange(len(known))
        near = known[max(0, place - 60) : place + 60]
        words = ["".join(random.choices(near, k=random.randint(1, 8))) for _ in range(random.randint(1, 5))]
        words += random.sample(["A Photo", "dog's", "I'LL", "2,000", "&amp;", "\t", "naïve", "ﬁ", "'ſ"], k=2)
        random.shuffle(words)
        texts.append(random.choice([" ", "", "  "]).join(words))
    return texts


@functools.cache
def _known_characters() -> str:
    return "".join(c for c in map(chr, range(0x110000)) if unicodedata.category(c) not in ("Cn", "Cs", "Co"))


def close(ours: Tensor, theirs: Tensor) -> bool:
    difference = (ours - theirs).detach().norm() / theirs.detach().norm()
    return ours.shape == theirs.shape and float(difference) < 1e-5
