"""Layers computed on codes alone: activations are `QuantizedTensor`s, sums 32-bit integers, no float in between.

With r = S (q - Z) for activations x, weights w and outputs y, a linear or convolution layer is
    q_y = Z_y + M (sum (q_x - Z_x)(q_w - Z_w) + q_b),   M = S_x S_w / S_y,   q_b = rne(b / (S_x S_w))
The sum is exact; M is a 31-bit fraction and a shift (ops.requantize). ReLU is a higher lower end of the clamp.
Activations have one scale and zero point for the whole tensor, weights one for all or one for each output channel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import ops
from .errors import PhiquantError
from .observers import KeepsDtype, MinMaxObserver
from .spec import Int, PerChannel, PerTensor, PerToken, QuantSpec
from .spec import spec as read_spec
from .tensor import QuantizedTensor

Pair = int | tuple[int, int]
_INT32_MAX = 2**31 - 1
TOKENS = QuantSpec(Int(8), PerToken())  # activations as they come


class ActivationQuantizer(KeepsDtype):
    """The grid of an activation, one scale and zero point: floats -> QuantizedTensor.

    scale: float32 [1], above 0; zero_point: int32 [1]. NaN becomes the lowest code, infinities the ends.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, scale: Tensor | float, zero_point: Tensor | int, spec: str | QuantSpec = "uint8-tensor-asym"):
        super().__init__()
        self.spec = activation_spec(spec)
        scale = torch.as_tensor(scale, dtype=torch.float32).reshape(1)
        # The range of values that are all 0 has no width; any scale holds them.
        self.register_buffer("scale", torch.where(scale == 0, torch.ones_like(scale), scale))
        self.register_buffer("zero_point", torch.as_tensor(zero_point, dtype=torch.int32).reshape(1))
        if not bool((self.scale > 0) & self.scale.isfinite()):
            raise ValueError(f"the scale of an activation must be finite and above 0, got {float(scale)}")

    @classmethod
    def from_observer(cls, observer: MinMaxObserver) -> ActivationQuantizer:
        """The grid of the range that `observer` has seen. RuntimeError if it has seen nothing."""
        scale, zero_point, _ = observer.parameters_of_range()
        return cls(scale, torch.zeros(1) if zero_point is None else zero_point, observer.spec)

    def forward(self, x: Tensor) -> QuantizedTensor:
        zero_point = None if self.spec.symmetric else self.zero_point
        element = self.spec.element
        return self.wrap(ops.quantize(x, self.scale, zero_point, qmin=element.qmin, qmax=element.qmax))

    def wrap(self, codes: Tensor) -> QuantizedTensor:
        """Codes that are on this grid already, with its parameters."""
        codes = codes.view(torch.int8 if self.spec.element.signed else torch.uint8)  # the same bytes
        shape = self.spec.scale_shape(tuple(codes.shape))
        zero_point = None if self.spec.symmetric else self.zero_point.reshape(shape)
        return QuantizedTensor(codes, self.scale.reshape(shape), zero_point, None, self.spec)

    def extra_repr(self) -> str:
        return f"{self.spec}, scale={self.scale.item():.6g}, zero_point={self.zero_point.item()}"


def activation_spec(spec: str | QuantSpec) -> QuantSpec:
    """`spec`, if activations of integer layers can have it: integers per tensor. PhiquantError otherwise."""
    spec = read_spec(spec)
    integers = isinstance(spec.element, Int) and spec.scale_dtype == "float32" and spec.offset != "minimum"
    if not (integers and isinstance(spec.granularity, PerTensor)):
        raise PhiquantError(
            f"activations of integer layers have one scale for the whole tensor, not {spec}; "
            "use 'uint8-tensor-asym' or 'int8-tensor-sym'"
        )
    return spec


@dataclass(frozen=True, eq=False)
class IntegerWeight:
    """A weight [N, ...] as the integer kernels take it.

    scales: float64 [N]. reach: float64 [N], the largest sum that 8-bit activations can make. kernel: its
    height and width, () for a linear layer; groups: of a convolution.
    """

    packed: ops.PackedWeight
    scales: Tensor
    reach: Tensor
    kernel: tuple[int, ...]
    groups: int

    @classmethod
    def pack(cls, weight: QuantizedTensor, groups: int = 1) -> IntegerWeight:
        """Lay out the codes of a linear [N, K] or convolution [N, C / groups, H, W] weight, once.

        PhiquantError if its grid is not of integers with one scale for the tensor or for each of the N.
        """
        spec = weight.spec
        rows = isinstance(spec.granularity, PerTensor) or spec.granularity == PerChannel(0)
        if not (isinstance(spec.element, Int) and rows) or spec.offset == "minimum" or weight.scales is None:
            raise PhiquantError(
                f"integer layers need weights of integers with one scale for each output channel, not {spec}; "
                "use 'int8-channel-sym', or the float layer"
            )
        n = weight.shape[0]
        codes = weight.codes.detach().cpu().movedim(1, -1).reshape(n, -1)
        zero = weight.zero_points
        zero = None if zero is None else zero.detach().cpu().reshape(-1).expand(n)
        differences = codes.double() - (0 if zero is None else zero.double()[:, None])
        scales = weight.scales.detach().cpu().double().reshape(-1).expand(n)
        reach = 255 * differences.abs().sum(1)
        return cls(ops.pack_weight(codes, zero, groups=groups), scales, reach, weight.shape[2:], groups)


def linear(
    x: QuantizedTensor, weight: IntegerWeight, bias: Tensor | None, output: ActivationQuantizer, relu: bool = False
) -> QuantizedTensor:
    """A linear layer on codes: x [..., K] -> [..., N], on the grid of `output`. bias: floats [N] or None."""
    x_scale, x_zero = scale_and_zero(x)
    codes = ops.linear_codes(
        x.codes.reshape(-1, x.shape[-1]),
        x_zero,
        weight.packed,
        *_bias_and_multiplier(x_scale, weight, bias, output),
        **_clamp(output, relu),
    )
    return output.wrap(codes.reshape(*x.shape[:-1], codes.shape[1]))


def conv2d(
    x: QuantizedTensor,
    weight: IntegerWeight,
    bias: Tensor | None,
    output: ActivationQuantizer,
    relu: bool = False,
    *,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
) -> QuantizedTensor:
    """A convolution on codes: x [B, C, H, W] -> [B, N, H', W'], padded with x's zero point: what 0 is coded as.

    The result lies in memory as torch's channels_last does, which the next convolution reads as it is.
    """
    x_scale, x_zero = scale_and_zero(x)
    codes = ops.conv2d_codes(
        x.codes.permute(0, 2, 3, 1),
        x_zero,
        weight.packed,
        *_bias_and_multiplier(x_scale, weight, bias, output),
        kernel=weight.kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=weight.groups,
        **_clamp(output, relu),
    )
    return output.wrap(codes.permute(0, 3, 1, 2))


def linear_tokens(
    x: QuantizedTensor, weight: IntegerWeight, bias: Tensor | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """A linear layer on codes [..., K] with a scale, or scale and zero point, for each token: floats [..., N].

    float(sum) * S_w[n] * S_x[m] + bias[n] in float32, cast to `dtype`; the sum is exact. The weight must be
    symmetric. PhiquantError for grids that this cannot take.
    """
    spec = x.spec
    if not (isinstance(spec.element, Int) and spec.granularity == PerToken()) or spec.offset == "minimum":
        raise PhiquantError(
            f"this product needs integers with a scale for each token, not {spec}; use 'int8-token-sym'"
        )
    if weight.packed.zero_points is not None:
        raise PhiquantError("weights with zero points have no product with tokens; quantize them symmetrically")
    if bool((weight.reach > _INT32_MAX).any()):
        raise PhiquantError("the sums of this weight can exceed 32 bits; keep this layer in float")
    assert x.scales is not None
    zero = None if x.zero_points is None else x.zero_points.reshape(-1)
    y = ops.linear_floats(
        x.codes.reshape(-1, x.shape[-1]),
        x.scales.reshape(-1).float(),
        zero,
        weight.packed,
        weight.scales.float(),
        None if bias is None else bias.detach().float(),
        dtype=dtype,
    )
    return y.reshape(*x.shape[:-1], y.shape[1])


def linear_per_token(x: Tensor, weight: IntegerWeight, bias: Tensor | None = None) -> Tensor:
    """`linear_tokens` of floats that become int8 as they come, symmetric: x [..., K] -> [..., N] in x's dtype.

    A token that holds a value that is not finite becomes NaN. No gradient.
    """
    shape = TOKENS.scale_shape(tuple(x.shape))
    codes, scale, _, _ = ops.quantize_dynamic(x, shape, qmin=-128, qmax=127, rule="absmax")
    return linear_tokens(QuantizedTensor(codes, scale, None, None, TOKENS), weight, bias, x.dtype)


def relu(x: QuantizedTensor) -> QuantizedTensor:
    """max(x, 0), which on codes is max(q, Z): the grid stays."""
    return same_grid(x, x.codes.clamp(min=scale_and_zero(x)[1]))


def max_pool2d(x: QuantizedTensor, kernel_size: Pair, stride: Pair | None = None, padding: Pair = 0) -> QuantizedTensor:
    """The largest of each window of x [B, C, H, W], on codes: they order as their values do, so the grid stays."""
    kernel, (vertical, horizontal) = _pair(kernel_size), _pair(padding)
    step = kernel if stride is None else _pair(stride)
    codes = x.codes
    if vertical or horizontal:
        sides = [horizontal, horizontal, vertical, vertical]
        codes = nn.functional.pad(codes, sides, value=x.spec.element.qmin)  # never the largest
    return same_grid(x, codes.unfold(2, kernel[0], step[0]).unfold(3, kernel[1], step[1]).amax((-2, -1)))


def _pair(size: Pair) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


def flatten(x: QuantizedTensor, start_dim: int = 1, end_dim: int = -1) -> QuantizedTensor:
    """Axes start_dim to end_dim made one, as torch.flatten does."""
    return same_grid(x, x.codes.flatten(start_dim, end_dim))


def same_grid(x: QuantizedTensor, codes: Tensor) -> QuantizedTensor:
    """`codes`, of any shape, on the grid of x, which has one scale."""
    shape = x.spec.scale_shape(tuple(codes.shape))
    assert x.scales is not None
    zero_points = None if x.zero_points is None else x.zero_points.reshape(shape)
    return QuantizedTensor(codes, x.scales.reshape(shape), zero_points, None, x.spec)


def scale_and_zero(x: QuantizedTensor) -> tuple[float, int]:
    """Scale and zero point of an activation. PhiquantError if it has another grid than integer layers take."""
    activation_spec(x.spec)
    assert x.scales is not None
    scale = x.scales.item()
    if not 0 < scale < float("inf"):
        raise PhiquantError(f"the scale of an activation must be finite and above 0, got {scale}")
    return scale, 0 if x.zero_points is None else int(x.zero_points.item())


def _bias_and_multiplier(
    x_scale: float, weight: IntegerWeight, bias: Tensor | None, output: ActivationQuantizer
) -> tuple[Tensor | None, Tensor, Tensor]:
    """q_b (int32 [N] or None), and M as multiplier and shift."""
    y_scale = output.scale.item()
    # A channel whose weights are all 0 may have scale 0. Its sum is the bias alone, which S_y holds as well.
    scales = torch.where(weight.scales == 0, y_scale / x_scale, weight.scales)
    sums = x_scale * scales
    rounded = torch.zeros_like(sums) if bias is None else torch.round(bias.detach().cpu().double() / sums)
    too_large = rounded.abs() + weight.reach > _INT32_MAX
    if bool(too_large.any()) or bool(rounded.isnan().any()):
        channel = int(torch.nonzero(too_large | rounded.isnan())[0])
        raise PhiquantError(
            f"output channel {channel} can exceed 32 bits: its bias is {rounded[channel]:.3g} steps of "
            f"{sums[channel]:.3g}, its weights reach {weight.reach[channel]:.3g}; keep this layer in float"
        )
    multiplier, shift = ops.quantize_multiplier(sums / y_scale)
    return None if bias is None else rounded.to(torch.int32), multiplier, shift


def _clamp(output: ActivationQuantizer, relu: bool) -> dict[str, Any]:
    zero_point, element = int(output.zero_point.item()), output.spec.element
    qmin = max(element.qmin, min(zero_point, element.qmax)) if relu else element.qmin
    return {"zero_point": zero_point, "qmin": qmin, "qmax": element.qmax}
