"""What a weight passes through in training, by the name of where its range comes from."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from .errors import PhiquantError
from .fake_quant import FakeQuantize, KnownGrid
from .learned import LearnedFakeQuantize, Start, TrainedScales
from .learned_clip import LearnedClipping
from .learned_levels import LearnedCodebook, TrainedTernary
from .modules import Quantizer
from .solvers import quantize_tensor
from .spec import Codebook, QuantSpec
from .tensor import QuantizedTensor

Range = Literal["tensor", "observer", "mse", "learned", "lsq", "lsq+", "clip", "ternary", "scales"]


def for_weight(name: str, weight: Tensor, spec: QuantSpec, range: Range) -> Quantizer:
    """The quantizer that trains `weight` on the grid `spec`. PhiquantError, naming the layer, if there is none."""
    _known(range)
    try:
        spec.scale_shape(tuple(weight.shape))
        return MAKERS[range](weight.detach(), spec).to(weight.device)
    except PhiquantError:
        raise
    except ValueError as error:
        raise PhiquantError(f"{name}.weight: {error}") from error


def for_codes(name: str, quantized: QuantizedTensor, range: Range) -> Quantizer:
    """The quantizer that goes on from codes: on their grid as it is stored, or training it."""
    _known(range)
    maker = CONTINUED.get(range, KnownGrid)
    try:
        return maker(quantized)
    except ValueError as error:
        raise PhiquantError(f"{name}.weight: {error}") from error


def _tensor(weight: Tensor, spec: QuantSpec) -> Quantizer:
    return FakeQuantize(spec)


def _observer(weight: Tensor, spec: QuantSpec) -> Quantizer:
    quantizer = FakeQuantize(spec, range="observer").to(weight.device)
    quantizer.observe(weight)  # a range to begin with, also in evaluation mode
    return quantizer


def _mse(weight: Tensor, spec: QuantSpec) -> Quantizer:
    chosen = _chosen(weight, spec)
    if chosen.scales is None or spec.two_level is not None:
        return KnownGrid(chosen)
    quantizer = FakeQuantize(spec, range="observer")
    quantizer.observing = False
    quantizer.set_range(chosen.scales, chosen.zero_points, chosen.minimums)
    return quantizer


def _lsq(weight: Tensor, spec: QuantSpec, start: Start) -> Quantizer:
    if isinstance(spec.element, Codebook):
        return LearnedCodebook(_chosen(weight, spec))
    return _initialized(LearnedFakeQuantize(spec, tuple(weight.shape), start), weight)


def _clip(weight: Tensor, spec: QuantSpec) -> Quantizer:
    return _initialized(LearnedClipping(spec, tuple(weight.shape)), weight)


def _ternary(weight: Tensor, spec: QuantSpec) -> Quantizer:
    quantizer = TrainedTernary()
    if spec != quantizer.spec:
        raise ValueError(f"range='ternary' trains two levels and 0 per tensor: use {quantizer.spec}, not {spec}")
    return _initialized(quantizer, weight)


def _scales(weight: Tensor, spec: QuantSpec) -> Quantizer:
    return _with_codes(_chosen(weight, spec))


def _with_codes(quantized: QuantizedTensor) -> Quantizer:
    return TrainedScales(quantized) if quantized.codebook is None else LearnedCodebook(quantized, fixed=True)


def _from_codes(quantized: QuantizedTensor) -> Quantizer:
    return LearnedFakeQuantize.of(quantized) if quantized.codebook is None else LearnedCodebook(quantized)


def _initialized(quantizer: Any, weight: Tensor) -> Quantizer:
    quantizer.to(weight.device).initialize(weight)
    return quantizer


def _chosen(weight: Tensor, spec: QuantSpec) -> QuantizedTensor:
    """The codes of least squared error; the search runs on the CPU."""
    return quantize_tensor(weight.cpu(), spec, solver="kmeans" if isinstance(spec.element, Codebook) else "mse")


MAKERS: dict[str, Callable[[Tensor, QuantSpec], Quantizer]] = {
    "tensor": _tensor,
    "observer": _observer,
    "mse": _mse,
    "learned": partial(_lsq, start="mse"),
    "lsq": partial(_lsq, start="lsq"),
    "lsq+": partial(_lsq, start="lsq+"),
    "clip": _clip,
    "ternary": _ternary,
    "scales": _scales,
}
CONTINUED: dict[str, Callable[[QuantizedTensor], Quantizer]] = {
    "learned": _from_codes,
    "lsq": _from_codes,
    "lsq+": _from_codes,
    "scales": _with_codes,
}


def _known(range: str) -> None:
    if range not in MAKERS:
        *most, last = (repr(name) for name in get_args(Range))
        raise PhiquantError(f"range is {', '.join(most)} or {last}, not {range!r}")


@torch.no_grad()
def into_cells(weight: Tensor, wanted: Tensor, quantizer: Quantizer, steps: int = 8) -> None:
    """Move `weight`, in place, from the values of its codes as far towards `wanted` as each keeps its code.

    Values that lie near the edge of their cell change their codes in a few steps of training; decoded ones do not.
    """
    start = weight.detach().clone()
    codes = quantizer.quantize(start).codes
    low, high = torch.zeros_like(start), torch.ones_like(start)  # shares of the way: keeps its code, may not
    moved = wanted.to(start)
    low = torch.where(quantizer.quantize(moved).codes == codes, high, low)
    for _ in range(steps):
        middle = (low + high) / 2
        same = quantizer.quantize(torch.lerp(start, moved, middle)).codes == codes
        low, high = torch.where(same, middle, low), torch.where(same, high, middle)
    weight.copy_(torch.lerp(start, moved, low))
