"""GPTQ's inner step: the typed wrapper of the op and its meta kernel (csrc/core/gptq.h has the formula)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .affine import Levels, codec

_ops = torch.ops.phiquant
GPTQ_COLUMNS = 128  # most columns in one run


def gptq_run(
    target: Tensor,
    weight: Tensor,
    feedback: Tensor,
    column: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    codes: Tensor,
    *,
    minimum: bool,
    qmin: int,
    qmax: int,
    format: str = "integer",
    levels: Levels | None = None,
) -> None:
    """Codes of C <= 128 columns of a weight [N, K], from the last to the first, each making up for those after it.

    All transposed and contiguous; float32 unless said. target: [C, N], the columns and the feedback of all
    columns after them. weight: [C, N], the columns; overwritten by what they differ from their codes' values.
    feedback: [C, C], used above the diagonal. column: int64 [C], their places in the weight. scale, offset: [G, N],
    K / G columns share a row; offset holds zero points, or minimums if `minimum`, or is None. codes: [K, N], int8
    if qmin < 0, else uint8; the rows `column` are written. format, levels: as of ops.quantize; a table is the same for
    all, or one for each scale: [G * N, size]. CPU only.
    """
    named = codec(format, levels, target)
    _ops.gptq_run.default(target, weight, feedback, column, scale, offset, minimum, qmin, qmax, codes, **named)


@torch.library.register_fake("phiquant::gptq_run")
def _nothing(*_: Any) -> None:
    return None
