"""Targets of static QDQ ONNX models, for Qualcomm's QNN."""

from __future__ import annotations

from ..grid_text import read_grid
from .base import Target, floats

_NOTE = "activations are rounded on ranges from calibration text, keys and values to 8 bits"

TARGETS = (
    *floats("qnn"),
    *(
        Target(f"qnn:a{a}w{w}", read_grid(f"int{w}-channel-sym"), "float32", read_grid(f"uint{a}-tensor-asym"), _NOTE)
        for a, w in ((16, 8), (16, 4), (8, 8))
    ),
)
