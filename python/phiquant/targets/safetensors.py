"""Targets of safetensors folders in the compressed-tensors layout, for Transformers and vLLM."""

from __future__ import annotations

from ..grid_text import read_grid
from .base import Target, floats

TARGETS = (
    *floats("safetensors"),
    *(Target(f"safetensors:int4-g{size}", read_grid(f"int4-g{size}-signmax-f16")) for size in (32, 64, 128)),
    Target("safetensors:int8-channel", read_grid("int8-channel-sym")),
)
