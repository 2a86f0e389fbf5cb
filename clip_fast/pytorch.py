"""The names of PyTorch that are not public, all in one place, and what happens in a release that has lost one.

`import clip_fast` works without any of them. A missing name costs speed, never correctness: where it would have told
whether the fast path is right, the fast path is not taken.

* `_current_level`, `maybe_current_level` tell whether torch.func or forward-mode differentiation is at work. Without
  them the plain tower runs.
* `FakeTensor`, `_get_dispatch_mode`, `_TorchDispatchModeKey` tell whether tensors have values. Without them the plain
  tower runs.
* Four dictionaries of hooks tell whether there are hooks on all modules. Without it the plain tower runs.
* `_version`, `StorageWeakRef`, `_expired` and two registrations of hooks tell whether weights have changed. Without
  them weights are prepared anew at every call.
* oneDNN's and MKL's operators are fused products and convolutions for CPUs. Without them PyTorch's public operators
  compute.
* `Tag.cudagraph_unsafe` keeps our operator out of the CUDA graphs of torch.compile, whose replays would see no change
  of the weights. Without it, as in PyTorch 2.7, a program that torch.compile makes for a GPU has the plain tower.
* `_get_mkldnn_serialized_md` tells whether two packed weights are laid out alike. Without it a convolution keeps two.
* `_new_shared` makes a tensor in shared memory. Without it one is made elsewhere, and moved there.
* `_dynamo_marked_constant` has torch.compile call a function, and not trace it. Without it a graph breaks there.
* `_replicate_for_data_parallel` makes replicas of `DataParallel` run the original. Without it replicas are as PyTorch
  makes them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from operator import attrgetter
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

_Function = TypeVar("_Function", bound=Callable[..., Any])


def _found(module: str, path: str = "") -> Any:
    """The object at `path` in a module; None where there is none."""
    try:
        return attrgetter(path)(importlib.import_module(module)) if path else importlib.import_module(module)
    except (ImportError, AttributeError, RuntimeError):
        return None


# --- shared memory ---------------------------------------------------------------------------------------------------

_new_shared: Any = _found("torch", "UntypedStorage._new_shared")


def shared_zeros(count: int) -> Tensor:
    """`count` zeros, one or more, uint8 (count,), in shared memory, which the operating system has cleared.

    Raises:
        RuntimeError: there is no room.
    """
    zeros = torch.zeros(count if _new_shared is None else 0, dtype=torch.uint8, device="cpu")
    zeros.share_memory_() if _new_shared is None else zeros.set_(_new_shared(count))
    return zeros


# --- what is at work around a call -----------------------------------------------------------------------------------

_forward_ad: Any = _found("torch.autograd.forward_ad")
_maybe_current_level: Any = _found("torch", "_C._functorch.maybe_current_level")
_FakeTensor: Any = _found("torch._subclasses.fake_tensor", "FakeTensor")
_get_dispatch_mode: Any = _found("torch", "_C._get_dispatch_mode")
_MODES: Any = [_found("torch", f"_C._TorchDispatchModeKey.{name}") for name in ("FAKE", "PROXY")]
_GLOBAL_HOOKS: Any = [
    _found("torch.nn.modules.module", f"_global_{kind}_hooks")
    for kind in ("backward_pre", "backward", "forward", "forward_pre")
]


def transformed() -> bool:
    """Whether torch.func or forward-mode differentiation sees more in tensors than their values."""
    level: int | None = getattr(_forward_ad, "_current_level", None)
    if level is None or _maybe_current_level is None:
        return True
    return level >= 0 or _maybe_current_level() is not None


def without_values(images: Tensor) -> bool:
    """Whether a trace is recorded, or tensors are fake: nothing may be prepared from them, or kept."""
    if torch.jit.is_tracing() or _FakeTensor is None or _get_dispatch_mode is None:  # pyright: ignore[reportPrivateImportUsage]
        return True
    return isinstance(images, _FakeTensor) or any(
        mode is None or _get_dispatch_mode(mode) is not None for mode in _MODES
    )


def has_global_hook() -> bool:
    """Whether hooks are registered that run at every module."""
    return any(hooks is None or len(hooks) > 0 for hooks in _GLOBAL_HOOKS)


CUDAGRAPH_UNSAFE: Any = _found("torch", "Tag.cudagraph_unsafe")


def may_be_replayed(images: Tensor) -> bool:
    """Whether torch.compile may put an operator on `images` into a CUDA graph of its own."""
    return images.is_cuda and CUDAGRAPH_UNSAFE is None


# --- changes of weights ----------------------------------------------------------------------------------------------

StorageWeakRef: Any = _found("torch.multiprocessing.reductions", "StorageWeakRef")
storage_expired: Any = _found("torch", "UntypedStorage._expired")  # what `StorageWeakRef.expired` asks, and faster
register_step_hook: Any = _found("torch.optim.optimizer", "register_optimizer_step_post_hook")
register_module_hook: Any = _found("torch.nn.modules.module", "register_module_module_registration_hook")

version = attrgetter("_version")  # counts the writes to a tensor
SEES_CHANGES = all(
    each is not None for each in (StorageWeakRef, storage_expired, register_step_hook, register_module_hook)
) and hasattr(Tensor, "_version")


# --- fast operators for CPUs -----------------------------------------------------------------------------------------

linear_pointwise: Any = _found("torch", "ops.mkldnn._linear_pointwise")
reorder_linear_weight: Any = _found("torch", "ops.mkldnn._reorder_linear_weight")
convolution_pointwise: Any = _found("torch", "ops.mkldnn._convolution_pointwise")
convolution_pointwise_: Any = _found("torch", "ops.mkldnn._convolution_pointwise_")
reorder_convolution_weight: Any = _found("torch", "ops.mkldnn._reorder_convolution_weight")
_layout_of: Any = _found("torch", "ops.mkldnn._get_mkldnn_serialized_md")
mkl_linear: Any = _found("torch", "ops.mkl._mkl_linear")
mkl_reorder_linear_weight: Any = _found("torch", "ops.mkl._mkl_reorder_linear_weight")
_ONEDNN = (
    linear_pointwise,
    reorder_linear_weight,
    convolution_pointwise,
    convolution_pointwise_,
    reorder_convolution_weight,
)
_MKL = (mkl_linear, mkl_reorder_linear_weight)
_INSTRUCTIONS: dict[torch.dtype, Any] = {
    torch.float16: _found("torch", "ops.mkldnn._is_mkldnn_fp16_supported"),
    torch.bfloat16: _found("torch", "ops.mkldnn._is_mkldnn_bf16_supported"),
}


def has_onednn() -> bool:
    """Whether this build has oneDNN's fused operators."""
    return torch.backends.mkldnn.is_available() and all(op is not None for op in _ONEDNN)


def same_layout(packed: Tensor, other: Tensor) -> bool:
    """Whether oneDNN has laid two packed weights out alike; False in a release that does not tell."""
    return _layout_of is not None and torch.equal(_layout_of(packed), _layout_of(other))


def has_mkl() -> bool:
    """Whether this build has MKL's packed products."""
    return torch.backends.mkl.is_available() and all(op is not None for op in _MKL)


def onednn_multiplies(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies in a half precision on this CPU, by its own or by emulating instructions."""
    supported = _INSTRUCTIONS[dtype]
    return torch.backends.mkldnn.is_available() and supported is not None and supported()


# --- torch.compile ---------------------------------------------------------------------------------------------------


def constant_in_graphs(function: _Function) -> _Function:
    """As `torch.compiler.assume_constant_result`, which would import all of torch.compile.

    A graph has what the function returns while the graph is made.
    """
    cast(Any, function)._dynamo_marked_constant = True
    return function


# --- modules ---------------------------------------------------------------------------------------------------------


def data_parallel_replica(module: nn.Module) -> Any:
    """`module` as `DataParallel` replicates it; None where this release does so otherwise."""
    replicate = getattr(type(module), "_replicate_for_data_parallel", None)
    return None if replicate is None else replicate(module)
