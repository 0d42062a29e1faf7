"""Targets of ONNX folders, for ONNX Runtime and ORT-GenAI.

Scales are float16 values, so that OpenVINO and GGUF can hold the same grids; the file has them widened to float32,
in which the graph computes. Signed grids of 2 and 4 bits are anchored on the signed extreme, as GGUF's Q4_0.
"""

from __future__ import annotations

from ..grid_text import read_grid
from .base import Target, floats

_KINDS = {"int4": "signmax", "uint4": "asym", "int8": "sym", "uint8": "asym", "int2": "signmax", "uint2": "asym"}
_GRAINS = (*(f"g{size}" for size in (16, 32, 64, 128, 256)), "channel")

TARGETS = (
    *floats("onnx"),
    *(
        Target(f"onnx:{element}-{grain}", read_grid(f"{element}-{grain}-{kind}-f16"))
        for element, kind in _KINDS.items()
        for grain in _GRAINS
    ),
    Target(
        "onnx:int8-dynamic",
        read_grid("int8-channel-sym"),
        activations=read_grid("uint8-tensor-asym"),
        note="the runtime rounds the inputs of linears to 8 bits, a scale per tensor",
    ),
)
