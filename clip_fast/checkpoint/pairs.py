"""open_clip's names of published weights: an architecture and a tag, and the model on the hub that open_clip gets.

Sources: open_clip 3.3.0, `pretrained.py` and its model configs, for the image towers that are served; Radford et al.,
"Learning Transferable Visual Models From Natural Language Supervision" (2021), tables 19 and 20, for OpenAI's nine;
transformers' conversion of SigLIP, `convert_siglip_to_hf.py`, for the names of its repositories.
"""

from __future__ import annotations

from dataclasses import replace

from ..towers.config import Config, ResNetConfig, SiglipConfig, VitConfig

_B_32 = VitConfig(224, 32, width=768, layers=12, heads=12, embed_dim=512)
_L_14 = VitConfig(224, 14, width=1024, layers=24, heads=16, embed_dim=768)
_H_14 = VitConfig(224, 14, width=1280, layers=32, heads=16, embed_dim=1024)
_BIG_G_14 = VitConfig(224, 14, width=1664, layers=48, heads=16, embed_dim=1280, mlp_ratio=4.9231)
_SIGLIP_B_16 = SiglipConfig(224, 16, width=768, layers=12, heads=12, mlp_width=3072)
_SIGLIP_L_16 = SiglipConfig(256, 16, width=1024, layers=24, heads=16, mlp_width=4096)
_SIGLIP_SO400M_14 = SiglipConfig(224, 14, width=1152, layers=27, heads=16, mlp_width=4304)
_SIGLIP_SO400M_16 = replace(_SIGLIP_SO400M_14, image_size=256, patch_size=16)
_SIGLIP_GOPT_16 = SiglipConfig(256, 16, width=1536, layers=40, heads=16, mlp_width=6144)


def _clipa(config: VitConfig, image_size: int = 224) -> VitConfig:
    """CLIPA's tower of this shape."""
    return replace(config, image_size=image_size, ln_pre=False, pool="avg", ln_after_pool=True)


# The image towers. Which activation its MLPs have is told by the config beside a model's weights.
ARCHITECTURES: dict[str, Config] = {
    "RN50": ResNetConfig((3, 4, 6, 3), width=64, heads=32, image_size=224, embed_dim=1024),
    "RN101": ResNetConfig((3, 4, 23, 3), width=64, heads=32, image_size=224, embed_dim=512),
    "RN50x4": ResNetConfig((4, 6, 10, 6), width=80, heads=40, image_size=288, embed_dim=640),
    "RN50x16": ResNetConfig((6, 8, 18, 8), width=96, heads=48, image_size=384, embed_dim=768),
    "RN50x64": ResNetConfig((3, 15, 36, 10), width=128, heads=64, image_size=448, embed_dim=1024),
    "ViT-B-32": _B_32,
    "ViT-B-32-256": replace(_B_32, image_size=256),
    "ViT-B-16": VitConfig(224, 16, width=768, layers=12, heads=12, embed_dim=512),
    "ViT-B-16-plus-240": VitConfig(240, 16, width=896, layers=12, heads=14, embed_dim=640),
    "ViT-L-14": _L_14,
    "ViT-L-14-336": replace(_L_14, image_size=336),
    "ViT-H-14": _H_14,
    "ViT-H-14-378": replace(_H_14, image_size=378),
    "ViT-g-14": VitConfig(224, 14, width=1408, layers=40, heads=16, embed_dim=1024, mlp_ratio=4.3637),
    "ViT-bigG-14": _BIG_G_14,
    "ViT-L-14-CLIPA": _clipa(_L_14),
    "ViT-L-14-CLIPA-336": _clipa(_L_14, 336),
    "ViT-H-14-CLIPA": _clipa(_H_14),
    "ViT-H-14-CLIPA-336": _clipa(_H_14, 336),
    "ViT-bigG-14-CLIPA": _clipa(_BIG_G_14),
    "ViT-bigG-14-CLIPA-336": _clipa(_BIG_G_14, 336),
    "roberta-ViT-B-32": _B_32,
    "xlm-roberta-base-ViT-B-32": _B_32,
    "xlm-roberta-large-ViT-H-14": _H_14,
    "nllb-clip-base": _B_32,
    "nllb-clip-large": _H_14,
    "ViT-H-14-worldwide": _H_14,
    "ViT-H-14-worldwide-378": replace(_H_14, image_size=378),
    "ViT-bigG-14-worldwide": _BIG_G_14,
    "ViT-bigG-14-worldwide-378": replace(_BIG_G_14, image_size=378),
    "ViT-B-16-SigLIP": _SIGLIP_B_16,
    "ViT-B-16-SigLIP-256": replace(_SIGLIP_B_16, image_size=256),
    "ViT-B-16-SigLIP-i18n-256": replace(_SIGLIP_B_16, image_size=256),
    "ViT-B-16-SigLIP-384": replace(_SIGLIP_B_16, image_size=384),
    "ViT-B-16-SigLIP-512": replace(_SIGLIP_B_16, image_size=512),
    "ViT-L-16-SigLIP-256": _SIGLIP_L_16,
    "ViT-L-16-SigLIP-384": replace(_SIGLIP_L_16, image_size=384),
    "ViT-SO400M-14-SigLIP": _SIGLIP_SO400M_14,
    "ViT-SO400M-14-SigLIP-384": replace(_SIGLIP_SO400M_14, image_size=384),
    "ViT-SO400M-16-SigLIP-i18n-256": _SIGLIP_SO400M_16,
    "ViT-B-32-SigLIP2-256": replace(_SIGLIP_B_16, image_size=256, patch_size=32),
    "ViT-B-16-SigLIP2": _SIGLIP_B_16,
    "ViT-B-16-SigLIP2-256": replace(_SIGLIP_B_16, image_size=256),
    "ViT-B-16-SigLIP2-384": replace(_SIGLIP_B_16, image_size=384),
    "ViT-B-16-SigLIP2-512": replace(_SIGLIP_B_16, image_size=512),
    "ViT-L-16-SigLIP2-256": _SIGLIP_L_16,
    "ViT-L-16-SigLIP2-384": replace(_SIGLIP_L_16, image_size=384),
    "ViT-L-16-SigLIP2-512": replace(_SIGLIP_L_16, image_size=512),
    "ViT-SO400M-14-SigLIP2": _SIGLIP_SO400M_14,
    "ViT-SO400M-14-SigLIP2-378": replace(_SIGLIP_SO400M_14, image_size=378),
    "ViT-SO400M-16-SigLIP2-256": _SIGLIP_SO400M_16,
    "ViT-SO400M-16-SigLIP2-384": replace(_SIGLIP_SO400M_16, image_size=384),
    "ViT-SO400M-16-SigLIP2-512": replace(_SIGLIP_SO400M_16, image_size=512),
    "ViT-gopt-16-SigLIP2-256": _SIGLIP_GOPT_16,
    "ViT-gopt-16-SigLIP2-384": replace(_SIGLIP_GOPT_16, image_size=384),
    "nllb-clip-base-siglip": replace(_SIGLIP_B_16, image_size=384),
    "nllb-clip-large-siglip": replace(_SIGLIP_SO400M_14, image_size=384),
}

# An architecture that has another's weights, whose config says another size of images -> the other, and its own size.
SAME_WEIGHTS = {"ViT-SO400M-14-SigLIP-378": ("ViT-SO400M-14-SigLIP-384", 378)}
# By architecture and tag.
PAIRS: dict[str, dict[str, str]] = {
    "RN50": {
        "openai": "timm/resnet50_clip.openai",
        "yfcc15m": "timm/resnet50_clip.yfcc15m",
        "cc12m": "timm/resnet50_clip.cc12m",
    },
    "RN101": {
        "openai": "timm/resnet101_clip.openai",
        "yfcc15m": "timm/resnet101_clip.yfcc15m",
    },
    "RN50x4": {
        "openai": "timm/resnet50x4_clip.openai",
    },
    "RN50x16": {
        "openai": "timm/resnet50x16_clip.openai",
    },
    "RN50x64": {
        "openai": "timm/resnet50x64_clip.openai",
    },
    "ViT-B-32": {
        "openai": "timm/vit_base_patch32_clip_224.openai",
        "laion400m_e31": "timm/vit_base_patch32_clip_224.laion400m_e31",
        "laion400m_e32": "timm/vit_base_patch32_clip_224.laion400m_e32",
        "laion2b_e16": "timm/vit_base_patch32_clip_224.laion2b_e16",
        "laion2b_s34b_b79k": "laion/CLIP-ViT-B-32-laion2B-s34B-b79K",
        "datacomp_xl_s13b_b90k": "laion/CLIP-ViT-B-32-DataComp.XL-s13B-b90K",
        "datacomp_m_s128m_b4k": "laion/CLIP-ViT-B-32-DataComp.M-s128M-b4K",
        "commonpool_m_clip_s128m_b4k": "laion/CLIP-ViT-B-32-CommonPool.M.clip-s128M-b4K",
        "commonpool_m_laion_s128m_b4k": "laion/CLIP-ViT-B-32-CommonPool.M.laion-s128M-b4K",
        "commonpool_m_image_s128m_b4k": "laion/CLIP-ViT-B-32-CommonPool.M.image-s128M-b4K",
        "commonpool_m_text_s128m_b4k": "laion/CLIP-ViT-B-32-CommonPool.M.text-s128M-b4K",
        "commonpool_m_basic_s128m_b4k": "laion/CLIP-ViT-B-32-CommonPool.M.basic-s128M-b4K",
        "commonpool_m_s128m_b4k": "laion/CLIP-ViT-B-32-CommonPool.M-s128M-b4K",
        "datacomp_s_s13m_b4k": "laion/CLIP-ViT-B-32-DataComp.S-s13M-b4K",
        "commonpool_s_clip_s13m_b4k": "laion/CLIP-ViT-B-32-CommonPool.S.clip-s13M-b4K",
        "commonpool_s_laion_s13m_b4k": "laion/CLIP-ViT-B-32-CommonPool.S.laion-s13M-b4K",
        "commonpool_s_image_s13m_b4k": "laion/CLIP-ViT-B-32-CommonPool.S.image-s13M-b4K",
        "commonpool_s_text_s13m_b4k": "laion/CLIP-ViT-B-32-CommonPool.S.text-s13M-b4K",
        "commonpool_s_basic_s13m_b4k": "laion/CLIP-ViT-B-32-CommonPool.S.basic-s13M-b4K",
        "commonpool_s_s13m_b4k": "laion/CLIP-ViT-B-32-CommonPool.S-s13M-b4K",
        "metaclip_400m": "timm/vit_base_patch32_clip_224.metaclip_400m",
        "metaclip_fullcc": "timm/vit_base_patch32_clip_224.metaclip_2pt5b",
    },
    "ViT-B-32-256": {
        "datacomp_s34b_b86k": "laion/CLIP-ViT-B-32-256x256-DataComp-s34B-b86K",
    },
    "ViT-B-16": {
        "openai": "timm/vit_base_patch16_clip_224.openai",
        "laion400m_e31": "timm/vit_base_patch16_clip_224.laion400m_e31",
        "laion400m_e32": "timm/vit_base_patch16_clip_224.laion400m_e32",
        "laion2b_s34b_b88k": "laion/CLIP-ViT-B-16-laion2B-s34B-b88K",
        "datacomp_xl_s13b_b90k": "laion/CLIP-ViT-B-16-DataComp.XL-s13B-b90K",
        "datacomp_l_s1b_b8k": "laion/CLIP-ViT-B-16-DataComp.L-s1B-b8K",
        "commonpool_l_clip_s1b_b8k": "laion/CLIP-ViT-B-16-CommonPool.L.clip-s1B-b8K",
        "commonpool_l_laion_s1b_b8k": "laion/CLIP-ViT-B-16-CommonPool.L.laion-s1B-b8K",
        "commonpool_l_image_s1b_b8k": "laion/CLIP-ViT-B-16-CommonPool.L.image-s1B-b8K",
        "commonpool_l_text_s1b_b8k": "laion/CLIP-ViT-B-16-CommonPool.L.text-s1B-b8K",
        "commonpool_l_basic_s1b_b8k": "laion/CLIP-ViT-B-16-CommonPool.L.basic-s1B-b8K",
        "commonpool_l_s1b_b8k": "laion/CLIP-ViT-B-16-CommonPool.L-s1B-b8K",
        "dfn2b": "apple/DFN2B-CLIP-ViT-B-16",
        "metaclip_400m": "timm/vit_base_patch16_clip_224.metaclip_400m",
        "metaclip_fullcc": "timm/vit_base_patch16_clip_224.metaclip_2pt5b",
    },
    "ViT-B-16-plus-240": {
        "laion400m_e31": "timm/vit_base_patch16_plus_clip_240.laion400m_e31",
        "laion400m_e32": "timm/vit_base_patch16_plus_clip_240.laion400m_e31",
    },
    "ViT-L-14": {
        "openai": "timm/vit_large_patch14_clip_224.openai",
        "laion400m_e31": "timm/vit_large_patch14_clip_224.laion400m_e31",
        "laion400m_e32": "timm/vit_large_patch14_clip_224.laion400m_e32",
        "laion2b_s32b_b82k": "laion/CLIP-ViT-L-14-laion2B-s32B-b82K",
        "datacomp_xl_s13b_b90k": "laion/CLIP-ViT-L-14-DataComp.XL-s13B-b90K",
        "commonpool_xl_clip_s13b_b90k": "laion/CLIP-ViT-L-14-CommonPool.XL.clip-s13B-b90K",
        "commonpool_xl_laion_s13b_b90k": "laion/CLIP-ViT-L-14-CommonPool.XL.laion-s13B-b90K",
        "commonpool_xl_s13b_b90k": "laion/CLIP-ViT-L-14-CommonPool.XL-s13B-b90K",
        "metaclip_400m": "timm/vit_large_patch14_clip_224.metaclip_400m",
        "metaclip_fullcc": "timm/vit_large_patch14_clip_224.metaclip_2pt5b",
        "dfn2b": "apple/DFN2B-CLIP-ViT-L-14",
        "dfn2b_s39b": "apple/DFN2B-CLIP-ViT-L-14-39B",
    },
    "ViT-L-14-336": {
        "openai": "timm/vit_large_patch14_clip_336.openai",
    },
    "ViT-H-14": {
        "laion2b_s32b_b79k": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        "metaclip_fullcc": "timm/vit_huge_patch14_clip_224.metaclip_2pt5b",
        "metaclip_altogether": "timm/vit_huge_patch14_clip_224.metaclip_altogether",
        "dfn5b": "apple/DFN5B-CLIP-ViT-H-14",
    },
    "ViT-H-14-378": {
        "dfn5b": "apple/DFN5B-CLIP-ViT-H-14-378",
    },
    "ViT-g-14": {
        "laion2b_s12b_b42k": "laion/CLIP-ViT-g-14-laion2B-s12B-b42K",
        "laion2b_s34b_b88k": "laion/CLIP-ViT-g-14-laion2B-s34B-b88K",
    },
    "ViT-bigG-14": {
        "laion2b_s39b_b160k": "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k",
        "metaclip_fullcc": "timm/vit_gigantic_patch14_clip_224.metaclip_2pt5b",
    },
    "ViT-L-14-CLIPA": {
        "datacomp1b": "UCSC-VLAA/ViT-L-14-CLIPA-datacomp1B",
    },
    "ViT-L-14-CLIPA-336": {
        "datacomp1b": "UCSC-VLAA/ViT-L-14-CLIPA-336-datacomp1B",
    },
    "ViT-H-14-CLIPA": {
        "datacomp1b": "UCSC-VLAA/ViT-H-14-CLIPA-datacomp1B",
    },
    "ViT-H-14-CLIPA-336": {
        "laion2b": "UCSC-VLAA/ViT-H-14-CLIPA-336-laion2B",
        "datacomp1b": "UCSC-VLAA/ViT-H-14-CLIPA-336-datacomp1B",
    },
    "ViT-bigG-14-CLIPA": {
        "datacomp1b": "UCSC-VLAA/ViT-bigG-14-CLIPA-datacomp1B",
    },
    "ViT-bigG-14-CLIPA-336": {
        "datacomp1b": "UCSC-VLAA/ViT-bigG-14-CLIPA-336-datacomp1B",
    },
    "roberta-ViT-B-32": {
        "laion2b_s12b_b32k": "laion/CLIP-ViT-B-32-roberta-base-laion2B-s12B-b32k",
    },
    "xlm-roberta-base-ViT-B-32": {
        "laion5b_s13b_b90k": "laion/CLIP-ViT-B-32-xlm-roberta-base-laion5B-s13B-b90k",
    },
    "xlm-roberta-large-ViT-H-14": {
        "frozen_laion5b_s13b_b90k": "laion/CLIP-ViT-H-14-frozen-xlm-roberta-large-laion5B-s13B-b90k",
    },
    "nllb-clip-base": {
        "v1": "visheratin/nllb-clip-base-oc",
    },
    "nllb-clip-large": {
        "v1": "visheratin/nllb-clip-large-oc",
    },
    "ViT-H-14-worldwide": {
        "metaclip2_worldwide": "timm/vit_huge_patch14_clip_224.metaclip2_worldwide",
    },
    "ViT-H-14-worldwide-378": {
        "metaclip2_worldwide": "timm/vit_huge_patch14_clip_378.metaclip2_worldwide",
    },
    "ViT-bigG-14-worldwide": {
        "metaclip2_worldwide": "timm/vit_gigantic_patch14_clip_224.metaclip2_worldwide",
    },
    "ViT-bigG-14-worldwide-378": {
        "metaclip2_worldwide": "timm/vit_gigantic_patch14_clip_378.metaclip2_worldwide",
    },
    "ViT-B-16-SigLIP": {"webli": "timm/ViT-B-16-SigLIP"},
    "ViT-B-16-SigLIP-256": {"webli": "timm/ViT-B-16-SigLIP-256"},
    "ViT-B-16-SigLIP-i18n-256": {"webli": "timm/ViT-B-16-SigLIP-i18n-256"},
    "ViT-B-16-SigLIP-384": {"webli": "timm/ViT-B-16-SigLIP-384"},
    "ViT-B-16-SigLIP-512": {"webli": "timm/ViT-B-16-SigLIP-512"},
    "ViT-L-16-SigLIP-256": {"webli": "timm/ViT-L-16-SigLIP-256"},
    "ViT-L-16-SigLIP-384": {"webli": "timm/ViT-L-16-SigLIP-384"},
    "ViT-SO400M-14-SigLIP": {"webli": "timm/ViT-SO400M-14-SigLIP"},
    "ViT-SO400M-14-SigLIP-384": {"webli": "timm/ViT-SO400M-14-SigLIP-384"},
    "ViT-SO400M-16-SigLIP-i18n-256": {"webli": "timm/ViT-SO400M-16-SigLIP-i18n-256"},
    "ViT-B-32-SigLIP2-256": {"webli": "timm/ViT-B-32-SigLIP2-256"},
    "ViT-B-16-SigLIP2": {"webli": "timm/ViT-B-16-SigLIP2"},
    "ViT-B-16-SigLIP2-256": {"webli": "timm/ViT-B-16-SigLIP2-256"},
    "ViT-B-16-SigLIP2-384": {"webli": "timm/ViT-B-16-SigLIP2-384"},
    "ViT-B-16-SigLIP2-512": {"webli": "timm/ViT-B-16-SigLIP2-512"},
    "ViT-L-16-SigLIP2-256": {"webli": "timm/ViT-L-16-SigLIP2-256"},
    "ViT-L-16-SigLIP2-384": {"webli": "timm/ViT-L-16-SigLIP2-384"},
    "ViT-L-16-SigLIP2-512": {"webli": "timm/ViT-L-16-SigLIP2-512"},
    "ViT-SO400M-14-SigLIP2": {"webli": "timm/ViT-SO400M-14-SigLIP2"},
    "ViT-SO400M-14-SigLIP2-378": {"webli": "timm/ViT-SO400M-14-SigLIP2-378"},
    "ViT-SO400M-16-SigLIP2-256": {"webli": "timm/ViT-SO400M-16-SigLIP2-256"},
    "ViT-SO400M-16-SigLIP2-384": {"webli": "timm/ViT-SO400M-16-SigLIP2-384"},
    "ViT-SO400M-16-SigLIP2-512": {"webli": "timm/ViT-SO400M-16-SigLIP2-512"},
    "ViT-gopt-16-SigLIP2-256": {"webli": "timm/ViT-gopt-16-SigLIP2-256"},
    "ViT-gopt-16-SigLIP2-384": {"webli": "timm/ViT-gopt-16-SigLIP2-384"},
    "nllb-clip-base-siglip": {
        "v1": "visheratin/nllb-clip-base-siglip",
        "mrl": "visheratin/nllb-siglip-mrl-base",
    },
    "nllb-clip-large-siglip": {
        "v1": "visheratin/nllb-clip-large-siglip",
        "mrl": "visheratin/nllb-siglip-mrl-large",
    },
}

# The repositories of SigLIP that have transformers' files, and open_clip's names of their image towers.
SIGLIP_REPOSITORIES = {
    "google/siglip-base-patch16-224": "ViT-B-16-SigLIP",
    "google/siglip-base-patch16-256": "ViT-B-16-SigLIP-256",
    "google/siglip-base-patch16-256-multilingual": "ViT-B-16-SigLIP-i18n-256",
    "google/siglip-base-patch16-384": "ViT-B-16-SigLIP-384",
    "google/siglip-base-patch16-512": "ViT-B-16-SigLIP-512",
    "google/siglip-large-patch16-256": "ViT-L-16-SigLIP-256",
    "google/siglip-large-patch16-384": "ViT-L-16-SigLIP-384",
    "google/siglip-so400m-patch14-224": "ViT-SO400M-14-SigLIP",
    "google/siglip-so400m-patch14-384": "ViT-SO400M-14-SigLIP-384",
    "google/siglip-so400m-patch16-256-i18n": "ViT-SO400M-16-SigLIP-i18n-256",
    "google/siglip2-base-patch32-256": "ViT-B-32-SigLIP2-256",
    "google/siglip2-base-patch16-224": "ViT-B-16-SigLIP2",
    "google/siglip2-base-patch16-256": "ViT-B-16-SigLIP2-256",
    "google/siglip2-base-patch16-384": "ViT-B-16-SigLIP2-384",
    "google/siglip2-base-patch16-512": "ViT-B-16-SigLIP2-512",
    "google/siglip2-large-patch16-256": "ViT-L-16-SigLIP2-256",
    "google/siglip2-large-patch16-384": "ViT-L-16-SigLIP2-384",
    "google/siglip2-large-patch16-512": "ViT-L-16-SigLIP2-512",
    "google/siglip2-so400m-patch14-224": "ViT-SO400M-14-SigLIP2",
    "google/siglip2-so400m-patch14-384": "ViT-SO400M-14-SigLIP-384",
    "google/siglip2-so400m-patch16-256": "ViT-SO400M-16-SigLIP2-256",
    "google/siglip2-so400m-patch16-384": "ViT-SO400M-16-SigLIP2-384",
    "google/siglip2-so400m-patch16-512": "ViT-SO400M-16-SigLIP2-512",
    "google/siglip2-giant-opt-patch16-256": "ViT-gopt-16-SigLIP2-256",
    "google/siglip2-giant-opt-patch16-384": "ViT-gopt-16-SigLIP2-384",
}

# The tags that were trained with QuickGELU.
_QUICK_GELU = {
    "RN50": ("openai", "yfcc15m", "cc12m"),
    "RN101": ("openai", "yfcc15m"),
    "RN50x4": ("openai",),
    "RN50x16": ("openai",),
    "RN50x64": ("openai",),
    "ViT-B-32": ("openai", "laion400m_e31", "laion400m_e32", "metaclip_400m", "metaclip_fullcc"),
    "ViT-B-16": ("openai", "dfn2b", "metaclip_400m", "metaclip_fullcc"),
    "ViT-L-14": ("openai", "metaclip_400m", "metaclip_fullcc", "dfn2b"),
    "ViT-L-14-336": ("openai",),
    "ViT-H-14": ("metaclip_fullcc", "dfn5b"),
    "ViT-H-14-378": ("dfn5b",),
    "ViT-bigG-14": ("metaclip_fullcc",),
    "ViT-H-14-worldwide": ("metaclip2_worldwide",),
}

# Architectures whose text towers are not served.
IMAGES_ONLY = frozenset(
    {
        *("roberta-ViT-B-32", "xlm-roberta-base-ViT-B-32", "xlm-roberta-large-ViT-H-14"),
        *("nllb-clip-base", "nllb-clip-large", "nllb-clip-base-siglip", "nllb-clip-large-siglip"),
    }
)

# Families whose image towers are not served, by how open_clip's names for them begin.
_NOT_SERVED = {"EVA": "EVA", "coca_": "CoCa", "convnext_": "ConvNeXt", "MobileCLIP": "MobileCLIP", "ViTamin": "ViTamin"}


def not_served(architecture: str) -> str | None:
    """The family of an architecture of open_clip's that is not served; None for all other names."""
    return next((family for begin, family in _NOT_SERVED.items() if architecture.startswith(begin)), None)


def hub_model(architecture: str, tag: str) -> str | None:
    """The repository of a pair; None where open_clip knows no such weights for this architecture.

    A name with -quickgelu behind it is open_clip's for the same weights, where they were trained with QuickGELU.
    """
    tag, plain = tag.lower().replace("-", "_"), architecture.removesuffix("-quickgelu")
    if plain != architecture and tag not in _QUICK_GELU.get(plain, ()):
        return None
    return PAIRS.get(plain, {}).get(tag)


def tags_of(architecture: str) -> list[str]:
    """The tags of an architecture; empty where it is none."""
    plain = architecture.removesuffix("-quickgelu")
    return [tag for tag in PAIRS.get(plain, {}) if hub_model(architecture, tag)]
