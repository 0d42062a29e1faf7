"""Targets of OpenVINO IR folders."""

from __future__ import annotations

from ..grid_text import read_grid
from .base import Target, floats

_EXPANDED = "OpenVINO's CPU plugin keeps these codes in the file and expands them in memory."
_GRIDS = {
    **{f"i4-g{size}": f"int4-g{size}-signmax-f16" for size in (32, 64, 128)},
    "i4-channel": "int4-channel-signmax-f16",
    **{f"u4-g{size}": f"uint4-g{size}-asym-f16" for size in (32, 64, 128)},
    "u4-channel": "uint4-channel-asym-f16",
    **{f"i8-{grain}": f"int8-{grain}-sym-f16" for grain in ("channel", "g32", "g64", "g128")},
    **{f"u8-{grain}": f"uint8-{grain}-asym-f16" for grain in ("channel", "g32", "g64", "g128")},
    **{f"u2-g{size}": f"uint2-g{size}-asym-f16" for size in (32, 64, 128)},
    **{f"nf4-g{size}": f"nf4-g{size}-sym-f16" for size in (32, 64, 128)},
    "mxfp4": "mxfp4",
    "nvfp4": "nvfp4",
    "fp8-channel": "fp8_e4m3-channel-sym-f16",
    "codebook16": "codebook16-tensor-f16",
}
TARGETS = (
    *floats("openvino"),
    *(
        Target(f"openvino:{name}", read_grid(grid), note=_EXPANDED if name in ("fp8-channel", "codebook16") else "")
        for name, grid in _GRIDS.items()
    ),
)
