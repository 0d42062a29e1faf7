"""AWQ: channels whose inputs are large are made larger in the weights, where rounding then hurts them less.

W diag(s) takes the place of W and its producer makes x / s. s is the best of mean|x|^a and of mean|x|^a / mean|w|^(1-a)
for 0 <= a <= 1, by the output error tr(D H D^T), D = Q(W diag(s)) diag(1/s) - W, H the mean of x x^T over the inputs.
arXiv 2306.00978; the second family is AutoAWQ's. docs/methods/awq.md.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..models import phi
from ..quant_spec import QuantSpec
from ..solvers import quantize_tensor
from ..solvers.kmeans import kmeans
from ..solvers.nearest import mse
from ..spec import Codebook
from ..spec import spec as read_spec
from ..statistics import Statistics
from ..tensor import ids_digest
from .inputs import input_statistics
from .pairs import Pair, pairs, rescale

STEPS = 20  # exponents from 0 to 1
ROWS = 512  # of a weight, evenly spaced, that the error is measured on
_RANGE = 1e-4  # inputs below this share of the largest count as that
_log = logging.getLogger("phiquant")

Part = tuple[slice, QuantSpec]  # rows of a consumer, and their grid


@torch.no_grad()
def awq(
    model: nn.Module,
    ids: Tensor,
    specs: Mapping[str, QuantSpec | None],
    solver: str = "mse",
    grid: str = "int4-g32-sym",
) -> dict[str, Any]:
    """Rescale every pair whose consumer gets codes, by what the inputs of the float model ask for.

    solver: chooses the codes inside the search, "mse" (errors weighed by the inputs) or "rtn"; for codebooks kmeans.
    grid: what the consumers will get where `specs` is empty.
    Cost: one forward pass of `ids`, and for a consumer of K inputs 42 times 512 K^2 multiplications.
    """
    whole = None if specs else read_spec(grid)
    todo = {pair.consumer: (pair, parts) for pair in pairs(model) if (parts := _parts(model, pair, specs, whole))}
    before = after = 0.0
    for seen in input_statistics(model, ids) if todo else ():
        for name, statistics in seen.items():
            if name in todo:
                pair, parts = todo.pop(name)
                weight = model.get_submodule(name).get_parameter("weight").detach().float()
                found = search(weight, parts, statistics, pair, solver)
                _log.info("%s: awq, output error %.2e, %.2e %s", name, found.plain, found.error, found.kind)
                before, after = before + found.plain, after + found.error
                rescale(model, pair, found.s)
        if not todo:
            break
    return {"tokens": ids.numel(), "digest": ids_digest(ids), "error_to_plain": after / before if before else 1.0}


@dataclass(frozen=True)
class Found:
    """s: by which the consumer's columns are multiplied, [rows of the producer]. kind: how it was made.

    plain, error: the relative output error with s = 1, and with this s.
    """

    s: Tensor
    kind: str
    plain: float
    error: float


def search(w: Tensor, parts: Sequence[Part], statistics: Statistics, pair: Pair, solver: str = "mse") -> Found:
    """The best factors for the consumer of `pair`, whose weight is w [N, K], float32; never worse than s = 1."""
    hessian = statistics.hessian.to(w.device, torch.float32) / statistics.tokens
    sample = [(_some(w[rows], spec), spec) for rows, spec in parts]
    size = sum(_error(part, hessian) for part, _ in sample)
    best: Found | None = None
    for kind, s in _candidates(w, parts, statistics, pair):
        columns = pair.columns(s)
        error = sum(_rounding_error(part, spec, columns, hessian, solver) for part, spec in sample)
        error = error / size if size else 0.0
        if best is None or error < best.error:
            best = Found(s, kind, error if best is None else best.plain, error)
    assert best is not None
    return best


def _candidates(w: Tensor, parts: Sequence[Part], statistics: Statistics, pair: Pair) -> Iterator[tuple[str, Tensor]]:
    """(text, s) of each; first s = 1."""
    x = _bounded(pair.channels(statistics.abs_mean.to(w.device)).mean(0))
    weights = torch.cat([w[rows] for rows, _ in parts]).abs().mean(0)
    weights = _bounded(pair.channels(weights).mean(0))
    for step in range(STEPS + 1):
        a = step / STEPS
        yield f"x^{a:.2f}", _normal(x**a)
    for step in range(STEPS):  # at a = 1 both are one
        a = step / STEPS
        yield f"x^{a:.2f} / w^{1 - a:.2f}", _normal(x**a / weights ** (1 - a))


def _bounded(size: Tensor) -> Tensor:
    return size.clamp(min=_RANGE * float(size.max())) if size.any() else torch.ones_like(size)


def _normal(s: Tensor) -> Tensor:
    """The largest times the smallest is 1."""
    return s / (s.max() * s.min()).sqrt()


def _rounding_error(part: Tensor, spec: QuantSpec, columns: Tensor, hessian: Tensor, solver: str) -> float:
    weights = hessian.diagonal() / columns.square()
    scaled = part * columns
    if isinstance(spec.element, Codebook):
        codes = kmeans(scaled, spec, weights)
    else:
        codes = mse(scaled, spec, weights) if solver == "mse" else quantize_tensor(scaled, spec, solver)
    return _error(codes.dequantize() / columns - part, hessian)


def _parts(model: nn.Module, pair: Pair, specs: Mapping[str, QuantSpec | None], whole: QuantSpec | None) -> list[Part]:
    """The rows of the pair's consumer that get codes."""
    if whole is not None:
        return [] if pair.consumer == phi.HEAD else [(slice(None), whole)]
    if pair.consumer in specs:
        spec = specs[pair.consumer]
        return [] if spec is None else [(slice(None), spec)]
    rows = phi.fused_rows(model.config.to_dict(), pair.consumer)  # type: ignore[union-attr, operator]
    return [(rows[name], spec) for name in rows if (spec := specs.get(name)) is not None]


def _some(w: Tensor, spec: QuantSpec) -> Tensor:
    """Rows that stand for all, where a row's grid does not depend on others."""
    if spec.block_size(tuple(w.shape)) > w.shape[1] or len(w) <= ROWS:
        return w
    return w[torch.linspace(0, len(w) - 1, ROWS).long()]


def _error(difference: Tensor, hessian: Tensor) -> float:
    return float(((difference @ hessian) * difference).sum(dtype=torch.float64))
