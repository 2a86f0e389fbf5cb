"""Shapes of CLIP's two image towers, and the published models by name.

Sources: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision" (2021), section 2.4 and
tables 19 and 20, for OpenAI's nine models; the OpenCLIP model cards for the ViT family from B to bigG.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Activation = Literal["quick_gelu", "gelu"]
Rgb = tuple[float, float, float]  # a number per colour channel

LAYER_NORM_EPS = 1e-5  # of every LayerNorm in every CLIP
BATCH_NORM_EPS = 1e-5  # of every batch norm in every CLIP ResNet
HEAD_DIM = 64  # of every model of OpenAI's, and open_clip's default
RESNET_STRIDE = 32  # pixels of the image to one of the last map

IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)  # per RGB channel of pixels scaled to [0, 1], over CLIP's training set
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)


def _require_positive(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value <= 0:
            raise ValueError(f"{name} must be positive, got {value}")


@dataclass(frozen=True)
class VitConfig:
    """A Vision Transformer tower.

    `image_size` and `patch_size` are in pixels; `embed_dim` is the width of the space shared with text.
    """

    image_size: int
    patch_size: int
    width: int
    layers: int
    heads: int
    embed_dim: int
    mlp_ratio: float = 4.0
    activation: Activation = "quick_gelu"

    def __post_init__(self) -> None:
        _require_positive(self, "image_size", "patch_size", "width", "layers", "heads", "embed_dim", "mlp_ratio")
        if self.width % self.heads:
            raise ValueError(f"width must be a multiple of heads, got width {self.width} and heads {self.heads}")
        if self.image_size < self.patch_size:
            raise ValueError(
                f"image_size must be at least patch_size, got {self.image_size} and patch_size {self.patch_size}"
            )
        if self.activation not in ("quick_gelu", "gelu"):
            raise ValueError(f"activation must be 'quick_gelu' or 'gelu', got {self.activation!r}")

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def mlp_width(self) -> int:
        return round(self.width * self.mlp_ratio)

    @property
    def grid(self) -> int:
        """Patches along one side; pixels past the last whole patch are not looked at, as in the strided convolution."""
        return self.image_size // self.patch_size

    @property
    def tokens(self) -> int:
        """Length of the sequence: one class token and the patches."""
        return self.grid**2 + 1


@dataclass(frozen=True)
class TextConfig:
    """A text tower: a causal Transformer over `context_length` tokens of a `vocabulary` of so many."""

    context_length: int
    vocabulary: int
    width: int
    layers: int
    heads: int
    embed_dim: int
    activation: Activation = "quick_gelu"

    def __post_init__(self) -> None:
        _require_positive(self, "context_length", "vocabulary", "width", "layers", "heads", "embed_dim")
        if self.width % self.heads:
            raise ValueError(f"width must be a multiple of heads, got width {self.width} and heads {self.heads}")

    @property
    def mlp_width(self) -> int:
        return 4 * self.width


@dataclass(frozen=True)
class ResNetConfig:
    """A modified ResNet tower.

    `layers` counts the bottlenecks of the four stages; `width` is the number of channels after the stem; `heads` are
    those of the attention pool; `image_size` is in pixels.
    """

    layers: tuple[int, int, int, int]
    width: int
    heads: int
    image_size: int
    embed_dim: int

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


Config = VitConfig | ResNetConfig


@dataclass(frozen=True)
class Pretrained:
    """Where a published checkpoint comes from: its address and the SHA-256 of the whole file, in hexadecimal."""

    url: str
    sha256: str

    @property
    def filename(self) -> str:
        return self.url.rsplit("/", 1)[-1]


def _openai(sha256: str, filename: str) -> Pretrained:
    return Pretrained(f"https://openaipublic.azureedge.net/clip/models/{sha256}/{filename}", sha256)


OPENAI_MODELS: dict[str, Config] = {
    "RN50": ResNetConfig((3, 4, 6, 3), width=64, heads=32, image_size=224, embed_dim=1024),
    "RN101": ResNetConfig((3, 4, 23, 3), width=64, heads=32, image_size=224, embed_dim=512),
    "RN50x4": ResNetConfig((4, 6, 10, 6), width=80, heads=40, image_size=288, embed_dim=640),
    "RN50x16": ResNetConfig((6, 8, 18, 8), width=96, heads=48, image_size=384, embed_dim=768),
    "RN50x64": ResNetConfig((3, 15, 36, 10), width=128, heads=64, image_size=448, embed_dim=1024),
    "ViT-B/32": VitConfig(224, 32, width=768, layers=12, heads=12, embed_dim=512),
    "ViT-B/16": VitConfig(224, 16, width=768, layers=12, heads=12, embed_dim=512),
    "ViT-L/14": VitConfig(224, 14, width=1024, layers=24, heads=16, embed_dim=768),
    "ViT-L/14@336px": VitConfig(336, 14, width=1024, layers=24, heads=16, embed_dim=768),
}

# Shipped inside the package (clip_fast/assets), for demonstration and end-to-end checks without a download.
BUNDLED_MODELS: dict[str, VitConfig] = {
    "tiny-digits": VitConfig(32, 8, width=128, layers=3, heads=2, embed_dim=64),
}

OPENAI_CHECKPOINTS: dict[str, Pretrained] = {
    "RN50": _openai("afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762", "RN50.pt"),
    "RN101": _openai("8fa8567bab74a42d41c5915025a8e4538c3bdbe8804a470a72f30b0d94fab599", "RN101.pt"),
    "RN50x4": _openai("7e526bd135e493cef0776de27d5f42653e6b4c8bf9e0f653bb11773263205fdd", "RN50x4.pt"),
    "RN50x16": _openai("52378b407f34354e150460fe41077663dd5b39c54cd0bfd2b27167a4a06ec9aa", "RN50x16.pt"),
    "RN50x64": _openai("be1cfb55d75a9666199fb2206c106743da0f6468c9d327f3e0d0a543a9919d9c", "RN50x64.pt"),
    "ViT-B/32": _openai("40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af", "ViT-B-32.pt"),
    "ViT-B/16": _openai("5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f", "ViT-B-16.pt"),
    "ViT-L/14": _openai("b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836", "ViT-L-14.pt"),
    "ViT-L/14@336px": _openai("3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02", "ViT-L-14-336px.pt"),
}

# Trained with the exact GELU; the towers' shapes, to read a checkpoint from a file or to benchmark.
OPEN_CLIP_MODELS: dict[str, VitConfig] = {
    "ViT-B-32": VitConfig(224, 32, width=768, layers=12, heads=12, embed_dim=512, activation="gelu"),
    "ViT-B-16": VitConfig(224, 16, width=768, layers=12, heads=12, embed_dim=512, activation="gelu"),
    "ViT-B-16-plus-240": VitConfig(240, 16, width=896, layers=12, heads=14, embed_dim=640, activation="gelu"),
    "ViT-L-14": VitConfig(224, 14, width=1024, layers=24, heads=16, embed_dim=768, activation="gelu"),
    "ViT-L-14-336": VitConfig(336, 14, width=1024, layers=24, heads=16, embed_dim=768, activation="gelu"),
    "ViT-H-14": VitConfig(224, 14, width=1280, layers=32, heads=16, embed_dim=1024, activation="gelu"),
    "ViT-g-14": VitConfig(
        224, 14, width=1408, layers=40, heads=16, embed_dim=1024, mlp_ratio=4.3637, activation="gelu"
    ),
    "ViT-bigG-14": VitConfig(
        224, 14, width=1664, layers=48, heads=16, embed_dim=1280, mlp_ratio=4.9231, activation="gelu"
    ),
}
