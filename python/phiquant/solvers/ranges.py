"""Nearest codes on a range that leaves outliers out: by percentile, KL divergence, or a histogram's squared error."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from ..errors import PhiquantError
from ..fake_quant import encode
from ..observers import HistogramObserver, KLObserver, Observer, range_arguments
from ..spec import QuantSpec
from ..tensor import QuantizedTensor


def percentile(w: Tensor, spec: QuantSpec, p: float = 99.9) -> QuantizedTensor:
    """The exact percentile of each block: of |w| without an offset, else 100 - p and p of w."""
    shape, q = spec.scale_shape(tuple(w.shape)), p / 100
    hi = ops.percentile(w, shape, q, magnitude=spec.symmetric)
    lo = -hi if spec.symmetric else ops.percentile(w, shape, 1 - q)
    return _encode(w, spec, lo, hi)


def kl(w: Tensor, spec: QuantSpec) -> QuantizedTensor:
    """The threshold of least KL divergence, TensorRT's form (`KLObserver`)."""
    return _observed(w, KLObserver(spec))


def histogram(w: Tensor, spec: QuantSpec) -> QuantizedTensor:
    """The range that torch.ao's search finds in a histogram (`HistogramObserver`)."""
    return _observed(w, HistogramObserver(spec))


def _observed(w: Tensor, observer: Observer) -> QuantizedTensor:
    observer(w)
    return _encode(w, observer.spec, *observer.range())


def _encode(w: Tensor, spec: QuantSpec, lo: Tensor, hi: Tensor) -> QuantizedTensor:
    if spec.two_level is not None:
        raise PhiquantError(f"a range decides one level of scales, {spec} has two; use solver 'rtn' or 'mse'")
    lo, hi = lo.to(w.device), hi.to(w.device)
    scale, zero_point, minimum = ops.range_from_min_max(lo, hi, **range_arguments(spec))
    if not bool(torch.isfinite(w).all()):  # which codes cannot hold
        scale = torch.full_like(scale, float("nan"))
    return encode(w, spec, scale, zero_point, minimum)
