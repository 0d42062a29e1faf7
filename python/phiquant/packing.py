"""The codes of a `QuantizedTensor` as dense bytes, and back.

packed = pq.pack(qt)                                     # uint8
assert torch.equal(pq.unpack(packed, qt.shape, qt.spec), qt.codes)
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from . import ops
from .spec import QuantSpec, Ternary
from .spec import spec as read_spec
from .tensor import QuantizedTensor


def pack(quantized: QuantizedTensor) -> torch.Tensor:
    """The codes, uint8 [bytes]: `element.bits` each in a little-endian stream; of ternary, five to a byte.

    What is stored is code - element.qmin, in row-major order (ops.pack_bits, ops.pack_trits). Scales and
    codebooks are not in it.
    """
    element = quantized.spec.element
    if isinstance(element, Ternary):
        return ops.pack_trits(quantized.codes)
    return ops.pack_bits(quantized.codes, element.bits, element.qmin)


def unpack(packed: torch.Tensor, shape: Sequence[int], spec: str | QuantSpec) -> torch.Tensor:
    """The codes that `pack` packed: int8 or uint8 of `shape`.

    ValueError if the size is not that of `shape`, or a code is none of the element.
    """
    element = read_spec(spec).element
    count = math.prod(shape)
    if isinstance(element, Ternary):
        codes = ops.unpack_trits(packed, count)
    else:
        codes = ops.unpack_bits(packed, count, element.bits, element.qmin)
        if codes.numel() and int(codes.max()) > element.qmax:
            raise ValueError(f"a code of {int(codes.max())} is none of {element}, whose largest is {element.qmax}")
    return codes.reshape(tuple(shape))
