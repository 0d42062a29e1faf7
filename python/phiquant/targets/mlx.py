"""Targets of MLX folders, for mlx-lm.

Scales and minimums are float16, not the bfloat16 of Phi's checkpoints: MLX computes in the dtype of the parameters,
and float16 keeps 8 times finer activations (relative error of the logits 5e-3 against 4e-2); it also moves to GGUF
and back without a change. For models whose activations pass 65504: the same grids in bf16, "uint4-g64-min-bf16".
"""

from __future__ import annotations

from ..grid_text import read_grid
from .base import Target, floats

SIZES = (32, 64, 128)
TARGETS = (
    *floats("mlx"),
    *(
        Target(f"mlx:{bits}bit-g{size}", read_grid(f"uint{bits}-g{size}-min-f16"), "float16")
        for bits in (2, 3, 4, 5, 6, 8)
        for size in SIZES
    ),
    *(Target(f"mlx:int4-g{size}", read_grid(f"int4-g{size}-signmax-f16"), "float16") for size in SIZES),
    *(Target(f"mlx:int8-g{size}", read_grid(f"int8-g{size}-sym-f16"), "float16") for size in SIZES),
    Target("mlx:mxfp4", read_grid("mxfp4")),
    Target("mlx:mxfp8", read_grid("mxfp8_e4m3")),
    Target("mlx:nvfp4", read_grid("fp4_e2m1-g16-sym-e4m3"), note="one level of scales: small weights may underflow"),
)
