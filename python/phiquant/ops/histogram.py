"""Histograms, the ranges found in them, and exact percentiles: typed wrappers and meta kernels.

The kernels run on the CPU. A tensor on another device is copied there for the count, and the counts (a few
thousand integers) are copied back; every other argument is small. Nothing here has a gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from .blocks import block_length, channel_axis, to_blocks

_ops = torch.ops.phiquant
KlForm = Literal["tensorrt", "notebook"]


def histogram(x: Tensor, bins: int, lo: float, hi: float) -> Tensor:
    """Counts int64 [bins] of the values of x in `bins` equal bins over [lo, hi], the last one closed.

    The bins are those of torch.histc on float32: trunc((x - lo) bins / (hi - lo)). NaN and what lies outside are
    passed over; a range of no width is widened by one on both sides. bins <= 32768. Any shape and float dtype.
    """
    return _ops.histogram.default(x.detach().cpu().contiguous(), bins, lo, hi).to(x.device)


def dyadic_histogram(x: Tensor, scale_shape: Sequence[int], bins: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(counts, exponent, lo, hi): a histogram of each block of x whose bins are 2^exponent wide, aligned at zero.

    counts: int64 [*scale_shape, 2 bins]; value v is counted at bins + floor(|v| / 2^exponent), or if negative at
    bins - 1 - floor(|v| / 2^exponent). exponent: int64 `scale_shape`, the smallest that holds all values (at
    least -126); lo, hi: float32, their extremes, inf and -inf for a block without any. Values that are not finite
    are passed over. bins: a power of two from 4 to 16384. See `coarsen` for merging.
    """
    axis, shape = channel_axis(x.shape, scale_shape), tuple(scale_shape)
    found = _ops.dyadic_histogram.default(to_blocks(x.detach().cpu(), axis), block_length(x.shape, shape), bins)
    counts, exponent, lo, hi = (t.to(x.device) for t in found)
    return counts.reshape(*shape, 2 * bins), exponent.reshape(shape), lo.reshape(shape), hi.reshape(shape)


def coarsen(counts: Tensor, steps: Tensor) -> Tensor:
    """Dyadic counts [..., 2 bins] with bins 2^steps times as wide; steps: int64 [...], not negative.

    Neighbours are added, so this is what would have been counted with the wider bins at once.
    """
    bins = counts.shape[-1] // 2
    signed = torch.arange(-bins, bins, device=counts.device)
    place = (signed >> steps.clamp(max=62)[..., None]) + bins
    return torch.zeros_like(counts).scatter_add_(-1, place, counts)


def histogram_mse(counts: Tensor, width: Tensor, levels: int) -> Tensor:
    """int64 [..., 2]: first bin and end of the range with the least squared error, as torch.ao searches it.

    counts: [..., bins], width: float32 [...] of a bin, levels: values of the grid. The search narrows the range from
    both ends by quantiles of 1e-5 and stops at the first move that does not lower the error of rounding to the
    middles of `levels` equal steps, values being spread evenly over their bin: the same moves as torch.ao's
    HistogramObserver makes, so the same range.
    """
    flat = counts.detach().reshape(-1, counts.shape[-1]).double().cpu().contiguous()
    found = _ops.histogram_mse.default(flat, width.detach().reshape(-1).float().cpu().contiguous(), levels)
    return found.to(counts.device).reshape(*counts.shape[:-1], 2)


def kl_divergence(counts: Tensor, levels: int, form: KlForm = "tensorrt") -> Tensor:
    """float64 [..., bins + 1]: KL(P || Q) of cutting a histogram of |x| after i bins; inf where i is no candidate.

    counts: [..., bins]. P is the histogram with all that lies beyond added to its last bin, Q the same bins merged
    to `levels` levels and spread again. form: "tensorrt", or "notebook" for what the course's notebook computes
    (csrc/core/histogram_search.h gives both).
    """
    if form not in ("tensorrt", "notebook"):
        raise ValueError(f"form is 'tensorrt' or 'notebook', not {form!r}")
    flat = counts.detach().reshape(-1, counts.shape[-1]).double().cpu().contiguous()
    found = _ops.kl_divergence.default(flat, levels, form == "notebook")
    return found.to(counts.device).reshape(*counts.shape[:-1], -1)


def kl_threshold(counts: Tensor, levels: int, form: KlForm = "tensorrt") -> Tensor:
    """int64 [...]: the number of bins to keep, the first with the least `kl_divergence`; all if none is a candidate."""
    divergence = kl_divergence(counts, levels, form)
    best = divergence.argmin(-1)
    return torch.where(divergence.isfinite().any(-1), best, counts.shape[-1])


def percentile(x: Tensor, scale_shape: Sequence[int], q: float, magnitude: bool = False) -> Tensor:
    """The q-quantile (0 <= q <= 1) of each block of x, exact, or of |x| if `magnitude`: float32 `scale_shape`.

    Between two values it interpolates linearly, as numpy.quantile does. Values that are not finite are passed over; a
    block without any other gives NaN.
    """
    blocks = to_blocks(x.detach().cpu(), channel_axis(x.shape, scale_shape))
    found = _ops.percentile.default(blocks, block_length(x.shape, scale_shape), q, magnitude)
    return found.to(x.device).reshape(tuple(scale_shape))


# --- meta kernels: shapes and dtypes only ---------------------------------------------------------


@torch.library.register_fake("phiquant::histogram")
def _(x: Tensor, bins: int, lo: float, hi: float) -> Tensor:
    return x.new_empty(bins, dtype=torch.int64)


@torch.library.register_fake("phiquant::dyadic_histogram")
def _(x: Tensor, block: int, bins: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    blocks = x.numel() // block if block else 0
    counts = x.new_empty(blocks, 2 * bins, dtype=torch.int64)
    exponent = x.new_empty(blocks, dtype=torch.int64)
    return counts, exponent, x.new_empty(blocks, dtype=torch.float32), x.new_empty(blocks, dtype=torch.float32)


@torch.library.register_fake("phiquant::histogram_mse")
def _(counts: Tensor, width: Tensor, levels: int) -> Tensor:
    return counts.new_empty(counts.shape[0], 2, dtype=torch.int64)


@torch.library.register_fake("phiquant::kl_divergence")
def _(counts: Tensor, levels: int, notebook: bool) -> Tensor:
    return counts.new_empty(counts.shape[0], counts.shape[1] + 1)


@torch.library.register_fake("phiquant::percentile")
def _(x: Tensor, block: int, *_: Any) -> Tensor:
    return x.new_empty(x.numel() // block if block else 0, dtype=torch.float32)
