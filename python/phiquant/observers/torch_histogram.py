"""torch.ao's HistogramObserver, count for count, at several times its speed."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import ops
from ..spec import QuantSpec
from .base import Observer, number_of_levels

UPSAMPLE = 16  # finer bins that an old bin is cut into when the range grows, as torch.ao does


class TorchHistogramObserver(Observer):
    """The range of least squared error that `torch.ao.quantization.HistogramObserver` finds, for any stream of batches.

    Equal bins lie over the range seen. When it grows, each old bin is cut into 16 parts that go where their middle
    falls, so later counts are approximate and depend on the order of the batches: merging two of them is as approximate
    as that. `HistogramObserver` has neither fault. Per tensor only, as torch.ao's. NaN and infinities are passed over.

    counts: float32 [bins], fractions from cut bins included.
    """

    counts: Tensor

    def __init__(self, spec: str | QuantSpec, bins: int = 2048) -> None:
        super().__init__(spec)
        if math.prod(self.spec.scale_shape((2, 2))) != 1:
            raise ValueError(f"torch.ao's histogram is per tensor; {self.spec} is not. Use HistogramObserver")
        if not 1 <= bins <= 32768:
            raise ValueError(f"bins must be 1 to 32768, not {bins}")
        number_of_levels(self.spec, "TorchHistogramObserver")
        self.bins = bins
        self.register_buffer("counts", torch.zeros(bins))

    def _look(self, x: Tensor) -> dict[str, Tensor]:
        x = x.reshape(-1)
        lo, hi = ops.min_max(x, (1,))
        if bool(lo.isinf() | hi.isinf()):
            x = x[x.isfinite()]
            if not x.numel():
                return {"lo": lo.fill_(math.inf), "hi": hi.fill_(-math.inf), "counts": torch.zeros_like(self.counts)}
            lo, hi = ops.min_max(x, (1,))
        if self.seen:  # counted over the range that old and new values need together
            lo, hi = torch.minimum(lo, self.lo.to(lo.device)), torch.maximum(hi, self.hi.to(hi.device))
        return {"lo": lo, "hi": hi, "counts": ops.histogram(x, self.bins, lo.item(), hi.item()).float()}

    def _combine(self, new: dict[str, Tensor]) -> dict[str, Tensor]:
        if not bool(new["lo"] <= new["hi"]):
            return {}
        lo, hi = torch.minimum(self.lo, new["lo"]), torch.maximum(self.hi, new["hi"])
        counts = _spread(self.counts, self.lo, self.hi, lo, hi) + _spread(new["counts"], new["lo"], new["hi"], lo, hi)
        return {"lo": lo, "hi": hi, "counts": counts.float()}

    def range(self) -> tuple[Tensor, Tensor]:
        levels = number_of_levels(self.spec, "TorchHistogramObserver")
        width = (self.hi - self.lo) / self.bins
        first, end = ops.histogram_mse(self.counts, width, levels)
        return self.lo + width * first, self.lo + width * end

    def extra_repr(self) -> str:
        return f"{self.spec}, bins={self.bins}"


def _spread(counts: Tensor, lo: Tensor, hi: Tensor, new_lo: Tensor, new_hi: Tensor) -> Tensor:
    """Counts over [lo, hi] brought to as many bins over [new_lo, new_hi], which is no narrower."""
    if bool((lo == new_lo) & (hi == new_hi)):
        return counts
    bins = len(counts)
    if bool(lo == hi):  # one value
        return ops.histogram(lo, bins, new_lo.item(), new_hi.item()) * counts.sum()
    parts = bins * UPSAMPLE
    middles = torch.linspace(lo.item(), hi.item(), parts + 1)[:-1] + 0.5 * ((hi - lo) / parts).cpu()
    edges = torch.linspace(new_lo.item(), new_hi.item(), bins + 1)
    place = (torch.bucketize(middles, edges, right=True) - 1).clamp(0, bins - 1).to(counts.device)
    return torch.bincount(place, weights=counts.repeat_interleave(UPSAMPLE) / UPSAMPLE, minlength=bins)
