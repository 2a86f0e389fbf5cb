"""Image towers of other packages: which modules they are, and their shape and weights under canonical names.

A tower is served if its mathematics is that of `towers/reference.py`. Everything in it must be known: a module of
another class (an adapter, a quantised layer), a replaced method, another epsilon, stride or pooling makes it
`NotServed`.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from itertools import chain
from typing import Any, get_args

import torch
from torch import Tensor, nn

from ..checkpoint.layouts import hugging_face_keys, timm_keys
from ..engine.tower import Tower, plain_tensors, replaced_method
from ..errors import NotServed
from ..towers import reference
from ..towers.config import Activation, Config, ImageSize, Pool, ResNetConfig, SiglipConfig, VitConfig, image_size_of
from . import instance

_CLIP = {
    "clip.model.VisionTransformer",
    "clip.model.ModifiedResNet",
    "open_clip.transformer.VisionTransformer",
    "open_clip.modified_resnet.ModifiedResNet",
}
_MODELS = "transformers.models"
_MODELING = (f"{_MODELS}.clip.modeling_clip.CLIP", f"{_MODELS}.metaclip_2.modeling_metaclip_2.MetaClip2")
# The tower is the first of these in transformers 4, and the second in 5, whose class has no tower inside.
_TRANSFORMERS = {f"{family}Vision{name}" for family in _MODELING for name in ("Transformer", "Model")}
_PARTS = ("VisionEmbeddings", "Encoder", "EncoderLayer", "MLP", "Attention", "SdpaAttention", "FlashAttention2")

_MODELING_SIGLIP = "transformers.models.siglip.modeling_siglip"
_SIGLIP = {f"{_MODELING_SIGLIP}.SiglipVisionTransformer", f"{_MODELING_SIGLIP}.SiglipVisionModel"}  # as above
_TIMM = {"timm.models.vision_transformer.VisionTransformer"}
_TIMM_POOL = "timm.layers.attention_pool.AttentionPoolLatent"

_KNOWN = (
    _CLIP
    | _TRANSFORMERS
    | _SIGLIP
    | _TIMM
    | {f"{_MODELING_SIGLIP}.Siglip{name}" for name in (*_PARTS, "MultiheadAttentionPoolingHead")}
    | {"timm.models.vision_transformer.Block", "timm.layers.patch_embed.PatchEmbed", _TIMM_POOL}
    | {"timm.layers.attention.Attention", "timm.layers.mlp.Mlp", "timm.layers.norm.LayerNorm"}
    | {"torch.nn.modules.dropout.Dropout"}
    | {f"clip.model.{name}" for name in ("Transformer", "ResidualAttentionBlock", "LayerNorm")}
    | {f"open_clip.transformer.{name}" for name in ("Transformer", "ResidualAttentionBlock", "LayerNorm")}
    | {"open_clip.transformer.LayerNormFp32", "open_clip.transformer.LayerScale"}
    | {f"clip.model.{name}" for name in ("Bottleneck", "AttentionPool2d")}
    | {f"open_clip.modified_resnet.{name}" for name in ("Bottleneck", "AttentionPool2d")}
    | {f"{family}{name}" for family in _MODELING for name in _PARTS}
    | {f"torch.nn.modules.{name}" for name in ("linear.Linear", "linear.Identity", "conv.Conv2d", "sparse.Embedding")}
    | {"torch.nn.modules.linear.NonDynamicallyQuantizableLinear", "torch.nn.modules.activation.MultiheadAttention"}
    | {"torch.nn.modules.normalization.LayerNorm", "torch.nn.modules.batchnorm.BatchNorm2d"}
    | {"torchvision.ops.misc.FrozenBatchNorm2d", "torch.nn.modules.pooling.AvgPool2d"}
    | {"torch.nn.modules.activation.ReLU", "torch.nn.modules.container.Sequential"}
    | {"torch.nn.modules.container.ModuleList", "open_clip.transformer.PatchDropout"}
)

# transformers computes the same attention by any of these. None means "eager" in its older releases.
_ATTENTIONS = (
    None, "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4", "flex_attention"
)  # fmt: skip
_INTEGRATIONS = "transformers.integrations."  # the modules of its own functions for them


def find(model: nn.Module) -> list[nn.Module]:
    """The image towers in a model.

    Raises:
        NotServed: the model has no known image tower.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise NotServed("the model is a TorchScript program, whose parts cannot be replaced: load it with jit=False")
    towers = list(filter(is_tower, model.modules()))
    if not towers:
        raise NotServed(
            f"no image tower of openai-clip, open_clip or transformers' CLIP or SigLIP in {_image_part(model)}"
        )
    return towers


def is_tower(module: nn.Module) -> bool:
    """Whether it is an image tower of a known class."""
    return gives_embeddings(module) or is_transformers(module)


def is_clip(module: nn.Module) -> bool:
    """Whether it is a tower of openai-clip or open_clip, which gives embeddings."""
    return _class(module) in _CLIP


def is_timm(module: nn.Module) -> bool:
    """Whether it is a SigLIP tower of timm's, as in open_clip, which gives embeddings."""
    return _class(module) in _TIMM and _class(getattr(module, "attn_pool", module)) == _TIMM_POOL


def gives_embeddings(module: nn.Module) -> bool:
    """Whether it is a tower whose result is embeddings, and perhaps patch tokens beside them."""
    return is_clip(module) or is_timm(module)


def is_transformers(module: nn.Module) -> bool:
    """Whether it is a tower of transformers, which gives hidden states. CLIP's has no projection."""
    return is_siglip_of_transformers(module) or (_class(module) in _TRANSFORMERS and hasattr(module, "pre_layrnorm"))


def is_siglip_of_transformers(module: nn.Module) -> bool:
    return _class(module) in _SIGLIP and hasattr(module, "post_layernorm")


def is_inside_siglip(module: nn.Module) -> bool:
    """Whether it is the tower inside of transformers 4's SiglipVisionModel."""
    return _class(module) == f"{_MODELING_SIGLIP}.SiglipVisionTransformer"


def is_siglip(module: nn.Module) -> bool:
    return is_timm(module) or is_siglip_of_transformers(module)


def _class(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _image_part(model: nn.Module) -> str:
    for path in ("visual.trunk", "visual", "vision_model", "vision_tower"):
        try:
            return f"the {_class(model)}: its {path} is a {_class(model.get_submodule(path))}"
        except AttributeError:
            continue
    return f"the {_class(model)}"


def read(tower: nn.Module) -> Tower:
    """A tower's shape, and where its weights are.

    Raises:
        NotServed: a part of it is not known; the message names the part.
    """
    try:
        config = _config(tower)
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise NotServed(f"its parts are not those that its class makes: {error}") from error
    with torch.device("meta"):
        plain: nn.Module = reference.build(config)
    _check_modules(tower, config.eps)
    shapes = {name: tensor.shape for name, tensor in plain.state_dict().items()}
    keys = _keys(tower)

    def weights() -> Mapping[str, Tensor]:
        found = plain_tensors(_weights(tower))
        _check_positions(found)
        return found

    def state_dict() -> dict[str, Tensor]:
        return _canonical(weights(), shapes, keys)

    _canonical({name: tensor.to("meta") for name, tensor in weights().items()}, shapes, keys)  # has it all?
    if is_clip(tower):
        _check_wiring(tower, plain)
        _require(_computes_as_ours(type(tower)), f"its {_class(tower)} computes something else than the package's own")
    convolution = _convolution(tower)
    return Tower(config, tuple(tower.modules()), state_dict, lambda: convolution.weight)


@cache
def _computes_as_ours(kind: Any) -> bool:
    """Whether a class of openai-clip's or open_clip's name computes what ours does: a small tower of it is tried.

    Programs that bring a changed copy of openai-clip's model along give it the same name. A class of open_clip's that
    is made by other arguments is trusted, since a later release may have changed them.
    """
    openai, residual = kind.__module__ == "clip.model", kind.__qualname__ == "ModifiedResNet"
    side = 64 if residual else 8
    shape: dict[str, Any] = {"output_dim": 32, "input_resolution" if openai else "image_size": side}
    if residual:
        shape |= {"layers": (1, 1, 1, 1), "heads": 4, "width": 8}
    else:
        shape |= {"layers": 1, "heads": 1, "width": 64, "patch_size": 4} | ({} if openai else {"mlp_ratio": 4.0})
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        torch.device("cpu"),
        torch.autocast("cpu", enabled=False),
        torch.random.fork_rng(devices=[]),  # pyright: ignore[reportUnknownMemberType]
    ):
        try:
            tower: nn.Module = kind(**shape).float().eval()
            for weight in tower.parameters():
                weight.normal_(std=0.2)
            images = torch.randn(2, 3, side, side, dtype=torch.float32)
        except (TypeError, AttributeError, ValueError):
            return not openai
        plain: nn.Module = reference.build(_config(tower)).float().eval()
        plain.load_state_dict(_weights(tower), strict=False)
        wanted, got = plain(images), tower(images)
    return isinstance(got, Tensor) and got.shape == wanted.shape and bool((got - wanted).norm() < 1e-3 * wanted.norm())


def _config(tower: Any) -> Config:
    if is_siglip_of_transformers(tower):
        return _siglip_config(tower)
    if is_transformers(tower):
        return _transformers_config(tower)
    if is_timm(tower):
        return _timm_config(tower)
    return _resnet_config(tower) if hasattr(tower, "attnpool") else _vit_config(tower)


def _weights(tower: nn.Module) -> dict[str, Tensor]:
    """A tower's weights as `state_dict` names them, without its hooks: FSDP's hook would shard whole weights."""
    named = tower.named_parameters(remove_duplicate=False), tower.named_buffers(remove_duplicate=False)
    return {name: tensor.detach() for name, tensor in chain(*named)}


def _convolution(tower: nn.Module) -> Any:
    """The convolution that reads the images."""
    if is_timm(tower):
        return tower.get_submodule("patch_embed.proj")
    return tower.get_submodule("embeddings.patch_embedding" if is_transformers(tower) else "conv1")


def weight(tower: nn.Module) -> Tensor:
    """A weight whose dtype and device are the tower's, also where modules of the tower have been replaced."""
    return next(_convolution(tower).parameters())


JUDGED = (  # the attributes that `read` judges
    "eps", "num_heads", "attn_mask", "scale", "is_causal", "input_resolution", "image_size", "pool_type",
    "final_ln_after_pool", "global_pool", "pool", "dynamic_img_size", "dynamic_img_pad", "flatten", "use_head",
    "batch_first", "head_dim", "add_zero_attn", "approximate", "kernel_size", "stride", "padding", "dilation", "groups",
    "padding_mode", "ceil_mode", "count_include_pad", "divisor_override", "max_norm",
)  # fmt: skip


def attention_setting(tower: nn.Module) -> tuple[object, object]:
    """The attention implementation that a tower of transformers looks up at every call, and the function of this name.

    `read` judges both. The function is None where transformers has no table of them, or none of this name.
    """
    name = getattr(vars(tower).get("config"), "_attn_implementation", None)
    functions: Any = getattr(sys.modules.get("transformers.modeling_utils"), "ALL_ATTENTION_FUNCTIONS", {})
    return name, functions.get(name) if isinstance(name, str) else None


def _canonical(
    state: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], keys: Callable[[str], list[str]]
) -> dict[str, Tensor]:
    """The weights in `state` under the canonical names of `shapes`; `keys` gives the parts of each."""
    result: dict[str, Tensor] = {}
    used: set[str] = set()
    for name, shape in shapes.items():
        if name.endswith("num_batches_tracked"):
            continue
        names = keys(name)
        if not names:  # in transformers the projection is outside of the tower
            result[name] = torch.eye(*shape, device=next(iter(state.values())).device)
            continue
        if missing := [key for key in names if key not in state]:
            raise NotServed(f"the tower has no {missing[0]}")
        parts = [state[key] for key in names]
        tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
        if tensor.shape == (1, *shape):  # timm keeps the batch's dimension
            tensor = tensor[0]
        if tensor.shape != shape:
            raise NotServed(f"{names[0]} is {list(tensor.shape)}, expected {list(shape)}")
        result[name] = tensor
        used.update(names)
    spare = [key for key in state if key not in used and not key.endswith(("num_batches_tracked", "position_ids"))]
    if spare:
        raise NotServed(f"the tower has an unknown weight {spare[0]}")
    return result


def _keys(tower: nn.Module) -> Callable[[str], list[str]]:
    """What a tower calls the parts of a weight, given its canonical name."""
    if is_timm(tower):
        return timm_keys
    return _transformers_keys if is_transformers(tower) else lambda name: [name]


def _transformers_keys(name: str) -> list[str]:
    return [] if name == "proj" else [key.removeprefix("vision_model.") for key in hugging_face_keys(name)]


def _check_positions(weights: Mapping[str, Tensor]) -> None:
    for name, order in weights.items():
        if name.endswith("position_ids") and not order.is_meta:
            in_order = torch.arange(order.numel(), device=order.device)
            _require(torch.equal(order.flatten().to(in_order), in_order), "its position_ids are not in order")


def _check_modules(tower: Any, expected: float) -> None:
    """Checks that every module is known, and as its class makes it; `expected` is the epsilon of norms."""
    for name, module in _named(tower).items():
        name = name or "the tower"
        if name.endswith((".gelu", ".activation_fn", ".act")):
            continue  # `_activation` judges it
        if _class(module) not in _KNOWN:
            raise NotServed(f"{name} is a {_class(module)}")
        if method := replaced_method(module, instance.attributes(module)) or _patched(type(module)):
            raise NotServed(f"{name} has its own {method}")
        eps: float | None = getattr(module, "eps", None)
        if eps is not None and eps != expected:
            raise NotServed(f"{name} has eps {eps}, expected {expected}")
        if isinstance(module, nn.ModuleList):
            order = [child for child, _ in module.named_children()]
            _require(order == [str(i) for i in range(len(order))], f"{name} runs {order}")


def _patched(cls: type) -> str | None:
    """The name of a method of a known class that someone has replaced by another function."""
    for base in cls.__mro__:
        if f"{base.__module__}.{base.__qualname__}" in _KNOWN:
            for name, method in vars(base).items():
                if inspect.isfunction(method) and not is_own(base, name, method):
                    return name
    return None


def is_own(kind: type, name: str, method: Any) -> bool:
    """Whether the method of this name was defined in the class, and not put there by someone else."""
    if (method.__module__, method.__qualname__) != (kind.__module__, f"{kind.__qualname__}.{name}"):
        return False
    # `functools.wraps` copies these names, and not the globals of the module where a function was defined.
    packages = {"torch", kind.__module__.partition(".")[0]}
    while method is not None:
        if str(getattr(method, "__globals__", {}).get("__name__")).partition(".")[0] not in packages:
            return False
        method = getattr(method, "__wrapped__", None)
    return True


def _named(tower: Any) -> dict[str, nn.Module]:
    modules: Iterable[tuple[str, nn.Module]] = tower.named_modules()
    return dict(modules)


def _check_wiring(tower: nn.Module, plain: nn.Module) -> None:
    """Checks what the weights of openai-clip's and open_clip's towers cannot tell: strides, pools, order of layers."""
    twins, modules = _named(plain), _named(tower)
    for name, module in modules.items():
        twin, leaf = twins.get(name), name.rpartition(".")[2]
        if isinstance(module, nn.Sequential):
            children = [child for child, _ in module.named_children()]
            expected = [child for child, _ in twin.named_children()] if twin is not None else []
            _require(children == expected, f"{name} runs {children}, expected {expected}")
        if leaf.startswith(("relu", "act")):
            _require(type(module) is nn.ReLU, f"{name} is a {_class(module)}")
        elif isinstance(twin, nn.Conv2d | nn.AvgPool2d | nn.Identity):
            _require(_geometry(module) == _geometry(twin), f"{name} is {module}, expected {twin}")


def _geometry(module: nn.Module) -> tuple[object, ...]:
    names = (
        "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode", "ceil_mode", "count_include_pad",
        "divisor_override",
    )  # fmt: skip
    return type(module), *(_pair(getattr(module, name, None)) for name in names)


def _pair(value: object) -> object:
    return (value, value) if isinstance(value, int) else value


# --- shapes ----------------------------------------------------------------------------------------------------------


def _require(condition: bool, problem: str) -> None:
    if not condition:
        raise NotServed(problem)


def _square(name: str, value: Any) -> int:
    if not isinstance(value, int):
        _require(value[0] == value[1], f"{name} is not square, but {tuple(value)}")
        value = value[0]
    return int(value)


def _image_size(value: Any) -> ImageSize:
    return value if isinstance(value, int) else image_size_of(*map(int, value))


def _only(name: str, values: Iterator[Any]) -> Any:
    different = set(values)
    _require(len(different) == 1, f"blocks differ in their {name}: {sorted(map(str, different))}")
    return different.pop()


def _patch_size(convolution: Any, bias: bool = False) -> int:
    patch = _square("the patch", convolution.kernel_size)
    plain = tuple(convolution.stride) == (patch, patch) and convolution.padding in ((0, 0), "valid", 0)
    which = "has no bias" if bias else "has a bias"
    wanted = plain and (convolution.bias is not None) == bias
    _require(wanted, f"the patch convolution {which}, or overlapping or padded patches")
    _require(convolution.in_channels == 3, f"images have {convolution.in_channels} channels, expected 3")
    return patch


def _vit_config(tower: Any) -> VitConfig:
    """The shape of a ViT of openai-clip or open_clip."""
    blocks = list(tower.transformer.resblocks)
    for i, block in enumerate(blocks):
        where = f"transformer.resblocks.{i}"
        _require(type(block.attn) is nn.MultiheadAttention, f"{where}.attn is a {_class(block.attn)}")
        _require(getattr(block, "attn_mask", None) is None, f"{where} has an attention mask")
        _require(block.attn.in_proj_weight is not None, f"{where}.attn has keys and values of another width")
        _require(not block.attn.add_zero_attn, f"{where}.attn attends to a zero as well")
    known = _class(tower).startswith("clip.") or hasattr(tower, "final_ln_after_pool")
    _require(known, "this release of open_clip is too old, and pools otherwise: update it")
    _require(getattr(tower, "attn_pool", None) is None, "attn_pool is an attentional pooler")
    pool: Any = getattr(tower, "pool_type", "tok")
    _require(pool in get_args(Pool), f"pool_type is {pool!r}, expected one of {get_args(Pool)}")
    scales = [getattr(block, name, None) for block in blocks for name in ("ls_1", "ls_2")]
    _require(tower.proj is not None, "the tower has no proj")
    size = tower.input_resolution if hasattr(tower, "input_resolution") else tower.image_size
    return VitConfig(
        image_size=_image_size(size),
        patch_size=_patch_size(tower.conv1),
        width=tower.conv1.out_channels,
        layers=len(blocks),
        heads=_only("heads", (block.attn.num_heads for block in blocks)),
        embed_dim=tower.proj.shape[1],
        mlp_ratio=blocks[0].mlp.c_fc.out_features / tower.conv1.out_channels,
        activation=_only("activation", (_activation(block.mlp.gelu) for block in blocks)),
        eps=tower.ln_post.eps,
        ln_pre=not isinstance(tower.ln_pre, nn.Identity),
        pool=pool,
        ln_after_pool=bool(getattr(tower, "final_ln_after_pool", False)),
        layer_scale=_only("LayerScale", (scale is not None and not isinstance(scale, nn.Identity) for scale in scales)),
    )


def _transformers_config(tower: Any) -> VitConfig:
    """The shape of a transformers tower. Its projection is outside of it, and is the identity here."""
    layers, embeddings = _transformers_layers(tower), tower.embeddings
    width = embeddings.patch_embedding.out_channels
    return VitConfig(
        image_size=_square("the image", embeddings.image_size),
        patch_size=_patch_size(embeddings.patch_embedding),
        width=width,
        layers=len(layers),
        heads=_only("heads", (layer.self_attn.num_heads for layer in layers)),
        embed_dim=width,
        mlp_ratio=layers[0].mlp.fc1.out_features / width,
        activation=_only("activation", (_activation(layer.mlp.activation_fn) for layer in layers)),
        eps=tower.post_layernorm.eps,
    )


def _transformers_layers(tower: Any) -> list[Any]:
    """The layers of a transformers tower, whose attention and positions are checked."""
    layers = list(tower.encoder.layers)
    chosen, function = attention_setting(tower)
    known = chosen in _ATTENTIONS and (function is None or str(function.__module__).startswith(_INTEGRATIONS))
    _require(known, f"its attention is {chosen!r}, not one of transformers' own")
    for i, layer in enumerate(layers):
        own = layer.self_attn
        plain = getattr(own, "scale", None) in (None, own.head_dim**-0.5) and not getattr(own, "is_causal", False)
        _require(plain, f"encoder.layers.{i}.self_attn is causal, or has its own scale")
    _require(tower.embeddings.position_embedding.max_norm is None, "its positions are renormalised")
    return layers


def _siglip_config(tower: Any) -> SiglipConfig:
    """The shape of a SigLIP tower of transformers."""
    layers, embeddings, head = _transformers_layers(tower), tower.embeddings, tower.head
    attention = head.attention
    _require(type(attention) is nn.MultiheadAttention, f"head.attention is a {_class(attention)}")
    _require(getattr(tower, "use_head", True), "its head is not used")
    plain = attention.batch_first and attention.in_proj_weight is not None and not attention.add_zero_attn
    _require(plain, "head.attention takes its tokens otherwise than transformers makes it")
    return SiglipConfig(
        image_size=_square("the image", embeddings.image_size),
        patch_size=_patch_size(embeddings.patch_embedding, bias=True),
        width=embeddings.patch_embedding.out_channels,
        layers=len(layers),
        heads=_only("heads", iter([attention.num_heads, *(layer.self_attn.num_heads for layer in layers)])),
        mlp_width=layers[0].mlp.fc1.out_features,
        activation=_only("activation", (_activation(mlp.activation_fn) for mlp in _mlps(layers, head))),
        eps=tower.post_layernorm.eps,
    )


def _timm_config(tower: Any) -> SiglipConfig:
    """The shape of a SigLIP tower of timm's."""
    blocks, pool, patches = list(tower.blocks), tower.attn_pool, tower.patch_embed
    for name, module in _named(tower).items():
        leaf = name.rpartition(".")[2]
        if leaf in _TIMM_IDENTITIES or name in ("patch_embed.norm", "head"):
            _require(type(module) is nn.Identity, f"{name} is a {_class(module)}")
    plain = tower.num_prefix_tokens == 0 and not tower.dynamic_img_size and tower.global_pool == "map"
    _require(plain, "the tower has class tokens, images of any size, or another pool")
    _require(patches.flatten and not patches.dynamic_img_pad, "the patches are padded, or kept as a map")
    attentions = [pool, *(block.attn for block in blocks)]
    for attention in attentions:
        _require(attention.scale == attention.head_dim**-0.5, "an attention has its own scale")
        _require(getattr(attention, "gate", None) is None, "an attention has a gate")
    _require(pool.pool == "token" and pool.latent_len == 1, "attn_pool has several queries")
    _require(pool.pos_embed is None, "attn_pool has positions of its own")
    return SiglipConfig(
        image_size=_square("the image", patches.img_size),
        patch_size=_patch_size(patches.proj, bias=True),
        width=patches.proj.out_channels,
        layers=len(blocks),
        heads=_only("heads", (attention.num_heads for attention in attentions)),
        mlp_width=blocks[0].mlp.fc1.out_features,
        activation=_only("activation", (_activation(mlp.act) for mlp in _mlps(blocks, pool))),
        eps=tower.norm.eps,
    )


_TIMM_IDENTITIES = ("patch_drop", "norm_pre", "ls1", "ls2", "drop_path1", "drop_path2", "q_norm", "k_norm", "fc_norm")


def _mlps(layers: list[Any], head: Any) -> list[Any]:
    return [*(layer.mlp for layer in layers), head.mlp]


def _resnet_config(tower: Any) -> ResNetConfig:
    stages = (tower.layer1, tower.layer2, tower.layer3, tower.layer4)
    a, b, c, d = (len(stage) for stage in stages)
    return ResNetConfig(
        layers=(a, b, c, d),
        width=tower.conv3.out_channels,
        heads=tower.attnpool.num_heads,
        image_size=_square("the image", getattr(tower, "input_resolution", None) or tower.image_size),
        embed_dim=tower.attnpool.c_proj.out_features,
    )


def _activation(module: nn.Module) -> Activation:
    """The function that an activation module computes, recognised by its values."""
    _require(not any(True for _ in module.parameters()), f"the activation {_class(module)} has weights")
    x = torch.linspace(-40, 40, 1281, dtype=torch.float64, device="cpu")  # far enough to recognise clipped functions
    with torch.no_grad():
        y = module(x)
    for name, function in reference.ACTIVATIONS.items():
        if torch.allclose(y, function(x), rtol=0, atol=1e-9):
            return name
    raise NotServed(f"the activation {_class(module)} is neither QuickGELU nor GELU")


def may_act_otherwise_in_training(module: nn.Module) -> bool:
    """Whether `acts_otherwise_in_training` may become true for a module when its settings change."""
    return _has_a_mode(module) or isinstance(module, nn.Dropout) or hasattr(module, "dropout")


def acts_otherwise_in_training(module: nn.Module) -> bool:
    """Whether a module of a tower computes something else in training mode."""
    dropout = module.p if isinstance(module, nn.Dropout) else getattr(module, "dropout", None)
    return _has_a_mode(module) or (isinstance(dropout, float) and dropout > 0)


def _has_a_mode(module: nn.Module) -> bool:
    return isinstance(module, nn.BatchNorm2d) or _class(module) == "open_clip.transformer.PatchDropout"
