"""Clip: the range of each block that keeps the layer's output best, found with the inputs' second moments."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..spec import Codebook, QuantSpec
from ..statistics import Statistics, of_inputs
from ..tensor import PARAMETERS, QuantizedTensor
from .kmeans import kmeans
from .nearest import mse, rtn

STEPS, MOST = 20, 0.5  # candidates shrink the range by 1 / 20 of it, by half at most
_WIDEST = 256  # columns of a block whose errors are weighed together; those of wider blocks by this many
_VALUES = 1 << 22  # in some rows, weighed at a time


def clip(w: Tensor, spec: QuantSpec, statistics: Statistics | None = None) -> QuantizedTensor:
    """The nearest codes of w [N, K] on the best range of each block, by the error d H d^T of the block alone.

    Candidates: what `mse` finds with the inputs' mean squares as weights, and `rtn` with the block's values cut
    to 1, 0.95, .. 0.55 of the largest: never worse than either. d: the block's errors; H: the block's second
    moments of the input, as AWQ's clip search has it (arXiv 2306.00978). Cost: 11 N K g for blocks of g columns.
    """
    statistics = of_inputs(w, statistics, "clip")
    importance = statistics.square_mean.to(w.device)
    if isinstance(spec.element, Codebook):
        return kmeans(w, spec, weights=importance)
    blocks = spec.scale_shape(tuple(w.shape)) if spec.two_level is None else spec.super_shape(tuple(w.shape))
    x, hessian = w.float(), statistics.hessian.to(w.device, torch.float32)
    best = mse(w, spec, importance)
    least = _block_errors(best.dequantize() - x, hessian, blocks)
    for candidate in _shrunken(w, spec):
        error = _block_errors(candidate.dequantize() - x, hessian, blocks)
        better = error < least
        best, least = _merged(better, candidate, best), torch.where(better, error, least)
    return best


def _shrunken(w: Tensor, spec: QuantSpec) -> Iterator[QuantizedTensor]:
    """`rtn` of w with the values of each block cut to less and less of its range."""
    rows, columns = spec.scale_shape(tuple(w.shape))
    blocks = w.view(rows, len(w) // rows, columns, w.shape[1] // columns)
    low, high = blocks.amin((1, 3), keepdim=True), blocks.amax((1, 3), keepdim=True)
    if spec.symmetric:
        low, high = torch.minimum(low, -high), torch.maximum(-low, high)
    for step in range(int(STEPS * MOST)):
        share = 1 - step / STEPS
        yield rtn(torch.minimum(torch.maximum(blocks, low * share), high * share).view_as(w), spec)


def _block_errors(difference: Tensor, hessian: Tensor, blocks: tuple[int, ...]) -> Tensor:
    """d H d^T of each block, summed over its rows: [blocks]."""
    unit = width = difference.shape[1] // blocks[1]
    while width > _WIDEST and width % 2 == 0:
        width //= 2
    count = difference.shape[1] // width
    moments = torch.stack([hessian[i * width : (i + 1) * width, i * width : (i + 1) * width] for i in range(count)])
    errors = []
    for rows in difference.split(max(1, _VALUES // difference.shape[1])):
        d = rows.unflatten(1, (count, width)).transpose(0, 1)
        errors.append(((d @ moments) * d).sum(2).T)
    return torch.cat(errors).view(blocks[0], -1, blocks[1], unit // width).sum((1, 3))


def _merged(better: Tensor, new: QuantizedTensor, old: QuantizedTensor) -> QuantizedTensor:
    """`new` in the blocks that are better, `old` in the others."""

    def choose(a: Tensor | None, b: Tensor | None) -> Tensor | None:
        if a is None or b is None:
            return None
        rows, columns = (n // m for n, m in zip(a.shape, better.shape, strict=True))
        return torch.where(better.repeat_interleave(rows, 0).repeat_interleave(columns, 1), a, b)

    parts: dict[str, Any] = {name: choose(getattr(new, name), getattr(old, name)) for name in ("codes", *PARAMETERS)}
    return dataclasses.replace(old, **parts)
