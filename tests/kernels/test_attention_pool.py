"""`attention_pool` and `mean_token` against their oracles in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_checks import DEVICE, DTYPES, Guards, assert_as_accurate, assert_same_bits
from random_towers import relative_error
from torch import Tensor

from clip_fast.kernels import attention_pool, ops, oracles
from clip_fast.kernels.statistics import row_statistics

LAUNCHES = ["_head_linear_kernel", "_scores_kernel", "_weighted_sum_kernel", "_head_linear_kernel"]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


class Pool:
    """The operands of one `attention_pool`, scaled like a model's: scores of a few units, outputs of order one."""

    def __init__(self, batch: int, heads: int, head_dim: int, width: int, positions: int) -> None:
        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=torch.float64, device=DEVICE)

        self.query = 3 * randn(batch, heads, head_dim)
        self.tokens = randn(batch, 1 + positions, width)
        self.key_weight = randn(heads, head_dim, width) / width**0.5
        self.value_weight = randn(heads, head_dim, width) / width**0.5
        self.value_bias = 0.1 * randn(heads * head_dim).float()
        self.scale = head_dim**-0.5

    def towards(self, score: float) -> Tensor:
        """(B, W): vectors that raise a token's score by `score` in every head of its image when added to the token."""
        u = torch.einsum("bhd,hdw->bhw", self.query, self.key_weight) * self.scale
        return (torch.linalg.pinv(u) @ torch.full_like(u[:, :, :1], score)).squeeze(-1)

    def vit(self, dtype: torch.dtype, guards: Guards, statistics: bool = True) -> dict[str, Any]:
        """Operands as in the last block of a ViT: all tokens are in one tensor, and are normalised when read."""
        hidden = guards.copy(self.tokens.to(dtype))
        return {
            **self._common(dtype, guards),
            "first": hidden[:, 0],
            "rest": hidden[:, 1:],
            "statistics": guards.copy(row_statistics(hidden)) if statistics else None,
        }

    def siglip(self, dtype: torch.dtype, guards: Guards) -> dict[str, Any]:
        """Operands as in SigLIP's head: all images share the query, which has met the keys' weight."""
        towards = torch.einsum("hd,hdw->hw", self.query[0], self.key_weight)
        return {**self.vit(dtype, guards), "query": guards.copy(towards.to(dtype)), "key_weight": None}

    def resnet(self, dtype: torch.dtype, guards: Guards, channels_last: bool) -> dict[str, Any]:
        """Operands as in the pool of a ResNet: a feature map in one of the memory formats, and the mean token."""
        features, gap = self.tokens[:, 1:].to(dtype), 5
        if channels_last:
            rest = guards.copy(features, gap)
        else:
            rest = guards.copy(features.transpose(1, 2), gap).transpose(1, 2)
        position = 0.3 * torch.randn(self.tokens.shape[1:], device=DEVICE)
        return {
            **self._common(dtype, guards),
            "first": guards.copy(oracles.mean_token(rest, position[0])),
            "rest": rest,
            "position": guards.copy(position[1:]),
        }

    def _common(self, dtype: torch.dtype, guards: Guards) -> dict[str, Any]:
        weights = {name: guards.copy(getattr(self, name).to(dtype)) for name in ("query", "key_weight", "value_weight")}
        return {**weights, "value_bias": guards.copy(self.value_bias), "scale": self.scale}


def double(operands: dict[str, Any]) -> dict[str, Any]:
    return {name: x.double() if isinstance(x, Tensor) else x for name, x in operands.items()}


def check(*draws: dict[str, Any]) -> None:
    """Checks the accuracy over some draws of the same shapes, since few images and heads give no steady statistic."""
    y = torch.cat([ops.attention_pool(**operands, impl="triton") for operands in draws])
    plain = torch.cat([ops.attention_pool(**operands, impl="reference") for operands in draws])
    exact = torch.cat([ops.attention_pool(**double(operands), impl="reference") for operands in draws])
    assert_as_accurate(y, plain, exact)


def schema_order(operands: dict[str, Any]) -> tuple[Any, ...]:
    """The positional arguments of the registered op."""
    names = ("query", "first", "rest", "key_weight", "value_weight", "value_bias", "statistics", "position", "scale")
    return (*(operands.get(name) for name in names), 1e-5, "ieee")


# --- shapes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "heads", "width", "tokens", "dtype"),
    [
        (2, 12, 768, 50, torch.float16),
        (1, 4, 1024, 257, torch.bfloat16),
        (3, 2, 256, 197, torch.float16),
        (2, 1, 768, 50, torch.float32),
        (2, 3, 128, 257, torch.float32),
    ],
)
def test_last_block_of_a_vit(
    batch: int, heads: int, width: int, tokens: int, dtype: torch.dtype, guards: Guards, launches: list[str]
) -> None:
    operands = Pool(batch, heads, 64, width, tokens - 1).vit(dtype, guards)
    check(operands)
    assert launches == LAUNCHES


@pytest.mark.parametrize(
    ("batch", "heads", "width", "tokens", "channels_last", "dtype"),
    [
        (2, 32, 128, 50, False, torch.float16),
        (1, 2, 2048, 50, True, torch.bfloat16),
        (2, 2, 160, 82, False, torch.bfloat16),
        (2, 2, 160, 145, False, torch.float16),
        (2, 3, 160, 197, True, torch.float16),
        (2, 2, 160, 50, True, torch.float32),
        (2, 2, 160, 197, False, torch.float32),
    ],
)
def test_pool_of_a_resnet(
    batch: int, heads: int, width: int, tokens: int, dtype: torch.dtype, channels_last: bool, guards: Guards
) -> None:
    check(Pool(batch, heads, 64, width, tokens - 1).resnet(dtype, guards, channels_last))


@pytest.mark.parametrize(
    ("batch", "heads", "head_dim", "width", "positions", "dtype"),
    [
        *((1, 1, 40, 72, 1, dtype) for dtype in DTYPES),
        *((3, 3, 40, 100, 2, dtype) for dtype in DTYPES),
        (17, 2, 40, 65, 63, torch.float16),
        (1, 3, 64, 63, 64, torch.bfloat16),
        (1, 3, 64, 63, 31, torch.float32),
        (3, 1, 80, 130, 65, torch.bfloat16),
        (3, 1, 80, 70, 65, torch.float32),
        (1, 66, 16, 64, 3, torch.float16),  # more heads than a tile has
        (1, 34, 16, 32, 3, torch.float32),
        (66, 1, 16, 24, 3, torch.bfloat16),  # more images than a tile has
        (34, 1, 16, 24, 3, torch.float32),
        (2, 2, 128, 64, 33, torch.float16),
        (2, 2, 16, 64, 0, torch.float16),
    ],
)
def test_awkward_sizes(
    batch: int, heads: int, head_dim: int, width: int, positions: int, dtype: torch.dtype, guards: Guards
) -> None:
    draws = (Pool(batch, heads, head_dim, width, positions) for _ in range(1 + 7 // (batch * heads)))
    check(*(pool.vit(dtype, guards) for pool in draws))


@pytest.mark.parametrize(
    ("batch", "heads", "head_dim", "tokens", "dtype"),
    [
        (2, 12, 64, 196, torch.float16),
        (1, 4, 72, 256, torch.bfloat16),
        (3, 2, 40, 66, torch.bfloat16),
        (2, 3, 72, 65, torch.float32),
    ],
)
def test_head_of_siglip(
    batch: int, heads: int, head_dim: int, tokens: int, dtype: torch.dtype, guards: Guards, launches: list[str]
) -> None:
    pool = Pool(batch, heads, head_dim, heads * head_dim, tokens - 1)
    operands = pool.siglip(dtype, guards)
    check(operands)
    assert launches == LAUNCHES[1:]
    # The same query, given for each image, is one rounding of W_kᵀ q away.
    each = pool.vit(torch.float64, guards) | {"query": pool.query[:1].expand(batch, -1, -1)}
    shared = pool.siglip(torch.float64, guards)
    torch.testing.assert_close(
        ops.attention_pool(**shared, impl="reference"), ops.attention_pool(**each, impl="reference")
    )


@pytest.mark.parametrize("statistics", [False, True])
@pytest.mark.parametrize("position", [False, True])
def test_every_mix_of_options(statistics: bool, position: bool, guards: Guards) -> None:
    operands = Pool(2, 3, 40, 100, 70).vit(torch.float16, guards, statistics)
    if position:
        operands["position"] = guards.copy(0.1 * torch.randn(70, 100, device=DEVICE).to(torch.bfloat16))
    check(operands)


def test_an_empty_batch(guards: Guards, launches: list[str]) -> None:
    operands = Pool(0, 2, 16, 64, 4).vit(torch.float16, guards)
    assert ops.attention_pool(**operands, impl="triton").shape == (0, 32)
    assert ops.mean_token(operands["rest"], torch.zeros(64, device=DEVICE), impl="triton").shape == (0, 64)
    assert launches == []


def test_operands_of_any_strides(guards: Guards) -> None:
    operands = Pool(3, 2, 16, 70, 9).vit(torch.float16, guards)
    y = ops.attention_pool(**operands, impl="triton")
    strided = {
        name: x.transpose(0, -1).contiguous().transpose(0, -1) if isinstance(x, Tensor) else x
        for name, x in operands.items()
    }
    assert_same_bits(ops.attention_pool(**strided, impl="triton"), y)


@pytest.mark.parametrize("dtype", DTYPES)
def test_eps_is_the_one_given(dtype: torch.dtype, guards: Guards) -> None:
    """The tokens' variance is a tenth of eps. Larger weights make up for the smaller normalised tokens."""
    draws = [Pool(2, 2, 32, 72, 40) for _ in range(3)]
    for pool in draws:
        pool.tokens *= 0.03
        pool.key_weight *= 3
    check(*({**pool.vit(dtype, guards), "eps": 1e-2} for pool in draws))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_float32_rows_meet_weights_in_half_precision(dtype: torch.dtype, guards: Guards) -> None:
    """Each row is split into two numbers of the weights' dtype, which together keep 16 bits or more of it.

    Launch 4 does so with z.
    """
    x = guards.copy(torch.randn(70, 2, 200, device=DEVICE))
    weight = guards.copy((torch.randn(2, 72, 200, device=DEVICE) / 200**0.5).to(dtype))
    out = guards.empty((70, 2, 72), torch.float32, DEVICE)
    attention_pool._head_linear(x, weight, None, out, "ieee")
    exact = torch.einsum("bhk,hnk->bhn", x.double(), weight.double())
    plain = torch.einsum("bhk,hnk->bhn", x, weight.float())
    assert relative_error(out, exact) <= max(1.2 * relative_error(plain, exact), 2**-18)


# --- hostile values --------------------------------------------------------------------------------------------------


def hostile(kind: str, pool: Pool) -> Pool:
    tokens = pool.tokens
    count, width = tokens.shape[1:]
    if kind == "large scores":  # exp would overflow if the maximum were not subtracted
        tokens += pool.towards(300)[:, None]
    elif kind == "small scores":  # exp is zero for all
        tokens -= pool.towards(300)[:, None]
    elif kind == "rising scores":  # the maximum grows in every tile
        tokens += torch.linspace(0, 1, count, device=DEVICE)[:, None] * pool.towards(60)[:, None]
    elif kind == "falling scores":
        tokens -= torch.linspace(0, 1, count, device=DEVICE)[:, None] * pool.towards(60)[:, None]
    elif kind.startswith("token"):
        tokens[:, int(kind.split()[1])] += pool.towards(40)
    elif kind == "outlier channels":
        tokens[..., width // 2] *= 300
        tokens[..., 3] *= -300
    elif kind == "large means":
        tokens += 100
    else:
        assert kind == "constant rows"
        tokens[:, ::3] = 3.0
        tokens[:, 1] = 300.0  # 300 · rstd is infinite in float16, should x or its mean be missing
    return pool


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "kind",
    ["large scores", "small scores", "rising scores", "falling scores", "token 0", "token 1", "token -1"],
)
def test_hostile_scores(kind: str, dtype: torch.dtype, guards: Guards) -> None:
    check(hostile(kind, Pool(4, 3, 32, 72, 66)).vit(dtype, guards, statistics=False))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["outlier channels", "large means", "constant rows"])
def test_hostile_rows(kind: str, dtype: torch.dtype, guards: Guards) -> None:
    check(hostile(kind, Pool(4, 3, 32, 72, 66)).vit(dtype, guards))


@pytest.mark.parametrize("dtype", DTYPES)
def test_outlier_channels_without_statistics(dtype: torch.dtype, guards: Guards) -> None:
    pool = hostile("outlier channels", Pool(4, 3, 32, 72, 66))
    pool.key_weight[..., [3, 36]] /= 300
    check(pool.resnet(dtype, guards, channels_last=False))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["query", "first", "rest", "statistics"])
def test_nan_and_infinity_stay_in_their_image(name: str, value: float, guards: Guards) -> None:
    operands = Pool(3, 1, 40, 72, 33).vit(torch.float16, guards)
    operands = {key: x.clone() if isinstance(x, Tensor) else x for key, x in operands.items()}
    clean = ops.attention_pool(**operands, impl="triton")
    operands[name][1].view(-1)[-1] = value
    y = ops.attention_pool(**operands, impl="triton")
    assert_same_bits(y[[0, 2]], clean[[0, 2]])
    assert not torch.equal(y[1], clean[1])


@pytest.mark.parametrize(
    ("batch", "positions", "dtype"),
    [(66, 3, torch.float16), (34, 3, torch.float32), (4, 130, torch.float16), (4, 70, torch.bfloat16)],
)
def test_an_image_does_not_depend_on_its_batch(batch: int, positions: int, dtype: torch.dtype, guards: Guards) -> None:
    operands = Pool(batch, 1, 16, 40, positions).vit(dtype, guards)
    batched = ("query", "first", "rest", "statistics")
    whole = ops.attention_pool(**operands, impl="triton")
    for images in ([0], [batch - 1], [3, batch - 2, 1]):
        some = {name: x[images] if name in batched else x for name, x in operands.items()}
        assert_same_bits(ops.attention_pool(**some, impl="triton"), whole[images])


# --- mean_token ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 49, 320), (1, 144, 200), (3, 196, 65), (2, 1, 64), (2, 64, 40), (1, 65, 63)])
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
def test_mean_token(
    shape: tuple[int, int, int], channels_last: bool, dtype: torch.dtype, guards: Guards, launches: list[str]
) -> None:
    features = (torch.randn(shape, device=DEVICE) + 3).to(dtype)
    if channels_last:
        features = guards.copy(features, gap=3)
    else:
        features = guards.copy(features.transpose(1, 2), gap=3).transpose(1, 2)
    position = guards.copy(torch.randn(shape[2], device=DEVICE))
    y = ops.mean_token(features, position, impl="triton")
    assert launches == ["_mean_token_kernel"]
    plain = ops.mean_token(features, position, impl="reference")
    assert_as_accurate(y, plain, oracles.mean_token(features.double(), position.double()))
    assert_same_bits(ops.mean_token(features[-1:], position, impl="triton"), y[-1:])


def test_mean_token_keeps_nan_in_its_image_and_channel(guards: Guards) -> None:
    features, position = torch.randn(3, 50, 70, device=DEVICE), torch.randn(70, device=DEVICE)
    clean = ops.mean_token(features, position, impl="triton")
    features[1, 49, 69] = float("nan")
    y = ops.mean_token(features, position, impl="triton")
    assert y[1, 69].isnan()
    y[1, 69] = clean[1, 69]
    assert_same_bits(y, clean)


# --- as registered ops -----------------------------------------------------------------------------------------------


def registered_calls(guards: Guards) -> list[tuple[Any, tuple[Any, ...]]]:
    pool = Pool(2, 2, 16, 72, 5)
    features = torch.randn(2, 5, 72, device=DEVICE)
    return [
        (torch.ops.clip_fast.attention_pool.default, schema_order(pool.vit(torch.float32, guards))),
        (torch.ops.clip_fast.attention_pool.default, schema_order(pool.resnet(torch.float32, guards, True))),
        (torch.ops.clip_fast.attention_pool.default, schema_order(pool.siglip(torch.float32, guards))),
        (torch.ops.clip_fast.mean_token.default, (features, torch.randn(72, device=DEVICE))),
    ]


@pytest.mark.parametrize("which", range(4))
def test_registration(which: int, launches: list[str]) -> None:
    op, args = registered_calls(Guards())[which]
    torch.library.opcheck(op, args)
    assert set(launches) == set(LAUNCHES if "attention_pool" in str(op) else ["_mean_token_kernel"])


@pytest.mark.parametrize("statistics", [False, True])
def test_compile_and_export(statistics: bool, launches: list[str]) -> None:
    pool = Pool(2, 2, 16, 72, 5)
    operands = pool.vit(torch.float32, Guards(), statistics)
    scale = operands.pop("scale")
    tensors = {name: x for name, x in operands.items() if x is not None}
    position = torch.randn(72, device=DEVICE)

    class Head(torch.nn.Module):
        def forward(self, position: Tensor, tensors: dict[str, Tensor]) -> Tensor:
            first = ops.mean_token(tensors["rest"], position)
            return ops.attention_pool(**{**tensors, "first": first}, scale=scale)

    expected = Head()(position, tensors)
    assert launches == ["_mean_token_kernel", *LAUNCHES]
    compiled = torch.compile(Head(), fullgraph=True, backend="aot_eager")
    assert_same_bits(compiled(position, tensors), expected)
    exported = torch.export.export(Head(), (position, tensors))
    assert_same_bits(exported.module()(position, tensors), expected)
    assert launches == 3 * ["_mean_token_kernel", *LAUNCHES]


def test_float64_has_no_kernel(guards: Guards) -> None:
    operands = Pool(1, 2, 16, 64, 4).vit(torch.float64, guards)
    with pytest.raises(RuntimeError, match="float64"):
        ops.attention_pool(**operands, impl="triton")
    with pytest.raises(RuntimeError, match="float64"):
        ops.mean_token(operands["rest"], torch.zeros(64, device=DEVICE), impl="triton")
