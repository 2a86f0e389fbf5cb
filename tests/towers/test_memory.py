"""What a model takes beside its weights on a CPU, as the system counts it: resident memory of a process of its own."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from clip_fast.towers.cpu import can_fuse, multiplies_in_tiles

MOST = 1.1  # times the weights
PART = 16  # images of 50 tokens that are encoded at a time in float32
NUMBER_OF_BATCHES = 3
THREADS = (1, 2, 3, 4)
KERNELS = 8 * 2**20  # bytes that oneDNN may keep for a new number of images or threads
AMX_KERNELS = 3 * KERNELS  # which are the largest: up to 17 MB were seen for a batch in two parts

RESIDENT = """
import ctypes, gc

def resident():
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # gives back what was freed, which the C library would keep for the process
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith("RssAnon"))
"""

# Two models of one shape, one after the other. The first also takes what the process keeps for all models: the kernels
# that oneDNN compiles for each number of rows and of threads, some 0.6 MiB each. The second shows what is its own.
CHILD = f"""
import json, sys
import torch
from clip_fast.encoder import ImageEncoder
from clip_fast.towers import reference
from clip_fast.towers.config import ResNetConfig, VitConfig
from clip_fast.towers.families import fast_tower
from clip_fast.towers.precision import precision_of

CONFIG = {{
    "ViT-B/32": VitConfig(image_size=224, patch_size=32, width=768, layers=12, heads=12, embed_dim=512),
    "RN50": ResNetConfig(layers=(3, 4, 6, 3), width=64, heads=32, image_size=224, embed_dim=1024),
}}[sys.argv[1]]
dtype = getattr(torch, sys.argv[2])

{RESIDENT}
def taken():
    with torch.device("meta"):
        shapes = {{name: tensor.shape for name, tensor in reference.build(CONFIG).state_dict().items()}}
    weights = {{name: torch.rand(shape, dtype=dtype) / 50 for name, shape in shapes.items()}}
    model = ImageEncoder(CONFIG, weights, torch.device("cpu"), dtype)
    del weights
    part = fast_tower(CONFIG, torch.device("cpu")).largest_batch(
        CONFIG, torch.device("cpu"), precision_of(None, torch.ones((), dtype=dtype))
    )
    assert dtype != torch.float32 or part == {PART}
    images = torch.rand(part + 2, 3, 224, 224)  # they go in two parts
    own = sum(tensor.nbytes for tensor in model.state_dict().values())
    before = resident()
    shares = []
    for threads in {THREADS}:
        torch.set_num_threads(threads)
        for batch in (1, 2, part + 2):
            with torch.no_grad():
                model.encode_image(images[:batch])
            shares.append((resident() - before) / own)
    return model, shares, own

first, of_first, own = taken()
second, of_second, _ = taken()
print(json.dumps([of_first, of_second, own]))
"""


# A model of float32 in a cache as huggingface_hub has it: its own weights are the file's pages.
LOADING = f"""
import json, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
import clip_fast
from clip_fast.towers import reference
from clip_fast.towers.config import VitConfig

CONFIG = VitConfig(image_size=224, patch_size=32, width=768, layers=12, heads=12, embed_dim=512)
blob, snapshot = Path(sys.argv[1]) / "blobs" / ("0" * 64), Path(sys.argv[1]) / "snapshots" / "main"
for folder in (blob.parent, snapshot):
    folder.mkdir(parents=True)
weights = {{name: torch.rand(tensor.shape) / 50 for name, tensor in reference.build(CONFIG).state_dict().items()}}
save_file(weights, blob, {{"activation": "quick_gelu"}})
(snapshot / "model.safetensors").symlink_to(blob)
own = sum(tensor.nbytes for tensor in weights.values())
del weights
images = torch.rand(2 * {PART}, 3, 224, 224)

{RESIDENT}

before = resident()
model, _ = clip_fast.load(snapshot / "model.safetensors", "cpu")
shares = [(resident() - before) / own]
for batch in (*range(1, {PART} + 1), 2 * {PART}):  # every size of a part; more images go in parts of such sizes
    with torch.no_grad():
        model.encode_image(images[:batch])
    shares.append((resident() - before) / own)
print(json.dumps(shares))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_a_model_of_the_hub_has_its_weights_in_memory_once(tmp_path: Path) -> None:
    """Beside them are pages of the file, which the system takes back where memory is short."""
    if not can_fuse(torch.float32):
        pytest.skip("no library packs weights here")
    child = subprocess.run(
        [sys.executable, "-c", LOADING, str(tmp_path)], stdout=subprocess.PIPE, text=True, check=True
    )
    after_loading, *after_batches = json.loads(child.stdout)
    print(f"in memory of the process: {after_loading} of the weights when loaded, {after_batches} by batch")
    assert after_loading <= MOST - 1
    assert max(after_batches) <= MOST


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
@pytest.mark.parametrize("model", ["ViT-B/32", "RN50"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_takes_its_weights_once_more(model: str, dtype: str) -> None:
    if not can_fuse(getattr(torch, dtype)):
        pytest.skip(f"no library packs weights of {dtype} here")
    child = subprocess.run([sys.executable, "-c", CHILD, model, dtype], stdout=subprocess.PIPE, text=True, check=True)
    first, second, own = json.loads(child.stdout)
    print(f"beside {own} bytes of weights, by threads and batch: {first} of the first model, {second} of the second")
    assert max(second) <= MOST
    if dtype == "float32":
        assert max(first[: 2 * NUMBER_OF_BATCHES]) <= MOST  # by one thread and by two
    steps = [after - before for before, after in pairwise(first)]
    most = AMX_KERNELS if multiplies_in_tiles(getattr(torch, dtype)) else KERNELS
    assert max(steps[1:]) <= most / own  # behind the second, all weights are prepared


BOUND = """
import ctypes, sys
import torch
from clip_fast.encoder import ImageEncoder
from clip_fast.towers import reference
from clip_fast.towers.config import VitConfig

class Counts(ctypes.Structure):  # mallinfo(3)
    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks mapped a b c d e".split()]

mallinfo = ctypes.CDLL(None).mallinfo2
mallinfo.restype = Counts
config = VitConfig(image_size=32, patch_size=16, width=64, layers=1, heads=1, embed_dim=16)
model = ImageEncoder(config, reference.build(config).state_dict(), torch.device("cpu"), torch.float32)
if sys.argv[1] == "encoded":
    model.encode_image(torch.zeros(1, 3, 32, 32))
before = mallinfo().mapped
block = torch.empty(31 << 20, dtype=torch.uint8)
print(mallinfo().mapped - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(
    platform.libc_ver() < ("glibc", "2.33"), reason="needs glibc, which tells since 2.33 what it mapped"
)
def test_freed_memory_is_kept() -> None:
    """A block below the bound comes from the heap, where it stays when it is freed; another is mapped by itself."""
    mapped = {
        when: int(
            subprocess.run([sys.executable, "-c", BOUND, when], check=True, capture_output=True, text=True).stdout
        )
        for when in ("encoded", "not yet")
    }
    assert mapped["encoded"] == 0
    assert mapped["not yet"] > 31 * 2**20
