"""How each kernel is launched on each architecture: op -> kind of dtype -> architecture -> launches.

`python -m bench.tune` writes this file. An architecture that is not listed takes the launches of the one that it is
like, see `targets.TARGETS`. The first of several is for many rows, see `targets.fitting`.

Without a copy engine nothing of a block of `linear` overlaps its epilogue. So on sm_80, sm_86 and what is like them two
blocks share a multiprocessor, each with 4 warps, since tiles of 128 × 128 take 254 registers of their threads. With
steps of 32, twice as much fits into sm_86's shared memory, too. On sm_90 loads overlap the epilogue, and 128 × 256
reads least of shared memory; only the flat tile for middling rows has two blocks.

Several launches stand only where the emulator has shown that they have the same bits. It does not know AMD and sm_100.
In TF32 it found that the row statistics that a tile of 64 × 64 leaves are not those of 128 × 128.

"half" stands for float16 and bfloat16, "tf32" for float32 on tensor cores. "flash_attention_64" is for heads of up to
64 columns and for those of two parts, "flash_attention_128" for all others, see `flash_attention._parts`. Attention in
TF32 has one stage where wgmma wants transposed values: copies of 4 bytes cannot be pipelined there. Exact float32 has
short steps: its error grows with them. On sm_90 four blocks of attention share the registers of a multiprocessor where
they hold queries: 128 for each thread, which is what ptxas needs at least.
"""

from __future__ import annotations

from .targets import Launch, LaunchTable

TABLE = LaunchTable(
    {
        "linear": {
            "half": {
                "sm_80": (
                    Launch(128, 128, 32, num_warps=4, num_stages=4, blocks=2),
                    Launch(64, 64, 32, num_warps=4, num_stages=6, blocks=2),
                ),
                "sm_86": (
                    Launch(128, 128, 32, num_warps=4, num_stages=3, blocks=2),
                    Launch(64, 64, 32, num_warps=4, num_stages=5, blocks=2),
                ),
                "sm_90": (
                    Launch(128, 256, 64, num_warps=8, num_stages=3),
                    Launch(128, 128, 64, num_warps=8, num_stages=4),
                    Launch(64, 128, 64, num_warps=4, num_stages=4, blocks=2),
                    Launch(64, 64, 64, num_warps=4, num_stages=8),
                ),
                "sm_100": (Launch(128, 256, 64, num_warps=8, num_stages=3),),
                "gfx942": (Launch(128, 128, 64, num_warps=8, num_stages=2),),
            },
            "float32": {
                "sm_80": (Launch(64, 128, 16, num_warps=8, num_stages=3),),
                "gfx942": (Launch(64, 128, 16, num_warps=4, num_stages=3),),
            },
            "tf32": {
                "sm_80": (Launch(128, 128, 32, num_warps=8, num_stages=2),),
            },
        },
        "patch_embed": {
            "half": {
                "sm_80": (Launch(128, 128, 64, num_warps=8, num_stages=3),),
                "sm_90": (
                    Launch(128, 128, 64, num_warps=8, num_stages=3),
                    Launch(64, 64, 64, num_warps=4, num_stages=6),
                ),
                "sm_100": (Launch(128, 128, 64, num_warps=8, num_stages=3),),
                "gfx942": (Launch(128, 128, 64, num_warps=8, num_stages=2),),
            },
            "float32": {
                "sm_80": (Launch(64, 64, 32, num_warps=8, num_stages=2),),
            },
            "tf32": {
                "sm_80": (Launch(64, 64, 32, num_warps=4, num_stages=2),),
            },
        },
        "flash_attention_64": {
            "half": {
                "sm_80": (Launch(64, 64, 0, num_warps=4, num_stages=3),),
                "sm_86": (Launch(64, 64, 0, num_warps=4, num_stages=2),),
                "sm_90": (Launch(64, 64, 0, num_warps=4, num_stages=2, blocks=4),),
                "sm_100": (Launch(64, 64, 0, num_warps=4, num_stages=2),),
            },
            "float32": {
                "sm_80": (Launch(64, 32, 0, num_warps=8, num_stages=2),),
            },
            "tf32": {
                "sm_80": (Launch(64, 32, 0, num_warps=4, num_stages=2),),
                "sm_90": (Launch(64, 32, 0, num_warps=4, num_stages=1),),
                "gfx942": (Launch(64, 32, 0, num_warps=4, num_stages=1),),
            },
        },
        "flash_attention_128": {
            "half": {
                "sm_80": (Launch(128, 64, 0, num_warps=8, num_stages=3),),
                "sm_86": (Launch(128, 64, 0, num_warps=8, num_stages=2),),
                "sm_90": (Launch(64, 64, 0, num_warps=4, num_stages=2),),
                "gfx942": (Launch(128, 32, 0, num_warps=8, num_stages=2),),
            },
            "float32": {
                "sm_80": (Launch(64, 32, 0, num_warps=8, num_stages=2),),
                "gfx942": (Launch(64, 16, 0, num_warps=8, num_stages=2),),
            },
            "tf32": {
                "sm_80": (Launch(64, 32, 0, num_warps=8, num_stages=2),),
                "sm_90": (Launch(64, 32, 0, num_warps=8, num_stages=1),),
                "gfx942": (Launch(64, 32, 0, num_warps=8, num_stages=1),),
            },
        },
    }
)
