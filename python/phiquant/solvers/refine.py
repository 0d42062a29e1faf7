"""Codes and the parameters of their grid made better together, after GPTQ (docs/methods/refine.md).

minimise tr(E H E^T) over all that is stored, E = W - Q, H the mean of x x^T over the layer's inputs, in moves that are
exact in this error and kept, row by row, only where they lower it: a group of columns gets other parameters and the
codes that suit them; parameters are fitted to codes by least squares; codes are moved one column after the other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..spec import QuantSpec
from ..statistics import Statistics
from ..tensor import QuantizedTensor
from .gptq import from_the_last, gptq, kernel_grid, on, starved
from .refine_grids import ScaledGrid, stored_as

ROUNDS = 4
_ENOUGH = 0.005  # a round that lowers the error by less than this share is the last
_DAMPING = 0.01  # times the mean of H's diagonal, as in gptq
_VALUES = 1 << 22  # of some rows, refined at a time
_TOGETHER = 256  # columns that are refined before the others learn of it, by one matrix product
_MOST_LEVELS = 32  # of a codebook whose levels are fitted: a matrix product for each
_WIDE, _NARROW = (1, 0.8, 0.86, 0.92, 0.96, 1.04, 1.08), (1, 0.96, 1.04)  # of the ideal scale: first, and later


def gptq_refine(
    w: Tensor, spec: QuantSpec, statistics: Statistics | None = None, *, rounds: int = ROUNDS
) -> QuantizedTensor:
    """Codes of w [N, K] and parameters of their grid: `gptq` on the grid of `mse`, then made better together.

    No row's output error (of the damped H) is larger than gptq's, but for float32 rounding. Parameters that rows share
    (per tensor, several rows, columns; the upper scale of NVFP4) stay as mse found them. A layer that saw too few
    tokens gets the nearest codes, with gptq's warning. Runs on the CPU; the result is on w's device.
    """
    where, w = w.device, _followed(w.cpu(), statistics)
    start = gptq(w, spec, statistics, grid="mse")
    assert statistics is not None  # gptq refuses
    hessian = statistics.hessian.cpu().float()
    mean = hessian.diagonal().mean()
    if not w.numel() or starved(statistics) or mean <= 0 or not bool(torch.isfinite(w).all()):
        return on(start, where)
    hessian = hessian / mean
    hessian.diagonal().add_(_DAMPING)
    apart = spec.scale_shape(tuple(w.shape))[0] == len(w)
    step = max(1, _VALUES // w.shape[1]) if apart else len(w)
    parts = []
    for first in range(0, len(w), step):
        rows = slice(first, first + step)
        parts.append(_Rows(w[rows].float(), _part(start, rows), hessian, apart).refined(rounds))
    return on(_joined(start, parts), where)


def _followed(w: Tensor, statistics: Statistics | None) -> Tensor:
    """The weight that makes of the layer's inputs X what `w` makes of the float model's F, by least squares.

    W' = W + W (F - X) X^T (X X^T + damping)^-1: arXiv 2504.02692's correction of what the layers before have done.
    """
    if statistics is None or statistics.drift is None or starved(statistics) or not w.numel():
        return w
    hessian = statistics.hessian.cpu().double()
    hessian = hessian + _DAMPING * hessian.diagonal().mean().clamp(min=1e-30) * torch.eye(len(hessian))
    correction = torch.linalg.solve(hessian, statistics.drift.cpu().double().T).T
    return (w.double() + w.double() @ correction).float()


def _part(whole: QuantizedTensor, rows: slice) -> QuantizedTensor:
    """Some rows of it; parameters that rows share stay."""
    parts: dict[str, Any] = {}
    for name, parameter in whole.parameters.items():
        each = len(parameter) // len(whole.codes)
        parts[name] = parameter[rows.start * each : rows.stop * each] if each else parameter
    return dataclasses.replace(whole, codes=whole.codes[rows], **parts)


def _joined(whole: QuantizedTensor, parts: Sequence[QuantizedTensor]) -> QuantizedTensor:
    joined: dict[str, Any] = {
        name: torch.cat([part.parameters[name] for part in parts]) if len(parameter) >= len(whole.codes) else parameter
        for name, parameter in whole.parameters.items()
    }
    return dataclasses.replace(whole, codes=torch.cat([part.codes for part in parts]), **joined)


def _where(codes: Tensor, level: int) -> Tensor:
    """1 where the codes are `level`, else 0."""
    return (codes == level).float()


class _Rows:
    """Some rows of W, transposed: weight, values of the codes, gradient = H (weight - values), codes: [K, N]."""

    def __init__(self, w: Tensor, start: QuantizedTensor, hessian: Tensor, apart: bool) -> None:
        self.weight, self.hessian, self.start = w.T.contiguous(), hessian, start
        self.codes = start.codes.T.contiguous()
        self.book = start.codebook if apart else None
        self.grid = ScaledGrid(start) if apart and start.scales is not None else None
        self.values = start.dequantize().T.contiguous()
        self.gradient = hessian @ (self.weight - self.values)
        self.fixed = kernel_grid(start, len(w))

    def quantized(self) -> QuantizedTensor:
        codes = self.codes.T.contiguous()
        if self.grid is not None:
            return self.grid.finished(codes)
        return dataclasses.replace(
            self.start, codes=codes, codebook=self.start.codebook if self.book is None else self.book
        )

    def error(self) -> float:
        return float(((self.weight - self.values) * self.gradient).sum(dtype=torch.float64))

    def refined(self, rounds: int) -> QuantizedTensor:
        before = self.error()
        for number in range(rounds):
            for near in self._stretches():
                old = self.values[near].clone()
                self._refine(near, _WIDE if number < 2 else _NARROW)
                change = self.values[near] - old
                for far in (slice(0, near.start), slice(near.stop, len(self.weight))):
                    self.gradient[far] -= self.hessian[far, near] @ change
            if (after := self.error()) > (1 - _ENOUGH) * before:
                break
            before = after
        return self.quantized()

    def _stretches(self) -> list[slice]:
        """Columns that are refined in one go, before the gradient of all others learns of it: whole blocks of them."""
        blocks = 1
        if self.grid is not None:
            blocks = self.grid.super_blocks or self.grid.groups
        elif self.book is not None:
            blocks = self.book.shape[0] // self.weight.shape[1]
        columns = len(self.weight)
        width = columns // blocks * max(1, _TOGETHER * blocks // columns)
        return [slice(first, min(first + width, columns)) for first in range(0, columns, width)]

    def _refine(self, near: slice, factors: Sequence[float]) -> None:
        """All moves in some columns; only their gradient follows."""
        if self.grid is not None:
            self._move_groups(self.grid, near, factors)
            self._fit_super_blocks(self.grid, near)
        if self.book is not None and self.book.shape[1] <= _MOST_LEVELS:
            self._fit_levels(self.book, near)
        self._sweep(near)

    def _kernel_grid(self) -> tuple[Tensor, Tensor | None, dict[str, Any]]:
        if self.grid is not None:
            return self.grid.scale, self.grid.offset, self.fixed[2]
        if self.book is not None:
            return kernel_grid(dataclasses.replace(self.start, codebook=self.book), self.weight.shape[1])
        return self.fixed

    def _sweep(self, near: slice) -> None:
        """Each code in turn becomes the best one, all others as they are: coordinate descent by GPTQ's own kernel."""
        scale, offset, arguments = self._kernel_grid()
        diagonal = self.hessian.diagonal()[:, None]
        for a, b in from_the_last(near.start, near.stop, ops.GPTQ_COLUMNS):
            run = slice(a, b)
            feedback = self.hessian[run, run] / diagonal[run]
            error = self.weight[run] - self.values[run]
            # The kernel adds what the columns it has visited got wrong; what they got wrong before must go.
            target = self.values[run] + self.gradient[run] / diagonal[run] - feedback.triu(1) @ error
            left = self.weight[run].clone()
            places = torch.arange(a, b)
            ops.gptq_run(target, left, feedback.contiguous(), places, scale, offset, self.codes, **arguments)
            self._add(run, error - left, near)

    def _move_groups(self, grid: ScaledGrid, near: slice, factors: Sequence[float]) -> None:
        width = len(self.weight) // grid.groups
        for group in range(near.start // width, near.stop // width):
            columns = slice(group * width, (group + 1) * width)
            if width <= ops.GPTQ_COLUMNS:
                self._search(grid, group, columns, near, factors)
            else:
                self._fit_group(grid, group, columns, near)

    def _search(self, grid: ScaledGrid, group: int, columns: slice, near: slice, factors: Sequence[float]) -> None:
        """The best of some parameters for a group, each with the codes that GPTQ finds for it, all else as it is.

        What the other columns leave to this group is a target in the metric of its own part of H. near: the columns
        whose gradient follows.
        """
        metric = self.hessian[columns, columns]
        lower = torch.linalg.cholesky(metric)
        target = self.values[columns] + torch.cholesky_solve(self.gradient[columns], lower)
        proposals = grid.proposals(group, *self._ideal(grid, group, columns, metric, target), factors)
        count, rows = len(proposals), self.weight.shape[1]
        scale = torch.cat([p.scale for p in proposals])[None]
        offset = None if grid.offset is None else torch.cat([p.offset for p in proposals if p.offset is not None])[None]
        left = target.repeat(1, count)
        codes = torch.empty(left.shape, dtype=self.codes.dtype)
        feedback = (lower.T / lower.diagonal()[:, None]).contiguous()
        _, _, arguments = kernel_grid(self.start, rows)
        ops.gptq_run(left.clone(), left, feedback, torch.arange(len(left)), scale, offset, codes, **arguments)
        least, which = ((metric @ left) * left).sum(0).view(count, rows).min(0)
        now = target - self.values[columns]
        better = least < (1 - 1e-6) * ((metric @ now) * now).sum(0)
        chosen = which * rows + torch.arange(rows)
        change = torch.where(better, now - left[:, chosen], 0)
        self.codes[columns] = torch.where(better, codes[:, chosen], self.codes[columns])
        self._add(columns, change, near)
        grid.take(group, better, which, proposals)

    def _ideal(
        self, grid: ScaledGrid, group: int, columns: slice, metric: Tensor, target: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """The scale (and minimum) of least error for the group's codes as they are."""
        unit, scale = grid.unit(self.codes[columns]), grid.scale[group]
        weighed, seen = metric @ unit, metric.sum(0)[:, None]
        uu, ut = (unit * weighed).sum(0), (weighed * target).sum(0)
        if "minimums" not in grid.stored:
            if grid.offset is not None:  # zero points
                unit = unit - grid.offset[group]
                weighed = metric @ unit
                uu, ut = (unit * weighed).sum(0), (weighed * target).sum(0)
            found = ut / uu
            return torch.where((found * scale > 0) & found.isfinite(), found, scale), None
        assert grid.offset is not None
        uo, to, oo = (unit * seen).sum(0), (target * seen).sum(0), seen.sum()
        determinant = uu * oo - uo * uo
        found, low = (ut * oo - to * uo) / determinant, (uu * to - uo * ut) / determinant
        good = (determinant > 1e-6 * uu * oo) & (found * scale > 0)
        return torch.where(good, found, scale), torch.where(good, low, grid.offset[group])

    def _fit_group(self, grid: ScaledGrid, group: int, columns: slice, near: slice) -> None:
        """The scale (and minimum) of a long group by least squares, its codes as they are."""
        metric, target = self.hessian[columns, columns], self.weight
        if grid.groups > 1:
            lower = torch.linalg.cholesky(metric)
            target = self.values[columns] + torch.cholesky_solve(self.gradient[columns], lower)
        proposal = grid.proposals(group, *self._ideal(grid, group, columns, metric, target), (1,))[0]
        unit = grid.unit(self.codes[columns])
        if grid.minimum:
            assert proposal.offset is not None
            values = proposal.scale * unit + proposal.offset
        else:
            values = proposal.scale * (unit if proposal.offset is None else unit - proposal.offset)
        better = self._improve(columns, values - self.values[columns], near)
        grid.take(group, better, torch.zeros_like(better, dtype=torch.long), [proposal])

    def _fit_super_blocks(self, grid: ScaledGrid, near: slice) -> None:
        """The scales of scales by least squares, where each row has its own."""
        if not grid.super_blocks:
            return
        width, groups = len(self.weight) // grid.super_blocks, grid.groups // grid.super_blocks
        for block in range(near.start // width, near.stop // width):
            columns, inside = slice(block * width, (block + 1) * width), slice(block * groups, (block + 1) * groups)
            spread = {name: p[inside].repeat_interleave(width // groups, 0) for name, p in grid.stored.items()}
            bases = [spread["scales"] * grid.unit(self.codes[columns])]
            if grid.minimum:
                bases.append(-spread["minimums"])
            change = dict(zip(grid.stored, self._least_squares(columns, len(bases), bases.__getitem__), strict=True))
            fitted = grid.fit_upper(change, block)
            moves = [(fitted[name] - grid.upper[name][block]) * b for name, b in zip(grid.stored, bases, strict=True)]
            better = self._improve(columns, sum(moves[1:], moves[0]), near)
            for name, value in fitted.items():
                grid.upper[name][block] = torch.where(better, value, grid.upper[name][block])
        grid.refresh()

    def _fit_levels(self, book: Tensor, near: slice) -> None:
        """The levels of codebooks by least squares, and in ascending order again."""
        rows, count = self.weight.shape[1], book.shape[1]
        levels = book.float().reshape(rows, -1, count)
        width = len(self.weight) // levels.shape[1]
        for group in range(near.start // width, near.stop // width):
            columns = slice(group * width, (group + 1) * width)
            codes = self.codes[columns].long()
            change = self._least_squares(columns, count, partial(_where, codes))
            old = levels[:, group]
            new = stored_as(old + change.T, self.start.spec.scale_dtype)
            better = self._improve(columns, (new - old).T.gather(0, codes), near)
            ordered, places = torch.where(better[:, None], new, old).sort(dim=1, stable=True)
            levels[:, group] = ordered
            self.codes[columns] = places.argsort(dim=1).T.gather(0, codes).to(self.codes.dtype)
        self.book = levels.reshape(book.shape).to(book.dtype)

    def _least_squares(self, columns: slice, count: int, basis: Callable[[int], Tensor]) -> Tensor:
        """How to change the factors [count, N] of `count` bases [columns, N] for the least error."""
        metric, gradient = self.hessian[columns, columns], self.gradient[columns]
        rows = self.weight.shape[1]
        normal = torch.empty(rows, count, count, dtype=torch.float64)
        right = torch.empty(rows, count, dtype=torch.float64)
        for p in range(count):
            own = basis(p)
            weighed = metric @ own
            right[:, p] = (own * gradient).sum(0)
            for q in range(p, count):
                normal[:, p, q] = normal[:, q, p] = (weighed * basis(q)).sum(0)
        diagonal = normal.diagonal(dim1=1, dim2=2)
        diagonal += 1e-6 * diagonal.mean(1, keepdim=True) + torch.finfo(torch.float32).tiny
        return torch.linalg.solve(normal, right).T.float()

    def _improve(self, columns: slice, change: Tensor, near: slice) -> Tensor:
        """Adds `change` to the values of some columns in the rows, returned as a mask, where the error falls."""
        metric, gradient = self.hessian[columns, columns], self.gradient[columns]
        better = (change * (metric @ change - 2 * gradient)).sum(0) < 0
        self._add(columns, torch.where(better, change, 0), near)
        return better

    def _add(self, columns: slice, change: Tensor, near: slice) -> None:
        self.values[columns] += change
        self.gradient[near] -= self.hessian[near, columns] @ change
