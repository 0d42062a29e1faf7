"""AdaRound: round each value up or down so that the layer's output changes least (docs/methods/adaround.md).

minimise tr(D H D^T) + penalty over h in [0, 1], D = lower + h (upper - lower) - W, H the mean of x x^T over the
layer's inputs. arXiv 2004.10568; because H holds all of the inputs that matters, no data are replayed.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from ..errors import PhiquantError
from ..spec import Codebook, QuantSpec
from ..statistics import Statistics, of_inputs
from ..tensor import QuantizedTensor
from .nearest import mse

STEPS = 500
_RATE, _PENALTY = 0.02, 0.5  # of Adam; of the penalty that drives h to 0 or 1, relative to the error's gradient
_WARM, _SHARPEST, _BLUNTEST = 0.2, 2.0, 20.0  # share of steps without penalty; its exponent at the end and start
_LOW, _HIGH = -0.1, 1.1  # the sigmoid is stretched over these and cut to [0, 1]
_VALUES = 1 << 22  # of some rows, solved at a time


def adaround(
    w: Tensor, spec: QuantSpec, statistics: Statistics | None = None, *, steps: int = STEPS
) -> QuantizedTensor:
    """Codes of w [N, K] on the grid that `mse` finds for it, each the next below or above its value.

    No row's output error is larger than with the nearest codes, which stay where they were better.
    Cost: steps * N * K^2 multiplications. The result is on w's device.
    """
    statistics = of_inputs(w, statistics, "adaround")
    if isinstance(spec.element, Codebook):
        raise PhiquantError(f"adaround takes grids that are known beforehand, not {spec}; use kmeans or gptq")
    nearest = mse(w, spec)
    hessian = statistics.hessian.to(w.device, torch.float32)
    hessian = hessian / hessian.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
    scale, zero_point, minimum = nearest.grid()
    codes = torch.empty_like(nearest.codes)
    step = max(1, _VALUES // max(1, w.shape[1]))
    for first in range(0, len(w), step):
        rows = slice(first, first + step)
        grid: list[Any] = [None if part is None else _of_rows(part, rows, w) for part in (scale, zero_point, minimum)]
        codes[rows] = _solve(w[rows].float(), nearest.codes[rows], spec, hessian, steps, *grid)
    return dataclasses.replace(nearest, codes=codes)


def _of_rows(parameter: Tensor, rows: slice, w: Tensor) -> Tensor:
    """A parameter of any granularity for every value of some rows, float32 [n, K]."""
    part = parameter[rows] if len(parameter) == len(w) else parameter.expand(len(w[rows]), -1)
    return part.float().repeat_interleave(w.shape[1] // part.shape[1], dim=1)


def _solve(
    w: Tensor,
    nearest: Tensor,
    spec: QuantSpec,
    hessian: Tensor,
    steps: int,
    scale: Tensor,
    zero_point: Tensor | None,
    minimum: Tensor | None,
) -> Tensor:
    levels, codes_of = _levels(spec)
    offset = torch.zeros_like(w)
    if zero_point is not None:
        offset = -zero_point * scale
    elif minimum is not None:
        offset = minimum
    position = torch.where(scale == 0, 0, (w - offset) / scale)
    below = (torch.searchsorted(levels, position, right=True) - 1).clamp(0, len(levels) - 2)
    low, span = levels[below], levels[below + 1] - levels[below]
    base, width = low * scale + offset - w, span * scale
    best = _index(nearest, codes_of)
    least = _error(levels[best] * scale + offset - w, hessian)
    h = _optimise(((position - low) / span).clamp(0, 1), base, width, hessian, steps)
    chosen = below + (h >= 0.5)
    better = _error(levels[chosen] * scale + offset - w, hessian) < least
    return codes_of[torch.where(better[:, None], chosen, best)].to(nearest.dtype)


def _optimise(fraction: Tensor, base: Tensor, width: Tensor, hessian: Tensor, steps: int) -> Tensor:
    """h [n, K] after `steps` of Adam on the stretched sigmoid's argument."""
    v = torch.logit(((fraction - _LOW) / (_HIGH - _LOW)).clamp(1e-4, 1 - 1e-4))
    first, second = torch.zeros_like(v), torch.zeros_like(v)
    h = fraction
    unit = width.square().mean().clamp(min=torch.finfo(torch.float32).tiny)
    for step in range(1, steps + 1):
        sigmoid = torch.sigmoid(v)
        stretched = sigmoid * (_HIGH - _LOW) + _LOW
        h = stretched.clamp(0, 1)
        gradient = (torch.addcmul(base, h, width) @ hessian).mul_(width).mul_(2 / unit)
        warm = _WARM * steps
        if step > warm:
            sharp = _sharpness((step - warm) / max(1.0, steps - warm))
            gradient -= _PENALTY * sharp * 2 * (2 * h - 1).sign() * (2 * h - 1).abs().pow(sharp - 1)
        gradient *= ((stretched > 0) & (stretched < 1)) * sigmoid * (1 - sigmoid) * (_HIGH - _LOW)
        first.lerp_(gradient, 0.1)
        second.lerp_(gradient.square(), 0.001)
        v -= _RATE * (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-12)
    return h


def _sharpness(share: float) -> float:
    """The penalty's exponent, from the bluntest to the sharpest along a half cosine."""
    return _SHARPEST + 0.5 * (_BLUNTEST - _SHARPEST) * (1 + math.cos(math.pi * share))


def _levels(spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """The element's values, ascending, float32, and the code of each."""
    element = spec.element
    codes = torch.arange(element.qmin, element.qmax + 1)
    values = codes.float() if element.levels is None else torch.tensor(element.levels)
    order = values.nan_to_num(math.inf).argsort(stable=True)
    order = order[values[order].isfinite()]
    return values[order], codes[order]


def _index(codes: Tensor, codes_of: Tensor) -> Tensor:
    """Where each code is in codes_of."""
    place = torch.zeros(256, dtype=torch.long)
    place[codes_of.long() & 255] = torch.arange(len(codes_of))
    return place[codes.long() & 255]


def _error(difference: Tensor, hessian: Tensor) -> Tensor:
    """d H d^T of each row."""
    return ((difference @ hessian) * difference).sum(1, dtype=torch.float64)
