"""Targets of GGUF, the format of llama.cpp."""

from __future__ import annotations

from ..grid_text import read_grid
from .base import Target, floats

TARGETS = (
    *floats("gguf"),
    Target("gguf:Q8_0", read_grid("int8-g32-sym-f16")),
    Target("gguf:Q4_0", read_grid("int4-g32-signmax-f16")),
    Target("gguf:Q4_1", read_grid("uint4-g32-min-f16")),
)
