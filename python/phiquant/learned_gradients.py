"""The gradients of learned grids: LSQ's for scale and offset, those of codes that stay, straight through a rounding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import ops
from .fake_quant import fake_quantize as on_known_grid
from .spec import Binary, Int, QuantSpec, Ternary
from .tensor import element_arguments


def on_learned_grid(
    x: Tensor,
    spec: QuantSpec,
    scale: Tensor,
    zero_point: Tensor | None,
    minimum: Tensor | None,
    gradient_scale: float = 1.0,
) -> Tensor:
    """x on a grid whose scale, and zero point or minimum, float32, receive LSQ's gradients."""
    element = spec.element
    if isinstance(element, Int | Ternary):
        known: dict[str, Any] = {"qmin": element.qmin, "qmax": element.qmax, "gradient_scale": gradient_scale}
        return ops.learned_fake_quantize(x, scale, zero_point, minimum, **known)
    result: Tensor = _OnLevels.apply(x, scale, spec, gradient_scale)
    return result


def codes_of(x: Tensor, spec: QuantSpec, scale: Tensor, zero_point: Tensor | None, minimum: Tensor | None) -> Tensor:
    """The codes that `on_learned_grid` decodes."""
    element = spec.element
    known: dict[str, Any] = {"qmin": element.qmin, "qmax": element.qmax, **element_arguments(element)}
    return ops.quantize(x.detach(), scale.detach(), zero_point, minimum, **known).contiguous()


class _OnLevels(torch.autograd.Function):
    """`fake_quantize` of elements that are not integers, and LSQ's gradient of the scale.

    y = s c(x / s): ds = sum of g (c - v) where the gradient passes to x, of g c elsewhere: (sum of g y - dx x) / s.
    Of binary sum of g c, for its c, the sign of x, does not depend on s at all.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, spec: QuantSpec, gradient_scale: float) -> Tensor:
        y = on_known_grid(x.detach(), spec, scale=scale.detach())
        ctx.save_for_backward(x, scale, y)
        ctx.spec, ctx.gradient_scale = spec, gradient_scale
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (g,) = gradients
        x, scale, y = ctx.saved_tensors
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            (dx,) = torch.autograd.grad(on_known_grid(leaf, ctx.spec, scale=scale.detach()), leaf, g)
        passed = 0.0 if isinstance(ctx.spec.element, Binary) else dx.float() * x.float()
        sums = _sums(g.float() * y.float() - passed, scale)
        return dx, torch.where(scale != 0, sums / scale, 0.0) * ctx.gradient_scale, None, None


class Decode(torch.autograd.Function):
    """The values of codes that stay, differentiable in scale and minimum."""

    @staticmethod
    def forward(
        ctx: Any,
        codes: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        minimum: Tensor | None,
        named: dict[str, Any],
        dtype: torch.dtype,
        gradient_scale: float,
    ) -> Tensor:
        ctx.save_for_backward(codes, scale, zero_point)
        ctx.named, ctx.gradient_scale = named, gradient_scale
        return ops.dequantize(codes, scale, zero_point, minimum, **named, dtype=dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple:
        g = gradients[0].float()
        codes, scale, zero_point = ctx.saved_tensors
        levels = ops.dequantize(codes, torch.ones_like(scale), zero_point, **ctx.named)
        dscale = _sums(g * levels, scale) * ctx.gradient_scale
        dminimum = _sums(g, scale) * ctx.gradient_scale if ctx.needs_input_grad[3] else None
        return None, dscale, None, dminimum, None, None, None


def _sums(values: Tensor, scale: Tensor) -> Tensor:
    """The sum over the values that share each scale, in its shape."""
    rows = ops.blocks.to_blocks(values, ops.blocks.channel_axis(values.shape, scale.shape)).reshape(scale.numel(), -1)
    return rows.sum(1, dtype=torch.float64).float().reshape(scale.shape)


class _Through(torch.autograd.Function):
    """`change(t)` with the gradient of t."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        return change(t)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def through(t: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """`change(t)` with the gradient of t: the straight-through estimator."""
    result: Tensor = _Through.apply(t, change)
    return result


def stored(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded to `dtype`, kept finite; a float32 or bfloat16 subnormal is 0, as in csrc/core/range.inl."""
    largest, smallest = torch.finfo(dtype).max, _smallest(dtype)
    rounded = t.clamp(-largest, largest).to(dtype).float()
    return torch.where(rounded.abs() < smallest, 0.0, rounded)


def positive(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """|scale| as stored, at least the smallest positive number; d/dscale is the sign."""
    size = scale * torch.where(scale < 0, -1.0, 1.0)
    return through(size, lambda t: stored(t.clamp(min=_smallest(dtype)), dtype))


def _smallest(dtype: torch.dtype) -> float:
    return 2.0**-24 if dtype == torch.float16 else torch.finfo(torch.float32).tiny
