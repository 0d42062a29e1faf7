"""Round to nearest, on the min-max range (rtn) or on a range of least squared error (mse, mse_exact).

The range is projected to the type in which the spec stores it before any code is rounded.
"""

from __future__ import annotations

from torch import Tensor

from .. import ops
from ..fake_quant import encode, encode_dynamic, encode_two_level
from ..observers import range_arguments
from ..spec import QuantSpec
from ..tensor import QuantizedTensor


def rtn(w: Tensor, spec: QuantSpec) -> QuantizedTensor:
    """Each value gets the nearest code on the grid of its block's min-max range."""
    return encode_dynamic(w, spec)


def mse(w: Tensor, spec: QuantSpec) -> QuantizedTensor:
    """As `rtn`, on the best of some shrunken ranges in the block's squared error; never worse in that error.

    Where scales are stored in two levels, the range is the best one before its scale is rounded to its code.
    """
    return _searched(w, spec, exact=False)


def mse_exact(w: Tensor, spec: QuantSpec) -> QuantizedTensor:
    """As `mse`, on the range of least squared error of all (see `ops.search_range`); never worse in that error.

    Scales in two levels are those of `mse`: the rounding to their codes outweighs what is left to gain.
    """
    return _searched(w, spec, exact=True)


def _searched(w: Tensor, spec: QuantSpec, exact: bool) -> QuantizedTensor:
    if spec.two_level is not None:
        return encode_two_level(w, spec, mse=True)
    scale, zero_point, minimum = ops.search_range(
        w, spec.scale_shape(tuple(w.shape)), **range_arguments(spec), exact=exact
    )
    return encode(w, spec, scale, zero_point, minimum)
