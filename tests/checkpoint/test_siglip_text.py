"""SigLIP's text towers and tokenizers, as transformers and open_clip write them, against the packages' own results."""

from __future__ import annotations

import copy
import json
import pickle
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from saved_clips import close, open_clip_folder, texts_of_every_script
from saved_siglips import byte_pairs, full, open_clip_siglip, sentence_piece, siglip_folder, unigram

import clip_fast
from clip_fast.checkpoint.sentencepiece import SentencePiece
from clip_fast.model import Clip

TEXTS = ["A photo of a Dog!", "", "words " * 100, "Ünïcode 日本語, and naïve café", "snake_case  and\tspaces "]


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def loaded(folder: Path, **options: Any) -> Any:
    return clip_fast.load(folder, "cpu", **options)[0]


# --- embeddings and logits -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"),
    [({}, 128), ({"hidden_act": "gelu", "layer_norm_eps": 1e-3, "max_position_embeddings": 16}, 128),
     ({"hidden_size": 64, "num_attention_heads": 4, "projection_size": 128}, 128)],
    ids=["siglip", "settings", "narrow"],
)  # fmt: skip
def test_hugging_face(text: dict[str, Any], size: int, tmp_path: Path) -> None:
    theirs = siglip_folder(tmp_path, **text)
    tokenizer = byte_pairs(tmp_path)
    ours = loaded(tmp_path)
    assert isinstance(ours, Clip)
    tokens = full(tokenizer, TEXTS, ours.context_length)
    assert torch.equal(ours.tokenize(TEXTS, truncate=True), tokens)
    images = torch.randn(3, 3, 64, 64)
    wanted = theirs(input_ids=tokens, pixel_values=images)
    features = theirs.get_text_features(input_ids=tokens)
    assert close(ours.encode_text(tokens), getattr(features, "pooler_output", features))
    assert ours.encode_text(tokens).shape == (len(TEXTS), size)
    of_images, of_texts = ours(images, tokens)
    assert close(of_images, wanted.logits_per_image)
    assert close(of_texts, wanted.logits_per_text)
    assert float(theirs.logit_bias) != 0
    assert close(of_images.sigmoid(), wanted.logits_per_image.sigmoid())


@pytest.mark.parametrize(
    ("name", "activation"),
    [("ViT-B-16-SigLIP", "gelu"), ("ViT-B-16-SigLIP2", "gelu_tanh")],
)
def test_open_clip(name: str, activation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = open_clip_siglip(tmp_path, monkeypatch, name, context_length=24)
    (unigram if name == "ViT-B-16-SigLIP" else lambda folder: byte_pairs(folder, "GemmaTokenizer"))(tmp_path)
    ours = loaded(tmp_path)
    tokens = pytest.importorskip("open_clip").get_tokenizer(f"local-dir:{tmp_path}")(TEXTS)
    assert torch.equal(ours.tokenize(TEXTS, truncate=True), tokens)
    images = torch.randn(2, 3, 224, 224)
    assert close(ours.encode_image(images), theirs.encode_image(images))
    assert close(ours.encode_text(tokens), theirs.encode_text(tokens))
    assert ours.transformer.blocks()[0].mlp.gelu.approximate == {"gelu": "none", "gelu_tanh": "tanh"}[activation]
    for mine, wanted in zip(ours(images, tokens), theirs.get_logits(images, tokens), strict=True):
        assert close(mine, wanted)


def test_a_tower_without_a_projection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the multilingual SO400M's of open_clip."""
    text = {"proj_type": "none", "proj_bias": False, "context_length": 9}
    theirs = open_clip_siglip(tmp_path, monkeypatch, **text)
    unigram(tmp_path)
    ours = loaded(tmp_path)
    tokens = ours.tokenize(TEXTS, truncate=True)
    assert close(ours.encode_text(tokens), theirs.encode_text(tokens))
    assert ours.text_projection is None
    ours.initialize_parameters()


def test_a_clip_with_a_bias_of_its_logits(tmp_path: Path) -> None:
    """As open_clip trains with the sigmoid loss."""
    theirs = open_clip_folder(tmp_path, init_logit_bias=-10, nonscalar_logit_scale=True)
    ours = loaded(tmp_path)
    images, tokens = torch.randn(2, 3, 64, 64), ours.tokenize(TEXTS, truncate=True)
    assert close(ours(images, tokens)[0], theirs.get_logits(images, tokens)[0])
    assert ours.logit_bias.shape == ()


def test_the_parts_of_a_loaded_model(tmp_path: Path) -> None:
    """Every token sees all, copies and pickles are whole, and a state dict goes from one model to another."""
    siglip_folder(tmp_path)
    byte_pairs(tmp_path)
    ours = loaded(tmp_path)
    assert not ours.build_attention_mask().any()
    tokens = ours.tokenize(TEXTS, truncate=True)
    wanted = ours.encode_text(tokens)
    for each in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(each.encode_text(each.tokenize(TEXTS, truncate=True)), wanted)
    other = copy.deepcopy(ours)
    for parameter in other.parameters():
        parameter.zero_()
    other.load_state_dict(ours.state_dict())
    assert torch.equal(other.encode_text(tokens), wanted)
    assert "logit_bias" in ours.state_dict()
    first = ours.encode_text(tokens[:, :5])  # shorter texts are read at their own last token
    assert not torch.equal(first, wanted)


def test_half_precision(tmp_path: Path) -> None:
    theirs = siglip_folder(tmp_path).to(torch.bfloat16)
    byte_pairs(tmp_path)
    ours = loaded(tmp_path, dtype=torch.bfloat16)
    tokens = ours.tokenize(TEXTS, truncate=True)
    exact = theirs.float().text_model(input_ids=tokens).pooler_output
    plain = theirs.bfloat16().text_model(input_ids=tokens).pooler_output
    error, bound = ((each.float() - exact).norm() / exact.norm() for each in (ours.encode_text(tokens), plain))
    assert error <= 1.2 * bound


# --- tokens ----------------------------------------------------------------------------------------------------------

EVERY_SCRIPT = [*TEXTS, " \u00a0 ", "▁low▁line", "½ ﬁ ㍿ e\u0301 \u1fcb\u05ac", "Σίσυφος ΣΑΣ", "don't (stop) [now] {a}"]


def differing(ours: torch.Tensor, theirs: torch.Tensor, texts: list[str]) -> list[str]:
    assert ours.shape == theirs.shape
    return [text for text, a, b in zip(texts, ours, theirs, strict=True) if not torch.equal(a, b)]


@pytest.mark.parametrize("byte_fallback", [False, True])
def test_tokens_of_siglip(byte_fallback: bool, tmp_path: Path) -> None:
    """By SiglipTokenizer, whose folder has a SentencePiece model alone."""
    siglip_folder(tmp_path)
    tokenizer = sentence_piece(tmp_path, byte_fallback)
    texts = EVERY_SCRIPT + texts_of_every_script(2000)
    if pytest.importorskip("transformers").__version__.startswith("4."):
        texts = [text for text in texts if "Σ" not in text]  # it lowers letters one by one: none is a final sigma
    ours = loaded(tmp_path).tokenize(texts, truncate=True)
    assert not differing(ours, full(tokenizer, texts), texts)
    assert (ours == 1).any(dim=1).all()  # each has an end


def test_letters_that_a_siglip_leaves_large(tmp_path: Path) -> None:
    siglip_folder(tmp_path)
    sentence_piece(tmp_path, byte_fallback=True)
    texts = ["A Photo of a DOG", "a photo of a dog", *EVERY_SCRIPT]
    small = loaded(tmp_path).tokenize(texts, truncate=True)
    settings = tmp_path / "tokenizer_config.json"
    told = json.loads(settings.read_text()) if settings.exists() else {}
    settings.write_text(json.dumps(told | {"do_lower_case": False}))
    ours = loaded(tmp_path).tokenize(texts, truncate=True)
    assert torch.equal(small[0], small[1])
    assert not torch.equal(ours[0], ours[1])
    transformers = pytest.importorskip("transformers")
    theirs = transformers.SiglipTokenizer.from_pretrained(tmp_path)
    assert not differing(ours, full(theirs, texts), texts)


def test_tokens_of_siglip_by_a_tokenizer_json(tmp_path: Path) -> None:
    """Beside which no SentencePiece model lies: with the changes of texts that SiglipTokenizer makes."""
    siglip_folder(tmp_path)
    tokenizer = unigram(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "SiglipTokenizer"}))
    texts = ["A photo, of a Dog!", "  (on_the) beach  "]
    ours = loaded(tmp_path).tokenize(texts)
    assert torch.equal(ours, full(tokenizer, ["a photo of a dog", "onthe beach"]))
    (tmp_path / "tokenizer_config.json").unlink()
    assert torch.equal(loaded(tmp_path).tokenize(texts), ours)


@pytest.mark.parametrize("side", ["left", "right"])
def test_tokens_of_siglip_2(side: str, tmp_path: Path) -> None:
    siglip_folder(tmp_path)
    tokenizer = byte_pairs(tmp_path, padding_side=side)
    texts = EVERY_SCRIPT + texts_of_every_script(2000)
    wanted = full(tokenizer, texts)
    assert not differing(loaded(tmp_path).tokenize(texts, truncate=True), wanted, texts)
    byte_pairs(tmp_path, "GemmaTokenizer", padding_side=side)
    (tmp_path / "tokenizer.json").write_text(tokenizer.backend_tokenizer.to_str().replace('{"type":"Lowercase"},', ""))
    assert not differing(loaded(tmp_path).tokenize(texts, truncate=True), wanted, texts)  # small letters all the same


def test_siglip_2_fills_up_on_the_left_where_nothing_is_told(tmp_path: Path) -> None:
    siglip_folder(tmp_path)
    tokenizer = byte_pairs(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    told = json.loads(path.read_text())
    del told["padding_side"]
    path.write_text(json.dumps(told))
    transformers = pytest.importorskip("transformers")
    wanted = full(transformers.AutoTokenizer.from_pretrained(tmp_path), TEXTS)
    assert torch.equal(loaded(tmp_path).tokenize(TEXTS, truncate=True), wanted)
    assert not torch.equal(wanted, full(tokenizer, TEXTS))


@pytest.mark.parametrize("make", [unigram, lambda folder: byte_pairs(folder, "GemmaTokenizer")], ids=["t5", "gemma"])
def test_tokens_of_open_clip(make: Callable[[Path], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_clip_siglip(tmp_path, monkeypatch, width=64, heads=1)
    make(tmp_path)
    texts = EVERY_SCRIPT + texts_of_every_script(2000)
    wanted = pytest.importorskip("open_clip").get_tokenizer(f"local-dir:{tmp_path}")(texts)
    assert not differing(loaded(tmp_path).tokenize(texts, truncate=True), wanted, texts)


def test_long_texts_are_cut_before_their_end(tmp_path: Path) -> None:
    siglip_folder(tmp_path)
    byte_pairs(tmp_path)
    ours = loaded(tmp_path)
    with pytest.raises(RuntimeError, match="may have 64 tokens, start and end included"):
        ours.tokenize("words " * 100)
    (tokens,) = ours.tokenize("words " * 100, truncate=True)
    assert int(tokens[-1]) == 1
    assert ours.tokenize([]).shape == (0, 64)


# --- what is missing or damaged --------------------------------------------------------------------------------------


def test_without_a_tokenizer_the_files_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    siglip_folder(tmp_path / "transformers")
    with pytest.raises(clip_fast.NotServed, match=r"it has no tokenizer: place spiece\.model or tokenizer\.json in"):
        loaded(tmp_path / "transformers").tokenize("a dog")
    open_clip_siglip(tmp_path / "open_clip", monkeypatch, width=64, heads=1)
    with pytest.raises(clip_fast.NotServed, match=r"that of timm/ViT-B-16-SigLIP: place its tokenizer\.json in"):
        loaded(tmp_path / "open_clip").tokenize("a dog")
    (tmp_path / "open_clip" / "open_clip_config.json").unlink()
    with pytest.raises(clip_fast.NotServed, match="place its package's config and its tokenizer"):
        loaded(tmp_path / "open_clip", activation="gelu").tokenize("a dog")


def field(number: int, value: bytes) -> bytes:
    """A field of a protocol buffer, of fewer than 128 bytes."""
    return bytes([number << 3 | 2, len(value)]) + value


PIECES = b"".join(field(1, field(1, piece)) for piece in (b"<unk>", b"</s>", b"a"))


@pytest.mark.parametrize(
    ("model", "fault"),
    [
        (b"", "holds no tokenizer"),
        (b"no protocol buffer", "holds no tokenizer"),
        (PIECES[:-1], "it is cut off"),
        (PIECES + field(2, b"\x18\x02"), "it is no unigram model"),
        (field(1, field(1, b"a")), "holds no tokenizer"),
        (PIECES + field(3, field(2, struct.pack("<3I", 8, 1 << 20, 0))), "holds no tokenizer"),
        (PIECES + field(3, field(2, struct.pack("<I", 8000))), "holds no tokenizer"),
    ],
)
def test_a_damaged_sentence_piece_model_is_named(model: bytes, fault: str, tmp_path: Path) -> None:
    siglip_folder(tmp_path)
    (tmp_path / "spiece.model").write_bytes(model)
    ours = loaded(tmp_path)
    with pytest.raises(clip_fast.CheckpointError, match=rf"spiece\.model: .*{fault}"):
        ours.tokenize("a dog")


def test_a_sentence_piece_model_may_have_no_table() -> None:
    model = SentencePiece(PIECES)
    assert model.normalized("ﬁ a") == "ﬁ a"
    assert model.tokenizer.encode("a").ids[-1] == 1


def test_the_names_of_control_pieces_are_no_words(tmp_path: Path) -> None:
    """Full-width letters survive the cleaning, and only then become those of such a name."""
    theirs = sentence_piece(tmp_path)
    siglip_folder(tmp_path)
    texts = ["a ＜／ｓ＞ b", "﹤pad﹥", "a ＜unk＞", "＜ｐａｄ＞＜／ｓ＞"]
    assert torch.equal(loaded(tmp_path).tokenize(texts), full(theirs, texts))


def test_a_damaged_text_tower_is_an_error(tmp_path: Path) -> None:
    siglip_folder(tmp_path)
    byte_pairs(tmp_path)
    path = tmp_path / "model.safetensors"
    state = load_file(path)
    save_file({key: tensor for key, tensor in state.items() if "final_layer_norm.weight" not in key}, path)
    with pytest.raises(clip_fast.CheckpointError, match=r"misses text_model\.final_layer_norm\.weight"):
        loaded(tmp_path)
    save_file(state | {"text_model.head.bias": torch.full((128,), torch.inf)}, path)
    with pytest.raises(clip_fast.CheckpointError, match=r"text_model\.head\.bias holds NaN or infinite values"):
        loaded(tmp_path)
