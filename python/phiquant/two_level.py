"""Scales stored in two levels: chosen, rounded level by level, and put together again.

The upper level is the rule of the lower one once more: the scales of a super-block are quantized by
the same kernels as the values of a block. Every float is rounded to its stored type before anything
that depends on it is rounded: super-block scale, block codes, and last the codes of the values.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import ops
from .spec import QuantSpec, Shape

Found = tuple[Tensor, Tensor | None, Tensor | None]  # scale, zero point, minimum of every block, as `ops` find them


class Parameters(NamedTuple):
    """The stored parameters of a two-level spec, named as in `QuantizedTensor`."""

    scales: Tensor
    super_scales: Tensor
    minimums: Tensor | None = None
    super_minimums: Tensor | None = None

    def block_values(self) -> tuple[Tensor, Tensor | None]:
        """(scale, minimum) of every block, float32: the grid as it is stored."""
        scale = values(self.scales, self.super_scales)
        if self.minimums is None or self.super_minimums is None:
            return scale, None
        return scale, -values(self.minimums, self.super_minimums)


def values(codes: Tensor, super_scales: Tensor) -> Tensor:
    """super_scale * code of every block, float32 in the shape of `codes`."""
    if codes.dtype == torch.float8_e4m3fn:
        return ops.dequantize(codes.view(torch.uint8), super_scales, format="e4m3fn")
    return ops.dequantize(codes, super_scales)


@torch.no_grad()
def choose(
    x: Tensor,
    spec: QuantSpec,
    grid: dict,
    mse: bool = False,
    weights: Tensor | None = None,
    found: Found | None = None,
) -> Parameters:
    """The parameters of x on its min-max ranges (`mse`: on the ranges of least squared error; or on those `found`).

    weights: float32 [K], with mse: how much an error in each column of x [N, K] counts; then the parameters as stored
    are moved to where the weighed error is least.

    grid: the keyword arguments of `ops.choose_range` for the spec's element and rule, scales in float32.
    With a minimum, a block's range is widened to hold 0, and its scale follows from the minimum as
    stored. A super-block with a value that is infinite gets NaN.
    """
    shape = tuple(x.shape)
    blocks, supers = spec.scale_shape(shape), spec.super_shape(shape)
    if spec.offset == "none":
        scale, _, _ = found or _ranges(x, blocks, grid, mse, weights)
        return _refined(Parameters(*_quantize(scale, supers, spec)), x, spec, grid, weights)
    steps = spec.element.qmax
    if mse or found:
        scale, _, low = found or _ranges(x, blocks, grid, mse, weights)
        assert low is not None
        high = low + steps * scale
    else:
        low, high = ops.min_max(x, blocks)
    minimums, super_minimums = _quantize(-low.clamp(max=0), supers, spec)
    low = -values(minimums, super_minimums)
    scales, super_scales = _quantize(((high - low) / steps).clamp(min=0), supers, spec)
    return _refined(Parameters(scales, super_scales, minimums, super_minimums), x, spec, grid, weights)


def _ranges(x: Tensor, blocks: Shape, grid: dict, mse: bool, weights: Tensor | None) -> Found:
    return ops.search_range(x, blocks, **grid, weights=weights) if mse else ops.choose_range(x, blocks, **grid)


def _refined(found: Parameters, x: Tensor, spec: QuantSpec, grid: dict, weights: Tensor | None) -> Parameters:
    """The same parameters, or better ones; only integer codes of scales have codes next to them."""
    assert spec.two_level is not None
    if weights is None or spec.two_level.is_float or not x.numel():
        return found
    parts: list[Any] = [None if part is None else part.float().cpu().contiguous() for part in found]
    known = {name: value for name, value in grid.items() if name not in ("rule", "scale_dtype")}
    ops.refine_two_level(
        x.cpu().contiguous(),
        weights.float().cpu().contiguous(),
        *parts,
        **known,
        rule=grid["rule"],
        sub_qmin=spec.two_level.qmin,
        sub_qmax=spec.two_level.qmax,
        scale_dtype=getattr(torch, spec.scale_dtype),
    )
    back: list[Any] = [None if new is None else new.to(old) for old, new in zip(found, parts, strict=True)]
    return Parameters(*back)


def fake_quantize(x: Tensor, spec: QuantSpec, grid: dict, out: Tensor | None = None) -> Tensor:
    """x on the grid that `choose` finds, in one pass over memory where x is on the CPU and needs no gradient."""
    assert spec.two_level is not None
    fits = x.device.type == "cpu" and "levels" not in grid and (out is None or out.is_contiguous())
    needs_gradient = torch.is_grad_enabled() and x.requires_grad
    whole = spec.two_level.super_block == "tensor"
    if not fits or needs_gradient or x.numel() == 0 or (whole and grid["rule"] != "absmax"):
        scale, minimum = choose(x, spec, grid).block_values()
        known = {name: value for name, value in grid.items() if name not in ("rule", "scale_dtype")}
        return ops.fake_quantize(x, scale, None, minimum, **known, out=out)
    values = x.detach().contiguous()
    result = torch.empty_like(values) if out is None else out
    shape = tuple(x.shape)
    lower = {name: value for name, value in grid.items() if name != "scale_dtype"}
    upper = _upper(spec)
    subs = spec.scale_shape(shape)[-1] // spec.super_shape(shape)[-1]
    super_scale = None
    if whole:  # the largest scale of a block is that of the tensor as one block
        largest, _, _ = ops.choose_range(values, spec.super_shape(shape), **grid)
        super_scale = ops.range_from_min_max(torch.zeros_like(largest), largest, **upper)[0].float()
    names = {name: f"sub_{name}" for name in ("qmin", "qmax", "rule", "format")}
    sub = {names.get(name, name): value for name, value in upper.items()}
    block = spec.block_size(shape)
    ops.fake_quantize_two_level_out(values, result, block=block, subs=subs, super_scale=super_scale, **lower, **sub)
    return result


def _upper(spec: QuantSpec) -> dict:
    """The keyword arguments by which the ops know how the scales of a super-block are quantized."""
    two_level = spec.two_level
    assert two_level is not None
    return {
        "qmin": two_level.qmin,
        "qmax": two_level.qmax,
        "rule": "signed_absmax" if two_level.signed else "absmax",
        "scale_dtype": getattr(torch, spec.scale_dtype),
        "format": "e4m3fn" if two_level.is_float else "integer",
    }


def _quantize(scale: Tensor, supers: Shape, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """(codes, super_scales) of the blocks' ideal scales."""
    two_level = spec.two_level
    assert two_level is not None
    stored = getattr(torch, two_level.dtype)
    if scale.numel() == 0:
        return scale.to(stored), scale.new_zeros(supers, dtype=getattr(torch, spec.scale_dtype))
    codes, super_scales, _, _ = ops.quantize_dynamic(scale, supers, **_upper(spec))
    return codes.view(stored), super_scales
