"""The oracles, in float64, against formulas that share no line with them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from kernel_checks import DEVICE, DTYPES
from torch import Tensor, nn

from clip_fast.kernels import oracles
from clip_fast.kernels.statistics import merge_statistics, row_statistics, statistics_tiles


def rand(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, device=DEVICE)


def assert_equal(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [(28, 28), (29, 45)])
def test_patch_embed(size: tuple[int, int]) -> None:
    images, weight = rand(2, 3, *size), rand(10, 640)  # patches of 14: 588 features, padded
    grid = (size[0] // 14, size[1] // 14)
    position = rand(1 + grid[0] * grid[1], 10)
    got = oracles.patch_embed(images, weight, position, 14)[0]
    for b in range(2):
        assert_equal(got[b, 0], position[0])
        for i in range(grid[0]):
            for j in range(grid[1]):
                g = i * grid[1] + j
                patch = images[b, :, 14 * i : 14 * i + 14, 14 * j : 14 * j + 14].flatten()
                assert_equal(got[b, 1 + g], weight[:, :588] @ patch + position[1 + g])


def test_patch_embed_without_a_class_token() -> None:
    images, weight, position = rand(2, 3, 29, 45), rand(10, 640), rand(6, 10)
    tokens, statistics = oracles.patch_embed(images, weight, position, 14, class_token=False, statistics=True)
    behind_one, of_all = oracles.patch_embed(images, weight, torch.cat([position[:1], position]), 14, statistics=True)
    assert_equal(tokens, behind_one[:, 1:])
    assert_equal(statistics, row_statistics(tokens))
    assert_equal(of_all, row_statistics(behind_one))


def test_patch_embed_of_uint8_folds_the_normalisation() -> None:
    raw = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8, device=DEVICE)
    mean, std = rand(3)[:, None, None], rand(3).abs()[:, None, None] + 0.1
    weight, position = rand(10, 3, 8, 8), rand(5, 10)
    wanted = oracles.patch_embed((raw.double() / 255 - mean) / std, weight.flatten(1), position, 8)[0]
    shifted = position.clone()
    shifted[1:] += (weight * (128 / 255 - mean) / std).sum(dim=(1, 2, 3))
    assert_equal(oracles.patch_embed(raw, (weight / (255 * std)).flatten(1), shifted, 8)[0], wanted)


@pytest.mark.parametrize("width", [1, 7, 64, 100])
def test_layer_norm(width: int) -> None:
    x, weight, bias = rand(2, 5, width), rand(width), rand(width)
    deviation = x - x.sum(dim=-1, keepdim=True) / width
    variance = (deviation**2).sum(dim=-1, keepdim=True) / width
    got, _ = oracles.layer_norm(x, weight, bias, 1e-3)
    assert_equal(got, deviation / (variance + 1e-3).sqrt() * weight + bias)


@pytest.mark.parametrize("width", [1, 63, 64, 65, 200])
def test_statistics_merge_to_those_of_the_row(width: int) -> None:
    x = rand(9, width)
    x[1] += 1000
    x[2] = 3
    x[3, -1] *= 300
    statistics = row_statistics(x)
    assert statistics.shape == (9, statistics_tiles(width), 2)
    mean, rstd = merge_statistics(statistics, width, 1e-5)
    assert_equal(mean, x.mean(dim=1))
    torch.testing.assert_close(rstd, (x.var(dim=1, correction=0) + 1e-5) ** -0.5, rtol=1e-10, atol=0)


def test_statistics_in_float32_survive_rows_far_from_zero() -> None:
    """The naive difference of squares is off by half of the variance here."""
    x = rand(100, 768) + 1000
    _, rstd = merge_statistics(row_statistics(x.float()), 768, 1e-5)
    torch.testing.assert_close(rstd.double(), (x.var(dim=1, correction=0) + 1e-5) ** -0.5, rtol=1e-4, atol=0)


@pytest.mark.parametrize("activation", ["none", "quick_gelu", "gelu", "gelu_tanh", "relu"])
def test_linear_with_everything(activation: str) -> None:
    x, residual, bias = rand(2, 3, 100), rand(2, 3, 40), rand(40)
    gain, shift, weight, scale = rand(100), rand(100), rand(40, 100), rand(40)
    wanted = scale * (F.layer_norm(x, (100,), gain, shift, 1e-5) @ weight.T) + bias + residual
    if activation == "quick_gelu":
        wanted = wanted / (1 + torch.exp(-1.702 * wanted))
    elif activation == "gelu":
        wanted = wanted * torch.special.ndtr(wanted)
    elif activation == "gelu_tanh":
        wanted = 0.5 * wanted * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (wanted + 0.044715 * wanted**3)))
    elif activation == "relu":
        wanted = wanted.clamp(min=0)
    folded = weight * gain
    got, statistics = oracles.linear(
        x,
        folded,
        bias + scale * (weight @ shift),
        residual,
        row_statistics(x),
        folded.sum(dim=1),
        scale,
        activation,
        1e-5,
        True,
    )
    assert_equal(got, wanted)
    assert_equal(statistics[..., 0], got.mean(dim=-1, keepdim=True))
    assert_equal(statistics[..., 1], got.var(dim=-1, correction=0, keepdim=True) * 40)


@pytest.mark.parametrize("tokens", [1, 2, 17])
def test_flash_attention(tokens: int) -> None:
    qkv = rand(2, tokens, 3, 4, 16)
    got = oracles.flash_attention(qkv, 0.3)
    for b in range(2):
        for h in range(4):
            q, k, v = (qkv[b, :, i, h] for i in range(3))
            weights = torch.exp(0.3 * q @ k.T)
            assert_equal(got[b, :, 16 * h : 16 * h + 16], weights @ v / weights.sum(dim=1, keepdim=True))


@pytest.mark.parametrize("grid", [1, 3])
def test_pool_is_that_of_openai_clip(grid: int) -> None:
    """`mean_token` and `attention_pool` together, against PyTorch's own multi-head attention over all tokens."""
    width, heads, positions = 32, 4, grid**2
    attention = nn.MultiheadAttention(width, heads, dtype=torch.float64, device=DEVICE)
    nn.init.normal_(attention.in_proj_bias)
    features, position = rand(2, positions, width), rand(1 + positions, width)
    tokens = torch.cat([features.mean(dim=1, keepdim=True), features], dim=1) + position
    with torch.no_grad():
        sequence = tokens.transpose(0, 1)
        wanted = attention(sequence[:1], sequence, sequence, need_weights=False)[0][0]
        q_weight, k_weight, v_weight = attention.in_proj_weight.chunk(3)
        q_bias, _, v_bias = attention.in_proj_bias.chunk(3)  # the keys' bias drops out of the softmax
        first = oracles.mean_token(features, position[0])
        shape = (heads, width // heads, width)
        pooled = oracles.attention_pool(
            F.linear(first, q_weight, q_bias).view(2, heads, -1), first, features, k_weight.view(shape),
            v_weight.view(shape), v_bias, None, position[1:], (width // heads) ** -0.5,
        )  # fmt: skip
        assert_equal(attention.out_proj(pooled), wanted)


def test_attention_pool_with_one_query_for_all_images() -> None:
    """A learned query meets the keys' weights once, as PyTorch's own multi-head attention has it."""
    width, heads = 32, 4
    attention = nn.MultiheadAttention(width, heads, batch_first=True, dtype=torch.float64, device=DEVICE)
    nn.init.normal_(attention.in_proj_bias)
    query, tokens = rand(width), rand(3, 6, width)
    with torch.no_grad():
        wanted = attention(query.expand(3, 1, -1), tokens, tokens, need_weights=False)[0][:, 0]
        q_weight, k_weight, v_weight = attention.in_proj_weight.view(3, heads, -1, width)
        q_bias, _, v_bias = attention.in_proj_bias.chunk(3)
        asked = q_weight @ query + q_bias.view(heads, -1)  # (H, D)
        towards = torch.einsum("hd,hdw->hw", asked, k_weight)
        scale = (width // heads) ** -0.5
        pooled = oracles.attention_pool(
            towards, tokens[:, 0], tokens[:, 1:], None, v_weight, v_bias, None, None, scale
        )  # fmt: skip
        assert_equal(attention.out_proj(pooled), wanted)


def test_attention_pool_normalises_its_tokens() -> None:
    tokens, query = rand(2, 6, 64) * 3 + 5, rand(2, 2, 32)
    key_weight, value_weight, bias = rand(2, 32, 64) / 8, rand(2, 32, 64) / 8, rand(64)
    normed = F.layer_norm(tokens, (64,))
    weights = (query, key_weight, value_weight, bias)
    results = [
        oracles.attention_pool(weights[0], y[:, 0], y[:, 1:], *weights[1:], statistics, None, 0.2)
        for y, statistics in ((tokens, row_statistics(tokens)), (normed, None))
    ]
    assert_equal(*results)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_dtype_is_kept(dtype: torch.dtype) -> None:
    def low(*shape: int) -> Tensor:
        return rand(*shape).to(dtype)

    gain = torch.ones(64, device=DEVICE)
    results = [
        oracles.patch_embed(low(1, 3, 8, 8), low(16, 192), rand(2, 16), 8)[0],
        oracles.layer_norm(low(3, 64), gain, gain)[0],
        oracles.linear(low(3, 64), low(8, 64), torch.ones(8, device=DEVICE))[0],
        oracles.flash_attention(low(1, 3, 3, 2, 8), 0.1),
        oracles.mean_token(low(1, 4, 64), gain),
        oracles.attention_pool(
            low(1, 2, 32), low(1, 64), low(1, 3, 64), low(2, 32, 64), low(2, 32, 64), gain, None, None, 0.1
        ),
    ]
    assert {result.dtype for result in results} == {dtype}
    assert oracles.layer_norm(low(3, 64), gain, gain, statistics=True)[1].dtype == torch.float32
