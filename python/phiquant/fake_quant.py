"""Fake quantization: decode(encode(x)) with the straight-through estimator as its gradient."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from . import ops, two_level
from .observers import KeepsDtype, MinMaxObserver, Observer, range_arguments
from .spec import Codebook, FixedPoint, QuantSpec
from .spec import spec as read_spec
from .tensor import PARAMETERS, QuantizedTensor, block_scales, element_arguments

RangeMode = Literal["tensor", "observer"]


def fake_quantize(
    x: Tensor,
    spec: str | QuantSpec,
    *,
    out: Tensor | None = None,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
    minimum: Tensor | None = None,
    codebook: Tensor | None = None,
) -> Tensor:
    """The nearest value of the grid for every value of x, in x's shape and dtype; differentiable in x.

    The range comes from x (by the spec's rule, per block), or from `scale` with `zero_point` or
    `minimum` where given: shape `spec(...).scale_shape(x.shape)` or a single value. The levels of a
    Codebook element are `codebook` [blocks, size], ascending. `out` receives the result without a new
    allocation and records no gradient.
    """
    spec = read_spec(spec)
    if scale is None and spec.has_scale:
        if zero_point is not None or minimum is not None:
            raise ValueError("zero_point and minimum need a scale; leave all three out to take the range from x")
        if spec.two_level is not None:
            return two_level.fake_quantize(x, spec, range_arguments(spec), out)
        return ops.fake_quantize_dynamic(x, spec.scale_shape(tuple(x.shape)), **range_arguments(spec), out=out)
    parts = (block_scales(spec, x, scale), zero_point, minimum)
    return ops.fake_quantize(x, *parts, **_grid(spec, x, codebook), out=out)


def _grid(spec: QuantSpec, x: Tensor, codebook: Tensor | None) -> dict:
    """The keyword arguments by which the ops know a grid whose parameters are given."""
    element = spec.element
    if isinstance(element, Codebook):
        shape = (math.prod(spec.scale_shape(tuple(x.shape))), element.size)
        if codebook is None or tuple(codebook.shape) != shape:
            found = "none was given" if codebook is None else f"got {list(codebook.shape)}"
            raise ValueError(
                f"{spec} of x {list(x.shape)} needs codebook= of shape {list(shape)}; {found}. "
                "quantize_tensor(..., solver='kmeans') chooses one"
            )
    elif codebook is not None:
        raise ValueError(f"{spec} has no codebook; leave codebook= out")
    return {"qmin": element.qmin, "qmax": element.qmax, **element_arguments(element, codebook)}


class FakeQuantize(KeepsDtype):
    """Fake-quantizes what passes through it.

    range="tensor": the range is taken from the tensor at each call, by the spec's rule. Nothing is stored.
    range="observer": `observer` sees each tensor while `observing` is true (in training mode); its
    range is used. With observing off the buffers scale, zero_point, minimum are used as they are.
    """

    scale: Tensor | None
    zero_point: Tensor | None
    minimum: Tensor | None

    def __init__(self, spec: str | QuantSpec, range: RangeMode = "tensor", observer: Observer | None = None) -> None:
        super().__init__()
        if range not in ("tensor", "observer"):
            raise ValueError(f"range is 'tensor' or 'observer', not {range!r}")
        if observer is not None and range == "tensor":
            raise ValueError("an observer is used with range='observer' only")
        self.spec = read_spec(spec)
        if isinstance(self.spec.element, Codebook):
            raise ValueError(f"a FakeQuantize keeps no codebook for {self.spec}; use fake_quantize(..., codebook=)")
        if range == "observer" and not self.spec.has_scale:
            raise ValueError(f"{self.spec} has no scale to observe; use range='tensor'")
        if range == "observer" and self.spec.two_level is not None:
            raise ValueError(f"{self.spec} takes its two levels of scales from each tensor; use range='tensor'")
        self.range = range
        self.observing = range == "observer"
        self.observer: Observer | None = (observer or MinMaxObserver(self.spec)) if range == "observer" else None
        for name in ("scale", "zero_point", "minimum"):
            self.register_buffer(name, None)

    def forward(self, x: Tensor) -> Tensor:
        """x on the grid, same shape and dtype."""
        if self.range == "tensor":
            return fake_quantize(x, self.spec)
        if self.observing and self.training:
            self.observe(x)
        return fake_quantize(x, self.spec, scale=self._known_scale(), zero_point=self.zero_point, minimum=self.minimum)

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Show x to the observer and take over its range."""
        if self.observer is None:
            raise ValueError("this FakeQuantize takes its range from each tensor; there is no observer")
        self.observer(x)
        if self.observer.seen:
            self.set_range(*self.observer.parameters_of_range(self.spec))

    def set_range(self, scale: Tensor, zero_point: Tensor | None, minimum: Tensor | None) -> None:
        """Use these parameters from now on (range="observer"): shape `spec.scale_shape(x.shape)`."""
        if self.range != "observer":
            raise ValueError("a FakeQuantize with range='tensor' keeps no range; build it with range='observer'")
        self.scale, self.zero_point, self.minimum = scale, zero_point, minimum

    @torch.no_grad()
    def freeze(self, x: Tensor) -> None:
        """Keep the range that is in use, with range="tensor" that of x, from now on.

        Buffers hold it, so a `state_dict` does; one that is loaded with a range freezes range="tensor" as well.
        """
        self.observing = False
        if self.range == "tensor" and self.spec.has_scale:
            if self.spec.two_level is not None:
                raise ValueError(f"{self.spec} keeps no range of its own; prepare it with range='mse', which is kept")
            found = encode_dynamic(x.detach(), self.spec)
            assert found.scales is not None
            self.range = "observer"
            self.set_range(found.scales, found.zero_points, found.minimums)

    @torch.no_grad()
    def quantize(self, x: Tensor) -> QuantizedTensor:
        """The codes that `forward(x)` decodes. Call it in evaluation mode or with observing off."""
        if self.range == "tensor":
            return encode_dynamic(x, self.spec)
        return encode(x, self.spec, self._known_scale(), self.zero_point, self.minimum)

    def _known_scale(self) -> Tensor:
        if self.scale is None:
            raise RuntimeError("no range has been observed yet; run a batch in training mode first")
        return self.scale

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: object) -> None:
        # The buffers are None until a range is known; take the saved ones' shape and dtype.
        for name in ("scale", "zero_point", "minimum"):
            saved = state_dict.get(prefix + name)
            if saved is not None:
                self.range = "observer"  # frozen, if it was "tensor"
                old = getattr(self, name)
                setattr(self, name, torch.empty_like(saved, device=saved.device if old is None else old.device))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"{self.spec}, range={self.range}"


class KnownGrid(KeepsDtype):
    """Fake-quantizes on the grid of a tensor that has codes already: its parameters stay as they are stored.

    For grids of every kind, two levels of scales and codebooks too. A value that still is what its code
    decodes to keeps that code: `quantize` of an untrained weight gives the very tensor again.
    """

    codes: Tensor

    def __init__(self, quantized: QuantizedTensor) -> None:
        super().__init__()
        self.spec = quantized.spec
        for name in ("codes", *PARAMETERS):
            self.register_buffer(name, getattr(quantized, name))

    def forward(self, x: Tensor) -> Tensor:
        """x on the grid, same shape and dtype."""
        old = self._quantized
        return ops.fake_quantize(x, *old.grid(), **_grid(self.spec, x, old.codebook))

    @torch.no_grad()
    def quantize(self, x: Tensor) -> QuantizedTensor:
        """The codes that `forward(x)` decodes."""
        old = self._quantized
        codes = ops.quantize(x.detach(), *old.grid(), **_grid(self.spec, x, old.codebook)).contiguous()
        fresh = replace(old, codes=codes)
        return replace(old, codes=torch.where(fresh.dequantize() == old.dequantize(), old.codes, codes))

    @property
    def _quantized(self) -> QuantizedTensor:
        return QuantizedTensor(spec=self.spec, **{name: getattr(self, name) for name in ("codes", *PARAMETERS)})

    def extra_repr(self) -> str:
        return f"{self.spec}, parameters as stored"


def encode(
    x: Tensor,
    spec: QuantSpec,
    scale: Tensor | None,
    zero_point: Tensor | None = None,
    minimum: Tensor | None = None,
    codebook: Tensor | None = None,
) -> QuantizedTensor:
    """Codes of x on a known grid: the nearest level of each value. `codebook` [blocks, size] must ascend."""
    if codebook is not None and bool((codebook.diff(dim=1) < 0).any()):
        raise ValueError("the levels of a codebook must ascend; sort each row")
    scales = block_scales(spec, x, scale)
    codes = ops.quantize(x.detach(), scales, zero_point, minimum, **_grid(spec, x, codebook))
    kept = scale.detach().clone() if scale is not None else None
    return QuantizedTensor(codes.contiguous(), kept, zero_point, minimum, spec, codebook)


def encode_dynamic(x: Tensor, spec: QuantSpec) -> QuantizedTensor:
    """Codes of x with the scale that the spec's rule finds in each block, in one pass over memory.

    The scale of a block that holds a value that is not finite is NaN. ValueError for a Codebook, whose
    levels no such rule gives.
    """
    if isinstance(spec.element, FixedPoint):
        return encode(x, spec, None)
    if spec.two_level is not None:
        return encode_two_level(x, spec)
    codes, scale, zero_point, minimum = ops.quantize_dynamic(
        x, spec.scale_shape(tuple(x.shape)), **range_arguments(spec)
    )
    return QuantizedTensor(codes.contiguous(), scale, zero_point, minimum, spec)


def encode_two_level(
    x: Tensor,
    spec: QuantSpec,
    mse: bool = False,
    weights: Tensor | None = None,
    found: two_level.Found | None = None,
) -> QuantizedTensor:
    """Codes of x on the grid of scales stored in two levels, from min-max ranges, (mse) the best ones, or `found`."""
    chosen = two_level.choose(x, spec, range_arguments(spec), mse=mse, weights=weights, found=found)
    scale, minimum = chosen.block_values()
    codes = ops.quantize(x.detach(), scale, None, minimum, **_grid(spec, x, None))
    return QuantizedTensor(
        codes.contiguous(),
        chosen.scales,
        None,
        chosen.minimums,
        spec,
        super_scales=chosen.super_scales,
        super_minimums=chosen.super_minimums,
    )
