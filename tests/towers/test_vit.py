"""The fast ViTs, by the kernels' oracles and by the CPU's tower, against the plain encoder in float64."""

from __future__ import annotations

import copy
import dataclasses
import statistics
from collections.abc import Callable

import pytest
import torch
from random_towers import random_tower, relative_error, worst_cosine
from torch import Tensor

from bench.models import OPEN_CLIP_MODELS
from clip_fast.checkpoint.published import OPENAI_MODELS
from clip_fast.kernels import ops
from clip_fast.kernels import oracles as kernel_oracles
from clip_fast.towers import cpu, reference
from clip_fast.towers.config import IMAGE_MEAN, IMAGE_STD, Activation, VitConfig
from clip_fast.towers.precision import BF16, BY_DTYPE, FP32, FP32_FOR_HALF, FP64, TF32
from clip_fast.towers.vit import FastVit
from clip_fast.towers.vit_cpu import CpuVit

Line = Callable[[dict[str, Tensor], VitConfig, torch.dtype, Tensor, str], object]

# Every published width, head size, patch size, MLP ratio and activation, with few layers; large ones have few patches.
CONFIGS: dict[str, VitConfig] = {
    "ViT-B/32": dataclasses.replace(OPENAI_MODELS["ViT-B/32"], layers=3),  # type: ignore[type-var]
    "ViT-B/16": dataclasses.replace(OPENAI_MODELS["ViT-B/16"], layers=2),  # type: ignore[type-var]
    "ViT-L/14": dataclasses.replace(OPENAI_MODELS["ViT-L/14"], layers=2, image_size=70),  # type: ignore[type-var]
    "ViT-L/14@336px": dataclasses.replace(OPENAI_MODELS["ViT-L/14@336px"], layers=1),  # type: ignore[type-var]
    **{
        name: dataclasses.replace(config, layers=2, image_size=4 * config.patch_size + 3)
        for name, config in OPEN_CLIP_MODELS.items()
        if isinstance(config, VitConfig) and config.width >= 1280
    },
}


def by_ops(
    state: dict[str, Tensor], config: VitConfig, dtype: torch.dtype, images: Tensor, what: str = "encode"
) -> object:
    return getattr(FastVit.prepare(state, config, BY_DTYPE[dtype], IMAGE_MEAN, IMAGE_STD), what)(images)


def by_cpu(
    state: dict[str, Tensor], config: VitConfig, dtype: torch.dtype, images: Tensor, what: str = "encode"
) -> object:
    return getattr(CpuVit.prepare(state, config, BY_DTYPE[dtype], IMAGE_MEAN, IMAGE_STD), what)(images)


@pytest.fixture(autouse=True)
def _no_gradients() -> object:
    with torch.inference_mode():
        yield


# The published numbers of tokens and widths.
FULL = {
    **{
        name: dataclasses.replace(config, layers=2)
        for name, config in OPENAI_MODELS.items()
        if isinstance(config, VitConfig)
    },
    **{
        name: dataclasses.replace(config, layers=2)
        for name, config in OPEN_CLIP_MODELS.items()
        if isinstance(config, VitConfig) and config.width >= 1280
    },
}


def check(line: Line, config: VitConfig, dtype: torch.dtype, outliers: bool = False, towers: int = 1) -> None:
    """Checks the typical ratio of the error to the plain tower's, over some towers, and the lowest cosine of any."""
    limit = 2 if dtype == torch.float32 else 1.1
    ratios = [ratio_of_errors(line, config, dtype, outliers) for _ in range(towers)]
    assert statistics.geometric_mean(ratios) <= limit


def ratio_of_errors(line: Line, config: VitConfig, dtype: torch.dtype, outliers: bool) -> float:
    tower = random_tower(config, outliers)
    batch = 2 if dtype == torch.float32 else 8  # a half-precision bound is tight, and needs a steady statistic
    images = torch.randn(batch, 3, config.image_size, config.image_size)
    state = {name: tensor.to(dtype) for name, tensor in tower.state_dict().items()}  # both read the rounded weights
    tower.load_state_dict(state)
    if outliers:
        assert tower.hidden_state(images, config.layers).abs().max() > 300
    images = images.to(dtype)
    exact = tower.double()(images.double())
    plain = tower.to(dtype)(images)
    got = line(state, config, dtype, images, "encode")
    assert isinstance(got, Tensor)
    assert got.dtype == dtype
    assert worst_cosine(got, exact) >= 0.9999
    return relative_error(got, exact) / relative_error(plain, exact)


@pytest.mark.parametrize("line", [by_ops, by_cpu])
@pytest.mark.parametrize("name", CONFIGS)
def test_float32(name: str, line: Line) -> None:
    check(line, CONFIGS[name], torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("line", [by_ops, by_cpu])
@pytest.mark.parametrize("name", ["ViT-B/32", "ViT-L/14"])
def test_half_precision(name: str, line: Line, dtype: torch.dtype) -> None:
    # Oracles round a product before its epilogue. That brings ratios so near to 1.1 that single ones may exceed it.
    check(line, CONFIGS[name], dtype, towers=3 if name == "ViT-B/32" and line is by_ops else 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL)
def test_full_size(name: str) -> None:
    config = FULL[name]
    tower = random_tower(config)
    images = torch.randn(1, 3, config.image_size, config.image_size)
    results = [line(tower.state_dict(), config, torch.float32, images, "encode") for line in (by_ops, by_cpu)]
    plain = tower(images)
    exact = tower.double()(images.double())
    for got in results:
        assert relative_error(got, exact) <= 2 * relative_error(plain, exact)  # type: ignore[arg-type]
        assert worst_cosine(got, exact) >= 0.9999  # type: ignore[arg-type]


@pytest.mark.parametrize("line", [by_ops, by_cpu])
@pytest.mark.parametrize("name", ["ViT-B/32", "ViT-B/16"])
def test_no_less_accurate_than_openai_clip_itself(name: str, line: Line) -> None:
    towers = pytest.importorskip("clip.model", reason="openai-clip is not installed")
    config = CONFIGS[name]
    theirs = towers.VisionTransformer(
        config.image_size, config.patch_size, config.width, config.layers, config.heads, config.embed_dim
    ).eval()
    tower = random_tower(config)
    theirs.load_state_dict(tower.state_dict())
    images = torch.randn(2, 3, config.image_size, config.image_size)
    got, own = line(tower.state_dict(), config, torch.float32, images, "encode"), theirs(images)
    exact = tower.double()(images.double())
    assert relative_error(got, exact) <= 2 * relative_error(own, exact)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("line", [by_ops, by_cpu])
def test_no_less_accurate_than_open_clip_itself_in_half_precision(line: Line, dtype: torch.dtype) -> None:
    """Compares with open_clip alone, since openai-clip computes in no half precision on a CPU."""
    towers = pytest.importorskip("open_clip.transformer", reason="open_clip is not installed")
    config = dataclasses.replace(CONFIGS["ViT-B/32"], image_size=96)
    theirs = towers.VisionTransformer(
        config.image_size, config.patch_size, config.width, config.layers, config.heads, config.mlp_ratio,
        output_dim=config.embed_dim, act_layer=towers.QuickGELU,
    ).eval().to(dtype)  # fmt: skip
    tower = random_tower(config)
    theirs.load_state_dict(tower.state_dict())
    tower.load_state_dict(theirs.state_dict())  # both read the rounded weights
    images = torch.randn(24, 3, config.image_size, config.image_size).to(dtype)  # 8 would scatter the ratio by 2 %
    got, own = line(theirs.state_dict(), config, dtype, images, "encode"), theirs(images)
    exact = tower.double()(images.double())
    assert relative_error(got, exact) <= 1.1 * relative_error(own, exact)  # type: ignore[arg-type]


@pytest.mark.parametrize("given", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("outliers", [False, True])
def test_quick_gelu_as_swish(given: torch.dtype, outliers: bool) -> None:
    """Weights with more bits are rounded to bfloat16. QuickGELU's slope goes into them before, and costs no accuracy.

    The bound is on the typical ratio of the error to the plain bfloat16 tower's, both against the unrounded weights.
    """
    config = VitConfig(image_size=32, patch_size=16, width=128, layers=2, heads=2, embed_dim=64)
    ratios = []
    for _ in range(300 if outliers else 30):  # with outliers few numbers decide each tower's ratio
        tower = random_tower(config, outliers)
        state = {name: tensor.to(given) for name, tensor in tower.state_dict().items()}
        tower.load_state_dict(state)
        images = torch.randn(4, 3, 32, 32).bfloat16()
        fast = CpuVit.prepare(state, config, BF16, IMAGE_MEAN, IMAGE_STD)
        assert {block.fc1.activation for block in fast.blocks} == {"swish"}
        got = fast.encode(images)
        exact = tower.double()(images.double())
        ratios.append(relative_error(got, exact) / relative_error(tower.bfloat16()(images), exact))
    assert statistics.geometric_mean(ratios) <= 1.1


def test_weights_that_would_be_rounded_twice() -> None:
    """Weights that are bfloat16 already are used unchanged."""
    config = VitConfig(image_size=32, patch_size=16, width=128, layers=2, heads=2, embed_dim=64)
    state = {name: tensor.bfloat16() for name, tensor in random_tower(config).state_dict().items()}
    for i, block in enumerate(CpuVit.prepare(state, config, BF16, IMAGE_MEAN, IMAGE_STD).blocks):
        assert block.fc1.activation == "swish"
        assert torch.equal(block.fc1.weight, state[f"transformer.resblocks.{i}.mlp.c_fc.weight"])
        assert torch.equal(block.fc2.weight, state[f"transformer.resblocks.{i}.mlp.c_proj.weight"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu", "gelu_tanh"])
def test_on_a_gpu_a_layer_norm_has_one_dtype(dtype: torch.dtype, activation: Activation) -> None:
    """CUDA's takes no other; on a GPU without Triton the CPU's way computes. No GPU is needed to look."""
    config = VitConfig(image_size=32, patch_size=16, width=128, layers=2, heads=2, embed_dim=64, activation=activation)
    state = {name: tensor.to("meta", dtype) for name, tensor in random_tower(config).state_dict().items()}
    fast = CpuVit.prepare(state, config, BY_DTYPE[dtype], IMAGE_MEAN, IMAGE_STD)
    for block in fast.blocks:
        assert {each.dtype for each in (*block.ln_1, *block.ln_2)} == {dtype}


def test_float32_that_is_asked_for_is_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of half weights that stay as they are, too. Where it stands in for them, few rows are multiplied in theirs."""
    if not (cpu.can_pack_for_mkl() and cpu.can_fuse(torch.bfloat16)):
        pytest.skip("half weights stay as they are only where MKL is fast, and multiply only where oneDNN does")
    monkeypatch.setattr(cpu, "multiplies_fast", lambda dtype: dtype.itemsize >= 4)
    config = VitConfig(image_size=32, patch_size=16, width=128, layers=2, heads=2, embed_dim=64)
    tower = random_tower(config).bfloat16()
    images = torch.randn(4, 3, 32, 32)
    wanted = copy.deepcopy(tower).double()(images.double())
    errors = [
        relative_error(
            CpuVit.prepare(tower.state_dict(), config, precision, IMAGE_MEAN, IMAGE_STD).encode(images), wanted
        )
        for precision in (FP32, FP32_FOR_HALF)
    ]
    assert errors[0] < 1e-5 < 1e-4 < errors[1]


def test_activations_near_the_largest_float16() -> None:
    """The activations times 1.702 would be infinite in float16."""
    config = VitConfig(image_size=32, patch_size=16, width=128, layers=2, heads=2, embed_dim=64)
    tower = random_tower(config)
    for name, tensor in tower.state_dict().items():
        if name.endswith("c_fc.bias"):
            tensor.fill_(50_000)
        if name.endswith("c_proj.weight"):
            tensor.mul_(1e-4)
    images = torch.randn(2, 3, 32, 32)
    state = {name: tensor.half() for name, tensor in tower.state_dict().items()}
    got = by_cpu(state, config, torch.float16, images.half(), "encode")
    assert worst_cosine(got, tower.double()(images.double())) >= 0.999  # type: ignore[arg-type]


@pytest.mark.parametrize("line", [by_ops, by_cpu])
def test_outlier_channels(line: Line) -> None:
    check(line, dataclasses.replace(CONFIGS["ViT-B/32"], image_size=96), torch.float32, outliers=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("line", [by_ops, by_cpu])
def test_outlier_channels_in_half_precision(line: Line, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The typical ratio of errors over many towers is bounded: with outliers few numbers decide each tower's ratio.

    The kernels keep a product in float32 until its epilogue is done. Their oracles leave products to PyTorch, which
    rounds them earlier. So the oracles get float32 operands here.
    """
    plain_linear = kernel_oracles.linear

    def linear(
        x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, *rest: object
    ) -> tuple[Tensor, Tensor]:
        added = None if residual is None else residual.float()
        y = plain_linear(x.float(), weight.float(), bias, added, *rest)[0].to(x.dtype)  # type: ignore[arg-type]
        return y, kernel_oracles.row_statistics(y)

    monkeypatch.setattr(kernel_oracles, "linear", linear)
    config = VitConfig(image_size=32, patch_size=16, width=128, layers=2, heads=2, embed_dim=64)
    ratios = []
    for _ in range(300):
        tower = random_tower(config, outliers=True)
        state = {name: tensor.to(dtype) for name, tensor in tower.state_dict().items()}
        tower.load_state_dict(state)
        images = torch.randn(4, 3, 32, 32).to(dtype)
        exact = tower.double()(images.double())
        got = line(state, config, dtype, images, "encode")
        assert isinstance(got, Tensor)
        ratios.append(relative_error(got, exact) / relative_error(tower.to(dtype)(images), exact))
    # For float16 a CPU takes PyTorch's plain products. Their mean ratio is 1.03, with a standard deviation of 0.024.
    assert statistics.geometric_mean(ratios) <= (1.15 if line is by_cpu and dtype == torch.float16 else 1.1)


SMALL = VitConfig(image_size=64, patch_size=16, width=128, layers=3, heads=2, embed_dim=32)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("line", [by_ops, by_cpu])
def test_float64_is_exact(line: Line, activation: str) -> None:
    """In float64 no rounding hides a mistake in the folding."""
    config = dataclasses.replace(SMALL, activation=activation)  # type: ignore[arg-type]
    tower = random_tower(config).double()
    images = torch.randn(3, 3, 64, 64, dtype=torch.float64)
    assert isinstance(tower, reference.VisionTransformer)
    state = tower.state_dict()
    assert relative_error(line(state, config, torch.float64, images, "encode"), tower(images)) < 1e-13  # type: ignore[arg-type]
    embeddings, tokens = line(state, config, torch.float64, images, "encode_tokens")  # type: ignore[misc]
    for got, exact in zip((embeddings, tokens), tower.encode_tokens(images), strict=True):
        assert relative_error(got, exact) < 1e-13


@pytest.mark.parametrize("layer", range(4))
def test_hidden_states(layer: int) -> None:
    tower = random_tower(SMALL).double()
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    exact = tower.hidden_state(images, layer)
    for kind in (FastVit, CpuVit):
        fast = kind.prepare(tower.state_dict(), SMALL, FP64, IMAGE_MEAN, IMAGE_STD)
        assert relative_error(fast.hidden_state(images, layer), exact) < 1e-13


def test_weights_for_tf32_are_rounded_to_it() -> None:
    """Weights are rounded once, since tensor cores would cut them. Colsums are sums of the rounded weights."""
    state = random_tower(SMALL).state_dict()
    weights = FastVit.prepare(state, SMALL, TF32, IMAGE_MEAN, IMAGE_STD)
    exact = FastVit.prepare(state, SMALL, FP32, IMAGE_MEAN, IMAGE_STD)
    products = [(getattr(a, n), getattr(b, n)) for a, b in zip(weights.blocks, exact.blocks, strict=True)
                for n in ("qkv", "out", "fc1", "fc2")]  # fmt: skip
    products.append((weights.projection, exact.projection))
    pairs = [(ours.weight, wanted.weight) for ours, wanted in products]
    for ours, wanted in [*pairs, (weights.patch, exact.patch), (weights.patch_uint8, exact.patch_uint8)]:
        assert torch.equal(ours, ops.to_tf32(wanted))
        assert not torch.equal(ours, wanted)
    for ours, _ in products:
        if ours.colsum is not None:
            assert torch.equal(ours.colsum, ours.weight.double().sum(dim=1).float())


def test_raw_pixels_are_normalised_by_the_weights() -> None:
    tower = random_tower(SMALL).double()
    mean, std = (0.4, 0.5, 0.3), (0.2, 0.3, 0.25)
    raw = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    mu, sigma = (torch.tensor(x, dtype=torch.float64).view(3, 1, 1) for x in (mean, std))
    exact = tower((raw.double() / 255 - mu) / sigma)
    fast = FastVit.prepare(tower.state_dict(), SMALL, FP64, mean, std)
    assert relative_error(fast.encode(raw), exact) < 1e-13
    assert relative_error(fast.encode(raw.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)), exact) < 1e-13


def test_without_onednn_the_cpu_line_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    tower = random_tower(SMALL)
    images = torch.randn(2, 3, 64, 64)
    fused = by_cpu(tower.state_dict(), SMALL, torch.float32, images)
    monkeypatch.setattr(cpu, "can_fuse", lambda dtype: False)
    assert relative_error(by_cpu(tower.state_dict(), SMALL, torch.float32, images), fused) < 1e-5  # type: ignore[arg-type]
