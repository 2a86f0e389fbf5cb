"""What the calculation knows of a GPU: its rates, each with its source.

Peaks follow from a vendor's document. A sustained rate is what a large product reaches. Where none is published the
peak stands for it, and the prediction is then an upper bound. Rates of memory are vendors', but for the H200's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

SCHEDULERS = 4  # of a multiprocessor, each issuing one instruction of a warp a clock: CUDA C++ Programming Guide
SPECIAL_FUNCTIONS = (
    16  # results a clock and multiprocessor: the same, table "Throughput of native arithmetic instructions"
)
SHARED_BYTES = (
    128  # a clock and multiprocessor, of shared memory and first-level cache: vendors' whitepapers since Volta
)


@dataclass(frozen=True)
class Library:
    """What vendors' libraries reach: where K is 768 to 4096, of a product of endless K; fused passes, of a copy's bytes
    a second; attention with heads of 64, of the product's operations a second."""

    product: float
    passes: float
    attention: float


@dataclass(frozen=True)
class Device:
    """A GPU. Rates are a second unless a clock is named; operations count multiplications and additions."""

    name: str  # as PyTorch has it in the device's own name
    arch: str
    multiprocessors: int
    clock: float  # hertz while such work runs
    peak: Mapping[str, float]  # precision -> operations a clock and multiprocessor, on tensor cores; fp32: on its lanes
    memory: float  # bytes a second of a large copy, reads and writes together
    source: str
    sustained: Mapping[str, float] = field(default_factory=dict)  # precision -> operations a second of endless products
    library: Library | None = None  # None where it is not known, and no rival is then predicted

    def chip(self, precision: str) -> float:
        """Operations a second of the whole device: sustained where that is known, else the peak."""
        return self.sustained.get(precision, self.peak[precision] * self.clock * self.multiprocessors)

    @property
    def fp32_lanes(self) -> float:
        """Results of float32 instructions a clock and multiprocessor."""
        return self.peak["fp32"] / 2


def _tensor(half: float, lanes: int) -> dict[str, float]:
    """Peaks from that in half precision, of which TF32 has a half, and from the number of float32 lanes."""
    return {"bf16": half, "fp16": half, "tf32": half / 2, "fp32": 2.0 * lanes}


DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        Device(
            "H200", "sm_90", 132, 1.70e9, _tensor(4096, 128), 4.3e12,
            "NVIDIA H200 datasheet: 989 TFLOP/s dense in half precision (1.83 GHz), 4.8 TB/s. Taken are 795 TFLOP/s of "
            "large products, at 1.70 GHz, and 4.3 TB/s of a copy: without a published source. That a "
            "tile of K columns takes as long as one of K + 120 is from the table in Triton's Gluon tutorial "
            "07-persistence, of an H100",
            {"bf16": 795e12, "fp16": 795e12, "tf32": 397e12},
            # Estimated: 660 of 795 TFLOP/s, 3.75 of 4.3 TB/s and 300 TFLOP/s. Sure to about a tenth.
            Library(0.83, 0.87, 0.38),
        ),
        Device(
            "A100", "sm_80", 108, 1.41e9, _tensor(2048, 64), 2.039e12,
            "NVIDIA A100 80GB SXM datasheet and A100 architecture whitepaper: 312 TFLOP/s dense in half precision, "
            "1.41 GHz, 2,039 GB/s. Taken are 271 TFLOP/s of products in bfloat16, the best of many shapes that Bekman "
            "measured with PyTorch 2.6 (Machine Learning Engineering, Maximum Achievable Matmul FLOPS)",
            {"bf16": 271e12, "fp16": 271e12},
        ),
        Device(
            "RTX 4090", "sm_89", 128, 2.52e9, _tensor(512, 128), 1.008e12,
            "NVIDIA Ada GPU architecture whitepaper: 165.2 TFLOP/s dense in half precision with float32 sums, 2.52 "
            "GHz, 1,008 GB/s",
        ),
        Device(
            "L4", "sm_89", 58, 2.04e9, _tensor(1024, 128), 0.300e12,
            "NVIDIA L4 datasheet: 242 TFLOP/s in half precision with sparsity, so 121 dense, 30.3 in float32 (2.04 "
            "GHz), 300 GB/s. Its 72 W do not keep that clock",
        ),
        Device(
            "B200", "sm_100", 148, 1.85e9, _tensor(8192, 128), 7.7e12,
            "NVIDIA HGX B200 datasheet: 4.5 PFLOP/s in half precision with sparsity, so 2.25 dense, 7.7 TB/s. Taken "
            "are 1,610 TFLOP/s, cuBLAS's of 8192 cubed in float16 in NVIDIA's Tilus tutorial on Blackwell's products",
            {"bf16": 1610e12, "fp16": 1610e12},
        ),
    )
}  # fmt: skip
