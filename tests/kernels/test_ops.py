"""The contracts of the ops: refused operands, the choice of implementation, and the view of PyTorch's compilers."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_checks import DEVICE, assert_same_bits
from torch import Tensor, nn

from clip_fast.kernels import ops, targets
from clip_fast.kernels.dispatch import Op, trusted
from clip_fast.kernels.resampling import Source, plan
from clip_fast.kernels.sizes import reached_in_32_bits
from clip_fast.kernels.statistics import row_statistics


def rand(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, device=DEVICE).to(dtype)


def calls(dtype: torch.dtype = torch.float32) -> dict[str, tuple[str, dict[str, Any]]]:
    """Small sound calls of every op, with and without optional operands: name -> (op, arguments by name)."""
    row_stats = row_statistics(rand(2, 3, 96, dtype=dtype).to(dtype))
    pool = {
        "query": rand(2, 2, 32, dtype=dtype), "first": rand(2, 64, dtype=dtype), "rest": rand(2, 5, 64, dtype=dtype),
        "key_weight": rand(2, 32, 64, dtype=dtype) / 8, "value_weight": rand(2, 32, 64, dtype=dtype) / 8,
        "value_bias": rand(64), "scale": 0.2,
    }  # fmt: skip
    tokens = torch.cat([pool["first"][:, None], pool["rest"]], dim=1)
    x, weight = rand(2, 3, 96, dtype=dtype), rand(40, 96, dtype=dtype) / 10
    steps, tables, scratch = plan([Source(0, 5, 4, (5, 4), 1, 0), Source(60, 3, 6, (4, 8), 0, 2, True)], 4)
    return {
        "resize": (
            "resize",
            {"pixels": torch.randint(0, 256, (114,), dtype=torch.uint8, device=DEVICE),
             "steps": torch.from_numpy(steps).to(DEVICE), "tables": torch.from_numpy(tables).to(DEVICE),
             "scratch": scratch, "side": 4},
        ),
        "patch_embed": (
            "patch_embed",
            {"images": rand(2, 3, 16, 16, dtype=dtype), "weight": rand(24, 192, dtype=dtype) / 14,
             "position": rand(5, 24), "patch_size": 8},
        ),
        "patch_embed with statistics": (
            "patch_embed",
            {"images": rand(2, 3, 16, 16, dtype=dtype), "weight": rand(24, 192, dtype=dtype) / 14,
             "position": rand(4, 24), "patch_size": 8, "class_token": False, "statistics": True},
        ),
        "layer_norm": ("layer_norm", {"x": x, "weight": rand(96), "bias": rand(96)}),
        "layer_norm with statistics": (
            "layer_norm", {"x": x, "weight": rand(96), "bias": rand(96), "statistics": True},
        ),
        "linear": ("linear", {"x": x, "weight": weight}),
        "linear with all": (
            "linear",
            {"x": x, "weight": weight, "bias": rand(40), "residual": rand(2, 3, 40, dtype=dtype),
             "norm": (row_stats, weight.float().sum(dim=1)), "scale": rand(40), "activation": "gelu",
             "statistics": True},
        ),
        "flash_attention": ("flash_attention", {"qkv": rand(2, 5, 3, 2, 16, dtype=dtype), "scale": 0.25}),
        "mean_token": ("mean_token", {"features": rand(2, 9, 32, dtype=dtype), "position": rand(32)}),
        "attention_pool": ("attention_pool", pool),
        "attention_pool with all": (
            "attention_pool", pool | {"statistics": row_statistics(tokens), "position": rand(5, 64)},
        ),
    }  # fmt: skip


CALLS = tuple(calls())


def call(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    op, arguments = calls(dtype)[name]
    return getattr(ops, op)(**(arguments | changes))


def outputs(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


# --- refused operands ------------------------------------------------------------------------------------------------

BAD: list[tuple[str, dict[str, Callable[[], Any]], str]] = [
    ("resize", {"pixels": lambda: rand(114)}, r"pixels must be of torch\.uint8, got torch\.float32"),
    ("resize", {"pixels": lambda: rand(2, 57).byte()}, r"pixels must be \[bytes\], got \[2, 57\]"),
    ("resize", {"pixels": lambda: rand(228).byte()[::2]}, r"pixels must be contiguous, got strides \(2,\)"),
    ("resize", {"steps": lambda: rand(2, 2, 9).int()}, r"steps must be of torch\.int64, got torch\.int32"),
    ("resize", {"steps": lambda: rand(2, 2, 8).long()}, r"steps must be \[2, batch, 9\], got \[2, 2, 8\]"),
    ("resize", {"tables": lambda: rand(2, 9).int()}, r"tables must be of one dimension, got \[2, 9\]"),
    ("resize", {"side": lambda: 0}, "side must be positive and scratch not negative, got 0 and"),
    (
        "patch_embed",
        {"images": lambda: rand(2, 1, 16, 16)},
        r"images must be \[batch, 3, height, width\], got \[2, 1, 16, 16\]",
    ),
    ("patch_embed", {"images": lambda: rand(3, 16, 16)}, r"images must be .* got \[3, 16, 16\]"),
    (
        "patch_embed",
        {"images": lambda: torch.zeros(2, 3, 16, 16, dtype=torch.int32)},
        r"uint8 or of a floating-point dtype, got torch\.int32",
    ),
    ("patch_embed", {"images": lambda: rand(2, 3, 16, 7)}, r"at least 8 pixels a side, got \[2, 3, 16, 7\]"),
    ("patch_embed", {"weight": lambda: rand(24, 190)}, r"weight must be \[width, 192\], got \[24, 190\]"),
    ("patch_embed", {"position": lambda: rand(4, 24)}, r"position must be \[5, 24\], got \[4, 24\]"),
    ("patch_embed", {"class_token": lambda: False}, r"position must be \[4, 24\], got \[5, 24\]"),
    (
        "layer_norm",
        {"x": lambda: torch.zeros(2, 96, dtype=torch.int64)},
        r"x must be of a floating-point dtype, got torch\.int64",
    ),
    ("layer_norm", {"x": lambda: rand(2, 0)}, r"x must be \[\.\.\., width\], got \[2, 0\]"),
    ("layer_norm", {"weight": lambda: rand(95)}, r"weight must be \[96\], got \[95\]"),
    ("layer_norm", {"bias": lambda: rand(1, 96)}, r"bias must be \[96\], got \[1, 96\]"),
    ("linear", {"weight": lambda: rand(40, 95)}, r"weight must be \[N, 96\], got \[40, 95\]"),
    (
        "linear",
        {"weight": lambda: rand(40, 96).half()},
        r"weight must have the dtype of x, torch\.float32, got torch\.float16",
    ),
    ("linear", {"bias": lambda: rand(41)}, r"bias must be \[40\], got \[41\]"),
    ("linear", {"residual": lambda: rand(2, 40)}, r"residual must be \[2, 3, 40\], got \[2, 40\]"),
    ("linear", {"activation": lambda: "tanh"}, r"activation must be one of .*, got 'tanh'"),
    (
        "linear",
        {"norm": lambda: (rand(2, 3, 1, 2), rand(40))},
        r"row statistics must be \[2, 3, 2, 2\], got \[2, 3, 1, 2\]",
    ),
    ("linear", {"norm": lambda: (rand(2, 3, 2, 2), rand(39))}, r"colsum must be \[40\], got \[39\]"),
    ("linear", {"norm": lambda: (rand(2, 3, 2, 2), None)}, "row statistics and colsum must be given together"),
    ("linear", {"norm": lambda: (None, rand(40))}, "row statistics and colsum must be given together"),
    (
        "linear",
        {"residual": lambda: rand(2, 3, 40).half()},
        r"residual must have the dtype of x, torch\.float32, got torch\.float16",
    ),
    (
        "linear",
        {"bias": lambda: torch.zeros(40, dtype=torch.complex64)},
        r"bias must be of a floating-point dtype, got torch\.complex64",
    ),
    *(
        (name, {"precision": lambda: "fp32"}, r"precision must be one of \('ieee', 'tf32'\), got 'fp32'")
        for name in ("patch_embed", "linear", "flash_attention", "attention_pool")
    ),
    (
        "flash_attention",
        {"qkv": lambda: rand(2, 5, 2, 2, 16)},
        r"qkv must be \[batch, tokens, 3, heads, head_dim\], got \[2, 5, 2, 2, 16\]",
    ),
    (
        "flash_attention",
        {"qkv": lambda: rand(2, 0, 3, 2, 16)},
        r"must have tokens, heads and head_dim, got \[2, 0, 3, 2, 16\]",
    ),
    ("mean_token", {"features": lambda: rand(2, 32)}, r"features must be \[batch, positions, width\], got \[2, 32\]"),
    ("mean_token", {"position": lambda: rand(9, 32)}, r"position must be \[32\], got \[9, 32\]"),
    ("attention_pool", {"first": lambda: rand(2, 1, 64)}, r"first must be \[batch, width\], got \[2, 1, 64\]"),
    ("attention_pool", {"rest": lambda: rand(3, 5, 64)}, r"rest must be \[2, positions, 64\], got \[3, 5, 64\]"),
    ("attention_pool", {"query": lambda: rand(1, 2, 32)}, r"query must be \[2, heads, head_dim\], got \[1, 2, 32\]"),
    (
        "attention_pool",
        {"query": lambda: rand(2, 32), "key_weight": lambda: None},
        r"query must be \[2, 64\] without key_weight, got \[2, 32\]",
    ),
    ("attention_pool", {"key_weight": lambda: rand(2, 32, 63)}, r"key_weight must be \[2, 32, 64\], got \[2, 32, 63\]"),
    ("attention_pool", {"value_weight": lambda: rand(2, 32, 64).half()}, r"value_weight must have the dtype of first"),
    ("attention_pool", {"value_bias": lambda: rand(63)}, r"value_bias must be \[64\], got \[63\]"),
    (
        "attention_pool",
        {"statistics": lambda: rand(2, 5, 1, 2)},
        r"statistics must be \[2, 6, 1, 2\], got \[2, 5, 1, 2\]",
    ),
    ("attention_pool", {"position": lambda: rand(6, 64)}, r"position must be \[5, 64\], got \[6, 64\]"),
]


@pytest.mark.parametrize(("name", "changes", "message"), BAD)
def test_bad_operands_are_named(name: str, changes: dict[str, Callable[[], Any]], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        call(name, **{key: make() for key, make in changes.items()})


def test_bad_operands_are_named_without_the_public_function() -> None:
    x, weight, bias = rand(2, 64), rand(128, 64), rand(4)
    options = (None, None, None, None, "none", 1e-5, False, "ieee")
    with pytest.raises(ValueError, match=r"bias must be \[128\], got \[4\]"):
        torch.ops.clip_fast.linear(x, weight, bias, *options)
    with pytest.raises(ValueError, match=r"bias must be \[128\], got \[4\]"):  # without values
        torch.ops.clip_fast.linear(x.to("meta"), weight.to("meta"), bias.to("meta"), *options)


def test_a_number_has_no_features() -> None:
    with pytest.raises(ValueError, match=r"x must be \[\.\.\., K\], got \[\]"):
        ops.linear(torch.tensor(1.0), rand(4, 4))


def test_operands_on_two_devices_are_named() -> None:
    with pytest.raises(ValueError, match=r"one device, got x on .*, weight on meta, bias on"):
        call("layer_norm", weight=torch.empty(96, device="meta"))


# --- which implementation runs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CALLS)
def test_the_kernel_runs_where_triton_can(name: str, launches: list[str]) -> None:
    result = call(name)
    assert launches
    for got, wanted in zip(outputs(result), outputs(call(name, impl="triton")), strict=True):
        assert got.shape == wanted.shape
    launches.clear()
    call(name, impl="reference")
    assert not launches


@pytest.mark.parametrize("name", [name for name in CALLS if name != "resize"])  # which has one dtype
def test_what_no_kernel_serves_takes_the_oracle(name: str, launches: list[str]) -> None:
    op, arguments = calls(torch.float64)[name]
    for got, wanted in zip(
        outputs(getattr(ops, op)(**arguments)), outputs(getattr(ops, op)(**arguments, impl="reference")), strict=True
    ):
        assert_same_bits(got, wanted)
    assert not launches
    with pytest.raises(RuntimeError, match=f"{op} cannot run on Triton: .*got torch.float64"):
        getattr(ops, op)(**arguments, impl="triton")


@pytest.mark.parametrize("name", CALLS)
def test_trusted_ops_give_the_same_bits(name: str, monkeypatch: pytest.MonkeyPatch, launches: list[str]) -> None:
    """Without PyTorch's dispatcher, unchecked, and by the same kernel."""
    op, arguments = calls()[name]
    wanted = outputs(getattr(ops, op)(**arguments))
    launched = launches.copy()
    launches.clear()
    monkeypatch.setattr(torch.ops.clip_fast, op, None)
    with trusted(), monkeypatch.context() as unchecked:
        unchecked.setattr(ops, "_require_float", None)  # each op's first check
        got = outputs(getattr(ops, op)(**arguments))
    assert launches == launched
    assert launches
    for one, other in zip(got, wanted, strict=True):
        assert_same_bits(one, other)
    with pytest.raises(AttributeError):
        getattr(ops, op)(**arguments)


def test_sizes_that_no_kernel_serves() -> None:
    wide, heads = rand(2, 2049), rand(1, 2, 3, 1, 136)
    gain = rand(2049)
    assert ops.layer_norm(wide, gain, gain)[0].shape == wide.shape
    with pytest.raises(RuntimeError, match="at most 2048 wide, got 2049"):
        ops.layer_norm(wide, gain, gain, impl="triton")
    assert ops.flash_attention(heads, 0.1).shape == (1, 2, 136)
    with pytest.raises(RuntimeError, match="at most 128 wide, got 136"):
        ops.flash_attention(heads, 0.1, impl="triton")


@pytest.mark.skipif(DEVICE.type != "cpu", reason="on a GPU Triton can run")
def test_a_cpu_without_the_interpreter_takes_the_oracle(monkeypatch: pytest.MonkeyPatch, launches: list[str]) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    call("linear with all")
    assert not launches
    with pytest.raises(RuntimeError, match="no GPU behind cpu and TRITON_INTERPRET is not 1"):
        call("linear with all", impl="triton")


def test_to_tf32_is_the_nearest_with_11_bits() -> None:
    x = torch.cat([torch.randn(10_000) * 10.0 ** torch.randint(-30, 30, (10_000,)), torch.tensor([0.0, -0.0, 1.0])])
    significand, exponent = x.double().frexp()
    nearest = ((significand.abs() * 2**11 + 0.5).floor() * significand.sign()).ldexp(exponent - 11)
    assert torch.equal(ops.to_tf32(x).double(), nearest)
    assert not (ops.to_tf32(x).view(torch.int32) & 0x1FFF).any()
    odd = torch.tensor([torch.inf, -torch.inf, torch.nan])
    assert_same_bits(ops.to_tf32(odd), odd)


@pytest.mark.parametrize(
    ("capability", "name"),
    [((7, 5), "sm_80"), ((8, 0), "sm_80"), ((8, 6), "sm_86"), ((8, 7), "sm_86"), ((8, 9), "sm_89"), ((9, 0), "sm_90"),
     ((10, 0), "sm_100"), ((10, 3), "sm_100"), ((11, 0), "sm_100"), ((12, 0), "sm_120"), ((12, 1), "sm_120")],
)  # fmt: skip
def test_a_gpu_is_launched_for_as_the_newest_that_is_no_newer(
    capability: tuple[int, int], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This holds for GPUs without a B200's shared memory too. An architecture takes launches from one with no more."""
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    target = targets._detect.__wrapped__(torch.device("cuda"))
    assert target.name == name


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float64, torch.int8])
def test_a_dtype_that_no_kernel_computes_in_has_no_launch(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=f"kernels take float16, bfloat16 and float32, got {dtype}"):
        targets.kind_of(dtype, "ieee")


def test_an_architecture_is_found_by_its_number_not_by_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    late = dataclasses.replace(targets.TARGETS["sm_100"], name="sm_103", capability=103)
    monkeypatch.setitem(targets.TARGETS, "sm_103", late)
    monkeypatch.setattr(torch.version, "hip", None)
    for capability, name in (((12, 0), "sm_120"), ((10, 3), "sm_103"), ((10, 1), "sm_100")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert targets._detect.__wrapped__(torch.device("cuda")).name == name


def test_an_unknown_implementation_is_refused() -> None:
    with pytest.raises(ValueError, match="impl must be 'auto', 'triton' or 'reference', got 'cuda'"):
        call("linear", impl="cuda")


def test_without_triton_everything_runs() -> None:
    """Runs in a process of its own, in which Triton cannot be imported. Nothing may try to import it."""
    program = """
import sys, importlib.util, torch
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else find(name, *rest)
sys.modules["triton"] = None
from clip_fast.kernels import ops
qkv = torch.randn(2, 5, 3, 2, 16)
assert ops.flash_attention(qkv, 0.25).shape == (2, 5, 32)
assert ops.linear(torch.randn(3, 8), torch.randn(4, 8), statistics=True)[1].shape == (3, 1, 2)
try:
    ops.flash_attention(qkv, 0.25, impl="triton")
except RuntimeError as error:
    assert "Triton is not installed" in str(error)
else:
    raise AssertionError("ran without Triton")
print(sys.modules["triton"])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "None"


# --- what PyTorch's compilers see ------------------------------------------------------------------------------------


class _Caller(nn.Module):
    """One op as a module, with its tensors as arguments."""

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        super().__init__()
        op, arguments = calls(dtype)[name]
        self.function = getattr(ops, op)
        self.options = {key: value for key, value in arguments.items() if not isinstance(value, (Tensor, tuple))}
        self.tensors = {key: value for key, value in arguments.items() if isinstance(value, (Tensor, tuple))}

    def forward(self, tensors: dict[str, Any]) -> Any:
        return self.function(**tensors, **self.options)


@pytest.mark.parametrize("name", CALLS)
def test_torch_compile_sees_one_graph(name: str) -> None:
    torch.compiler.reset()
    module = _Caller(name, torch.float32)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for got, wanted in zip(outputs(compiled(module.tensors)), outputs(module(module.tensors)), strict=True):
        assert_same_bits(got, wanted)


@pytest.mark.parametrize("name", CALLS)
def test_torch_export(name: str) -> None:
    module = _Caller(name, torch.float32)
    program = torch.export.export(module, (module.tensors,))
    assert any(f"clip_fast.{calls()[name][0]}" in str(node.target) for node in program.graph.nodes)
    for got, wanted in zip(
        outputs(program.module()(module.tensors)), outputs(module(module.tensors)), strict=True
    ):  # fmt: skip
        assert_same_bits(got, wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("name", CALLS)
def test_opcheck(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Schema, fake tensors and tracing agree with the op itself."""
    op, arguments = calls(dtype)[name]
    seen: list[tuple[Any, ...]] = []
    monkeypatch.setattr(Op, "__call__", lambda self, impl, tensors, *options: seen.append((*tensors, *options)))
    getattr(ops, op)(**arguments)
    monkeypatch.undo()
    if DEVICE.type == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    torch.library.opcheck(getattr(torch.ops.clip_fast, op).default, seen[0])


@pytest.mark.parametrize(("batch", "copied"), [(8191, False), (8192, True)])
def test_no_element_is_out_of_reach_of_32_bits(batch: int, copied: bool) -> None:
    """Tokens that lie before images: between the first and the last of an image there are 2³¹ elements."""
    tokens = torch.empty(257, batch, 1024, device="meta").transpose(0, 1)
    reached = reached_in_32_bits(tokens)
    assert reached.is_contiguous() == copied
    assert reached.shape == tokens.shape


def far_apart(*shape: int) -> Tensor:
    """Three random tensors, 2³⁰ elements one after another: the last is 2³¹ away. The memory between them is not
    touched, so that a CPU has none of it."""
    step = 2**30
    try:
        memory = torch.empty(2 * step + torch.Size(shape).numel(), dtype=torch.float16, device=DEVICE)
    except RuntimeError as error:
        pytest.skip(f"4 GiB cannot be asked for: {error}")
    x = memory.as_strided((3, *shape), (step, *torch.empty(shape, device="meta").stride()))
    return x.copy_(torch.randn(3, *shape, device=DEVICE))


FAR: dict[str, Callable[[], dict[str, Any]]] = {
    "patch_embed": lambda: {"images": far_apart(3, 16, 16)},
    "patch_embed with statistics": lambda: {"images": far_apart(2, 16, 16).transpose(0, 1)},  # whose channels are far
    "layer_norm": lambda: {"x": far_apart(96)},
    "linear": lambda: {"x": far_apart(96), "residual": far_apart(40)},
    "mean_token": lambda: {"features": far_apart(9, 32)},
    "attention_pool": lambda: {
        "query": far_apart(2, 32), "first": far_apart(64), "rest": far_apart(5, 64),
    },
}  # fmt: skip


@pytest.mark.parametrize("name", FAR)
def test_offsets_have_64_bits(name: str) -> None:
    """Of images, channels and rows. With 32 bits the last of three would be read 2³¹ elements before the first."""
    far = FAR[name]()
    near = {key: tensor.clone(memory_format=torch.contiguous_format) for key, tensor in far.items()}
    torch.manual_seed(0)
    wanted = outputs(call(name, torch.float16, impl="triton", **near))
    torch.manual_seed(0)
    for got, one in zip(outputs(call(name, torch.float16, impl="triton", **far)), wanted, strict=True):
        assert_same_bits(got, one)
