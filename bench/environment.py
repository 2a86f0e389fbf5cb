"""The environment of a measurement: device, driver, versions, commit, threads.

    python -m bench.environment

prints it. Every result on disk contains it, so that no number is without its machine. Where there is no git, the
variable CLIP_FAST_COMMIT gives the commit.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import itertools
import json
import os
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
LAUNCHES_FILE = ROOT / "kernels" / "launches.py"

# The packages that are measured, and their rivals; results name their versions.
PACKAGES = (
    "torch", "triton", "numpy", "openai-clip", "open_clip_torch", "transformers", "timm", "clip-retrieval",
    "onnxruntime", "openvino", "pillow", "ray", "webdataset",
)  # fmt: skip

# The files that decide a result: the code, its rivals, and the timing.
_MEASURED = (
    "kernels", "clip_fast", "bench/kernels", "bench/end_to_end.py", "bench/jobs.py", "bench/models.py",
    "bench/photographs.py", "bench/pipeline.py", "bench/roofline.py", "bench/systems.py", "bench/timing.py",
)  # fmt: skip


@dataclass(frozen=True)
class Environment:
    """A machine and its software. A field is None where there is no such thing, or it cannot be found out."""

    date: str  # UTC, of the run
    commit: str | None  # of this repository, with "-dirty" where files differ from it
    device: str  # the name of the GPU; where the CPU is measured, its model
    device_memory: int  # bytes
    driver: str | None  # of the GPU
    cuda: str | None  # the version that PyTorch was built with, or its ROCm version
    cpu: str
    cpu_instructions: str  # the widest that PyTorch uses
    bf16_on_cpu: bool  # whether the CPU multiplies bfloat16 in hardware
    cores: int  # the number that this process may use
    threads: int  # of PyTorch, within an operation
    system: str
    python: str
    versions: Mapping[str, str | None]
    code: str | None = None  # `fingerprint` of the measured code

    def folder(self, results: Path = RESULTS) -> Path:
        """The folder for results: one whose results are all continued, or a new one named by device and date.

        Further folders of the same date are numbered.
        """
        name = re.sub(r"[^a-z0-9]+", "-", self.device.lower()).strip("-")
        for folder in sorted(results.glob(f"{name}-????-??-??*"), reverse=True):
            begun = [json.loads(file.read_text()) for file in folder.glob("*.json")]
            if begun and all(self._continues(document) for document in begun):
                return folder
        today = results / f"{name}-{self.date[:10]}"
        further = (today.with_name(f"{today.name}-{number}") for number in itertools.count(2))
        return next(folder for folder in itertools.chain([today], further) if not any(folder.glob("*.json")))

    def _continues(self, document: Mapping[str, Any]) -> bool:
        """Whether a benchmark goes on with its earlier results. The tuner's do not depend on the table of launches."""
        now = replace(self, code=fingerprint(launches=False)) if document["bench"] == "tune" else self
        return not now.differing(document["environment"])

    def differing(self, earlier: Mapping[str, Any]) -> list[str]:
        """The fields in which an earlier environment, read from JSON, is another. Date and commit do not count."""
        now = asdict(self)
        before = {"code": None} | dict(earlier)
        return [name for name, value in before.items() if name not in ("date", "commit") and now[name] != value]

    def line(self) -> str:
        """The line under a table."""
        about = [self.device, f"{self.cores} cores, {self.threads} threads"]
        about += [f"driver {self.driver}"] if self.driver else []
        about += [f"{name} {version}" for name, version in self.versions.items() if version]
        return ", ".join([*about, f"Python {self.python}", f"commit {self.commit or 'unknown'}", self.date])


def chosen_device(name: str) -> torch.device:
    """The device that a command line names. A GPU becomes PyTorch's current one, since events are recorded there."""
    device = torch.device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def fingerprint(launches: bool = True) -> str:
    """A hash of the code that decides a result. Changes of pictures, tables and tests leave it as it is.

    Args:
        launches: whether the table of launch configurations is hashed too. The tuner leaves it out, since it rewrites
            the table itself.
    """
    digest = hashlib.sha256()
    for place in (ROOT / each for each in _MEASURED):
        for file in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            if file == LAUNCHES_FILE and not launches:
                continue
            text = file.read_text()
            digest.update(f"{file.relative_to(ROOT)}\n{len(text)}\n{text}".encode())
    return digest.hexdigest()[:12]


def environment(device: torch.device) -> Environment:
    """The machine as it is now. `device` is the one that is measured."""
    on_gpu = device.type == "cuda"
    return Environment(
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        commit=_commit(),
        device=torch.cuda.get_device_name(device) if on_gpu else _cpu_model(),
        device_memory=torch.cuda.get_device_properties(device).total_memory if on_gpu else _memory(),
        driver=_driver(device) if on_gpu else None,
        cuda=(torch.version.cuda or torch.version.hip) if on_gpu else None,
        cpu=_cpu_model(),
        cpu_instructions=torch.backends.cpu.get_cpu_capability(),
        bf16_on_cpu=bf16_on_cpu(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
        versions={name: _version(name) for name in PACKAGES},
        code=fingerprint(),
    )


def bf16_on_cpu() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware. Emulated bfloat16 is slower than float32."""
    flags = set(_cpuinfo("flags", "Features").split())
    return not flags.isdisjoint({"avx512_bf16", "amx_bf16", "avx_ne_convert", "bf16"})


def _cpu_model() -> str:
    """The CPU's name, with the numbers that tell generations of the same name apart."""
    name = _cpuinfo("model name") or platform.processor() or platform.machine()
    family, model, stepping = _cpuinfo("cpu family"), _cpuinfo("model"), _cpuinfo("stepping")
    return f"{name} (family {family}, model {model}, stepping {stepping})" if family else name


def _cpuinfo(*names: str) -> str:
    """The first value of a field in Linux's /proc/cpuinfo; empty where there is none."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""
    found = re.search(rf"^(?:{'|'.join(names)})\s*:\s*(.*)$", text, re.MULTILINE)
    return found[1] if found else ""


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    if not (ROOT / ".git").exists():  # a repository above would answer
        return os.environ.get("CLIP_FAST_COMMIT")
    return _output("git", "-C", str(ROOT), "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty")


def _driver(device: torch.device) -> str | None:
    index = device.index if device.index is not None else torch.cuda.current_device()
    return _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", f"--id={index}")


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.environment", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--folder", action="store_true", help="print the folder for this machine's results")
    parser.add_argument("--code", action="store_true", help="print the hash of the code that is measured")
    options = parser.parse_args(arguments)
    if options.code:
        print(fingerprint())
        return
    here = environment(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    print(here.folder() if options.folder else json.dumps(asdict(here), indent=1))


if __name__ == "__main__":
    main()
