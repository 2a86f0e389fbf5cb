"""A tower on its fast path: which way a batch goes, and with which weights.

Whose the tower is does not matter here: its weights are an `ImageEncoder`'s, or a module's of another package that
`accelerate` serves. They are folded into the form that the fast path reads when first needed, and again whenever they
have changed: a weight's version counts the writes to it. Some leave no trace there. Steps of optimisers that are
fused, or write to `weight.data`, and modules put into a tower are counted by hooks of ours; other such writes are
nowhere to be seen, and `clip_fast.accelerate(model)` called again reads everything anew.
"""

from __future__ import annotations

import itertools
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from itertools import chain
from operator import attrgetter, itemgetter
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.module import register_module_module_registration_hook
from torch.optim.optimizer import register_optimizer_step_post_hook

from . import cpu, graphs, resnet, vit, vit_cpu
from .config import IMAGE_MEAN, IMAGE_STD, Config, ResNetConfig, Rgb, VitConfig
from .graphs import Results
from .kernels import ops
from .kernels.targets import has_tf32

Precision = Literal["fp32", "tf32", "fp16", "bf16"]
Task = Literal["encode", "encode_tokens", "hidden_state", "hidden_states"]  # methods of the fast towers

_COMPUTE_DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_MEMORY_SHARE = 0.8  # of a GPU's free memory that a batch may take
_WHOLE_BATCH = 64  # images, up to which nobody asks how much is free

# PyTorch has no public name for what is at work in these.
_forward_ad: Any = torch.autograd.forward_ad
_functorch: Any = torch._C._functorch  # pyright: ignore
_MODES: Any = torch._C._TorchDispatchModeKey  # pyright: ignore
_mode: Callable[[Any], object] = torch._C._get_dispatch_mode  # pyright: ignore

_version, _cdata = attrgetter("_version"), attrgetter("cdata")
# What `StorageWeakRef.expired` asks, without its time.
_expired: Any = torch.UntypedStorage._expired  # pyright: ignore[reportPrivateUsage, reportUnknownMemberType, reportUnknownVariableType]


def _requires_grad(tensor: Tensor) -> bool:
    return tensor.requires_grad


def transformed() -> bool:
    """Whether torch.func or forward-mode differentiation sees more in tensors than their values."""
    return _forward_ad._current_level >= 0 or _functorch.maybe_current_level() is not None


def without_values(images: Tensor) -> bool:
    """Whether a trace is recorded, or tensors are fake: nothing may be prepared from them, or kept."""
    return (
        torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
        or isinstance(images, FakeTensor)
        or _mode(_MODES.FAKE) is not None
        or _mode(_MODES.PROXY) is not None
    )


class NotServed(ValueError):
    """Names the part of a model that the fast path does not serve."""


@dataclass(frozen=True)
class Source:
    """A tower, as the engine reads it."""

    config: Config
    modules: tuple[nn.Module, ...]  # that hold its weights
    state_dict: Callable[[], dict[str, Tensor]]  # the weights as they are now, under canonical names
    weight: Callable[[], Tensor]  # one of them, whose dtype and device are the tower's


@dataclass(frozen=True)
class _Prepared:
    """A tower's fast path, with what it was prepared from."""

    source: object  # tells whether the weights are still those
    storages: tuple[StorageWeakRef, ...]  # of the weights: while none has expired, no other has come to its address
    run: Callable[..., Results]  # images, the task, its arguments -> results
    graphs: graphs.Graphs  # of `run`


class Engine:
    """Runs a tower's tasks on batches of images.

    Args:
        source: the tower.
        precision: to compute in, see `ImageEncoder`; None is that of the weights' dtype, which must not be float64.
        mean, std: with which raw pixels are normalised.
        cuda_graphs: whether small batches may be replayed.
        dtype: of the results, by default that of the weights.
    """

    def __init__(
        self,
        source: Source,
        *,
        precision: Precision | None = None,
        mean: Rgb = IMAGE_MEAN,
        std: Rgb = IMAGE_STD,
        cuda_graphs: bool = True,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.source = source
        self.config = source.config
        self.precision = precision
        self.mean, self.std = mean, std
        self.cuda_graphs = cuda_graphs
        self.prepared: _Prepared | None = None
        self._dtype = dtype
        self._lock = threading.Lock()
        self._slots = [vars(m)[kind] for m in source.modules for kind in ("_parameters", "_buffers") if vars(m)[kind]]
        with _engines_lock:
            _ENGINES.add(self)
            _PARENTS.update((id(module), module) for module in source.modules)
        _follow()

    @property
    def device(self) -> torch.device:
        return self.source.weight().device

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype or self.source.weight().dtype

    @property
    def compute_dtype(self) -> torch.dtype:
        weight = self.source.weight()
        dtype = weight.dtype if self.precision is None else _COMPUTE_DTYPES[self.precision]
        if weight.device.type == "cpu" and not cpu.can_multiply(dtype) and not ops.triton_can_run(weight.device):
            return torch.float32
        return dtype

    def checked(self, images: Tensor) -> Tensor:
        """`images` on the tower's device as (B, 3, H, W).

        Raises:
            ValueError, TypeError: say what is wrong with their shape or dtype.
        """
        size = self.config.image_size
        if images.dtype == torch.uint8 and images.ndim == 4 and images.shape[1:] == (size, size, 3):
            images = images.permute(0, 3, 1, 2)
        if images.ndim != 4 or images.shape[1:] != (3, size, size):
            raise ValueError(f"images must be [batch, 3, {size}, {size}], got {list(images.shape)}")
        if not images.is_floating_point() and images.dtype != torch.uint8:
            raise TypeError(f"images must be of a floating-point dtype, or raw pixels in uint8, got {images.dtype}")
        return images.to(self.device)

    def gradients_wanted(self, images: Tensor) -> bool:
        """Whether gradients are enabled, and the images or a weight require them."""
        if not torch.is_grad_enabled():
            return False
        return images.requires_grad or any(map(_requires_grad, self._tensors()))

    def row_shapes(self, task: Task) -> list[tuple[int, ...]]:
        """Shapes of a task's results behind the batch."""
        config = self.config
        if task == "encode" or not isinstance(config, VitConfig):
            return [(config.embed_dim,)]
        if task == "encode_tokens":
            return [(config.embed_dim,), (config.tokens - 1, config.width)]
        return [(config.tokens, config.width)] * (config.layers + 1 if task == "hidden_states" else 1)

    def run(self, images: Tensor, task: Task, *arguments: int) -> Results:
        """A task's results for checked images. Gradients do not flow through it."""
        if len(images) == 0:
            return self.empty(images, task)
        current = torch.cuda.device(images.device) if images.is_cuda else nullcontext()
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False), current:
            fast = self._fast_path()
            bucket = self._bucket(images)
            if bucket is not None and graphs.allowed():
                try:
                    return fast.graphs(bucket, images, task, *arguments)
                except torch.OutOfMemoryError:
                    self.cuda_graphs = False  # what memory there is serves better without
                except RuntimeError as error:
                    self.cuda_graphs = False
                    warnings.warn(f"clip_fast launches its kernels one by one from now on: {error}", stacklevel=2)
                fast.graphs.release()
            return self.in_parts(images, lambda part: fast.run(part, task, *arguments), task)

    def in_parts(self, images: Tensor, run: Callable[[Tensor], Results], task: Task = "encode") -> Results:
        """`run` over the batch in parts that fit into memory; a GPU that runs out of it is asked for half as much."""
        limit = self._fitting(images, task)
        while True:
            try:
                parts = [run(part) for part in torch.tensor_split(images, -(-len(images) // limit))]
                break
            except torch.OutOfMemoryError:
                if limit == 1:
                    raise
                limit = -(-min(limit, len(images)) // 2)
        return tuple(column[0] if len(column) == 1 else torch.cat(column) for column in zip(*parts, strict=True))

    def _bucket(self, images: Tensor) -> int | None:
        """The batch size of the CUDA graph that encodes `images`; None: none does."""
        if not (images.is_cuda and self.cuda_graphs and ops.triton_can_run(images.device)):
            return None
        return graphs.bucket_of(len(images), self._operations)

    @property
    def _operations(self) -> float | None:
        """About how many an image takes; None of a ResNet, whose convolutions are many for each weight."""
        config = self.config
        if not isinstance(config, VitConfig):
            return None
        return 2 * config.tokens * config.layers * (4 * config.width**2 + 2 * config.width * config.mlp_width)

    def _fitting(self, images: Tensor, task: Task) -> int:
        """How many of the images are encoded together."""
        config = self.config
        if images.device.type == "cpu":
            rows = vit_cpu.ROWS_AT_A_TIME if isinstance(config, VitConfig) else resnet.ROWS_AT_A_TIME
            return cpu.images_at_a_time(rows, config.tokens)
        if len(images) <= _WHOLE_BATCH or not images.is_cuda or torch.cuda.is_current_stream_capturing():
            return max(1, len(images))
        free = torch.cuda.mem_get_info(images.device)[0]
        free += torch.cuda.memory_reserved(images.device) - torch.cuda.memory_allocated(images.device)
        elements = vit.activations(config) if isinstance(config, VitConfig) else resnet.activations(config)
        elements += sum(map(_product, self.row_shapes(task)))
        fitting = max(1, int(_MEMORY_SHARE * free / (elements * self.compute_dtype.itemsize)))
        return fitting if isinstance(config, VitConfig) else min(fitting, resnet.most_images(config))

    def empty(self, images: Tensor, task: Task) -> Results:
        """Results without values, of as many rows as there are images."""
        shapes = self.row_shapes(task)
        return tuple(images.new_empty(len(images), *s, dtype=self.dtype, device=self.device) for s in shapes)

    # --- weights -----------------------------------------------------------------------------------------------------

    def _tensors(self) -> list[Tensor]:
        """The tower's parameters and buffers, without their walk through all modules: this runs at every call."""
        return [tensor for slot in self._slots for tensor in slot.values() if tensor is not None]

    def _fast_path(self) -> _Prepared:
        """The fast path, prepared again where the tower's tensors have changed."""
        tensors = self._tensors()
        source = (self.precision, ops.triton_can_run(tensors[0].device), _unseen, _fingerprint(tensors))
        prepared = self.prepared
        if prepared is None or _changed(prepared, source):
            with self._lock, torch.inference_mode(False), torch.no_grad():
                prepared = self.prepared
                if prepared is None or _changed(prepared, source):
                    storages = tuple(StorageWeakRef(tensor.untyped_storage()) for tensor in tensors)
                    run = self._prepare()
                    if tensors[0].is_cuda and not torch.cuda.is_current_stream_capturing():
                        graphs.synchronize()  # other streams read these weights, and the last ones
                    prepared = self.prepared = _Prepared(source, storages, run, graphs.Graphs(run))
        return prepared

    def _prepare(self) -> Callable[..., Results]:
        """The tower's fast path on this device, as `_Prepared.run`, which does not hold on to the engine."""
        config, dtype, result_dtype = self.config, self.compute_dtype, self.dtype
        state = {name: t.clone() if t.is_inference() else t for name, t in self.source.state_dict().items()}
        mean, std = self.mean, self.std
        precision: ops.Precision = "tf32" if self.precision == "tf32" and has_tf32(self.device) else "ieee"
        if isinstance(config, ResNetConfig):
            resnet_weights = resnet.prepare(state, config, dtype, mean, std, precision)

            def line(images: Tensor, task: Task, *arguments: int) -> Tensor | Results:
                return resnet.encode(resnet_weights, images)
        elif ops.triton_can_run(self.device):
            weights = vit.prepare(state, config, dtype, mean, std, precision)

            def line(images: Tensor, task: Task, *arguments: int) -> Tensor | Results:
                return getattr(vit, task)(weights, images, *arguments, precision=precision)
        else:
            cpu_weights = vit_cpu.prepare(state, config, dtype)

            def line(images: Tensor, task: Task, *arguments: int) -> Tensor | Results:
                return getattr(vit_cpu, task)(cpu_weights, normalised(images, dtype, mean, std), *arguments)

        def run(images: Tensor, task: Task, *arguments: int) -> Results:
            return tuple(result.to(result_dtype) for result in as_tuple(line(images, task, *arguments)))

        return run


def _fingerprint(tensors: list[Tensor]) -> object:
    """Changes whenever a weight is written to, or another tensor takes its place.

    Every tensor counts the writes to it, in its version; one that stands for another has another address, as long as
    the other is not gone, or is a view of it and another object. Tensors made in inference mode count nothing: with one
    of them, nothing is known.
    """
    try:
        return tuple(map(id, tensors)), tuple(map(torch.Tensor.data_ptr, tensors)), tuple(map(_version, tensors))
    except RuntimeError:  # a tensor made in inference mode
        warnings.warn(
            "weights were made in inference mode, where PyTorch counts no changes: clip_fast prepares them at every "
            "call. Make them outside of it, or clone them there.",
            stacklevel=2,
        )
        return object()  # equal to nothing


def _changed(prepared: _Prepared, source: object) -> bool:
    return prepared.source != source or any(map(_expired, map(_cdata, prepared.storages)))


def _product(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def normalised(images: Tensor, dtype: torch.dtype, mean: Rgb, std: Rgb) -> Tensor:
    """Images as the plain tower takes them, in `dtype`."""
    if images.dtype == torch.uint8:
        wide = torch.promote_types(dtype, torch.float32)
        mu, sigma = (torch.tensor(x, dtype=wide, device=images.device)[:, None, None] for x in (mean, std))
        images = (images.to(wide) / 255 - mu) / sigma
    return images.to(dtype)


def as_tuple(result: Tensor | Results) -> Results:
    return result if isinstance(result, tuple) else (result,)


# --- what changes weights and leaves their versions as they are ------------------------------------------------------

_ENGINES: weakref.WeakSet[Engine] = weakref.WeakSet()
_PARENTS: weakref.WeakValueDictionary[int, nn.Module] = weakref.WeakValueDictionary()  # their towers' modules, by id
_engines_lock = threading.Lock()
_unseen = 0  # events after which any weight may have changed


@cache
def _follow() -> None:
    register_optimizer_step_post_hook(_count_step)  # pyright: ignore[reportUnknownMemberType]
    register_module_module_registration_hook(_count_module)


def _count_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Counts an optimiser's step in the versions of our weights, which one that is fused does not.

    Between calls FSDP has shards in a tower, which its optimisers step: from them weights are gathered that keep their
    identity and version.
    """
    global _unseen
    with _engines_lock:
        engines = list(_ENGINES)
    ours = {id(tensor) for engine in engines for tensor in engine._tensors()}  # pyright: ignore[reportPrivateUsage]
    stepped: list[Tensor] = [p for group in optimizer.param_groups for p in group["params"] if id(p) in ours]
    torch.autograd.graph.increment_version(stepped)
    _unseen += any(type(p) not in (Tensor, nn.Parameter) for p in stepped)


def _count_module(parent: nn.Module, *_: Any) -> None:
    """Counts what is put into a tower: peft puts adapters around its modules, adds to `weight.data`, and puts the same
    modules back.

    It is called for every module of this process. Graphs of anyone's in which a module is made, be it a slice of a
    `ModuleList`, would hold only until the next tower or count, were they to see this.
    """
    global _unseen
    if not torch.compiler.is_compiling():
        _unseen += id(parent) in _PARENTS


# --- the modules of a tower ------------------------------------------------------------------------------------------

_hooks_of = itemgetter("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Watch:
    """The modules of a tower, and whether any was replaced or hooked since.

    It looks at the dictionaries in which modules keep these, and walks through none of them: this runs at every call.

    Args:
        called: whether the tower is called as a module, so that its own hooks run and concern nobody here.
    """

    def __init__(self, tower: nn.Module, *, called: bool = True) -> None:
        self.modules: tuple[nn.Module, ...] = tuple(tower.modules())  # held, so that no other takes an identity
        self._children = tuple(vars(module)["_modules"] for module in self.modules)
        self._identities = self._now()
        self._hooked = tuple(map(vars, self.modules[1:] if called else self.modules))

    def _now(self) -> tuple[int, ...]:
        return tuple(map(id, chain.from_iterable(map(dict[str, Any].values, self._children))))

    def replaced(self) -> bool:
        """Whether a child stands for another."""
        return self._now() != self._identities

    def hooked(self) -> bool:
        """Whether a user hooked a module whose hooks the fast path would not run."""
        hooks: Iterable[dict[int, Any]] = chain.from_iterable(map(_hooks_of, self._hooked))  # which may be new ones
        return any(_foreign(some) for some in hooks if some)


def _foreign(hooks: dict[int, Any]) -> bool:
    """Whether any is a user's: transformers installs some that do nothing unless it asked for outputs itself."""
    return any(getattr(hook, "__module__", "") != "transformers.utils.output_capturing" for hook in hooks.values())


# --- in compiled graphs ----------------------------------------------------------------------------------------------

_OWNERS: dict[str, tuple[weakref.ref[Any], Callable[..., Results], Callable[..., Results]]] = {}
_NUMBERS = itertools.count()


def register(owner: object, run: Callable[..., Results], empty: Callable[..., Results]) -> str:
    """Names an owner of towers for compiled graphs.

    torch.compile sees one operator, which finds its owner by this name when it runs. Whatever has happened to the
    weights or the modules since is seen as ever.

    Args:
        owner: held weakly.
        run: of the owner, images, a task, its arguments -> the task's results.
        empty: of the owner, images, a task -> results without values, of the same shapes.
    """
    name = str(next(_NUMBERS))
    _OWNERS[name] = weakref.ref(owner, lambda _: _OWNERS.pop(name)), run, empty
    return name


def compiled(name: str, images: Tensor, task: Task, *arguments: int) -> Results:
    """A task of the owner `name`, as one operator of a compiled graph."""
    return tuple(torch.ops.clip_fast.encode(images, name, task, list(arguments)))


# Not in CUDA graphs of torch.compile's, whose replays would see no change of the weights.
@torch.library.custom_op("clip_fast::encode", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _encode(images: Tensor, name: str, task: str, arguments: list[int]) -> list[Tensor]:
    owner, run, _ = _OWNERS[name]
    with graphs.launches_only():
        return [result.contiguous() for result in run(owner(), images, cast(Task, task), *arguments)]


@_encode.register_fake  # pyright: ignore[reportUnknownMemberType]
def _(images: Tensor, name: str, task: str, arguments: list[int]) -> list[Tensor]:
    owner, _, empty = _OWNERS[name]
    return list(empty(owner(), images, cast(Task, task)))
