"""Solvers: a weight in, a `QuantizedTensor` out. One file per algorithm, one signature."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import PhiquantError
from ..spec import QuantSpec
from ..spec import spec as read_spec
from ..tensor import QuantizedTensor
from .kmeans import kmeans
from .nearest import mse, mse_exact, rtn
from .ranges import histogram, kl, percentile

Solver = Callable[[Tensor, QuantSpec], QuantizedTensor]
SOLVERS: dict[str, Solver] = {
    "rtn": rtn,
    "mse": mse,
    "mse_exact": mse_exact,
    "percentile": percentile,
    "kl": kl,
    "histogram": histogram,
    "kmeans": kmeans,
}


def quantize_tensor(
    w: Tensor, spec: str | QuantSpec, solver: str = "rtn", name: str = "weight", first_row: int = 0
) -> QuantizedTensor:
    """Choose the codes of `w` (float32, bfloat16 or float16, any shape that the spec divides).

    solver: "rtn" (min-max range, nearest code), "mse" (the best of some ranges in squared error), "mse_exact" (of
    all: docs/mse-search.md), "percentile" (99.9), "kl", "histogram" (docs/ranges.md compares them), "kmeans" (the
    levels of a Codebook). Errors use `name`, and `first_row` if w is rows of a larger tensor: PhiquantError for a
    value that is not finite (with its index), an unknown solver, or a group size that does not divide.
    """
    spec = read_spec(spec)
    if solver not in SOLVERS:
        raise PhiquantError(f"unknown solver {solver!r}; known solvers: {', '.join(SOLVERS)}")
    if not w.is_floating_point():
        raise PhiquantError(f"{name} is {w.dtype}; a solver takes float32, bfloat16 or float16")
    try:
        spec.scale_shape(tuple(w.shape))
    except ValueError as error:
        raise PhiquantError(f"{name}: {error}") from error
    result = SOLVERS[solver](w.detach(), spec)
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
