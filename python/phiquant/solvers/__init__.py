"""Solvers: a weight, and what is known of its inputs, in; a `QuantizedTensor` out. One file per algorithm."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ..errors import PhiquantError
from ..spec import QuantSpec
from ..spec import spec as read_spec
from ..statistics import Statistics
from ..tensor import QuantizedTensor
from .adaround import adaround
from .clip import clip
from .gptq import gptq
from .hqq import hqq
from .kmeans import kmeans
from .nearest import mse, mse_exact, rtn
from .ranges import histogram, kl, percentile
from .refine import gptq_refine

Solver = Callable[[Tensor, QuantSpec, Statistics | None], QuantizedTensor]


def _data_free(solver: Callable[[Tensor, QuantSpec], QuantizedTensor]) -> Solver:
    return lambda w, spec, statistics: solver(w, spec)


def _kmeans(w: Tensor, spec: QuantSpec, statistics: Statistics | None) -> QuantizedTensor:
    """With statistics, values count by what their errors do to the output."""
    return kmeans(w, spec, weights=_weights(w, statistics))


def _mse(w: Tensor, spec: QuantSpec, statistics: Statistics | None) -> QuantizedTensor:
    """With statistics, as for k-means: what llama.cpp does with an importance matrix."""
    return mse(w, spec, weights=_weights(w, statistics))


def _weights(w: Tensor, statistics: Statistics | None) -> Tensor | None:
    return None if statistics is None else statistics.square_mean.to(w.device)


SOLVERS: dict[str, Solver] = {
    "rtn": _data_free(rtn),
    "mse": _mse,
    "mse_exact": _data_free(mse_exact),
    "percentile": _data_free(percentile),
    "kl": _data_free(kl),
    "histogram": _data_free(histogram),
    "hqq": hqq,
    "kmeans": _kmeans,
    "clip": clip,
    "adaround": adaround,
    "gptq": gptq,
    "gptq_mse": partial(gptq, grid="mse"),
    "gptq_refine": gptq_refine,
}
NEEDS_STATISTICS = frozenset({"adaround", "clip", "gptq", "gptq_mse", "gptq_refine"})
FOLLOWS_FLOAT = frozenset({"gptq_refine"})  # make up for what the layers before a layer did to its inputs
DATA_FREE = frozenset({"rtn", "mse_exact", "percentile", "kl", "histogram"})  # statistics change nothing


def quantize_tensor(
    w: Tensor,
    spec: str | QuantSpec,
    solver: str = "rtn",
    name: str = "weight",
    first_row: int = 0,
    statistics: Statistics | None = None,
) -> QuantizedTensor:
    """Choose the codes of `w` (float32, bfloat16 or float16, any shape that the spec divides).

    solver: "rtn" (min-max range, nearest code), "mse" (the best of some ranges in squared error), "mse_exact" (of
    all: docs/mse-search.md), "percentile" (99.9), "kl", "histogram" (docs/ranges.md compares them), "hqq" (a norm
    that forgives outliers: docs/methods/hqq.md), "kmeans" (the levels of a Codebook); with
    `statistics` of the layer's inputs "adaround", "gptq", "gptq_mse", "gptq_refine" (docs/methods.md).
    Errors use `name`, and `first_row` if w is rows of a larger tensor: PhiquantError for a value that is not finite
    (with its index), an unknown solver, one that lacks its statistics, or a group size that does not divide.
    """
    spec = read_spec(spec)
    if solver not in SOLVERS:
        raise PhiquantError(f"unknown solver {solver!r}; known solvers: {', '.join(SOLVERS)}")
    if statistics is None and solver in NEEDS_STATISTICS:
        raise PhiquantError(
            f"{name}: the solver {solver} needs statistics of the layer's inputs; give calibration data, "
            "or use rtn or mse"
        )
    if not w.is_floating_point():
        raise PhiquantError(f"{name} is {w.dtype}; a solver takes float32, bfloat16 or float16")
    try:
        spec.scale_shape(tuple(w.shape))
    except ValueError as error:
        raise PhiquantError(f"{name}: {error}") from error
    result = SOLVERS[solver](w.detach(), spec, statistics)
    # A solver gives a NaN scale to a block in which it met a value that is not finite.
    marked = None if spec.two_level else result.scales
    poisoned = ~torch.isfinite(w) if marked is None else marked.isnan()
    if bool(poisoned.any()):
        raise _not_finite(w, name, first_row)
    return result


def _not_finite(w: Tensor, name: str, first_row: int) -> PhiquantError:
    index = torch.nonzero(~torch.isfinite(w))
    first = tuple(index[0].tolist())
    place = [first[0] + first_row, *first[1:]] if first else []
    return PhiquantError(
        f"{name} holds {len(index)} value(s) that are not finite, the first is {w[first].item()} at "
        f"index {place}; repair the checkpoint, or leave this tensor in float by a recipe"
    )
