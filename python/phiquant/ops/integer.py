"""Integer arithmetic on codes: products in 32-bit integers, and their way back to 8 bits.

The formulas are those of csrc/core/gemm.h and requantize.h; every CPU level gives the same integers.
Tensors on other devices are computed on the CPU and the result is copied back.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_ops = torch.ops.phiquant
_FLOATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """Weights [N, K] as the kernels read them.

    packed: int8 [groups * ceil(N / groups / 16), ceil(K / 4), 16, 4]; sums: int32 [N], of each row's codes;
    zero_points: int32 [N], or None where all are 0.
    """

    packed: Tensor
    sums: Tensor
    zero_points: Tensor | None


def _on_cpu(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`op` on copies of its tensors on the CPU, its result on the device of the first."""

    @functools.wraps(op)
    def run(x: Tensor, *arguments: Any) -> Tensor:
        if x.device.type in ("cpu", "meta"):
            return op(x, *arguments)
        return op(x.cpu(), *(a.cpu() if isinstance(a, Tensor) else a for a in arguments)).to(x.device)

    return run


def quantize_multiplier(real: Tensor) -> tuple[Tensor, Tensor]:
    """(multiplier, shift), int32 in the shape of `real`: real = multiplier 2^-31 2^-shift, to 31 bits.

    The multiplier lies in [2^30, 2^31), or is 0 for real < 2^-32; a negative shift shifts left. ValueError for a
    value that is negative or not finite.
    """
    return _ops.quantize_multiplier.default(real.detach().cpu().double().contiguous())


def requantize(sums: Tensor, multiplier: Tensor, shift: Tensor, *, zero_point: int = 0, qmin: int, qmax: int) -> Tensor:
    """Codes of int32 sums [M, N]: clamp(zero_point + sum * M) with gemmlowp's two roundings.

    multiplier, shift: int32 [N], or one value for all columns. int8 if qmin < 0, else uint8.
    """
    n = sums.shape[-1]
    multiplier, shift = (t.expand(n).contiguous() if t.numel() == 1 else t for t in (multiplier, shift))
    return _on_cpu(_ops.requantize.default)(sums.contiguous(), multiplier, shift, zero_point, qmin, qmax)


def pack_weight(codes: Tensor, zero_points: Tensor | None = None, *, groups: int = 1) -> PackedWeight:
    """int8 or uint8 codes [N, K] in the layout of the kernels; the N / groups rows of each group by themselves.

    zero_points: int32 [N] or None. uint8 codes become int8, and their zero points 128 less.
    """
    codes = codes.detach().cpu()
    n = codes.shape[0]
    zero = None if zero_points is None else zero_points.detach().cpu().to(torch.int32).reshape(-1).expand(n)
    if codes.dtype == torch.uint8:
        codes = (codes ^ 0x80).view(torch.int8)
        zero = (torch.zeros(n, dtype=torch.int32) if zero is None else zero) - 128
    if zero is not None and not zero.any():
        zero = None
    parts = [_ops.pack_weight.default(part.contiguous()) for part in codes.chunk(groups)]
    packed, sums = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return PackedWeight(packed, sums, None if zero is None else zero.contiguous())


def linear_sums(x: Tensor, x_zero: int, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """int32 [M, N]: the sum over k of (x - x_zero)(w - zero_point), plus an int32 bias [N]; x codes [M, K]."""
    arguments = (x_zero, weight.packed, weight.sums, weight.zero_points, bias)
    return _on_cpu(_ops.linear_sums.default)(x.contiguous(), *arguments)


def linear_codes(
    x: Tensor,
    x_zero: int,
    weight: PackedWeight,
    bias: Tensor | None,
    multiplier: Tensor,
    shift: Tensor,
    *,
    zero_point: int,
    qmin: int,
    qmax: int,
) -> Tensor:
    """Codes [M, N] of a linear layer: `requantize(linear_sums(...))` without the sums going through memory."""
    arguments = (x_zero, weight.packed, weight.sums, weight.zero_points, bias, multiplier, shift)
    return _on_cpu(_ops.linear_codes.default)(x.contiguous(), *arguments, zero_point, qmin, qmax)


def linear_floats(
    x: Tensor,
    x_scale: Tensor,
    x_zero: Tensor | None,
    weight: PackedWeight,
    w_scale: Tensor,
    bias: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Floats [M, N] of a linear layer whose activations have a scale for each row.

    float(sum) * w_scale[n] * x_scale[m] + bias[n], in float32 and in this order, then cast to `dtype`. x: codes
    [M, K]; x_scale: float32 [M]; x_zero: int32 [M] or None; w_scale, bias: float32 [N]. ValueError if the
    weights have zero points.
    """
    if weight.zero_points is not None:
        raise ValueError("weights with zero points have no float product; quantize them symmetrically")
    arguments = (x_scale, x_zero, weight.packed, weight.sums, w_scale, bias, _FLOATS[dtype])
    return _on_cpu(_ops.linear_floats.default)(x.contiguous(), *arguments)


def conv2d_codes(
    x: Tensor,
    x_zero: int,
    weight: PackedWeight,
    bias: Tensor | None,
    multiplier: Tensor,
    shift: Tensor,
    *,
    kernel: Sequence[int],
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    zero_point: int,
    qmin: int,
    qmax: int,
) -> Tensor:
    """Codes of a convolution, padded with x_zero: x [B, H, W, C] -> [B, H', W', N].

    weight: `pack_weight` of the codes [N, KH, KW, C / groups] reshaped to [N, K], with the same `groups`.
    """
    window = (list(kernel), list(stride), list(padding), list(dilation), groups)
    arguments = (x_zero, weight.packed, weight.sums, weight.zero_points, bias, *window, multiplier, shift)
    return _on_cpu(_ops.conv2d_codes.default)(x.contiguous(), *arguments, zero_point, qmin, qmax)


# --- meta kernels: shapes and dtypes only ---------------------------------------------------------


def _code_dtype(qmin: int) -> torch.dtype:
    return torch.int8 if qmin < 0 else torch.uint8


@torch.library.register_fake("phiquant::quantize_multiplier")
def _(real: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(real, dtype=torch.int32), torch.empty_like(real, dtype=torch.int32)


@torch.library.register_fake("phiquant::requantize")
def _(sums: Tensor, multiplier: Tensor, shift: Tensor, zero_point: int, qmin: int, qmax: int) -> Tensor:
    return torch.empty_like(sums, dtype=_code_dtype(qmin))


@torch.library.register_fake("phiquant::pack_weight")
def _(codes: Tensor) -> tuple[Tensor, Tensor]:
    n, k = codes.shape
    return codes.new_empty(-(-n // 16), -(-k // 4), 16, 4), codes.new_empty(n, dtype=torch.int32)


@torch.library.register_fake("phiquant::linear_sums")
def _(x: Tensor, x_zero: int, packed: Tensor, w_sums: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape[0], w_sums.shape[0], dtype=torch.int32)


@torch.library.register_fake("phiquant::linear_codes")
def _(x: Tensor, x_zero: int, packed: Tensor, w_sums: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(x.shape[0], w_sums.shape[0], dtype=_code_dtype(rest[-2]))


@torch.library.register_fake("phiquant::linear_floats")
def _(x: Tensor, x_scale: Tensor, x_zero: Tensor | None, packed: Tensor, w_sums: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(x.shape[0], w_sums.shape[0], dtype=list(_FLOATS)[rest[-1]])


@torch.library.register_fake("phiquant::conv2d_codes")
def _(
    x: Tensor,
    x_zero: int,
    packed: Tensor,
    w_sums: Tensor,
    w_zero: Tensor | None,
    bias: Tensor | None,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    *rest: Any,
) -> Tensor:
    out = [
        (size + 2 * p - d * (k - 1) - 1) // s + 1
        for size, k, s, p, d in zip(x.shape[1:3], kernel, stride, padding, dilation, strict=True)
    ]
    return x.new_empty(x.shape[0], *out, w_sums.shape[0], dtype=_code_dtype(rest[-2]))
