"""`linear` and each of its epilogues against the oracle in float64, by pointers and by tensor descriptors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from unittest import mock

import interpreter
import pytest
import torch
from kernel_checks import DEVICE, DTYPES, Guards, assert_as_accurate, assert_same_bits, assert_statistics_of
from torch import Tensor

from clip_fast.kernels import linear, ops, oracles, targets
from clip_fast.kernels.launches import TABLE
from clip_fast.kernels.statistics import STATISTICS_TILE, row_statistics

EPILOGUES: dict[str, dict[str, bool | str]] = {
    "plain": {},
    "ln_qkv": {"norm": True, "bias": True},
    "out_residual": {"bias": True, "residual": True, "statistics": True},
    "ln_fc1_quick_gelu": {"norm": True, "bias": True, "activation": "quick_gelu"},
    "ln_fc1_gelu": {"norm": True, "bias": True, "activation": "gelu"},
    "ln_fc1_gelu_tanh": {"norm": True, "bias": True, "activation": "gelu_tanh"},
    "conv1_relu": {"scale": True, "bias": True, "activation": "relu"},
    "conv3_residual_relu": {"scale": True, "bias": True, "residual": True, "activation": "relu"},
    "all": {"norm": True, "scale": True, "bias": True, "activation": "gelu", "residual": True, "statistics": True},
}
# (M, N, K) and epilogue. M is one, prime, or one past a tile. N and K are those of real blocks, and some that no step
# divides.
CASES = (
    ((1, 320, 64), "out_residual"),
    ((3, 100, 72), "all"),
    ((131, 257, 88), "out_residual"),
    ((129, 192, 100), "ln_fc1_gelu"),
    ((19, 96, 136), "ln_qkv"),  # three tiles of statistics
    ((7, 64, 48), "ln_fc1_gelu"),  # one
    ((65, 130, 1), "plain"),
    ((17, 512, 768), "ln_qkv"),  # ViT-B, ln_post and projection
    ((98, 80, 320), "conv1_relu"),  # RN50x4
    ((98, 256, 64), "conv3_residual_relu"),  # RN50
    ((98, 320, 80), "conv3_residual_relu"),  # RN50x4, whose K no step divides, though a descriptor serves it
    ((50, 768, 768), "out_residual"),  # ViT-B/32
    ((50, 1024, 256), "ln_fc1_quick_gelu"),
    ((5, 1664, 1664), "ln_fc1_gelu"),  # ViT-bigG/14, cut
    ((2, 256, 6144), "out_residual"),  # ViT-g/14, fc2, cut
    ((3, 4304, 1152), "ln_fc1_gelu_tanh"),  # SO400M, whose MLP's width no tile and no step divides
    ((3, 1152, 4304), "out_residual"),
)


class Operands:
    """Random operands of `linear`, in float64 and as the kernel takes them."""

    def __init__(self, m: int, n: int, k: int, dtype: torch.dtype, **epilogue: bool | str) -> None:
        self.x = torch.randn(m, k, dtype=torch.float64, device=DEVICE).to(dtype)
        self.weight = (torch.randn(n, k, dtype=torch.float64, device=DEVICE) / k**0.5).to(dtype)
        self.bias = torch.randn(n, device=DEVICE) if epilogue.get("bias") else None
        self.residual = torch.randn(m, n, device=DEVICE).to(dtype) if epilogue.get("residual") else None
        self.scale = torch.randn(n, device=DEVICE) if epilogue.get("scale") else None
        self.normed = bool(epilogue.get("norm"))
        self.activation = epilogue.get("activation", "none")
        self.statistics = bool(epilogue.get("statistics"))
        # Exact float32 travels by pointers everywhere, TF32 as halves do. The interpreter multiplies TF32 exactly.
        descriptors = targets.target_of(DEVICE).descriptors
        self.precision = "tf32" if DEVICE.type == "cpu" and dtype == torch.float32 and descriptors else "ieee"

    def by_descriptors(self, gap: int = 0) -> bool:
        """Whether tiles must travel by descriptors: the target has them, and rows begin at multiples of 16 bytes."""
        if not targets.target_of(DEVICE).descriptors or (self.x.dtype, self.precision) == (torch.float32, "ieee"):
            return False
        n, k = self.weight.shape
        lengths = [k, k + gap, n, n if self.residual is None else n + gap]
        return all(length * self.x.itemsize % 16 == 0 for length in lengths)

    def norm(self) -> tuple[Tensor, Tensor] | None:
        if not self.normed:
            return None
        return row_statistics(self.x), self.weight.double().sum(dim=1).float()

    def run(self, guards: Guards | None = None, gap: int = 0) -> tuple[Tensor, Tensor]:
        """The kernel's result. `guards` guards its operands. Rows of x and the residual are `gap` elements apart."""

        def keep(tensor: Tensor | None, gap: int = 0) -> Tensor | None:
            return tensor if guards is None or tensor is None else guards.copy(tensor, gap)

        norm = self.norm()
        x, weight = keep(self.x, gap), keep(self.weight)
        assert x is not None
        assert weight is not None
        with mock.patch.object(linear, "_Descriptor", wraps=linear._Descriptor) as descriptor:
            results = ops.linear(
                x, weight, keep(self.bias), residual=keep(self.residual, gap), scale=keep(self.scale),
                norm=None if norm is None else (guards.copy(norm[0]), guards.copy(norm[1])) if guards else norm,
                activation=self.activation, statistics=self.statistics, precision=self.precision, impl="triton",
            )  # type: ignore[arg-type]  # fmt: skip
        assert descriptor.called == self.by_descriptors(gap)
        return results

    def twin(self) -> Tensor:
        """Plain PyTorch on the same operands.

        For half precision it computes the LayerNorm and then the product in float32, and rounds once: folding must cost
        nothing, and nothing may be rounded before the epilogue is done. In float32 it computes the plain folded
        formula. There the product includes the rows' means, by design.
        """
        x, norm = self.x.float(), self.norm()
        if norm is not None and self.x.dtype != torch.float32:
            x, norm = torch.nn.functional.layer_norm(x, x.shape[-1:]), None
        residual = None if self.residual is None else self.residual.float()
        return oracles.linear(
            x, self.weight.float(), self.bias, residual, *(norm or (None, None)), self.scale, self.activation
        )[0].to(self.x.dtype)  # type: ignore[arg-type]

    def exact(self) -> Tensor:
        x, weight = self.x.double(), self.weight.double()
        if self.normed:
            x = torch.nn.functional.layer_norm(x, x.shape[-1:])
        bias, residual, scale = (None if t is None else t.double() for t in (self.bias, self.residual, self.scale))
        return oracles.linear(x, weight, bias, residual, scale=scale, activation=self.activation)[0]  # type: ignore[arg-type]


@pytest.fixture(params=["pointers", "descriptors"])
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    """How tiles travel. On a GPU only the way of its own architecture can run."""
    name = request.param
    if DEVICE.type == "cuda":
        if targets.target_of(DEVICE).descriptors != (name == "descriptors"):
            pytest.skip(f"this GPU does not move tiles by {name}")
        yield name
        return
    with targets.assume("sm_90" if name == "descriptors" else "sm_80"):
        yield name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "epilogue"), CASES)
def test_accuracy(
    shape: tuple[int, int, int], epilogue: str, dtype: torch.dtype, path: str, guards: Guards, launches: list[str]
) -> None:
    operands = Operands(*shape, dtype, **EPILOGUES[epilogue])
    y, statistics = operands.run(guards)
    assert launches == ["_linear_kernel"]
    assert_as_accurate(y, operands.twin(), operands.exact())
    if operands.statistics:
        assert_statistics_of(statistics, y)
    else:
        assert statistics.numel() == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hostility", ["outlier channels", "means of 100 deviations", "constant rows", "huge residual"])
def test_hostile_rows(hostility: str, dtype: torch.dtype, path: str, guards: Guards) -> None:
    operands = Operands(65, 192, 384, dtype, norm=True, bias=True, residual=True, statistics=True)
    if hostility == "outlier channels":
        operands.x[:, ::97] *= 300
    elif hostility == "means of 100 deviations":
        operands.x += 100
    elif hostility == "constant rows":
        operands.x[::2] = operands.x[::2, :1].expand(-1, 384).clone()
    else:
        assert operands.residual is not None
        operands.residual += 500
    y, statistics = operands.run(guards)
    assert_as_accurate(y, operands.twin(), operands.exact())
    assert_statistics_of(statistics, y)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_chain_carries_its_statistics(dtype: torch.dtype, path: str, guards: Guards) -> None:
    """The statistics that one product writes are read by the next one's LayerNorm, as in a transformer block."""
    first = Operands(67, 320, 128, dtype, bias=True, residual=True, statistics=True)
    second = Operands(67, 192, 320, dtype, norm=True, bias=True)
    y, statistics = first.run(guards)
    second.x = y
    colsum = second.weight.double().sum(dim=1).float()
    z, _ = ops.linear(
        y, second.weight, second.bias, norm=(statistics, colsum), precision=second.precision, impl="triton"
    )
    assert_as_accurate(z, second.twin(), second.exact())


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_its_batch(dtype: torch.dtype, path: str) -> None:
    operands = Operands(150, 320, 200, dtype, **EPILOGUES["all"])
    whole, statistics = operands.run()
    order = torch.randperm(150, device=DEVICE)
    for rows in (slice(0, 1), slice(0, 50), slice(131, 132), slice(100, 150), order):
        part = Operands(1, 320, 200, dtype, **EPILOGUES["all"])
        part.weight, part.scale, part.bias = operands.weight, operands.scale, operands.bias
        assert operands.residual is not None
        part.x, part.residual = operands.x[rows], operands.residual[rows]
        y, part_statistics = part.run()
        assert_same_bits(y, whole[rows])
        assert_same_bits(part_statistics, statistics[rows])


def test_many_programs_walk_over_every_tile(path: str, monkeypatch: pytest.MonkeyPatch, guards: Guards) -> None:
    """There are more tiles than programs, not a multiple of them, and the last group has fewer rows of tiles."""
    operands = Operands(1160, 300, 32, torch.float16, bias=True)
    one, _ = operands.run(guards)
    assert_as_accurate(one, operands.twin(), operands.exact())
    if DEVICE.type == "cpu":
        monkeypatch.setattr(linear, "multiprocessors", lambda device: 7)
        assert_same_bits(operands.run(guards)[0], one)


@pytest.mark.parametrize(("rows", "blocks", "programs"), [(128, 1, 3), (1024, 1, 7), (1024, 2, 14), (640, 2, 14)])
def test_as_many_programs_as_the_multiprocessors_hold(rows: int, blocks: int, programs: int) -> None:
    launch = targets.Launch(128, 128, 64, num_warps=4, num_stages=3, blocks=blocks)
    assert linear._programs(launch, rows, 384, 7) == programs


def test_on_hopper_a_residual_is_read_by_as_few_loads_as_fit() -> None:
    """Beside the operands lie what one load brings and a part of the result. Parts hold whole tiles of statistics."""
    target = targets.TARGETS["sm_90"]
    pieces = []
    for launch in TABLE.entry("linear", "half", target):
        reads, parts = linear._pieces(launch, target, 2, True, True)
        pieces.append((reads, parts))
        tile = 2 * launch.block_m * launch.block_n
        operands = 2 * launch.num_stages * (launch.block_m + launch.block_n) * launch.block_k
        assert operands + tile // reads + tile // parts < target.room(launch.blocks)
        assert launch.block_n // parts % STATISTICS_TILE == 0
        assert linear._pieces(launch, target, 2, False, True) == (1, 1)
    assert pieces == [(1, 4), (1, 1), (2, 2), (1, 1)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tile", [(64, 64), (64, 128), (128, 128), (128, 256)], ids=lambda tile: f"{tile[0]}x{tile[1]}")
def test_bits_do_not_follow_the_tile(
    tile: tuple[int, int], dtype: torch.dtype, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the reduction step of the table, whatever the tile of the result and the number of warps."""
    operands = Operands(70, 320, 200, dtype, **EPILOGUES["all"])
    y, statistics = operands.run()
    launch = TABLE.launches_for("linear", dtype, targets.target_of(DEVICE), operands.precision)[0]
    warps = 4 if max(tile) <= 128 else 8
    other = replace(launch, block_m=tile[0], block_n=tile[1], num_warps=warps, num_stages=2)
    monkeypatch.setattr(linear.TABLE, "launches_for", lambda *_: (other,))
    for got, wanted in zip(operands.run(), (y, statistics), strict=True):
        assert_same_bits(got, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("k", "epilogue"), [(200, "all"), (512, "ln_qkv"), (768, "ln_qkv"), (1280, "ln_qkv")])
def test_every_launch_has_the_same_bits(k: int, epilogue: str, dtype: torch.dtype, path: str) -> None:
    """Statistics of x are merged from 4 to 20 tiles. On a GPU this is what lets the rows choose the launch."""
    operands = Operands(133, 328, k, dtype, **EPILOGUES[epilogue])
    launches = TABLE.launches_for("linear", dtype, targets.target_of(DEVICE), operands.precision)
    first, *others = [_by_launch(operands, number) for number in range(len(launches))]
    for results in others:
        for got, wanted in zip(results, first, strict=True):
            assert_same_bits(got, wanted)


def _by_launch(operands: Operands, number: int) -> tuple[Tensor, Tensor]:
    with targets.pinned(number):
        return operands.run()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
def test_nan_and_infinity_stay_in_their_row(activation: str, dtype: torch.dtype, path: str, guards: Guards) -> None:
    operands = Operands(5, 192, 100, dtype, **(EPILOGUES["all"] | {"activation": activation}))
    clean, clean_statistics = operands.run(guards)
    operands.x[1, 3], operands.x[3, 99] = float("nan"), float("inf")
    y, statistics = operands.run(guards)
    assert_same_bits(y[[0, 2, 4]], clean[[0, 2, 4]])
    assert_same_bits(statistics[[0, 2, 4]], clean_statistics[[0, 2, 4]])
    assert y[1].isnan().all()
    assert y[3].isnan().all()


@pytest.mark.parametrize("gap", [8, 3])
def test_rows_apart_in_memory(gap: int, path: str, guards: Guards) -> None:
    """Class tokens of a residual stream are such rows. The copy engine cannot serve a gap of 3."""
    operands = Operands(37, 128, 128, torch.float16, bias=True, residual=True)
    assert_same_bits(operands.run(guards, gap)[0], operands.run(guards)[0])


@pytest.mark.parametrize("tiles", [3, 4])
def test_statistics_of_rows_apart_in_memory(tiles: int, path: str) -> None:
    """A class token's statistics lie between those of patches, and are read in place.

    Those of an even number of tiles are loaded by 16 bytes: rows that do not begin at multiples of that are copied.
    """
    operands = Operands(12, 128, 64 * tiles, torch.float16, norm=True, bias=True)
    wanted, _ = operands.run()
    statistics, colsum = operands.norm()  # type: ignore[misc]
    many = torch.full((12, 5, *statistics.shape[1:]), float("nan"), device=DEVICE)
    many[:, 2] = statistics
    cases = [many[:, 2]]
    for before, behind in ((0, 1), (0, 2), (2, 2), (1, 3)):
        wide = torch.full((12, before + 2 * tiles + behind), float("nan"), device=DEVICE)
        inner = wide[:, before : before + 2 * tiles]
        inner.copy_(statistics.flatten(1))
        cases.append(inner.unflatten(1, (tiles, 2)))
    for rows in cases:
        y, _ = ops.linear(operands.x, operands.weight, operands.bias, norm=(rows, colsum), impl="triton")
        assert_same_bits(y, wanted)


def test_operands_in_any_layout(path: str) -> None:
    operands = Operands(37, 128, 120, torch.float16, bias=True, residual=True)
    wanted, _ = operands.run()
    assert operands.residual is not None
    operands.x, operands.residual = operands.x.t().contiguous().t(), operands.residual.t().contiguous().t()
    operands.weight = operands.weight.t().contiguous().t()
    assert_same_bits(operands.run()[0], wanted)


@pytest.mark.parametrize("layout", ["strided", "expanded"])
@pytest.mark.parametrize("name", ["bias", "colsum", "scale"])
def test_vectors_in_any_layout(name: str, layout: str, path: str) -> None:
    operands = Operands(5, 128, 120, torch.float16, **EPILOGUES["all"])
    statistics, colsum = operands.norm()  # type: ignore[misc]
    vectors = {"bias": operands.bias, "colsum": colsum, "scale": operands.scale}

    def run(vector: Tensor) -> Tensor:
        bias, colsum, scale = (vectors | {name: vector}).values()
        assert colsum is not None
        return ops.linear(operands.x, operands.weight, bias, norm=(statistics, colsum), scale=scale, impl="triton")[0]

    table = torch.randn(128, 3, device=DEVICE)
    vector = table[:, 1] if layout == "strided" else table[0, :1].expand(128)
    assert_same_bits(run(vector), run(vector.clone(memory_format=torch.contiguous_format)))


@pytest.mark.parametrize("stride", [0, 8], ids=["one row for all", "windows"])
def test_rows_within_each_other(stride: int, path: str) -> None:
    """The copy engine is not given such rows: a row begins behind the end of the one before."""
    operands = Operands(37, 128, 128, torch.float16, bias=True, residual=True)
    operands.x, operands.residual = torch.randn(2, 128 + 36 * stride, device=DEVICE).half().unbind()
    operands.x, operands.residual = (x.as_strided((37, 128), (stride, 1)) for x in (operands.x, operands.residual))
    with mock.patch.object(linear, "_Descriptor", wraps=linear._Descriptor) as descriptor:
        y, _ = operands.run()
    assert all(strides[0] >= shape[1] for _, shape, strides, _ in (call.args for call in descriptor.call_args_list))
    operands.x, operands.residual = operands.x.contiguous(), operands.residual.contiguous()
    assert_same_bits(y, operands.run()[0])


@pytest.mark.parametrize(
    ("rows", "stride", "wanted"),
    [(3, 72, 64), (3, 32_735, 64), (3, 32_736, 32_736), (1, 72, 64)],
)
def test_on_blackwell_small_tensors_are_dense(rows: int, stride: int, wanted: int) -> None:
    """Those that span less than 128 KiB. A copy is made only where there is more than one row."""
    x = torch.empty(rows, stride, dtype=torch.float16, device=DEVICE)[:, :64]
    dense, apart = linear._rows(x, targets.TARGETS["sm_100"])
    assert apart == wanted
    assert (dense.data_ptr() != x.data_ptr()) == (rows > 1 and wanted == 64)
    assert linear._rows(x, targets.TARGETS["sm_90"])[0].data_ptr() == x.data_ptr()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu", "gelu_tanh", "relu"])
def test_activations_over_their_whole_range(activation: str, dtype: torch.dtype, guards: Guards) -> None:
    operands = Operands(1, 2048, 8, dtype, activation=activation)
    operands.x.zero_()
    operands.bias = torch.linspace(-200, 200, 2048, device=DEVICE)
    y, _ = operands.run(guards)
    assert_as_accurate(y, operands.twin(), operands.exact())


@pytest.mark.skipif(DEVICE.type != "cpu", reason="a GPU's special functions err as they do")
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("deviation", [0.5, 1.0, 2.0, 4.0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu", "gelu_tanh"])
def test_special_functions_at_their_worst(
    activation: str, norm: bool, dtype: torch.dtype, deviation: float, sign: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By NVIDIA's instructions, each off by all that PTX allows it, everywhere to the same side.

    With a LayerNorm, bfloat16 is given half its argument.
    """
    monkeypatch.setattr(linear, "by_name", lambda target: True)
    monkeypatch.setattr(interpreter, "SIGN_OF_ERROR", sign)
    operands = Operands(64, 256, 64, dtype, norm=norm, bias=True, activation=activation)
    operands.weight *= deviation
    operands.bias *= 0.1  # type: ignore[operator]
    y, _ = operands.run()
    assert_as_accurate(y, operands.twin(), operands.exact())


def test_eps_is_the_one_given(path: str) -> None:
    """The rows' variance is a tenth of eps, so that another eps would show."""
    operands = Operands(17, 128, 96, torch.float16, norm=True, bias=True)
    operands.x *= 0.03
    statistics, colsum = operands.norm()  # type: ignore[misc]
    y, _ = ops.linear(operands.x, operands.weight, operands.bias, norm=(statistics, colsum), eps=1e-2, impl="triton")
    assert operands.bias is not None
    rows = [
        torch.nn.functional.layer_norm(x, x.shape[-1:], eps=1e-2) for x in (operands.x.float(), operands.x.double())
    ]
    plain, exact = (oracles.linear(x, operands.weight.to(x), operands.bias.to(x))[0] for x in rows)
    assert_as_accurate(y, plain.half(), exact)


@pytest.mark.parametrize("leading", [(0,), (), (2, 3), (2, 0, 3)])
def test_leading_shapes(leading: tuple[int, ...], guards: Guards) -> None:
    x, weight = torch.randn(*leading, 64, device=DEVICE), torch.randn(128, 64, device=DEVICE) / 8
    y, statistics = ops.linear(x, weight, statistics=True, impl="triton")
    assert y.shape == (*leading, 128)
    assert statistics.shape == (*leading, 2, 2)
    torch.testing.assert_close(y, x @ weight.T)
