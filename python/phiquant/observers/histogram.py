"""Observers over a histogram that merges exactly: ranges by squared error, by percentile, by KL divergence.

The bins are a power of two wide and aligned at zero; when a value does not fit, the width doubles and neighbouring
bins are added. So the state depends only on the values seen: not on their order, nor on how they were cut into
batches, merged, or spread over ranks.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import ops
from ..ops.histogram import KlForm
from ..spec import QuantSpec
from .base import Observer, number_of_levels


class HistogramObserver(Observer):
    """The range of least squared error for the histogram of all values, found by torch.ao's search.

    That search narrows the range from both ends and stops at the first move that does not lower the error of rounding
    to evenly spaced levels (`ops.histogram_mse`). Which local minimum that is depends on the bins, and these are not
    torch.ao's; `TorchHistogramObserver` counts as torch.ao does and gives the same range.

    bins: on each side of zero, a power of two; between half and all of them are in use. Values that are not finite are
    passed over. counts: int64 [*scale_shape, 2 bins] (`ops.dyadic_histogram`), 16 bins bytes for each block: for many
    channels, use fewer. exponent: int64 `scale_shape`, log2 of the width.
    """

    counts: Tensor
    exponent: Tensor

    def __init__(self, spec: str | QuantSpec, bins: int = 2048) -> None:
        super().__init__(spec)
        if bins < 4 or bins > 16384 or bins & (bins - 1):
            raise ValueError(f"bins must be a power of two from 4 to 16384, not {bins}")
        self.bins = bins
        self.register_buffer("counts", torch.zeros(1, 2 * bins, dtype=torch.int64))
        self.register_buffer("exponent", torch.zeros(1, dtype=torch.int64))
        self._check_spec()

    def _check_spec(self) -> None:
        number_of_levels(self.spec, type(self).__name__)

    def _look(self, x: Tensor) -> dict[str, Tensor]:
        shape = self.spec.scale_shape(tuple(x.shape))
        if (size := 16 * self.bins * math.prod(shape)) > 1 << 30:
            raise ValueError(
                f"{math.prod(shape)} histograms of 2 x {self.bins} bins for {self.spec} would take {size >> 20} MiB; "
                "use fewer bins, a coarser granularity, or a solver that needs no histogram ('mse', 'percentile')"
            )
        found = ops.dyadic_histogram(x, shape, self.bins)
        return dict(zip(("counts", "exponent", "lo", "hi"), found, strict=True))

    def _combine(self, new: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.counts.shape != new["counts"].shape:
            raise ValueError(f"histograms of {self.bins} and {new['counts'].shape[-1] // 2} bins do not merge")
        exponent = torch.maximum(self.exponent, new["exponent"])
        return {
            "lo": torch.minimum(self.lo, new["lo"]),
            "hi": torch.maximum(self.hi, new["hi"]),
            "exponent": exponent,
            "counts": ops.coarsen(self.counts, exponent - self.exponent)
            + ops.coarsen(new["counts"], exponent - new["exponent"]),
        }

    @property
    def width(self) -> Tensor:
        """Width of a bin, float32 in the shape of the scales."""
        return torch.exp2(self.exponent.double()).float()

    @property
    def magnitudes(self) -> Tensor:
        """The histogram of |x|: int64 [*scale_shape, bins]."""
        return self.counts[..., self.bins :] + self.counts[..., : self.bins].flip(-1)

    def range(self) -> tuple[Tensor, Tensor]:
        levels = number_of_levels(self.spec, type(self).__name__)
        found = ops.histogram_mse(self.counts, self.width, levels) - self.bins
        return self._within(found[..., 0] * self.width, found[..., 1] * self.width)

    def _within(self, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
        """A range no wider than what was seen, which lies inside the outermost bins."""
        return torch.maximum(self.lo, lo.float()), torch.minimum(self.hi, hi.float())

    def extra_repr(self) -> str:
        return f"{self.spec}, bins={self.bins}"


class PercentileObserver(HistogramObserver):
    """A percentile of what was seen: of |x| for a spec without offset, else 100 - p and p of x.

    Read off the histogram, so up to one bin from the exact one (`ops.percentile`), which only a whole tensor gives.
    """

    def __init__(self, spec: str | QuantSpec, percentile: float = 99.9, bins: int = 2048) -> None:
        if not 50.0 < percentile <= 100.0:
            raise ValueError(f"percentile must be in (50, 100], got {percentile}")
        super().__init__(spec, bins)
        self.percentile = percentile

    def _check_spec(self) -> None:
        pass  # any grid has a range

    def range(self) -> tuple[Tensor, Tensor]:
        q = self.percentile / 100
        if self.spec.symmetric:
            end = _quantile(self.magnitudes, q) * self.width
            return self._within(-end, end)
        lo, hi = (_quantile(self.counts, p) - self.bins for p in (1 - q, q))
        return self._within(lo * self.width, hi * self.width)

    def extra_repr(self) -> str:
        return f"{self.spec}, percentile={self.percentile}, bins={self.bins}"


class KLObserver(HistogramObserver):
    """The threshold T of |x| that loses the least information, by KL divergence: the range is cut to [-T, T].

    The first bin counts as the second does: zero is on every grid, and the many zeros behind a ReLU must not draw the
    threshold to where no bins are merged. Needs many more values than bins.

    form: "tensorrt", or "notebook" for what the course's notebook computes (`ops.kl_divergence`). levels: of the grid
    on [0, T]; None for 128 of int8, and so on: qmax + 1 without offset, else all codes, or half of them where
    negative values were seen. The idea suits 8 bits and clean data; with outliers it clips more than squared error
    would, see docs/ranges.md.
    """

    def __init__(
        self, spec: str | QuantSpec, form: KlForm = "tensorrt", levels: int | None = None, bins: int = 2048
    ) -> None:
        if form not in ("tensorrt", "notebook"):
            raise ValueError(f"form is 'tensorrt' or 'notebook', not {form!r}")
        super().__init__(spec, bins)
        self.form = form
        self.levels = levels

    def range(self) -> tuple[Tensor, Tensor]:
        counts = self.magnitudes
        counts[..., 0] = counts[..., 1]
        end = ops.kl_threshold(counts, self._levels(), self.form) * self.width
        return self._within(-end, end)

    def _levels(self) -> int:
        if self.levels is not None:
            return self.levels
        if self.spec.symmetric:
            return self.spec.element.qmax + 1
        return number_of_levels(self.spec, "KLObserver") // (2 if bool((self.lo < 0).any()) else 1)

    def extra_repr(self) -> str:
        return f"{self.spec}, form={self.form!r}, bins={self.bins}"


def _quantile(counts: Tensor, q: float) -> Tensor:
    """Where among the bins [..., bins] the q-quantile lies, values spread evenly over their bin: float64 [...].

    As `ops.percentile`, between the two values nearest to place q (n - 1).
    """
    cumulative = counts.cumsum(-1).double()
    place = q * (cumulative[..., -1:] - 1).clamp(min=0)
    lower, upper = (_position(counts, cumulative, rank) for rank in (place.floor(), place.ceil()))
    return (lower + (place - place.floor()) * (upper - lower))[..., 0]


def _position(counts: Tensor, cumulative: Tensor, rank: Tensor) -> Tensor:
    """Where among the bins the value at `rank` of the sorted values lies."""
    at = torch.searchsorted(cumulative, rank, right=True).clamp(max=counts.shape[-1] - 1)
    inside = counts.gather(-1, at).double()
    before = cumulative.gather(-1, at) - inside
    return at + (rank - before + 0.5) / inside.clamp(min=1)
