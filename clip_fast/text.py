"""The text side of CLIP, in plain PyTorch: tokens and the encoder that embeds them beside the images.

Radford et al. 2021, section 2.4: a causal Transformer over byte-pair tokens, read at the end-of-text token.

Shapes: B texts, L context length, W width, E embed_dim.
"""

from __future__ import annotations

import gzip
import html
import importlib
import math
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .config import LAYER_NORM_EPS, TextConfig
from .reference import Transformer, random_parameter

VOCABULARY = 49408  # tokens: twice 256 bytes, the merges that are used, start and end

_MERGES_FILE = Path(__file__).parent / "assets" / "vocabulary" / "bpe_simple_vocab_16e6.txt.gz"
_MERGES = VOCABULARY - 2 * 256 - 2
_START, _END = "<|startoftext|>", "<|endoftext|>"
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"


class TextEncoder(nn.Module):
    """Tokens (B, L) of an integer dtype -> embeddings (B, E), not normalised.

    Its parameters have OpenAI's names, `logit_scale` included, the logarithm of what cosines are multiplied by.
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding.from_pretrained(  # pyright: ignore[reportUnknownMemberType]
            random_parameter(config.vocabulary, config.width, std=1.0), freeze=False
        )
        self.positional_embedding = random_parameter(config.context_length, config.width, std=0.01)
        self.transformer = Transformer(config, causal=True)
        self.ln_final = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS)
        self.text_projection = random_parameter(config.width, config.embed_dim, std=config.width**-0.5)
        self.logit_scale = nn.Parameter(torch.tensor(-math.log(0.07)))

    def forward(self, tokens: Tensor) -> Tensor:
        context_length = len(self.positional_embedding)
        if tokens.ndim != 2 or not 0 < tokens.shape[1] <= context_length or tokens.is_floating_point():
            raise ValueError(
                f"tokens must be [batch, at most {context_length}] of an integer dtype, "
                f"got {list(tokens.shape)} of {tokens.dtype}"
            )
        x = self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]  # (B, L, W)
        for block in self.transformer.resblocks:
            x = block(x)
        end = tokens.argmax(dim=-1)  # the end-of-text token has the largest number of all
        x = self.ln_final(x[torch.arange(len(x), device=x.device), end])  # (B, W)
        return x @ self.text_projection


def tokenize(texts: str | list[str], context_length: int = 77, truncate: bool = False) -> Tensor:
    """Texts as `TextEncoder` takes them: start, tokens, end, and zeros to `context_length`, as `clip.tokenize`.

    Args:
        texts: one text or several.
        truncate: cut texts that are too long.

    Returns:
        (B, context_length), int32.

    Raises:
        RuntimeError: for a text that is too long, where it may not be cut.
        ModuleNotFoundError: without the extra `text`: `pip install "clip_fast[text]"`.
    """
    texts = [texts] if isinstance(texts, str) else texts
    tokenizer = _tokenizer()
    start, end = tokenizer.token_to_id(_START), tokenizer.token_to_id(_END)
    result = torch.zeros(len(texts), context_length, dtype=torch.int32)
    for row, text in zip(result, texts, strict=True):
        tokens = [start, *tokenizer.encode(_clean(text)).ids, end]
        if len(tokens) > context_length:
            if not truncate:
                raise RuntimeError(
                    f"a text may have {context_length} tokens, start and end included, and {text!r} has {len(tokens)}: "
                    "shorten it, or pass truncate=True"
                )
            tokens = [*tokens[: context_length - 1], end]
        row[: len(tokens)] = torch.tensor(tokens)
    return result


def _clean(text: str) -> str:
    """Mended, unescaped, with single spaces and in lower case, as CLIP was trained."""
    ftfy = _extra("ftfy")
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


@cache
def _tokenizer() -> Any:
    tokenizers = _extra("tokenizers")
    models, pre_tokenizers = tokenizers.models, tokenizers.pre_tokenizers
    lines = gzip.decompress(_MERGES_FILE.read_bytes()).decode().split("\n")
    merges = [(first, second) for first, second in (line.split() for line in lines[1 : 1 + _MERGES])]
    symbols = _byte_symbols()
    words = [*symbols, *(f"{symbol}</w>" for symbol in symbols), *("".join(pair) for pair in merges), _START, _END]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, merges, end_of_word_suffix="</w>", fuse_unk=False))
    tokenizer.add_special_tokens([_START, _END])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return tokenizer


def _extra(name: str) -> Any:
    """A package of the extra `text`."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('tokenize needs the extra "text": pip install "clip_fast[text]"') from error


def _byte_symbols() -> list[str]:
    """A printable character for every byte, in the order of the vocabulary (Radford et al. 2019, section 2.2).

    Bytes that are printable in Latin-1 stand for themselves and come first; the others follow, moved beyond 255.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]
