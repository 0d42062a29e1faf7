"""The parts of an OpenVINO graph that know nothing of a model: inputs, small constants, rotation, masks.

B = batch, S = new tokens, T = all tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ...extras import need
from ...models.rope import Rope

MASKED = -65504.0  # the lowest float16: what the pass to PagedAttention expects


class Nodes:
    """Makes nodes of openvino.opset13."""

    def __init__(self) -> None:
        self.ov = need("openvino", extra="openvino")
        self.op = need("openvino.opset13", extra="openvino")
        self.op6 = need("openvino.opset6", extra="openvino")

    def input(self, name: str, kind: str, shape: Sequence[int]) -> Any:
        """An input of the model; passes look it up by its friendly name, users by the name of its tensor."""
        node = self.op.parameter(list(shape), getattr(self.ov.Type, kind))
        node.set_friendly_name(name)
        node.output(0).set_names({name})
        return node

    def integer(self, value: int) -> Any:
        return self.op.constant(np.int64(value))

    def integers(self, *values: int) -> Any:
        return self.op.constant(np.array(values, np.int64))

    def float(self, value: float) -> Any:
        return self.op.constant(np.float32(value))

    def unsqueezed(self, x: Any, *axes: int) -> Any:
        for axis in axes:
            x = self.op.unsqueeze(x, self.integer(axis))
        return x

    def size(self, x: Any, axis: int) -> Any:
        """The length of an axis, a scalar."""
        return self.op.gather(self.op.shape_of(x), self.integer(axis), self.integer(0))

    def shape(self, *sizes: Any) -> Any:
        """A shape of numbers and of scalar nodes."""
        nodes = [self.integers(s) if isinstance(s, int) else self.unsqueezed(s, 0) for s in sizes]
        return self.op.concat(nodes, 0)

    def part(self, x: Any, start: int, stop: int) -> Any:
        """Elements start .. stop of each head of x [B, heads, S, D]."""
        return self.op.slice(x, self.integers(start), self.integers(stop), self.integers(1), self.integers(3))


def frequencies(rope: Rope, factors: Sequence[float] | None) -> np.ndarray:
    """What a position is multiplied with: float32 [1, dimensions / 2, 1], computed as Transformers does."""
    # By torch: numpy's powers differ in the last bit, which grows with the position.
    exponents = torch.arange(0, rope.dimensions, 2).float() / rope.dimensions
    inverse: torch.Tensor = 1.0 / (torch.tensor(factors or [1.0]) * rope.theta**exponents)
    return inverse.numpy().reshape(1, -1, 1)


def rotation(make: Nodes, rope: Rope, positions: Any) -> tuple[Any, Any]:
    """cos and sin [B, 1, S, dimensions] of positions [B, S]. LongRoPE takes the long factors where T > original."""
    op = make.op
    angular = op.constant(frequencies(rope, rope.short))
    if rope.long is not None:
        length = op.add(op.reduce_max(positions, make.integers(0, 1), keep_dims=False), make.integer(1))
        longer = op.greater(length, make.integer(rope.original_context))
        angular = op.select(longer, op.constant(frequencies(rope, rope.long)), angular)
    shape = make.shape(make.size(positions, 0), 1, 1)
    angular = op.broadcast(angular, shape, broadcast_spec="BIDIRECTIONAL")
    angles = op.matmul(angular, op.convert(make.unsqueezed(positions, 1), "f32"), False, False)
    angles = op.transpose(angles, make.integers(0, 2, 1))
    angles = op.concat([angles, angles], -1)
    both = [op.cos(angles), op.sin(angles)]
    if rope.attention_factor != 1.0:
        both = [op.multiply(one, make.float(rope.attention_factor)) for one in both]
    return make.unsqueezed(both[0], 1), make.unsqueezed(both[1], 1)


def rotate(make: Nodes, x: Any, cos: Any, sin: Any, dimensions: int, width: int) -> Any:
    """x * cos + half-turned(x) * sin on the first `dimensions` of each head of `width`; the others pass.

    A pass of the CPU plugin fuses this form, with slices, to one operation.
    """
    op = make.op
    rest = make.part(x, dimensions, width) if dimensions < width else None
    if rest is not None:
        x = make.part(x, 0, dimensions)
    first, second = make.part(x, 0, dimensions // 2), make.part(x, dimensions // 2, dimensions)
    turned = op.concat([op.multiply(second, make.float(-1.0)), first], -1)
    x = op.add(op.multiply(x, cos), op.multiply(turned, sin))
    return x if rest is None else op.concat([x, rest], -1)


def attention_mask(make: Nodes, ids: Any, mask: Any, window: int | None) -> Any:
    """What to add to the scores, [B, 1, S, T]: 0, or MASKED for keys that are padding, later or too far back.

    The window is written with BitwiseAnd and single-axis Unsqueezes: the pass to PagedAttention knows no other form,
    and drops the window of a mask that it does not know.
    """
    op = make.op
    batch, new, total = make.size(ids, 0), make.size(ids, 1), make.size(mask, 1)
    k = make.unsqueezed(op.range(make.integer(0), total, make.integer(1), "i64"), 0, 0, 0)  # [1, 1, 1, T]
    q = make.unsqueezed(op.range(op.subtract(total, new), total, make.integer(1), "i64"), 0, 0, 3)  # [1, 1, S, 1]
    padding = make.unsqueezed(op.not_equal(mask, make.integer(0)), 1, 1)
    true, seen = op.constant(np.array(True)), op.less_equal(k, q)
    if window:
        near = op.greater(k, op.add(q, op.constant(np.full((1, 1, 1, 1), -window, np.int64))))
        seen = op.bitwise_and(op.bitwise_and(true, near), seen)
    seen = op.bitwise_and(op.bitwise_and(true, seen), padding)
    seen = op.broadcast(seen, make.shape(batch, 1, new, total), broadcast_spec="BIDIRECTIONAL")
    return op.select(seen, make.float(0.0), make.float(MASKED))
