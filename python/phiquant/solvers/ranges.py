"""Nearest codes on a range that leaves outliers out: by percentile, KL divergence, or a histogram's squared error."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from .. import ops
from ..errors import PhiquantError
from ..fake_quant import encode
from ..observers import HistogramObserver, KLObserver, Observer, range_arguments
from ..ops.blocks import channel_axis, to_blocks
from ..spec import PerTensor, QuantSpec
from ..tensor import QuantizedTensor

_ENOUGH = 4096  # values of a block: with fewer than bins, hardly any bin holds more than one


def percentile(w: Tensor, spec: QuantSpec, p: float = 99.9) -> QuantizedTensor:
    """The exact percentile of each block: of |w| without an offset, else 100 - p and p of w."""
    shape, q = spec.scale_shape(tuple(w.shape)), p / 100
    hi = ops.percentile(w, shape, q, magnitude=spec.symmetric)
    lo = -hi if spec.symmetric else ops.percentile(w, shape, 1 - q)
    return _encode(w, spec, lo, hi)


def kl(w: Tensor, spec: QuantSpec) -> QuantizedTensor:
    """The threshold of least KL divergence, TensorRT's form (`KLObserver`).

    A histogram of few values says nothing: blocks of fewer than 4096 values share one threshold, relative to the
    largest magnitude of each, found on all values so scaled.
    """
    if spec.block_size(tuple(w.shape)) >= _ENOUGH:
        return _observed(w, KLObserver(spec))
    shape = spec.scale_shape(tuple(w.shape))
    lo, hi = ops.min_max(w, shape)
    size = torch.maximum(-lo, hi)
    blocks = to_blocks(w.float(), channel_axis(w.shape, shape)).view(size.numel(), -1)
    observer = KLObserver(dataclasses.replace(spec, granularity=PerTensor()))
    observer(blocks / size.view(-1, 1).clamp(min=torch.finfo(torch.float32).tiny))
    end = observer.range()[1].item() * size
    return _encode(w, spec, torch.maximum(lo, -end), torch.minimum(hi, end))


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
