"""What every observer is: a module with a range per block, a state that can be saved, merged and reduced."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import ops
from ..spec import Codebook, FixedPoint, Int, QuantSpec
from ..spec import spec as read_spec
from ..tensor import element_arguments

if TYPE_CHECKING:
    from typing import Self


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


class Observer(KeepsDtype):
    """Sees tensors and remembers lo and hi per block, the extremes of what it saw; subclasses remember more.

    lo, hi: float32 [1] until the first tensor gives their shape, `spec.scale_shape(x.shape)`; lo = inf
    and hi = -inf stand for "nothing seen". NaN is passed over, an empty tensor changes nothing.
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
            self._take(self._look(x))
        return x

    @torch.no_grad()
    def merge(self, other: Self) -> None:
        """Take in what `other`, of this kind and spec, has seen: as if it had been seen here, after the rest."""
        if type(other) is not type(self) or str(other.spec) != str(self.spec):
            raise ValueError(f"only observers of one kind and spec merge: {self} with {other}")
        if other.seen:
            self._take({name: value.to(self.lo.device) for name, value in other._buffers.items() if value is not None})

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> None:
        """Merge the observers of all ranks: each then holds what all of them have seen. Once, after calibration.

        Every rank of `group` must call it. Does nothing where torch.distributed is not initialized.
        """
        if not (dist.is_available() and dist.is_initialized()):
            return
        states: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(states, {name: value.cpu() for name, value in self.state_dict().items()}, group)
        ranks = [copy.deepcopy(self) for _ in states]
        for rank, state in zip(ranks, states, strict=True):
            rank.load_state_dict(state)
        self._merge_ranks([rank for rank in ranks if rank.seen])

    def _merge_ranks(self, ranks: list[Self]) -> None:
        for rank in ranks[1:]:
            ranks[0].merge(rank)
        if ranks:
            self.load_state_dict(ranks[0].state_dict())

    def range(self) -> tuple[Tensor, Tensor]:
        """(lo, hi), float32 in the shape of the scales: the range that this observer proposes."""
        return self.lo, self.hi

    def parameters_of_range(self, spec: QuantSpec | None = None) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(scale, zero_point, minimum) of `range()`. RuntimeError if nothing was seen.

        spec: the grid, where it is another than that which the observer took for its search.
        """
        spec = spec or self.spec
        if spec.anchor in ("absmean", "twn"):
            raise ValueError(
                f"the scale of {spec} is a mean of |x|, which no range gives; use FakeQuantize with range='tensor'"
            )
        if not self.seen:
            raise RuntimeError("the observer has seen no values yet; run some batches through it first")
        return ops.range_from_min_max(*self.range(), **range_arguments(spec))

    def _look(self, x: Tensor) -> dict[str, Tensor]:
        """The state after seeing x alone: a value for each buffer."""
        raise NotImplementedError

    def _combine(self, new: dict[str, Tensor]) -> dict[str, Tensor]:
        """The state after seeing what gave `new` too."""
        raise NotImplementedError

    def _take(self, new: dict[str, Tensor]) -> None:
        new = {name: value.to(self.lo.device) for name, value in new.items()}
        if not self.seen:
            combined = new
        elif self.lo.shape == new["lo"].shape:
            combined = self._combine(new)
        elif self.lo.numel() == new["lo"].numel() == 1:  # per tensor: the number of axes does not matter
            combined = self._combine({name: value.reshape(getattr(self, name).shape) for name, value in new.items()})
        else:
            raise ValueError(
                f"the observer has ranges of shape {list(self.lo.shape)}, this tensor needs "
                f"{list(new['lo'].shape)}; use one observer per shape, or a per-tensor spec"
            )
        for name, value in combined.items():
            setattr(self, name, value.clone())

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: object) -> None:
        # The buffers take their shape from what was seen; a fresh observer must take a saved one's.
        for name in self._buffers:
            saved = state_dict.get(prefix + name)
            if saved is not None:
                setattr(self, name, torch.empty_like(saved, device=self.lo.device))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return str(self.spec)


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


def number_of_levels(spec: QuantSpec, who: str) -> int:
    """Levels of an integer grid. ValueError for other elements: `who` takes levels to be evenly spaced."""
    if not isinstance(spec.element, Int):
        raise ValueError(f"{who} takes the levels of a grid to be evenly spaced, which those of {spec} are not")
    return spec.element.qmax - spec.element.qmin + 1


_WITHOUT_RANGE: dict[type, str] = {
    FixedPoint: "its step is fixed",
    Codebook: "its levels are chosen by k-means (solver='kmeans'), or given as codebook=",
}
