"""The engine's library, compiled once for each machine with the C++ compiler at hand."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
from functools import cache
from pathlib import Path

_SOURCES = Path(__file__).with_name("engine")
# Sums are to be rounded as they are written: nothing is contracted to a fused multiply-add.
_FLAGS = ("-std=c++17", "-O3", "-ffp-contract=off", "-shared", "-fPIC", "-Wno-psabi")


class NoCompiler(Exception):
    """There is no C++ compiler to build the engine with."""


def default_cache() -> Path:
    """Where the engine and compiled kernels are kept between runs."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "clip_fast" / "emulator"


def compiler() -> str:
    """The path of a C++ compiler: $CXX, g++ or clang++."""
    for name in (os.environ.get("CXX"), "g++", "clang++", "c++"):
        found = shutil.which(name) if name else None
        if found:
            return found
    raise NoCompiler("the emulator needs a C++ compiler: neither $CXX nor g++, clang++ or c++ is there")


def engine(folder: Path | None = None) -> ctypes.CDLL:
    """The engine, built into `folder` if it is not there yet."""
    return _load((folder or default_cache()).resolve())


@cache
def _load(folder: Path) -> ctypes.CDLL:
    program = compiler()
    sources = sorted(path for path in _SOURCES.iterdir() if path.suffix in (".h", ".cpp"))
    # The library holds instructions of this machine's CPU, and a folder may be shared by several machines.
    parts = [program, _output(program, "--version"), *_FLAGS, platform.machine(), _cpu()]
    digest = hashlib.sha256("\0".join(parts).encode())
    for path in sources:
        digest.update(path.read_bytes())
    library = folder / f"engine-{digest.hexdigest()[:16]}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        part = library.with_suffix(f".{os.getpid()}")
        _compile(program, part)
        part.replace(library)  # so that nobody loads half a library
    return ctypes.CDLL(str(library))


def _compile(program: str, output: Path) -> None:
    command = [program, *_FLAGS, "-o", str(output), str(_SOURCES / "engine.cpp")]
    for extra in (["-march=native"], []):  # which some compilers do not have for some CPUs
        done = subprocess.run([*command, *extra], capture_output=True, text=True)
        if done.returncode == 0:
            return
    raise RuntimeError(f"the emulator's engine does not compile:\n{done.stderr[-4000:]}")


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True).stdout


def _cpu() -> str:
    """What the CPU's instructions are, as far as the system says."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))
