"""Text towers and tokenizers of checkpoints that the real packages wrote, against the packages' own results."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from saved_clips import (
    clip_tokenizer,
    close,
    hugging_face_folder,
    open_clip_folder,
    texts_of_every_script,
    whole_words,
    word_pieces,
)

import clip_fast
from clip_fast.checkpoint.reading import read_checkpoint

TEXTS = ["a photo of a dog", "", "words " * 100, "Ünïcode 日本語 and naïve café"]
OTHER_TOKENS = {"hf_tokenizer_name": "facebook/xlm-v-base", "pool_type": "eos", "eos_id": 2, "vocab_size": 100}


def loaded(folder: Path) -> Any:
    return clip_fast.load(folder, "cpu")[0].requires_grad_(False)


# --- embeddings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("custom", [False, True], ids=["CLIP", "CustomTextCLIP"])
@pytest.mark.parametrize(
    "model",
    [
        {"quick_gelu": True},
        {"text_cfg": {"context_length": 33, "mlp_ratio": 3.0}, "nonscalar_logit_scale": True},
        {"text_cfg": {"proj_bias": True}},
        {"text_cfg": OTHER_TOKENS},
        {"text_cfg": {"no_causal_mask": True, "pool_type": "last", "proj_type": "none", "width": 32, "heads": 1}},
        {"text_cfg": {"act_kwargs": {"approximate": "tanh"}, "norm_kwargs": {"eps": 1e-3}}},
    ],
    ids=["quick_gelu", "gelu", "proj_bias", "eos", "last", "tanh"],
)
def test_open_clip(model: dict[str, Any], custom: bool, tmp_path: Path) -> None:
    theirs = open_clip_folder(tmp_path, custom, **copy.deepcopy(model))
    if "hf_tokenizer_name" in model.get("text_cfg", {}):
        whole_words(tmp_path)
    ours = loaded(tmp_path)
    assert isinstance(ours, clip_fast.Clip)
    tokens = pytest.importorskip("open_clip").get_tokenizer(f"local-dir:{tmp_path}")(TEXTS)
    assert torch.equal(ours.tokenize(TEXTS, truncate=True), tokens)
    images = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        assert close(ours.encode_text(tokens), theirs.encode_text(tokens))
        logits = 14 * ours.encode_image(images) @ ours.encode_text(tokens).T
        assert close(logits, 14 * theirs.encode_image(images) @ theirs.encode_text(tokens).T)
    assert close(ours.logit_scale, theirs.logit_scale.reshape(()))


@pytest.mark.parametrize(("activation", "end"), [("quick_gelu", 2), ("quick_gelu", 77), ("gelu", 49407)])
def test_hugging_face(activation: str, end: int, tmp_path: Path) -> None:
    """With 2, as old configs have it, a text ends at its largest token. 77 is in none of the first texts."""
    settings = {"max_position_embeddings": 50, "layer_norm_eps": 1e-3}
    theirs = hugging_face_folder(tmp_path, hidden_act=activation, eos_token_id=end, **settings)
    tokenizer = clip_tokenizer(tmp_path)
    ours = loaded(tmp_path)
    tokens = tokenizer(TEXTS, padding="max_length", truncation=True, max_length=50, return_tensors="pt").input_ids
    assert torch.equal(ours.tokenize(TEXTS, truncate=True), tokens)
    tokens[-1, 9:11] = 77
    with torch.no_grad():
        wanted = theirs.get_text_features(input_ids=tokens)
        assert close(ours.encode_text(tokens), getattr(wanted, "pooler_output", wanted))
        output = theirs(input_ids=tokens, pixel_values=(images := torch.randn(2, 3, 64, 64)))
        assert close(ours(images, tokens)[0], output.logits_per_image)


def test_metaclip_2(tmp_path: Path) -> None:
    """Its end token is 2, and means it: 2 is not the largest token of its texts."""
    if not hasattr(pytest.importorskip("transformers"), "MetaClip2Model"):
        pytest.skip("this transformers has no MetaCLIP 2")
    theirs = hugging_face_folder(tmp_path, "MetaClip2", vocab_size=100, eos_token_id=2)
    tokenizer = whole_words(tmp_path)
    ours = loaded(tmp_path)
    tokens = tokenizer(TEXTS, padding="max_length", truncation=True, max_length=77, return_tensors="pt").input_ids
    assert torch.equal(ours.tokenize(TEXTS, truncate=True), tokens)
    with torch.no_grad():
        output = theirs(input_ids=tokens, pixel_values=(images := torch.randn(2, 3, 64, 64)))
        assert close(ours(images, tokens)[0], output.logits_per_image)


def test_a_folder_without_tokenizer_has_clips(tmp_path: Path) -> None:
    hugging_face_folder(tmp_path)
    assert torch.equal(loaded(tmp_path).tokenize(TEXTS, truncate=True), clip_fast.tokenize(TEXTS, truncate=True))


# --- tokens ----------------------------------------------------------------------------------------------------------


def test_tokens_of_every_script(tmp_path: Path) -> None:
    """By openai-clip, by open_clip, and by transformers from a tokenizer.json, each bit for bit."""
    texts = [*texts_of_every_script(2000), "α\u0345β \u0345! 1\u0345", "it'ſ"]
    clip, open_clip = pytest.importorskip("clip"), pytest.importorskip("open_clip")
    ours = clip_fast.tokenize(texts, truncate=True)
    for package in (clip.tokenize(texts, truncate=True), open_clip.get_tokenizer("ViT-B-32")(texts)):
        assert not [text for text, a, b in zip(texts, ours, package, strict=True) if not torch.equal(a, b)]
    hugging_face_folder(tmp_path)
    tokenizer = clip_tokenizer(tmp_path)
    wanted = tokenizer(texts, padding="max_length", truncation=True, max_length=77, return_tensors="pt").input_ids
    assert torch.equal(loaded(tmp_path).tokenize(texts, truncate=True), wanted)


@pytest.mark.parametrize("clean", ["whitespace", "lower", "canonicalize"])
def test_texts_are_cleaned_as_open_clip_does(clean: str, tmp_path: Path) -> None:
    text = OTHER_TOKENS | {"tokenizer_kwargs": {"clean": clean}, "vocab_size": 49408, "eos_id": 49407}
    open_clip_folder(tmp_path, text_cfg=text)
    clip_tokenizer(tmp_path)
    texts = [*texts_of_every_script(200), "snake_case, well-known!  (a  b)", "&amp;lt; CAPITALS"]
    wanted = pytest.importorskip("open_clip").get_tokenizer(f"local-dir:{tmp_path}")(texts)
    assert torch.equal(loaded(tmp_path).tokenize(texts, truncate=True), wanted)


def test_tokens_of_clipa(tmp_path: Path) -> None:
    """Of BERT's tokenizer, its separators in texts and at their end replaced by 0, as open_clip does."""
    name, options = "bert-base-uncased", {"strip_sep_token": True}
    text = {"hf_tokenizer_name": name, "tokenizer_kwargs": options, "context_length": 32, "vocab_size": 32000}
    theirs = open_clip_folder(tmp_path, text_cfg=text | {"no_causal_mask": True, "pool_type": "last"})
    word_pieces(tmp_path)
    tokenizer = pytest.importorskip("open_clip").get_tokenizer(f"local-dir:{tmp_path}")
    ours = loaded(tmp_path)
    texts = [*texts_of_every_script(1000), *TEXTS, "a photo [SEP] of [MASK]", "dogs, fishing" * 9]
    tokens = tokenizer(texts)
    assert torch.equal(ours.tokenize(texts, truncate=True), tokens)
    assert (tokens != 0).any(1).all()
    assert not (tokens == tokenizer.tokenizer.sep_token_id).any()
    with torch.no_grad():
        assert close(ours.encode_text(tokens[-8:]), theirs.encode_text(tokens[-8:]))


def test_a_separator_that_the_tokenizer_lacks(tmp_path: Path) -> None:
    open_clip_folder(tmp_path, text_cfg=OTHER_TOKENS | {"tokenizer_kwargs": {"strip_sep_token": True}})
    whole_words(tmp_path)
    with pytest.raises(clip_fast.CheckpointError, match=r"no token '\[SEP\]'"):
        loaded(tmp_path).tokenize("a")


def test_long_texts_and_none(tmp_path: Path) -> None:
    hugging_face_folder(tmp_path)
    clip_tokenizer(tmp_path)
    model = loaded(tmp_path)
    with pytest.raises(RuntimeError, match=r"may have 77 tokens, start and end included, and '(word )+' has 102"):
        model.tokenize(["short", "word " * 100])
    assert model.tokenize([]).shape == (0, 77)
    assert model.tokenize("one").shape == (1, 77)


def test_a_tokenizer_goes_along(tmp_path: Path) -> None:
    """In copies and pickles, and after its file is gone."""
    hugging_face_folder(tmp_path, vocab_size=100, eos_token_id=2)
    whole_words(tmp_path)
    model = loaded(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    wanted = torch.tensor([[0, 4, 30, 2, *[1] * 73]])
    for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(each.tokenize("a photo"), wanted)


@pytest.mark.parametrize(("content", "fault"), [("{}", "no tokenizer that can be read"), ("[", "that can be read")])
def test_a_damaged_tokenizer_is_named(content: str, fault: str, tmp_path: Path) -> None:
    hugging_face_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text(content)
    model = loaded(tmp_path)
    model.encode_image(torch.zeros(1, 3, 64, 64))
    with pytest.raises(clip_fast.CheckpointError, match=rf"tokenizer\.json: .*{fault}"):
        model.tokenize("a")


def test_a_padding_token_that_the_tokenizer_lacks(tmp_path: Path) -> None:
    hugging_face_folder(tmp_path)
    clip_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"pad_token": {"content": "<none>"}}))
    with pytest.raises(clip_fast.CheckpointError, match="no padding token '<none>'"):
        loaded(tmp_path).tokenize("a")


# --- text towers that are not served ---------------------------------------------------------------------------------


def xlm_roberta(folder: Path) -> dict[str, Any]:
    transformers = pytest.importorskip("transformers")
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1}
    transformers.XLMRobertaConfig(**shape, vocab_size=64).save_pretrained(folder / "text")
    return {"hf_model_name": str(folder / "text"), "hf_model_pretrained": False, "hf_tokenizer_name": "xlm-roberta"}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("xlm-roberta", "its text tower is not served: it is transformers' .*text"),
        ({"pool_type": "first"}, "text_cfg sets pool_type to 'first'"),
        ({"norm_kwargs": {"eps": 1e-6, "bias": True}}, "text_cfg sets norm_kwargs to {'eps': 1e-06, 'bias': True}"),
        ({"pool_type": "eos"}, "its tokens are not CLIP's; place its tokenizer.json in"),
        ({"vocab_size": 100}, "its tokens are not CLIP's; place its tokenizer.json in"),
        (OTHER_TOKENS, "its tokenizer is that of facebook/xlm-v-base: place its tokenizer.json in"),
        ({"tokenizer_kwargs": {"clean": "canonicalize"}}, "text_cfg sets tokenizer_kwargs to"),
        ({"embed_cls": True}, "text_cfg sets embed_cls to True"),
    ],
    ids=str,
)
def test_images_alone_of_open_clip(text: Any, reason: str, tmp_path: Path) -> None:
    custom = text == "xlm-roberta"
    theirs = open_clip_folder(tmp_path, custom, text_cfg=xlm_roberta(tmp_path) if custom else text)
    ours = loaded(tmp_path)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert close(ours.encode_image(images), theirs.encode_image(images))
    for ask in (lambda: ours.tokenize("words"), lambda: ours.encode_text(torch.zeros(1, 77))):
        with pytest.raises(clip_fast.NotServed, match=f"this model embeds no texts: .*{reason}"):
            ask()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ({"hidden_act": "relu"}, "its text tower is not served: its hidden_act is 'relu'"),
        ({"vocab_size": 100}, "its tokens are not CLIP's"),
        ({"eos_token_id": [1, 2]}, r"its eos_token_id is \[1, 2\]"),
    ],
)
def test_images_alone_of_hugging_face(text: dict[str, Any], reason: str, tmp_path: Path) -> None:
    hugging_face_folder(tmp_path, **text)
    with pytest.raises(clip_fast.NotServed, match=reason):
        loaded(tmp_path).encode_text(torch.zeros(1, 77))


def test_a_damaged_text_tower_is_an_error(tmp_path: Path) -> None:
    """And no reason to leave the words out in silence."""
    theirs = open_clip_folder(tmp_path, weights="open_clip_pytorch_model.bin")
    state = theirs.state_dict()
    state["ln_final.weight"][3] = float("nan")
    torch.save(state, tmp_path / "open_clip_pytorch_model.bin")
    with pytest.raises(clip_fast.CheckpointError, match=r"ln_final\.weight holds NaN"):
        read_checkpoint(tmp_path)
    del state["ln_final.weight"]
    torch.save(state, tmp_path / "open_clip_pytorch_model.bin")
    with pytest.raises(clip_fast.CheckpointError, match=r"misses ln_final\.weight"):
        read_checkpoint(tmp_path)


def test_a_text_config_of_another_model(tmp_path: Path) -> None:
    open_clip_folder(tmp_path)
    config = json.loads((tmp_path / "open_clip_config.json").read_bytes())
    for key, value, fault in [("layers", 3, "has 2 layers, the config .* says 3"), ("heads", 5, "multiple of heads"),
                              ("heads", "two", "heads must be of type int")]:  # fmt: skip
        changed = copy.deepcopy(config)
        changed["model_cfg"]["text_cfg"][key] = value
        (tmp_path / "open_clip_config.json").write_text(json.dumps(changed))
        with pytest.raises(clip_fast.CheckpointError, match=fault):
            read_checkpoint(tmp_path)
