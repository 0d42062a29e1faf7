"""The extremes of what was seen, or their exponential moving average."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import ops
from ..spec import QuantSpec
from .base import Observer

if TYPE_CHECKING:
    from typing import Self


class MinMaxObserver(Observer):
    """Smallest and largest value seen per block. NaN is passed over, an empty tensor changes nothing."""

    def _look(self, x: Tensor) -> dict[str, Tensor]:
        lo, hi = ops.min_max(x, self.spec.scale_shape(tuple(x.shape)))
        return {"lo": lo, "hi": hi}

    def _combine(self, new: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"lo": torch.minimum(self.lo, new["lo"]), "hi": torch.maximum(self.hi, new["hi"])}


class EmaObserver(Observer):
    """Exponential moving average of each batch's range: r <- r + momentum (r_batch - r).

    The first batch sets the range. Blocks that a batch leaves empty (all NaN) keep theirs.

    To merge, the first range and the number of batches are kept too: the average is linear in the batches' ranges, so
    the average of these batches followed by another's is r_other + (1 - momentum)^n_other (r - first_other). Ranks of
    a distributed run see their batches side by side, not one after the other: `all_reduce` takes the mean.

    first_lo, first_hi: float32, batches: int64, all in the shape of lo.
    """

    first_lo: Tensor
    first_hi: Tensor
    batches: Tensor

    def __init__(self, spec: str | QuantSpec, momentum: float = 0.01) -> None:
        super().__init__(spec)
        if not 0.0 < momentum <= 1.0:
            raise ValueError(f"momentum must be in (0, 1], got {momentum}")
        self.momentum = momentum
        self.register_buffer("first_lo", self.lo.clone())
        self.register_buffer("first_hi", self.hi.clone())
        self.register_buffer("batches", torch.zeros(1, dtype=torch.int64))

    def _look(self, x: Tensor) -> dict[str, Tensor]:
        lo, hi = ops.min_max(x, self.spec.scale_shape(tuple(x.shape)))
        return {"lo": lo, "hi": hi, "first_lo": lo, "first_hi": hi, "batches": (lo <= hi).long()}

    def _combine(self, new: dict[str, Tensor]) -> dict[str, Tensor]:
        keep = (1.0 - self.momentum) ** new["batches"]
        ours, theirs = self.batches > 0, new["batches"] > 0
        result = {"batches": self.batches + new["batches"]}
        for name in ("lo", "hi"):
            old, first = getattr(self, name), getattr(self, f"first_{name}")
            moved = new[name] + keep * (old - new[f"first_{name}"])
            result[name] = torch.where(theirs, torch.where(ours, moved, new[name]), old)
            result[f"first_{name}"] = torch.where(ours, first, new[f"first_{name}"])
        return result

    def _merge_ranks(self, ranks: list[Self]) -> None:
        if not ranks:
            return
        seen = torch.stack([rank.batches > 0 for rank in ranks])
        for name in ("lo", "hi", "first_lo", "first_hi"):
            values = torch.stack([getattr(rank, name) for rank in ranks])
            mean = torch.where(seen, values, 0.0).sum(0) / seen.sum(0)
            setattr(self, name, torch.where(seen.any(0), mean, values[0]).to(self.lo.device))
        self.batches = torch.stack([rank.batches for rank in ranks]).amax(0)

    def extra_repr(self) -> str:
        return f"{self.spec}, momentum={self.momentum}"
