"""Small SigLIPs with both sides and random weights, and tokenizers as theirs, in folders as the packages write them."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from saved_clips import WithoutInitialisation, randomise, texts_of_every_script

VOCABULARY = 4096  # of the models; the tokenizers have fewer tokens
LAST, SIGLIP_2 = {"pool_type": "last", "no_causal_mask": True}, {"act_kwargs": {"approximate": "tanh"}}


def siglip_folder(folder: Path, vision: dict[str, Any] | None = None, **text: Any) -> Any:
    """A `SiglipModel`, as `save_pretrained` lays it down; itself."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    shape = {"hidden_size": 128, "intermediate_size": 208, "num_hidden_layers": 2, "num_attention_heads": 2}
    small = {**shape, "vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2}
    config = transformers.SiglipConfig(
        text_config=small | text, vision_config={**shape, "image_size": 64, "patch_size": 16} | (vision or {})
    )
    with WithoutInitialisation():
        made = transformers.SiglipModel(config).eval()
    randomise(made)
    made.save_pretrained(folder)
    return made


def open_clip_siglip(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str = "ViT-B-16-SigLIP", **text: Any) -> Any:
    """The `CustomTextCLIP` of one of open_clip's own configs with a layer a side, as `push_to_hf_hub` lays it down."""
    open_clip = pytest.importorskip("open_clip", reason="open_clip is not installed")
    timm, create = open_clip.timm_model.timm, open_clip.timm_model.timm.create_model
    config = open_clip.get_model_config(name)
    config.pop("custom_text")
    config["text_cfg"] |= {"layers": 1, "vocab_size": VOCABULARY, **text}
    with monkeypatch.context() as patched, WithoutInitialisation():
        patched.setattr(timm, "create_model", lambda *given, **options: create(*given, **options, depth=1))
        made = open_clip.CustomTextCLIP(**json.loads(json.dumps(config))).eval()
    randomise(made)
    processing = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"}
    folder.mkdir(exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": processing}))
    state = {key: tensor.contiguous() for key, tensor in made.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
    return made


# --- tokenizers ------------------------------------------------------------------------------------------------------


def _release_5() -> Any:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    if transformers.__version__.startswith("4."):
        pytest.skip("this transformers makes no tokenizer of a vocabulary")
    return transformers


def _corpus() -> list[str]:
    """Texts with every letter of English, and with some of the letters of many scripts."""
    english = ["a photo of a dog on the beach", "the quick brown fox jumps over the lazy dog at night", "naïve café"]
    return english * 100 + [text.lower() for text in texts_of_every_script(100)]


def sentence_piece(folder: Path, byte_fallback: bool = False) -> Any:
    """transformers' tokenizer of SigLIP, with a SentencePiece model trained as theirs, saved in `folder`; itself."""
    trainer = pytest.importorskip("sentencepiece", reason="sentencepiece is not installed").SentencePieceTrainer
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    model = io.BytesIO()
    trainer.train(
        sentence_iterator=iter([line.replace("\n", " ") for line in _corpus()]), model_writer=model, vocab_size=3000,
        hard_vocab_limit=False, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, character_coverage=0.98,
        byte_fallback=byte_fallback, minloglevel=2,
    )  # fmt: skip
    folder.mkdir(exist_ok=True)
    (folder / "spiece.model").write_bytes(model.getvalue())
    made = transformers.SiglipTokenizer(str(folder / "spiece.model"))
    made.save_pretrained(folder)
    return made


def unigram(folder: Path) -> Any:
    """transformers' tokenizer of T5, which open_clip's SigLIPs have, of random pieces; saved in `folder`; itself."""
    transformers = _release_5()
    words = " ".join(_corpus()).split()
    pieces = {"▁", *"".join(words)} | {f"▁{word[:length]}" for word in words for length in (1, 2, 3, 5)}
    pieces |= {word[start : start + 3] for word in words for start in range(0, len(word), 2)}
    scored = [(piece, -random.uniform(2, 12)) for piece in sorted(pieces)]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    made = transformers.T5Tokenizer(vocab=[*special, *scored][:VOCABULARY], extra_ids=0, pad_token="</s>")
    made.save_pretrained(folder)
    return made


def byte_pairs(folder: Path, kind: str = "Siglip2Tokenizer", **options: Any) -> Any:
    """transformers' tokenizer of SigLIP 2, or Gemma's, with its settings on the hub; saved in `folder`; itself."""
    transformers = _release_5()
    tokenizers = pytest.importorskip("tokenizers")
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{byte:02X}>" for byte in range(256))]
    learner = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    learner.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=2500, special_tokens=special, show_progress=False)
    learner.train_from_iterator([*_corpus(), "A PHOTO OF A DOG"], trainer)
    learned = json.loads(learner.to_str())["model"]
    options = {"add_bos_token": False, "add_eos_token": True, "padding_side": "right"} | options
    merges = [tuple(pair) for pair in learned["merges"]]
    made = getattr(transformers, kind)(vocab=learned["vocab"], merges=merges, **options)
    made.save_pretrained(folder)
    return made


def full(tokenizer: Any, texts: list[str], length: int = 64) -> torch.Tensor:
    """Tokens as SigLIP's processors make them."""
    options = {"padding": "max_length", "truncation": True, "max_length": length, "return_tensors": "pt"}
    return tokenizer(texts, **options).input_ids
