"""The affine ops written with torch's own: what runs on every device without kernels of ours.

The formulas are those of csrc/core/affine_ref.cpp and the results are the same bits. Arguments are
those of csrc/ops/schemas.cpp: x holds blocks of consecutive values, scale and offset are float32
[blocks]. Nothing here is called by name: importing the module registers it with the dispatcher.
"""

from __future__ import annotations

import torch
from torch import Tensor

_STORAGE = (torch.float32, torch.bfloat16, torch.float16)
_TINY = torch.finfo(torch.float32).tiny
ABSMAX, SIGNED_ABSMAX, ZERO_POINT, MINIMUM = range(4)


def _inverse(scale: Tensor) -> Tensor:
    return torch.where(scale.abs() < _TINY, 0.0, 1.0 / scale)


def _clamp(v: Tensor, lo: float, hi: float) -> Tensor:
    """As the kernels do: `lo` where v is NaN."""
    v = torch.where(v > lo, v, lo)
    return torch.where(v < hi, v, hi)


def _unclamped(x: Tensor, scale: Tensor, offset: Tensor | None, minimum: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Rounded codes before the clamp, with scale and offset as columns; all float32 [blocks, block]."""
    blocks = scale.numel()
    rows = x.reshape(blocks, -1).float()
    s = scale.reshape(blocks, 1)
    o = torch.zeros_like(s) if offset is None else offset.reshape(blocks, 1)
    inv = _inverse(s)
    v = torch.round((rows - o) * inv) if minimum else torch.round(rows * inv) + o
    return v, s, o


def _decode(q: Tensor, s: Tensor, o: Tensor, minimum: bool) -> Tensor:
    return s * q + o if minimum else s * (q - o)


def quantize(x: Tensor, scale: Tensor, offset: Tensor | None, minimum: bool, qmin: int, qmax: int) -> Tensor:
    v, _, _ = _unclamped(x, scale, offset, minimum)
    return _clamp(v, qmin, qmax).to(torch.int8 if qmin < 0 else torch.uint8).reshape(x.shape)


def dequantize_out(codes: Tensor, scale: Tensor, offset: Tensor | None, minimum: bool, out: Tensor) -> None:
    blocks = scale.numel()
    s = scale.reshape(blocks, 1)
    o = torch.zeros_like(s) if offset is None else offset.reshape(blocks, 1)
    out.copy_(_decode(codes.reshape(blocks, -1).float(), s, o, minimum).reshape(out.shape))


def fake_quantize(x: Tensor, scale: Tensor, offset: Tensor | None, minimum: bool, qmin: int, qmax: int) -> Tensor:
    v, s, o = _unclamped(x, scale, offset, minimum)
    return _decode(_clamp(v, qmin, qmax), s, o, minimum).to(x.dtype).reshape(x.shape)


def fake_quantize_out(
    x: Tensor, scale: Tensor, offset: Tensor | None, minimum: bool, qmin: int, qmax: int, out: Tensor
) -> None:
    out.copy_(fake_quantize(x, scale, offset, minimum, qmin, qmax))


def fake_quantize_backward(
    grad: Tensor, x: Tensor, scale: Tensor, offset: Tensor | None, minimum: bool, qmin: int, qmax: int
) -> Tensor:
    v, _, _ = _unclamped(x, scale, offset, minimum)
    inside = ((v >= qmin) & (v <= qmax)).reshape(x.shape)
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


def _stored(v: Tensor, storage: int) -> Tensor:
    dtype = _STORAGE[storage]
    info = torch.finfo(dtype)
    v = _clamp(v, -info.max, info.max).to(dtype).float()
    smallest = 2.0**-24 if dtype == torch.float16 else _TINY
    return torch.where(v.abs() < smallest, 0.0, v)


def range_from_min_max(lo: Tensor, hi: Tensor, qmin: int, qmax: int, rule: int, storage: int) -> tuple[Tensor, Tensor]:
    known = lo <= hi
    offset = torch.zeros_like(lo)
    if rule == ABSMAX:
        scale = _stored(torch.where(-lo > hi, -lo, hi) / qmax, storage)
    elif rule == SIGNED_ABSMAX:
        scale = _stored(torch.where(-lo >= hi, lo, hi) / qmin, storage)
    elif rule == ZERO_POINT:
        lo, hi = torch.where(lo < 0, lo, 0.0), torch.where(hi > 0, hi, 0.0)
        scale = _stored((hi - lo) / (qmax - qmin), storage)
        offset = _clamp(torch.round(qmin - lo * _inverse(scale)), qmin, qmax)
    else:
        offset = _stored(lo, storage)
        width = hi - offset
        scale = _stored(torch.where(width > 0, width, 0.0) / (qmax - qmin), storage)
    return torch.where(known, scale, 0.0), torch.where(known, offset, 0.0)


def choose_range(
    x: Tensor, block: int, qmin: int, qmax: int, rule: int, storage: int, mse: bool
) -> tuple[Tensor, Tensor]:
    if mse:
        raise NotImplementedError("the range search runs in the CPU kernel: ops.choose_range takes x there")
    lo, hi = min_max(x, block)
    return range_from_min_max(lo, hi, qmin, qmax, rule, storage)


def quantize_dynamic(
    x: Tensor, block: int, qmin: int, qmax: int, rule: int, storage: int
) -> tuple[Tensor, Tensor, Tensor]:
    scale, offset = choose_range(x, block, qmin, qmax, rule, storage, False)
    codes = quantize(x, scale, offset, rule == MINIMUM, qmin, qmax)
    finite = x.reshape(len(scale), -1).isfinite().all(1)
    return codes, torch.where(finite, scale, float("nan")), offset


def fake_quantize_dynamic(x: Tensor, block: int, qmin: int, qmax: int, rule: int, storage: int) -> Tensor:
    scale, offset = choose_range(x, block, qmin, qmax, rule, storage, False)
    return fake_quantize(x, scale, offset, rule == MINIMUM, qmin, qmax)


def fake_quantize_dynamic_out(
    x: Tensor, block: int, qmin: int, qmax: int, rule: int, storage: int, out: Tensor
) -> None:
    out.copy_(fake_quantize_dynamic(x, block, qmin, qmax, rule, storage))


def fake_quantize_dynamic_backward(
    grad: Tensor, x: Tensor, block: int, qmin: int, qmax: int, rule: int, storage: int
) -> Tensor:
    scale, offset = choose_range(x, block, qmin, qmax, rule, storage, False)
    return fake_quantize_backward(grad, x, scale, offset, rule == MINIMUM, qmin, qmax)


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
