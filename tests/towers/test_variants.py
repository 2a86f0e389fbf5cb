"""open_clip's variants of the ViT: the plain tower is open_clip's own, and the fast ones are as accurate as that."""

from __future__ import annotations

import dataclasses
import statistics
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from random_towers import assert_as_exact, products_of_this_cpu, random_tower, relative_error, worst_cosine
from torch import Tensor

from clip_fast.kernels import oracles as kernel_oracles
from clip_fast.towers import reference
from clip_fast.towers.config import IMAGE_MEAN, IMAGE_STD, VitConfig
from clip_fast.towers.families import for_image_size
from clip_fast.towers.precision import BY_DTYPE
from clip_fast.towers.vit import FastVit
from clip_fast.towers.vit_cpu import CpuVit

TOWERS = [FastVit, CpuVit]
SMALL = VitConfig(70, 16, width=144, layers=3, heads=2, embed_dim=40, mlp_ratio=3, activation="gelu")
VARIANTS: dict[str, dict[str, Any]] = {
    "no ln_pre": {"ln_pre": False},
    "average": {"pool": "avg"},
    "average before ln_post": {"pool": "avg", "ln_after_pool": True},
    "class token before ln_post": {"ln_after_pool": True},
    "CLIPA": {"ln_pre": False, "pool": "avg", "ln_after_pool": True},
    "LayerScale": {"layer_scale": True},
    "LayerScale and QuickGELU": {"layer_scale": True, "activation": "quick_gelu"},
    "not square": {"image_size": (70, 100)},
    "all": {"image_size": (37, 86), "ln_pre": False, "pool": "avg", "layer_scale": True},
}


@pytest.fixture(autouse=True)
def _no_gradients() -> object:
    with torch.inference_mode():
        yield


def variant(name: str) -> VitConfig:
    return dataclasses.replace(SMALL, **VARIANTS[name])


def images_for(config: VitConfig, batch: int) -> Tensor:
    size = config.image_size
    return torch.randn(batch, 3, *((size, size) if isinstance(size, int) else size))


def by_open_clip(config: VitConfig, tower: Any) -> Any:
    """open_clip's own tower of this shape, with the weights of a plain one."""
    package = pytest.importorskip("open_clip.transformer", reason="open_clip is not installed")
    activation = {"gelu": torch.nn.GELU, "quick_gelu": package.QuickGELU}[config.activation]
    theirs = package.VisionTransformer(
        config.image_size, config.patch_size, config.width, config.layers, config.heads, config.mlp_ratio,
        ls_init_value=1e-4 if config.layer_scale else None, output_dim=config.embed_dim, no_ln_pre=not config.ln_pre,
        pool_type=config.pool, final_ln_after_pool=config.ln_after_pool, act_layer=activation, output_tokens=True,
    )  # fmt: skip
    theirs.load_state_dict(tower.state_dict())
    return theirs.eval()


def prepared(kind: Any, state: Any, config: VitConfig, dtype: torch.dtype) -> Any:
    return kind.prepare(state, config, BY_DTYPE[dtype], IMAGE_MEAN, IMAGE_STD)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_plain_tower_is_open_clips(name: str) -> None:
    config = variant(name)
    tower = random_tower(config).double()
    images = images_for(config, 3).double()
    wanted = by_open_clip(config, tower).double()(images)
    assert isinstance(tower, reference.VisionTransformer)
    for ours, theirs in zip(tower.encode_tokens(images), wanted, strict=True):
        assert relative_error(ours, theirs) < 1e-12
    assert relative_error(tower(images), wanted[0]) < 1e-12


@pytest.mark.parametrize("kind", TOWERS)
@pytest.mark.parametrize("name", VARIANTS)
def test_float64_is_exact(name: str, kind: Any) -> None:
    """In float64 no rounding hides a mistake in the folding."""
    config = variant(name)
    tower = random_tower(config).double()
    assert isinstance(tower, reference.VisionTransformer)
    images = images_for(config, 3).double()
    fast = prepared(kind, tower.state_dict(), config, torch.float64)
    assert_as_exact(fast, tower, images)
    raw = torch.randint(0, 256, images.shape, dtype=torch.uint8)
    mean, std = (torch.tensor(x, dtype=torch.float64).view(3, 1, 1) for x in (IMAGE_MEAN, IMAGE_STD))
    assert relative_error(fast.encode(raw), tower((raw.double() / 255 - mean) / std)) < 1e-13


def ratio_of_errors(kind: Any, config: VitConfig, dtype: torch.dtype, batch: int, tower: Any = None) -> float:
    """The error of a tower's embeddings, by default a random one's, to that of open_clip's own.

    Both are in `dtype`, and on a CPU the same library multiplies for both.
    """
    tower = tower or random_tower(config)
    state = {key: tensor.to(dtype) for key, tensor in tower.state_dict().items()}  # both read the rounded weights
    tower.load_state_dict(state)
    theirs = by_open_clip(config, tower)
    images = images_for(config, batch).to(dtype)
    exact = theirs.double()(images.double())[0]
    with products_of_this_cpu(dtype) if kind is CpuVit else nullcontext():
        own = theirs.to(dtype)(images)[0]
    got = prepared(kind, state, config, dtype).encode(images)
    assert got.dtype == dtype
    assert worst_cosine(got, exact) >= 0.9999
    return relative_error(got, exact) / relative_error(own, exact)


@pytest.fixture
def products_rounded_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels keep a product in float32 until its epilogue is done.

    Their oracles leave products to PyTorch, which rounds them earlier. So the oracles get float32 operands here.
    """
    plain_linear = kernel_oracles.linear

    def linear(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
        added = None if residual is None else residual.float()
        y = plain_linear(x.float(), weight.float(), bias, added, *rest)[0].to(x.dtype)
        return y, kernel_oracles.row_statistics(y)

    monkeypatch.setattr(kernel_oracles, "linear", linear)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", TOWERS)
@pytest.mark.parametrize("name", ["average", "CLIPA", "LayerScale and QuickGELU", "all"])
@pytest.mark.usefixtures("products_rounded_last")
def test_as_accurate_as_open_clip(name: str, kind: Any, dtype: torch.dtype) -> None:
    """The typical error of some towers is at most 1.1 times open_clip's.

    The logarithms of single ratios have a standard deviation of 0.08, and no typical ratio was above 1.03.
    """
    ratios = [ratio_of_errors(kind, variant(name), dtype, 6) for _ in range(16)]
    assert statistics.geometric_mean(ratios) <= 1.1


# Published shapes, with few layers and few patches.
REAL = {
    "ViT-L-14-CLIPA": VitConfig(70, 14, 1024, 2, 16, 768, 4, "gelu", ln_pre=False, pool="avg", ln_after_pool=True),
    "ViT-M-16-alt": VitConfig(64, 16, 512, 2, 8, 384, 4, "gelu", layer_scale=True),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", TOWERS)
@pytest.mark.parametrize(
    ("name", "dtype"),
    [("ViT-L-14-CLIPA", torch.float32), ("ViT-L-14-CLIPA", torch.bfloat16), ("ViT-M-16-alt", torch.float16)],
)
@pytest.mark.usefixtures("products_rounded_last")
def test_published_widths(name: str, kind: Any, dtype: torch.dtype) -> None:
    """Ratios of single towers scatter by 0.02 here, and none of 24 was above 1.04."""
    assert ratio_of_errors(kind, REAL[name], dtype, 8) <= 1.1


@pytest.mark.parametrize("kind", TOWERS)
@pytest.mark.usefixtures("products_rounded_last")
def test_a_small_layer_scale_in_float16(kind: Any) -> None:
    """A weight times a gamma of 1e-4 is left with few bits of float16; what it adds is as small."""
    config = VitConfig(32, 16, width=128, layers=4, heads=2, embed_dim=64, activation="gelu", layer_scale=True)

    def ratio() -> float:
        tower = random_tower(config)
        for name, tensor in tower.named_parameters():
            if ".ls_" in name:
                tensor.mul_(10 ** -(1 + 3 * torch.rand(())))
        return ratio_of_errors(kind, config, torch.float16, 6, tower)

    assert statistics.geometric_mean([ratio() for _ in range(16)]) <= 1.1


@pytest.mark.parametrize("size", [96, (48, 112)])
def test_positions_are_resampled_to_any_size(size: Any) -> None:
    config = variant("not square")  # 4 by 6 patches
    state = random_tower(config).state_dict()
    resized, new = for_image_size(state, config, size)
    rows, columns = (6, 6) if size == 96 else (3, 7)
    assert isinstance(new, VitConfig)
    assert (new.image_size, new.grid, new.tokens) == (size, (rows, columns), rows * columns + 1)
    grid = state["positional_embedding"][1:].view(1, 4, 6, -1).permute(0, 3, 1, 2)
    wanted = torch.nn.functional.interpolate(grid, (rows, columns), mode="bicubic", antialias=True, align_corners=False)
    got = resized["positional_embedding"]
    assert torch.equal(got[0], state["positional_embedding"][0])
    assert torch.allclose(got[1:], wanted.permute(0, 2, 3, 1).reshape(rows * columns, -1))


def test_the_representation_of_older_configs_stays() -> None:
    """The digests of output folders are made of it."""
    assert repr(VitConfig(224, 32, 768, 12, 12, 512)) == (
        "VitConfig(image_size=224, patch_size=32, width=768, layers=12, heads=12, embed_dim=512, mlp_ratio=4.0, "
        "activation='quick_gelu')"
    )
    different = {repr(variant(name)) for name in VARIANTS}
    assert len(different) == len(VARIANTS)
