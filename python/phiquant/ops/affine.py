"""Affine grids: typed wrappers of the ops, their meta kernels and gradients.

The shape of `scale` says which values of x share it (blocks.py). Arithmetic is float32 for every
dtype of x. Rounding is the one rule of csrc/core/affine.h: q = clamp(rne(x * (1 / s)) + z, qmin, qmax).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import composition
from .blocks import apply, block_length, channel_axis, deliver, flat, flat_or_none, from_blocks, to_blocks

_ops = torch.ops.phiquant
RULES = {
    "absmax": composition.ABSMAX,
    "signed_absmax": composition.SIGNED_ABSMAX,
    "zero_point": composition.ZERO_POINT,
    "minimum": composition.MINIMUM,
    "absmean": composition.ABSMEAN,
    "twn": composition.TWN,
}
FORMATS = ("integer", "e4m3fn", "e5m2", "e2m1", "e1m2", "e3m0", "table")
Levels = Tensor | Sequence[float]
STORAGE = {dtype: code for code, dtype in enumerate(composition.STORAGE)}


def codec(format: str, levels: Levels | None, x: Tensor) -> dict[str, Any]:
    """How codes are read, as the ops take it; nothing for plain integers, their default."""
    if format not in FORMATS:
        raise ValueError(f"format is one of {', '.join(FORMATS)}, not {format!r}")
    if (levels is not None) != (format == "table"):
        raise ValueError("levels are given for format 'table' and for no other")
    if levels is None:
        return {} if format == "integer" else {"format": FORMATS.index(format)}
    table = levels.detach() if isinstance(levels, Tensor) else torch.tensor([*levels], device=x.device)
    table = table.float().reshape(-1, table.shape[-1]).contiguous()
    return {"format": FORMATS.index(format), "levels": table}


def quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    minimum: Tensor | None = None,
    *,
    qmin: int,
    qmax: int,
    format: str = "integer",
    levels: Levels | None = None,
) -> Tensor:
    """Codes of x, in its shape: int8 if qmin < 0, else uint8. NaN gets the lowest level; infinities the ends.

    format: how codes are read, in all functions here. "integer": qmin..qmax. A float ("e4m3fn", "e5m2",
    "e2m1", "e1m2", "e3m0"): bit patterns. "table": indices into `levels`, ascending, of shape [size] or
    [1, size], or [blocks, size] where each block has its own (then blocks are consecutive values).
    """
    axis = channel_axis(x.shape, scale.shape)
    codes = _ops.quantize.default(
        to_blocks(x, axis),
        flat(scale),
        flat_or_none(zero_point, minimum),
        minimum is not None,
        qmin,
        qmax,
        **codec(format, levels, x),
    )
    return from_blocks(codes, axis)


def dequantize(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    minimum: Tensor | None = None,
    *,
    format: str = "integer",
    levels: Levels | None = None,
    dtype: torch.dtype = torch.float32,
    out: Tensor | None = None,
) -> Tensor:
    """Values of int8 or uint8 codes: s (q - z), s q + m or s level(q), computed in float32, then cast to `dtype`."""
    axis = channel_axis(codes.shape, scale.shape)
    blocks = to_blocks(codes, axis)
    direct = out if out is not None and axis is None and out.is_contiguous() else None
    result = torch.empty_like(blocks, dtype=dtype if out is None else out.dtype) if direct is None else direct
    offset = flat_or_none(zero_point, minimum)
    named = codec(format, levels, codes)
    _ops.dequantize_out.default(blocks, flat(scale), offset, minimum is not None, result, **named)
    return deliver(result, axis, out)


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    minimum: Tensor | None = None,
    *,
    qmin: int,
    qmax: int,
    format: str = "integer",
    levels: Levels | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """decode(encode(x)) in the dtype of x. Differentiable in x: the gradient passes where the code was
    not clamped (straight-through estimator) and is 0 elsewhere; nothing but x itself is kept for it.

    out: a tensor of x's shape and dtype to write to; may be x. Records no gradient.
    """
    axis = channel_axis(x.shape, scale.shape)
    arguments = (flat(scale), flat_or_none(zero_point, minimum), minimum is not None, qmin, qmax)
    named = codec(format, levels, x)
    return apply(_ops.fake_quantize, _ops.fake_quantize_out, x, axis, arguments, out, named)


def fake_quantize_dynamic(
    x: Tensor,
    scale_shape: Sequence[int],
    *,
    qmin: int,
    qmax: int,
    rule: str,
    scale_dtype: torch.dtype = torch.float32,
    format: str = "integer",
    levels: Levels | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """`fake_quantize` with the range taken from x itself, found and used in one pass over memory.

    The scale counts as a constant for the gradient. Same values as choose_range + fake_quantize.
    """
    axis = channel_axis(x.shape, scale_shape)
    arguments = (block_length(x.shape, scale_shape), qmin, qmax, RULES[rule], STORAGE[scale_dtype])
    named = codec(format, levels, x)
    return apply(_ops.fake_quantize_dynamic, _ops.fake_quantize_dynamic_out, x, axis, arguments, out, named)


def quantize_dynamic(
    x: Tensor,
    scale_shape: Sequence[int],
    *,
    qmin: int,
    qmax: int,
    rule: str,
    scale_dtype: torch.dtype = torch.float32,
    format: str = "integer",
    levels: Levels | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(codes, scale, zero_point, minimum): `choose_range` and `quantize` in one pass over memory.

    The scale of a block that holds a value that is not finite is NaN.
    """
    axis = channel_axis(x.shape, scale_shape)
    codes, scale, offset = _ops.quantize_dynamic.default(
        to_blocks(x.detach(), axis),
        block_length(x.shape, scale_shape),
        qmin,
        qmax,
        RULES[rule],
        STORAGE[scale_dtype],
        **codec(format, levels, x),
    )
    return from_blocks(codes, axis), *parameters(scale, offset, rule, scale_dtype, scale_shape)


def min_max(x: Tensor, scale_shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of each block, float32 `scale_shape`; NaN is passed over."""
    axis = channel_axis(x.shape, scale_shape)
    lo, hi = _ops.min_max.default(to_blocks(x.detach(), axis), block_length(x.shape, scale_shape))
    return lo.reshape(tuple(scale_shape)), hi.reshape(tuple(scale_shape))


def choose_range(
    x: Tensor,
    scale_shape: Sequence[int],
    *,
    qmin: int,
    qmax: int,
    rule: str,
    scale_dtype: torch.dtype = torch.float32,
    format: str = "integer",
    levels: Levels | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(scale, zero_point, minimum) of each block of x by the rule, shape `scale_shape`, already rounded as stored.

    zero_point is int32 and given for rule "zero_point"; minimum for rule "minimum"; else None.
    `search_range` finds the range of least squared error instead.
    """
    axis = channel_axis(x.shape, scale_shape)
    scale, offset = _ops.choose_range.default(
        to_blocks(x.detach(), axis),
        block_length(x.shape, scale_shape),
        qmin,
        qmax,
        RULES[rule],
        STORAGE[scale_dtype],
        **codec(format, levels, x),
    )
    return parameters(scale, offset, rule, scale_dtype, scale_shape)


def range_from_min_max(
    lo: Tensor,
    hi: Tensor,
    *,
    qmin: int,
    qmax: int,
    rule: str,
    scale_dtype: torch.dtype = torch.float32,
    format: str = "integer",
    levels: Levels | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(scale, zero_point, minimum) of known ranges, in the shape of lo and hi; see `choose_range`."""
    grid = (qmin, qmax, RULES[rule], STORAGE[scale_dtype])
    scale, offset = _ops.range_from_min_max.default(flat(lo), flat(hi), *grid, **codec(format, levels, lo))
    return parameters(scale, offset, rule, scale_dtype, lo.shape)


def parameters(
    scale: Tensor, offset: Tensor, rule: str, scale_dtype: torch.dtype, shape: Sequence[int]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Scale and offset of the kernels, float32 [blocks], as (scale, zero_point, minimum) of `shape`."""
    shape = tuple(shape)
    zero_point = offset.reshape(shape).to(torch.int32) if rule == "zero_point" else None
    minimum = offset.reshape(shape).to(scale_dtype) if rule == "minimum" else None
    return scale.reshape(shape).to(scale_dtype), zero_point, minimum


# --- meta kernels: shapes and dtypes only ---------------------------------------------------------


@torch.library.register_fake("phiquant::quantize")
def _(x: Tensor, scale: Tensor, offset: Tensor | None, minimum: bool, qmin: int, qmax: int, *_: Any) -> Tensor:
    return torch.empty_like(x, dtype=torch.int8 if qmin < 0 else torch.uint8)


@torch.library.register_fake("phiquant::fake_quantize")
@torch.library.register_fake("phiquant::fake_quantize_dynamic")
def _like_x(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


@torch.library.register_fake("phiquant::fake_quantize_backward")
@torch.library.register_fake("phiquant::fake_quantize_dynamic_backward")
def _like_second(grad: Tensor, x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


@torch.library.register_fake("phiquant::dequantize_out")
@torch.library.register_fake("phiquant::fake_quantize_out")
@torch.library.register_fake("phiquant::fake_quantize_dynamic_out")
def _nothing(*_: Any) -> None:
    return None


@torch.library.register_fake("phiquant::min_max")
@torch.library.register_fake("phiquant::choose_range")
def _two_per_block(x: Tensor, block: int, *_: Any) -> tuple[Tensor, Tensor]:
    blocks = x.numel() // block if block else 0
    return x.new_empty(blocks, dtype=torch.float32), x.new_empty(blocks, dtype=torch.float32)


@torch.library.register_fake("phiquant::quantize_dynamic")
def _(x: Tensor, block: int, qmin: int, qmax: int, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x, dtype=torch.int8 if qmin < 0 else torch.uint8), *_two_per_block(x, block)


@torch.library.register_fake("phiquant::range_from_min_max")
def _(lo: Tensor, hi: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(lo), torch.empty_like(lo)


# --- gradients: the kernels are C++ ops, joined here ----------------------------------------------


def _keep(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, *ctx.arguments = inputs
    tensors = [a for a in ctx.arguments if isinstance(a, Tensor)]
    # x is kept as it is, not copied: for a weight that is the parameter itself.
    ctx.save_for_backward(x, *tensors)
    ctx.arguments = [None if isinstance(a, Tensor) else a for a in ctx.arguments]
    ctx.places = [i for i, a in enumerate(inputs[1:]) if isinstance(a, Tensor)]


def _backward(op: Any) -> Any:
    def backward(ctx: Any, grad: Tensor) -> tuple:
        x, *tensors = ctx.saved_tensors
        arguments = list(ctx.arguments)
        for place, tensor in zip(ctx.places, tensors, strict=True):
            arguments[place] = tensor
        return op(grad.contiguous(), x, *arguments), *(None for _ in arguments)

    return backward


torch.library.register_autograd(
    "phiquant::fake_quantize", _backward(_ops.fake_quantize_backward.default), setup_context=_keep
)
_masked = _backward(_ops.fake_quantize_dynamic_backward.default)


def _dynamic_backward(ctx: Any, grad: Tensor) -> tuple:
    """No value lies outside a range that its block's own absmax sets: the gradient passes whole.

    That is so for scales of many bits. Float16 near its underflow, e4m3 and e8m0 round so coarsely that a
    value can.
    """
    _, _, _, rule, storage, *_ = ctx.arguments
    if rule == RULES["absmax"] and storage in (STORAGE[torch.float32], STORAGE[torch.bfloat16]):
        return grad, *(None for _ in ctx.arguments)
    return _masked(ctx, grad)


torch.library.register_autograd("phiquant::fake_quantize_dynamic", _dynamic_backward, setup_context=_keep)

_library = torch.library.Library("phiquant", "IMPL")
for _kernel in composition.KERNELS:
    _library.impl(_kernel.__name__, _kernel, "CompositeExplicitAutograd")
