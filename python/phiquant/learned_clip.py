"""Learned clipping: the share of each block's extremes that its grid reaches is trained.

Sources: Choi et al., "PACT" (2018), for activations; Shao et al., "OmniQuant" (2023), whose sigmoid this is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from . import ops
from .learned import Learned, largest_level
from .learned_gradients import codes_of, on_learned_grid, positive, stored, through
from .observers import range_arguments
from .spec import FLOAT_BITS, QuantSpec
from .spec import spec as read_spec
from .tensor import QuantizedTensor

_WHOLE = 4.0  # sigmoid(4) = 0.98: nearly all of the range


class LearnedClipping(Learned):
    """Fake-quantizes on the range [l min(x), u max(x)] of each block; l and u, between 0 and 1, are trained.

    spec: anything whose range the extremes of a block give, in one level. Without an offset one share of max|x| (or
        of the signed extreme), with one two. shape: of the tensors to come.

    Parameters, float32 in `spec.scale_shape(shape)`: `upper`, and `lower` or None; the shares are their sigmoids. The
    extremes are those of x as it comes and count as constants: the range follows the weight, which LSQ's does not.
    """

    lower: nn.Parameter | None

    def __init__(self, spec: str | QuantSpec, shape: Sequence[int]) -> None:
        super().__init__()
        self.spec = read_spec(spec)
        if not self.spec.has_scale or self.spec.two_level is not None or self.spec.scale_dtype not in FLOAT_BITS:
            raise ValueError(f"{self.spec} has no range per block to clip; use range='learned' or 'mse'")
        if self.spec.anchor in ("absmean", "twn"):
            raise ValueError(f"the scale of {self.spec} is a mean of |x|, no extreme to clip; use range='learned'")
        scales = self.spec.scale_shape(tuple(shape))
        self.upper = nn.Parameter(torch.full(scales, _WHOLE))
        self.lower = None if self.spec.offset == "none" else nn.Parameter(torch.full(scales, _WHOLE))

    def forward(self, x: Tensor) -> Tensor:
        """x on the grid, same shape and dtype."""
        return on_learned_grid(x, self.spec, *self.in_use(x))

    def in_use(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(scale, zero_point, minimum) for x: float32, rounded as stored, differentiable in the shares."""
        dtype, element = getattr(torch, self.spec.scale_dtype), self.spec.element
        low, high = (t.reshape(self.upper.shape) for t in ops.min_max(x.detach(), self.upper.shape))
        low, high = low.clamp(max=0), high.clamp(min=0)
        upper = self.upper.sigmoid()
        if self.lower is None:
            if self.spec.anchor == "absmax":
                return positive(upper * torch.maximum(-low, high) / largest_level(self.spec), dtype), None, None
            scale = upper * torch.where(high > -low, high, low) / _lowest_level(self.spec)
            sign = torch.where(scale.detach() < 0, -1.0, 1.0)
            return positive(scale * sign, dtype) * sign, None, None
        low = self.lower.sigmoid() * low
        scale = positive((upper * high - low) / (element.qmax - element.qmin), dtype)
        if self.spec.offset == "minimum":
            return scale, None, through(low, lambda t: stored(t, dtype))
        zero = through(element.qmin - low / scale, lambda t: t.round().clamp(element.qmin, element.qmax))
        return scale, zero, None

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Start from the range of least squared error of x, as far as shares below 1 reach it."""
        scale, zero_point, minimum = ops.search_range(x, tuple(self.upper.shape), **range_arguments(self.spec))
        for parameter in (self.upper, self.lower):
            if parameter is not None:
                parameter.fill_(100.0)  # the whole range, to compare with
        whole, whole_zero, whole_minimum = self.in_use(x)
        if self.lower is None:
            self.upper.copy_(_logit(scale.float() / whole))
            return
        element = self.spec.element
        if minimum is not None and whole_minimum is not None:
            low, whole_low = minimum.float(), whole_minimum
        else:
            assert zero_point is not None
            assert whole_zero is not None
            low, whole_low = scale.float() * (element.qmin - zero_point), whole * (element.qmin - whole_zero)
        steps = element.qmax - element.qmin
        self.lower.copy_(_logit(torch.where(whole_low < 0, low / whole_low, 1.0)))
        whole_high = whole_low + steps * whole
        self.upper.copy_(_logit(torch.where(whole_high > 0, (low + steps * scale.float()) / whole_high, 1.0)))

    @torch.no_grad()
    def quantize(self, x: Tensor) -> QuantizedTensor:
        """The codes that `forward(x)` decodes."""
        dtype = getattr(torch, self.spec.scale_dtype)
        scale, zero_point, minimum = self.in_use(x)
        zeros = None if zero_point is None else zero_point.to(torch.int32)
        codes = codes_of(x, self.spec, scale, zero_point, minimum)
        low = None if minimum is None else minimum.to(dtype)
        return QuantizedTensor(codes, scale.to(dtype), zeros, low, self.spec)

    def extra_repr(self) -> str:
        return str(self.spec)


def _logit(share: Tensor) -> Tensor:
    return torch.logit(share.clamp(0.05, 1 - 1e-3))


def _lowest_level(spec: QuantSpec) -> float:
    """The level that the signed extreme is put on."""
    return float(spec.element.qmin) if spec.element.qmin < 0 else -largest_level(spec)
