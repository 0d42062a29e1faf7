"""Targets of GGUF, the format of llama.cpp: a grid for each of its block types, and its mixtures."""

from __future__ import annotations

from functools import partial

from ..grid_text import read_grid
from .base import Target, floats
from .gguf_mixtures import MIXTURES, modules

_TERNARY = "for models trained on ternary weights"

TARGETS = (
    *floats("gguf"),
    Target("gguf:Q8_0", read_grid("int8-g32-sym-f16")),
    Target("gguf:Q4_0", read_grid("int4-g32-signmax-f16")),
    Target("gguf:Q4_1", read_grid("uint4-g32-min-f16")),
    Target("gguf:Q5_0", read_grid("int5-g32-signmax-f16")),
    Target("gguf:Q5_1", read_grid("uint5-g32-min-f16")),
    Target("gguf:Q2_K", read_grid("q2_k")),
    Target("gguf:Q3_K", read_grid("q3_k")),
    Target("gguf:Q4_K", read_grid("q4_k")),
    Target("gguf:Q5_K", read_grid("q5_k")),
    Target("gguf:Q6_K", read_grid("q6_k")),
    Target("gguf:IQ4_NL", read_grid("iq4_nl")),
    Target("gguf:IQ4_XS", read_grid("iq4_xs")),
    Target(
        "gguf:TQ1_0",
        read_grid("ternary-g256-absmean-f16"),
        note=f"{_TERNARY}; pq.export() is asked by ternary='TQ1_0'",
        asks=(("ternary", "TQ1_0"),),
        bits=1.6875,
    ),
    Target("gguf:TQ2_0", read_grid("ternary-g256-absmean-f16"), note=_TERNARY),
    Target("gguf:MXFP4", read_grid("mxfp4")),
    Target("gguf:NVFP4", read_grid("fp4_e2m1-g16-sym-e4m3")),
    *(Target(f"gguf:{name}", None, mixture=partial(modules, name)) for name in MIXTURES),
)
