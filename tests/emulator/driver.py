"""A Triton driver whose device is the emulator: kernels are compiled to PTX as for a GPU and run on CPU tensors."""

from __future__ import annotations

import struct
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.backends.nvidia.compiler import CUDABackend

from . import tensor_map
from .build import default_cache
from .machine import Extent, Run, Settings, launch
from .program import Program
from .subject import WEIGHTS, shared_memory
from .translate import translate

_FORMATS = {
    "i1": "<B", "u1": "<B", "i8": "<b", "u8": "<B", "i16": "<h", "u16": "<H", "i32": "<i", "u32": "<I", "i64": "<q",
    "u64": "<Q", "fp32": "<f", "f32": "<f", "fp64": "<d",
}  # fmt: skip


class EmulatorDriver(DriverBase):
    """What Triton asks of a device, whose number is its architecture: so compiled kernels are kept apart."""

    def __init__(self, architecture: Callable[[], int], cache: Path) -> None:
        self.settings = Settings(cache=cache)
        self.runs: list[Run] = []  # of all launches since the list was last cleared
        self.rewrite: Callable[[str], str] | None = None  # of the PTX, before it is translated
        self.blocks: tuple[int, int] | None = None  # of a grid that are run: first and number; all if None
        self.launcher_cls = partial(_Launcher, self)
        self.utils = SimpleNamespace(
            load_binary=lambda name, kernel, shared, device, *rest: (name, kernel.decode(), 0, 0, 1024),
            unload_module=lambda module: None,
            get_device_properties=self._properties,
        )
        self._architecture = architecture

    @staticmethod
    def _properties(device: int) -> dict[str, int]:
        shared = shared_memory(device)
        return {"max_shared_mem": shared, "multiprocessor_count": 4, "warpSize": 32, "max_num_regs": 65536}

    @classmethod
    def is_active(cls) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride] (Triton's has no annotation)
        return False  # on its own: `install` sets it

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_device(self) -> int:
        return self._architecture()

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_capability(self, device: int) -> tuple[int, int]:
        return divmod(self._architecture(), 10)

    def get_current_target(self) -> GPUTarget:  # pyright: ignore[reportIncompatibleMethodOverride]
        return GPUTarget("cuda", self._architecture(), 32)

    def get_active_torch_device(self) -> torch.device:  # pyright: ignore[reportIncompatibleMethodOverride]
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        raise NotImplementedError

    def get_benchmarker(self) -> Any:
        raise NotImplementedError


class _Launcher:
    """What Triton calls to launch one kernel."""

    def __init__(self, driver: EmulatorDriver, source: Any, metadata: Any) -> None:
        self.driver = driver
        self.signature: list[tuple[str, str]] = [(str(name), kind) for name, kind in source.signature.items()]
        self.metadata = metadata
        self.name = source.fn.__name__

    def __call__(self, x: int, y: int, z: int, stream: Any, ptx: str, *rest: Any) -> None:
        driver = self.driver
        if driver.rewrite is not None:
            ptx = driver.rewrite(ptx)
        program = _translated(ptx)
        values, tensors, names = self._arguments(rest[-len(self.signature) :])
        # Triton adds pointers to scratch memory, which these kernels do not use.
        values += [bytes(8)] * (len(program.params) - len(values))
        memory = bytearray(program.param_bytes)
        for param, value in zip(program.params, values, strict=True):
            if len(value) != param.size:
                raise ValueError(f"{self.name}: {param.name} of {param.size} bytes got {len(value)}")
            memory[param.offset : param.offset + param.size] = value
        hopper = self.metadata.target.arch >= 90
        run = launch(
            program, (x, y, z), bytes(memory), tensors, self.metadata.shared, driver.settings, hopper, driver.blocks,
            programmatic=self.metadata.launch_pdl,
        )  # fmt: skip
        run.kernel, run.ptx, run.tensors = self.name, ptx, names
        driver.runs.append(run)

    def _arguments(self, arguments: tuple[Any, ...]) -> tuple[list[bytes], list[Extent], list[str]]:
        """The parameters' bytes, and the tensors among them: what they span, and their names."""
        values: list[bytes] = []
        tensors: list[Extent] = []
        names: list[str] = []
        metas = iter(getattr(self.metadata, "tensordesc_meta", None) or [])
        for (name, kind), value in zip(self.signature, arguments, strict=True):
            if kind == "constexpr":
                continue
            if kind.startswith("tensordesc"):
                meta = next(metas)
                values.append(tensor_map.encode(value, meta if isinstance(meta, dict) else vars(meta)))
                values += [struct.pack("<i", int(n)) for n in value.shape]
                values += [struct.pack("<q", int(n)) for n in value.strides]
            elif kind.startswith("*"):
                values.append(struct.pack("<Q", value.data_ptr()))
            else:
                values.append(struct.pack(_FORMATS[kind], value))
                continue
            start, size = _span(value.base if kind.startswith("tensordesc") else value)
            tensors.append(Extent(start, size, name.removesuffix("_ptr") in WEIGHTS))
            names.append(name)
        return values, tensors, names


@lru_cache(maxsize=64)
def _translated(ptx: str) -> Program:
    return translate(ptx)


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """A tensor's address, and the bytes from its first element to its last: not its storage, which may be larger."""
    if tensor.numel() == 0:
        return tensor.data_ptr(), 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), (last + 1) * tensor.element_size()


def install(architecture: Callable[[], int], cache: Path | None = None) -> EmulatorDriver:
    """Make the emulator Triton's device. `architecture` says which GPU it stands for: 80, 90.

    Compiled kernels are kept in a folder of the emulator's own: PTX stands there where a GPU would find its binary.
    """
    cache = cache or default_cache()
    knobs.cache.dir = str(cache / "triton")
    CUDABackend.make_cubin = _keep_ptx
    driver = EmulatorDriver(architecture, cache)
    triton.runtime.driver.set_active(driver)
    return driver


def _keep_ptx(self: CUDABackend, src: str, metadata: Any, opt: Any, capability: Any) -> bytes:
    return src.encode()
