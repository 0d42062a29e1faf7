"""How tensors of any shape become what the kernels take: contiguous blocks that share one scale.

The shape of `scale` says which values of x share it: all axes alike up to one that is divided into
runs, 1 after it ([N, 1]: rows; [N, K / g]: groups; [1, 1] or a single value: the whole tensor), or 1
everywhere but at one axis (a channel axis).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def channel_axis(shape: Sequence[int], scale_shape: Sequence[int]) -> int | None:
    """None if the values that share a scale lie side by side, else the axis to move to the front."""
    shape, scale_shape = tuple(shape), tuple(scale_shape)
    if math.prod(scale_shape) == 1 and math.prod(shape) > 0:
        return None
    if len(shape) == len(scale_shape):
        first = next((i for i, (n, s) in enumerate(zip(shape, scale_shape, strict=True)) if n != s), None)
        if first is None:
            return None
        divides = scale_shape[first] > 0 and shape[first] % scale_shape[first] == 0
        if divides and all(s == 1 for s in scale_shape[first + 1 :]):
            return None
        axes = [i for i, s in enumerate(scale_shape) if s != 1]
        if len(axes) == 1 and scale_shape[axes[0]] == shape[axes[0]]:
            return axes[0]
    raise ValueError(
        f"scale of shape {list(scale_shape)} does not divide x of shape {list(shape)}; expected one scale, "
        "one per index of an axis (1 elsewhere), or one per run of the last axis, such as [N, K / group]"
    )


def block_length(shape: Sequence[int], scale_shape: Sequence[int]) -> int:
    """Number of values that share one scale."""
    scales = math.prod(scale_shape)
    return math.prod(shape) // scales if scales else 0


def to_blocks(x: Tensor, axis: int | None) -> Tensor:
    """x, contiguous, with `axis` first: a block is a run of consecutive values."""
    return x.contiguous() if axis is None else x.movedim(axis, 0).contiguous()


def from_blocks(x: Tensor, axis: int | None) -> Tensor:
    """Undoes `to_blocks`, as a view."""
    return x if axis is None else x.movedim(0, axis)


def flat(scale: Tensor) -> Tensor:
    """Parameters as the kernels take them: float32 [blocks], constants for the gradient."""
    return scale.detach().reshape(-1).float().contiguous()


def flat_or_none(zero_point: Tensor | None, minimum: Tensor | None) -> Tensor | None:
    """The one of zero point and minimum that is given, as the kernels take it."""
    if zero_point is not None and minimum is not None:
        raise ValueError("give a zero_point or a minimum, not both")
    offset = zero_point if minimum is None else minimum
    return None if offset is None else flat(offset)


def apply(
    op: Any, op_out: Any, x: Tensor, axis: int | None, arguments: tuple, out: Tensor | None, named: dict[str, Any]
) -> Tensor:
    """`op`, or with `out` its form that writes there, on x as blocks."""
    blocks = to_blocks(x, axis)
    if out is None:
        return from_blocks(op.default(blocks, *arguments, **named), axis)
    check_out(x, out)
    direct = out if axis is None and out.is_contiguous() else torch.empty_like(blocks)
    op_out.default(blocks, *arguments, direct, **named)
    return deliver(direct, axis, out)


def check_out(x: Tensor, out: Tensor) -> None:
    """ValueError unless `out` may be written in place of a result in x's shape and dtype."""
    if torch.is_grad_enabled() and (x.requires_grad or out.requires_grad):
        raise ValueError("out= records no gradient; use it under torch.no_grad(), or leave it out")
    if out.shape != x.shape or out.dtype != x.dtype:
        raise ValueError(f"out must be {x.dtype} {list(x.shape)} like x, got {out.dtype} {list(out.shape)}")


def deliver(result: Tensor, axis: int | None, out: Tensor | None) -> Tensor:
    """The result in the shape of x: `out` itself, filled, where one is given."""
    if out is None:
        return from_blocks(result, axis)
    return out if result is out else out.copy_(from_blocks(result, axis))
