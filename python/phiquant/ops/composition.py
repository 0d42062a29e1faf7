"""The affine ops written with torch's own: what runs on every device without kernels of ours.

The formulas are those of csrc/core/affine_ref.cpp and the results are the same bits. Arguments are
those of csrc/ops/schemas.cpp: x holds blocks of consecutive values, scale and offset are float32
[blocks]; levels are float32 [1 or blocks, size]. Nothing here is called by name: importing the module
registers it with the dispatcher.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

STORAGE = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu, torch.float8_e4m3fn)
_TINY = torch.finfo(torch.float32).tiny
ABSMAX, SIGNED_ABSMAX, ZERO_POINT, MINIMUM, ABSMEAN, TWN = range(6)
INTEGER, TABLE = 0, 6


class _Float(NamedTuple):
    """csrc/core/types.h: kMinifloats."""

    exponent: int
    fraction: int
    emin: int
    largest: float
    reach: float
    has_infinity: bool = False


_FLOATS = {
    1: _Float(4, 3, -6, 448.0, 464.0),
    2: _Float(5, 2, -14, 57344.0, 61439.99609375, True),
    3: _Float(2, 1, 0, 6.0, 6.999999523162842),
    4: _Float(1, 2, 1, 3.5, 3.749999761581421),
    5: _Float(3, 0, -2, 16.0, 23.999998092651367),
}


class _Grid(NamedTuple):
    """The blocks' parameters as columns, float32 [blocks, 1], and how codes are read."""

    scale: Tensor
    inverse: Tensor
    offset: Tensor
    minimum: bool
    qmin: int = 0
    qmax: int = 0
    format: int = INTEGER
    levels: Tensor | None = None  # [1 or blocks, size]


def _grid(
    scale: Tensor,
    offset: Tensor | None,
    minimum: bool,
    qmin: int = 0,
    qmax: int = 0,
    format: int = INTEGER,
    levels: Tensor | None = None,
    inverse: Tensor | None = None,
) -> _Grid:
    s = scale.reshape(-1, 1)
    o = torch.zeros_like(s) if offset is None else offset.reshape(-1, 1)
    inv = _inverse(s) if inverse is None else inverse.reshape(-1, 1)
    return _Grid(s, inv, o, minimum, qmin, qmax, format, levels)


def _inverse(scale: Tensor) -> Tensor:
    return torch.where(scale.abs() < _TINY, 0.0, 1.0 / scale)


def _clamp(v: Tensor, lo: float, hi: float) -> Tensor:
    """As the kernels do: `lo` where v is NaN."""
    v = torch.where(v > lo, v, lo)
    return torch.where(v < hi, v, hi)


def _rows(x: Tensor, grid: _Grid) -> Tensor:
    return x.reshape(len(grid.scale), -1).float()


def _position(x: Tensor, grid: _Grid) -> Tensor:
    """Where the mask of the gradient looks, [blocks, block]: integers rounded, others x / s, before any clamp."""
    rows = _rows(x, grid)
    if grid.format != INTEGER:
        return rows * grid.inverse
    if grid.minimum:
        return torch.round((rows - grid.offset) * grid.inverse)
    return torch.round(rows * grid.inverse) + grid.offset


def _codes(x: Tensor, grid: _Grid) -> Tensor:
    """The codes of x, [blocks, block]: floats with integer values (a zero keeps its sign), else integers."""
    position = _position(x, grid)
    if grid.format == INTEGER:
        return _clamp(position, grid.qmin, grid.qmax)
    if grid.format == TABLE:
        bounds = _bounds(grid.levels, len(position))
        found = torch.searchsorted(bounds, position.contiguous(), right=True, out_int32=True)
        return torch.where(position.isnan(), 0, found)
    f = _FLOATS[grid.format]
    t = _clamp(position, -f.largest, f.largest)
    magnitude = t.abs()
    power = (magnitude.view(torch.int32) & 0x7F800000).view(torch.float32).clamp_min(2.0**f.emin)
    shift = power * 2.0 ** (23 - f.fraction)
    rounded = (magnitude + shift) - shift
    bits = (rounded * 2.0 ** (-126 - f.emin)).view(torch.int32) >> (23 - f.fraction)
    return bits | (t.view(torch.int32) < 0).int() << (f.exponent + f.fraction)


def _bounds(levels: Tensor | None, blocks: int) -> Tensor:
    """The smallest float that is nearer to the upper of two levels, or as near: [blocks, size - 1]."""
    assert levels is not None
    wide = levels.double()
    middle = (wide[:, :-1] + wide[:, 1:]) * 0.5
    bound = middle.float()
    bound = torch.where(bound.double() < middle, torch.nextafter(bound, torch.full_like(bound, math.inf)), bound)
    return bound.expand(blocks, -1).contiguous()


def _values(codes: Tensor, grid: _Grid) -> Tensor:
    """The values of integer codes [blocks, block]."""
    if grid.format == INTEGER:
        q = codes.float()
        return grid.scale * q + grid.offset if grid.minimum else grid.scale * (q - grid.offset)
    if grid.format == TABLE:
        assert grid.levels is not None
        index = codes.long().clamp_max(grid.levels.shape[1] - 1)
        return grid.scale * grid.levels.expand(len(codes), -1).gather(1, index)
    f = _FLOATS[grid.format]
    sign = f.exponent + f.fraction
    magnitude = codes.int() & (1 << sign) - 1
    value = (magnitude << (23 - f.fraction)).view(torch.float32) * 2.0 ** (126 + f.emin)
    if sign == 7:
        infinite = f.has_infinity & (magnitude == 0x7C)
        value = torch.where(value > f.largest, torch.where(infinite, math.inf, math.nan), value)
    return grid.scale * torch.where(codes.int() >> sign & 1 == 1, -value, value)


def _inside(x: Tensor, grid: _Grid) -> Tensor:
    position = _position(x, grid)
    if grid.format == INTEGER:
        return (position >= grid.qmin) & (position <= grid.qmax)
    if grid.format == TABLE:
        assert grid.levels is not None
        levels = grid.levels
        low = levels[:, :1] - (levels[:, 1:2] - levels[:, :1]) * 0.5
        high = levels[:, -1:] + (levels[:, -1:] - levels[:, -2:-1]) * 0.5
        return (position >= low) & (position <= high)
    return position.abs() <= _FLOATS[grid.format].reach


def _code_dtype(qmin: int) -> torch.dtype:
    return torch.int8 if qmin < 0 else torch.uint8


def quantize(
    x: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    minimum: bool,
    qmin: int,
    qmax: int,
    format: int = INTEGER,
    levels: Tensor | None = None,
) -> Tensor:
    codes = _codes(x, _grid(scale, offset, minimum, qmin, qmax, format, levels))
    return codes.to(_code_dtype(qmin)).reshape(x.shape)


def dequantize_out(
    codes: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    minimum: bool,
    out: Tensor,
    format: int = INTEGER,
    levels: Tensor | None = None,
) -> None:
    grid = _grid(scale, offset, minimum, format=format, levels=levels)
    out.copy_(_values(codes.reshape(len(grid.scale), -1), grid).reshape(out.shape))


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    minimum: bool,
    qmin: int,
    qmax: int,
    format: int = INTEGER,
    levels: Tensor | None = None,
) -> Tensor:
    grid = _grid(scale, offset, minimum, qmin, qmax, format, levels)
    return _values(_codes(x, grid), grid).to(x.dtype).reshape(x.shape)


def fake_quantize_out(
    x: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    minimum: bool,
    qmin: int,
    qmax: int,
    out: Tensor,
    format: int = INTEGER,
    levels: Tensor | None = None,
) -> None:
    out.copy_(fake_quantize(x, scale, offset, minimum, qmin, qmax, format, levels))


def fake_quantize_backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    minimum: bool,
    qmin: int,
    qmax: int,
    format: int = INTEGER,
    levels: Tensor | None = None,
) -> Tensor:
    inside = _inside(x, _grid(scale, offset, minimum, qmin, qmax, format, levels)).reshape(x.shape)
    return torch.where(inside, grad, torch.zeros((), dtype=grad.dtype, device=grad.device))


def min_max(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    if x.numel() == 0:
        empty = x.new_empty(0, dtype=torch.float32)
        return empty, empty.clone()
    rows = x.reshape(-1, block).float()
    nan = rows.isnan()
    lo = torch.where(nan, float("inf"), rows).amin(1)
    hi = torch.where(nan, float("-inf"), rows).amax(1)
    return lo, hi


def _power_of_two(v: Tensor) -> Tensor:
    """The largest power of two that is not above v; 0 below the smallest normal float32."""
    return (v.view(torch.int32) & 0x7F800000).view(torch.float32)


def _stored(v: Tensor, storage: int) -> Tensor:
    dtype = STORAGE[storage]
    if dtype == torch.float8_e8m0fnu:
        return _power_of_two(_clamp(v, 2.0**-127, 2.0**127)).clamp(min=2.0**-127)
    largest = torch.finfo(dtype).max
    v = _clamp(v, -largest, largest).to(dtype).float()
    smallest = {torch.float16: 2.0**-24, torch.float8_e4m3fn: 2.0**-9}.get(dtype, _TINY)
    return torch.where(v.abs() < smallest, 0.0, v)


def _abs_sum(rows: Tensor) -> Tensor:
    """Sums of |x| over the rows [blocks, n], float64, added in the order of csrc/core/affine_ref.cpp."""
    blocks, n = rows.shape
    values = torch.nn.functional.pad(rows.abs(), (0, -n % 4096 if n > 4096 else -n % 16))
    values = values.reshape(blocks, -1, min(values.shape[1], 4096) // 16, 16)
    lanes = torch.zeros_like(values[:, :, 0])
    for i in range(values.shape[2]):
        lanes = lanes + values[:, :, i]
    for width in (8, 4, 2, 1):
        lanes = lanes[..., :width] + lanes[..., width : 2 * width]
    total = torch.zeros(blocks, dtype=torch.float64, device=rows.device)
    for piece in lanes[..., 0].double().split(8, dim=1):
        part = torch.zeros_like(total)
        for chunk in piece.unbind(1):
            part = part + chunk
        total = total + part
    return total


def _means(rows: Tensor, rule: int) -> tuple[Tensor, Tensor]:
    """(threshold or 0, scale) of the rules that take means of |x|; csrc/core/range.inl."""
    mean = _mean(rows, ~rows.isnan())
    if rule == ABSMEAN:
        return torch.zeros_like(mean), mean
    threshold = 0.7 * mean
    return threshold, _mean(rows, rows.abs() > threshold[:, None])


def _mean(rows: Tensor, counted: Tensor) -> Tensor:
    count = counted.sum(1)
    return torch.where(count > 0, _abs_sum(torch.where(counted, rows, 0.0)) / count, 0.0).float()


def _largest(qmax: int, format: int, levels: Tensor | None) -> Any:
    """The largest level: what absmax maps the largest magnitude to."""
    if format == TABLE:
        assert levels is not None
        return levels[0, -1]
    return qmax if format == INTEGER else _FLOATS[format].largest


def range_from_min_max(
    lo: Tensor,
    hi: Tensor,
    qmin: int,
    qmax: int,
    rule: int,
    storage: int,
    format: int = INTEGER,
    levels: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    known = lo <= hi
    offset = torch.zeros_like(lo)
    if rule == ABSMAX:
        largest = _largest(qmax, format, levels)
        if STORAGE[storage] == torch.float8_e8m0fnu:
            largest = _power_of_two(torch.as_tensor(largest, dtype=torch.float32, device=lo.device))
        scale = _stored(torch.where(-lo > hi, -lo, hi) / largest, storage)
    elif rule == SIGNED_ABSMAX:
        lowest = levels[0, 0] if levels is not None else qmin
        scale = _stored(torch.where(-lo >= hi, lo, hi) / lowest, storage)
    elif rule in (ABSMEAN, TWN):
        scale = _stored(hi, storage)
    elif rule == ZERO_POINT:
        lo, hi = torch.where(lo < 0, lo, 0.0), torch.where(hi > 0, hi, 0.0)
        scale = _stored((hi - lo) / (qmax - qmin), storage)
        offset = _clamp(torch.round(qmin - lo * _inverse(scale)), qmin, qmax)
    else:
        offset = _stored(lo, storage)
        width = hi - offset
        scale = _stored(torch.where(width > 0, width, 0.0) / (qmax - qmin), storage)
    return torch.where(known, scale, 0.0), torch.where(known, offset, 0.0)


def _parameters(
    x: Tensor, block: int, qmin: int, qmax: int, rule: int, storage: int, format: int, levels: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(scale, offset, inverse) of each block; inverse is None where it is 1 / scale."""
    if rule not in (ABSMEAN, TWN) or x.numel() == 0:
        return *range_from_min_max(*min_max(x, block), qmin, qmax, rule, storage, format, levels), None
    threshold, scale = _means(x.reshape(-1, block).float(), rule)
    found = range_from_min_max(threshold, scale, qmin, qmax, rule, storage)
    return *found, _inverse(2.0 * threshold) if rule == TWN else None


def choose_range(
    x: Tensor,
    block: int,
    qmin: int,
    qmax: int,
    rule: int,
    storage: int,
    format: int = INTEGER,
    levels: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    scale, offset, _ = _parameters(x, block, qmin, qmax, rule, storage, format, levels)
    return scale, offset


def quantize_dynamic(
    x: Tensor,
    block: int,
    qmin: int,
    qmax: int,
    rule: int,
    storage: int,
    format: int = INTEGER,
    levels: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    scale, offset, inverse = _parameters(x, block, qmin, qmax, rule, storage, format, levels)
    grid = _grid(scale, offset, rule == MINIMUM, qmin, qmax, format, levels, inverse)
    codes = _codes(x, grid).to(_code_dtype(qmin)).reshape(x.shape)
    finite = x.reshape(len(scale), -1).isfinite().all(1)
    return codes, torch.where(finite, scale, float("nan")), offset


def fake_quantize_dynamic(
    x: Tensor,
    block: int,
    qmin: int,
    qmax: int,
    rule: int,
    storage: int,
    format: int = INTEGER,
    levels: Tensor | None = None,
) -> Tensor:
    scale, offset, inverse = _parameters(x, block, qmin, qmax, rule, storage, format, levels)
    grid = _grid(scale, offset, rule == MINIMUM, qmin, qmax, format, levels, inverse)
    return _values(_codes(x, grid), grid).to(x.dtype).reshape(x.shape)


def fake_quantize_dynamic_out(
    x: Tensor,
    block: int,
    qmin: int,
    qmax: int,
    rule: int,
    storage: int,
    out: Tensor,
    format: int = INTEGER,
    levels: Tensor | None = None,
) -> None:
    out.copy_(fake_quantize_dynamic(x, block, qmin, qmax, rule, storage, format, levels))


def fake_quantize_dynamic_backward(
    grad: Tensor,
    x: Tensor,
    block: int,
    qmin: int,
    qmax: int,
    rule: int,
    storage: int,
    format: int = INTEGER,
    levels: Tensor | None = None,
) -> Tensor:
    scale, offset, inverse = _parameters(x, block, qmin, qmax, rule, storage, format, levels)
    inside = _inside(x, _grid(scale, offset, rule == MINIMUM, qmin, qmax, format, levels, inverse)).reshape(x.shape)
    return torch.where(inside, grad, torch.zeros((), dtype=grad.dtype, device=grad.device))


KERNELS = (
    quantize,
    dequantize_out,
    fake_quantize,
    fake_quantize_out,
    fake_quantize_backward,
    quantize_dynamic,
    fake_quantize_dynamic,
    fake_quantize_dynamic_out,
    fake_quantize_dynamic_backward,
    min_max,
    choose_range,
    range_from_min_max,
)
