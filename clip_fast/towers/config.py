"""The shapes of CLIP's and SigLIP's towers, and the tasks that an image tower can be given.

Sources: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision" (2021), section 2.4;
Zhai et al., "Sigmoid Loss for Language Image Pre-Training" (2023), and "Scaling Vision Transformers" (2022), section
3.2, for the head.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, fields
from typing import ClassVar, Literal, NamedTuple, get_args

Activation = Literal["quick_gelu", "gelu", "gelu_tanh"]
Pool = Literal["tok", "avg"]  # open_clip's words: the class token, or the average of the patch tokens
Projection = Literal["linear", "affine", "none"]
Rgb = tuple[float, float, float]  # a number for each colour channel
ImageSize = int | tuple[int, int]  # in pixels: the side of a square, or height and width
TaskName = Literal["encode", "encode_tokens", "hidden_state", "hidden_states"]

EPS = 1e-5  # the norms of every CLIP add it to the variance
SIGLIP_EPS = 1e-6  # SigLIP's
HEAD_DIM = 64  # in all of OpenAI's models, and open_clip's default
RESNET_STRIDE = 32  # one pixel of the last map is so many pixels of the image

IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)  # per RGB channel of pixels scaled to [0, 1], over CLIP's training set
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
SIGLIP_MEAN = SIGLIP_STD = (0.5, 0.5, 0.5)  # of every SigLIP


class Task(NamedTuple):
    """A computation of an image tower, with its arguments.

    * "encode": embeddings.
    * "encode_tokens": embeddings, and a ViT's patch tokens after its last LayerNorm.
    * "hidden_state": a ViT's residual stream after a number of blocks.
    * "hidden_states": a ViT's residual stream before the first block and after each.
    """

    name: TaskName
    arguments: tuple[int, ...] = ()


ENCODE, ENCODE_TOKENS, HIDDEN_STATES = Task("encode"), Task("encode_tokens"), Task("hidden_states")


def check_normalisation(mean: Rgb, std: Rgb) -> None:
    """Raises ValueError where pixels cannot be normalised with these."""
    if len(mean) != 3 or not all(map(math.isfinite, mean)):
        raise ValueError(f"mean must be three finite numbers, got {mean}")
    if len(std) != 3 or not all(math.isfinite(value) and value > 0 for value in std):
        raise ValueError(f"std must be three positive numbers, got {std}")


def sides(size: ImageSize) -> tuple[int, int]:
    """Height and width of images."""
    return (size, size) if isinstance(size, int) else size


def image_size_of(height: int, width: int) -> ImageSize:
    """The size of images of this height and width: of a square, its side."""
    return height if height == width else (height, width)


def hidden_state(layer: int) -> Task:
    """The task of the residual stream after `layer` blocks."""
    return Task("hidden_state", (layer,))


def _require_activation(activation: str) -> None:
    *names, last = map(repr, get_args(Activation))
    if activation not in get_args(Activation):
        raise ValueError(f"activation must be {', '.join(names)} or {last}, got {activation!r}")


def _require_positive(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        least = min(sides(value)) if name == "image_size" else value
        if least <= 0:
            raise ValueError(f"{name} must be positive, got {value}")


@dataclass(frozen=True, repr=False)
class _TransformerConfig(ABC):
    """What every Vision Transformer has. `image_size` and `patch_size` are in pixels; a patch is square.

    The representation leaves out what came later and has its default, since the digests of existing output folders do.
    """

    may_be_padded: ClassVar[bool] = True  # a row's result depends on that row alone
    tasks: ClassVar[tuple[TaskName, ...]] = ("encode", "encode_tokens", "hidden_state", "hidden_states")

    image_size: ImageSize
    patch_size: int
    width: int
    layers: int
    heads: int

    def __post_init__(self) -> None:
        _require_positive(self, "image_size", "patch_size", "width", "layers", "heads")
        if self.width % self.heads:
            raise ValueError(f"width must be a multiple of heads, got width {self.width} and heads {self.heads}")
        if min(sides(self.image_size)) < self.patch_size:
            raise ValueError(
                f"image_size must be at least patch_size, got {self.image_size} and patch_size {self.patch_size}"
            )

    def __repr__(self) -> str:
        values = {each: getattr(self, each.name) for each in fields(self)}
        shown = (f"{each.name}={value!r}" for each, value in values.items() if each.repr or value != each.default)
        return f"{type(self).__name__}({', '.join(shown)})"

    @property
    @abstractmethod
    def tokens(self) -> int:
        """Length of the sequence."""

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches. Pixels past the last whole patch are not read, as in the strided convolution."""
        height, width = sides(self.image_size)
        return height // self.patch_size, width // self.patch_size

    @property
    def patches(self) -> int:
        """The number of patches."""
        return self.grid[0] * self.grid[1]

    def _operations(self, mlp_width: int) -> float:
        """About the operations for one image."""
        return 2 * self.tokens * self.layers * (4 * self.width**2 + 2 * self.width * mlp_width)

    def _row_shapes(self, task: Task, embed_dim: int) -> list[tuple[int, ...]]:
        """The shapes of a task's results for one image."""
        stream = (self.tokens, self.width)
        return {
            "encode": [(embed_dim,)],
            "encode_tokens": [(embed_dim,), (self.patches, self.width)],
            "hidden_state": [stream],
            "hidden_states": [stream] * (self.layers + 1),
        }[task.name]


@dataclass(frozen=True, repr=False)
class VitConfig(_TransformerConfig):
    """A Vision Transformer tower.

    `image_size` and `patch_size` are in pixels. `embed_dim` is the width of the space shared with text. `eps` is that
    of the LayerNorms. The others are open_clip's variants: `ln_pre`, a LayerNorm before the first block; `pool`, the
    tokens that become the embedding; `ln_after_pool`, the last LayerNorm is that of the pooled tokens, and patch tokens
    are given without it; `layer_scale`, a factor for each channel of what a block adds.
    """

    family: ClassVar[str] = "a ViT"

    embed_dim: int
    mlp_ratio: float = 4.0
    activation: Activation = "quick_gelu"
    eps: float = field(default=EPS, repr=False)
    ln_pre: bool = field(default=True, repr=False)
    pool: Pool = field(default="tok", repr=False)
    ln_after_pool: bool = field(default=False, repr=False)
    layer_scale: bool = field(default=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_positive(self, "embed_dim", "mlp_ratio")
        _require_activation(self.activation)
        if self.pool not in get_args(Pool):
            raise ValueError(f"pool must be one of {get_args(Pool)}, got {self.pool!r}")

    @property
    def mlp_width(self) -> int:
        return round(self.width * self.mlp_ratio)

    @property
    def tokens(self) -> int:
        """Length of the sequence: one class token and the patches."""
        return self.patches + 1

    @property
    def launches(self) -> int:
        """About the kernels that a GPU is launched for a batch."""
        return 5 * self.layers + 3

    @property
    def operations(self) -> float:
        """About the operations for one image."""
        return self._operations(self.mlp_width)

    def row_shapes(self, task: Task) -> list[tuple[int, ...]]:
        """The shapes of a task's results for one image."""
        return self._row_shapes(task, self.embed_dim)


@dataclass(frozen=True, repr=False)
class SiglipConfig(_TransformerConfig):
    """A Vision Transformer tower of SigLIP's, for one size of images.

    It has no class token. Its embedding is the attention of one learned query to all tokens, through an MLP, and is as
    wide as a token. `image_size` and `patch_size` are in pixels. `eps` is that of the LayerNorms.
    """

    family: ClassVar[str] = "a SigLIP"

    mlp_width: int
    activation: Activation = "gelu_tanh"
    eps: float = field(default=SIGLIP_EPS, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_positive(self, "mlp_width")
        _require_activation(self.activation)

    @property
    def embed_dim(self) -> int:
        return self.width

    @property
    def tokens(self) -> int:
        """Length of the sequence: the patches."""
        return self.patches

    @property
    def launches(self) -> int:
        """About the kernels that a GPU is launched for a batch."""
        return 5 * self.layers + 7

    @property
    def operations(self) -> float:
        """About the operations for one image."""
        return self._operations(self.mlp_width)

    def row_shapes(self, task: Task) -> list[tuple[int, ...]]:
        """The shapes of a task's results for one image."""
        return self._row_shapes(task, self.embed_dim)


@dataclass(frozen=True)
class TextConfig:
    """A text tower: a Transformer over `context_length` tokens, with `vocabulary` different tokens.

    In a `causal` one a token sees itself and the tokens before it, in others all. A text's embedding is read at its
    last token, whichever that is, where `last` is true, as in SigLIP. Elsewhere it is read at its first token of the
    number `end`, or of the largest number in it where `end` is None, as OpenAI's code has it. `projection`, into the
    space shared with images, is a matrix, a matrix and a bias ("affine"), or none. `logit_bias`: logits are more than
    scaled cosines, see `Clip.forward`.
    """

    context_length: int
    vocabulary: int
    width: int
    layers: int
    heads: int
    embed_dim: int
    activation: Activation = "quick_gelu"
    eps: float = EPS
    mlp_ratio: float = 4.0
    end: int | None = None
    last: bool = False
    causal: bool = True
    projection: Projection = "linear"
    logit_bias: bool = False

    def __post_init__(self) -> None:
        _require_positive(self, "context_length", "vocabulary", "width", "layers", "heads", "embed_dim", "mlp_ratio")
        if self.width % self.heads:
            raise ValueError(f"width must be a multiple of heads, got width {self.width} and heads {self.heads}")

    @property
    def mlp_width(self) -> int:
        return round(self.width * self.mlp_ratio)


@dataclass(frozen=True)
class ResNetConfig:
    """A modified ResNet tower.

    `layers` counts the bottlenecks of the four stages. `width` is the number of channels after the stem. `heads` is the
    number of heads of the attention pool. `image_size` is in pixels. `eps` is that of the batch norms; it is not in the
    representation, since the digests of existing output folders leave it out.
    """

    family: ClassVar[str] = "a ResNet"
    tasks: ClassVar[tuple[TaskName, ...]] = ("encode",)
    may_be_padded: ClassVar[bool] = False  # cuDNN may compute a row otherwise in another batch

    layers: tuple[int, int, int, int]
    width: int
    heads: int
    image_size: int
    embed_dim: int
    eps: float = field(default=EPS, repr=False)

    def __post_init__(self) -> None:
        _require_positive(self, "width", "heads", "image_size", "embed_dim")
        if len(self.layers) != 4 or min(self.layers) < 1:
            raise ValueError(f"layers must be four positive numbers, one per stage, got {self.layers}")
        if self.features % self.heads:
            raise ValueError(f"32 * width must be a multiple of heads, got width {self.width} and heads {self.heads}")
        if self.image_size < RESNET_STRIDE:
            raise ValueError(
                f"image_size must be at least {RESNET_STRIDE}, the stride of the tower, got {self.image_size}"
            )

    @property
    def features(self) -> int:
        """Channels of the feature map that the attention pool reads."""
        return 32 * self.width

    @property
    def grid(self) -> int:
        """Side of that feature map."""
        return self.image_size // RESNET_STRIDE

    @property
    def tokens(self) -> int:
        """Length of the attention pool's sequence: the mean token and the feature map's positions."""
        return self.grid**2 + 1

    @property
    def launches(self) -> int:
        """About the kernels that a GPU is launched for a batch: those of the convolutions, and a few."""
        return 3 * sum(self.layers) + 16

    @property
    def operations(self) -> float:
        """About the operations for one image: those of the convolutions."""
        side, channels = self.image_size // 2, self.width
        products = side**2 * 9 * (3 * channels / 2 + channels**2 / 4 + channels**2 / 2)
        for stage, blocks in enumerate(self.layers):
            planes, side = self.width * 2**stage, side // 2  # planes: the channels of the 3 × 3 convolutions
            for block in range(blocks):
                reduced = stage > 0 and block == 0  # its first two convolutions see the map before it is halved
                products += (4 if reduced else 1) * side**2 * (channels * planes + 9 * planes**2)
                products += side**2 * (4 * planes**2 + (channels * 4 * planes if block == 0 else 0))
                channels = 4 * planes
        return 2 * products

    def row_shapes(self, task: Task) -> list[tuple[int, ...]]:
        """The shapes of a task's results for one image."""
        return [(self.embed_dim,)]


Config = VitConfig | ResNetConfig | SiglipConfig
