"""HQQ: codes of least sum |w - q|^p, p < 1, a norm that forgives the few large errors (docs/methods/hqq.md).

Half-quadratic quantization, Badri and Shaji 2023 (mobiusml.github.io/hqq_blog), with errors in units of the step. It
looks at the weight alone: where the layer's inputs have outlier channels, that is the wrong norm.
"""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import torch
from torch import Tensor

from .. import ops, two_level
from ..errors import PhiquantError
from ..fake_quant import encode, encode_two_level
from ..observers import range_arguments
from ..spec import Codebook, FixedPoint, QuantSpec
from ..statistics import Statistics
from ..tensor import QuantizedTensor

_OUTLIERS = 16.0  # a channel this many times the mean channel: phi3-tiny's go up to 12, its outlier twin's to 29


def hqq(
    w: Tensor,
    spec: QuantSpec,
    statistics: Statistics | None = None,
    *,
    power: float = 0.7,
    beta: float = 10.0,
    kappa: float = 1.01,
    iterations: int = 20,
) -> QuantizedTensor:
    """The nearest codes on a grid whose offset (without one: whose scale) makes sum |w - q|^power small in each block.

    It starts at the grid of `rtn` and is never worse in that sum. A minimum is solved for with the scale of `rtn`; a
    zero point, an integer, is solved for, rounded and kept if better, then the scale; else the scale alone.
    beta, kappa: how much of an error the norm forgives, and how fast that falls; the authors' values.
    statistics: not used, but where they show inputs with outlier channels there is a warning: use awq or gptq there.
    PhiquantError for grids without a scale.
    """
    if isinstance(spec.element, Codebook | FixedPoint):
        other = "kmeans" if isinstance(spec.element, Codebook) else "rtn"
        raise PhiquantError(f"hqq solves for the offset or the scale of a grid, and {spec} has neither; use {other}")
    if statistics is not None:
        _warn_of_outliers(statistics)
    settings: dict[str, Any] = {"power": power, "beta": beta, "kappa": kappa, "iterations": iterations}
    grid = range_arguments(spec)
    scale, zero_point, minimum = ops.choose_range(w, spec.scale_shape(tuple(w.shape)), **grid)
    found = ops.hqq(w, scale, zero_point, minimum, **grid, **settings)
    if spec.two_level is None:
        return encode(w, spec, *found)
    return _in_two_levels(w, spec, found, power)


def _in_two_levels(w: Tensor, spec: QuantSpec, found: two_level.Found, power: float) -> QuantizedTensor:
    """The blocks' parameters rounded to their codes; in the super-blocks where that is no better, those of `rtn`."""
    plain, solved = encode_two_level(w, spec), encode_two_level(w, spec, found=found)
    supers = spec.super_shape(tuple(w.shape))
    better = _sum(w, solved, supers, power) < _sum(w, plain, supers, power)
    parts: dict[str, Any] = {
        name: _where(better, getattr(solved, name), part) for name, part in plain.parameters.items()
    }
    return dataclasses.replace(plain, codes=_where(better, solved.codes, plain.codes), **parts)


def _where(better: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Of each super-block the values of `a` or of `b`, of one dtype, any number of values to a super-block."""
    mask = better.repeat_interleave(b.shape[-1] // better.shape[-1], -1)
    small = b.dtype.itemsize == 1  # some of these torch cannot choose between
    return torch.where(mask, a.view(torch.uint8), b.view(torch.uint8)).view(b.dtype) if small else a.where(mask, b)


def _sum(w: Tensor, quantized: QuantizedTensor, shape: tuple[int, ...], power: float) -> Tensor:
    """sum |w - q|^power of each super-block, float64 of `shape`."""
    error = (w.float() - quantized.dequantize()).abs().pow(power)
    return error.reshape(*shape, -1).sum(-1, dtype=torch.float64)


def _warn_of_outliers(statistics: Statistics) -> None:
    mean = statistics.abs_mean
    ratio = float(mean.max() / mean.mean()) if statistics.tokens else 0.0
    if ratio > _OUTLIERS:
        warnings.warn(
            f"input channel {int(mean.argmax())} is {ratio:.0f} times as large as the mean channel, which hqq does not "
            "see: it may do worse than rtn here; use awq, gptq, or mse with this calibration",
            stacklevel=2,
        )
