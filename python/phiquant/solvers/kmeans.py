"""Codebooks of least squared error: the exact k-means of the values of each block."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from ..errors import PhiquantError
from ..kmeans import expand_weights
from ..spec import Codebook, QuantSpec
from ..tensor import QuantizedTensor


def kmeans(w: Tensor, spec: QuantSpec, weights: Tensor | None = None) -> QuantizedTensor:
    """The optimal levels of each block, rounded to the type in which the spec stores them, and the nearest codes.

    weights: importance of each value, of a shape that expands to w's: the diagonal of the Hessian as [K] for w [N, K].
    """
    if not isinstance(spec.element, Codebook):
        raise PhiquantError(f"kmeans chooses codebooks, but {spec} has none; use a spec such as 'codebook16-row'")
    x = w.contiguous()
    levels = ops.kmeans_exact(x, expand_weights(weights, w), spec.block_size(tuple(w.shape)), spec.element.size)
    codebook = levels.to(getattr(torch, spec.scale_dtype))
    return QuantizedTensor(ops.codebook_assign(x, codebook.float()), None, None, None, spec, codebook)
