"""CUDA graphs: the bucket of each batch size, and correct replays, alone and under misuse.

Without a GPU a stand-in takes the place of a captured graph. Like a replay, it computes again from the same buffers
into the same results. With a GPU the encoder itself is captured.
"""

from __future__ import annotations

import contextlib
import gc
import threading
import time
import warnings
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from random_towers import random_tower
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from clip_fast.checkpoint.published import OPENAI_MODELS
from clip_fast.encoder import ImageEncoder
from clip_fast.engine import graphs
from clip_fast.engine.engine import Engine
from clip_fast.engine.graphs import Graphs, Results, bucket_of
from clip_fast.towers import reference
from clip_fast.towers.config import ENCODE, ResNetConfig, Task, VitConfig, hidden_state
from clip_fast.towers.convolution import Convolution

RESNET = ResNetConfig(layers=(1, 1, 1, 1), width=4, heads=2, image_size=32, embed_dim=32)
VIT = VitConfig(image_size=32, patch_size=16, width=64, layers=2, heads=1, embed_dim=32)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize(
    ("name", "batch", "bucket"),
    [
        ("ViT-B/32", 1, 1),
        ("ViT-B/32", 3, 4),
        ("ViT-B/32", 33, 64),  # padding to a power of two costs less than launching
        ("ViT-B/32", 65, 80),  # here only a little padding does
        ("ViT-B/32", 100, 112),
        ("ViT-B/32", 256, 256),
        ("ViT-B/32", 257, 320),
        ("ViT-B/32", 512, None),  # the GPU takes longer than its host
        ("ViT-L/14", 16, 16),
        ("ViT-L/14", 17, 20),
        ("ViT-L/14", 64, None),
        ("ViT-L/14@336px", 3, 3),
        ("ViT-L/14@336px", 16, 16),
        ("ViT-L/14@336px", 32, None),
        ("RN50", 4, 4),
        ("RN50", 3, None),  # never padded
        ("RN50", 256, 256),
        ("RN50", 512, None),
        ("RN50x64", 16, 16),
        ("RN50x64", 32, None),
    ],
)
def test_buckets(name: str, batch: int, bucket: int | None) -> None:
    assert bucket_of(batch, OPENAI_MODELS[name]) == bucket


@pytest.mark.parametrize("name", [name for name in OPENAI_MODELS if "ViT" in name])
def test_buckets_are_few_and_at_most_a_fifth_of_a_dear_one_is_padding(name: str) -> None:
    config = OPENAI_MODELS[name]
    found = {batch: bucket for batch in range(1, 1025) if (bucket := bucket_of(batch, config)) is not None}
    assert list(found) == list(range(1, len(found) + 1))  # up to a certain batch all are graphs, and none from there on
    assert len(set(found.values())) <= 20
    for batch, bucket in found.items():
        assert batch <= bucket
        assert bucket * config.operations <= graphs._CHEAP or bucket - batch <= bucket / 5


@pytest.mark.parametrize("name", ["ViT-B/32", "ViT-L/14@336px", "RN50", "RN101", "RN50x4", "RN50x64"])
def test_operations_of_an_image(name: str) -> None:
    """They are those that PyTorch counts in the plain tower, apart from some small products."""
    config = OPENAI_MODELS[name]
    with torch.device("meta"):
        tower, image = reference.build(config), torch.empty(1, 3, config.image_size, config.image_size)
    with FlopCounterMode(display=False) as counted:
        tower(image)
    assert config.operations == pytest.approx(counted.get_total_flops(), rel=0.1)


# --- without a GPU ---------------------------------------------------------------------------------------------------


class Replays:
    """Replaces `Graphs._capture`: every replay writes its results into the same buffers again."""

    def __init__(self) -> None:
        self.captures: list[tuple[Any, ...]] = []

    def __call__(self, these: Graphs, buffer: Tensor, task: Task) -> Any:
        self.captures.append((tuple(buffer.shape), buffer.dtype, task))
        results = these._run(buffer, task)

        def replay() -> None:
            for result, fresh in zip(results, these._run(buffer, task), strict=True):
                result.copy_(fresh)

        return graphs._Captured(buffer, results, replay)


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> Replays:
    capture = Replays()
    stream = SimpleNamespace(wait_event=lambda event: None, record_event=object)
    monkeypatch.setattr(Graphs, "_capture", lambda *args: capture(*args))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    return capture


def double(images: Tensor, task: Task = ENCODE) -> Results:
    return (images.flatten(1).float().sum(dim=1) * 2, images * 2)


def test_a_batch_is_padded_and_its_padding_cut_off(replays: Replays) -> None:
    these = Graphs(double)
    for batch in (3, 4, 1, 3):  # the rows of an earlier batch in the buffer do not show
        images = torch.randn(batch, 3, 4, 4)
        for got, wanted in zip(these(4, images, ENCODE), double(images), strict=True):
            assert torch.equal(got, wanted)
    assert len(replays.captures) == 1


def test_each_bucket_dtype_layout_and_argument_has_its_own(replays: Replays) -> None:
    these = Graphs(double)
    images = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    channels_last = images.contiguous(memory_format=torch.channels_last)
    for batch in (images, channels_last, images.float()):
        for bucket in (2, 4):
            for argument in (ENCODE, hidden_state(1)):
                for _ in range(2):
                    sums, _ = these(bucket, batch, argument)
                    assert torch.equal(sums, double(batch)[0])
    assert len(replays.captures) == len(set(these._captured)) == 12


def test_results_are_the_callers_own(replays: Replays) -> None:
    these = Graphs(double)
    first = these(2, torch.ones(2, 3, 4, 4), ENCODE)[0]
    kept = first.clone()
    these(2, torch.zeros(2, 3, 4, 4), ENCODE)
    assert torch.equal(first, kept)


def test_a_graph_captured_in_inference_mode_serves_outside_of_it(replays: Replays) -> None:
    these = Graphs(double)
    images = torch.randn(2, 3, 4, 4)
    with torch.inference_mode():
        these(2, images, ENCODE)
    with torch.no_grad():
        assert torch.equal(these(2, images, ENCODE)[0], double(images)[0])


def test_threads_take_turns(replays: Replays) -> None:
    def double(images: Tensor, task: Task = ENCODE) -> Results:
        time.sleep(1e-4)  # lets another thread run, which would write to the buffer if nothing stopped it
        return (images.flatten(1).float().sum(dim=1) * 2,)

    these = Graphs(double)
    batches = [torch.full((2, 3, 4, 4), float(i)) for i in range(8)]
    wrong: list[int] = []

    def caller(i: int) -> None:
        for _ in range(20):
            if not torch.equal(these(2, batches[i], ENCODE)[0], double(batches[i])[0]):
                wrong.append(i)

    threads = [threading.Thread(target=caller, args=(i,)) for i in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_capture_that_fails_leaves_nothing(replays: Replays) -> None:
    def out_of_memory(images: Tensor, task: Task) -> Results:
        raise torch.OutOfMemoryError

    these = Graphs(out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        these(2, torch.ones(2, 3, 4, 4), ENCODE)
    assert not these._captured
    assert not these._lock.locked()


def test_a_broken_capture_raises_what_broke_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA raises an error of its own where such a capture is ended, and it must be ended."""
    ended: list[str] = []

    def end() -> None:
        ended.append("end")
        raise RuntimeError("operation failed due to a previous error during capture")

    def run(images: Tensor, task: Task) -> Results:
        if begun:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return double(images, task)

    begun: list[str] = []
    graph = SimpleNamespace(capture_begin=lambda **_: begun.append("begin"), capture_end=end)
    stream = SimpleNamespace(wait_stream=lambda stream: None)
    monkeypatch.setattr(graphs, "_capture_stream", lambda device: stream)
    for name, stand_in in {
        "CUDAGraph": lambda: graph, "graph_pool_handle": lambda: (0, 1), "current_device": lambda: 0,
        "current_stream": lambda: stream, "stream": contextlib.nullcontext, "device": contextlib.nullcontext,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, stand_in)
    with pytest.raises(torch.OutOfMemoryError):
        Graphs(run)(2, torch.zeros(2, 3, 4, 4), ENCODE)
    assert ended


def test_released_graphs_are_captured_again(replays: Replays) -> None:
    these = Graphs(double)
    images = torch.ones(2, 3, 4, 4)
    these._done = SimpleNamespace(synchronize=lambda: None)
    these(2, images, ENCODE)
    these._done = SimpleNamespace(synchronize=lambda: None)
    these.release()
    assert not these._captured
    assert torch.equal(these(2, images, ENCODE)[0], double(images)[0])
    assert len(replays.captures) == 2


def test_memory_is_counted_and_bounded(replays: Replays) -> None:
    """No graph is captured that would exceed it; those that are there go on serving."""
    these = Graphs(double, memory=100)
    images = torch.ones(2, 3, 4, 4)
    assert these(2, images, ENCODE, lambda: 60) is not None
    assert these(4, images, ENCODE, lambda: 50) is None
    assert these(4, images, ENCODE, lambda: 40) is not None
    assert these(2, images, ENCODE, lambda: 60) is not None
    assert these(8, images, ENCODE, lambda: 1) is None
    assert len(replays.captures) == 2
    these._done = SimpleNamespace(synchronize=lambda: None)
    these.release()
    assert these(8, images, ENCODE, lambda: 100) is not None


def test_a_graph_that_failed_is_not_counted(replays: Replays) -> None:
    def run(images: Tensor, task: Task) -> Results:
        if full:
            raise torch.OutOfMemoryError
        return double(images, task)

    these, images, full = Graphs(run, memory=100), torch.ones(2, 3, 4, 4), True
    with pytest.raises(torch.OutOfMemoryError):
        these(2, images, ENCODE, lambda: 100)
    full = False
    assert these(2, images, ENCODE, lambda: 100) is not None


def test_a_graph_is_counted_with_all_that_is_in_memory() -> None:
    """ViT-B/32 at 256 in half precision: 157 MB of activations, 0.26 MB of results, and the images."""
    config = OPENAI_MODELS["ViT-B/32"]
    with torch.device("meta"):
        state = reference.build(config).state_dict()
    weights = {name: torch.empty_like(tensor, device="cpu") for name, tensor in state.items()}
    model = ImageEncoder(config, weights, torch.device("cpu"), torch.bfloat16, precision="bf16")
    images = torch.empty(1, 3, 224, 224, dtype=torch.uint8)
    activations, results, pixels = 50 * (4 * 768 + 3072) * 2, 512 * 2, 3 * 224 * 224
    if model._engine.computed_in.weights == torch.bfloat16:
        assert model._engine._memory_of_one(images, ENCODE) == activations + results + pixels
    tokens = model._engine._memory_of_one(images, hidden_state(1)) - model._engine._memory_of_one(images, ENCODE)
    assert tokens == (50 * 768 - 512) * model._engine.computed_in.weights.itemsize


def test_a_pause_ends_and_grows() -> None:
    pause = graphs.Pause()
    assert pause.is_over()
    for length in (64, 128, 256, 512, 1024, 2048, 4096, 4096):
        pause.begin()
        assert [pause.is_over() for _ in range(length + 2)] == [False] * length + [True, True]


def test_not_while_someone_captures_or_in_a_compiled_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert graphs.allowed()
    with graphs.launches_only():
        assert not graphs.allowed()
    assert graphs.allowed()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not graphs.allowed()


@pytest.fixture
def bucketed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes every batch ask for a graph, as small batches on a GPU do."""
    monkeypatch.setattr(Engine, "_bucket", lambda self, images: len(images) if self.cuda_graphs else None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)


def test_no_graph_of_torch_compile_s_holds_the_encoder() -> None:
    """The replays of torch.compile's own CUDA graphs would see no change of the weights."""
    assert torch.Tag.cudagraph_unsafe in torch.ops.clip_fast.encode.default.tags


def test_a_compiled_program_launches(bucketed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    replayed: list[object] = []
    monkeypatch.setattr(Graphs, "__call__", lambda self, bucket, *args: replayed.append(args) or self._run(*args[:2]))
    model = ImageEncoder(VIT, random_tower(VIT).state_dict(), torch.device("cpu"), torch.float32)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        wanted = model.encode_image(images)
        assert len(replayed) == 1
        torch.compiler.reset()
        assert torch.equal(torch.compile(model, backend="eager", fullgraph=True)(images), wanted)
    assert len(replayed) == 1


def test_where_no_graph_can_be_captured_kernels_are_launched(bucketed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*args: object) -> Results:
        raise RuntimeError("operation not permitted when capturing")

    monkeypatch.delenv("CLIP_FAST_STRICT")
    released: list[Graphs] = []
    monkeypatch.setattr(Graphs, "__call__", failing)
    monkeypatch.setattr(Graphs, "release", lambda self: released.append(self))
    model = ImageEncoder(VIT, random_tower(VIT).state_dict(), torch.device("cpu"), torch.float32)
    images = torch.randn(2, 3, 32, 32)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            torch.testing.assert_close(model.encode_image(images), model.visual(images), rtol=1e-4, atol=1e-5)
    (message,) = [str(w.message) for w in said]
    assert message == "clip_fast launches its kernels one by one from now on: operation not permitted when capturing"
    assert not model._engine.cuda_graphs
    assert len(released) == 1


@pytest.mark.parametrize("error", [torch.OutOfMemoryError(), RuntimeError("CUDA error: out of memory")])
def test_one_out_of_memory_does_not_end_them_for_good(
    error: Exception, bucketed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is said, the memory is given back, and after a pause graphs are captured again."""
    full, asked, released = True, 0, 0

    def replayed(self: Graphs, bucket: int, images: Tensor, task: Task, size: Callable[[], int]) -> Results:
        nonlocal asked
        asked += 1
        if full:
            raise error
        return self._run(images, task)

    def release(self: Graphs) -> None:
        nonlocal released
        released += 1

    monkeypatch.setattr(graphs, "_FIRST_PAUSE", 3)
    monkeypatch.setattr(Graphs, "__call__", replayed)
    monkeypatch.setattr(Graphs, "release", release)
    model = ImageEncoder(VIT, random_tower(VIT).state_dict(), torch.device("cpu"), torch.float32)
    images = torch.randn(2, 3, 32, 32)
    wanted = model.visual(images)

    def calls(number: int) -> int:
        """How many of so many calls asked for a graph."""
        before = asked
        for _ in range(number):
            torch.testing.assert_close(model.encode_image(images), wanted, rtol=1e-4, atol=1e-5)
        return asked - before

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert calls(1) == 1
        assert calls(3) == 0
        assert calls(1) == 1  # memory is still full: a longer pause
        assert calls(6) == 0
        full = False
        assert calls(5) == 5
    assert released == 2


def test_where_memory_does_not_suffice_for_a_graph_kernels_are_launched(
    bucketed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its bound is no failure: other graphs stay, and none is given back."""
    monkeypatch.setattr(graphs, "memory_for", lambda device: 1.0)
    monkeypatch.setattr(Graphs, "release", lambda self: pytest.fail("released"))
    model = ImageEncoder(VIT, random_tower(VIT).state_dict(), torch.device("cpu"), torch.float32)
    images = torch.randn(2, 3, 32, 32)
    stream = SimpleNamespace(wait_event=lambda event: None, record_event=object)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    torch.testing.assert_close(model.encode_image(images), model.visual(images), rtol=1e-4, atol=1e-5)
    assert model._engine.cuda_graphs


@pytest.mark.parametrize("config", [VIT, RESNET], ids=["vit", "resnet"])
def test_an_encoder_is_released_with_its_graphs(config: VitConfig | ResNetConfig) -> None:
    """There is no reference cycle, which would hold a GPU's memory until the garbage collector runs."""
    others = [x for x in gc.get_objects() if type(x) is Convolution]  # left by earlier tests
    model = ImageEncoder(config, random_tower(config).state_dict(), torch.device("cpu"), torch.float32)
    model.encode_image(torch.zeros(1, 3, 32, 32))
    fast = model._engine.prepared
    assert fast is not None
    found = (x for x in gc.get_objects() if type(x) is Convolution)
    convolutions = [weakref.ref(x) for x in found if not any(x is other for other in others)]
    assert bool(convolutions) == (config is RESNET)
    prepared = weakref.ref(fast.graphs)
    gc.collect()
    gc.disable()
    try:
        del model, fast
        assert prepared() is None
        assert not any(convolution() for convolution in convolutions)
    finally:
        gc.enable()


# --- on a GPU --------------------------------------------------------------------------------------------------------


def pair(config: VitConfig | ResNetConfig) -> tuple[ImageEncoder, ImageEncoder]:
    """Two encoders with the same weights: one replays, the other launches."""
    state, device = random_tower(config).state_dict(), torch.device("cuda")
    return (
        ImageEncoder(config, state, device, torch.float16),
        ImageEncoder(config, state, device, torch.float16, cuda_graphs=False),
    )


@needs_gpu
@pytest.mark.parametrize("raw", [False, True])
def test_replayed_embeddings_are_the_launched_ones(raw: bool) -> None:
    model, plain = pair(VIT)
    for batch in (1, 3, 4, 7, 64, 3, 65):
        images = torch.randn(batch, 3, 32, 32, device="cuda")
        if raw:
            images = torch.randint(0, 256, (batch, 32, 32, 3), dtype=torch.uint8, device="cuda")
        assert torch.equal(model.encode_image(images), plain.encode_image(images))
    assert model._engine.prepared is not None
    assert len(model._engine.prepared.graphs._captured) == 5  # of 1, 4, 8, 64 and 128


@needs_gpu
def test_replayed_tokens_and_hidden_states_are_the_launched_ones() -> None:
    model, plain = pair(VIT)
    for batch in (3, 4, 3):
        images = torch.randn(batch, 3, 32, 32, device="cuda")
        for got, wanted in zip(
            *(m.encode_image(images, return_patch_tokens=True) for m in (model, plain)), strict=True
        ):
            assert torch.equal(got, wanted)
        assert torch.equal(model.hidden_state(images, 1), plain.hidden_state(images, 1))
    assert model._engine.prepared is not None
    assert len(model._engine.prepared.graphs._captured) == 2  # one for each task, for a batch of 4


@needs_gpu
def test_a_resnet_is_replayed_where_its_batch_is_a_bucket() -> None:
    model, plain = pair(RESNET)
    for batch in (1, 3, 4, 1):
        images = torch.randn(batch, 3, 32, 32, device="cuda")
        torch.testing.assert_close(model.encode_image(images), plain.encode_image(images), rtol=1e-2, atol=1e-2)
    assert model._engine.prepared is not None
    assert len(model._engine.prepared.graphs._captured) == 2  # for batches of 1 and 4


@needs_gpu
def test_a_graph_captured_in_inference_mode_is_replayed_outside_of_it() -> None:
    model, plain = pair(VIT)
    images = torch.randn(2, 3, 32, 32, device="cuda")
    with torch.inference_mode():
        model.encode_image(images)
    assert torch.equal(model.encode_image(images), plain.encode_image(images))


@needs_gpu
def test_weights_that_change_are_captured_again() -> None:
    model, plain = pair(VIT)
    images = torch.randn(2, 3, 32, 32, device="cuda")
    before = model.encode_image(images)
    for encoder in (model, plain):
        encoder.visual.proj.mul_(-1)  # type: ignore[union-attr, operator]
    assert torch.equal(model.encode_image(images), plain.encode_image(images))
    assert not torch.equal(model.encode_image(images), before)


@needs_gpu
def test_several_threads_and_streams_replay_on_a_gpu() -> None:
    model, plain = pair(VIT)
    # Drawn beforehand, since PyTorch refuses random numbers on the GPU to other threads while one thread captures.
    batches = [[torch.randn(1 + i, 3, 32, 32, device="cuda") for _ in range(20)] for i in range(4)]
    torch.cuda.synchronize()

    def caller(i: int) -> list[bool]:
        with torch.cuda.stream(torch.cuda.Stream()):
            return [torch.equal(model.encode_image(images), plain.encode_image(images)) for images in batches[i]]

    with ThreadPoolExecutor(4) as pool:  # while one thread captures, another prepares the weights of `plain`
        assert all(all(equal) for equal in pool.map(caller, range(4)))
    assert model._engine.cuda_graphs  # no capture failed


@needs_gpu
def test_a_users_own_capture_holds_the_launches() -> None:
    model = ImageEncoder(VIT, random_tower(VIT).state_dict(), torch.device("cuda"), torch.float16)
    images = torch.randn(2, 3, 32, 32, device="cuda")
    wanted = model.encode_image(images)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = model.encode_image(images)
    graph.replay()
    assert torch.equal(got, wanted)
