"""Round to nearest, on the min-max range (rtn) or on the range of least squared error (mse).

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
    """As `rtn`, on the shrunken range that minimises the block's squared error; never worse in that error.

    Where scales are stored in two levels, the range is the best one before its scale is rounded to its code.
    """
    if spec.two_level is not None:
        return encode_two_level(w, spec, mse=True)
    scale, zero_point, minimum = ops.choose_range(
        w, spec.scale_shape(tuple(w.shape)), **range_arguments(spec), mse=True
    )
    return encode(w, spec, scale, zero_point, minimum)
