"""Round to nearest, on the min-max range (rtn) or on a range of least squared error (mse, mse_exact).

The range is projected to the type in which the spec stores it before any code is rounded.
"""

from __future__ import annotations

from torch import Tensor

from .. import ops
from ..fake_quant import encode, encode_dynamic, encode_two_level
from ..observers import range_arguments
from ..spec import Binary, FixedPoint, PerChannel, QuantSpec, Ternary
from ..tensor import QuantizedTensor


def rtn(w: Tensor, spec: QuantSpec) -> QuantizedTensor:
    """Each value gets the nearest code on the grid of its block's min-max range."""
    return encode_dynamic(w, spec)


def mse(w: Tensor, spec: QuantSpec, weights: Tensor | None = None) -> QuantizedTensor:
    """As `rtn`, on the best of some shrunken ranges in the block's squared error; never worse in that error.

    weights: float32 [K]; how much an error in each column of w [..., K] counts, such as the mean square of its input.

    For floats and NF4 as for integers. Ternary gets its scale of least squared error.

    Where scales are stored in two levels, the range is the best one before its scale is rounded to its code.
    """
    return _searched(w, spec, exact=False, weights=weights)


def mse_exact(w: Tensor, spec: QuantSpec) -> QuantizedTensor:
    """As `mse`, on the range of least squared error of all (see `ops.search_range`); never worse in that error.

    Scales in two levels are those of `mse`: the rounding to their codes outweighs what is left to gain.
    """
    return _searched(w, spec, exact=True)


def _searched(w: Tensor, spec: QuantSpec, exact: bool, weights: Tensor | None = None) -> QuantizedTensor:
    if spec.two_level is not None:
        return encode_two_level(w, spec, mse=True, weights=weights)
    if isinstance(spec.element, Binary | FixedPoint):
        return encode_dynamic(w, spec)  # mean|w| is the scale of least squared error; a fixed step leaves no choice
    if isinstance(spec.granularity, PerChannel) and spec.granularity.axis % w.dim() == w.dim() - 1:
        weights = None  # the values of a block are of one column: all count the same
    arguments = range_arguments(spec)
    if isinstance(spec.element, Ternary):  # the integers -1..1, whatever the rule of the scale would be
        arguments["rule"], exact = "absmax", weights is None
    scale, zero_point, minimum = ops.search_range(
        w, spec.scale_shape(tuple(w.shape)), **arguments, exact=exact, weights=weights
    )
    return encode(w, spec, scale, zero_point, minimum)
