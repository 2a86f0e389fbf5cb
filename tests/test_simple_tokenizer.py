"""Tokens and text embeddings, against openai-clip itself."""

from __future__ import annotations

import gzip
import sys
from pathlib import Path

import pytest
import torch
from random_towers import relative_error

from clip_fast import simple_tokenizer as text
from clip_fast.simple_tokenizer import SimpleTokenizer, tokenize
from clip_fast.towers.config import TextConfig
from clip_fast.towers.text import TextEncoder

clip = pytest.importorskip("clip")

TEXTS = [
    "a photo of a dog",
    "",
    "   Spaces \t and\n\nlines   ",
    "It's the cat's; they've said we'll, I'd, you're",
    "CAPITALS and MiXeD",
    "digits 1234567890 3.14 $5",
    "punctuation!!! ??? ... --- (hello) [world] {x} <tag> a/b\\c",
    "&lt;b&gt; &amp;amp; &#39;quoted&#39;",
    "naïve café über Ångström Straße",
    "日本語のテキスト 한국어 中文 русский العربية ไทย",
    "emoji 😀👍🏽 🏳️‍🌈 zero\u200bwidth",
    "â€œmojibakeâ€\x9d that ftfy mends",
    "<|startoftext|> in the middle <|endoftext|>",
    "a dog.<|endoftext|> on a red sofa",  # behind punctuation it is text as any other
    "it's<|startoftext|>5<|endoftext|><|ENDoftext|>!<|endoftext|><|endoftext|> a<|endoftext",
    "antidisestablishmentarianism pneumonoultramicroscopicsilicovolcanoconiosis",
    "ﬁ ligature, ½, №, Ⅷ, ² and ﬀ",
    "it’s “quoted” — dashes – and … more",
]


@pytest.mark.parametrize("index", range(len(TEXTS)))
def test_tokens_are_those_of_clip(index: int) -> None:
    wanted = clip.tokenize(TEXTS[index])
    got = tokenize(TEXTS[index])
    assert got.dtype == wanted.dtype
    assert torch.equal(got, wanted)


def test_random_texts() -> None:
    generator = torch.Generator()
    print("seed", generator.seed())
    alphabet = "abcdefghijklmnopqrstuvwxyzABC 0123456789 '!?.,-é日 "
    texts = [
        "".join(alphabet[i] for i in torch.randint(len(alphabet), (int(length),), generator=generator))
        for length in torch.randint(1, 60, (300,), generator=generator)
    ]
    assert torch.equal(tokenize(texts, truncate=True), clip.tokenize(texts, truncate=True))


def test_long_texts() -> None:
    long = "word " * 100
    with pytest.raises(RuntimeError, match=r"may have 77 tokens, start and end included, and 'word .* has 102"):
        tokenize(long)
    assert torch.equal(tokenize(long, truncate=True), clip.tokenize(long, truncate=True))
    assert torch.equal(tokenize(["a", long], 20, True), clip.tokenize(["a", long], 20, True))
    assert tokenize([]).shape == (0, 77)


def test_texts_may_come_from_a_generator() -> None:
    texts = ["a photo of a dog", "a photo of a cat"]
    assert torch.equal(tokenize(text for text in texts), tokenize(texts))  # type: ignore[arg-type]


@pytest.mark.parametrize("missing", ["tokenizers", "ftfy"])
def test_the_extra_is_named(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text._tokenizer.cache_clear()
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ModuleNotFoundError, match=r'the extra "text": pip install "clip_fast\[text\]"'):
        tokenize("a")
    text._tokenizer.cache_clear()


def test_embeddings_are_those_of_clip() -> None:
    config = TextConfig(context_length=77, vocabulary=49408, width=128, layers=3, heads=2, embed_dim=64)
    theirs = clip.model.CLIP(64, 32, 1, 64, 32, config.context_length, config.vocabulary, 128, 2, 3).eval()
    ours = TextEncoder(config).eval()
    ours.load_state_dict({name: theirs.state_dict()[name] for name in ours.state_dict()})
    tokens = tokenize(TEXTS)
    with torch.inference_mode():
        assert relative_error(ours(tokens), theirs.encode_text(tokens)) < 1e-5
        assert (
            relative_error(ours(tokens[:, :50]), theirs.encode_text(tokens)) < 1e-5
        )  # what follows the end is not seen


def test_tokens_that_make_no_sense() -> None:
    encoder = TextEncoder(TextConfig(context_length=8, vocabulary=10, width=64, layers=1, heads=1, embed_dim=4))
    of_no_integers = [torch.zeros(1, 8, dtype=dtype) for dtype in (torch.float32, torch.bool, torch.complex64)]
    for tokens in (torch.zeros(8, dtype=torch.int), torch.zeros(1, 9, dtype=torch.int), *of_no_integers):
        with pytest.raises(ValueError, match=r"tokens must be \[batch, at most 8\] of an integer dtype, got"):
            encoder(tokens)
    wanted = encoder(torch.arange(8)[None])
    for dtype in (torch.uint8, torch.int16, torch.int32, torch.uint32):
        assert torch.equal(encoder(torch.arange(8)[None].to(dtype)), wanted)


def test_the_tokenizer_is_clips() -> None:
    from clip.simple_tokenizer import SimpleTokenizer as Theirs

    ours, theirs = SimpleTokenizer(), Theirs()
    assert ours.encoder == theirs.encoder
    assert ours.decoder == theirs.decoder
    for words in TEXTS:
        tokens = theirs.encode(words)
        assert ours.encode(words) == tokens
        assert ours.decode(tokens) == theirs.decode(tokens)
    ragged = torch.randint(49408, (200,)).tolist()  # bytes that are no UTF-8 among them
    assert ours.decode(ragged) == theirs.decode(ragged)
    assert ours.decode(torch.tensor(ragged)) == theirs.decode(ragged)


def test_the_parts_of_the_tokenizer_are_clips() -> None:
    from clip import simple_tokenizer as theirs

    ours, wanted = SimpleTokenizer(), theirs.SimpleTokenizer()
    for name in ("byte_encoder", "byte_decoder", "bpe_ranks"):
        assert getattr(ours, name) == getattr(wanted, name)
    assert text.bytes_to_unicode() == theirs.bytes_to_unicode()
    files = [gzip.decompress(Path(module.default_bpe()).read_bytes()) for module in (text, theirs)]
    assert files[0] == files[1]
    for words in TEXTS:
        assert text.basic_clean(words) == theirs.basic_clean(words)
        assert text.whitespace_clean(words) == theirs.whitespace_clean(words)
        for word in words.lower().split():
            symbols = "".join(ours.byte_encoder[byte] for byte in word.encode())
            assert text.get_pairs(symbols) == theirs.get_pairs(symbols)
            assert ours.bpe(symbols) == wanted.bpe(symbols)
    with pytest.raises(AttributeError, match=r"'SimpleTokenizer' object has no attribute 'pat': clip_fast\.accelerate"):
        ours.pat  # noqa: B018
