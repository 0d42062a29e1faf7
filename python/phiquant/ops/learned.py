"""Fake quantization that also learns its scale and offset: LSQ, LSQ+ (csrc/core/learned.h)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import composition
from .blocks import channel_axis, from_blocks, to_blocks

_ops = torch.ops.phiquant


def learned_fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    minimum: Tensor | None = None,
    *,
    qmin: int,
    qmax: int,
    gradient_scale: float = 1.0,
) -> Tensor:
    """`fake_quantize`, the same bits, differentiable in x, scale and zero_point or minimum.

    With v = x / s, or (x - m) / s for a minimum, c = clamp(rne(v), qmin - z, qmax - z) and g the gradient of the
    result: dx = g where v was not clamped, else 0; ds = sum of g (c - v) there and of g c elsewhere; dm = sum of g
    where v was clamped, dz = -s times that. The sums are over the values that share s, in an order that does not
    depend on threads. gradient_scale multiplies all but dx; LSQ's is 1 / sqrt(N qmax), N the number of values that
    share s.

    scale, zero_point, minimum: any float dtype, shapes as for `fake_quantize`; a zero point is a whole number.
    """
    if zero_point is not None and minimum is not None:
        raise ValueError("give a zero_point or a minimum, not both")
    axis = channel_axis(x.shape, scale.shape)
    offset = zero_point if minimum is None else minimum
    flat = [None if t is None else t.reshape(-1).float().contiguous() for t in (scale, offset)]
    y = _ops.learned_fake_quantize.default(
        to_blocks(x, axis), *flat, minimum is not None, qmin, qmax, float(gradient_scale)
    )
    return from_blocks(y, axis)


@torch.library.register_fake("phiquant::learned_fake_quantize")
def _(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


@torch.library.register_fake("phiquant::learned_fake_quantize_backward")
def _(grad: Tensor, x: Tensor, scale: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(scale), torch.empty_like(scale)


def _keep(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, scale, offset, *ctx.grid, ctx.gradient_scale = inputs
    ctx.has_offset = offset is not None
    ctx.save_for_backward(x, scale, *([offset] if ctx.has_offset else []))


def _backward(ctx: Any, grad: Tensor) -> tuple:
    x, scale, *rest = ctx.saved_tensors
    offset = rest[0] if rest else None
    dx, dscale, clipped = _ops.learned_fake_quantize_backward.default(grad.contiguous(), x, scale, offset, *ctx.grid)
    doffset = None
    if offset is not None:
        doffset = clipped * ctx.gradient_scale * (1.0 if ctx.grid[0] else -scale)
    return dx, dscale * ctx.gradient_scale, doffset, None, None, None, None


torch.library.register_autograd("phiquant::learned_fake_quantize", _backward, setup_context=_keep)


# --- other devices: torch's own operations, sums in float64 ------------------------------------------


def _composed(
    x: Tensor, scale: Tensor, offset: Tensor | None, minimum: bool, qmin: int, qmax: int, gradient_scale: float
) -> Tensor:
    return composition.fake_quantize(x, scale, offset, minimum, qmin, qmax)


def _composed_backward(
    grad: Tensor, x: Tensor, scale: Tensor, offset: Tensor | None, minimum: bool, qmin: int, qmax: int
) -> tuple[Tensor, Tensor, Tensor]:
    rows, g = (t.reshape(len(scale), -1).float() for t in (x, grad))
    shift = torch.zeros_like(scale) if offset is None else offset
    s, o = scale.unsqueeze(1), shift.unsqueeze(1)
    inverse = torch.where(s.abs() < torch.finfo(torch.float32).tiny, 0.0, 1.0 / s)
    v = (rows - o if minimum else rows) * inverse
    low, high = (qmin - (0 if minimum else o)), (qmax - (0 if minimum else o))
    r = v.round()
    inside = (r >= low) & (r <= high)
    c = torch.where(r > low, r, low + 0 * s)
    c = torch.where(c < high, c, high + 0 * s)
    dscale = (g * torch.where(inside, c - v, c)).sum(1, dtype=torch.float64)
    clipped = torch.where(inside, 0.0, g).sum(1, dtype=torch.float64)
    dx = torch.where(inside, g, 0.0).to(x.dtype).reshape(x.shape)
    return dx, dscale.float(), clipped.float()


_library = torch.library.Library("phiquant", "IMPL")
_library.impl("learned_fake_quantize", _composed, "CompositeExplicitAutograd")
_library.impl("learned_fake_quantize_backward", _composed_backward, "CompositeExplicitAutograd")
