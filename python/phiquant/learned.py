"""Grids that are trained: LSQ and LSQ+ (learned scales and offsets), TTQ (learned ternary levels).

Sources: Esser et al., "Learned step size quantization" (2020); Bhalgat et al., "LSQ+" (2020); Zhu et al., "Trained
ternary quantization" (2017). Formulas and when to use which: docs/learned-scales.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from . import ops
from .fake_quant import encode
from .observers import KeepsDtype, range_arguments
from .spec import Codebook, Int, PerTensor, PerToken, QuantSpec
from .spec import spec as read_spec
from .tensor import QuantizedTensor

Start = Literal["lsq", "lsq+", "mse"]


class LearnedFakeQuantize(KeepsDtype):
    """Fake-quantizes what passes through it on a grid whose scale, and offset if the spec has one, are trained.

    spec: integers, per tensor, channel or group. Without an offset this is LSQ; with a minimum LSQ+, whose beta it is;
        with a zero point the same with y = s (q - z), z rounded in the forward pass.
    shape: of the tensors to come; not needed per tensor.
    start: from what the first tensor (or `initialize`) sets scale and offset. "lsq": s = 2 mean|x| / sqrt(qmax);
        "lsq+": s = max|mean +- 3 std| / 2^(bits - 1); "mse": the range of least squared error. With an offset always
        "mse", as LSQ+ does for activations.

    Parameters, float32 in `spec.scale_shape(shape)`, which stay float32 when the model changes its dtype: `scale`, and
    `offset` or None. In use is |scale|, at least the smallest positive number of the spec's scale_dtype, rounded to
    that type as the offset is: what trains is what a file will hold. Gradients pass through the rounding; that of the
    scale takes the sign of `scale`, and all are multiplied with `gradient_scale(x)`. Give them no weight decay.
    """

    offset: nn.Parameter | None
    sign: Tensor | None
    initialized: Tensor

    def __init__(self, spec: str | QuantSpec, shape: Sequence[int] | None = None, start: Start = "lsq") -> None:
        super().__init__()
        self.spec = read_spec(spec)
        if start not in ("lsq", "lsq+", "mse"):
            raise ValueError(f"start is 'lsq', 'lsq+' or 'mse', not {start!r}")
        if not isinstance(self.spec.element, Int) or self.spec.two_level is not None:
            raise ValueError(f"scales are learned for integers with scales of one level, not for {self.spec}")
        if isinstance(self.spec.granularity, PerToken) or self.spec.element.qmax < 1:
            raise ValueError(f"{self.spec} has no scale to learn: tokens come and go, and one bit has no positive code")
        if shape is None and not isinstance(self.spec.granularity, PerTensor):
            raise ValueError(f"{self.spec} has a scale per block: give the shape of the tensor")
        self.start = start
        scales = self.spec.scale_shape(tuple(shape)) if shape is not None else (1,)
        self.scale = nn.Parameter(torch.ones(scales))
        self.offset = nn.Parameter(torch.zeros(scales)) if self.spec.offset != "none" else None
        # The signed extreme may anchor a negative scale: its sign is chosen once, its size learned.
        self.register_buffer("sign", torch.ones(scales) if self.spec.anchor == "signed_absmax" else None)
        self.register_buffer("initialized", torch.tensor(False))

    def forward(self, x: Tensor) -> Tensor:
        """x on the grid, same shape and dtype. The first tensor sets the scale, unless `initialize` did."""
        if not self.initialized:
            self.initialize(x)
        element = self.spec.element
        scale, zero_point, minimum = self.in_use()
        return ops.learned_fake_quantize(
            x, scale, zero_point, minimum, qmin=element.qmin, qmax=element.qmax, gradient_scale=self.gradient_scale(x)
        )

    def gradient_scale(self, x: Tensor) -> float:
        """1 / sqrt(N qmax), N = the number of values of x that share a scale: the paper's, in every granularity."""
        shared = x.numel() // max(1, self.scale.numel())
        return 1.0 / math.sqrt(max(1, shared) * self.spec.element.qmax)

    def in_use(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(scale, zero_point, minimum) as the forward pass takes them: float32, rounded as stored, differentiable."""
        dtype = getattr(torch, self.spec.scale_dtype)
        scale = _positive(self.scale, dtype)
        if self.sign is not None:
            scale = scale * self.sign
        if self.offset is None:
            return scale, None, None
        if self.spec.offset == "minimum":
            return scale, None, _through(self.offset, lambda t: _stored(t, dtype))
        element = self.spec.element
        return scale, _through(self.offset, lambda t: t.round().clamp(element.qmin, element.qmax)), None

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Set scale and offset from x, as `start` says. ValueError if x holds a value that is not finite."""
        if not torch.isfinite(x).all():
            raise ValueError("a scale cannot start from a tensor that holds values that are not finite")
        rule = range_arguments(self.spec)
        shape = self.spec.scale_shape(tuple(x.shape))
        found, zero_point, minimum = ops.search_range(x, shape, **rule)
        if self.sign is not None:
            self.sign.copy_(torch.where(found < 0, -1.0, 1.0).reshape(self.sign.shape))
        searched = self.start == "mse" or self.offset is not None
        size = found.float().abs() if searched else self._by_statistics(x, shape)
        self.scale.copy_(torch.where(size > 0, size, 1.0).reshape(self.scale.shape))
        start = zero_point if minimum is None else minimum
        if self.offset is not None and start is not None:
            self.offset.copy_(start.float().reshape(self.offset.shape))
        self.initialized.fill_(True)

    def _by_statistics(self, x: Tensor, shape: tuple[int, ...]) -> Tensor:
        element = self.spec.element
        blocks = ops.blocks.to_blocks(x, ops.blocks.channel_axis(x.shape, shape)).reshape(math.prod(shape), -1).float()
        if self.start == "lsq":
            return 2.0 * blocks.abs().mean(1) / math.sqrt(element.qmax)
        mean, deviation = blocks.mean(1), blocks.std(1, correction=0)
        return torch.maximum((mean - 3 * deviation).abs(), (mean + 3 * deviation).abs()) / 2 ** (element.bits - 1)

    @torch.no_grad()
    def quantize(self, x: Tensor) -> QuantizedTensor:
        """The codes that `forward(x)` decodes."""
        if not self.initialized:
            self.initialize(x)
        dtype = getattr(torch, self.spec.scale_dtype)
        shape = self.spec.scale_shape(tuple(x.shape))
        scale, zero_point, minimum = (None if t is None else t.reshape(shape) for t in self.in_use())
        assert scale is not None
        zeros = None if zero_point is None else zero_point.to(torch.int32)
        return encode(x, self.spec, scale.to(dtype), zeros, None if minimum is None else minimum.to(dtype))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = {name: p.detach() for name, p in self._parameters.items() if p is not None}
        super()._apply(fn, recurse)
        for name, value in before.items():
            after = self._parameters[name]
            if after is not None and after.dtype != value.dtype:
                after.data = value.to(after.device)
        return self

    def extra_repr(self) -> str:
        return f"{self.spec}, start={self.start}"


class TrainedTernary(KeepsDtype):
    """TTQ: y = positive where x > d, -negative where x < -d, else 0; d = threshold * max|x|; two levels per tensor.

    Parameters `positive` and `negative`, float32 scalars, used as |.|; they start at the mean magnitude of the values
    on their side, from the first tensor or `initialize`. Gradients, g that of y: positive gets the sum of g over its
    values, negative minus the sum of g over its; x gets g times the size of its level where it is beyond d, and g
    elsewhere (the paper's rule).
    """

    initialized: Tensor

    def __init__(self, threshold: float = 0.05) -> None:
        super().__init__()
        if not 0.0 <= threshold < 1.0:
            raise ValueError(f"threshold is a share of max|x|, in [0, 1), not {threshold}")
        self.threshold = threshold
        self.spec = QuantSpec(Codebook(3), PerTensor())
        self.positive = nn.Parameter(torch.tensor(1.0))
        self.negative = nn.Parameter(torch.tensor(1.0))
        self.register_buffer("initialized", torch.tensor(False))

    def forward(self, x: Tensor) -> Tensor:
        if not self.initialized:
            self.initialize(x)
        return _Ternary.apply(x, self.positive.abs(), self.negative.abs(), self._bound(x))

    def _bound(self, x: Tensor) -> Tensor:
        return self.threshold * x.detach().abs().max()

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Set both levels from x."""
        d = self._bound(x)
        for level, side in ((self.positive, x[x > d]), (self.negative, -x[x < -d])):
            if side.numel():
                level.copy_(side.float().mean())
        self.initialized.fill_(True)

    @torch.no_grad()
    def quantize(self, x: Tensor) -> QuantizedTensor:
        """The codes that `forward(x)` decodes: indices 0, 1, 2 of the levels -negative, 0, positive."""
        if not self.initialized:
            self.initialize(x)
        d = self._bound(x)
        codes = (x > d).to(torch.uint8) - (x < -d).to(torch.uint8) + 1
        levels = torch.stack([-self.negative.abs(), torch.zeros_like(self.positive), self.positive.abs()])
        return QuantizedTensor(codes.to(torch.uint8), None, None, None, self.spec, levels.float().reshape(1, 3))

    def extra_repr(self) -> str:
        return f"threshold={self.threshold}"


class _Ternary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, positive: Tensor, negative: Tensor, d: Tensor) -> Tensor:
        ctx.save_for_backward(x, positive, negative, d)
        zero = torch.zeros((), dtype=x.dtype, device=x.device)
        return torch.where(x > d, positive.to(x.dtype), torch.where(x < -d, -negative.to(x.dtype), zero))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        (g,) = gradients
        x, positive, negative, d = ctx.saved_tensors
        above, below = x > d, x < -d
        slope = torch.where(above, positive.to(g.dtype), torch.where(below, negative.to(g.dtype), 1.0))
        sums = (torch.where(side, g, 0.0).sum(dtype=torch.float64).to(positive.dtype) for side in (above, below))
        return g * slope, next(sums), -next(sums), None


def learned_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """The scales, offsets and levels of a model that are trained: for an optimizer's group without weight decay."""
    for module in model.modules():
        if isinstance(module, LearnedFakeQuantize | TrainedTernary):
            yield from module.parameters(recurse=False)


class _Through(torch.autograd.Function):
    """`change(t)` with the gradient of t."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        return change(t)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def _through(t: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    result: Tensor = _Through.apply(t, change)
    return result


def _stored(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded to `dtype`, kept finite; a float32 or bfloat16 subnormal is 0, as in csrc/core/range.inl."""
    largest, smallest = torch.finfo(dtype).max, _smallest(dtype)
    rounded = t.clamp(-largest, largest).to(dtype).float()
    return torch.where(rounded.abs() < smallest, 0.0, rounded)


def _positive(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """|scale| as stored, at least the smallest positive number; d/dscale is the sign."""
    size = scale * torch.where(scale < 0, -1.0, 1.0)
    return _through(size, lambda t: _stored(t.clamp(min=_smallest(dtype)), dtype))


def _smallest(dtype: torch.dtype) -> float:
    return 2.0**-24 if dtype == torch.float16 else torch.finfo(torch.float32).tiny
