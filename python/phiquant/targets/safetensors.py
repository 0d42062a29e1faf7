"""Targets of safetensors folders in the compressed-tensors layout, for Transformers and vLLM."""

from __future__ import annotations

from ..grid_text import read_grid
from .base import Target, floats

SIZES = (32, 64, 128)
TARGETS = (
    *floats("safetensors"),
    *(Target(f"safetensors:int4-g{size}", read_grid(f"int4-g{size}-signmax-f16")) for size in SIZES),
    *(Target(f"safetensors:uint4-g{size}", read_grid(f"uint4-g{size}-asym-f16")) for size in SIZES),
    *(Target(f"safetensors:int8-g{size}", read_grid(f"int8-g{size}-sym-f16")) for size in SIZES),
    Target("safetensors:int4-channel", read_grid("int4-channel-sym")),
    Target("safetensors:int8-channel", read_grid("int8-channel-sym")),
    Target("safetensors:int8-tensor", read_grid("int8-tensor-sym")),
    Target("safetensors:fp8-channel", read_grid("fp8_e4m3-channel-sym")),
    Target("safetensors:fp8-tensor", read_grid("fp8_e4m3-tensor-sym")),
    Target("safetensors:mxfp4", read_grid("mxfp4"), note="weights are decoded to bfloat16, which holds them"),
    Target("safetensors:mxfp8", read_grid("mxfp8_e4m3"), note="weights are decoded to bfloat16, which holds them"),
    Target("safetensors:nvfp4", read_grid("fp4_e2m1-g16-sym-e4m3"), note="one level of scales, the other is 1"),
    Target(
        "safetensors:w8a8-int8",
        read_grid("int8-channel-sym"),
        activations=read_grid("int8-token-sym"),
        note="the runtime rounds the inputs of linears to 8 bits, a scale per token",
    ),
    Target(
        "safetensors:w8a8-fp8",
        read_grid("fp8_e4m3-channel-sym"),
        activations=read_grid("fp8_e4m3-token-sym"),
        note="the runtime rounds the inputs of linears to fp8, a scale per token",
    ),
)
