"""Observers: they see tensors and remember the range that a solver or `FakeQuantize` needs.

An observer's state is a pair of buffers in the shape of the spec's scales, so it goes through
`state_dict`, and two observers of the same spec can be merged.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import ops
from .spec import Codebook, FixedPoint, QuantSpec
from .spec import spec as read_spec
from .tensor import element_arguments


class KeepsDtype(nn.Module):
    """A module whose buffers move with the model but keep their dtype: model.half() must not change a grid."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = {name: value for name, value in self._buffers.items() if value is not None}
        super()._apply(fn, recurse)
        for name, value in before.items():
            after = self._buffers[name]
            if after is not None and after.dtype != value.dtype:
                self._buffers[name] = value.to(after.device)
        return self


class MinMaxObserver(KeepsDtype):
    """Smallest and largest value seen per block. NaN is passed over, an empty tensor changes nothing.

    lo, hi: float32 [1] until the first tensor gives their shape, `spec.scale_shape(x.shape)`; lo = inf
    and hi = -inf stand for "nothing seen".
    """

    lo: Tensor
    hi: Tensor

    def __init__(self, spec: str | QuantSpec) -> None:
        super().__init__()
        self.spec = read_spec(spec)
        self.register_buffer("lo", torch.full((1,), float("inf")))
        self.register_buffer("hi", torch.full((1,), float("-inf")))

    @property
    def seen(self) -> bool:
        """Whether any tensor with values has been observed."""
        return bool((self.lo <= self.hi).any())

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Observe x and return it unchanged."""
        if x.numel():
            lo, hi = ops.min_max(x, self.spec.scale_shape(tuple(x.shape)))
            self._update(lo.to(self.lo.device), hi.to(self.hi.device))
        return x

    @torch.no_grad()
    def merge(self, other: MinMaxObserver) -> None:
        """Take in what `other` has seen: for a plain min-max, as if it had been seen here."""
        if other.seen:
            self._update(other.lo.to(self.lo.device), other.hi.to(self.hi.device))

    def parameters_of_range(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(scale, zero_point, minimum) of the range seen. RuntimeError if nothing was."""
        if self.spec.anchor in ("absmean", "twn"):
            raise ValueError(
                f"the scale of {self.spec} is a mean of |x|, which no range gives; use FakeQuantize with range='tensor'"
            )
        if not self.seen:
            raise RuntimeError("the observer has seen no values yet; run some batches through it first")
        return ops.range_from_min_max(self.lo, self.hi, **range_arguments(self.spec))

    def _update(self, lo: Tensor, hi: Tensor) -> None:
        if self.lo.shape != lo.shape:
            if self.seen:
                raise ValueError(
                    f"the observer has ranges of shape {list(self.lo.shape)}, this tensor needs "
                    f"{list(lo.shape)}; use one observer per shape, or a per-tensor spec"
                )
            self.lo, self.hi = lo.clone(), hi.clone()
        else:
            self.lo, self.hi = self._combine(lo, hi)

    def _combine(self, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
        return torch.minimum(self.lo, lo), torch.maximum(self.hi, hi)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: object) -> None:
        # The buffers take their shape from what was seen; a fresh observer must take a saved one's.
        for name in ("lo", "hi"):
            saved = state_dict.get(prefix + name)
            if saved is not None:
                setattr(self, name, torch.empty_like(saved, device=self.lo.device))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return str(self.spec)


class EmaObserver(MinMaxObserver):
    """Exponential moving average of each batch's range: r <- r + momentum (r_batch - r).

    The first batch sets the range. Blocks that a batch leaves empty (all NaN) keep theirs.
    """

    def __init__(self, spec: str | QuantSpec, momentum: float = 0.01) -> None:
        super().__init__(spec)
        if not 0.0 < momentum <= 1.0:
            raise ValueError(f"momentum must be in (0, 1], got {momentum}")
        self.momentum = momentum

    def _combine(self, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
        def average(old: Tensor, new: Tensor) -> Tensor:
            moved = old + self.momentum * (new - old)
            return torch.where(new.isinf(), old, torch.where(old.isinf(), new, moved))

        return average(self.lo, lo), average(self.hi, hi)

    def extra_repr(self) -> str:
        return f"{self.spec}, momentum={self.momentum}"


def range_arguments(spec: QuantSpec) -> dict:
    """The keyword arguments by which the ops know a spec's grid and the rule of its scales.

    ValueError for elements whose grid no range decides: fixed point and codebooks.
    """
    element = spec.element
    if not spec.has_scale:
        raise ValueError(f"the grid of {spec} does not depend on a range: {_WITHOUT_RANGE[type(element)]}")
    rule = spec.anchor if spec.offset == "none" else spec.offset
    stored = spec.scale_dtype if spec.two_level is None else "float32"  # two_level.py rounds them from there
    known = {"qmin": element.qmin, "qmax": element.qmax, "rule": rule, "scale_dtype": getattr(torch, stored)}
    return known | element_arguments(element)


_WITHOUT_RANGE: dict[type, str] = {
    FixedPoint: "its step is fixed",
    Codebook: "its levels are chosen by k-means (solver='kmeans'), or given as codebook=",
}
