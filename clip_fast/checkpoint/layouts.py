"""How files name the weights of a CLIP or SigLIP, and where in a file its towers are."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import CheckpointError

# --- The image tower in a file ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """How a family of files names things."""

    prefix: str  # of the image tower's keys
    blocks: str  # what comes before a ViT block's number
    other: re.Pattern[str]  # keys that are known and not the image tower's parameters
    keys: Callable[[str], list[str]]  # the file's keys for a canonical name
    hugging_face: bool = False  # it is transformers'


_HUGGING_FACE_NAMES = {
    "map_head.query": "head.probe",
    "map_head.attn.": "head.attention.",
    "map_head.ln.": "head.layernorm.",
    "map_head.mlp.": "head.mlp.",
    "class_embedding": "embeddings.class_embedding",
    "conv1.": "embeddings.patch_embedding.",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_pre.": "pre_layrnorm.",  # transformers' own spelling
    "transformer.resblocks.": "encoder.layers.",
    ".ln_1.": ".layer_norm1.",
    ".attn.": ".self_attn.",
    ".ln_2.": ".layer_norm2.",
    ".mlp.c_fc.": ".mlp.fc1.",
    ".mlp.c_proj.": ".mlp.fc2.",
    "ln_post.": "post_layernorm.",
    "token_embedding.": "embeddings.token_embedding.",
    "ln_final.": "final_layer_norm.",
    "text_projection.": "head.",  # SigLIP's, which has a bias
}
_LOGITS = ("logit_scale", "logit_bias")


def hugging_face_keys(name: str) -> list[str]:
    if name == "proj":
        return ["visual_projection.weight"]
    return [f"vision_model.{key}" for key in _in_hugging_face(name)]


def _hugging_face_text_keys(name: str) -> list[str]:
    if name in ("text_projection", *_LOGITS):
        return [name.replace("projection", "projection.weight")]
    return [f"text_model.{key}" for key in _in_hugging_face(name)]


def _in_hugging_face(name: str) -> list[str]:
    """The keys inside a tower of transformers for a canonical name."""
    for ours, theirs in _HUGGING_FACE_NAMES.items():
        name = name.replace(ours, theirs)
    stacked = re.fullmatch(r"(.*\.self_attn)\.in_proj_(weight|bias)", name)  # not of SigLIP's head
    return [f"{stacked[1]}.{part}_proj.{stacked[2]}" for part in "qkv"] if stacked else [name]


_TIMM_NAMES = {
    "conv1.": "patch_embed.proj.",
    "positional_embedding": "pos_embed",
    "transformer.resblocks.": "blocks.",
    ".ln_1.": ".norm1.",
    ".ln_2.": ".norm2.",
    ".mlp.c_fc.": ".mlp.fc1.",
    ".mlp.c_proj.": ".mlp.fc2.",
    "ln_post.": "norm.",
    "map_head.query": "attn_pool.latent",
    "map_head.attn.out_proj.": "attn_pool.proj.",
    "map_head.attn.": "attn_pool.",
    "map_head.ln.": "attn_pool.norm.",
    "map_head.": "attn_pool.",
    ".attn.in_proj_": ".attn.qkv.",
    ".attn.out_proj.": ".attn.proj.",
}


def timm_keys(name: str) -> list[str]:
    for ours, theirs in _TIMM_NAMES.items():
        name = name.replace(ours, theirs)
    stacked = re.fullmatch(r"attn_pool\.in_proj_(weight|bias)", name)
    return [f"attn_pool.{part}.{stacked[1]}" for part in ("q", "kv")] if stacked else [name]


_OPENAI_OTHER = (
    r"(token_embedding|transformer|ln_final|text)\.|"
    r"(positional_embedding|text_projection(\.weight|\.bias)?|logit_scale|logit_bias|attn_mask|input_resolution|"
    r"context_length|vocab_size|text_embeddings)$"
)
OPENAI = Layout("visual.", "transformer.resblocks.", re.compile(_OPENAI_OTHER), lambda name: [f"visual.{name}"])
TOWER_ALONE = Layout("", "transformer.resblocks.", re.compile(r"text_embeddings$"), lambda name: [name])
HUGGING_FACE = Layout(
    "vision_model.",
    "encoder.layers.",
    re.compile(r"text_model\.|text_projection\.|(logit_scale|logit_bias|(vision_model\.)?embeddings\.position_ids)$"),
    hugging_face_keys,
    hugging_face=True,
)


def _keys_alone(name: str) -> list[str]:
    return [key.removeprefix(HUGGING_FACE.prefix) for key in hugging_face_keys(name)]


# Of a SiglipVisionModel or CLIPVisionModel, as transformers 5 writes it.
HUGGING_FACE_ALONE = replace(HUGGING_FACE, prefix="", keys=_keys_alone)
TIMM = Layout(  # of open_clip's SigLIP models
    "visual.trunk.",
    "blocks.",
    re.compile(_OPENAI_OTHER),
    lambda name: [f"visual.trunk.{key}" for key in timm_keys(name)],
)

# Text towers, by a key that each of them has: of OpenAI and open_clip, of open_clip's CustomTextCLIP, of transformers.
_ANY = re.compile(r".*")
TEXTS = {
    "token_embedding.weight": Layout("", "transformer.resblocks.", _ANY, lambda name: [name]),
    "text.token_embedding.weight": Layout(
        "text.", "transformer.resblocks.", _ANY, lambda name: [name if name in _LOGITS else f"text.{name}"]
    ),
    "text_model.embeddings.token_embedding.weight": Layout(
        "text_model.", "encoder.layers.", _ANY, _hugging_face_text_keys
    ),
}

_UNSERVED = {r"visual\.attn_pool\.": "an attentional pooler, as CoCa has"}  # parts of open_clip's models, by keys


def layout_of(path: Path, keys: Collection[str], timm_model: Callable[[], str] = str) -> Layout:
    """How the image tower in a file is named. `timm_model` gives the name of its model in timm, empty if unknown.

    Raises:
        CheckpointError: the file has none, or one that is not served.
    """
    for pattern, part in _UNSERVED.items():
        if key := next((key for key in keys if re.match(pattern, key)), None):
            raise CheckpointError(path, f"{key} belongs to {part}, which is not served")
    layout = _layout(keys)
    if layout is TIMM and "visual.trunk.attn_pool.latent" not in keys:
        key = next(key for key in keys if key.startswith(TIMM.prefix))
        named = f", {name}" if (name := timm_model()) else ""
        raise CheckpointError(
            path, f"{key} belongs to an image tower from timm that is no SigLIP's{named}, which is not served"
        )
    if layout is None:
        raise CheckpointError(path, f"holds no CLIP image tower, only {listing(sorted(keys)) or 'nothing'}")
    return layout


def _layout(keys: Collection[str]) -> Layout | None:
    if any(key.startswith("vision_model.") for key in keys):
        return HUGGING_FACE
    if any(key.startswith(TIMM.prefix) for key in keys):
        return TIMM
    if any(key.startswith("visual.") for key in keys):
        return OPENAI
    if "conv1.weight" in keys:
        return TOWER_ALONE
    return HUGGING_FACE_ALONE if "embeddings.patch_embedding.weight" in keys else None


# Keys that every image tower of a kind has and hardly anything else does, behind the prefix of a module that holds it.
_MARKS = tuple(
    re.compile(rf"(.+?\.){mark}")
    for mark in (
        r"visual\.(?:conv1\.weight|positional_embedding|attnpool\.positional_embedding|trunk\..+)",
        r"vision_model\.embeddings\.patch_embedding\.weight",
        r"embeddings\.patch_embedding\.weight",
        r"(?:class_embedding|attnpool\.positional_embedding)",
    )
)


def prefixes(keys: Collection[str]) -> list[str]:
    """What stands before the names of each CLIP in a file: "" where nothing does. Empty where no CLIP is found."""
    if _layout(keys):
        return [""]
    for mark in _MARKS:
        if found := {match[1] for key in keys if (match := mark.fullmatch(key))}:
            return sorted(found)
    return []


def listing(keys: list[str]) -> str:
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
