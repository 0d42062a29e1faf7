"""How the constants of a weight become its values, as nodes of an OpenVINO graph.

(code - zero point) * scale, all in float32. The CPU plugin recognises this chain and keeps the codes as they are;
folded, it gives the bits of `QuantizedTensor.dequantize`. N = rows, K = values of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ...extras import need
from ..source import Entry
from .layout import Part, parts

Constant = Callable[[Part], Any]  # the node that stands for a constant


def decode(entry: Entry, constant: Constant) -> Any:
    """The node with the values of `entry`, float32 of its shape."""
    op = need("openvino.opset13", extra="openvino")
    codes, *rest = parts(entry)
    others = {part.name.rpartition("/")[2]: part for part in rest}

    def values(part: Part) -> Any:
        node = constant(part)
        return node if part.type == "f32" else op.convert(node, "f32")

    if "codebook" in others:
        node = _look_up(op, values(others["codebook"]), constant(codes), others["codebook"])
    else:
        node = values(codes)
    if "zero_point" in others:
        node = op.subtract(node, values(others["zero_point"]))
    if "super_scale" in others:
        n, supers, blocks = others["scale"].shape
        scale = op.multiply(values(others["scale"]), values(others["super_scale"]))
        node = op.multiply(node, _reshape(op, scale, (n, supers * blocks, 1)))
    elif "scale" in others:
        node = op.multiply(node, values(others["scale"]))
    return node if codes.shape == entry.shape else _reshape(op, node, entry.shape)


def _look_up(op: Any, levels: Any, codes: Any, codebook: Part) -> Any:
    """The level of each code: of the one codebook, or of the codebook of its row of codes."""
    indices = op.convert(codes, "i32")
    rows = len(codebook.shape) - 1
    return op.gather(levels, indices, op.constant(np.int64(rows)), batch_dims=rows)


def _reshape(op: Any, node: Any, shape: tuple[int, ...]) -> Any:
    return op.reshape(node, op.constant(np.array(shape, np.int64)), special_zero=False)
