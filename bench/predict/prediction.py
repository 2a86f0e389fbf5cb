"""Launches meet their machine code and a device: the prediction for a batch of a model."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

from clip_fast.engine.graphs import bucket_of
from clip_fast.towers.config import Config, ResNetConfig, sides

from ..machine_code import Job, compiled_kernel, disassembled, resident_blocks
from ..models import MODELS, SIGLIP_MODELS
from ..roofline import least_seconds, operations, traffic
from ..timing import Ceilings
from . import code, rival
from .devices import DEVICES, Device
from .launches import Launch, launches_of, resize_of
from .terms import Kernel, Time, launch_time

PREDICTABLE: dict[str, Config] = MODELS | SIGLIP_MODELS
Kernels = Mapping[tuple[Any, ...], Kernel]  # by what the compiler was given


@dataclass(frozen=True)
class Predicted:
    """One launch of a model, the times that it is launched, and what it takes."""

    launch: Launch
    count: int
    kernel: Kernel
    time: Time


@dataclass(frozen=True)
class Prediction:
    """A batch of a model on a device, in seconds."""

    device: str
    model: str
    batch: int
    precision: str
    launches: tuple[Predicted, ...]
    replayed: bool  # as a CUDA graph, which costs the host next to nothing
    rival: float | None  # None where what the device's libraries reach is not known
    least: float  # what arithmetic or memory traffic that the mathematics needs takes at the device's rates, the longer
    before: tuple[Predicted, ...] = ()  # what resizes the batch in bulk encoding, which no sum here has

    @property
    def on_device(self) -> float:
        return sum(p.count * p.time.device for p in self.launches)

    @property
    def on_host(self) -> float:
        return 0.0 if self.replayed else sum(p.count * p.time.host for p in self.launches)

    @property
    def seconds(self) -> float:
        """The host launches ahead of the device: the slower of the two decides."""
        return max(self.on_device, self.on_host)


def read_kernel(job: Job) -> Kernel:
    """Compiles `job`, and counts what its machine code executes."""
    compiled = compiled_kernel(job)
    usage, sass = disassembled(compiled.asm["cubin"])
    numbers = {
        name: int(value) for name, _, value in (item.partition(":") for item in usage.split()) if value.isdigit()
    }
    warps, shared = compiled.metadata.num_warps, compiled.metadata.shared
    return Kernel(
        code.read(sass), warps, compiled.metadata.num_stages,
        resident_blocks(job.arch, numbers["REG"], warps, shared), numbers["REG"], shared, numbers["STACK"],
    )  # fmt: skip


def read_kernels(jobs: Iterable[Job], processes: int) -> dict[tuple[Any, ...], Kernel]:
    """The kernel of every job, those with the same code once."""
    unique = {job.identity: job for job in jobs}
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        return dict(zip(unique, pool.map(read_kernel, unique.values()), strict=True))


def predict(
    model: str,
    batch: int,
    precision: str,
    device: Device,
    launches: Sequence[Launch],
    kernels: Kernels,
    before: Sequence[Launch] = (),
) -> Prediction:
    """The prediction for a batch that has these launches, and those `before` them."""
    config = PREDICTABLE[model]
    assert not isinstance(config, ResNetConfig)
    counts: dict[tuple[Any, ...], int] = {}
    firsts: dict[tuple[Any, ...], Launch] = {}
    for launch in launches:
        key = (launch.label, launch.job.identity, launch.grid, launch.work, launch.moved)
        counts[key] = counts.get(key, 0) + 1
        firsts.setdefault(key, launch)
    predicted = tuple(_predicted(firsts[key], counts[key], precision, device, kernels) for key in firsts)
    limits = Ceilings({precision: device.chip(precision)}, device.memory)
    return Prediction(
        device.name, model, batch, precision, predicted, bucket_of(batch, config) is not None,
        rival.seconds_of(config, batch, precision, device),
        least_seconds(batch * operations(config), traffic(config, batch, precision), precision, limits),
        tuple(_predicted(launch, 1, precision, device, kernels) for launch in before),
    )  # fmt: skip


def _predicted(launch: Launch, count: int, precision: str, device: Device, kernels: Kernels) -> Predicted:
    kernel, work = kernels[launch.job.identity], launch.work
    descriptors = any(kind.startswith("tensordesc") for _, kind in launch.job.signature)
    time = launch_time(
        kernel, work.tiles, launch.grid, work.steps, work.operations, work.copied, launch.moved, precision, descriptors,
        device, dependent=dict(launch.job.options).get("launch_pdl", 0) == 1, added=work.added,
    )  # fmt: skip
    return Predicted(launch, count, kernel, time)


def predictions(
    models: Sequence[str], batches: Sequence[int], precisions: Sequence[str], devices: Sequence[str], processes: int
) -> list[Prediction]:
    """All of them; what several share is compiled once."""
    asked = [(m, b, p, DEVICES[d]) for d in devices for p in precisions for m in models for b in batches]
    launches: list[tuple[list[Launch], list[Launch]]] = []
    for model, batch, precision, device in asked:
        config = PREDICTABLE[model]
        if isinstance(config, ResNetConfig):
            raise ValueError(f"{model} is a ResNet: the time of cuDNN's convolutions is not calculated")
        encode = launches_of(config, bucket_of(batch, config) or batch, precision, device)
        launches.append((encode, resize_of(sides(config.image_size)[0], batch, device)))
    kernels = read_kernels((launch.job for both in launches for each in both for launch in each), processes)
    return [predict(*one, encode, kernels, before) for one, (encode, before) in zip(asked, launches, strict=True)]
