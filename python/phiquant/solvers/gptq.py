"""GPTQ: codes that keep the layer's output, one column after the other (docs/methods/gptq.md).

minimise tr((W - Q) H (W - Q)^T), H the mean of x x^T over the layer's inputs. arXiv 2210.17323; the form
without an inverse, which gives the same codes for half the work, is that of arXiv 2307.13304.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from .. import ops
from ..errors import PhiquantError
from ..spec import Codebook, QuantSpec
from ..statistics import Statistics
from ..tensor import QuantizedTensor, element_arguments
from .kmeans import kmeans
from .nearest import mse, rtn

_LARGEST_DAMPING = 1e4  # times the mean of the diagonal: beyond it H is noise beside the damping
_TOKENS = 2  # per input of the layer: on fewer, phi3-tiny lost more on other text than it does with nearest codes

_WIDE = 4 * ops.GPTQ_COLUMNS


def gptq(
    w: Tensor,
    spec: QuantSpec,
    statistics: Statistics | None = None,
    *,
    grid: Literal["minmax", "mse"] = "minmax",
    act_order: bool = True,
    damping: float = 0.01,
) -> QuantizedTensor:
    """Codes of w [N, K] on the grid that `rtn` (or `mse`) finds for it, rounded so that errors cancel in the output.

    grid: where scales and offsets come from: the extremes, or the least squared error, each column weighed by the mean
        square of its input. They are found from the weight as it is, so a file needs no order of columns. Codebooks,
        of any granularity, come from kmeans with the same weights.
    act_order: take the columns with the largest inputs first.
    damping: this share of the mean of H's diagonal is added to the diagonal; ten times as much, until H can be
        factored. Columns whose input was always zero are rounded to the nearest code.
    With fewer than 2 K tokens seen, a warning, and the nearest codes.
    Runs on the CPU; the result is on w's device.
    """
    if statistics is None:
        raise PhiquantError("gptq needs statistics of the layer's inputs; give calibration data")
    if w.dim() != 2:
        raise PhiquantError(f"gptq takes a matrix, not a tensor of shape {list(w.shape)}")
    if statistics.features != w.shape[1]:
        raise PhiquantError(f"the weight has {w.shape[1]} inputs, its statistics are of {statistics.features}")
    nearest = _nearest(w.cpu(), spec, statistics, grid)
    if not w.numel():
        return on(nearest, w.device)
    if starved(statistics):
        warnings.warn(
            f"a layer of {w.shape[1]} inputs saw {statistics.tokens} tokens, too few for gptq: its codes are the "
            "nearest ones; calibrate on more text",
            stacklevel=2,
        )
        return on(nearest, w.device)
    hessian = statistics.hessian.cpu()
    # Columns are taken from the last to the first.
    order = hessian.diagonal().argsort(stable=True) if act_order else torch.arange(len(hessian) - 1, -1, -1)
    return on(_solve(w.cpu(), nearest, _feedback(hessian, order, damping), order), w.device)


def starved(statistics: Statistics) -> bool:
    """Whether a layer saw so few tokens that GPTQ would fit the sample."""
    return statistics.tokens < _TOKENS * statistics.features


def _nearest(w: Tensor, spec: QuantSpec, statistics: Statistics, grid: str) -> QuantizedTensor:
    """The grid, and the nearest codes on it."""
    importance = statistics.square_mean.cpu()
    if isinstance(spec.element, Codebook):
        return kmeans(w, spec, weights=importance)
    return mse(w, spec, weights=importance) if grid == "mse" else rtn(w, spec)


def _feedback(hessian: Tensor, order: Tensor, damping: float) -> Tensor:
    """F[k, j] = L[j, k] / L[k, k] for H = L L^T, L lower triangular, the columns of H put in `order`.

    PhiquantError if H cannot be factored with any damping.
    """
    mean = hessian.diagonal().mean()
    if mean <= 0:  # no input was ever anything but zero: nothing to make up for
        return torch.zeros_like(hessian, dtype=torch.float32)
    h = hessian.index_select(0, order).index_select(1, order)
    diagonal = h.diagonal().clone()
    while damping <= _LARGEST_DAMPING:
        for dtype in (torch.float32, torch.float64):
            h.diagonal().copy_(diagonal + damping * mean)
            factor, failed = torch.linalg.cholesky_ex(h.to(dtype))
            if not failed and bool(factor.diagonal().isfinite().all()):
                return factor.mT.div_(factor.diagonal().clone()[:, None]).float()
        damping = max(10 * damping, 1e-6)
    raise PhiquantError("the second moments of the layer's inputs cannot be factored; are they finite?")


def _solve(w: Tensor, nearest: QuantizedTensor, feedback: Tensor, order: Tensor) -> QuantizedTensor:
    rows, columns = w.shape
    weight = w.float().T.contiguous().index_select(0, order)  # [K, N]: a row of w along a lane of the kernel
    scale, offset, arguments = kernel_grid(nearest, rows)
    codes = torch.empty(columns, rows, dtype=nearest.codes.dtype)
    for first, stop in from_the_last(0, columns, _WIDE):  # feedback of all columns after: in a few wide products
        wide = torch.addmm(weight[first:stop], feedback[first:stop, stop:], weight[stop:])
        for a, b in from_the_last(first, stop, ops.GPTQ_COLUMNS):
            ops.gptq_run(
                wide[a - first : b - first].addmm_(feedback[a:b, b:stop], weight[b:stop]),
                weight[a:b],
                feedback[a:b, a:b].contiguous(),
                order[a:b],
                scale,
                offset,
                codes,
                **arguments,
            )
    return dataclasses.replace(nearest, codes=codes.T.contiguous())


def from_the_last(first: int, stop: int, step: int) -> Iterator[tuple[int, int]]:
    """(start, end) of runs of `step`, the last run first; the one at `first` may be shorter."""
    while stop > first:
        yield max(first, stop - step), stop
        stop -= step


def kernel_grid(quantized: QuantizedTensor, rows: int) -> tuple[Tensor, Tensor | None, dict[str, Any]]:
    """The grid of a matrix of `rows` rows as `ops.gptq_run` takes it: scale, offset, and keyword arguments."""
    element, codebook = quantized.spec.element, quantized.codebook
    scales, zero_points, minimums = quantized.grid()
    extra = zero_points if minimums is None else minimums
    if codebook is not None and len(codebook) > 1:  # a table for each scale, in their order
        tables = codebook.float().reshape(*scales.shape, -1).repeat_interleave(rows // len(scales), 0)
        codebook = tables.transpose(0, 1).reshape(-1, element.qmax + 1)
    return (
        _per_column(scales, rows),
        None if extra is None else _per_column(extra, rows),
        {
            "minimum": minimums is not None,
            "qmin": element.qmin,
            "qmax": element.qmax,
            **element_arguments(element, codebook),
        },
    )


def _per_column(parameter: Tensor, rows: int) -> Tensor:
    """Stored parameters of any granularity as float32 [G, N], contiguous: G groups of columns, N rows."""
    return parameter.float().repeat_interleave(rows // len(parameter), 0).T.contiguous()


def on(quantized: QuantizedTensor, device: torch.device) -> QuantizedTensor:
    """The same codes and parameters on `device`."""
    moved = copy.copy(quantized)
    for field in dataclasses.fields(quantized):
        part = getattr(quantized, field.name)
        if isinstance(part, Tensor):
            object.__setattr__(moved, field.name, part.to(device))
    return moved
