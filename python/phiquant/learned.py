"""Grids whose scales and offsets are trained: LSQ and LSQ+, with the weights or, the codes staying, alone.

Sources: Esser et al., "Learned step size quantization" (2020); Bhalgat et al., "LSQ+" (2020); Chen et al.,
"EfficientQAT" (2024). Formulas and when to use which: docs/learned-scales.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from . import ops, two_level
from .learned_gradients import Decode, codes_of, on_learned_grid, positive, stored, through
from .observers import KeepsDtype, range_arguments
from .spec import FLOAT_BITS, Binary, Codebook, FixedPoint, Int, PerTensor, PerToken, QuantSpec, Ternary
from .spec import spec as read_spec
from .tensor import QuantizedTensor, element_arguments

Start = Literal["lsq", "lsq+", "mse"]


class Learned(KeepsDtype):
    """A quantizer with parameters of its own. They move with the model, but keep their dtype, as buffers do."""

    spec: QuantSpec

    @property
    def moves_weights(self) -> bool:
        """Whether the values it quantizes receive gradients."""
        return True

    def unit(self) -> float:
        """The size that a learning rate of the parameters is a share of: Adam's steps do not know it."""
        return 1.0

    def quantize(self, x: Tensor) -> QuantizedTensor:
        """The codes that `forward(x)` decodes."""
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = {name: p.detach() for name, p in self._parameters.items() if p is not None}
        super()._apply(fn, recurse)
        for name, value in before.items():
            after = self._parameters[name]
            if after is not None and after.dtype != value.dtype:
                after.data = value.to(after.device)
        return self


class LearnedFakeQuantize(Learned):
    """Fake-quantizes what passes through it on a grid whose scale, and offset if the spec has one, are trained.

    spec: any element with a scale, per tensor, channel or group. Without an offset this is LSQ; with a minimum LSQ+,
        whose beta it is; with a zero point the same with y = s (q - z), z rounded in the forward pass. Where scales
        are stored in two levels, those of the super-blocks are trained; the codes of the lower level stay.
    shape: of the tensors to come; not needed per tensor.
    start: from what the first tensor (or `initialize`) sets scale and offset. "lsq": s = 2 mean|x| / sqrt(qmax);
        "lsq+": s = max|mean +- 3 std| / 2^(bits - 1); "mse": the range of least squared error. With an offset or two
        levels always "mse", as LSQ+ does for activations. `take` starts from the grid of codes that exist.

    Parameters, float32 in `spec.scale_shape(shape)` (or `super_shape`): `scale`, and `offset` or None. In use is
    |scale|, at least the smallest positive number of the spec's scale_dtype, rounded to
    that type as the offset is: what trains is what a file will hold. Gradients pass through the rounding; that of the
    scale takes the sign of `scale`, and all are multiplied with `gradient_scale(x)`. Give them no weight decay.
    """

    offset: nn.Parameter | None
    sign: Tensor | None
    sub_scales: Tensor | None
    sub_minimums: Tensor | None
    initialized: Tensor

    def __init__(self, spec: str | QuantSpec, shape: Sequence[int] | None = None, start: Start = "lsq") -> None:
        super().__init__()
        self.spec = read_spec(spec)
        if start not in ("lsq", "lsq+", "mse"):
            raise ValueError(f"start is 'lsq', 'lsq+' or 'mse', not {start!r}")
        if problem := _problem(self.spec):
            raise ValueError(problem)
        if shape is None and not isinstance(self.spec.granularity, PerTensor):
            raise ValueError(f"{self.spec} has a scale per block: give the shape of the tensor")
        self.start = start
        two = self.spec.two_level
        blocks = self.spec.scale_shape(tuple(shape)) if shape is not None else (1,)
        scales = blocks if two is None or shape is None else self.spec.super_shape(tuple(shape))
        self.scale = nn.Parameter(torch.ones(scales))
        self.offset = nn.Parameter(torch.zeros(scales)) if self.spec.offset != "none" else None
        # The signed extreme may anchor a negative scale: its sign is chosen once, its size learned.
        self.register_buffer("sign", torch.ones(scales) if self.spec.anchor == "signed_absmax" else None)
        for name, wanted in (("sub_scales", two), ("sub_minimums", two and self.offset is not None)):
            lower = torch.ones(blocks).to(getattr(torch, two.dtype)) if two and wanted else None
            self.register_buffer(name, lower)
        self.register_buffer("initialized", torch.tensor(False))

    @classmethod
    def of(cls, quantized: QuantizedTensor) -> LearnedFakeQuantize:
        """One that starts from the grid of `quantized`, as it is stored."""
        learned = cls(quantized.spec, quantized.shape, start="mse").to(quantized.codes.device)
        learned.take(quantized)
        return learned

    def forward(self, x: Tensor) -> Tensor:
        """x on the grid, same shape and dtype. The first tensor sets the scale, unless `initialize` did."""
        if not self.initialized:
            self.initialize(x)
        return on_learned_grid(x, self.spec, *self.in_use(), gradient_scale=self.gradient_scale(x))

    def unit(self) -> float:
        """The mean scale: steps of 1 % of it suit int8 as int2, and a beta as well."""
        return float(self.scale.detach().abs().mean())

    def gradient_scale(self, x: Tensor) -> float:
        """1 / sqrt(N qmax), N = the number of values of x that share a scale: the paper's, in every granularity."""
        shared = x.numel() // max(1, self.scale.numel())
        return 1.0 / math.sqrt(max(1, shared) * largest_level(self.spec))

    def in_use(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(scale, zero_point, minimum) as the forward pass takes them: float32, rounded as stored, differentiable."""
        dtype = getattr(torch, self.spec.scale_dtype)
        scale = positive(self.scale, dtype)
        if self.sign is not None:
            scale = scale * self.sign
        if self.spec.two_level is not None:
            return self._of_two_levels(scale, dtype)
        if self.offset is None:
            return scale, None, None
        if self.spec.offset == "minimum":
            return scale, None, through(self.offset, lambda t: stored(t, dtype))
        element = self.spec.element
        return scale, through(self.offset, lambda t: t.round().clamp(element.qmin, element.qmax)), None

    def _of_two_levels(self, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, None, Tensor | None]:
        """What two_level.Parameters.block_values gives, differentiable: super-block scales times the blocks' codes."""
        assert self.sub_scales is not None
        scale = _of_blocks(scale, self.sub_scales)
        if self.offset is None or self.sub_minimums is None:
            return scale, None, None
        return scale, None, -_of_blocks(positive(self.offset, dtype), self.sub_minimums)

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Set scale and offset from x, as `start` says. ValueError if x holds a value that is not finite."""
        if not torch.isfinite(x).all():
            raise ValueError("a scale cannot start from a tensor that holds values that are not finite")
        if self.spec.two_level is not None:
            self._set(*two_level.choose(x, self.spec, range_arguments(self.spec), mse=True))
            return
        rule = range_arguments(self.spec)
        if isinstance(self.spec.element, Ternary):  # the integers -1..1, whatever the rule of the scale would be
            rule["rule"] = "absmax"
        shape = self.spec.scale_shape(tuple(x.shape))
        choose = ops.choose_range if isinstance(self.spec.element, Binary) else ops.search_range
        found, zero_point, minimum = choose(x, shape, **rule)
        searched = self.start == "mse" or self.offset is not None
        self._set(found, None, zero_point if minimum is None else minimum)
        if not searched:
            size = self._by_statistics(x, shape)
            self.scale.copy_(torch.where(size > 0, size, 1.0).reshape(self.scale.shape))

    @torch.no_grad()
    def take(self, quantized: QuantizedTensor) -> None:
        """Start from the grid of `quantized`."""
        q = quantized
        self._set(q.scales, q.super_scales, q.zero_points if q.minimums is None else q.minimums, q.super_minimums)

    def _set(
        self, scales: Tensor | None, supers: Tensor | None, low: Tensor | None = None, super_low: Tensor | None = None
    ) -> None:
        """Take over stored parameters, in the order of two_level.Parameters; of one level: scales, None, offset."""
        assert scales is not None
        if supers is not None:
            self.sub_scales, self.sub_minimums = scales.clone(), None if low is None else low.clone()
        found, offset = (scales, low) if supers is None else (supers, super_low)
        if self.sign is not None:
            self.sign.copy_(torch.where(found < 0, -1.0, 1.0).reshape(self.sign.shape))
        size = found.float().abs()
        self.scale.copy_(torch.where(size > 0, size, 1.0 if supers is None else 0.0).reshape(self.scale.shape))
        if self.offset is not None and offset is not None:
            self.offset.copy_(offset.float().reshape(self.offset.shape))
        self.initialized.fill_(True)

    def _by_statistics(self, x: Tensor, shape: tuple[int, ...]) -> Tensor:
        blocks = ops.blocks.to_blocks(x, ops.blocks.channel_axis(x.shape, shape)).reshape(math.prod(shape), -1).float()
        if self.start == "lsq":
            return 2.0 * blocks.abs().mean(1) / math.sqrt(largest_level(self.spec))
        mean, deviation = blocks.mean(1), blocks.std(1, correction=0)
        return torch.maximum((mean - 3 * deviation).abs(), (mean + 3 * deviation).abs()) / 2 ** (
            self.spec.element.bits - 1
        )

    @torch.no_grad()
    def quantize(self, x: Tensor) -> QuantizedTensor:
        """The codes that `forward(x)` decodes."""
        if not self.initialized:
            self.initialize(x)
        return self._stored(x, codes_of(x, self.spec, *self.in_use()))

    def _stored(self, x: Tensor, codes: Tensor) -> QuantizedTensor:
        """`codes` with the parameters as a file holds them."""
        dtype = getattr(torch, self.spec.scale_dtype)
        if self.sub_scales is not None:
            supers = positive(self.scale, dtype) * (1.0 if self.sign is None else self.sign)
            low = None if self.offset is None else positive(self.offset, dtype).to(dtype)
            parts = {"super_scales": supers.to(dtype), "super_minimums": low}
            return QuantizedTensor(codes, self.sub_scales, None, self.sub_minimums, self.spec, None, **parts)
        shape = self.spec.scale_shape(tuple(x.shape))
        scale, zero_point, minimum = (None if t is None else t.detach().reshape(shape) for t in self.in_use())
        assert scale is not None
        zeros = None if zero_point is None else zero_point.to(torch.int32)
        return QuantizedTensor(codes, scale.to(dtype), zeros, None if minimum is None else minimum.to(dtype), self.spec)

    def extra_repr(self) -> str:
        return f"{self.spec}, start={self.start}"


class TrainedScales(LearnedFakeQuantize):
    """The codes of a tensor stay, its scales (and minimums) are trained: the weight that passes through is not used.

    What EfficientQAT does end to end. The gradient of a scale is the sum of g (level of the code - z) over its values,
    that of a minimum the sum of g; zero points stay.
    """

    codes: Tensor

    def __init__(self, quantized: QuantizedTensor) -> None:
        super().__init__(quantized.spec, quantized.shape, start="mse")
        self.register_buffer("codes", quantized.codes)
        self.to(quantized.codes.device)
        self.take(quantized)
        if self.offset is not None and self.spec.offset == "zero_point":
            self.offset.requires_grad_(False)

    @property
    def moves_weights(self) -> bool:
        return False

    def forward(self, x: Tensor) -> Tensor:
        """The values of the codes, in the dtype of x [the shape of the codes]."""
        scale, zero_point, minimum = self.in_use()
        named = element_arguments(self.spec.element)
        return Decode.apply(self.codes, scale, zero_point, minimum, named, x.dtype, self.gradient_scale(x))

    @torch.no_grad()
    def quantize(self, x: Tensor) -> QuantizedTensor:
        """The codes, with the scales as trained."""
        return self._stored(x, self.codes)


def learned_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """The scales, offsets and levels of a model that are trained: for an optimizer's group without weight decay."""
    for module in model.modules():
        if isinstance(module, Learned):
            yield from (p for p in module.parameters(recurse=False) if p.requires_grad)


def learned_groups(model: nn.Module, rate: float) -> list[dict[str, Any]]:
    """Groups for an optimizer: the learned parameters of each layer, without weight decay, lr = rate times their unit.

    Scales of 0.005 and of 0.05 then move by the same share in a step of Adam. rate 1e-3: at most 0.1 % a step.
    """
    groups = []
    for module in model.modules():
        if isinstance(module, Learned):
            learned = [p for p in module.parameters(recurse=False) if p.requires_grad]
            if learned:
                groups.append({"params": learned, "lr": rate * module.unit(), "weight_decay": 0.0})
    return groups


def largest_level(spec: QuantSpec) -> float:
    """The largest level of the element: qmax, for floats and tables the value of the largest code."""
    element = spec.element
    if isinstance(element, Int | Ternary):
        return float(element.qmax)
    codes = torch.arange(2**element.bits, dtype=torch.uint8)
    levels = ops.dequantize(codes, torch.ones(1), **element_arguments(element))
    return float(levels[torch.isfinite(levels)].abs().max())


def _problem(spec: QuantSpec) -> str:
    """Why no scale can be learned for this spec, and what would do; or ""."""
    if isinstance(spec.element, Codebook):
        return f"{spec} has levels to learn, no scale: use LearnedCodebook (prepare_qat does, with range='learned')"
    if isinstance(spec.element, FixedPoint) or isinstance(spec.granularity, PerToken):
        return f"{spec} has no scale to learn: its step is fixed, or tokens come and go; use range='tensor'"
    if isinstance(spec.element, Int) and spec.element.qmax < 1:
        return f"{spec} has no scale to learn: one bit has no positive code; use binary"
    if spec.scale_dtype not in FLOAT_BITS:
        return f"the scales of {spec} lie too far apart for small steps to move them; use range='mse'"
    return ""


def _of_blocks(supers: Tensor, codes: Tensor) -> Tensor:
    """super_scale * code of every block, as two_level.values computes it; differentiable in the first."""
    rows = codes.float().reshape(supers.numel(), -1)
    return (supers.reshape(-1, 1) * rows).reshape(codes.shape)
